"""Laws of the linear probe: it is linear, deterministic and at its optimum, and it finds
what is there."""
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import probe
import train
from conftest import status
from plumbing.console import UserError
from data import load_images
from running.options import Options
from sample import load
from plumbing.images import to_float

pytestmark = pytest.mark.usefixtures("narrow")

TINY = [
    "--size", "16", "--patch", "4", "--batch", "8", "--threads", "1", "--val", "0.25", "--workers",
    "0", "--steps", "2"
]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Noise around three colours, a folder each."""
    folder, rng = tmp_path_factory.mktemp("probe") / "colours", np.random.default_rng(0)
    for name, colour in (("red", (150, 110, 110)), ("green", (110, 150, 110)), ("blue", (110, 110,
                                                                                         150))):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = (np.array(colour) + rng.normal(0, 40, (16, 16, 3))).clip(0,
                                                                              255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def run(colours):
    """A function: "denoise" or "reconstruct" -> the folder of a short run."""
    made, options = {}, {
        "denoise": [],
        "reconstruct": ["--objective", "reconstruct", "--mask", "0.5", "--decoder", "1"]
    }

    def get(objective):
        if objective not in made:
            made[objective] = str(Path(colours).parent / objective)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(Path(colours).parent)
                train.main(
                    ["--data", colours, *TINY, "--out", made[objective], *options[objective]])
        return made[objective]

    return get


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def clouds(n, seed=0, classes=3, width=5):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n, ), generator=g)
    return torch.randn(n, width, generator=g) + 1.5 * torch.eye(classes, width)[y], y


def test_the_classifier_is_the_minimum_of_its_convex_loss_whatever_the_scale_of_the_features():
    """Against scipy, from another start, on standardised features written by hand."""
    from scipy.optimize import minimize
    f, y = clouds(120)
    held, _ = clouds(60, 1)
    mean, std = f.mean(0), f.std(0, correction=0)
    a, b = ((f - mean) / std).double().numpy(), ((held - mean) / std).double().numpy()

    def loss(w):
        w = w.reshape(6, 3)
        logits = a @ w[:5] + w[5]
        return (np.log(np.exp(logits).sum(1)) -
                logits[np.arange(120), y]).mean() + 1e-3 / 2 * (w[:5]**2).sum()

    w = minimize(loss, np.random.default_rng(0).normal(size=18), tol=1e-4).x.reshape(6, 3)
    answers = probe.fit_classifier(f, y, held, 3)
    assert (answers.numpy() == (b @ w[:5] + w[5]).argmax(1)).mean() > 0.98
    scale = torch.tensor([1e-3, 1.0, 1e3, 7.0, 0.1])
    assert (probe.fit_classifier(f * scale + 5 * scale, y, held * scale + 5 * scale,
                                 3) == answers).double().mean() > 0.98


def test_a_feature_that_never_changes_does_no_harm():
    f, y = clouds(60)
    assert torch.equal(
        probe.fit_classifier(torch.cat([f, torch.ones(60, 1)], 1), y,
                             torch.cat([f, torch.ones(60, 1)], 1), 3),
        probe.fit_classifier(f, y, f, 3))


def test_features_are_the_mean_over_all_tokens_of_the_encoders_last_block(colours, run):
    model, images = load(run("reconstruct"), device="cpu"), load_images(colours, 16, labels=True)
    f, y = probe.extract_features(model.net, model, images)
    assert f.shape == (60, model.net.width) and torch.equal(y, images.take(range(60))[1])
    net, x = model.net, to_float(images.take([7])[0])
    from mask import patchify
    from vit import Places, positions, sincos
    with torch.no_grad():
        u = net.embed(patchify(x / model.schedule.data_std, 4))
        u = u + positions(4, 4, net.width, x.device)
        c = net.embed_time(sincos(torch.zeros(1), 256))
        turns = Places(4, 4, x.device).turns(net.width // net.blocks[0].heads)
        for block in net.blocks:
            u = block(u, c, turns=turns)
    torch.testing.assert_close(f[7], u[0].mean(0), atol=1e-4, rtol=1e-4)
    assert not net.blocks[-1]._forward_hooks  # nothing is left behind


@pytest.mark.parametrize("objective", ["denoise", "reconstruct"])
def test_the_command_measures_any_checkpoint_beside_what_knows_nothing(run, objective, capsys):
    told, source = [], run(objective)
    for _ in range(1 + (objective == "reconstruct")):  # and twice the same
        probe.main(["--from", source])  # the run's own data, its split
        told.append(capsys.readouterr().out.splitlines()[-1])
    assert told[0] == told[-1] and "45 images, 3 classes" in told[0] and "15 held-out" in told[0]
    for word in ("encoder", "untrained encoder", "pixels", "chance"):
        assert word in told[0]
    accuracy = [
        float(part.split("%")[0].split()[-1])
        for part in told[0].split("held-out images:")[1].split(",")
    ]
    assert accuracy[0] > 60 > accuracy[3] and accuracy[
        1] > 60  # the mean colour survives the mean over tokens


def test_the_untrained_network_is_given_what_the_trained_one_is(colours, run, monkeypatch):
    """The axes of the data's patches are measured, not trained."""
    built, real = [], probe.ViT

    def watch(*arguments, **sizes):
        built.append(real(*arguments, **sizes))
        return built[-1]

    monkeypatch.setattr(probe, "ViT", watch)
    model = load(run("denoise"), device="cpu")
    probe.probe_accuracy(model, *[load_images(colours, 16, labels=True)] * 2)
    ours, fresh = model.net.guess.state_dict(), built[0].guess.state_dict()
    assert ours.keys() == fresh.keys() and ours
    assert all(torch.equal(ours[name], fresh[name]) for name in ours)


