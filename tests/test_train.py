"""Laws of training: the same step on any number of processes, an exact resume, honest
files, clear refusals."""

import csv
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import running.evaluate
import running.journal
import running.options
import running.setup
import finetune
import sample as S
import train
import vae
import plumbing.machine
import plumbing.plan
from plumbing.checkpoint import open_run_folder, save_atomic
from conftest import ROOT, status
from plumbing.console import UserError
from plumbing.machine import amp_type
from sample import DiffusionModel
from vit import ECONOMIES, ViT
from mask import patchify
from plumbing.images import seeded, to_float
import spaces

pytestmark = pytest.mark.usefixtures("narrow")

TINY = [
    "--size", "16", "--patch", "8", "--batch", "8", "--threads", "1", "--val", "0.2", "--workers",
    "0",
]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Forty small pictures in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / ("day" if i % 2 else "night") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return str(folder)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(s, handler)


def go(photos, *arguments):
    train.main(["--data", photos, *TINY, *map(str, arguments)])


def rows(run):
    with open(Path(run) / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def read(path):
    return torch.load(path, weights_only=True)


def equal(one, two):
    """Deep equality of checkpoints, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(equal(a, b) for a, b in zip(one, two))
    return one == two


WEIGHTS = ("model", "ema", "optimizer", "scaler", "step", "images")

# --- one run from end to end --------------------------------------------------------------


def test_train_finetune_and_sample_leave_what_the_contract_names(photos, capsys):
    go(photos, "--steps", 12, "--mask", 0.5, "--sample-every", 5, "--save-every", 6, "--out",
       "runs/a",
       )
    run = Path("runs/a")
    assert {p.name
            for p in run.iterdir()} == {
                "config.json", "log.csv", "loss.png", "samples", "last.pt", "000006.pt",
                "000012.pt",
            }
    assert {p.name
            for p in (run / "samples").iterdir()
            } == {"000000.png", "000005.png", "000010.png", "000012.png", }
    assert Path("runs/latest").read_text() == "runs/a"
    log = rows(run)
    assert list(log[0]) == [
        "step", "seconds", "images", "loss", "val_loss", "lr", "ratio", "visible",
        "images_per_second",
    ]
    assert [int(r["step"]) for r in log] == [0, 5, 6, 10, 12]
    assert all(r["visible"] == "2" and r["ratio"] == "0.5" for r in log) and all(
        (float(r["val_loss"]) > 0) if r["step"] != "6" else not r["val_loss"] for r in log)
    ckpt = read(run / "last.pt")
    assert set(ckpt) == {
        "version", "config", "meta", "step", "images", "seconds", "model", "ema", "optimizer",
        "scaler", "rng",
    }
    assert ckpt["step"] == 12 and ckpt["images"] == 96 and ckpt["meta"]["plan"] == 12

    finetune.main(["--steps", "3", "--out", "runs/b"])
    tuned = read("runs/b/last.pt")
    assert (tuned["config"]["mask"] == 0 and tuned["config"]["data"] == photos
            and tuned["config"]["from_"] == "runs/a/last.pt")
    assert rows("runs/b")[-1]["visible"] == "4"
    S.main(["--steps", "2", "--n", "4"])
    assert Image.open("samples.png").size[0] > 32
    assert "step 3" in capsys.readouterr().out


def test_the_sample_grid_of_a_run_is_what_sample_py_draws_from_its_checkpoint(photos):
    go(photos, "--steps", 4, "--out", "runs/a")
    S.main(["--n", "16", "--out", "again.png"])
    assert (np.asarray(Image.open("again.png")) == np.asarray(
        Image.open("runs/a/samples/000004.png"))).all()


def test_classes_are_kept_in_the_checkpoint(photos, capsys):
    go(photos, "--steps", 3, "--labels", "--out", "runs/a")
    assert read("runs/a/last.pt")["meta"]["classes"] == ["day", "night"]
    S.main(["--label", "night", "--cfg", "2", "--n", "2", "--steps", "2", "--out", "night"])
    assert len(list(Path("night").iterdir())) == 2
    capsys.readouterr()
    S.main(["--label", "night", "--cfg", "2", "--n", "2", "--steps", "2"])
    assert "nothing was guided" not in capsys.readouterr().out
    S.main([
        "--label", "night", "--cfg", "2", "--n", "2", "--steps", "2", "--cfg-interval", "1e8",
        "1e9",
    ])
    assert "nothing was guided" in capsys.readouterr().out


@pytest.mark.parametrize("precondition, first, last", [("none", (1, 3), 0.75),
                                                       ("patch", (0.4, 0.7), 0.55)])
def test_training_learns(precondition, first, last):
    """Faces, a hundred steps: the denoising error on held-out images falls below what is
    known at the start. With a guess about each patch, that is more than a multiple of it
    says, whose error is 1."""
    train.main([
        "--size", "16", "--steps", "100", "--mask", "0.5", "--batch", "32", "--out", "runs/a",
        "--seed", "1", "--threads", "1", "--precondition", precondition,
    ])
    values = [float(r["val_loss"]) for r in rows("runs/a") if r["val_loss"]]
    assert first[0] < values[0] < first[1] and values[-1] < last


def test_the_average_keeps_no_history(photos, monkeypatch):
    """An average that autograd watched would remember all of its steps: memory would grow
    until the machine has none."""
    kept = []
    monkeypatch.setattr(
        running.journal, "DiffusionModel", lambda averaged, *rest:
        (kept.append(averaged), DiffusionModel(averaged, *rest))[1],
    )
    go(photos, "--steps", 3, "--out", "runs/a")
    assert kept and not any(q.requires_grad or q.grad_fn for q in kept[-1].parameters())


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint_alone(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_atomic({"x": torch.zeros(3)}, path)
    before = path.read_bytes()
    for error in (RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 31401024 vs 31400912"),
                  OSError(28, "No space left on device"),
                  ):
        monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(error))
        with pytest.raises(UserError, match="last.pt cannot be written"):
            save_atomic({"x": torch.ones(3)}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


# --- resume -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [["--mask", "0.5"],
                [
                    "--mask", "0.75", "--mask-from", "0.25", "--ramp", "cosine", "--policy",
                    "block", "--block", "2", "--labels", "--micro-batch", "4",
                ],
                [
                    "--objective", "reconstruct", "--decoder", "1", "--mask", "0.75", "--mask-from",
                    "0.25", "--ramp", "cosine", "--recon-target", "whitened",
                ],
                [
                    "--predict", "both", "--schedule", "ddm-linear", "--decoder", "1", "--recon",
                    "0.1", "--mask", "0.5", "--amp", "off", "--skips",
                ], ],
)
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(photos, options):
    common = ["--steps", 14, "--save-every", 7, "--sample-every", 6, *options]
    go(photos, *common, "--out", "runs/straight")
    go(photos, *common, "--out", "runs/broken")
    Path("runs/broken/000007.pt").replace(
        "runs/broken/last.pt")  # as if killed after step 7, with a log that ran ahead
    go(photos, *common, "--out", "runs/broken", "--resume")
    straight, broken = read("runs/straight/last.pt"), read("runs/broken/last.pt")
    for part in WEIGHTS:
        assert equal(straight[part], broken[part]), part
    timeless = lambda run: [{
        k: v
        for k, v in r.items() if k not in ("seconds", "images_per_second")
    } for r in rows(run)]
    assert timeless("runs/straight") == timeless("runs/broken")


def test_resume_without_a_checkpoint_starts_and_after_the_end_does_nothing(photos, capsys):
    go(photos, "--steps", 3, "--out", "runs/a", "--resume")
    before = read("runs/a/last.pt")
    go(photos, "--steps", 3, "--out", "runs/a", "--resume")
    assert "finished" in capsys.readouterr().out and equal(read("runs/a/last.pt"), before)
    train.main(["--out", "runs/a", "--resume", "--steps",
                "5"])  # a larger --steps continues it, with the run's own options
    train.main(["--data", os.path.relpath(photos) + "/", "--out", "runs/a",
                "--resume"])  # another spelling of its data is the same run
    assert read("runs/a/last.pt")["step"] == 5 and [r["step"]
                                                    for r in rows("runs/a")] == ["0", "3", "5", ]


def test_a_run_killed_before_its_first_checkpoint_starts_a_log_of_its_own(photos):
    go(photos, "--steps", 3, "--out", "runs/a")
    Path("runs/a/last.pt").unlink()
    go(photos, "--steps", 3, "--out", "runs/a", "--resume")
    assert [r["step"] for r in rows("runs/a")] == ["0", "3"]


@pytest.mark.parametrize("damage", [lambda log: log.replace(b"images_per_second", b"images"),
                                    lambda log: log.replace(b"\n3,", b"\nx3,"),
                                    lambda log: log.replace(b"\n3,", b"\n3,n/a"),
                                    lambda log: log + b"\xff\n"])
def test_a_damaged_log_is_named_and_a_new_one_takes_its_place(photos, damage):
    go(photos, "--steps", 3, "--out", "runs/a")
    log = Path("runs/a/log.csv")
    log.write_bytes(damage(log.read_bytes()))
    config = Path("runs/a/config.json").read_bytes()
    with pytest.raises(UserError, match="log.csv is damaged: delete it"):
        go(photos, "--steps", 5, "--out", "runs/a", "--resume")
    assert Path("runs/a/config.json").read_bytes() == config
    log.unlink()
    go(photos, "--steps", 5, "--out", "runs/a", "--resume")
    assert [r["step"] for r in rows("runs/a")][-1] == "5"


def test_a_world_without_a_meeting_place_is_refused_in_one_line(photos, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(RANK="0", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start with torchrun, or unset WORLD_SIZE"):
        go(photos, "--steps", 1, "--batch", 4, "--device", "cpu", "--out", "runs/a")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["one", "-1", "1.5", ""])
def test_a_number_of_torchruns_that_is_none_is_refused_in_one_line(photos, monkeypatch, name,
                                                                   value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} is {value}, not a whole number"):
        go(photos, "--steps", 1, "--batch", 4, "--device", "cpu", "--out", "runs/a")


def test_a_local_rank_alone_silences_nothing(photos, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert status(train, ["--data", photos, "--steps", "0"]) == 2
    assert "--steps" in capsys.readouterr().err


def test_a_rank_outside_its_world_is_refused_in_one_line(photos, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="RANK is 1, WORLD_SIZE 1: .* unset RANK"):
        go(photos, "--steps", 1, "--batch", 4, "--device", "cpu", "--out", "runs/a")


@pytest.mark.processes
def test_two_runs_never_share_a_folder(photos):
    """Two that begin in the same second get two names; a second one in the folder of a
    running one is refused before any work."""
    assert open_run_folder()[0] != open_run_folder()[0]
    process = start(photos, "--steps", "100000", "--out", "runs/busy", "--sample-every", "100000",
                    "--save-every", "20",
                    )
    wait_for_step("runs/busy", 20, process)
    try:
        with pytest.raises(UserError, match="another process is training there"):
            go(photos, "--steps", 100000, "--out", "runs/busy", "--resume")
    finally:
        process.kill()
        process.wait()
    assert open_run_folder("runs/busy")[0] == Path(
        "runs/busy")  # its lock ended with it, however it ended


def start(photos, *arguments):
    command = [sys.executable, ROOT / "train.py", "--data", photos, *TINY, *map(str, arguments)]
    return subprocess.Popen([str(c) for c in command],
                            stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def wait_for_step(run, step, process):
    """Until log.csv shows `step` (the process decides how long that takes, not this
    test)."""
    while process.poll() is None:
        if (Path(run) / "log.csv").exists() and any(
                int(r["step"] or 0) >= step for r in rows(run) if r["visible"]):
            return
        time.sleep(0.02)
    raise AssertionError(process.stderr.read().decode())


@pytest.mark.processes
def test_sigterm_saves_and_the_run_can_go_on(photos):
    process = start(photos, "--steps", 100000, "--out", "runs/a", "--save-every", 100000)
    wait_for_step("runs/a", 10, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert b"Traceback" not in process.stderr.read()
    reached = read("runs/a/last.pt")["step"]
    assert reached >= 10 and int(rows("runs/a")[-1]["step"]) == reached


@pytest.mark.processes
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_then_resume_changes_nothing(photos, kills):
    options = ["--steps", 40 * kills, "--save-every", 7, "--sample-every", 25, "--mask", "0.5"]
    go(photos, *options, "--out", "runs/straight")
    rng = np.random.default_rng(0)
    for _ in range(kills):
        process = start(photos, *options, "--out", "runs/killed", "--resume")
        last = max(
            ([int(r["step"])
              for r in rows("runs/killed")] if Path("runs/killed/log.csv").exists() else [0]),
            default=0,
        )
        wait_for_step("runs/killed", last + 10, process)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
    go(photos, *options, "--out", "runs/killed", "--resume")
    straight, killed = read("runs/straight/last.pt"), read("runs/killed/last.pt")
    assert all(equal(straight[part], killed[part]) for part in WEIGHTS)
    assert [r["step"] for r in rows("runs/killed")] == [r["step"] for r in rows("runs/straight")]


def test_a_truncated_checkpoint_is_refused_and_an_unfinished_one_is_never_seen(photos, tmp_path):
    go(photos, "--steps", 2, "--out", "runs/a")
    whole = Path("runs/a/last.pt").read_bytes()

    class Boom(Exception):
        pass

    class Unsaveable:
        def __reduce__(self):
            raise Boom

    with pytest.raises(Boom):
        save_atomic({"x": torch.zeros(1000), "y": Unsaveable()}, Path("runs/a/last.pt"))
    assert Path("runs/a/last.pt").read_bytes() == whole
    Path("runs/a/last.pt").write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="cut short"):
        train.main(["--out", "runs/a", "--resume"])


def test_runs_that_save_at_once_do_not_trip_over_runs_latest(tmp_path):
    code = ("import sys; from plumbing.checkpoint import name_newest\n"
            "for i in range(300): name_newest(sys.argv[1])")
    several = [
        subprocess.Popen([sys.executable, "-c", code, f"runs/{name}"],
                         stderr=subprocess.PIPE,
                         text=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)},
                         ) for name in "ab"
    ]
    errors = [process.communicate()[1] for process in several]
    assert [process.returncode for process in several] == [0, 0], errors
    assert Path("runs/latest").read_text() in ("runs/a",
                                               "runs/b") and os.listdir("runs") == ["latest"]


# --- compiled -----------------------------------------------------------------------------


def test_without_a_compiler_compile_is_one_line_before_any_work(photos, monkeypatch):
    def fail(x):
        raise RuntimeError("No working C++ compiler found")
    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(UserError, match="--compile.*No working C.*compiler.*leave --compile out"):
        go(photos, "--compile", "--steps", 2, "--out", "runs/a")
    with pytest.raises(UserError, match="--out"):           # what takes no time is refused first
        go(photos, "--compile", "--steps", 2, "--out", f"{photos}/run")
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("options", [["--mask", "0.5"], ["--mask", "0.5", "--decoder", "1"],
                                     ["--mask-from", "0.1", "--mask", "0.7", "--ramp", "linear"]])
def test_a_compiled_run_takes_the_steps_of_an_ordinary_one(photos, options):
    """Compiling needs a compiler, and a minute."""
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        run = start(photos, *options, *more, "--amp", "off", "--steps", 4, "--out", f"runs/{name}")
        assert run.wait() == 0
    plain, compiled = (read(f"runs/{name}/last.pt")["model"] for name in ("plain", "compiled"))
    for name, value in plain.items():
        assert torch.allclose(value, compiled[name], atol=1e-4), name


@pytest.mark.slow
@pytest.mark.processes
def test_torch_itself_without_a_compiler_is_one_line(photos):
    environment = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": "fresh"}
    done = subprocess.run([sys.executable, train.__file__, "--data", photos, *TINY, "--compile",
                           "--steps", "2", "--out", "runs/none"], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "C++ compiler" in done.stderr.splitlines()[-1]
    assert not Path("runs/none").exists()


# --- devices ------------------------------------------------------------------------------


@pytest.mark.parametrize("here, world, wanted, got", [("cuda", 1, "auto", "cuda:0"),
                                                      ("cuda", 1, "cuda", "cuda:0"),
                                                      ("cuda", 1, "cuda:1", "cuda:1"),
                                                      ("cuda", 2, "auto", "cuda:1"),
                                                      ("cuda", 2, "cuda", "cuda:1"),
                                                      ("cuda", 2, "cuda:0", "--device cuda:0"),
                                                      ("mps", 1, "auto", "mps"),
                                                      ("mps", 2, "auto", "cpu"),
                                                      ("mps", 2, "mps", "--device mps"),
                                                      ("cpu", 2, "auto", "cpu"), ],
                         )
def test_every_process_gets_its_own_device_and_set_device_a_number(monkeypatch, here, world, wanted,
                                                                   got):
    """On machines that are not here: torch is told that it has GPUs, and set_device
    refuses, as it does, a device without its number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here == "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: here == "mps")
    monkeypatch.setattr(torch.cuda, "set_device",
                        lambda device: torch.cuda._utils._get_device_index(device))
    monkeypatch.setattr(plumbing.machine.dist, "is_initialized", lambda: True)
    for name, value in (dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2).items()
                        if world > 1 else ()):
        monkeypatch.setenv(name, str(value))
    if got.startswith("--"):
        with pytest.raises(UserError, match=got):
            plumbing.machine.start_machine(wanted)
    else:
        assert str(plumbing.machine.start_machine(wanted).device) == got


