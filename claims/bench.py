"""Bench: what every claim needs, arms trained once and numbers measured once.

The idea. A comparison takes hours and is interrupted. So it must be able to go on from
anywhere:

    arm     an ordinary run, trained with --resume under a name of its own
    cell    a number, kept in cells.json the moment it is known
    claim   a function that asks for arms and cells in their order, as if nothing had been
            done before; what is there already is not done again

Arms may be trained side by side by several processes. Networks are compared at equal time.
A clock that runs all the while would measure the machine's other work, too. So
`seconds_per_step` times each network alone, at the start, and from then on a minute is a
number of steps.
"""
import csv
import json
import shutil
import time
from argparse import Namespace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import train
from data import holdout, load_images
from fid import proxy_distances
from plumbing.console import UserError, count_nouns, replacing
from plumbing.images import seeded, to_uint8
from plumbing.machine import amp_type
from plumbing.sheets import draw_sheet, save_picture
from running.cost import training_flop
from running.options import Options, recorded_options
from sample import load, sample

NEVER = 10**9                   # for --sample-every
QUIET = ["--workers", 0, "--sample-every", NEVER]           # flags of every run
SAVED = ["--save-every", 200, "--keep", 1]                  # a kill costs a few minutes
PICTURE_SIDE = 96               # smaller pictures are enlarged to about so many pixels
# Distances this near, as shares, are equal: twice as far as two seeds lie from their mean
# after six minutes of the recipe. After few steps they lie farther apart.
MARGINS = {"pixel": 0.06, "random-conv": 0.13, "swd": 0.05}
PROXY_ORDER = tuple(MARGINS)


