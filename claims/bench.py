"""Bench: what every experiment of reproduce.py needs, arms that are trained once and numbers that are measured once.

The idea. A comparison takes hours and is interrupted, so it must be able to go on from anywhere: an *arm* is an ordinary run, trained with
--resume under a name of its own, a *cell* is a number that is kept in cells.json the moment it is known, and an experiment is a function
that asks for arms and cells in their order as if nothing had been done before. Arms may be trained side by side by several processes.

Networks are compared at equal time, but a clock that runs all the while would measure the machine's other work, too. So `pace` times each
network alone, at the start, and from then on a minute is a number of steps.
"""
import csv
import json
import shutil
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import train
from plumbing.console import UserError, replacing
from fid import proxy_distances
from plumbing.machine import amp_type
from sample import load, sample
from plumbing.images import grid, seeded, to_uint8


class Bench:
    """One claim at work: where its files are, at what scale, and the numbers so far."""

    def __init__(self, claim, args, scale):
        self.folder, self.args, self.scale = Path(args.out) / claim, args, scale
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "cells.json"
        self.cells = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.loaded, self.arms = {}, []

    def train_arm(self, name, command, *flags, before=()):
        """Train the arm `name` with train.main or finetune.main, unless that was done; one that was interrupted goes on. before: the arms
        that cannot do without it. A flag that is a function is called only now. -> its folder."""
        self.arms.append(name)
        if self.args.arm in (None, name, *before):
            flags = [f() if callable(f) else f for f in flags]
            print(f"\n=== {self.folder / name}: {command.__module__}.py {' '.join(map(str, flags))}", flush=True)
            common = ["--seed", self.args.seed, "--threads", self.args.threads, "--device", self.args.device, "--out", self.folder / name, "--resume"]
            command([str(f) for f in (*flags, *common)])
        return self.folder / name

    def seconds_per_step(self, networks, visits=1):
        """{name: seconds a step} of train.py with the flags {name: flags}. Each is timed alone for forty steps, in turn and so many times, and its
        fastest ten steps count, since all else that a machine does can only slow it down. Run nothing beside it."""
        if "steps" in self.scale:                                               # the smoke scale knows no clock
            return dict.fromkeys(networks, 60 / self.scale["steps"])

        def timed(name, flags):
            folder = self.folder / "timing" / name
            shutil.rmtree(folder, ignore_errors=True)
            train.main([str(f() if callable(f) else f) for f in (*flags, "--steps", 40, "--sample-every", 10**9, "--threads", self.args.threads, "--device", self.args.device, "--out", folder)])
            with open(folder / "log.csv", newline="") as log:
                rate = max(float(row["images_per_second"]) for row in csv.DictReader(log))
            return round(json.loads((folder / "config.json").read_text())["batch"] / rate, 5)

        times = [{name: self.measure_once(f"{name}: seconds a step, visit {v + 1}", lambda: timed(name, flags)) for name, flags in networks.items()} for v in range(visits)]
        return {name: min(visit[name] for visit in times) for name in networks}

    def log(self, name, column):
        """The last value of a column of an arm's log."""
        with open(self.folder / name / "log.csv", newline="") as log:
            return [float(row[column]) for row in csv.DictReader(log) if row[column]][-1]

    def all_trained(self):
        """Whether to go on and measure. False after --arm; UserError for an arm that there is not."""
        if self.args.arm not in (None, *self.arms):
            raise UserError(f"--arm {self.args.arm}: the arms of {self.args.claim} are {', '.join(self.arms)}")
        return self.args.arm is None

    def model(self, path):
        """The averaged model of a run or checkpoint, loaded once."""
        if path not in self.loaded:
            self.loaded[path] = load(self.folder / path, device=self.args.device)
        return self.loaded[path]

    def measure_once(self, key, measure):
        """The number (or numbers) called `key`: measured now, or remembered."""
        if key not in self.cells:
            begun = time.monotonic()
            value = measure()
            self.cells = (json.loads(self.file.read_text()) if self.file.exists() else {}) | {key: value}      # another arm may have written meanwhile
            with replacing(self.file) as file:
                file.write(json.dumps(self.cells, indent=1).encode())
            print(f"{key}: {self.cells[key]}  ({time.monotonic() - begun:.0f} s)", flush=True)
        return self.cells[key]

    def draw(self, path, n, **how):
        """n images of a model as uint8, always of the same noise."""
        loaded = self.model(path)
        return to_uint8(sample(loaded, n, seed=self.args.seed, batch=self.scale["batch"], amp=amp_type("auto", loaded.device), **how))

    def distances(self, images, path, n, labels=None, **how):
        """{proxy: [value, floor]} of n samples of a model to 2 n of the images, always the same ones."""
        def measured():
            reference = images.take(torch.randperm(len(images), generator=seeded(self.args.seed, 100))[:2 * n])[0]
            return {k: [round(float(v), 5) for v in pair] for k, pair in proxy_distances(self.draw(path, n, labels=labels, **how), reference).items()}
        return self.measure_once(f"{path} n={n} {' '.join(f'{k}={v}' for k, v in how.items())}", measured)

    def write(self, name, text):
        """A file of the claim's folder, also printed."""
        (self.folder / name).write_text(text)
        print(f"\n{text}\nwrote {self.folder / name}")


def format_distances(cell, which=0):
    """A cell of `Bench.distances` as text; which: 0 the values, 1 their floors."""
    return " / ".join(f"{cell[k][which]:.3g}" for k in ("pixel", "random-conv", "swd"))


def format_table(head, rows):
    """A table of strings in Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def draw_sheet(rows, columns, zoom=1, left=150):
    """Pictures in a table: rows [(label, uint8 (k, C, H, W))] under the column titles, a PIL image."""
    strips = [grid(images, len(images), pad=1) for _, images in rows]
    strips = [s.resize((s.width * zoom, s.height * zoom), Image.Resampling.NEAREST) for s in strips]
    canvas = Image.new("RGB", (left + max(s.width for s in strips), 16 + sum(s.height + 4 for s in strips)), "white")
    ink, top = ImageDraw.Draw(canvas), 16
    for j, title in enumerate(columns):
        ink.text((left + 4 + j * strips[0].width / len(rows[0][1]), 2), title, fill="black")
    for (label, _), s in zip(rows, strips):
        ink.text((4, top + s.height / 2 - 6), label, fill="black")
        canvas.paste(s, (left, top))
        top += s.height + 4
    return canvas
