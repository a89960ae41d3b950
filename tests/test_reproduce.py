"""Claims run from nothing to a table, and what was done is not done again."""
import json

import pytest
from PIL import Image

import claims.ablate
import claims.bench
import claims.ddm
import claims.lmd
import claims.maskdit
import claims.maskdm
import claims.tasks
import data
import reproduce
import running.setup
import train
import vae
import vit
from plumbing.console import UserError

TINY = dict(width=32, depth=2, heads=2, decoder_width=32)
TRAIN = ["--batch", 2]
SCALES = {
    claims.ddm: dict(steps=4, half=2, model="tiny", train=[*TRAIN, "--sample-every", 4], batch=12,
                     n=8, few=8, calls=[1, 2], long=[3], ddpm=[2]),
    claims.tasks: dict(pre=2, tune=2, model="tiny", train=TRAIN, n=4, calls=[1, 2], batch=4),
    claims.maskdm: dict(steps=4, minutes=1, model="tiny", train=TRAIN, n=4, batch=10),
    claims.lmd: dict(steps=2, minutes=1, vae=["--steps", 1, *TRAIN], model="tiny", train=TRAIN,
                     batch=16),
    claims.ablate: dict(steps=4, minutes=1, model="tiny", train=TRAIN, n=4, batch=10),
    claims.maskdit: dict(steps=4, minutes=1, model="tiny", train=TRAIN, rates=[1e-3], n=6,
                         calls=3, batch=12, side_arms=1),
}


def load_few(source, *args, **how):
    """As data.load_images, but of the built-in faces only forty."""
    few = dict(count=40) if source == "faces" else {}
    return data.load_images(source, *args, **how | few)


def difference_of_means(a, b):
    """A distance that costs nothing."""
    value = abs(float(a.float().mean() - b.float().mean()))
    return {name: (value, 0.0) for name in ("pixel", "random-conv", "swd")}


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    """Forty faces, networks of two narrow blocks, trained for four steps. -> the claims'
    folder"""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for module in (running.setup, claims.bench, vae):
            patch.setattr(module, "load_images", load_few)
        patch.setattr(claims.bench, "proxy_distances", difference_of_means)
        patch.setitem(vit.MODELS, "tiny", TINY)
        patch.setitem(vit.MODELS, "tiny-dit", TINY)
        for module, scale in SCALES.items():
            patch.setitem(module.SCALES, "smoke", scale)
        few = list(claims.ablate.ARMS)[-6:]                         # of the ablation's arms
        patch.setattr(claims.ablate, "ARMS", {name: claims.ablate.ARMS[name] for name in few})
        patch.chdir(home)
        yield home / "runs" / "reproduce-smoke"


def run_claim(claim, *flags):
    reproduce.main([claim, "--scale", "smoke", "--size", "16", "--threads", "1", *flags])


@pytest.fixture
def finished(tiny_world):
    """A claim's name -> its folder, after a smoke run that all tests share."""
    def finish(claim):
        if not (tiny_world / claim / "table.md").exists():
            run_claim(claim)
        return tiny_world / claim
    return finish


@pytest.mark.parametrize("claim", reproduce.CLAIMS)
def test_a_claim_makes_a_table_and_pictures_and_a_second_call_trains_and_measures_nothing(
        claim, finished, monkeypatch):
    folder = finished(claim)
    cells = json.loads((folder / "cells.json").read_text())
    table = (folder / "table.md").read_text()
    assert len(cells) > 5 and table.count("|") > 20 and "nan" not in table
    for picture in folder.glob("*.png"):
        assert Image.open(picture).size[0] > 100
    assert list(folder.glob("*.png"))
    (folder / "table.md").unlink()
    # Now a step of training would fail, and a measurement, too.
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(claims.bench, "proxy_distances", None)
    run_claim(claim)
    assert (folder / "table.md").read_text() == table
    assert json.loads((folder / "cells.json").read_text()) == cells


@pytest.mark.parametrize("scale", claims.ddm.SCALES)
def test_the_checkpoint_of_half_the_length_is_one_that_is_kept(scale):
    settings = claims.ddm.SCALES[scale]
    assert settings["steps"] % settings["half"] == 0


def test_one_arm_is_trained_by_itself(tiny_world, tmp_path):
    run_claim("ddm", "--arm", "ddm-unit", "--out", str(tmp_path))
    assert [p.name for p in (tmp_path / "ddm").iterdir()] == ["ddm-unit"]
    with pytest.raises(UserError, match="--arm no-such: the arms of ddm are .*ddm-unit"):
        run_claim("ddm", "--arm", "no-such", "--out", str(tmp_path))


@pytest.mark.parametrize("claim", reproduce.CLAIMS)
def test_a_wrong_arm_costs_nothing(claim, tiny_world, tmp_path, monkeypatch):
    # Neither a step of training, nor one that is only timed, nor an autoencoder.
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(vae, "main", None)
    for scale in ("smoke", "cpu"):
        with pytest.raises(UserError, match="--arm no-such"):
            reproduce.main([claim, "--scale", scale, "--arm", "no-such", "--out", str(tmp_path)])


def test_arms_differ_in_the_thing_under_test_and_in_nothing_else(finished):
    configs = {path.parent.name: json.loads(path.read_text())
               for path in finished("ddm").glob("*/config.json")}
    ours = configs["ddm-both"]
    differ = {key for config in configs.values() for key in config if config[key] != ours[key]}
    assert differ == {"schedule", "predict", "steps", "out"}


@pytest.mark.parametrize("claim", ["ddm", "maskdit"])
def test_a_claim_in_colour_refuses_gray(claim, tmp_path):
    with pytest.raises(UserError, match=f"--gray: the claim {claim} is measured in colour"):
        run_claim(claim, "--gray", "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_help_names_every_claim_by_its_first_docstring_line():
    text = " ".join(reproduce.parser().format_help().split()).replace("- ", "-")  # broken words
    for name, run in reproduce.CLAIMS.items():
        assert f"{name}: {run.__doc__.splitlines()[0]}" in text


def test_a_claims_folder_is_not_its_data(tmp_path):
    (tmp_path / "ddm").mkdir()
    with pytest.raises(UserError, match="--out .*ddm would overwrite --data"):
        run_claim("ddm", "--data", str(tmp_path / "ddm"), "--out", str(tmp_path))
    assert not list((tmp_path / "ddm").iterdir())


def test_the_table_of_reconstruction_says_what_one_is(finished):
    table = (finished("lmd") / "table.md").read_text()
    assert "1: an all-zero guess" in table and "the mean of the training images" in table
    mean = json.loads((finished("lmd") / "cells.json").read_text())["the mean image"]
    assert 0 < mean < 2
