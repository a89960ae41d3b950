"""Laws of old checkpoints: read as they were meant, or refused in one line."""
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import sample as S
import train
from mask import patchify
from plumbing.checkpoint import VERSION, read_checkpoint
from plumbing.console import UserError
from restore import draw_masks, fill_hidden
from sample import load, require_same_meaning
from schedules import PREDICTIONS, SCHEDULES
from vit import ViT

pytestmark = pytest.mark.usefixtures("narrow")

SMALL = dict(channels=3, patch=4, skips=False, economy="drop", width=32, depth=1, heads=1,
             decoder_width=32)


def write(path, version=1, data_std=0.5, recon=0.0, decoder=0, **named):
    """A checkpoint as a version of this program wrote it, of random weights."""
    torch.manual_seed(0)
    meta = dict(stage="train", objective="denoise", recon_target="clean", ratio=0.5,
                schedule="ddm", predict="both", space="pixel", task="generate", channels=3,
                size=16, classes=[], vae=None, vae_sha="", data_std=data_std, plan=3,
                progress=1.0, skipped=0, shards=1) | named
    schedule = replace(SCHEDULES[meta["schedule"]], data_std=data_std)
    cond = 3 if meta["task"] == "superres" else 0
    meta["model"] = SMALL | dict(heads_out=schedule.head_count(meta["predict"]), classes=0,
                                 decoder=decoder, cond_channels=cond)
    net = ViT(schedule, **meta["model"])
    weights = {name: q + 0.1 * torch.randn_like(q) for name, q in net.state_dict().items()}
    config = dict(recon=recon, recon_target=meta["recon_target"], decoder=decoder)
    ckpt = dict(version=version, config=config, meta=meta, step=3, images=24, seconds=1.0,
                model=weights, ema=weights)
    torch.save(ckpt, path)
    return path


def turned_away(path, trains):
    """The line that refuses a file, or None."""
    ckpt = read_checkpoint(path)
    try:
        require_same_meaning(ckpt, path, trains)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error) and "version 1" in str(error)
        return str(error)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_version_1_is_refused_where_both_or_v_meant_something_else(name, predict, tmp_path):
    """`both` where a stays above 0 (edm); `v` where a^2 + b^2 is not 1 (all but vp-...)."""
    path = write(tmp_path / "a.pt", schedule=name, predict=predict)
    word = {"both": name == "edm" and "image head",
            "v": not name.startswith("vp-") and "sqrt(a^2 + b^2)"}.get(predict)
    for trains in (False, True):
        line = turned_away(path, trains)
        assert word in line if word else line is None
    if word:
        with pytest.raises(UserError, match="--predict"):
            load(path, device="cpu")
    else:
        loaded, now = load(path, device="cpu"), load(write(tmp_path / "b.pt", 2, schedule=name,
                                                           predict=predict), device="cpu")
        assert torch.equal(S.sample(loaded, 2, 2), S.sample(now, 2, 2))


def test_version_1_of_superres_is_refused(tmp_path):
    path = write(tmp_path / "a.pt", task="superres", predict="unit")
    assert "bicubic" in turned_away(path, False) and "bicubic" in turned_away(path, True)
    for task in ("inpaint", "edges", "saliency"):
        assert turned_away(write(tmp_path / "b.pt", task=task, predict="unit"), True) is None


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("target", ["clean", "noisy", "whitened"])
@pytest.mark.parametrize("how", [dict(objective="reconstruct"), dict(recon=0.1)])
def test_version_1_with_a_reconstruction_is_read_but_not_trained_on(
        how, target, predict, tmp_path):
    """Its clean target was z / s for all predictions, it is z for x0 and both."""
    path = write(tmp_path / "a.pt", schedule="vp-cosine", predict=predict, decoder=1,
                 recon_target=target, **how)
    assert turned_away(path, False) is None
    changed = target == "clean" and predict in ("x0", "both")
    line = turned_away(path, True)
    assert "hidden patches" in line if changed else line is None
    without = write(tmp_path / "b.pt", schedule="vp-cosine", predict=predict, decoder=1,
                    recon_target=target)
    assert turned_away(without, True) is None


def test_a_reconstruction_model_of_version_1_fills_in_what_it_did(tmp_path):
    """Its raw output is z / s, a later one's z."""
    z = torch.randn(2, 3, 16, 16)
    for version, unit in ((1, 0.5), (VERSION, 1.0)):
        path = write(tmp_path / f"{version}.pt", version, objective="reconstruct", predict="x0",
                     decoder=1)
        model = load(path, device="cpu")
        m = draw_masks(model, 2, 0.5)
        with torch.no_grad():
            out = model.net(z, torch.zeros(2, dtype=torch.float64), None, m)
        filled = patchify(fill_hidden(model, z, m), 4)
        assert torch.allclose(filled[~m.visible], unit * patchify(out, 4)[~m.visible])


def test_a_file_of_version_2_is_never_refused_for_its_meaning(tmp_path):
    for named in (dict(schedule="edm"), dict(predict="v"), dict(task="superres", predict="unit"),
                  dict(objective="reconstruct", decoder=1), dict(recon=0.1, decoder=1)):
        assert turned_away(write(tmp_path / "a.pt", 2, **named), True) is None


@pytest.mark.parametrize("version", [VERSION + 1, 99])
def test_a_file_of_a_newer_version_asks_for_an_update(version, tmp_path):
    path = write(tmp_path / "a.pt", version)
    with pytest.raises(UserError, match=f"version {version}.* up to {VERSION}: update") as error:
        load(path, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [-1, None, "1", 1.0, True])
def test_what_is_no_version_is_refused(version, tmp_path):
    with pytest.raises(UserError, match="version|checkpoint"):
        load(write(tmp_path / "a.pt", version), device="cpu")


# --- the commands -------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with twelve small pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for s, handler in before.items():
        signal.signal(s, handler)


RUN = ["--data", "photos", "--size", "16", "--patch", "8", "--batch", "4", "--threads", "1",
       "--workers", "0", "--val", "0.2", "--device", "cpu"]


@pytest.mark.parametrize("options, why", [
    (["--predict", "both"], None),
    (["--schedule", "edm"], "image head"),
    (["--predict", "v"], "target of --predict v"),
    (["--task", "superres", "--predict", "unit"], "bicubic"),
    (["--decoder", "1", "--mask", "0.5", "--recon", "0.1"], "hidden patches"),
    (["--decoder", "1", "--mask", "0.5", "--recon", "0.1", "--predict", "unit"], None),
    (["--decoder", "1", "--mask", "0.5", "--objective", "reconstruct"], "hidden patches")])
def test_a_run_of_version_1_is_continued_or_refused(options, why, folder):
    train.main([*RUN, *options, "--steps", "2", "--out", "runs/a"])
    last = folder / "runs/a/last.pt"
    ckpt = torch.load(last, weights_only=True)
    assert ckpt["version"] == VERSION
    torch.save(ckpt | dict(version=1), last)

    def resume():
        train.main(["--out", "runs/a", "--resume", "--steps", "3"])

    def tune():
        more = options[2:4] if "reconstruct" in options else []
        finetune.main(["--from", "runs/a", "--steps", "1", "--out", "runs/b", *more])

    for go in (tune, resume):
        if why:
            with pytest.raises(UserError, match=why):
                go()
        else:
            go()
    if why:
        assert not (folder / "runs/b").exists()
    else:
        assert torch.load(last, weights_only=True)["version"] == VERSION
