"""Sampling: from noise to images in as many network calls as you like, ten by default.

The idea (DDM, arXiv 2306.13720). The network looks at x_t and guesses the image x0. The
step of schedules.py then goes from t to any earlier s exactly as it would for that image:

    x   = b(t_0) N(0, I)                            t_0: the first time of the grid, near 1
    for t, s in zip(grid, grid[1:]):                the grid falls from t_0 to 0: GRIDS
        x0  = split(model(x_t, t))                  one network call
        x_s = step(x_t, x0, t, s, churn)            churn 0: deterministic, 1: the posterior

One step gives the mean of all images, and more steps give detail. `--steps` counts network
calls. A second-order solver is a better x0 for the same step (SOLVERS). All tokens are
visible here, also to a model that was trained on a tenth of them.

Guidance (2207.12598) moves from the guess u without a label to the guess c with it, and on:

    out = u + cfg (c - u)                           one doubled batch; cfg 0 or 1: one pass

Every image has a seed of its own, so it does not depend on the batch that it was made in.

    python sample.py --steps 10                     newest run -> samples.png
    python sample.py --n 5000 --out samples.zip     for fid.py; also a folder or .npz
    python sample.py --trace trace.png              x_t and the guess of x0 at every call
    from sample import load, sample
    images = sample(load("runs/NAME"), n=16, steps=10)        # (16, C, H, W) in [-1, 1]

Shapes: B batch, C channels; x_t (B, C, H, W), zt in the code; t in [0, 1].
"""
import math
import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import plumbing  # before torch: how its threads wait

import torch
from tqdm import tqdm

from losses import OBJECTIVES, RECON_TARGETS
from plumbing.checkpoint import find_checkpoint, newest_checkpoint, read_checkpoint
from plumbing.console import (
    UserError, build_parser, count_nouns, describe_error, parse_path, run_command)
from plumbing.downloads import is_published
from plumbing.images import seeded, to_uint8
from plumbing.layout import is_share
from plumbing.machine import amp_type, pick_device, require_one_process, set_threads
from plumbing.names import normal_name
from plumbing.released import FACTOR
from plumbing.trace import Trace
from plumbing.writer import ImageWriter, is_inside, refuse_overwriting
from schedules import PREDICTIONS, SCHEDULES, T_MIN, to_float64
from spaces import SPACES
from tasks import TASKS
from vit import BLOCKS, CLOCKS, ECONOMIES, ViT


# --- time grids: (schedule, start, steps) -> steps + 1 times, falling from start to 0 -----
# The network was trained at times from t_min on. So no grid has a time between 0 and t_min.

def fall_evenly(start, steps, low):
    """Equal steps from start to 0: steps + 1 numbers. The last but one is at least low."""
    even = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    if even[-2] >= low:
        return even
    even = torch.linspace(start, low, steps, dtype=torch.float64)
    return torch.cat([even, torch.zeros(1, dtype=torch.float64)])


def uniform_grid(schedule, start, steps):
    """Equal steps of t."""
    return fall_evenly(start, steps, schedule.t_min)


def quadratic_grid(schedule, start, steps):
    """t = (i / steps)^2: small steps near the image, where b = sqrt t changes fastest."""
    return start * fall_evenly(1, steps, math.sqrt(schedule.t_min / start)) ** 2


def angle_grid(schedule, start, steps):
    """Equal steps of theta = arctan(b / (a data_std)): smooth in every schedule."""
    top = schedule.angle(start)
    shares = fall_evenly(1, steps, schedule.angle(schedule.t_min) / top)[:-1]
    return torch.cat([schedule.time_at(shares * top), torch.zeros(1, dtype=torch.float64)])


def split_grid(schedule, start, steps):
    """[DDM, released code] Uniform, with one more cut, 1e-4 before the end."""
    if steps == 1:
        return uniform_grid(schedule, start, 1)
    grid = fall_evenly(start, steps - 1, 2 * schedule.t_min)
    return torch.cat([grid[:-1], torch.tensor([schedule.t_min, 0.0], dtype=torch.float64)])


def edm_grid(
    schedule,
    start,          # the latest time
    steps,          # how many steps
    low=0.002,      # the lowest noise level b / a before 0, if training went so low
    high=80.0,      # the highest
    rho=7,          # of equal steps in its rho-th root
):
    """[EDM] b / a from high to low, equally spaced in its rho-th root, then 0."""
    first, last = noise_level(schedule, start), noise_level(schedule, schedule.t_min)
    roots = torch.linspace(min(high, first) ** (1 / rho), max(low, last) ** (1 / rho), steps,
                           dtype=torch.float64)
    times = schedule.time_at(torch.atan(roots ** rho / schedule.data_std))
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def noise_level(schedule, t):
    """sigma = b / a, a number; infinite where the image is gone."""
    t = to_float64(t)
    return float(schedule.b(t) / schedule.a(t))


