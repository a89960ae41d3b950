"""Laws of a run's folder: nothing is lost to a signal or an error, a run goes on with its
own data, links are not followed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import running.journal
import running.setup
import train
from conftest import ROOT
from plumbing.checkpoint import (checkpoint_step, newest_checkpoint, open_run_folder,
                                 remove_old_copies, save_atomic)
from plumbing.console import UserError
from plumbing.images import choose_subset
from running.evaluate import validate
import sample as S
from sample import load
from test_train import (TINY, equal, go, in_a_folder_of_its_own, photos, read, rows, start,
                        wait_for_step,
                        )  # noqa: F401

pytestmark = pytest.mark.usefixtures("narrow")


def paint(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(path)


def options(*arguments):
    given = vars(train.options_parser(train.Options, "").parse_args([*TINY, *map(str, arguments)]))
    return train.Options(**given)


# --- signals and errors


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_a_closed_window_is_one(photos, name):  # noqa: F811
    number = getattr(signal, name)
    heard = []

    def send(step, numbers):
        heard.append(step)
        if step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stop:
        train.train(options("--data", photos, "--steps", 50, "--out", "runs/a"), on_step=send)
    assert stop.value.code == 128 + number
    assert read("runs/a/last.pt")["step"] == heard[-1] == int(rows("runs/a")[-1]["step"]) < 50


def test_nohup_goes_on(photos):  # noqa: F811
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train.train(options("--data", photos, "--steps", 4, "--out", "runs/a"),
                    on_step=lambda *_: os.kill(os.getpid(), signal.SIGHUP),
                    )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read("runs/a/last.pt")["step"] == 4


def break_batches(monkeypatch, at, error):
    """The images of a run give way to an error at one step."""
    real = train.Setup.batches

    def batches(self, step):
        for k, batch in enumerate(real(self, step)):
            if step + k == at:
                error()
            yield batch

    monkeypatch.setattr(train.Setup, "batches", batches)


def test_an_error_keeps_the_last_whole_step_and_the_run_goes_on_as_if_nothing_had_been(
        photos, monkeypatch):  # noqa: F811
    go(photos, "--steps", 9, "--out", "runs/straight")

    def fail():
        raise UserError("a data worker died")

    with monkeypatch.context() as patch:
        break_batches(patch, 7, fail)
        with pytest.raises(UserError, match="worker died"):
            go(photos, "--steps", 9, "--out", "runs/broken")
    assert read("runs/broken/last.pt")["step"] == 7 and rows("runs/broken")[-1]["step"] == "7"
    go(photos, "--steps", 9, "--out", "runs/broken", "--resume")
    assert equal(read("runs/broken/last.pt")["model"], read("runs/straight/last.pt")["model"])


def test_a_step_that_broke_in_its_middle_is_not_kept(photos, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch, "_foreach_lerp_",
                        lambda *_: 1 / 0)  # the optimizer stepped, the average did not
    with pytest.raises(ZeroDivisionError):
        go(photos, "--steps", 3, "--out", "runs/a")
    assert not Path("runs/a/last.pt").exists()


def test_a_signal_ends_the_wait_for_images_that_never_come(photos, monkeypatch):  # noqa: F811
    """The wait is that of torch's DataLoader, whose worker never answers."""
    class Asleep(torch.utils.data.Dataset):
        def __getitem__(self, i):
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)

    break_batches(
        monkeypatch, 2,
        lambda: next(iter(torch.utils.data.DataLoader(Asleep(), sampler=[0], num_workers=1))),
    )
    with pytest.raises(SystemExit) as stop:
        go(photos, "--steps", 9, "--out", "runs/a")
    assert stop.value.code == 130 and read("runs/a/last.pt")["step"] == 2


# --- the same run, or one line


