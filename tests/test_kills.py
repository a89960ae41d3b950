"""Laws of sudden death: killed before or after any visit to the disk, by any signal, a run
goes on as if nothing had been.

All of it is slow (`pytest --slow tests/test_kills.py`): every kill is a process of its
own."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from test_train import (TINY, WEIGHTS, equal, in_a_folder_of_its_own, photos, read, rows,
                        )  # noqa: F401

pytestmark = pytest.mark.slow

KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
left, after = {visit}, {after}
def deadly(real):
    def call(*args, **how):
        global left
        left -= 1
        if left == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **how)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
for name in ("fsync", "replace", "link"):
    setattr(os, name, deadly(getattr(os, name)))
import {module}
{module}.main({arguments!r})
"""


def run_main(module, arguments, visit=0, after=False):
    """`python module.py arguments`, killed at the visit-th fsync, replace or link (0:
    never). -> exit status"""
    code = KILLER.format(root=str(ROOT),
                         visit=visit,
                         after=after,
                         module=module,
                         arguments=[str(a) for a in arguments],
                         )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.parametrize("kind", ["train", "latents", "finetune"])
def test_a_kill_at_every_fsync_replace_and_link_changes_nothing(photos, kind):  # noqa: F811
    """Killed before or after any of them, a run that is started again ends as one
    undisturbed."""
    module, common = "train", ["--data", photos, *TINY, "--steps", 4, "--save-every", 2]
    common += ["--sample-every", 3, "--mask", 0.5]
    if kind == "latents":
        arguments = ["--data", photos, "--size", 16, "--steps", 2, "--threads", 1]
        assert run_main("vae", [*arguments, "--out", "vae.pt"]) == 0
        common += ["--patch", 1, "--space", "latent", "--vae", "vae.pt", "--latents", "latents"]
    if kind == "finetune":
        assert run_main("train", [*common, "--out", "runs/first"]) == 0
        module, common = "finetune", ["--from", "runs/first", "--steps", 4, "--save-every", 2]
        common += ["--threads", 1, "--sample-every", 3]
    assert run_main(module, [*common, "--out", "runs/straight"]) == 0
    straight, kills = read("runs/straight/last.pt"), 0
    for visit, after in itertools.product(range(1, 100), (False, True)):
        for folder in ("runs/killed", "latents"):
            shutil.rmtree(folder, ignore_errors=True)
        command = [*common, "--out", "runs/killed", "--resume"]
        if run_main(module, command, visit, after) == 0:
            break
        kills += 1
        assert run_main(module, command) == 0
        killed = read("runs/killed/last.pt")
        assert all(equal(straight[part], killed[part]) for part in WEIGHTS), (visit, after)
        assert [r["step"]
                for r in rows("runs/straight")] == [r["step"] for r in rows("runs/killed")]
    assert kills >= 20


def test_a_kill_at_every_visit_leaves_no_half_of_an_autoencoder(photos):  # noqa: F811
    arguments = ["--data", photos, "--size", 16, "--steps", 2, "--threads", 1]
    assert run_main("vae", [*arguments, "--out", "straight.pt"]) == 0
    for visit in range(1, 20):
        for after in (False, True):
            Path("killed.pt").unlink(missing_ok=True)
            status = run_main("vae", [*arguments, "--out", "killed.pt"], visit, after)
            if Path("killed.pt").exists():
                assert equal(read("killed.pt")["model"], read("straight.pt")["model"])
            if status == 0:
                return
    raise AssertionError("the command never ended")


def test_a_killed_torchrun_leaves_no_process_behind(photos):  # noqa: F811
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        ROOT / "train.py", "--data", photos, *TINY, "--steps", "100000", "--save-every", "20",
        "--sample-every", "100000", "--out", "runs/a",
    ]
    agent = subprocess.Popen([str(c) for c in command],
                             stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    while not Path("runs/a/000020.pt").exists():
        assert agent.poll() is None
        time.sleep(0.05)
    children = [
        int(pid)
        for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    ]
    agent.kill()
    agent.wait()
    for _ in range(600):
        if not any(
                Path(f"/proc/{pid}").exists()
                and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
                for pid in children):
            break
        time.sleep(0.1)
    else:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        raise AssertionError("processes outlived torchrun by a minute")
    assert torch.isfinite(next(iter(read("runs/a/last.pt")["model"].values()))).all()