GRIDS = {"uniform": uniform_grid, "quadratic": quadratic_grid, "angle": angle_grid,
         "split": split_grid, "edm": edm_grid}


# --- solvers: a better x0 for the same step -----------------------------------------------
# In y = x / a and sigma = b / a the deterministic step is a straight line, dy = eps dsigma,
# exact for the x0 that it is given. So a second-order method is the same step, another x0.

HISTORY = 4         # guesses that are kept for solvers: DPM-Solver++ reads two, yours may read more


@dataclass(frozen=True)
class Solver:
    """refine(predict_x0, schedule, zt, slopes, s, history) -> a better x0 for a step to s.

    predict_x0(zt, t) -> (x0, slopes): another call of the network.
    zt, slopes: where the step begins, and DDM's random slopes as the network guesses them.
    history: the last HISTORY guesses [(t, x0), ...], old to new; the last one is of zt.
    calls: of the network per step. order: the error falls as steps^-order on a grid that
    is smooth in the angle. With b = sqrt t the uniform one is not: all have order 1."""
    refine: Callable
    calls: int = 1
    order: int = 1


def refine_analytic(
    predict_x0,     # (zt, t) -> (x0, slopes): one network call
    schedule,
    zt,             # where the step begins
    slopes,         # the random slopes there
    s,              # the time at which it ends
    history,        # [(t, x0), ...]: the guesses so far, the last one is at zt
):
    """[DDM] The network's guess as it is: first order."""
    return history[-1][1]


def refine_heun(
    predict_x0,
    schedule,
    zt,
    slopes,
    s,
    history,
):
    """[EDM] The mean of the directions where a step begins and would end: second order."""
    t, x0 = history[-1]
    there = schedule.step(zt, x0, t, s, slopes=slopes)
    x0_there, slopes_there = predict_x0(there, s)
    change = schedule.eps(there, x0_there, s, slopes_there) - schedule.eps(zt, x0, t, slopes)
    a, b, *_ = schedule.coefficients(t, zt)
    return x0 - b / a * change / 2                                      # y - sigma (eps + eps') / 2


def refine_dpm(
    predict_x0,
    schedule,
    zt,
    slopes,
    s,
    history,
):
    """DPM-Solver++(2M) [2211.01095], a line through the last two guesses: second order."""
    t, x0 = history[-1]
    if len(history) == 1:
        return x0
    before, x0_before = history[-2]
    there, now, back = (half_log_snr(schedule, time) for time in (s, t, before))
    return x0 + (x0 - x0_before) * (there - now) / (now - back) / 2             # half a step ahead


def half_log_snr(schedule, t):
    """lambda = ln(a / b), half of the logarithm of the signal-to-noise ratio; a number."""
    return float((schedule.a(t) / schedule.b(t)).log())


SOLVERS = {
    "analytic": Solver(refine_analytic),
    "heun": Solver(refine_heun, calls=2, order=2),
    "dpm++": Solver(refine_dpm, order=2),
}


def resolve_auto(solver, time_grid, churn, steps):
    """What "auto" stands for -> (solver, time_grid).

    The best of twenty at ten calls, on a model of CIFAR-10. Fresh noise wants the analytic
    step. Few calls want the uniform grid: of two on EDM's, the second is at its lowest
    noise, where nothing is left to do."""
    if solver == "auto":
        solver = "analytic" if churn else "dpm++"
    if time_grid == "auto":
        time_grid = "uniform" if churn or steps < 5 else "edm"
    return solver, time_grid