def test_a_resumed_run_goes_on_with_its_own_images_and_classes_or_says_so():
    for name in ("ant", "bee", "cow"):
        for i in range(4):
            paint(Path("things") / name / f"{i}.png", 40 * i)
    arguments = ["--data", "things", *TINY, "--labels", "--out", "runs/a"]
    train.main([*arguments, "--steps", "2"])
    before = Path("runs/a/last.pt").read_bytes()
    go_on = lambda: train.main(["--out", "runs/a", "--resume", "--steps", "4"])  # noqa: E731

    Path("things/ant").rename("things/wasp")
    with pytest.raises(UserError,
                       match="began with the classes ant, bee, cow, now there are bee, cow, wasp"):
        go_on()
    Path("things/wasp").rename("things/ant")
    paint(Path("things/bee/9.png"), 7)
    with pytest.raises(UserError,
                       match="--data: the run in runs/a began with .* images, now there are"):
        go_on()
    Path("things/bee/9.png").unlink()
    Path("things/bee/3.png").rename("things/bee/x.png")
    with pytest.raises(UserError, match="files of other names"):
        go_on()
    Path("things/bee/x.png").rename("things/bee/3.png")
    assert Path("runs/a/last.pt").read_bytes() == before
    go_on()
    assert read("runs/a/last.pt")["step"] == 4

    old = read("runs/a/last.pt")  # from before data was identified: classes are known
    del old["meta"]["data"]
    save_atomic(old, Path("runs/a/last.pt"))
    train.main(["--out", "runs/a", "--resume", "--steps", "5"])
    Path("things/ant").rename("things/wasp")
    with pytest.raises(UserError, match="began with the classes"):
        train.main(["--out", "runs/a", "--resume", "--steps", "6"])


def test_a_file_that_breaks_or_is_repaired_does_not_move_the_held_out_images():
    for i in range(30):
        paint(Path("things") / f"{i:02d}.png", 8 * i)
    whole, torn = Path("things/07.png").read_bytes(), Path("things/07.png").read_bytes()[:60]
    Path("things/07.png").write_bytes(torn)
    train.main(["--data", "things", *TINY, "--steps", "2", "--val", "0.2", "--out", "runs/a"])
    go_on = lambda: train.main(["--out", "runs/a", "--resume", "--steps", "3"])  # noqa: E731
    Path("things/07.png").write_bytes(whole)
    with pytest.raises(UserError, match="a file broke or was repaired.* Start another run"):
        go_on()
    Path("things/07.png").write_bytes(torn)
    old = read("runs/a/last.pt")
    go_on()
    for part in old["meta"]["data"].values():               # older files do not tell it
        del part["used"]
    save_atomic(old, Path("runs/a/last.pt"))
    go_on()


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_run_that_another_process_made_meanwhile_is_not_overwritten(
        photos, monkeypatch, is_resumed):  # noqa: F811
    arguments = ["--data", photos, "--steps", 2, "--out", "runs/a"]
    if is_resumed:
        go(*arguments[1:])
        arguments = ["--out", "runs/a", "--resume", "--steps", 4]
    go(photos, "--steps", 3, "--out", "runs/b")
    finished = Path("runs/b/last.pt").read_bytes()

    def open_later(out):                                    # another process was faster
        opened = open_run_folder(out)
        (opened[0] / "last.pt").write_bytes(finished)
        return opened

    monkeypatch.setattr(running.journal, "open_run_folder", open_later)
    with pytest.raises(UserError, match="another process has trained there meanwhile"):
        train.main([*([] if is_resumed else TINY), *map(str, arguments)])
    assert Path("runs/a/last.pt").read_bytes() == finished


