"""Sampling: from noise to images in as many network calls as you like, ten by default.

The idea (DDM, arXiv 2306.13720). The network looks at x_t and guesses the image x0; the step of schedules.py then goes from t to
any earlier s exactly as it would for that image. Guess, step, guess again:

    x_1 ~ b(1) N(0, I)
    for t, s in zip(grid, grid[1:]):             grid from 1 to 0, GRIDS: uniform, edm, ...
        x0  = split(model(x_t, t))               one network call
        x_s = step(x_t, x0, t, s, churn)         churn 0: deterministic (DDIM), churn 1: the paper's posterior

One step gives the mean of all images, more steps give detail; `--steps` counts network calls. A second-order solver is a better x0 for
the same step (SOLVERS). Sampling runs on all tokens: a model trained on a tenth of them is simply handed the rest. Labels are guided by out = u + scale (c - u) (2207.12598) in one
doubled batch, at all noise levels or in an interval of them. Every image has a seed of its own, so it does not depend on the batch that it was made in. A condition (tasks.py) is shown
at every call; where it is larger than the training's images, the network sees overlapping tiles and its outputs are averaged (2302.08113).

    python sample.py --steps 10                              # newest run -> samples.png
    python sample.py --n 5000 --out samples.zip              # for fid.py; also a folder or .npz
    python sample.py --task inpaint --input photos/          # a model trained with --task restores your own pictures, of any size
    python sample.py --trace trace.png                       # x_t and the guess of x0 at every call
    from sample import load, sample; images = sample(load("runs/NAME/last.pt"), n=16, steps=10)        # (16, C, H, W) in [-1, 1]

Shapes: B batch, C channels; x_t (B, C, H, W); t in [0, 1].
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.checkpoint import newest_checkpoint, read_checkpoint
from plumbing.console import UserError, build_parser, describe_error, run_command
from plumbing.inputs import UserPictures
from plumbing.machine import amp_type, pick_device
from plumbing.writer import ImageWriter
from schedules import SCHEDULES
from tasks import TASKS, place_side_by_side
from vit import ViT
from plumbing.images import seeded, to_uint8
from plumbing.trace import Trace
from spaces import SPACES


# --- time grids: (schedule, start, steps) -> steps + 1 times, falling from start to 0 -------------------------------------------

def uniform_grid(schedule, start, steps):
    """Equal steps of t."""
    return torch.linspace(start, 0, steps + 1, dtype=torch.float64)


def quadratic_grid(schedule, start, steps):
    """t = (i / steps)^2: small steps near the image, where b = sqrt t changes fastest."""
    return start * torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 2


def angle_grid(schedule, start, steps):
    """Equal steps of theta = arctan(b / (a s)): smooth in every schedule, so first order with the right constant."""
    top = schedule.angle(start)
    return torch.cat([schedule.time_at(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1] * top), torch.zeros(1, dtype=torch.float64)])


def split_grid(schedule, start, steps):
    """[DDM, released code] uniform, but with the last interval cut once more, 1e-4 before the end."""
    grid = uniform_grid(schedule, start, max(steps - 1, 1))
    return grid if steps == 1 else torch.cat([grid[:-1], grid[-2:-1].div(2).clamp(max=1e-4), grid[-1:]])


def edm_grid(schedule, start, steps, low=0.002, high=80.0, rho=7):
    """[EDM] noise levels b / a from 80 (or where `start` lies) to .002, equally spaced in their seventh root, then 0."""
    start = torch.tensor(start, dtype=torch.float64)
    high = min(high, float(schedule.b(start) / schedule.a(start)))
    sigma = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64) ** rho
    return torch.cat([schedule.time_at(torch.atan(sigma / schedule.data_std)), torch.zeros(1, dtype=torch.float64)])


GRIDS = {"uniform": uniform_grid, "quadratic": quadratic_grid, "angle": angle_grid, "split": split_grid, "edm": edm_grid}


# --- solvers: a better x0 for the same step -----------------------------------------------------------------------------------------
# In y = x / a and sigma = b / a the deterministic step is a straight line of slope eps, exact for the x0 that it is given. A second-order
# method is therefore no other step but another x0. refine(look, schedule, zt, x0, slopes, t, s, before) -> x0; `look(zt, t)` is a call of
# the network -> (x0, slopes), `before` the (time, x0) of the step before, or None.

def analytic(look, schedule, zt, x0, slopes, t, s, before):
    """[DDM] the network's guess as it is: first order."""
    return x0