def count_steps(solver, schedule, first, calls):
    """How many steps of a grid `calls` network calls are good for. first: its first time.

    A two-call solver takes single calls where it is not defined, see `choose_refined`, and
    one more where the number is not even: ten calls from a = 0 are 2 single steps and 4
    double ones."""
    if SOLVERS[solver].calls == 1:
        return calls
    single = 1 + bool(schedule.a(to_float64(first)) < 1e-9)
    return min(calls, single + (calls - single + 1) // 2)


def choose_refined(solver, schedule, ts, calls):
    """Which steps of the grid `ts` a solver refines, so that just `calls` calls are made.

    Where sigma is infinite (a = 0), and in the last step, to 0, only the analytic step is
    defined. -> a bool for each step"""
    extra, refined = SOLVERS[solver].calls - 1, []
    spare = calls - (len(ts) - 1)                                           # beyond one call a step
    for t, s in zip(ts[:-1], ts[1:]):
        defined = s > 0 and schedule.a(t) > 1e-9                         # sigma is finite and not 0
        refined.append(bool(defined and spare >= extra))
        spare -= extra * refined[-1]
    return refined


# --- the loop -----------------------------------------------------------------------------

@torch.no_grad()
def denoise(
    predict_x0,             # (zt, t) -> (x0, slopes): one network call
    zt,                     # (B, C, H, W), noise at the time ts[0]
    ts,                     # falling times, the last is 0
    schedule,
    solver="analytic",      # a name in SOLVERS
    calls=None,             # exactly so many network calls; len(ts) - 1 when left out
    churn=0.0,              # share of fresh noise per step; above 0 it needs `noise`
    noise=None,             # () -> N(0, I) like zt
):
    """Follow the times `ts` from zt to images. -> (B, C, H, W)"""
    refined = choose_refined(solver, schedule, ts, calls or len(ts) - 1)
    refine, history = SOLVERS[solver].refine, []
    for t, s, is_refined in zip(ts[:-1], ts[1:], refined):
        x0, slopes = predict_x0(zt, t)                             # [DDM] x0 = split(model(x_t, t))
        history = [*history, (t, x0)][-HISTORY:]
        if is_refined:
            x0 = refine(predict_x0, schedule, zt, slopes, s, history)
        fresh = noise() if churn > 0 else None
        zt = schedule.step(zt, x0, t, s, churn, fresh, slopes)       # [DDM] reverse step x_t -> x_s
    return zt


@dataclass
class DiffusionModel:
    """A network and all that is needed to sample from it: what `load` gives."""
    net: torch.nn.Module
    schedule: object                    # of schedules.py
    space: object                       # of spaces.py
    predict: str                        # a name in PREDICTIONS
    meta: dict                          # the checkpoint's: class names, size, task, ...
    device: torch.device


@dataclass
class GuidedPredictor:
    """One network call as `denoise` wants it: (zt, t) -> (x0, slopes), guided by labels."""
    model: DiffusionModel
    labels: torch.Tensor = None         # (B,) class numbers, -1 for none
    cond: torch.Tensor = None           # (B, C', h, w), a task's condition
    cfg: float = 1.0                    # guidance scale
    cfg_interval: tuple = (0.0, math.inf)
    amp: torch.dtype = None             # type for autocast of the network
    watch: Callable = None              # is told (t, zt, x0)

    def __call__(self, zt, t):
        out = self.run_network(zt, t)
        x0, n = self.model.schedule.split(out, zt, t, self.model.predict)
        if self.model.space.name == "pixel":
            x0 = x0.clamp(-1, 1)
        if self.watch:
            self.watch(t, zt, x0)
        return x0, n.split(zt.shape[1], 1)[1:]

    def run_network(self, zt, t):
        """The network's output (B, C_out, H, W), guided or not, at one time for all."""
        net, y, cond = self.model.net, self.labels, self.cond
        level = noise_level(self.model.schedule, t)
        low, high = self.cfg_interval
        t = t.expand(len(zt))
        with torch.autocast(zt.device.type, self.amp, enabled=self.amp is not None):
            if y is None or self.cfg == 1 or not low < level <= high:
                return net(zt, t, y, None, cond)
            nobody = torch.full_like(y, -1)
            if self.cfg == 0:
                return net(zt, t, nobody, None, cond)
            both = None if cond is None else torch.cat([cond, cond])
            out = net(torch.cat([zt, zt]), torch.cat([t, t]), torch.cat([y, nobody]), None, both)
        c, u = out.chunk(2)
        return u + self.cfg * (c - u)                               # [CFG] classifier-free guidance


@torch.no_grad()
def sample(
    model,                  # a DiffusionModel, what `load` gives
    n=16,                   # how many images
    steps=10,               # network calls for each
    seed=0,                 # the noise of an image is a function of (seed, its number)
    churn=0.0,              # share of fresh noise per step, in [0, 1]
    time_grid="auto",       # a name in GRIDS
    solver="auto",          # a name in SOLVERS
    labels=None,            # class names or numbers, -1 for none: n of them, or one for all
    cfg=1.0,                # guidance scale: 1 plain conditional, 0 unconditional
    batch=64,               # images at once
    first=0,                # number of the first image
    cond=None,              # (n, C', h, w), a task's condition at the size of z or larger
    watch=None,             # is told (t, zt, x0) at every network call
    amp=None,               # type for autocast of the network; None: float32
    cfg_interval=(0.0, math.inf),       # guide at noise levels low < b / a <= high [2404.07724]
):
    """Make images from noise. -> (n, C, H, W) in [-1, 1], float32 on the CPU

    The steps between network calls are in float32 in any case. UserError when a name is
    unknown, a number out of range, the model of another kind, or something missing."""
    check_counts(n=n, steps=steps, batch=batch)
    check_path(churn, time_grid, solver)
    check_guidance(cfg, cfg_interval)
    check_model(model, n, cond)
    classes = model.meta.get("classes", ())
    labels = resolve_labels(labels, n, classes)
    check_guided_labels(cfg, labels, model.meta)
    model.net.eval()
    schedule, space = model.schedule, model.space
    start = schedule.start_time(model.predict)
    solver, time_grid = resolve_auto(solver, time_grid, churn, steps)
    first_time, _ = GRIDS[time_grid](schedule, start, 1)         # the same for any number of steps
    ts = GRIDS[time_grid](schedule, start, count_steps(solver, schedule, first_time, steps))
    side = model.meta["size"] // space.factor
    shape = (space.channels, *((side, side) if cond is None else cond.shape[2:]))
    done = []
    for lo in range(0, n, batch):
        hi = min(lo + batch, n)
        draw_noise = NoisePerImage(seed, range(first + lo, first + hi), shape, model.device)
        y, shown = (v if v is None else v[lo:hi].to(model.device) for v in (labels, cond))
        predict_x0 = GuidedPredictor(model, y, shown, cfg, cfg_interval, amp, watch)
        zt = draw_noise() * float(schedule.b(ts[0]))                            # x = b(t_0) N(0, I)
        z = denoise(predict_x0, zt, ts, schedule, solver, steps, churn, draw_noise)
        done.append(space.decode(z).clamp(-1, 1).float().cpu())
    return torch.cat(done)


class NoisePerImage:
    """() -> N(0, I) of shape (B, *shape): image i has a generator of its own, (seed, i)."""

    def __init__(self, seed, numbers, shape, device):
        self.generators = [seeded(seed, i) for i in numbers]
        self.shape, self.device = shape, device

    def __call__(self):
        drawn = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(drawn).to(self.device)


# --- what is refused, by the function and by the commands ---------------------------------

def check_counts(**counts):
    """UserError for a number of images, calls, ... below 1. None: not given."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")


def check_path(churn, time_grid, solver):
    """UserError for a way from noise to image that does not exist."""
    if not 0 <= churn <= 1:
        raise UserError(f"--churn {churn}: must be between 0 and 1")
    for flag, name, registry in (("time-grid", time_grid, GRIDS), ("solver", solver, SOLVERS)):
        if name not in ("auto", *registry):
            raise UserError(f"--{flag} {name}: choose from auto, {', '.join(registry)}")
    if churn and solver not in ("auto", "analytic"):
        raise UserError(f"--solver {solver} follows the deterministic path: use it with --churn 0, "
                        "or --solver analytic")


def check_guidance(cfg, cfg_interval):
    """UserError for a guidance scale or interval that means nothing."""
    low, high = cfg_interval
    if not math.isfinite(cfg):
        raise UserError(f"--cfg {cfg}: must be finite")
    if not 0 <= low < high:
        raise UserError(f"--cfg-interval {low} {high}: give two noise levels, 0 <= LOW < HIGH; "
                        "inf is one")
    if cfg == 1 and (low, high) != (0, math.inf):
        raise UserError("--cfg-interval says where to guide: give the scale too, --cfg 2")


def check_model(model, n, cond=None):
    """UserError for a model that cannot make n images from this condition, or from none."""
    task = model.meta.get("task", "generate")
    if model.meta.get("objective") == "reconstruct":
        raise UserError("this model was trained to reconstruct hidden patches and makes nothing of "
                        "noise: give it pictures, python restore.py --task reconstruct --input "
                        "FOLDER, or train one without --objective reconstruct")
    if task != "generate" and cond is None:
        raise UserError(f"this model was trained for {task}: give the pictures to work on, "
                        "python restore.py --input FOLDER (in Python: restore_pictures)")
    if task == "generate" and cond is not None:
        raise UserError("this model was trained to generate, from nothing: it has no use for a "
                        "condition; train one for it (train.py --task superres, inpaint, ...)")
    if cond is not None and len(cond) != n:
        raise UserError(f"{len(cond)} conditions for {n} images: give one for each")


def check_guided_labels(cfg, labels, meta):
    """UserError for guidance without anything to guide towards, or away from."""
    classes = meta.get("classes", ())
    if cfg != 1 and not classes:
        raise UserError(f"--cfg {cfg}: this model was trained without labels, there is nothing to "
                        "guide")
    if cfg != 1 and labels is None:
        raise UserError(f"--cfg {cfg} guides towards a class: give --label, one of "
                        f"{', '.join(classes[:10])}")
    if cfg != 1 and meta.get("label_dropout") == 0:
        raise UserError(f"--cfg {cfg}: this model was trained with --label-dropout 0 and never saw "
                        "an image without its label, so guidance has nothing to start from")


def find_named_class(label, classes):
    """The number of the class that a text means, or None.

    It is a name, however its accents are encoded. Where names are whole numbers, a whole
    number is a name, too: 1 means 001. Elsewhere it is the class's own number."""
    names, label = [normal_name(name) for name in classes], normal_name(label)
    if label in names:
        return names.index(label)
    if not is_whole(label):
        return None
    if not any(map(is_whole, names)):
        return int(label)
    same = [i for i, name in enumerate(names) if is_whole(name) and int(name) == int(label)]
    return same[0] if len(same) == 1 else None


def is_whole(text):
    """Whether a text is a whole number in common digits."""
    return text.isascii() and text.isdecimal()


def find_class(label, classes):
    """A label as a number. label: text as in `find_named_class`, a number, -1 for none.

    UserError when there is no such class."""
    is_text = isinstance(label, str)
    number = find_named_class(label, classes) if is_text else label
    if number in range(0 if is_text else -1, len(classes)):
        return int(number)
    names = [*classes[:10], *["..."] * (len(classes) > 10)]
    known = f"the classes are {', '.join(names)}"
    if not names:
        known = "this model was trained without labels"
    raise UserError(f"--label {label}: {known}")


def resolve_labels(labels, n, classes):
    """Class names or numbers, n of them or one for all -> numbers (n,). None stays None."""
    if labels is None:
        return None
    if hasattr(labels, "tolist"):                                             # a tensor or an array
        labels = labels.tolist()
    if not isinstance(labels, (list, tuple)):
        labels = [labels] * n
    if len(labels) != n:
        raise UserError(f"--label: {len(labels)} labels for {n} images; give one for each, or one "
                        "for all")
    return torch.tensor([find_class(label, classes) for label in labels])


# --- from a checkpoint to a model ---------------------------------------------------------

def build_model(meta, weights=None):
    """(net, schedule, space) from a checkpoint's meta: here its names become objects.

    weights: the state dict that the network will get, to be compared before memory is taken
    for it. UserError for an unknown name, when the network is not that of the weights, or
    when the autoencoder is missing or another one."""
    space, schedule = build_space(meta), build_schedule(meta)       # the first checks all names
    if weights is not None:
        check_sizes(schedule, meta["model"], weights)
    return ViT(schedule, **meta["model"]), schedule, space


def build_space(meta):
    """The space of a checkpoint's meta. UserError as `build_model`."""
    check_names(meta)
    vae = meta["vae"]
    if meta["space"] != "pixel" and not vae:
        raise UserError("this model works on latents, and its checkpoint names no autoencoder: "
                        "give Stable Diffusion's, --vae sd or a file")
    if vae and not (is_published(vae, "vae") or os.path.exists(os.path.expanduser(vae))):
        raise UserError(f"the autoencoder of this model is not at {vae} any more: "
                        "say with --vae where it is")
    space = SPACES[meta["space"]](meta["channels"], vae)
    check_autoencoder(space, meta)
    if space.channels != meta["model"]["channels"]:
        raise UserError(f"the checkpoint's network takes {meta['model']['channels']} channel(s), "
                        f"its images have {space.channels}")
    square = space.factor * meta["model"]["patch"]
    if meta["size"] % square:
        raise UserError(f"the checkpoint's size {meta['size']} is no multiple of {square}, the "
                        "pixels along the side of a token")
    return space


def build_schedule(meta):
    """The schedule of a checkpoint's meta, in its data's unit. Samplers' grids end at the
    lowest noise level that the network's clock was trained on."""
    schedule = replace(SCHEDULES[meta["schedule"]], data_std=meta["data_std"])
    low = CLOCKS[meta["model"].get("clock", "angle")].low
    earliest = float(schedule.time_at(math.atan(low / schedule.data_std))) if low else 0.0
    return replace(schedule, t_min=max(T_MIN, earliest))


def check_autoencoder(space, meta):
    """UserError unless a space has the autoencoder of a checkpoint's meta. A released file
    does not name its own: there the shape must do."""
    vae, channels = meta["vae"], meta["model"]["channels"]
    is_unnamed = space.name == "latent" and not meta["vae_sha"]
    if is_unnamed and (space.factor, space.channels) != (FACTOR, channels):
        raise UserError(f"--vae {vae}: this model wants an autoencoder of {channels} channels with "
                        f"{FACTOR} pixels a place, this one has {space.channels} and "
                        f"{space.factor}")
    if not is_unnamed and space.sha != meta["vae_sha"]:
        raise UserError(f"{vae} is not the autoencoder that this model was trained with: "
                        f"its SHA-256 begins with {space.sha}, not {meta['vae_sha']}")


def check_weights(ckpt, kind):
    """UserError unless a checkpoint's weights (kind: "model" or "ema") are those of the
    network that it describes."""
    check_names(ckpt["meta"])
    check_sizes(SCHEDULES[ckpt["meta"]["schedule"]], ckpt["meta"]["model"], ckpt[kind])


def check_names(meta):
    """UserError for a name in a checkpoint's meta that is in no registry of this
    program."""
    # before there was a choice
    before = dict(task="generate", economy="drop", block="dit", clock="angle",
                  objective="denoise", recon_target="clean")
    names = before | meta | meta["model"]
    registries = dict(schedule=SCHEDULES, predict=PREDICTIONS, space=SPACES, task=TASKS,
                      economy=ECONOMIES, block=BLOCKS, clock=CLOCKS, objective=OBJECTIVES,
                      recon_target=RECON_TARGETS)
    for field, registry in registries.items():
        if names[field] not in registry:
            raise UserError(f"the checkpoint's {field} is {names[field]}; this program knows "
                            f"{', '.join(registry)}")
    guess = meta["model"].get("guess")
    if guess not in (None, meta["predict"]):
        raise UserError(f"the checkpoint's guess is one of {guess}, its network predicts "
                        f"{meta['predict']}")


def check_sizes(schedule, sizes, weights):
    """UserError unless the network of these sizes has weights of just these shapes. It is
    built without memory, after a look at what grows with the number of blocks."""
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    light = {name.split(".")[1] for name in weights if name.startswith("decoder.")}
    wrong = (sizes["depth"], sizes["decoder"]) != (len(blocks), len(light))
    wrong |= sizes["width"] % sizes["heads"] != 0 or sizes["decoder_width"] % 32 != 0
    if not wrong:
        with torch.device("meta"):
            wanted = {k: v.shape for k, v in ViT(schedule, **sizes).state_dict().items()}
        wrong = wanted != {name: tensor.shape for name, tensor in weights.items()}
    if wrong:
        raise UserError("the checkpoint's weights are not those of the network that it describes, "
                        "as this version of the program builds it: train again")


def load_weights(net, weights):
    """Load a checkpoint's weights into the network that was built for it.

    UserError when they are of another version of this program."""
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        why = f"{describe_error(error)[:200]} ..."
        raise UserError("the checkpoint's weights do not fit its network as this version of the "
                        f"program builds it ({why}): train again") from None


# Version 2 changed what some checkpoints of version 1 mean. All others are read as before.

def blends_both(meta, config, schedule):
    """--predict both now reads its image head where the image does not fade (b^2 / V)"""
    return meta["predict"] == "both" and not schedule.fades


def turns_v(meta, config, schedule):
    """the target of --predict v is now divided by sqrt(a^2 + b^2)"""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    r = torch.hypot(schedule.a(t), schedule.b(t))
    return meta["predict"] == "v" and bool(((r - 1).abs() > 1e-6).any())


def enlarges(meta, config, schedule):
    """the pictures of --task superres are now enlarged with Pillow's bicubic kernel"""
    return meta.get("task") == "superres"


def reconstructs(meta, config, schedule):
    """hidden patches are now reconstructed in the image's own unit"""
    weight = config.get("recon", 0.0)
    is_asked = isinstance(weight, (int, float)) and weight > 0
    is_asked = is_asked or meta.get("objective") == "reconstruct"
    target = meta.get("recon_target", config.get("recon_target", "clean"))
    return is_asked and target == "clean" and PREDICTIONS[meta["predict"]].has_image


# Which files of version 1 are refused: always, or when they are to be trained on. The
# docstring says why.
REFUSED_ALWAYS = (blends_both, turns_v, enlarges)
REFUSED_IN_TRAINING = (reconstructs,)


def require_same_meaning(ckpt, path, trains=False):
    """UserError for a checkpoint that meant something else in an older version, or that
    holds unknown names.

    path: of the file, for the message. trains: it is to be resumed or tuned."""
    meta, config = ckpt["meta"], ckpt.get("config", {})
    if ckpt["version"] >= 2:
        return
    check_names(meta)
    schedule = replace(SCHEDULES[meta["schedule"]], data_std=meta["data_std"])
    for applies in REFUSED_ALWAYS + (REFUSED_IN_TRAINING if trains else ()):
        if applies(meta, config, schedule):
            raise UserError(f"{path} was made by version {ckpt['version']} of this program, "
                            f"and {applies.__doc__}: train it again")


def load(path=None, weights="ema", device="auto", vae=None):
    """A checkpoint as a DiffusionModel, ready for `sample`.

    path: a .pt file, a run's folder, or None for the newest run. weights: "ema" or "model".
    vae: where the autoencoder of a model of latents is, when it has moved.
    -> DiffusionModel. UserError when there is no such checkpoint, autoencoder or device."""
    path = path or newest_checkpoint()
    ckpt = read_checkpoint(path, weights)
    require_same_meaning(ckpt, path)
    meta = ckpt["meta"]
    if vae and meta["space"] == "pixel":
        raise UserError(f"--vae {vae}: this model works on pixels; leave it out")
    if vae:
        meta = meta | dict(vae=vae)
    net, schedule, space = build_model(meta, ckpt[weights])
    load_weights(net, ckpt[weights])
    device = pick_device(device)
    dropout = ckpt.get("config", {}).get("label_dropout")
    known = dict(step=ckpt["step"], version=ckpt["version"],
                 label_dropout=dropout if is_share(dropout) else None)
    meta = dict(task="generate", objective="denoise", recon_target="clean") | meta | known
    return DiffusionModel(net.to(device).eval(), schedule, space, meta["predict"], meta, device)


# --- the command --------------------------------------------------------------------------

def first_lines(functions):
    """A registry of functions as help: "name: the docstring's first line" for each."""
    return " ".join(f"{name}: {f.__doc__.splitlines()[0]}" for name, f in functions.items())


def add_sampling_arguments(p, n, n_help, out, steps=10):
    """What sample.py and restore.py share. n, n_help: of --n. out, steps: the defaults of
    --out and --steps; None: as many steps as the model's task wants."""
    refine = {name: solver.refine for name, solver in SOLVERS.items()}
    p.add_argument("--ckpt", type=parse_path,
                   help="a checkpoint or a run's folder; the newest run when left out")
    p.add_argument("--weights", choices=["ema", "model"], default="ema",
                   help="averaged weights or the raw ones")
    p.add_argument("--vae", type=parse_path,
                   help="the autoencoder of a model of latents, when it has moved")
    p.add_argument("--n", type=int, default=n, help=n_help)
    own = "; left out: its task's own number" * (steps is None)
    p.add_argument("--steps", type=int, default=steps, help=f"network calls per image{own}")
    p.add_argument("--churn", type=float, default=0.0,
                   help="share of fresh noise per step: 0 deterministic, 1 the posterior")
    p.add_argument("--time-grid", choices=["auto", *GRIDS], default="auto",
                   help="where the steps lie. auto: edm, but uniform with --churn or below five "
                        f"steps. {first_lines(GRIDS)}")
    p.add_argument("--solver", choices=["auto", *SOLVERS], default="auto",
                   help=f"auto: dpm++, with --churn analytic. {first_lines(refine)} On the uniform "
                        "grid all are first order where b = sqrt t (the ddm schedules).")
    p.add_argument("--label", help="class name, or number where no name is one; left out: all "
                                   "classes in turn, with pictures of your own none")
    p.add_argument("--cfg", type=float, default=1.0,
                   help="guidance scale: 1 plain conditional, 0 unconditional")
    p.add_argument("--cfg-interval", type=float, nargs=2, default=(0.0, math.inf),
                   metavar=("LOW", "HIGH"),
                   help="guide at noise levels b / a in (LOW, HIGH] alone, whatever the schedule: "
                        "elsewhere a call is one pass, not two")
    p.add_argument("--trace", type=parse_path,
                   help="a .png of x_t and of the guess of x0 at every call, of the first two "
                        "images, or of the first picture")
    p.add_argument("--seed", type=int, default=0,
                   help="image i is a function of (seed, i); -1 picks a seed and prints it")
    p.add_argument("--batch", type=int, default=64,
                   help="images (or tiles of a large one) made at once; it changes no result "
                        "but for rounding")
    p.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
                   help="mixed precision of the network; auto: bf16 where the hardware has it")
    p.add_argument("--out", type=parse_path, default=out,
                   help="a .png sheet, a .zip of PNGs, or a folder of PNGs (sample.py: also .npz)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")


