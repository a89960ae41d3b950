"""Laws of the command line: whatever is typed, it works or it is one line and status 2.

Never a traceback, a hang, or a character that a terminal would obey."""
import contextlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from conftest import ROOT

ODD = ["", " ", "nan", "inf", "-inf", "-1", "0", "1", "2", "3.5", "1e-9", "1_000", "\uff11", "x",
       "nowhere", "/", ".", "..", "/dev/null", "~", "~nobody", "a\udcffb", "\x1b[31mred", "\u202e",
       "photos", "photos/0.png", "notes.txt", "runs/a", "runs/a/last.pt", "faces", "out.png",
       "out.zip", "out.npz", "folder/out.png", "photos/new.png", "link", "a\nb", "-", "--", "é"]
LONG = {"steps", "minutes", "n", "batch", "size", "workers", "threads", "scale", "micro_batch",
        "sample_every", "save_every", "device", "model", "claim", "warmup", "compile", "recipe"}


def build_commands():
    """{name: (main, parser, arguments that make it small)}"""
    import fid
    import finetune
    import probe
    import restore
    import sample
    import train
    import vae
    small = ["--steps", "1", "--batch", "2", "--threads", "1"]
    run = ["--size", "8", "--sample-every", "1000", *small]
    return {
        "train": (train.main, train.options_parser(train.Options, ""), run),
        "finetune": (finetune.main, train.options_parser(finetune.TuneOptions, ""), small),
        "sample": (sample.main, sample.parser(), ["--steps", "1", "--n", "1"]),
        "restore": (restore.main, restore.parser(), ["--steps", "1", "--n", "1"]),
        "fid": (fid.main, fid.parser(), ["photos", "photos", "--proxy"]),
        "probe": (probe.main, probe.parser(), ["--threads", "1"]),
        "vae": (vae.main, vae.parser(), ["--size", "8", *small])}


def type_line(parser, rng):
    """A few flags of a parser with values of all kinds. -> list of words"""
    words = []
    actions = [action for action in parser._actions
               if action.option_strings and action.dest not in LONG | {"help"}]
    for action in rng.sample(actions, rng.randint(1, 4)):
        words.append(rng.choice(action.option_strings))
        count = action.nargs if isinstance(action.nargs, int) else 1
        values = [*map(str, action.choices), *ODD[:4]] if action.choices else ODD
        words += [rng.choice(values) for _ in range(count)]
    return words + [rng.choice(ODD)] * (rng.random() < 0.05)


def make_place():
    """What the lines may meet: pictures, a run, a text, a link."""
    import numpy as np
    from PIL import Image
    import train
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for i in range(6):
            path = Path("photos") / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    Path("notes.txt").write_text("no picture")
    Path("link").symlink_to("photos")
    train.main(["--data", "photos", "--labels", "--size", "8", "--batch", "2", "--steps", "1",
                "--val", "0.3", "--threads", "1", "--out", "runs/a"])


def find_fault(code, said):
    """What is wrong with how a command ended, in words, or None."""
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", said):
        return "a character that a terminal obeys"
    if "Traceback" in said:
        return "a traceback"
    if code not in (0, None, 2, 130):
        return f"status {code}"
    return None


def attack(count, seed):
    """Run in a process of its own: prints a line for every bad outcome."""
    import running.setup
    from data import load_images
    from plumbing.console import run_command
    running.setup.load_images = lambda source, *args, **how: load_images(
        source, *args, **how | (dict(count=24) if source == "faces" else {}))
    make_place()
    rng, commands = random.Random(seed), build_commands()
    for k in range(count):
        name = rng.choice(list(commands))
        main, parser, small = commands[name]
        words = [*type_line(parser, rng), *small]
        print(f"TRY {k} {name} {ascii(words)}", flush=True)
        screen = io.StringIO()
        signal.alarm(120)
        code, trouble = 0, ""
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            try:
                run_command(lambda: main(words))
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                trouble = traceback.format_exc()
        signal.alarm(0)
        fault = "a traceback" if trouble else find_fault(code, screen.getvalue())
        if fault:
            said = ascii(screen.getvalue()[-300:])
            print(f"BAD {name} {ascii(words)}: {fault}\n{said}\n{trouble}")


@pytest.mark.parametrize(
    "count, seed", [(14, 0)] + [pytest.param(50, s, marks=pytest.mark.slow) for s in range(1, 8)])
def test_whatever_is_typed_works_or_is_one_line(tmp_path, count, seed):
    paths = [str(ROOT), str(ROOT / "tests")]
    code = (f"import sys; sys.path[:0] = {paths!r}; "
            f"import test_fuzz; test_fuzz.attack({count}, {seed})")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"HOME": str(tmp_path)})
    assert "BAD" not in done.stdout, done.stdout[done.stdout.index("BAD"):][:3000]
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-800:]


if __name__ == "__main__":
    attack(int(sys.argv[1]), int(sys.argv[2]))
