"""Laws of what is written: never over an input, never through a link, whole or not at
all."""
import os
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from PIL import Image

from conftest import ROOT
from plumbing.console import UserError
from plumbing.trace import Trace
from plumbing.writer import ImageWriter, refuse_overwriting


@pytest.fixture
def place(tmp_path, monkeypatch):
    """photos/ with a picture, a zip, and links to both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save("photos/deep/a.png")
    (tmp_path / "in.zip").write_bytes(b"zip")
    Image.new("RGB", (4, 4)).save("elsewhere.png")
    os.symlink("photos", "linked")
    os.symlink("in.zip", "other.zip")
    os.symlink(tmp_path / "elsewhere.png", "photos/b.png")
    os.mkdir("more")
    Image.new("RGB", (4, 4)).save("more/c.png")
    os.symlink(tmp_path / "more", "photos/more")
    return tmp_path


@pytest.mark.parametrize("out, source", [
    ("in.zip", "in.zip"), ("./photos/../in.zip", "in.zip"), ("other.zip", "in.zip"),
    ("in.zip", "other.zip"), ("photos", "photos"), ("linked", "photos"), ("photos", "linked"),
    ("photos/deep/a.png", "photos"), ("photos/deep/a.png", "linked"),
    ("linked/deep/a.png", "photos"), ("elsewhere.png", "photos"), ("photos/b.png", "photos"),
    ("more/c.png", "photos"), ("photos/more/c.png", "photos")])
def test_an_output_that_is_an_input_is_refused(place, out, source):
    with pytest.raises(UserError, match="--out .* would overwrite --input"):
        refuse_overwriting({"--out": out}, {"--holes": None, "--input": source})


@pytest.mark.parametrize("out", [
    "photos/new.png", "photos.zip", "new", "photos/deep/new", "photos.png", "more.png", None])
def test_an_output_beside_the_inputs_is_not(place, out):
    refuse_overwriting({"--out": out}, {"--input": "photos", "--targets": "in.zip"})


def test_two_outputs_are_two_files(place):
    with pytest.raises(UserError, match="--trace .*a.png would overwrite --out"):
        refuse_overwriting({"--out": "a.png", "--trace": "./a.png"}, {})


@pytest.mark.parametrize("name", ["a.png", "a.zip", "a.npz"])
def test_a_link_is_replaced_and_what_it_led_to_stays(place, name):
    (place / "precious").write_text("precious")
    os.symlink("precious", name)
    with ImageWriter(name) as writer:
        writer.add(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert (place / "precious").read_text() == "precious" and not (place / name).is_symlink()
    assert name != "a.zip" or len(zipfile.ZipFile(name).namelist()) == 2


def test_a_trace_replaces_a_link_and_tells_early_that_it_cannot_be_written(place):
    (place / "precious").write_text("precious")
    os.symlink("precious", "way.png")
    trace = Trace("way.png", lambda t: 1.0, lambda z: z)
    trace(torch.tensor(0.5), torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    trace.finish(torch.zeros(1, 3, 4, 4))
    trace.save()
    assert (place / "precious").read_text() == "precious" and Image.open("way.png").size[0] > 4
    os.mkdir("folder.png")
    for bad in ("folder.png", "in.zip/way.png"):
        with pytest.raises((UserError, OSError)):
            Trace(bad, lambda t: 1.0, lambda z: z)


WORK = """
import sys, time; sys.path.insert(0, {root!r})
import torch
from plumbing.console import replacing, run_command
from plumbing.writer import ImageWriter, refuse_overwriting
def main():
    with {how} as file:
        if hasattr(file, "add"):
            file.add(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
        print("begun", flush=True)
        time.sleep(600)
run_command(main)
"""


@pytest.mark.parametrize("number, code", [
    (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["ImageWriter('a.zip')", "replacing('a.npz')"])
def test_a_signal_leaves_no_temporary_file(tmp_path, how, number, code):
    work = subprocess.Popen([sys.executable, "-c", WORK.format(root=str(ROOT), how=how)],
                            cwd=tmp_path, stdout=subprocess.PIPE)
    assert work.stdout.readline() == b"begun\n" and os.listdir(tmp_path)
    work.send_signal(number)
    assert work.wait(120) == code and os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["samples.png", "samples.zip", "deep/samples.png"])
def test_a_place_that_cannot_be_written_is_named_without_a_temporary_name(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"samples\.\w+ cannot be written") as error:
        with ImageWriter(str(tmp_path / "file" / name)):
            raise AssertionError("told too late")
    assert ".tmp" not in str(error.value)