def parser():
    p = build_parser("Sample images from noise with a trained model.")
    add_sampling_arguments(p, 16, "how many images", "samples.png")
    return p


MOVED = ("--task", "--input", "--holes", "--targets", "--ratio")               # flags of restore.py


def refuse_moved_flags(argv):
    """UserError that names restore.py's command if one of its flags is given."""
    moved = [word for word in argv if word.split("=")[0] in MOVED]
    if moved:
        raise UserError(f"{moved[0].split('=')[0]} is about pictures of your own, and sample.py "
                        f"makes images from noise: python restore.py {shlex.join(argv)}")


def check_arguments(args, inputs=()):
    """UserError for what no model could do. inputs: the arguments that name pictures."""
    check_counts(n=args.n, steps=args.steps, batch=args.batch)
    check_path(args.churn, args.time_grid, args.solver)
    check_guidance(args.cfg, args.cfg_interval)
    if args.label is not None and args.cfg == 0:
        raise UserError(f"--label {args.label}: --cfg 0 knows no class; leave one of them out")
    if abs(args.seed) >= 2 ** 63:
        raise UserError(f"--seed {args.seed}: must have less than 64 bits")
    if args.trace and not args.trace.lower().endswith(".png"):
        raise UserError(f"--trace {args.trace}: give a name that ends with .png")
    read = {f"--{name}": getattr(args, name) for name in ("vae", *inputs)
            if getattr(args, name) != "random"}                                # of --holes
    read["--ckpt"] = args.ckpt and find_checkpoint(args.ckpt)
    refuse_overwriting({"--out": args.out, "--trace": args.trace}, read)
    if args.trace and is_inside(args.trace, args.out):
        raise UserError(f"--trace {args.trace}: lies in --out {args.out}, and would be one of the "
                        "samples; give another place")


