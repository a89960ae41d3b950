"""The journal of a run: its folder, log, pictures and checkpoints, and the signals that
end it.

    runs/NAME/   config.json   log.csv   loss.png   samples/000500.png   last.pt   000500.pt

`with Journal(setup) as journal` opens the folder and catches Ctrl-C, SIGTERM, SIGHUP (a
closed window) and SIGUSR1 (Slurm's warning). When the block ends, however it ends, the old
handlers are back and log and lock are closed. In between it is told of every step. One
process of a run writes, the others only help to add up the loss.

A signal saves before anything is drawn, for a harder one may follow. An error saves, too:
the last whole step is kept. What ran after the last checkpoint runs again, so the log is
cut back to the checkpoint first. What is a link to elsewhere is replaced, not followed.
"""
import contextlib
import csv
import dataclasses
import json
import math
import signal
import sys
import time

import torch
from tqdm import tqdm

from mask import visible_count
from plumbing.checkpoint import (
    VERSION, checkpoint_step, find_last, keep_copy, name_newest, open_run_folder, remove_old_copies,
    save_atomic, unlink_link)
from plumbing.console import UserError, hearing_signals, is_first_here, replacing
from plumbing.sheets import draw_plot, save_picture
from running.evaluate import evaluate_model
from running.setup import read_state, visible_shares
from sample import DiffusionModel

COLUMNS = ["step", "seconds", "images", "loss", "val_loss", "lr", "ratio", "visible",
           "images_per_second"]
LOG_EVERY = 10                                  # steps


# --- the log and its picture --------------------------------------------------------------

def open_log(path, step):
    """log.csv for appending, cut back to `step`: what ran after the checkpoint will run
    again. UserError for a damaged one."""
    rows = []
    try:
        if path.exists():
            with open(path, newline="") as f:   # a torn last line has no last field
                rows = [row for row in csv.DictReader(f)
                        if row["images_per_second"] and int(row["step"]) <= step]
        lines = [COLUMNS] + [[row[column] for column in COLUMNS] for row in rows]
        for line in lines[1:]:
            for field in line:
                float(field or 0)               # else the loss curve could not be drawn
    except (KeyError, ValueError, csv.Error):
        raise UserError(f"{path} is damaged: delete it, and the run goes on with "
                        "a new one") from None
    with replacing(path, shared=False) as f:
        f.write("".join(",".join(line) + "\n" for line in lines).encode())
    return open(path, "a", newline="", buffering=1)


def draw_loss(log, path, width=640, height=360):
    """log.csv -> a picture of training and validation loss over steps, on a logarithmic
    scale."""
    with open(log, newline="") as f:
        rows = list(csv.DictReader(f))
    curves = []
    for column, name, colour in (("loss", "training loss", (150, 150, 150)),
                                 ("val_loss", "validation loss", (200, 30, 30))):
        curve = [(int(row["step"]), float(row[column])) for row in rows
                 if row[column] and 0 < float(row[column]) < math.inf]
        if curve:
            curves.append((name, colour, curve))
    if curves:
        save_picture(draw_plot(curves, width, height, "step", log=True), path)


def waits_for_images(frame):
    """Whether a signal came while torch's DataLoader waited for a batch, perhaps for
    ever."""
    while frame is not None:
        if frame.f_code.co_name == "__next__" and "dataloader" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


# --- the journal --------------------------------------------------------------------------