def test_a_kill_between_the_two_names_of_a_checkpoint_loses_neither(
        photos, monkeypatch):  # noqa: F811
    def die(*paths):
        raise SystemExit("killed")

    arguments = ["--steps", 4, "--save-every", 2, "--out", "runs/a"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(running.journal, "keep_copy", die)
        patch.setattr(running.journal.Journal, "rescue", lambda self: None)
        go(photos, *arguments)
    assert not Path("runs/a/last.pt").exists()
    go(photos, *arguments, "--resume")
    assert [row["step"] for row in rows("runs/a")][-1] == "4"
    assert Path("runs/a/000004.pt").samefile("runs/a/last.pt")
    assert not list(Path("runs/a").glob("*.tmp"))


def test_a_run_whose_last_checkpoint_is_gone_goes_on_from_the_newest_number(
        photos, capsys):  # noqa: F811
    arguments = ["--save-every", 2, "--out", "runs/a"]
    go(photos, "--steps", 4, *arguments)
    Path("runs/a/last.pt").unlink()
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        go(photos, "--steps", 4, *arguments)
    go(photos, "--steps", 6, *arguments, "--resume")
    assert "continued at step 4" in capsys.readouterr().out and read("runs/a/last.pt")["step"] == 6


def test_the_newest_checkpoints_stay_beyond_a_million_steps(tmp_path):
    for step in (998_000, 999_500, 1_000_000, 1_000_500):
        (tmp_path / f"{step:06d}.pt").touch()
    remove_old_copies(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1000000.pt", "1000500.pt"]


@pytest.mark.parametrize("flags", [["--out", "photos/run"], []])
def test_a_run_does_not_write_among_its_images(flags):
    for i in range(8):
        paint(Path("photos") / f"{i}.png", 30 * i)
    with pytest.raises(UserError, match="lies in --data"):
        train.main(["--data", "photos" if flags else ".", *TINY, "--steps", "1", *flags])
    assert not Path("photos/run").exists() and not Path("runs").exists()


def test_the_step_of_a_checkpoint_is_known_whatever_its_folder_is_called(tmp_path):
    folder = tmp_path / "a\udcffb\n"
    folder.mkdir()
    save_atomic(dict(step=7), folder / "last.pt")
    assert checkpoint_step(folder / "last.pt") == 7


@pytest.mark.parametrize("written", ["runs/a \n", "runs/a "])
def test_a_name_that_ends_with_a_space_is_one(written):
    Path("runs").mkdir()
    Path("runs/latest").write_text(written)
    assert str(newest_checkpoint()) == "runs/a /last.pt"


def test_a_run_does_not_write_among_its_targets():
    for i in range(8):
        paint(Path("photos") / f"{i}.png", 30 * i)
        paint(Path("maps") / f"{i}.png", 200)
    with pytest.raises(UserError, match="lies in --targets maps"):
        train.main(["--data", "photos", "--targets", "maps", "--task", "saliency", *TINY,
                    "--steps", "1", "--out", "maps/run"])
    assert not Path("maps/run").exists()


def test_what_a_longer_plan_turns_back_is_told(photos, capsys):  # noqa: F811
    go(photos, "--steps", 4, "--out", "runs/a", "--mask-from", 0.25, "--mask", 0.75, "--ramp",
       "linear",
       )
    assert "turn progress back" not in capsys.readouterr().out
    train.main(["--out", "runs/a", "--resume", "--steps", "8"])
    assert "8 steps instead of 4 turn progress back from 1.00 to 0.50" in capsys.readouterr().out
    for more in (["--steps", 4], ["--steps", 8, "--resume"]):       # of nothing that changes
        go(photos, *more, "--lr-end", 1, "--warmup", 0, "--out", "runs/constant")
    assert "turn progress back" not in capsys.readouterr().out


# --- places


def test_links_in_a_runs_folder_are_replaced_and_not_followed(photos):  # noqa: F811
    Path("precious").mkdir()
    Path("precious/file").write_text('{"stage": "mine"}')
    Path("runs/a").mkdir(parents=True)
    for name in ("config.json", "last.pt", "last.pt.tmp", "log.csv", "log.csv.tmp", "loss.png",
                 "000002.pt", "000002.pt.tmp",
                 ):
        (Path("runs/a") / name).symlink_to(Path("precious/file").resolve())
    Path("runs/a/samples").symlink_to(Path("precious").resolve())
    for name in ("last.pt", "000002.pt"):
        Path("runs/a", name).unlink()  # or it would be a run to go on with
    go(photos, "--steps", 2, "--save-every", 2, "--out", "runs/a")
    assert Path("precious/file").read_text() == '{"stage": "mine"}'
    assert os.listdir("precious") == ["file"]
    assert not any(path.is_symlink() for path in Path("runs/a").rglob("*"))


def test_where_runs_cannot_be_made_a_named_run_goes_on_and_a_nameless_one_is_one_line(
        photos, capsys):  # noqa: F811
    Path("runs").write_text("a file")
    with pytest.raises(UserError, match="give another --out"):
        go(photos, "--steps", 1)
    go(photos, "--steps", 1, "--out", "elsewhere/a")
    assert ("runs/latest cannot be written" in capsys.readouterr().out
            and Path("elsewhere/a/last.pt").exists())


# --- measures


def test_a_part_of_a_sorted_set_is_drawn_from_all_of_it():
    chosen = choose_subset(1000, 100)
    assert len(chosen) == 100 == len(set(chosen.tolist())) and (chosen.diff() > 0).all()
    counts = torch.bincount(chosen // 100, minlength=10)
    assert counts.min() > 0  # the first 100 would be one class of ten
    assert choose_subset(5, 100).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(choose_subset(1000, 100, 3), choose_subset(1000, 100, 3))
    assert not torch.equal(choose_subset(1000, 100, 3), choose_subset(1000, 100, 4))


def test_the_datas_size_is_that_of_all_classes():
    """Two thousand images, a dark class before a bright one: the first thousand would know
    the dark one alone."""
    pixels = torch.cat(
        [torch.full((1000, 3, 8, 8), value, dtype=torch.uint8) for value in (118, 255)])
    images = data.Images(8, 3, torch.zeros(2000, dtype=torch.int64), [], pixels)
    o = train.Options(size=8)
    some = running.setup.take_measured(o, images, train.open_space(o, 3), torch.device("cpu"))
    std = running.setup.measure_std(some)
    exact = data.to_float(pixels).double().square().mean().sqrt().item()
    assert std == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("count", [1, 2, 5, 13])
def test_few_held_out_images_are_seen_at_every_noise_level(photos, count,
                                                           monkeypatch):  # noqa: F811
    go(photos, "--steps", 1, "--out", "runs/a")
    model = load("runs/a", device="cpu")
    images, times = data.load_images(photos, 16).subset(range(count)), []
    monkeypatch.setattr(model.net, "forward", lambda zt, t, *rest:
                        (times.append(t), torch.zeros(len(zt), 6, 16, 16))[1],
                        )
    validate(model, images)
    seen = torch.cat(times).unique(return_counts=True)
    assert len(seen[0]) == 8 and seen[1].max() - seen[1].min() <= count


# --- restarts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("attempt", range(5))
def test_every_restart_by_torchrun_goes_on_from_the_last_checkpoint(photos, name, rank,
                                                                    attempt):  # noqa: F811
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "--max-restarts=3", ROOT / "train.py", "--data", photos, *TINY, "--steps", "60",
        "--save-every", "20", "--sample-every", "1000", "--out", "runs/a", "--resume",
    ]
    agent = subprocess.Popen([str(c) for c in command],
                             stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT,
                             text=True)
    while not Path("runs/a/000020.pt").exists():
        assert agent.poll() is None, agent.stdout.read()
        time.sleep(0.05)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[rank]), getattr(signal, name))
    said, _ = agent.communicate(timeout=180)
    assert agent.returncode == 0, said
    assert read("runs/a/last.pt")["step"] == 60 and [r["step"] for r in rows("runs/a")][-1] == "60"


