"""Laws of the commands: flags are read and shown with their defaults, ideas are drawn."""
import argparse
import ast
import dataclasses
import runpy
import sys

import pytest
from PIL import Image

import finetune
import train
from conftest import ROOT
from running.options import options_parser
from test_house import HOUSE, path_of
from test_pages import PARSERS

PICTURES = ["mask.py", "schedules.py", "losses.py", "vit.py", "tasks.py", "data.py",
            "assets/draw_overview.py"]


def run_script(script, arguments, monkeypatch):
    """Run `python FILE ARGUMENTS` in this process -> its exit status."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


# --- flags --------------------------------------------------------------------------------

def names_read(module, owner=None):
    """What a file reads outside of `parser`: attributes and words in quotes.

    owner: the attributes of this variable alone (o.mask, setup.o.mask)."""
    tree = ast.parse(path_of(module).read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "parser"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if owner in (None, getattr(node.value, "id", None), getattr(node.value, "attr", None)):
                yield node.attr
        elif isinstance(node, ast.Constant) and owner is None:
            yield node.value


def test_every_option_of_train_and_finetune_is_read():
    running = [name for name, group in HOUSE.items() if group == "running"]
    readers = {"train", *running} - {"running", "running.options", "running.cost"}
    read = {name for module in readers for name in names_read(module, "o")}
    names = {f.name for f in dataclasses.fields(train.Options)}
    # These are read before there is a run.
    assert names - read <= {"recipe", "resume", "dry_run"}, names - read
    own = {f.name for f in dataclasses.fields(finetune.TuneOptions)} - names
    assert own <= set(names_read("finetune")), own


CLAIMS = [name for name, group in HOUSE.items() if group == "claims"]
READERS = {"sample.py": ["sample"], "restore.py": ["restore", "sample"], "probe.py": ["probe"],
           "fid.py": ["fid"], "vae.py": ["vae"], "reproduce.py": ["reproduce", *CLAIMS]}


@pytest.mark.parametrize("command", READERS)
def test_every_flag_of_the_other_commands_is_read(command):
    read = {word for module in READERS[command] for word in names_read(module)}
    assert {action.dest for action in PARSERS[command]()._actions} - {"help"} <= read


@pytest.mark.parametrize("command", PARSERS)
def test_parsers_take_no_abbreviations_and_show_every_default(command):
    parser = PARSERS[command]()
    assert not parser.allow_abbrev
    flags = [action for action in parser._actions
             if action.option_strings and action.dest != "help"]
    assert all(action.help for action in flags)
    assert " ".join(parser.format_help().split()).count("default:") >= len(flags)


@pytest.mark.parametrize("script", [*PARSERS, *PICTURES])
def test_an_unknown_flag_is_exit_2_and_one_line(script, monkeypatch, capsys):
    assert run_script(script, ["ddm", "B", "--no-such-flag"], monkeypatch) == 2
    told = capsys.readouterr().err
    assert "--no-such-flag" in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("script", READERS)
def test_the_work_of_one_process_is_refused_to_many(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = {"fid.py": ["A", "B"], "reproduce.py": ["ddm"]}.get(script, [])
    assert run_script(script, words, monkeypatch) == 2
    told = capsys.readouterr().err
    assert told == f"error: {script} is the work of one process: start it without torchrun\n"
    assert not list(tmp_path.iterdir())


def test_the_command_line_keeps_false_and_none_apart_from_absent():
    parser = options_parser(train.Options, "")
    assert vars(parser.parse_args(["--no-flip", "--mask", "0"])) == {"flip": False, "mask": 0.0}
    assert isinstance(parser, argparse.ArgumentParser)


# --- pictures -----------------------------------------------------------------------------

@pytest.mark.parametrize("script", PICTURES)
def test_each_concept_draws_its_picture(script, tmp_path, monkeypatch):
    assert run_script(script, ["--out", tmp_path / "picture.png"], monkeypatch) == 0
    assert Image.open(tmp_path / "picture.png").size[0] > 400


def test_a_kind_of_picture_that_can_only_be_read_is_refused(tmp_path, monkeypatch, capsys):
    assert run_script("mask.py", ["--out", tmp_path / "picture.psd"], monkeypatch) == 2
    assert "ends with .png, not with .psd" in capsys.readouterr().err
