"""Claims run from nothing to a table, and what was done is not done again."""
import json

import pytest
from PIL import Image

import claims.bench
import data
import reproduce
import running.setup
import train
import vae
from plumbing.console import UserError


@pytest.fixture
def tiny_world(tmp_path, monkeypatch):
    """Forty faces and networks that are trained for four steps."""
    few = lambda source, *args, **how: data.load_images(source, *args, **how | (dict(count=40) if source == "faces" else {}))
    monkeypatch.setattr(running.setup, "load_images", few)
    monkeypatch.setattr(reproduce, "load_images", few)
    monkeypatch.setattr(vae, "load_images", few)
    monkeypatch.setattr(claims.bench, "proxy_distances", lambda a, b: {name: (abs(float(a.float().mean() - b.float().mean())), 0.0) for name in ("pixel", "random-conv", "swd")})
    monkeypatch.chdir(tmp_path)
    train_flags = ["--batch", 2, "--sample-every", 4]
    monkeypatch.setitem(reproduce.DDM_SCALES, "smoke", dict(steps=4, half=2, model="tiny", train=train_flags, n=8, few=8, calls=[1, 2], long=[3], ddpm=[2], batch=8))
    monkeypatch.setitem(reproduce.TASK_SCALES, "smoke", dict(pre=2, tune=2, model="tiny", train=["--batch", 2], n=4, calls=[1, 2], batch=4))
    monkeypatch.setitem(reproduce.MASKDM_SCALES, "smoke", dict(steps=4, minutes=1, model="tiny", train=["--batch", 2], n=4, batch=4))
    monkeypatch.setitem(reproduce.LMD_SCALES, "smoke", dict(steps=2, minutes=1, vae=["--steps", 1, "--batch", 2], model="tiny", train=["--batch", 2], batch=4))
    monkeypatch.setitem(reproduce.MASKDIT_SCALES, "smoke", dict(steps=4, minutes=1, model="tiny", train=["--batch", 2], rates=[1e-3], n=6, calls=3, batch=6, side_arms=1))
    return tmp_path / "runs" / "reproduce-smoke"


@pytest.mark.parametrize("claim", reproduce.CLAIMS)
def test_a_claim_makes_a_table_and_pictures_and_a_second_call_trains_and_measures_nothing(claim, tiny_world, monkeypatch):
    command = [claim, "--scale", "smoke", "--size", "16", "--threads", "1"]
    reproduce.main(command)
    folder = tiny_world / claim
    cells = json.loads((folder / "cells.json").read_text())
    table = (folder / "table.md").read_text()
    assert len(cells) > 5 and table.count("|") > 20 and "nan" not in table
    for picture in folder.glob("*.png"):
        assert Image.open(picture).size[0] > 100
    assert list(folder.glob("*.png"))
    (folder / "table.md").unlink()
    monkeypatch.setattr(train, "train", None)                                   # a step of training would fail, a measurement too
    monkeypatch.setattr(claims.bench, "proxy_distances", None)
    reproduce.main(command)
    assert (folder / "table.md").read_text() == table and json.loads((folder / "cells.json").read_text()) == cells


@pytest.mark.parametrize("scale", reproduce.DDM_SCALES)
def test_the_checkpoint_of_half_the_length_is_one_that_is_kept(scale):
    settings = reproduce.DDM_SCALES[scale]
    assert settings["steps"] % settings["half"] == 0


def test_one_arm_is_trained_by_itself(tiny_world):
    reproduce.main(["ddm", "--scale", "smoke", "--size", "16", "--threads", "1", "--arm", "ddm-unit"])
    assert [p.name for p in (tiny_world / "ddm").iterdir()] == ["ddm-unit"]
    with pytest.raises(UserError, match="--arm no-such: the arms of ddm are .*ddm-unit"):
        reproduce.main(["ddm", "--scale", "smoke", "--size", "16", "--threads", "1", "--arm", "no-such"])


@pytest.mark.parametrize("claim", reproduce.CLAIMS)
def test_a_wrong_arm_costs_nothing(claim, tiny_world, monkeypatch):
    monkeypatch.setattr(train, "train", None)                                   # neither a step of training nor one that is only timed, nor an autoencoder
    monkeypatch.setattr(vae, "main", None)
    for scale in ("smoke", "cpu"):
        with pytest.raises(UserError, match="--arm no-such"):
            reproduce.main([claim, "--scale", scale, "--arm", "no-such"])


def test_arms_differ_in_the_thing_under_test_and_in_nothing_else(tiny_world):
    reproduce.main(["ddm", "--scale", "smoke", "--size", "16", "--threads", "1"])
    configs = {p.parent.name: json.loads(p.read_text()) for p in (tiny_world / "ddm").glob("*/config.json")}
    differ = {key for config in configs.values() for key in config if config[key] != configs["ddm-both"][key]}
    assert differ == {"schedule", "predict", "steps", "out"}