def heun(look, schedule, zt, x0, slopes, t, s, before):
    """[EDM] look again where the step would end and go along the mean of both slopes: the step from x0 = y - sigma (eps + eps') / 2."""
    there = schedule.step(zt, x0, t, s, slopes=slopes)
    x0_there, slopes_there = look(there, s)
    eps = schedule.eps(there, x0_there, s, slopes_there)
    a, b, *e = schedule.coefficients(t, zt)
    return (x0 + (zt - b * eps - sum(ej * Kj for ej, Kj in zip(e, slopes))) / a) / 2


def dpm(look, schedule, zt, x0, slopes, t, s, before):
    """DPM-Solver++(2M) (2211.01095): x0 as a line in lambda = ln(a / b), read half a step ahead from this guess and the last one."""
    if before is None:
        return x0
    level = lambda t: float((schedule.a(t) / schedule.b(t)).log())
    return x0 + (x0 - before[1]) * (level(s) - level(t)) / (level(t) - level(before[0])) / 2


SOLVERS = {"analytic": (1, analytic), "heun": (2, heun), "dpm++": (1, dpm)}     # calls per step, refine


def resolve_auto(solver, time_grid, churn, steps):
    """What "auto" stands for: the best of eighteen at ten calls, measured on a model of CIFAR-10 (README). Fresh noise wants the analytic step, and
    few calls the uniform grid: of two on EDM's the second is at noise .002, and nothing is left for it to do."""
    return ("analytic" if churn else "dpm++") if solver == "auto" else solver, ("uniform" if churn or steps < 5 else "edm") if time_grid == "auto" else time_grid


