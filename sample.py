"""Sampling: from noise to images in as many network calls as you like, ten by default.

The idea (DDM, arXiv 2306.13720). The network looks at x_t and guesses the image x0; the step of schedules.py then goes from t to
any earlier s exactly as it would for that image. Guess, step, guess again:

    x_1 ~ b(1) N(0, I)
    for t, s in zip(grid, grid[1:]):             grid from 1 to 0, GRIDS: uniform, quadratic, ...
        x0  = split(model(x_t, t))               one network call
        x_s = step(x_t, x0, t, s, churn)         churn 0: deterministic (DDIM), churn 1: the paper's posterior

One step gives the mean of all images, more steps give detail; `--steps` counts network calls. A second-order solver is a better x0 for
the same step (SOLVERS). Sampling runs on all tokens: a model trained on a tenth of them is simply handed the rest. Labels are guided by out = u + scale (c - u) (2207.12598) in one
doubled batch. Every image has a seed of its own, so it does not depend on the batch that it was made in.

    python sample.py --steps 10                              # newest run -> samples.png
    python sample.py --n 5000 --out samples.zip              # for fid.py; also a folder or .npz
    from sample import load, sample; images = sample(load("runs/NAME/last.pt"), n=16, steps=10)        # (16, C, H, W) in [-1, 1]

Shapes: B batch, C channels; x_t (B, C, H, W); t in [0, 1].
"""
import math
import os
import sys
import zipfile
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from checkpoint import newest, read_checkpoint
from data import UserError, command_line, grid, to_uint8
from machine import pick_device
from schedules import SCHEDULES
from vae import SPACES
from vit import ViT


# --- time grids: (schedule, start, steps) -> steps + 1 times, falling from start to 0 -------------------------------------------

def uniform(schedule, start, steps):
    """Equal steps of t."""
    return torch.linspace(start, 0, steps + 1, dtype=torch.float64)


def quadratic(schedule, start, steps):
    """t = (i / steps)^2: small steps near the image, where b = sqrt t changes fastest."""
    return start * torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 2


def angle(schedule, start, steps):
    """Equal steps of theta = arctan(b / (a s)): smooth in every schedule, so first order with the right constant."""
    top = schedule.angle(start)
    return torch.cat([schedule.time_at(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1] * top), torch.zeros(1, dtype=torch.float64)])


def split(schedule, start, steps):
    """[DDM, released code] uniform, but with the last interval cut once more, 1e-4 before the end."""
    return torch.cat([uniform(schedule, start, max(steps - 1, 1))[:-1], torch.tensor([1e-4, 0.0] if steps > 1 else [0.0], dtype=torch.float64)])


def edm(schedule, start, steps, low=0.002, high=80.0, rho=7):
    """[EDM] noise levels b / a from 80 (or where `start` lies) to .002, equally spaced in their seventh root, then 0."""
    start = torch.tensor(start, dtype=torch.float64)
    high = min(high, float(schedule.b(start) / schedule.a(start)))
    sigma = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64) ** rho
    return torch.cat([schedule.time_at(torch.atan(sigma / schedule.s)), torch.zeros(1, dtype=torch.float64)])


GRIDS = {"uniform": uniform, "quadratic": quadratic, "angle": angle, "split": split, "edm": edm}


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
    a, b, *e = schedule.at(t, zt)
    return (x0 + (zt - b * eps - sum(ej * Kj for ej, Kj in zip(e, slopes))) / a) / 2


def dpm(look, schedule, zt, x0, slopes, t, s, before):
    """DPM-Solver++(2M) (2211.01095): x0 as a line in lambda = ln(a / b), read half a step ahead from this guess and the last one."""
    if before is None:
        return x0
    level = lambda t: float((schedule.a(t) / schedule.b(t)).log())
    return x0 + (x0 - before[1]) * (level(s) - level(t)) / (level(t) - level(before[0])) / 2


SOLVERS = {"analytic": (1, analytic), "heun": (2, heun), "dpm++": (1, dpm)}     # calls per step, refine