class Journal:
    """What a run leaves behind, and when it ends. setup: train.Setup, not prepared yet.

    folder: the run's. ended: whether the loop should stop."""

    def __init__(self, setup):
        self.setup, self.machine = setup, setup.machine
        self.is_writer = self.machine.rank == 0
        self.signals, self.files = [], []
        self.hearing = hearing_signals(self.ask_to_stop)
        self.ended = False
        self.learner = self.log = self.bar = None

    # -- begin and end ---------------------------------------------------------------------

    def __enter__(self):
        opened = self.machine.run_on_first(self.open_folder)
        self.folder, config = opened or (None, None)
        if config:
            self.files.append(config)           # it is also the lock: it stays open
        self.o = dataclasses.replace(self.setup.o, out=str(self.folder))
        self.hearing.__enter__()
        return self

    def open_folder(self):
        """The run's folder and its lock. UserError when another process trained there while
        this one read its images."""
        folder, config = open_run_folder(self.setup.o.out)
        last, ckpt = find_last(folder), self.setup.ckpt
        if bool(last) != bool(ckpt) or (ckpt and checkpoint_step(last) != ckpt["step"]):
            config.close()
            raise UserError(f"--out {folder}: another process has trained there meanwhile; "
                            "give another --out, or --resume again")
        return folder, config

    def __exit__(self, kind, error, trace):
        self.hearing.__exit__(None, None, None)
        if kind is not None:
            self.rescue()
        # `run_command` prints the first process's errors only, but in a step any may fail.
        if self.learner is not None and kind is UserError and not is_first_here():
            print(f"error on process {self.machine.rank}: {error}", file=sys.stderr)
        if self.bar is not None:
            self.bar.close()
        for file in self.files:
            file.close()
        if kind is None:
            self.finish()

    def ask_to_stop(self, number, frame):
        """The signal handler: the loop ends after this step, at once if it waits for
        images. A second signal ends the program."""
        self.signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        if waits_for_images(frame) and self.machine.world == 1:
            raise SystemExit(128 + number)

    def rescue(self):
        """The block ends with an error: keep the last whole step, if it is not kept yet."""
        learner = self.learner
        is_whole = learner is not None and learner.is_whole and learner.step == self.plan.step
        if not self.is_writer or not is_whole or self.plan.step <= self.saved:
            return
        # A full disk may be the very error, or the GPU.
        with contextlib.suppress(UserError, OSError, RuntimeError):
            if self.machine.world == 1:                     # the others may be gone
                self.write_log(*self.last, looks=False)
            self.save(is_numbered=False)
            print(f"stopped at step {self.plan.step}: {self.folder / 'last.pt'}", flush=True)

    def begin(self, learner, plan, learning_rate):
        """Before the first step: write config.json, open the log, say what will be trained.
        learning_rate: train.learning_rate."""
        self.learner, self.plan, self.saved = learner, plan, plan.step
        self.tokens = self.setup.side ** 2
        self.logged, self.counted, self.since = plan.step, 0, time.monotonic()
        self.loss_sum = torch.zeros((), device=self.machine.device)     # added up on the device
        if self.is_writer:
            unlink_link(self.folder / "samples")
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            config, resumed = self.files[0], self.setup.ckpt is not None
            self.log = open_log(self.folder / "log.csv", plan.step if resumed else -1)
            self.files.append(self.log)
            config.truncate(0)                      # only now: a damaged log changes nothing
            config.write(json.dumps(dataclasses.asdict(self.o) | dict(stage=self.o.stage),
                                    indent=1))
            config.flush()
            print("\n".join([*self.describe(), *self.describe_longer_plan(learning_rate)]),
                  flush=True)
            if plan.step == 0:
                ratio = self.setup.ratio(0)
                self.write_row(0.0, "", f"{self.evaluate():.6g}", 0.0, ratio, 0.0)
        self.bar = tqdm(total=plan.total, initial=plan.step, desc=self.o.stage, unit="step",
                        disable=None if self.is_writer else True, dynamic_ncols=True)
        self.since = time.monotonic()
        plan.start_watch()

    def describe(self):
        """What will be trained, on what: three lines, and a note where a resumed run
        differs."""
        o, setup, world = self.o, self.setup, self.machine.world
        parameters = sum(q.numel() for q in self.learner.net.parameters()) / 1e6
        counts = ", ".join(map(str, sorted(visible_shares(o, self.tokens))))
        dtype = str(setup.dtype or torch.float32).removeprefix("torch.")
        continued = f", continued at step {self.plan.step}" if setup.ckpt else ""
        of = "from" if setup.classes else "of"
        lines = [
            f"{setup.described} {of} {o.data} at {o.size} px ({len(setup.held_out)} held out); "
            f"{o.model} model, {parameters:.1f} M parameters",
            f"{self.tokens} tokens, visible: {counts}; batch {o.batch} = {world} process(es) x "
            f"{setup.shards} x {setup.micro}; {self.machine.device.type}, {dtype}, "
            f"{torch.get_num_threads()} threads",
            f"run folder {self.folder}{continued}"]
        began = setup.meta.get("shards", world * setup.shards)
        if began != world * setup.shards:
            lines.append(f"note: this run began with {began} shards per step, now "
                         f"{world * setup.shards}: the same law, not the same numbers")
        return lines

    def describe_longer_plan(self, learning_rate):
        """What a longer plan turns back, in a line, or nothing. -> list"""
        o, plan, ratio = self.o, self.plan, self.setup.ratio
        before = read_state(self.setup.ckpt) if self.setup.ckpt else None
        if before is None or plan.progress > before["progress"] - 1e-9:
            return []
        old = learning_rate(o, plan.step, before["progress"], before["plan"])
        new = learning_rate(o, plan.step, plan.progress, plan.total)
        if (old, ratio(before["progress"])) == (new, ratio(plan.progress)):
            return []
        return [f"note: {plan.total} steps instead of {before['plan']} turn progress back from "
                f"{before['progress']:.2f} to {plan.progress:.2f}: the learning rate goes from "
                f"{old:.2g} to {new:.2g}, the hidden share from "
                f"{ratio(before['progress']):.2f} to {ratio(plan.progress):.2f}"]

    def finish(self):
        """After the last step: say where everything is. SystemExit after a signal."""
        if self.learner is None:
            return
        if self.is_writer:
            names = ("last.pt", "loss.png", f"samples/{self.plan.step:06d}.png")
            made = [str(self.folder / name) for name in names if (self.folder / name).exists()]
            how = "finished" if self.plan.is_done else "stopped"
            print(f"{how} at step {self.plan.step} of {self.plan.total or 'a plan not made yet'} "
                  f"after {self.plan.seconds / 60:.1f} minutes: {', '.join(made)}")
        self.learner.model = None               # it holds the group of processes, with its threads
        self.machine.close()
        if self.signals:
            raise SystemExit(128 + self.signals[0])     # what a shell expects after a signal

    # -- a step ----------------------------------------------------------------------------

    def record(self, loss, ratio, lr):
        """After every step: log it, evaluate, save, and decide with all processes whether
        it was the last one."""
        self.last = ratio, lr
        if self.learner.skipped_in_a_row == 0:
            self.loss_sum, self.counted = self.loss_sum + loss, self.counted + 1
        self.bar.update()
        self.agree()
        step, is_stopped = self.plan.step, self.ended and not self.plan.is_done
        looks = step % self.o.sample_every == 0 or (self.ended and not is_stopped)
        keeps = step % self.o.save_every == 0
        # A checkpoint falls on a line of the log: so no sum has to be kept in it.
        if step % LOG_EVERY == 0 or looks or keeps or self.ended:
            self.write_log(ratio, lr, looks)
        if self.is_writer and (keeps or self.ended):
            self.save(keeps)
        self.plan.start_watch()

    def agree(self):
        """All processes learn whether one was asked to stop, and how many steps the first
        one wants to plan."""
        left = self.plan.propose_steps_left() if self.is_writer else 0
        is_asked, left = self.machine.reduce_max(len(self.signals) > 0, left)
        self.plan.adopt(left)
        if self.bar.total != self.plan.total:
            self.bar.total = self.plan.total
        self.ended = bool(is_asked) or self.plan.is_done

    def write_log(self, ratio, lr, looks):
        """A line of the log: means since the last line, and an evaluation if `looks`."""
        total = self.machine.reduce(float(self.loss_sum))
        mean = total / self.machine.world / self.counted if self.counted else math.nan
        steps, step = self.plan.step - self.logged, self.plan.step
        speed = steps * self.o.batch / (time.monotonic() - self.since)
        if self.is_writer:
            seconds = self.plan.seconds
            value = self.evaluate() if looks else None
            shown = f"{value:.6g}" if looks else ""
            self.write_row(seconds, f"{mean:.6g}", shown, lr, ratio, speed)
            self.bar.set_postfix(loss=f"{mean:.4f}", img_s=f"{speed:.0f}")
            if looks:
                draw_loss(self.folder / "log.csv", self.folder / "loss.png")
                skipped = self.learner.skipped
                note = f", {skipped} steps skipped" if skipped else ""
                tqdm.write(f"step {step}/{self.plan.total}: loss {mean:.4f}, val_loss {value:.4f}, "
                           f"{speed:.0f} images/s{note}")
        self.logged, self.counted = step, 0
        self.loss_sum = torch.zeros((), device=self.machine.device)
        self.since = time.monotonic()

    def write_row(self, seconds, loss, val_loss, lr, ratio, speed):
        """One line of log.csv."""
        step = self.plan.step
        clock = f"{seconds:.2f}" if step else "0"
        row = [step, clock, step * self.o.batch, loss, val_loss, f"{lr:.6g}", f"{ratio:.6g}",
               visible_count(self.tokens, ratio), f"{speed:.4g}"]
        self.log.write(",".join(map(str, row)) + "\n")

    def evaluate(self):
        """Validation loss and a picture in samples/, both of the averaged weights.
        -> val_loss"""
        begun, setup = time.monotonic(), self.setup
        model = DiffusionModel(self.learner.average, setup.schedule, setup.space,
                               self.o.predict, setup.meta, self.machine.device)
        value = evaluate_model(model, setup.held_out, setup.shown, setup.encoding_space, self.o,
                               self.folder / "samples" / f"{self.plan.step:06d}.png", setup.dtype)
        self.plan.count_look(time.monotonic() - begun)
        return value

    def save(self, is_numbered):
        """Write last.pt, whole or not at all. One with a number gets that name first: a run
        that is killed in between goes on from the number, or from an older last.pt."""
        meta = self.setup.meta | self.plan.state() | dict(skipped=self.learner.skipped)
        last, numbered = self.folder / "last.pt", self.folder / f"{self.plan.step:06d}.pt"
        save_atomic(self.learner.state() | dict(
            version=VERSION, config=dataclasses.asdict(self.o), meta=meta,
            images=self.plan.step * self.o.batch, seconds=self.plan.seconds),
            numbered if is_numbered else last)
        if is_numbered:
            keep_copy(numbered, last)
            remove_old_copies(self.folder, self.o.keep)
        self.saved = self.plan.step
        name_newest(self.folder)