class Bench:
    """One claim at work: where its files are, at what scale, and the numbers so far."""

    def __init__(self, claim, args, scale):
        self.folder, self.args, self.scale = Path(args.out) / claim, args, scale
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "cells.json"
        self.cells = self.read_cells()
        self.loaded, self.arms = {}, []
        self.first, self.prefix = self, ""                  # the bench of the first seed

    @cached_property
    def benches(self):
        """A bench for each of --seeds: this one, then one a seed in a folder below it. They
        share what a step costs; their arms are called seed-1/NAME, and so on."""
        benches = [self]
        for seed in range(self.args.seed + 1, self.args.seed + self.args.seeds):
            args = Namespace(**vars(self.args) | dict(seed=seed))
            bench = Bench(f"{self.folder.name}/seed-{seed}", args, self.scale)
            bench.first, bench.prefix = self, f"seed-{seed}/"
            benches.append(bench)
        return benches

    # --- arms

    def train_arm(self, name, command, *flags, before=()):
        """Train an arm, unless that was done; one that was interrupted goes on.

        command: train.main or finetune.main.
        flags: one that is a function is called only now. They win over QUIET and SAVED.
        before: the arms that cannot do without this one.
        -> its folder"""
        self.first.arms.append(self.prefix + name)
        if self.args.arm in (None, *(self.prefix + wanted for wanted in (name, *before))):
            flags = call_flags(flags)
            title = f"{self.folder / name}: {command.__module__}.py {' '.join(flags)}"
            print(f"\n=== {title}", flush=True)
            common = call_flags(["--seed", self.args.seed, *self.machine_flags(),
                                 "--out", self.folder / name, "--resume"])
            command([*call_flags([*QUIET, *SAVED]), *flags, *common])
        return self.folder / name

    def all_trained(self):
        """Whether to go on and measure: False after --arm. UserError for an unknown arm."""
        if self.args.arm not in (None, *self.arms):
            raise UserError(f"--arm {self.args.arm}: the arms of {self.args.claim} are "
                            f"{', '.join(self.arms)}")
        return self.args.arm is None

    def on_every_seed(self, *names, seeds=None):
        """Arms under their names of every seed, for what serves all of them.

        seeds: so many, the first ones; None means all."""
        return [bench.prefix + name for bench in self.benches[:seeds] for name in names]

    def is_finished(self, name):
        """Whether an arm has made all its steps."""
        config = self.folder / name / "config.json"
        if not (config.exists() and (self.folder / name / "last.pt").exists()):
            return False
        return self.log(name, "step") >= json.loads(config.read_text())["steps"]

    def checkpoint_after(self, name, count):
        """The checkpoint of an arm after count() steps."""
        return self.folder / name / f"{count():06d}.pt"

    def choose_by_loss(self, runs):
        """The choice whose short run, of the first seed, has the smallest held-out loss.

        runs: {choice: arm}; a single one need not have run. UserError for an unfinished
        one."""
        if len(runs) == 1:
            return next(iter(runs))
        for name in runs.values():
            if not self.first.is_finished(name):
                raise UserError(f"{self.first.folder / name}: this run is not finished, and what "
                                f"follows depends on it; --arm {name} continues it")
        return min(runs, key=lambda choice: self.first.log(runs[choice], "val_loss"))

    def rate_runs(self, name, end=""):
        """{learning rate: the short run that tries it for an arm}. end: added to the names,
        for the last stages of such runs."""
        return {rate: f"{name}-rate-{rate:g}{end}" for rate in self.scale["rates"]}

    def image_flags(self, data=None):
        """What every command is told about the images. data: None means --data."""
        gray = ["--gray"] if self.args.gray else []
        return ["--data", data or self.args.data, "--size", self.args.size, *gray]

    def machine_flags(self):
        """What every command is told about the machine."""
        compiled = ["--compile"] if self.args.compile else []
        return ["--threads", self.args.threads, "--device", self.args.device, *compiled]

    def seconds_per_step(self, networks, visits=1):
        """How long a step of training takes. Run nothing beside it.

        networks: {name: flags of train.py}. visits: how often each is timed, in turn.
        -> {name: seconds}; the fastest of all visits counts, since all else that a machine
        does can only slow it down. The smoke scale knows no clock."""
        if self.first is not self:
            return self.first.seconds_per_step(networks, visits)
        if "steps" in self.scale:
            return dict.fromkeys(networks, 60 / self.scale["steps"])
        times = {name: [] for name in networks}
        for visit in range(1, visits + 1):
            for name, flags in networks.items():
                key = f"{name}: seconds a step, visit {visit}, {' '.join(call_flags(flags))}"
                times[name].append(self.measure_once(key, self.time_network, name, flags))
        return {name: min(seconds) for name, seconds in times.items()}

    def time_network(self, name, flags):
        """Train a network for forty steps -> seconds a step, of its fastest ten steps."""
        folder = self.folder / "timing" / name
        shutil.rmtree(folder, ignore_errors=True)
        short = [*QUIET, "--steps", 40]
        train.main(call_flags([*flags, *short, *self.machine_flags(), "--out", folder]))
        with open(folder / "log.csv", newline="") as log:
            rate = max(float(row["images_per_second"]) for row in csv.DictReader(log))
        config = json.loads((folder / "config.json").read_text())
        return round(config["batch"] / rate, 5)

    def log(self, name, column):
        """The last value of a column of an arm's log."""
        with open(self.folder / name / "log.csv", newline="") as log:
            return [float(row[column]) for row in csv.DictReader(log) if row[column]][-1]

    def count_petaflop(self, *names):
        """10^15 floating-point operations of training, of some arms together."""
        total = 0
        for name in names:
            config = json.loads((self.folder / name / "config.json").read_text())
            total += training_flop(Options(**recorded_options(Options, config)))
        return total / 1e15

    # --- numbers

    def read_cells(self):
        """All numbers that are known by now. Another process may have measured some."""
        try:
            cells = json.loads(self.file.read_bytes()) if self.file.exists() else {}
        except ValueError:
            cells = None
        if not isinstance(cells, dict):
            raise UserError(f"{self.file} is damaged: delete it, its numbers are measured anew")
        return cells

    def measure_once(self, key, measure, *arguments):
        """The number (or numbers) called `key`: remembered, or measure(*arguments) now."""
        if key not in self.cells:
            self.cells = self.read_cells()                  # another process may have it by now
        if key not in self.cells:
            begun = time.monotonic()
            value = measure(*arguments)
            self.cells = self.read_cells() | {key: value}
            with replacing(self.file) as file:
                file.write(json.dumps(self.cells, indent=1).encode())
            print(f"{key}: {value}  ({time.monotonic() - begun:.0f} s)", flush=True)
        return self.cells[key]

    def split_images(self, data=None, size=None, gray=False, labels=False, targets=None,
                     val="auto"):
        """The images as an arm's own command splits them.

        data, size: None means the command line's. gray, labels, targets: as in load_images.
        val: the arm's --val.
        -> training Images, held-out Images"""
        images = load_images(data or self.args.data, size or self.args.size, gray, labels,
                             seed=self.args.seed, targets=targets)
        return holdout(images, val, seed=self.args.seed, targets=targets)

    def model(self, path):
        """The averaged model of a run or checkpoint. The last one is kept in memory."""
        if path not in self.loaded:
            self.loaded = {path: load(self.folder / path, device=self.args.device)}
        return self.loaded[path]

    def draw(self, path, n, **how):
        """n images of a model, always of the same noise. how: arguments of `sample`.
        -> uint8 (n, C, H, W)"""
        loaded = self.model(path)
        common = dict(seed=self.args.seed, batch=self.scale["batch"])
        amp = amp_type("auto", loaded.device)
        return to_uint8(sample(loaded, n, amp=amp, **common, **how))

    def distances(self, images, path, n, labels=None, **how):
        """Distances of n samples of a model to 2 n of some images, always the same ones.

        images: data.Images. path: a run or a checkpoint of the claim.
        labels: (n,) class numbers. how: further arguments of `sample`; they name the cell.
        -> {proxy: [value, floor]}"""
        words = [f"{name}={value}" for name, value in sorted(how.items())]
        key = " ".join([self.name_model(path), f"n={n}", *words])
        how = how | dict(labels=labels)
        return self.measure_once(key, self.measure_distances, images, path, n, how)

    def compare_seeds(self, paths, data=None, seeds=None, **how):
        """Distances of some runs of every seed to their training images.

        data: of the images; None means the command line's. seeds: so many, the first ones;
        None means all. how: arguments of `sample`.
        -> {path: [cell, one a seed]}"""
        cells = {path: [] for path in paths}
        for bench in self.benches[:seeds]:
            images, _ = bench.split_images(data, gray=self.args.gray)
            for path in paths:
                cells[path].append(bench.distances(images, path, self.scale["n"], **how))
        return cells

    def name_model(self, path):
        """A run or checkpoint with its step: a run that has gone on is another model."""
        return path if path.endswith(".pt") else f"{path} at {self.log(path, 'step'):.0f}"

    def measure_distances(self, images, path, n, how):
        """What `distances` remembers."""
        return self.compare(self.draw(path, n, **how), images)

    def compare(self, pictures, images):
        """Distances of pictures, uint8 (n, C, H, W), to 2 n of some images, always the same
        ones. -> {proxy: [value, floor]}"""
        order = torch.randperm(len(images), generator=seeded(self.args.seed, 100))
        reference, _ = images.take(order[:2 * len(pictures)])
        result = proxy_distances(pictures, reference)
        return {name: [round(float(v), 5) for v in pair] for name, pair in result.items()}

    # --- files

    def write(self, name, text):
        """A file of the claim's folder, also printed."""
        if self.args.scale == "smoke":
            text = f"Smoke scale: this shows that the claim runs, and nothing else.\n\n{text}"
        with replacing(self.folder / name) as file:
            file.write(text.encode())
        print(f"\n{text}\nwrote {self.folder / name}")

    def save_sheet(self, name, rows, columns):
        """A table of pictures, small ones enlarged, as a file of the claim's folder.

        rows: [(title, uint8 (k, C, H, W) or a list of pictures), ...]. columns: titles."""
        zoom = -(-PICTURE_SIDE // rows[0][1][0].shape[-1])
        save_picture(draw_sheet(rows, columns, zoom), self.folder / name)
        print(f"wrote {self.folder / name}")


def time_to_reach(lengths, distances, goal):
    """After how many minutes a curve is at `goal`, interpolated in the logarithm of time.

    lengths: minutes, rising. distances: at the end of each; the best so far counts.
    -> minutes; the first length if the goal is reached there, inf if it is never reached"""
    best = np.minimum.accumulate(distances)
    if goal < best[-1]:
        return np.inf
    i = int(np.argmax(best <= goal))                        # the first length that is enough
    if i == 0:
        return float(lengths[0])
    share = (best[i - 1] - goal) / (best[i - 1] - best[i])
    return float(lengths[i - 1] * (lengths[i] / lengths[i - 1]) ** share)


def measure_speed_up(baseline, method, margin=0.0):
    """How many times as fast the method is as good as the baseline's best: the baseline's
    time to that distance over the method's.

    Both: (lengths in minutes, distances). margin: a distance larger than the best by such a
    share is as good, for both.
    -> the factor, a lower bound if the method's first length is enough; 0 if it never gets
    there; nan if the baseline's own first length is enough: nobody knows its time then"""
    goal = (1 + margin) * min(baseline[1])
    ours, theirs = time_to_reach(*method, goal), time_to_reach(*baseline, goal)
    if theirs == baseline[0][0] and ours < np.inf:
        return np.nan
    return theirs / ours


def list_seeds(cells):
    """Cells as a list, one a seed; a single one becomes a list."""
    return cells if isinstance(cells, list) else [cells]


def count_better(ours, theirs):
    """In how many comparisons the first is clearly smaller, and clearly larger.

    ours, theirs: cells of `Bench.distances`, one each or a list with one a seed; a distance
    and a seed are one comparison. A distance below its floor counts as the floor: no sample
    can be closer than real images are, but by chance."""
    better = worse = 0
    for a, b in zip(list_seeds(ours), list_seeds(theirs)):
        for proxy, margin in MARGINS.items():
            mine, other = max(a[proxy]), max(b[proxy])      # a cell has [value, floor]
            better += mine < (1 - margin) * other
            worse += other < (1 - margin) * mine
    return better, worse


def tenth_of(count):
    """A tenth of a number that is known when it is asked for."""
    return count() // 10


def call_flags(flags):
    """Flags as text; those that are functions are called for theirs."""
    return [str(flag() if callable(flag) else flag) for flag in flags]


def refuse_gray(args):
    """UserError for --gray, in a claim that is measured in colour."""
    if args.gray:
        raise UserError(f"--gray: the claim {args.claim} is measured in colour; leave it out")


def count_calls(count):
    """A number of network calls in words."""
    return count_nouns(count, "call")


def format_spread(values, digits=3):
    """One number a seed as text: their mean, and half of their range if it has one. nan:
    not known; ? if all are."""
    values = [value for value in values if not np.isnan(value)]
    if not values:
        return "?"
    mean = f"{sum(values) / len(values):.{digits}g}"
    spread = (max(values) - min(values)) / 2
    return mean if len(values) == 1 else f"{mean} ± {spread:.2g}"


def format_distances(cells, which=0):
    """Cells of `Bench.distances` as text.

    cells: one, or a list of them, one a seed. which: 0 the values, 1 their floors."""
    return " / ".join(format_spread([cell[name][which] for cell in list_seeds(cells)])
                      for name in PROXY_ORDER)


def describe_rates(bench, runs, when):
    """How the rates were chosen, as parts of a text; nothing if there was no choice.

    runs: {arm: {learning rate: its short run}}. when: what the short run had, in words."""
    rates = bench.scale["rates"]
    if len(rates) == 1:
        return []
    rows = [[arm, *(f"{bench.log(run, 'val_loss'):.4f}" for run in short.values())]
            for arm, short in runs.items()]
    return [f"Each arm's learning rate was chosen by its val_loss after {when}:",
            format_table(["arm", *(f"{rate:g}" for rate in rates)], rows)]


def format_table(head, rows):
    """A table of strings in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