def intervals(solver, schedule, start, calls):
    """How many steps of the grid `calls` network calls are good for. Where sigma is infinite (a = 0) and at the last step, to 0, only the
    analytic step is defined, so a two-call solver takes single calls there, and one more where the number would not come out even."""
    if SOLVERS[solver][0] == 1:
        return calls
    single = 1 + bool(schedule.a(torch.tensor(start, dtype=torch.float64)) < 1e-9)
    return min(calls, single + (calls - single + 1) // 2)


# --- the loop ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Loaded:
    """A model and all that is needed to sample from it. `meta` is the checkpoint's: class names, grid size, prediction, ..."""
    model: torch.nn.Module
    schedule: object
    space: object
    predict: str
    meta: dict
    device: torch.device


def seeded(*key):
    """A CPU generator that is a function of some whole numbers: independent streams for neighbouring keys."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([k % 2**63 for k in key]).generate_state(1, np.uint64)[0] >> 1))


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
def sample(loaded, n=16, steps=10, seed=0, churn=0.0, time_grid="uniform", solver="analytic", labels=None, cfg=1.0, batch=64, first=0):
    """Images (n, C, H, W) in [-1, 1], float32 on the CPU.

    steps: network calls. churn in [0, 1]. time_grid, solver: names in GRIDS and SOLVERS. labels: (n,) class numbers, -1 for none; cfg: guidance scale,
    1 is plain conditional, 0 unconditional, each one pass; any other is a doubled batch. first: number of the first image, whose
    noise is a function of (seed, number) alone. The model runs in evaluation mode on the whole, unmasked image."""
    model, schedule, space = loaded.model.eval(), loaded.schedule, loaded.space
    start = schedule.start(loaded.predict)
    ts = GRIDS[time_grid](schedule, start, intervals(solver, schedule, start, steps))
    side = loaded.meta["size"] // space.factor
    shape = (space.channels, side, side)
    done = []
    for lo in range(0, n, batch):
        generators = [seeded(seed, first + i) for i in range(lo, min(lo + batch, n))]

        def noise():
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(loaded.device)

        y = None if labels is None else torch.as_tensor(labels)[lo:lo + batch].to(loaded.device)

        def net(zt, t):
            t = t.expand(len(zt))
            if y is None or cfg == 1:
                return model(zt, t, y)
            if cfg == 0:
                return model(zt, t, torch.full_like(y, -1))
            c, u = model(torch.cat([zt, zt]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, -1)])).chunk(2)
            return u + cfg * (c - u)

        def look(zt, t):
            x0, n = schedule.split(net(zt, t), zt, t, loaded.predict)
            return x0.clamp(-1, 1) if space.name == "pixel" else x0, n.split(zt.shape[1], 1)[1:]

        z = denoise(look, noise() * float(schedule.b(ts[0])), ts, schedule, solver, steps, churn, noise)
        done.append(space.decode(z).clamp(-1, 1).float().cpu())
    return torch.cat(done)


# --- from a checkpoint to a model ------------------------------------------------------------------------------------------------------------------

def build(meta):
    """(model, schedule, space) from a checkpoint's meta: the one place that turns its names into objects."""
    schedule = replace(SCHEDULES[meta["schedule"]], s=meta["data_std"])
    space = SPACES[meta["space"]](meta["channels"], meta["vae"])
    if space.sha != meta["vae_sha"]:
        raise UserError(f"{meta['vae']} is not the autoencoder that this model was trained with: its SHA-256 begins with {space.sha}, not {meta['vae_sha']}")
    return ViT(schedule, **meta["model"]), schedule, space


def load(path=None, weights="ema", device="auto"):
    """A checkpoint ready for `sample`. path: a .pt file, a run's folder, or None for the newest run; weights: "ema" or "model"."""
    ckpt = read_checkpoint(path or newest())
    model, schedule, space = build(ckpt["meta"])
    model.load_state_dict(ckpt[weights])
    device = pick_device(device)
    return Loaded(model.to(device).eval(), schedule, space, ckpt["meta"]["predict"], ckpt["meta"] | dict(step=ckpt["step"]), device)


# --- the command -------------------------------------------------------------------------------------------------------------------

def png(pixels):
    """uint8 (C, H, W) -> the bytes of a PNG."""
    array = pixels.permute(1, 2, 0).numpy()
    buffer = BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


class Writer:
    """Where samples go, by the name of --out: a .png grid, a .npz, a .zip of PNGs, or a folder of PNGs, written as they come."""

    def __init__(self, out, columns=None):
        self.out, self.columns, self.kept, self.n = Path(out), columns, [], 0
        self.kind = self.out.suffix.lower() or "folder"
        if self.kind not in (".png", ".npz", ".zip", "folder"):
            raise UserError(f"--out {out}: give a name that ends with .png, .npz or .zip, or that has no ending for a folder")
        if self.kind == "folder":
            if self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())):
                raise UserError(f"--out {self.out} exists and is not an empty folder: old images would be mixed with new ones; give another name")
            self.out.mkdir(parents=True, exist_ok=True)
        else:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            open(self.out, "ab").close()                                        # what cannot be written is told now, not after the work
        self.zip = zipfile.ZipFile(self.out, "w") if self.kind == ".zip" else None

    def add(self, images):
        """uint8 (B, C, H, W)."""
        for image in images:
            if self.kind == "folder":
                (self.out / f"{self.n:06d}.png").write_bytes(png(image))
            elif self.kind == ".zip":
                self.zip.writestr(f"{self.n:06d}.png", png(image))
            else:
                self.kept.append(image)
            self.n += 1

    def close(self):
        if self.kind == ".zip":
            self.zip.close()
        elif self.kind == ".png":
            grid(torch.stack(self.kept), self.columns).save(self.out)
        elif self.kind == ".npz":
            np.savez_compressed(self.out, images=torch.stack(self.kept).permute(0, 2, 3, 1).numpy())