# --- many processes -----------------------------------------------------------------------


def torchrun(ranks, *arguments, script=ROOT / "train.py"):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
        f"--master-port={port}", script, *arguments,
    ]
    done = subprocess.run([str(c) for c in command],
                          capture_output=True,
                          text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"},
                          )
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_k_processes_take_the_same_steps_as_one_with_k_micro_batches(photos, ranks):
    options = [
        "--data", photos, *TINY, "--batch", "16", "--steps", "5", "--mask", "0.5", "--decoder", "1",
        "--recon", "0.1", "--amp", "off", "--labels",
    ]
    torchrun(ranks, *options, "--out", "runs/many")
    train.main([*options, "--micro-batch", str(16 // ranks), "--out", "runs/one"])
    many, one = read("runs/many/last.pt"), read("runs/one/last.pt")
    for part in ("model", "ema"):
        for name, value in one[part].items():
            assert torch.allclose(many[part][name], value, atol=1e-5, rtol=1e-5), name
    assert float(rows("runs/many")[-1]["loss"]) == pytest.approx(float(
        rows("runs/one")[-1]["loss"]),
                                                                 rel=1e-4)


@pytest.mark.processes
def test_accumulation_under_no_sync_is_one_large_step_and_no_thread_outlives_it(photos, tmp_path):
    """2 processes x 2 micro-batches against 1 x 4. Threads: one of gloo's that still runs
    while Python ends can abort a finished process."""
    options = [
        "--data", photos, *TINY, "--batch", "16", "--micro-batch", "4", "--steps", "3", "--amp",
        "off",
    ]
    script = tmp_path / "threads.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import train; train.main()\n"
        "tasks = '/proc/self/task'\n"
        "there = os.listdir(tasks) if os.path.isdir(tasks) else []\n"
        "left = [open(f'{tasks}/{t}/comm').read().strip() for t in there]\n"
        "sys.exit(f'still running: {left}' if any('gloo' in name for name in left) else 0)\n")
    torchrun(2, *options, "--out", "runs/many", script=script)
    train.main([*options, "--out", "runs/one"])
    many, one = read("runs/many/last.pt")["model"], read("runs/one/last.pt")["model"]
    assert all(torch.allclose(many[name], one[name], atol=1e-5, rtol=1e-5) for name in one)


def test_shards_of_one_step_draw_different_noise_masks_and_times():
    from mask import draw
    from schedules import SCHEDULES, times

    schedule, drawn = SCHEDULES["ddm"], []
    for step, rank in ((0, 0), (0, 1), (1, 0)):
        g = torch.Generator().manual_seed(seeded(0, 5, step, rank).initial_seed())
        drawn.append((schedule.noise(torch.zeros(4, 1, 8, 8),
                                     g), draw("patch", 4, 4, 4, 0.5,
                                              g).keep, times("uniform", schedule, 4, g),
                      ))
    for a in range(3):
        for b in range(a):
            assert not any(torch.equal(x, y) for x, y in zip(drawn[a], drawn[b]))


def record(monkeypatch, owner, name, what):
    """Keep what(arguments) of every call of owner.name."""
    kept, real = [], getattr(owner, name)

    def call(self, *args, **kwargs):
        kept.append(what(*args))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return kept


def test_half_of_the_images_are_mirrored_unless_told_otherwise(monkeypatch):
    Path("half").mkdir()
    for i in range(8):  # black on the left, white on the right
        Image.fromarray(np.tile(np.uint8([[0] * 8 + [255] * 8]), (16, 1))).save(f"half/{i}.png")
    seen = record(monkeypatch, spaces.PixelSpace, "encode", lambda x: x[:, 0, 0, 0])
    for options, low, high in (([], 0.35, 0.65), (["--no-flip"], 0, 0)):
        seen.clear()
        go("half", "--steps", 20, "--out", f"runs/{len(options)}", *options)
        mirrored = torch.cat(seen[-21:-1]) > 0  # twenty steps, then the last look
        assert len(mirrored) == 160
        assert low <= mirrored.float().mean() <= high


def test_the_stated_share_of_labels_is_dropped(photos, monkeypatch):
    for share, low, high in ((0.0, 0, 0), (0.5, 0.35, 0.65), (1.0, 1, 1)):
        with monkeypatch.context() as patch:
            seen = record(patch,
                          ViT,
                          "forward",
                          lambda zt, t, y=None, m=None, cond=None: (y, torch.is_grad_enabled()),
                          )
            go(photos, "--steps", 20, "--labels", "--label-dropout", share, "--out",
               f"runs/{share}",
               )
        dropped = torch.cat([y for y, training in seen if training]) < 0
        assert len(dropped) == 160 and low <= dropped.float().mean() <= high


@pytest.mark.parametrize("n, batch, shards", [(10, 4, 2), (7, 8, 4), (3, 8, 1), (100, 6, 3)])
def test_an_epoch_shows_every_image_once_and_shards_do_not_overlap(n, batch, shards):
    size = batch // shards
    order = torch.cat([
        running.setup.shard_indices(n, (5, 0), k * batch + j * size, size) for k in range(2 * n)
        for j in range(shards)
    ])
    for epoch in range(len(order) // n):
        assert sorted(order[epoch * n:(epoch + 1) * n].tolist()) == list(range(n))
    if n > 5:
        assert not torch.equal(order[:n], order[n:2 * n])


# --- the plan, the average, bad steps -----------------------------------------------------


def test_minutes_become_a_plan_that_the_checkpoint_keeps(photos):
    go(photos, "--minutes", 0.02, "--out", "runs/a")
    ckpt = read("runs/a/last.pt")
    plan = ckpt["meta"]["plan"]
    assert plan > 0 and 0 < ckpt["step"] <= plan


def test_a_run_that_stopped_before_its_plan_was_made_can_go_on_and_steps_make_it_longer(
        photos, monkeypatch):
    options = ["--data", photos, *TINY, "--minutes", "0.02", "--out", "runs/a"]

    def stop(step, numbers):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(plumbing.plan.Plan, "propose_steps_left", lambda self: 0)
        train.train(
            train.Options(**vars(train.options_parser(train.Options, "").parse_args(options))),
            on_step=stop,
        )
    assert read("runs/a/last.pt")["meta"]["plan"] is None and read("runs/a/last.pt")["step"] == 2
    monkeypatch.setattr(plumbing.plan, "TIMED", 2)
    train.main(["--out", "runs/a", "--resume"])
    ckpt = read("runs/a/last.pt")
    assert ckpt["step"] == ckpt["meta"]["plan"] > 2 and ckpt["meta"]["progress"] == pytest.approx(1)
    train.main(["--out", "runs/a", "--resume", "--steps", str(ckpt["step"] + 15)])
    assert read("runs/a/last.pt")["step"] == ckpt["step"] + 15


def test_on_step_hears_of_every_step_and_a_run_in_a_thread_leaves_the_signals_alone(photos):
    """The seam for a logger. Python allows signal handlers in the main thread only."""
    heard, handler = [], signal.getsignal(signal.SIGINT)
    given = vars(
        train.options_parser(train.Options, "").parse_args(
            ["--data", photos, *TINY, "--steps", "3", "--out", "runs/a"]))
    thread = threading.Thread(target=lambda: heard.append(
        train.train(train.Options(**given),
                    on_step=lambda step, numbers: heard.append((step, numbers)))))
    thread.start()
    thread.join()
    assert [step for step, _ in heard[:-1]] == [1, 2, 3] and heard[-1] == Path("runs/a")
    assert (heard[1][1].keys() == {"loss", "lr", "ratio", "progress"}
            and heard[1][1]["progress"] == 1 / 3)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_that_fails_gives_back_the_signals_and_its_folder(photos, monkeypatch):
    """In a notebook the next Ctrl-C must not be swallowed, and another run may use the
    folder."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(train, "train_step", lambda *arguments: 1 / 0)
    journals, enter = [], running.journal.Journal.__enter__
    monkeypatch.setattr(running.journal.Journal, "__enter__",
                        lambda self: journals.append(self) or enter(self))
    with pytest.raises(ZeroDivisionError):
        go(photos, "--steps", 3, "--out", "runs/a")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(journals[0].files) == 2 and all(file.closed for file in journals[0].files)


def test_another_optimizer_is_one_function_and_its_groups_keep_their_share_of_the_rate(
        photos, monkeypatch):
    def build(net, o):
        matrices = [q for q in net.parameters() if q.ndim == 2]
        rest = [q for q in net.parameters() if q.ndim != 2]
        return [torch.optim.SGD(matrices, lr=3 * o.lr), torch.optim.AdamW(rest, lr=o.lr)]

    rates = []
    monkeypatch.setattr(train, "build_optimizer", build)
    monkeypatch.setattr(torch.optim.SGD, "step",
                        lambda self: rates.append(self.param_groups[0]["lr"]))
    go(photos, "--steps", 4, "--save-every", 2, "--out", "runs/a", "--lr", 1e-3, "--lr-end", 1,
       "--warmup", 0,
       )
    assert rates == pytest.approx([3e-3] * 4)
    Path("runs/a/000002.pt").replace("runs/a/last.pt")
    go(photos, "--steps", 4, "--out", "runs/a", "--resume")  # a list of states is read again
    assert len(read("runs/a/last.pt")["optimizer"]) == 2


def test_a_checkpoint_with_one_optimizer_state_instead_of_a_list_goes_on(photos):
    """Older than --optimizer: such runs had AdamW alone, and go on with it."""
    go(photos, "--steps", 4, "--save-every", 2, "--out", "runs/a", "--optimizer", "adamw")
    whole, old = read("runs/a/last.pt"), read("runs/a/000002.pt")
    state = old["optimizer"][0]
    del old["config"]["optimizer"]
    del state["param_groups"][0]["lr_share"], old["meta"]["progress"]  # as older versions wrote it
    save_atomic(old | dict(optimizer=state), Path("runs/a/last.pt"))
    go(photos, "--steps", 4, "--out", "runs/a", "--resume")
    assert equal(read("runs/a/last.pt")["model"], whole["model"])


@pytest.mark.parametrize("val", ["PHOTOS", "faces", "0.3"])
def test_held_out_images_come_from_a_path_the_faces_or_a_fraction(photos, val):
    if val == "PHOTOS":
        val = shutil.copytree(Path(photos) / "day", "held")
    go(photos, "--steps", 2, "--out", "runs/a", "--val", val)
    assert all(float(r["val_loss"]) > 0 for r in rows("runs/a"))


def test_the_average_follows_its_formula(photos):
    go(photos, "--steps", 3, "--save-every", 1, "--out", "runs/a", "--ema", 0.25)
    torch.manual_seed(0)
    meta = read("runs/a/last.pt")["meta"]
    initial = dict(S.build_model(meta)[0].named_parameters())["embed.weight"].detach()
    expected = initial
    for k in range(3):
        decay = min(0.25, (1 + k) / (10 + k))
        expected = (decay * expected +
                    (1 - decay) * read(f"runs/a/{k + 1:06d}.pt")["model"]["embed.weight"])
    assert torch.allclose(read("runs/a/last.pt")["ema"]["embed.weight"], expected, atol=1e-6)


def test_learning_rate_warms_up_and_decays_with_progress(photos):
    o = train.Options(lr=1e-3, lr_end=0.1, warmup=10)
    for step in range(200):
        decay = 0.1 + 0.9 * (1 + math.cos(math.pi * step / 200)) / 2
        warm = min(1, (step + 1) / 11)
        assert train.learning_rate(o, step, step / 200, 200) == pytest.approx(1e-3 * warm * decay)
    assert train.learning_rate(o, 1, 0.0, 20) == pytest.approx(2e-3 / 3)    # a tenth of 20 steps
    go(photos, "--steps", 20, "--out", "runs/a", "--lr", 1e-3, "--lr-end", 0.1, "--warmup", 0)
    # The row of step k tells the rate that made it: that of progress (k - 1) / 20.
    for row in rows("runs/a")[1:]:
        decay = 0.1 + 0.9 * (1 + math.cos(math.pi * (int(row["step"]) - 1) / 20)) / 2
        assert float(row["lr"]) == pytest.approx(1e-3 * decay, rel=1e-4)


def break_some_losses(monkeypatch, broken):
    real, count = train.OBJECTIVES["denoise"], iter(range(10**9))

    def build(*args, **how):
        objective = real(*args, **how)
        return lambda *inputs: objective(*inputs) * (float("nan") if broken(next(count)) else 1.0)

    monkeypatch.setitem(train.OBJECTIVES, "denoise", build)


def test_a_step_that_is_not_finite_is_skipped_and_counted(photos, monkeypatch, capsys):
    break_some_losses(monkeypatch, lambda i: i in (2, 5))
    go(photos, "--steps", 8, "--out", "runs/a")
    ckpt = read("runs/a/last.pt")
    assert ckpt["meta"]["skipped"] == 2 and all(
        torch.isfinite(v).all() for v in ckpt["model"].values())
    assert (ckpt["optimizer"][0]["state"][0]["step"] == 6
            and "2 steps skipped" in capsys.readouterr().out)


def test_twenty_bad_steps_in_a_row_end_the_run_with_one_line(photos, monkeypatch):
    break_some_losses(monkeypatch, lambda i: True)
    with pytest.raises(UserError, match="up to step 20, were not finite.*--amp off$"):
        go(photos, "--steps", 100, "--out", "runs/a", "--sample-every", 50)
    ckpt = read("runs/a/last.pt")                   # what there was before is kept
    assert ckpt["step"] == 19 and all(torch.isfinite(v).all() for v in ckpt["model"].values())


# --- economies, costs ---------------------------------------------------------------------

RECONSTRUCT = ["--objective", "reconstruct", "--decoder", "1", "--mask", "0.5"]


@pytest.mark.parametrize("economy", ECONOMIES)
def test_every_economy_trains_tunes_and_samples_and_cannot_become_another(
        photos, economy, monkeypatch):
    all_scored, build = [], train.OBJECTIVES["denoise"]
    monkeypatch.setitem(
        train.OBJECTIVES, "denoise",
        lambda *args, **how: all_scored.append(how["all_scored"]) or build(*args, **how))
    go(photos, "--economy", economy, "--mask", 0.5, "--steps", 2, "--labels", "--out", "runs/a")
    finetune.main([
        "--steps", "2", "--mask-from", "0.5", "--mask", "0", "--ramp", "cosine4", "--out", "runs/b",
    ])
    # The fall begins where the first stage was.
    assert (rows("runs/b")[0]["ratio"], rows("runs/b")[0]["visible"]) == ("0.5", "2")
    for run in ("a", "b"):
        # What the economy declares, the objective does.
        assert (all_scored.pop() == ECONOMIES[economy].all_scored)
        assert (read(f"runs/{run}/last.pt")["meta"]["model"]["economy"] ==
                read(f"runs/{run}/last.pt")["config"]["economy"] == economy)
    S.main(["--n", "2", "--steps", "2", "--cfg", "2", "--label", "day"])
    with pytest.raises(UserError, match="--economy"):
        finetune.main([
            "--economy", "route" if economy == "drop" else "drop", "--steps", "1", "--out",
            "runs/c",
        ])


def test_a_dry_run_prints_the_published_costs_reads_no_image_and_writes_nothing(
        photos, capsys, monkeypatch):
    with monkeypatch.context() as patch:                # nothing is read
        patch.setattr(running.setup, "load_images", None)
        train.main(["--recipe", "maskdit", "--dry-run"])
        text = capsys.readouterr().out
        for fact in ("730.12 M are trained",
                     "0.43 M more are fixed sines and cosines, which papers count: 730.54 M",
                     "256 of 16 x 16 pixels, visible 128", "65.45 G multiply-adds",
                     "125.8 with all tokens", "torchrun --nproc_per_node=8 train.py",
                     "--data PATH --vae PATH",
                     ):
            assert fact in text, (fact, text)
        go(photos, "--labels", "--mask", 0.75, "--ramp", "cosine", "--mask-from", 0.25, "--dry-run",
           "--batch", 12,
           )
        text = capsys.readouterr().out
        assert ("4 of 8 x 8 pixels, visible 1, 2, 3" in text and "in the mean" in text
                and "--batch 12 must become" in text)
        assert not Path("runs").exists()
    go(photos, "--steps", 1, "--out", "runs/a")
    train.main(["--out", "runs/a", "--resume", "--steps", "2", "--dry-run"])
    assert "GFLOP per image" in capsys.readouterr().out and read("runs/a/last.pt")["step"] == 1


def test_a_latent_generator_trains_tunes_and_samples_through_its_autoencoder(photos):
    vae.main([
        "--data", photos, "--size", "16", "--steps", "2", "--batch", "4", "--out", "vae.pt",
        "--threads", "1",
    ])
    go(photos, "--steps", 2, "--mask", 0.5, "--patch", 2, "--space", "latent", "--vae", "vae.pt",
       "--out", "runs/a",
       )
    assert rows("runs/a")[0]["visible"] == "2"  # 16 pixels, factor 4, patch 2: 2 x 2 tokens
    finetune.main(["--steps", "2", "--out", "runs/b"])
    S.main(["--n", "2", "--steps", "2", "--out", "latent"])
    assert Image.open("latent/000000.png").size == (16, 16)
    with pytest.raises(UserError, match="multiple of 16"):
        go(photos, "--steps", 2, "--size", 24, "--patch", 4, "--space", "latent", "--vae", "vae.pt",
           "--out", "runs/c",
           )
    Path("vae.pt").unlink()
    vae.main([
        "--data", photos, "--size", "16", "--steps", "1", "--batch", "4", "--out", "vae.pt",
        "--threads", "1",
    ])
    with pytest.raises(UserError, match="not the autoencoder"):
        S.main(["--n", "2"])
    with pytest.raises(UserError, match="not the autoencoder of the first stage"):
        finetune.main(["--steps", "2", "--from", "runs/a"])


def test_a_model_of_latents_follows_its_autoencoder(photos, monkeypatch, tmp_path):
    """It is found from any working folder; moved, it is asked for and may be named; another
    one is refused by its hash."""
    make = lambda out, seed: vae.main([
        "--data", photos, "--size", "16", "--steps", "1", "--batch", "4", "--out", out, "--threads",
        "1", "--seed", seed,
    ])
    make("vae.pt", "0")
    make("other.pt", "1")
    go(photos, "--steps", 2, "--space", "latent", "--vae", "vae.pt", "--patch", 1, "--latents",
       "kept", "--out", "runs/a",
       )
    run = str(Path("runs/a").resolve())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    S.main(["--ckpt", run, "--n", "1", "--steps", "1"])
    Path("../vae.pt").rename("moved.pt")
    with pytest.raises(UserError, match="--vae"):
        S.main(["--ckpt", run, "--n", "1", "--steps", "1"])
    S.main(["--ckpt", run, "--n", "1", "--steps", "1", "--vae", "moved.pt"])
    monkeypatch.chdir(tmp_path)
    train.main(["--out", "runs/a", "--resume", "--steps", "3", "--vae", "elsewhere/moved.pt"])
    S.main(["--ckpt", run, "--n", "1", "--steps", "1"])  # the resumed run knows where it is
    finetune.main(
        ["--from", run, "--steps", "1", "--out", "runs/b", "--vae", "./elsewhere/moved.pt"])
    finetune.main(["--from", run, "--steps", "1", "--out", "runs/c", "--task",
                   "superres"])  # --latents of the first stage are no reason to refuse
    with pytest.raises(UserError, match="not the autoencoder"):
        finetune.main(["--from", run, "--steps", "1", "--out", "runs/d", "--vae", "other.pt"])
    with pytest.raises(UserError, match="works on pixels"):
        go(photos, "--steps", 1, "--out", "runs/e")
        S.main(["--ckpt", "runs/e", "--vae", "other.pt"])


def test_training_on_kept_latents_is_training_on_the_images_without_the_encoder(
        photos, monkeypatch):
    """Same steps, same validation, up to the rounding of another batch; and the encoder
    sees each image and its mirror once."""
    vae.main([
        "--data", photos, "--size", "16", "--steps", "2", "--batch", "4", "--out", "vae.pt",
        "--threads", "1",
    ])
    seen = record(monkeypatch, vae.AutoencoderKL, "encode", len)
    for name, more in (("kept", []), ("fresh", ["--no-cache-latents"])):
        go(photos, "--steps", 4, "--mask", "0.5", "--patch", 2, "--space", "latent", "--vae",
           "vae.pt", "--amp", "off", "--out", f"runs/{name}", *more,
           )
        assert name == "fresh" or sum(seen) == 2 * 40
    kept, fresh = (read(f"runs/{name}/last.pt") for name in ("kept", "fresh"))
    assert all(torch.allclose(kept["model"][k], v, atol=1e-4) for k, v in fresh["model"].items())
    assert [float(r["val_loss"]) for r in rows("runs/kept")
            ] == pytest.approx([float(r["val_loss"]) for r in rows("runs/fresh")], rel=1e-4)
    Path("vae.pt").unlink()
    vae.main([
        "--data", photos, "--size", "16", "--steps", "1", "--batch", "4", "--out", "vae.pt",
        "--threads", "1",
    ])
    seen.clear()
    with pytest.raises(
            UserError,
            match="not the autoencoder"):  # refused before anything is encoded with another one
        train.main(["--resume", "--out", "runs/kept", "--steps", "9"])
    assert not seen


def test_a_reconstruction_is_logged_drawn_tuned_and_not_sampled(photos):
    go(photos, "--steps", 3, *RECONSTRUCT, "--sample-every", 3, "--out", "runs/a")
    ckpt = read("runs/a/last.pt")
    assert ckpt["config"]["predict"] == "x0" and ckpt["meta"]["objective"] == "reconstruct"
    loaded = S.load("runs/a", device="cpu")
    _, held_out = running.setup.holdout(running.setup.load_images(photos, 16), "0.2", seed=0)
    errors = running.evaluate.reconstruction_errors(loaded, held_out)
    assert float(rows("runs/a")[-1]["val_loss"]) == pytest.approx(sum(errors.values()) / 4,
                                                                  rel=1e-4)
    assert Image.open("runs/a/samples/000003.png").width > 400
    with pytest.raises(UserError, match="--objective reconstruct"):
        S.main(["--n", "2", "--out", "none.png"])
    assert not Path("none.png").exists()
    with pytest.raises(UserError, match="needs --mask"):
        finetune.main(["--steps", "1"])
    with pytest.raises(UserError, match="--objective denoise: .* was trained with reconstruct"):
        finetune.main(["--steps", "1", "--objective", "denoise"])
    finetune.main(["--steps", "1", "--mask", "0.25", "--out", "runs/b"])
    assert (read("runs/b/last.pt")["meta"]["objective"] == "reconstruct"
            and rows("runs/b")[-1]["visible"] == "3")


def test_a_run_from_before_there_were_objectives_is_tuned_and_sampled(photos):
    go(photos, "--steps", 1, "--out", "runs/a")
    old = read("runs/a/last.pt")
    for name in ("objective", "latents", "cache_latents"):
        del old["config"][name]
    del old["meta"]["objective"], old["meta"]["recon_target"]
    save_atomic(old, Path("runs/a/last.pt"))
    finetune.main(["--steps", "1", "--out", "runs/b"])
    S.main(["--ckpt", "runs/a", "--n", "1", "--steps", "1"])


def test_finetune_starts_from_raw_or_averaged_weights_with_a_fresh_optimizer(photos):
    go(photos, "--steps", 5, "--out", "runs/a", "--mask", "0.5")
    first = read("runs/a/last.pt")
    for weights in ("model", "ema"):
        finetune.main([
            "--from", "runs/a", "--weights", weights, "--steps", "1", "--lr", "1e-12", "--out",
            f"runs/{weights}",
        ])
        tuned = read(f"runs/{weights}/last.pt")
        assert torch.allclose(tuned["model"]["embed.weight"],
                              first[weights]["embed.weight"],
                              atol=1e-7)
        assert tuned["optimizer"][0]["state"][0]["step"] == 1


def test_the_guess_is_measured_once_and_kept_by_stage_two(photos):
    """Also on other images: the weights know the first stage's axes. `none` has no guess,
    and a run from before there was one stays without."""
    go(photos, "--steps", 2, "--out", "runs/a")
    fitted = read("runs/a/last.pt")["model"]
    patches = patchify(to_float(torch.stack([torch.from_numpy(np.array(Image.open(path)))
                                             for path in Path(photos).rglob("*.png")])
                                .permute(0, 3, 1, 2)), 8).flatten(0, 1)
    assert torch.allclose(fitted["guess.mean"], patches.mean(0), atol=0.15)    # 0.2 are held out
    assert fitted["guess.spread"].square().sum() == pytest.approx(
        patches.var(0).sum().item(), rel=0.1)
    finetune.main(["--from", "runs/a", "--data", "faces", "--steps", "1", "--threads", "1",
                   "--out", "runs/b"])
    tuned = read("runs/b/last.pt")["model"]
    for name in ("guess.mean", "guess.spread", "guess.axes"):
        assert torch.equal(fitted[name], tuned[name])
    go(photos, "--steps", 2, "--out", "runs/c", "--precondition", "none")
    ckpt = read("runs/c/last.pt")
    assert not any(name.startswith("guess") for name in ckpt["model"])
    del ckpt["config"]["precondition"], ckpt["meta"]["model"]["guess"]
    save_atomic(ckpt, Path("runs/c/last.pt"))
    go(photos, "--steps", 3, "--out", "runs/c", "--resume")
    finetune.main(["--from", "runs/c", "--steps", "1", "--threads", "1", "--out", "runs/d"])
    assert read("runs/d/last.pt")["meta"]["model"]["guess"] is None
    with pytest.raises(UserError, match="--precondition patch: runs/c"):
        finetune.main(["--from", "runs/c", "--precondition", "patch", "--out", "runs/e"])


def test_classes_move_to_other_data_by_name(photos):
    """A stage two with other classes keeps the embeddings of those it knows; classes may
    also be dropped or come in fresh."""
    go(photos, "--steps", 3, "--labels", "--out", "runs/a", "--lr", "0.1")
    weights, meta = (read("runs/a/last.pt")[part] for part in ("model", "meta"))
    net = S.build_model(meta | dict(model=meta["model"] | dict(classes=3)))[0]
    fresh = net.embed_class.weight.detach().clone()
    train.load_first_stage(net, running.setup.FirstStage(weights, meta), ["dawn", "night", "dusk"])
    assert torch.equal(net.embed_class.weight[1], weights["embed_class.weight"][1])
    assert torch.equal(net.embed_class.weight[[0, 2]], fresh[[0, 2]])
    finetune.main(["--from", "runs/a", "--no-labels", "--steps", "1", "--out", "runs/plain"])
    assert read("runs/plain/last.pt")["meta"]["classes"] == []
    finetune.main(["--from", "runs/plain", "--labels", "--steps", "1", "--out", "runs/again"])
    assert read("runs/again/last.pt")["meta"]["classes"] == ["day", "night"]


def test_stage_two_holds_out_the_same_images_and_draws_other_noise(photos, monkeypatch):
    go(photos, "--steps", 1, "--seed", "5", "--out", "runs/a", "--no-flip")
    with monkeypatch.context() as patch:
        seen = record(patch, spaces.PixelSpace, "encode", lambda x: x)
        go(photos, "--steps", 1, "--seed", "5", "--out", "runs/b", "--no-flip")
        (training, validation), _ = seen[-2:], seen.clear()
        finetune.main(["--from", "runs/a", "--steps", "1", "--out", "runs/c"])
        assert read("runs/c/last.pt")["config"]["seed"] == 5
        assert torch.equal(seen[-1], validation) and not torch.equal(seen[-2], training)


def test_automatic_precision_is_never_fp16():
    assert amp_type("auto", torch.device("cpu")) in (torch.bfloat16, None)
    assert (amp_type("off", torch.device("cpu")) is None
            and amp_type("bf16", torch.device("cpu")) == torch.bfloat16)


def test_the_gradient_is_clipped_to_its_largest_norm(photos):
    """With plain gradient descent in AdamW's place, one step moves the weights by at most
    lr x clip."""
    class Descent(torch.optim.SGD):
        def __init__(self, parameters, lr, **ignored):
            super().__init__(parameters, lr)

    moved = []
    for clip in (1e-3, 1e3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim, "AdamW", Descent)
            go(photos, "--steps", 1, "--lr", 1.0, "--warmup", 0, "--clip", clip, "--out",
               f"runs/{clip}", "--amp", "off", "--optimizer", "adamw",
               )
        torch.manual_seed(0)
        ckpt = read(f"runs/{clip}/last.pt")
        start = dict(S.build_model(ckpt["meta"])[0].named_parameters())
        moved.append(math.sqrt(sum(((ckpt["model"][k] - q)**2).sum().item()
                                   for k, q in start.items())))
    assert moved[0] == pytest.approx(1e-3, rel=1e-2) and 1e-2 < moved[1] < 1e3