def test_in_latents_both_networks_share_one_cache(colours, capsys):
    import vae
    vae.main([
        "--data", colours, "--size", "16", "--steps", "1", "--batch", "4", "--out", "vae.pt",
        "--threads", "1"
    ])
    train.main([
        "--data", colours, *TINY, "--patch", "2", "--objective", "reconstruct", "--mask", "0.5",
        "--decoder", "1", "--space", "latent", "--vae", "vae.pt", "--latents", "kept", "--out",
        "runs/a"
    ])
    assert len(list(Path("kept").iterdir())) == 1
    probe.main([])
    assert len(list(Path("kept").iterdir())) == 2 and "linear probe" in capsys.readouterr(
    ).out  # one without mirrors
    Path("vae.pt").rename("moved.pt")
    probe.main(["--vae", "moved.pt"])
    assert "linear probe" in capsys.readouterr().out


REFUSED = [(["--noise", "-1"], "--noise"), (["--noise", "nan"], "--noise"), (["--gray"], "--gray"),
           (["--size", "18"], "--size"), (["--size", "0"], "--size"), (["--seed", "-1"], "--seed"),
           (["--cache-gb", "nan"], "--cache-gb"), (["--threads", "-1"], "--threads"),
           (["--val", "2"], "--val"), (["--latents", "x"], "--space latent"),
           (["--no-cache-latents"], "--space latent"), (["--vae", "x"], "--vae"),
           (["--fraction", "0"], "--fraction"), (["--data", "FLAT"], "subfolder"),
           (["--data", "ONE"], "two classes"), (["--from", "nowhere"], "nowhere"),
           (["--latents", "x", "--no-cache-latents"], "keeps nothing"),
           (["--from", "RECONSTRUCT", "--noise", "0.1"], "which has seen none")]


@pytest.mark.parametrize("arguments, word",
                         REFUSED,
                         ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_what_cannot_be_probed_is_refused_in_one_line(colours, run, arguments, word):
    shutil.copytree(Path(colours) / "red", "one/red")
    places = {"FLAT": str(Path(colours) / "red"), "ONE": "one"
              } | ({"RECONSTRUCT": run("reconstruct")} if "RECONSTRUCT" in arguments else {})
    with pytest.raises(UserError, match=word) as error:
        probe.main(["--from", run("denoise"), *(places.get(a, a) for a in arguments)])
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_its_options_is_one_line(run, tmp_path):
    ckpt = torch.load(Path(run("denoise")) / "last.pt", weights_only=False)
    del ckpt["config"]
    torch.save(ckpt, tmp_path / "bare.pt")
    with pytest.raises(UserError, match="has no options"):
        probe.main(["--from", str(tmp_path / "bare.pt")])


@pytest.mark.parametrize("flags", [["--lr", "1"], ["--mask", "0.5"], ["--steps", "3"]])
def test_what_a_probe_does_not_read_is_no_flag_of_it(flags, capsys):
    assert status(probe, flags) == 2 and flags[0] in capsys.readouterr().err


def test_held_out_images_belong_to_their_data():
    """With other data, --val is the default and not the run's; what is given wins, and an
    older run has the defaults."""
    config = dict(data="a", val="0.25", size=16)
    o = probe.inherit_probe_options({}, config)
    assert (o.data, o.val, o.size, o.seed, o.weights) == ("a", "0.25", 16, Options.seed, "model")
    assert probe.inherit_probe_options(dict(data="b"),
                                       config).val == Options.val and probe.inherit_probe_options(
                                           dict(data="b", val="0.5"), config).val == "0.5"