def parser():
    p = command_line("Sample images from a trained model.")
    p.add_argument("--ckpt", default=None, help="a checkpoint or a run's folder; the newest run when left out")
    p.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged weights or the raw ones")
    p.add_argument("--n", type=int, default=16, help="how many images")
    p.add_argument("--steps", type=int, default=10, help="network calls per image")
    p.add_argument("--churn", type=float, default=0.0, help="share of fresh noise per step: 0 deterministic, 1 the posterior")
    p.add_argument("--time-grid", choices=GRIDS, default="uniform", help="where the steps lie")
    p.add_argument("--solver", choices=SOLVERS, default="analytic", help="analytic is first order; heun and dpm++ are second")
    p.add_argument("--label", default=None, help="class name or number; all classes in turn when left out")
    p.add_argument("--cfg", type=float, default=1.0, help="guidance scale: 1 plain conditional, 0 unconditional")
    p.add_argument("--seed", type=int, default=0, help="image i is a function of (seed, i); -1 picks a seed and prints it")
    p.add_argument("--batch", type=int, default=64, help="images made at once; the result does not depend on it")
    p.add_argument("--out", default="samples.png", help="a .png grid, a .npz, a .zip of PNGs, or a folder of PNGs")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return p


def class_number(name, classes):
    """`--label` as a number: a class's name, or its place in the list."""
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    raise UserError(f"--label {name}: " + (f"the classes are {known}" if classes else "this model was trained without labels"))


def main(argv=None):
    args = parser().parse_args(argv)
    for name in ("n", "steps", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.churn <= 1:
        raise UserError(f"--churn {args.churn}: must be between 0 and 1")
    if not math.isfinite(args.cfg) or abs(args.seed) >= 2**63:
        raise UserError(f"--cfg {args.cfg}, --seed {args.seed}: must be finite, and the seed have less than 64 bits")
    if args.churn and args.solver != "analytic":
        raise UserError(f"--solver {args.solver} follows the deterministic path: use it with --churn 0, or --solver analytic")
    loaded = load(args.ckpt, args.weights, args.device)
    if loaded.meta.get("objective", "denoise") != "denoise":
        raise UserError("this model was trained to reconstruct hidden patches and makes nothing of noise; train one without --objective reconstruct")
    classes = loaded.meta["classes"]
    if args.label is None and args.cfg != 1 and not classes:
        raise UserError(f"--cfg {args.cfg}: this model was trained without labels, there is nothing to guide")
    if args.label is not None:
        labels = torch.full((args.n,), class_number(args.label, classes))
    else:
        labels = torch.arange(args.n) % len(classes) if classes else None
    seed = args.seed if args.seed >= 0 else int(torch.seed() % 2**31)
    writer = Writer(args.out, columns=len(classes) if classes and args.label is None and len(classes) <= 16 else None)
    for lo in tqdm(range(0, args.n, args.batch), desc="sampling", unit="batch", disable=args.n <= args.batch):
        hi = min(lo + args.batch, args.n)
        images = sample(loaded, hi - lo, args.steps, seed, args.churn, args.time_grid, args.solver,
                        None if labels is None else labels[lo:hi], args.cfg, args.batch, first=lo)
        writer.add(to_uint8(images))
    writer.close()
    passes = 2 if labels is not None and args.cfg not in (0, 1) else 1
    print(f"wrote {args.n} images to {args.out}: {args.steps} network calls each" + (" on a doubled batch" if passes == 2 else "")
          + f", seed {seed}, {args.weights} weights of step {loaded.meta['step']}")


def run(command):
    """Call a command's main: bad input is one line (per machine) and exit status 2, never a traceback."""
    try:
        sys.exit(command())
    except (UserError, OSError) as error:                                       # OSError: a folder that cannot be written, a full disk
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except torch.cuda.OutOfMemoryError:
        print("error: the GPU's memory is full: try a smaller --micro-batch or --checkpoint-blocks (train.py, finetune.py), or --batch (sample.py)",
              file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(2)


if __name__ == "__main__":
    run(main)