def count_steps(solver, schedule, start, calls):
    """How many steps of the grid `calls` network calls are good for. Where sigma is infinite (a = 0) and at the last step, to 0, only the
    analytic step is defined, so a two-call solver takes single calls there, and one more where the number would not come out even."""
    if SOLVERS[solver][0] == 1:
        return calls
    single = 1 + bool(schedule.a(torch.tensor(start, dtype=torch.float64)) < 1e-9)
    return min(calls, single + (calls - single + 1) // 2)


# --- the loop ---------------------------------------------------------------------------------------------------------------------

@dataclass
class DiffusionModel:
    """A model and all that is needed to sample from it. `meta` is the checkpoint's: class names, grid size, prediction, ..."""
    net: torch.nn.Module
    schedule: object
    space: object
    predict: str
    meta: dict
    device: torch.device


@torch.no_grad()
def denoise(look, zt, ts, schedule, solver="analytic", calls=None, churn=0.0, noise=None):
    """Follow the times `ts` (falling, the last is 0) from zt (B, C, H, W) -> (B, C, H, W), in exactly `calls` network calls.

    look(zt, t) -> (x0, slopes) is one call. calls: len(ts) - 1 when left out. churn > 0 needs noise() -> N(0, I) like zt."""
    left, before, refine = calls or len(ts) - 1, None, SOLVERS[solver][1]
    for i, (t, s) in enumerate(zip(ts[:-1], ts[1:])):
        x0, slopes = look(zt, t)
        left -= 1
        best, steps_after = x0, len(ts) - 2 - i
        extra = SOLVERS[solver][0] - 1
        if s > 0 and schedule.a(t) > 1e-9 and left - extra >= steps_after:      # second order where it is defined and can be afforded
            best = refine(look, schedule, zt, x0, slopes, t, s, before)
            left -= extra
        zt, before = schedule.step(zt, best, t, s, churn, noise() if churn > 0 else None, slopes), (t, x0)
    return zt


@torch.no_grad()
def sample(loaded, n=16, steps=10, seed=0, churn=0.0, time_grid="auto", solver="auto", labels=None, cfg=1.0, batch=64, first=0,
           cond=None, watch=None, amp=None, cfg_interval=(0.0, math.inf)):
    """Images (n, C, H, W) in [-1, 1], float32 on the CPU.

    steps: network calls. churn in [0, 1]. time_grid, solver: names in GRIDS and SOLVERS, or auto (`way`). labels: (n,) class numbers, -1 for none; cfg: guidance scale,
    1 is plain conditional, 0 unconditional, each one pass; any other is a doubled batch. cfg_interval: the noise levels b / a
    that are guided, low < b / a <= high (2404.07724); the others are one conditional pass. first: number of the first image, whose
    noise is a function of (seed, number) alone. cond (n, C', h, w): a task's condition at the size of z, at least that of the training (`restore`
    pads and folds it). watch(t, zt, x0) is told of every network call. amp: the type for autocast of the network, None for float32; the
    steps between its calls are in float32 in any case. The model runs in evaluation mode on the whole, unmasked image."""
    model, schedule, space = loaded.net.eval(), loaded.schedule, loaded.space
    start, (solver, time_grid) = schedule.start_time(loaded.predict), resolve_auto(solver, time_grid, churn, steps)
    ts = GRIDS[time_grid](schedule, start, count_steps(solver, schedule, start, steps))
    side = loaded.meta["size"] // space.factor
    shape = (space.channels, side, side) if cond is None else (space.channels, *cond.shape[2:])
    done = []
    for lo in range(0, n, batch):
        generators = [seeded(seed, first + i) for i in range(lo, min(lo + batch, n))]

        def noise():
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(loaded.device)

        y = None if labels is None else torch.as_tensor(labels)[lo:lo + batch].to(loaded.device)
        seen = None if cond is None else cond[lo:lo + batch].to(loaded.device)

        @torch.autocast(loaded.device.type, amp, enabled=amp is not None)
        def net(zt, t):
            level = float(schedule.b(t) / schedule.a(t))                        # one time for all; infinite where the image is gone
            t = t.expand(len(zt))
            if y is None or cfg == 1 or not cfg_interval[0] < level <= cfg_interval[1]:
                return model(zt, t, y, None, seen)
            if cfg == 0:
                return model(zt, t, torch.full_like(y, -1), None, seen)
            twice = lambda u: None if u is None else torch.cat([u, u])
            c, u = model(twice(zt), twice(t), torch.cat([y, torch.full_like(y, -1)]), None, twice(seen)).chunk(2)
            return u + cfg * (c - u)

        def look(zt, t):
            x0, n = schedule.split(net(zt, t), zt, t, loaded.predict)
            x0 = x0.clamp(-1, 1) if space.name == "pixel" else x0
            if watch:
                watch(t, zt, x0)
            return x0, n.split(zt.shape[1], 1)[1:]

        z = denoise(look, noise() * float(schedule.b(ts[0])), ts, schedule, solver, steps, churn, noise)
        done.append(space.decode(z).clamp(-1, 1).float().cpu())
    return torch.cat(done)


# --- from a checkpoint to a model ------------------------------------------------------------------------------------------------------------------

def build_model(meta):
    """(model, schedule, space) from a checkpoint's meta: the one place that turns its names into objects."""
    schedule = replace(SCHEDULES[meta["schedule"]], data_std=meta["data_std"])
    if meta["vae"] and not Path(meta["vae"]).expanduser().exists():
        raise UserError(f"the autoencoder of this model is not at {meta['vae']} any more: say with --vae where it is")
    space = SPACES[meta["space"]](meta["channels"], meta["vae"])
    if space.sha != meta["vae_sha"]:
        raise UserError(f"{meta['vae']} is not the autoencoder that this model was trained with: its SHA-256 begins with {space.sha}, not {meta['vae_sha']}")
    return ViT(schedule, **meta["model"]), schedule, space


def load_weights(model, weights):
    """Load a checkpoint's weights into the network that was built for it. UserError when they are of another version of this program."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its network as this version of the program builds it ({describe_error(error)[:200]} ...): train again") from None


def load(path=None, weights="ema", device="auto", vae=None):
    """A checkpoint ready for `sample`. path: a .pt file, a run's folder, or None for the newest run; weights: "ema" or "model"; vae: where
    the autoencoder of a model of latents is, when it has moved."""
    ckpt = read_checkpoint(path or newest_checkpoint())
    if vae and not ckpt["meta"]["vae"]:
        raise UserError(f"--vae {vae}: this model works on pixels; leave it out")
    model, schedule, space = build_model(ckpt["meta"] | (dict(vae=vae) if vae else {}))
    load_weights(model, ckpt[weights])
    device = pick_device(device)
    meta = dict(task="generate", objective="denoise") | ckpt["meta"] | dict(step=ckpt["step"])
    return DiffusionModel(model.to(device).eval(), schedule, space, meta["predict"], meta, device)


# --- the command -------------------------------------------------------------------------------------------------------------------

def parser():
    p = build_parser("Sample images from a trained model, or restore your own with one that was trained for a task.")
    p.add_argument("--ckpt", default=None, help="a checkpoint or a run's folder; the newest run when left out")
    p.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged weights or the raw ones")
    p.add_argument("--vae", default=None, help="the autoencoder of a model of latents, when it is no longer where it was in training")
    p.add_argument("--n", type=int, default=None, help="how many images; 16, or with --input all of them")
    p.add_argument("--steps", type=int, default=10, help="network calls per image")
    p.add_argument("--churn", type=float, default=0.0, help="share of fresh noise per step: 0 deterministic, 1 the posterior")
    p.add_argument("--time-grid", choices=["auto", *GRIDS], default="auto", help="where the steps lie; auto: edm, but uniform with --churn or below five steps")
    p.add_argument("--solver", choices=["auto", *SOLVERS], default="auto", help="analytic is first order, heun and dpm++ are second; auto: dpm++, with --churn analytic")
    p.add_argument("--label", default=None, help="class name or number; all classes in turn when left out")
    p.add_argument("--cfg", type=float, default=1.0, help="guidance scale: 1 plain conditional, 0 unconditional")
    p.add_argument("--task", choices=[*TASKS, "reconstruct"], default=None, help="what the model must have been trained for; its own task when left out")
    p.add_argument("--ratio", type=float, default=None, help="share of the tokens to hide from a model of --objective reconstruct; its training's when left out")
    p.add_argument("--input", default=None, help="for a task: a folder or .zip of your own pictures, of any size")
    p.add_argument("--holes", default=None, help="for inpaint: a folder or .zip of masks of the same file stems, white where the hole is, or random; "
                   "transparent pixels of --input when left out")
    p.add_argument("--targets", default=None, help="for a task: what should come out, a folder or .zip of the same file stems, to be compared with")
    p.add_argument("--trace", default=None, help="a .png of x_t and of the guess of x0 at every call, of the first two images, or of the first picture of --input")
    p.add_argument("--cfg-interval", type=float, nargs=2, default=(0.0, math.inf), metavar=("LOW", "HIGH"),
                   help="guide at noise levels b / a in (LOW, HIGH] alone, whatever the schedule: .3 to 3 keeps variety and saves passes")
    p.add_argument("--seed", type=int, default=0, help="image i is a function of (seed, i); -1 picks a seed and prints it")
    p.add_argument("--batch", type=int, default=64, help="images (or tiles of a large one) made at once; the result does not depend on it")
    p.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision of the network; auto: bf16 where the hardware has it")
    p.add_argument("--out", default="samples.png", help="a .png grid, a .npz, a .zip of PNGs, or a folder of PNGs")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return p


def find_class(name, classes):
    """`--label` as a number: a class's name, or its place in the list."""
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    raise UserError(f"--label {name}: " + (f"the classes are {known}" if classes else "this model was trained without labels"))


def check_arguments(args):
    """Refuse, before any work, what cannot be."""
    for name in ("n", "steps", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.churn <= 1:
        raise UserError(f"--churn {args.churn}: must be between 0 and 1")
    if not math.isfinite(args.cfg) or abs(args.seed) >= 2**63:
        raise UserError(f"--cfg {args.cfg}, --seed {args.seed}: must be finite, and the seed have less than 64 bits")
    low, high = args.cfg_interval
    if not 0 <= low < high:
        raise UserError(f"--cfg-interval {low} {high}: give two noise levels, 0 <= LOW < HIGH; inf is one")
    if args.cfg == 1 and (low, high) != (0, math.inf):
        raise UserError("--cfg-interval says where to guide: give the scale too, --cfg 2")
    if args.churn and args.solver not in ("auto", "analytic"):
        raise UserError(f"--solver {args.solver} follows the deterministic path: use it with --churn 0, or --solver analytic")
    if args.trace and not args.trace.lower().endswith(".png"):
        raise UserError(f"--trace {args.trace}: give a name that ends with .png")
    if args.input is None and (args.holes or args.targets):
        raise UserError(f"--{'holes' if args.holes else 'targets'} goes with --input, the pictures to work on")
    places = [("out", args.out)] + [(name, getattr(args, name)) for name in ("trace", "input", "holes", "targets") if getattr(args, name)]
    for i, (name, path) in enumerate(places):
        for other, place in places[:i]:
            if other in ("out", "trace") and Path(path).resolve() == Path(place).resolve():
                raise UserError(f"--{other} {place} would overwrite --{name}: give it another name")
    if args.input is not None and args.out.lower().endswith(".npz"):
        raise UserError(f"--out {args.out}: pictures of different sizes do not fit into a .npz; give a .png, a .zip or a folder")


def main(argv=None):
    args = parser().parse_args(argv)
    check_arguments(args)
    loaded = load(args.ckpt, args.weights, args.device, args.vae)
    classes, task = loaded.meta["classes"], loaded.meta["task"]
    label = None if args.label is None else find_class(args.label, classes)
    seed = args.seed if args.seed >= 0 else int(torch.seed() % 2**31)
    if loaded.meta["objective"] == "reconstruct":
        return reconstruct_to_file(args, loaded, label, seed)
    if args.task not in (None, task):
        raise UserError(f"--task {args.task}: this model was trained for {task}; give --ckpt of one that was trained with "
                        + ("--objective reconstruct" if args.task == "reconstruct" else f"train.py --task {args.task}"))
    if (task == "generate") != (args.input is None):
        raise UserError("--input: this model was trained to generate, from nothing; train one for it (train.py --task superres, inpaint, ...)"
                        if task == "generate" else f"this model was trained for {task}: give the pictures to work on, --input FOLDER")
    if args.holes and task != "inpaint":
        raise UserError(f"--holes: this model was trained for {task}, not to inpaint")
    if args.ratio is not None:
        raise UserError(f"--ratio: this model was trained for {task}, not to reconstruct what is hidden")
    if args.cfg != 1 and not classes:
        raise UserError(f"--cfg {args.cfg}: this model was trained without labels, there is nothing to guide")
    if args.cfg != 1 and args.label is None and task != "generate":
        raise UserError(f"--cfg {args.cfg} guides towards a class: give --label, one of {', '.join(classes[:10])}")
    how = dict(steps=args.steps, seed=seed, churn=args.churn, time_grid=args.time_grid, solver=args.solver, cfg=args.cfg, batch=args.batch,
               amp=amp_type(args.amp, loaded.device), cfg_interval=args.cfg_interval)
    watch, seen = Trace(loaded, args.trace, 2), []                              # seen: images per pass through the network: counted, not computed
    loaded.net.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    n, batches = generate_to_file(args, loaded, label, watch, how) if task == "generate" else restore_to_file(args, loaded, label, watch, how)
    if args.trace:
        watch.save(args.trace)
        print(f"wrote {args.trace}: above x_t, scaled to the images' contrast, below the network's guess of x0, at every call")
    calls = watch.calls // batches
    if args.cfg not in (0, 1) and sum(seen) <= n * calls:
        print(f"note: no call fell between the noise levels of --cfg-interval {' '.join(map(str, args.cfg_interval))}: nothing was guided")
    passes = f", {sum(seen) / n:g} passes (a guided call takes two, each tile of a large picture its own)" if sum(seen) > n * calls else ""
    print(f"wrote {n} images to {args.out}: {calls} network calls each ({', '.join(resolve_auto(args.solver, args.time_grid, args.churn, args.steps))} grid){passes}, seed {seed}, {args.weights} weights of step {loaded.meta['step']}")


def reconstruct_to_file(args, loaded, label, seed):
    """--task reconstruct (or inpaint) with a model of --objective reconstruct: hide tokens (or what lies in a hole) of pictures, guess them in one pass."""
    from restore import describe_reconstruction, draw_reconstruction, inpaint_hole, reconstruct
    if args.task not in (None, "reconstruct", "inpaint") or args.input is None:
        raise UserError("this model was trained to reconstruct hidden patches and makes nothing of noise: give --task reconstruct (or inpaint) and --input "
                        "FOLDER, or train one without --objective reconstruct")
    defaults = parser()
    for name in ("steps", "churn", "time_grid", "solver", "cfg", "cfg_interval", "amp", "targets", "trace"):
        if getattr(args, name) != defaults.get_default(name):
            raise UserError(f"--{name.replace('_', '-')}: a reconstruction is one pass of the network, without noise and time; leave it out")
    inpaint = args.task == "inpaint" or (args.task is None and args.holes is not None)
    if (args.holes and not inpaint) or (args.ratio is not None and inpaint):
        raise UserError("--ratio is the share of the tokens that --task reconstruct hides; --holes belong to --task inpaint")
    if not args.out.lower().endswith(".png"):
        raise UserError(f"--out {args.out}: a reconstruction is one sheet of pictures beside their originals, a .png")
    inputs = list(UserPictures(args.input, args.n, loaded.meta["channels"] == 1, args.holes, None, inpaint, side=loaded.meta["size"], seed=seed))
    x, labels = torch.cat([one.x for one in inputs]), None if label is None else torch.full((len(inputs),), label)
    if inpaint:
        done = inpaint_hole(loaded, x, torch.cat([one.hole for one in inputs]), labels, names=[one.name for one in inputs])
    else:
        done = reconstruct(loaded, x, loaded.meta["ratio"] if args.ratio is None else args.ratio, seed, labels=labels, batch=args.batch)
    with ImageWriter(args.out) as writer:
        writer.sheet = draw_reconstruction(done)
    print(f"{describe_reconstruction(done)}; wrote {args.out}, seed {seed}")


def generate_to_file(args, loaded, label, watch, how):
    """From nothing: --n images to --out. -> (how many, in how many batches)."""
    classes, n = loaded.meta["classes"], args.n or 16
    labels = torch.full((n,), label) if label is not None else torch.arange(n) % len(classes) if classes else None
    begins = range(0, n, args.batch)
    with ImageWriter(args.out, columns=len(classes) if classes and label is None and len(classes) <= 16 else None) as writer:
        for lo in tqdm(begins, desc="sampling", unit="batch", disable=len(begins) == 1 or None):
            hi = min(lo + args.batch, n)
            images = sample(loaded, hi - lo, labels=None if labels is None else labels[lo:hi], first=lo, watch=watch, **how)
            watch.done(images)
            writer.add(to_uint8(images))
    return n, len(begins)


def restore_to_file(args, loaded, label, watch, how):
    """A task on the user's own pictures, one by one: condition | result (| target), and scores where there are targets.
    -> (how many, the same)."""
    from restore import restore_pictures
    task, scores, baseline = TASKS[loaded.meta["task"]], {}, {}
    inputs = UserPictures(args.input, args.n, loaded.meta["channels"] == 1, args.holes, args.targets, loaded.meta["task"] == "inpaint", task.zoom, seed=how["seed"])
    labels = None if label is None else torch.tensor([label])
    with ImageWriter(args.out, columns=2 + bool(args.targets)) as writer:
        for i, one in enumerate(tqdm(inputs, desc=loaded.meta["task"], unit="picture", disable=len(inputs) == 1 or None)):
            cond = task.ask(one.x, one.hole)
            result = restore_pictures(loaded, cond, first=i, labels=labels, watch=watch, **how)
            watch.done(result)
            row = place_side_by_side(cond, result, *([one.truth] if args.targets else []))
            if writer.kind == ".png":
                writer.add(row)
            else:                                                               # the result by itself, and side by side
                writer.add([to_uint8(result[0]), torch.cat(list(row), 2)], [one.name, f"{one.name}-compare"])
            for key, score in task.scores.items() if args.targets else ():
                scores.setdefault(key, []).append(score(result, one.truth, cond))
                baseline.setdefault(key, []).append(score(task.plain(cond), one.truth, cond) if task.plain else np.nan)
    for key in scores:
        print(f"{key}: {np.mean(scores[key]):.3f}" + (f" (without a network {np.mean(baseline[key]):.3f})" if task.plain else "") + f", the mean over {len(inputs)} pictures")
    return len(inputs), len(inputs)


if __name__ == "__main__":
    run_command(main)
