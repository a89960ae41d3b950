"""Laws of labels on the command line: a name is a name however it is written, a number that
is a name is one, and what was drawn is said."""
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import restore
import sample as sampling
import train
from plumbing.console import UserError
from sample import check_guided_labels, find_class

NUMBERS, WORDS = ["001", "002", "010"], ["ant", "bee", "3 cats"]
FLAGS = ["--size", "8", "--batch", "2", "--threads", "1", "--sample-every", "1000", "--amp", "off",
         "--steps", "1", "--device", "cpu", "--labels", "--workers", "0"]

pytestmark = pytest.mark.usefixtures("narrow")


def folder_of_classes(place, names):
    for k, name in enumerate(names):
        (place / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (60 * k, 10 * i, 0)).save(place / name / f"{i}.png")
    return str(place)


@pytest.mark.parametrize("label, classes, number", [
    ("1", NUMBERS, 0), ("001", NUMBERS, 0), ("2", NUMBERS, 1), ("10", NUMBERS, 2), (2, NUMBERS, 2),
    ("1", WORDS, 1), ("bee", WORDS, 1), ("3 cats", WORDS, 2), (-1, WORDS, -1),
    ("1", ["0", "2", "1"], 2), ("2", ["a", "b", "2"], 2)])
def test_a_number_is_a_name_where_names_are_numbers(label, classes, number):
    assert find_class(label, classes) == number


@pytest.mark.parametrize("label, classes", [
    ("0", NUMBERS), ("3", NUMBERS), ("1", ["01", "001"]), ("3", WORDS), ("-1", WORDS),
    ("0", ["a", "b", "2"]), ("\u0661", NUMBERS), ("1", [])])
def test_a_number_that_is_no_name_is_refused_and_the_classes_are_named(label, classes):
    known = classes[0] if classes else "without"
    with pytest.raises(UserError, match=f"--label {label}: .*{known}"):
        find_class(label, classes)


def test_an_accent_may_be_written_in_two_ways():
    one, two = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert one != two
    for label in (one, two):
        for name in (one, two):
            assert find_class(label, ["ant", name]) == 1


def test_what_was_drawn_stands_in_the_last_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--data", folder_of_classes(tmp_path / "data", NUMBERS), *FLAGS, "--out", "run"])
    common = ["--ckpt", "run", "--n", "2", "--steps", "1", "--device", "cpu", "--amp", "off"]
    arrays = []
    for label in ("1", "001"):
        sampling.main([*common, "--label", label, "--out", f"{label}.npz"])
        assert capsys.readouterr().out.splitlines()[-1].endswith("class 001")
        arrays.append(np.load(f"{label}.npz")["images"])
    assert (arrays[0] == arrays[1]).all()
    with pytest.raises(UserError, match="--label 0: the classes are 001, 002, 010"):
        sampling.main([*common, "--label", "0", "--out", "0.npz"])
    sampling.main([*common, "--out", "all.npz"])
    assert "class 001" not in capsys.readouterr().out


def test_guidance_of_a_model_that_always_saw_the_label_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = folder_of_classes(tmp_path / "data", WORDS)
    train.main(["--data", data, *FLAGS, "--label-dropout", "0", "--out", "run"])
    common = ["--ckpt", "run", "--n", "2", "--steps", "1", "--device", "cpu"]
    for cfg in ("3", "0"):
        with pytest.raises(UserError, match=f"--cfg {cfg}.*--label-dropout 0"):
            sampling.main([*common, "--cfg", cfg])
    common += ["--label", "bee"]
    with pytest.raises(UserError, match="--label bee: --cfg 0 knows no class"):
        sampling.main([*common, "--cfg", "0"])
    model = sampling.load("run", device="cpu")
    with pytest.raises(UserError, match="--label-dropout 0"):
        sampling.sample(model, 1, 1, labels=0, cfg=2.0)
    sampling.main([*common, "--cfg", "1"])
    labels = torch.zeros(2, dtype=torch.int64)
    check_guided_labels(3.0, labels, dict(classes=WORDS, label_dropout=0.1))
    check_guided_labels(3.0, labels, dict(classes=WORDS))           # an older file does not say


@pytest.mark.parametrize("command", [sampling, restore])
def test_paths_know_the_home_folder(command, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = [action.option_strings[0] for action in command.parser()._actions
             if action.option_strings and action.dest in
             ("ckpt", "vae", "out", "trace", "input", "holes", "targets")]
    for name in names:
        given = vars(command.parser().parse_args([f"{name}=~/x"]))
        assert given[name[2:]] == "/home/me/x"