class SamplingRun:
    """What sample.py and restore.py share: settings of `sample`, a trace, and counts."""

    def __init__(self, args, model):
        self.args, self.model, self.passes = args, model, 0
        self.seed = choose_seed(args)
        self.how = dict(steps=args.steps, seed=self.seed, churn=args.churn,
                        time_grid=args.time_grid, solver=args.solver, cfg=args.cfg,
                        batch=args.batch, amp=amp_type(args.amp, model.device),
                        cfg_interval=args.cfg_interval)
        self.trace = Trace(args.trace, self.contrast, model.space.decode)
        model.net.register_forward_hook(self.count_passes)

    def contrast(self, t):
        """What to multiply x_t by, so that it has an image's contrast at every t."""
        schedule = self.model.schedule
        return float(schedule.input_scale(t)) * schedule.data_std

    def count_passes(self, module, given, out):
        """A hook of the network: images per pass are counted, not computed."""
        self.passes += len(out)

    def report(self, n, batches):
        """Write the trace, and say what was done: n images in so many batches."""
        args, calls = self.args, self.trace.calls // batches
        if args.trace:
            self.trace.save()
            print(f"wrote {args.trace}: above x_t, scaled to the images' contrast, below the "
                  "network's guess of x0, at every call")
        extra = self.passes > n * calls
        if args.cfg not in (0, 1) and not extra:
            low, high = args.cfg_interval
            print(f"note: no call fell between the noise levels of --cfg-interval {low} {high}: "
                  "nothing was guided")
        path = ", ".join(resolve_auto(args.solver, args.time_grid, args.churn, args.steps))
        passes = (f", {self.passes / n:g} passes (a guided call takes two, each tile of a large "
                  "picture its own)") if extra else ""
        print(f"wrote {n} images to {args.out}: {count_nouns(calls, 'network call')} each "
              f"({path} grid){passes}, seed {self.seed}, {args.weights} weights of step "
              f"{self.model.meta['step']}{self.name_class()}")

    def name_class(self):
        """Which class was drawn, as the end of a line; nothing when none was asked for."""
        if self.args.label is None:
            return ""
        classes = self.model.meta["classes"]
        return f", class {classes[find_class(self.args.label, classes)]}"