def test_only_the_newest_numbered_checkpoints_are_kept_when_asked(photos):  # noqa: F811
    go(photos, "--steps", 9, "--save-every", 2, "--keep", 2, "--out", "runs/a")
    kept = sorted(path.name for path in Path("runs/a").glob("*.pt"))
    assert kept == ["000006.pt", "000008.pt", "last.pt"]


def test_resume_with_nothing_to_start_from_and_no_run_is_one_line():
    with pytest.raises(UserError, match="there is no run in runs/tpyo; the runs here are none"):
        train.main(["--resume", "--out", "runs/tpyo", "--threads", "1", "--device", "cpu"])
    assert not Path("runs").exists()


def test_the_first_line_names_the_classes_and_an_accent_is_one_letter(capsys):
    """macOS writes an accent as a letter of its own: the same folder, the same class."""
    for name in ("ant", "caf\u00e9"):
        for i in range(4):
            paint(Path("things") / name / f"{i}.png", 40 * i)
    train.main(["--data", "things", *TINY, "--labels", "--steps", "2", "--out", "runs/a"])
    assert "images of 2 classes (ant" in capsys.readouterr().out
    Path("things/caf\u00e9").rename("things/cafe\u0301")
    train.main(["--out", "runs/a", "--resume", "--steps", "3"])
    assert read("runs/a/last.pt")["step"] == 3
    weights, meta = (read("runs/a/last.pt")[part] for part in ("model", "meta"))
    net, first = S.build_model(meta)[0], running.setup.FirstStage(weights, meta)
    running.setup.load_first_stage(net, first, ["ant", "cafe\u0301"])
    assert torch.equal(net.state_dict()["embed_class.weight"], weights["embed_class.weight"])
