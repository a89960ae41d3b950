"""Laws of files of strangers: whatever a checkpoint holds, it works or it is one line;
never a traceback, a hang, a crash."""

import copy
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from conftest import ROOT

ABSURD = [
    None, -1, 0, 3, 7, 10**9, 2**70, 0.5, -0.5,
    float("nan"),
    float("inf"), "", "x", "\x1b[31m", "a" * 5000, True, [], [1], ["a", "a"], {}, {"a": 1}, {1: 2},
    torch.zeros(()),
    torch.zeros(3),
    torch.zeros(2, 0),
    torch.full((4, 4), float("nan")),
    torch.zeros(3, dtype=torch.int64),
]
DEEP = ("config", "meta", "optimizer", "scaler", "model", "ema")


def places(value, path=()):
    """Every place in a checkpoint that a hand may change; of lists and state dicts a
    few."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 3)):
            yield from places(value[i], (*path, i))


def change(ckpt, path, rng):
    """A copy of the checkpoint, changed at one place: deleted, replaced or renamed."""
    changed = copy.copy(ckpt)
    owner = changed
    for key in path[:-1]:
        owner[key] = copy.copy(owner[key])
        owner = owner[key]
    kind = rng.choice(["delete", "replace", "replace", "reshape"])
    value = owner[path[-1]]
    if kind == "delete":
        del owner[path[-1]]
    elif kind == "reshape" and torch.is_tensor(value):
        owner[path[-1]] = rng.choice([
            value.flatten()[:1], value[None],
            value.double(),
            value.to(torch.int64),
            value.to_sparse() if value.ndim else value,
        ])
    else:
        owner[path[-1]] = rng.choice(ABSURD)
    return changed


def try_file(path, original):
    """Sample from it, go on with it, tune it. What is not a UserError is raised."""
    import finetune
    import train
    from plumbing.console import UserError
    from sample import load, sample

    try:
        sample(load(path, device="cpu"), n=1, steps=1)
    except (UserError, OSError) as error:       # both are one line of a command
        assert len(str(error).splitlines()) == 1, error
    for command in (
            lambda: train.main(["--out", "run", "--resume", "--steps",
                                str(original + 1)]),
            lambda: finetune.main(["--from", str(path), "--steps", "1", "--out", "tuned"]),
    ):
        subprocess.run(["rm", "-rf", "run", "tuned"])
        Path("run").mkdir()
        Path("run/last.pt").write_bytes(Path(path).read_bytes())
        try:
            command()
        except (UserError, OSError) as error:       # both are one line of a command
            assert len(str(error).splitlines()) == 1, error


def few_faces(source, *args, **how):
    """data.load_images, with 24 of the built-in faces."""
    from data import load_images
    return load_images(source, *args, **how | (dict(count=24) if source == "faces" else {}))


def attack(count, seed):
    """Run in a process of its own, for it may crash: prints one line for each bad
    outcome."""
    import train

    rng = random.Random(seed)
    options = [
        "--data", "faces", "--size", "8", "--batch", "4", "--threads", "1", "--sample-every",
        "1000", "--amp", "off", "--model", "tiny",
    ]
    import running.setup
    import vit
    vit.MODELS["tiny"] = dict(width=64, depth=3, heads=2, decoder_width=32)
    running.setup.load_images = few_faces
    train.main([*options, "--labels", "--steps", "2", "--out", "made"])
    ckpt = torch.load("made/last.pt", weights_only=True)
    every = [path for path in places(ckpt) if path]
    shallow = [
        path for path in every if path[0] not in ("model", "ema", "optimizer") or len(path) < 3
    ]
    for k in range(count):
        path = rng.choice(shallow if rng.random() < 0.7 else every)
        torch.save(change(ckpt, path, rng), "changed.pt")
        print(f"TRY {k} {path}", flush=True)
        signal.alarm(60)
        try:
            try_file("changed.pt", 2)
        except Exception:
            print(
                f"BAD {path}: {traceback.format_exc().splitlines()[-1]}\n{traceback.format_exc()}",
                flush=True,
            )
        signal.alarm(0)


@pytest.mark.parametrize("count, seed", [(6, 0)] +
                         [pytest.param(250, seed, marks=pytest.mark.slow) for seed in range(1, 9)],
                         )
def test_a_tampered_checkpoint_works_or_is_one_line(tmp_path, count, seed):
    paths = [str(ROOT), str(ROOT / "tests")]
    code = (f"import sys; sys.path[:0] = {paths!r}; "
            f"import test_tampered; test_tampered.attack({count}, {seed})")
    done = subprocess.run([sys.executable, "-c", code],
                          cwd=tmp_path,
                          capture_output=True,
                          text=True)
    bad = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    last = [line for line in done.stdout.splitlines() if line.startswith("TRY")][-1:]
    assert not bad, "\n".join(bad)
    assert done.returncode == 0, f"{last}: {done.stderr[-800:]}"


@pytest.mark.parametrize("where, key, value, word", [
    ("meta", "size", 3, "no multiple of 4"), ("config", "batch", 2**61, "--batch"),
    ("config", "beta1", 0, None), ("meta", "shards", "DELETE", None),
    (None, "optimizer", [torch.zeros(4, 4)], "optimizer must be"),
    (None, "rng", torch.get_rng_state().to_sparse(), "rng must be"),
    ("state", "exp_avg", None, "not that of this network"),
    ("network", "guess", "unit", "guess is one of unit"), ("network", "guess", 3, "guess must be"),
    ("network", "guess", None, "not those of the network"),
    ("meta", "channels", 1, "takes 3 channel"),
    ("meta", "objective", "guess", "objective is guess"),
    ("meta", "recon_target", "x", "recon_target is x")])
def test_what_the_generator_found_is_one_line_or_works(tmp_path, monkeypatch, where, key, value,
                                                       word):
    """A size between the tokens, an integer that torch cannot hold, 0 for 0.0, a long
    repr."""
    import running.setup
    import train
    from plumbing.console import UserError
    from sample import load
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running.setup, "load_images", few_faces)
    train.main(["--size", "8", "--batch", "4", "--threads", "1", "--steps", "1", "--out", "a"])
    ckpt = torch.load("a/last.pt", weights_only=True)
    owner = ckpt[where] if where in ckpt else ckpt
    if where == "state":                                    # of the optimizer's third parameter
        owner = ckpt["optimizer"][0]["state"][2]
    if where == "network":
        owner = ckpt["meta"]["model"]
    if value == "DELETE":
        del owner[key]
    else:
        owner[key] = value
    torch.save(ckpt, "a/last.pt")
    go_on = [lambda: load("a", device="cpu"),
             lambda: train.main(["--out", "a", "--resume", "--steps", "2"])]
    if word is None:
        for step in go_on:
            step()
        return
    with pytest.raises(UserError, match=word) as error:
        [step() for step in go_on]
    assert len(str(error.value).splitlines()) == 1


if __name__ == "__main__":
    attack(int(sys.argv[1]), int(sys.argv[2]))