def choose_seed(args):
    """--seed, or one of the machine's choice where it is negative."""
    return args.seed if args.seed >= 0 else int(torch.seed() % 2 ** 31)


def write_samples(run, n, labels):
    """Make n images in batches and write them to --out as they come. -> how many batches"""
    args, classes = run.args, run.model.meta["classes"]
    in_turn = args.label is None and 0 < len(classes) <= 16
    begins = range(0, n, args.batch)
    bar = tqdm(begins, desc="sampling", unit="batch", disable=len(begins) == 1 or None)
    with ImageWriter(args.out, columns=len(classes) if in_turn else None) as writer:
        for lo in bar:
            hi = min(lo + args.batch, n)
            y = None if labels is None else labels[lo:hi]
            images = sample(run.model, hi - lo, labels=y, first=lo, watch=run.trace, **run.how)
            run.trace.finish(images)
            writer.add(to_uint8(images))
    return len(begins)


def main(argv=None):
    refuse_moved_flags(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    require_one_process("sample.py")
    check_arguments(args)
    set_threads(args.threads)
    model = load(args.ckpt, args.weights, args.device, args.vae)
    check_model(model, args.n)
    classes, labels = model.meta["classes"], args.label
    if labels is None and classes:
        labels = torch.arange(args.n) % len(classes)                           # all classes in turn
    labels = resolve_labels(labels, args.n, classes)
    check_guided_labels(args.cfg, labels, model.meta)
    run = SamplingRun(args, model)
    run.report(args.n, write_samples(run, args.n, labels))


if __name__ == "__main__":
    run_command(main)
