"""Training: one loop for every method, on a laptop or on many GPUs.

    python train.py                                          # built-in faces, tiny model, minutes on a CPU
    python train.py --data photos/ --size 64 --mask 0.9      # your own folder or zip, a tenth of the tokens per step
    torchrun --nproc_per_node=8 train.py --mask 0.9          # the same file on 8 GPUs (or 8 CPU processes)

The loop below is the whole program; every other file exists to make one of its six lines readable. What happens around it:

    draws       noise, times, masks, flips and label drops are a function of (seed, step, shard), where a shard is a slice of the global
                batch; k processes x one shard and one process x k shards (--micro-batch) therefore take the same step, and nothing
                about randomness has to be saved for an exact resume
    progress    step / plan in [0, 1] drives learning rate and mask ratio. `--minutes` is turned into a plan after 20 timed steps
    files       runs/NAME/: config.json, log.csv, loss.png, samples/000500.png, last.pt and 000500.pt (checkpoint.py)

Shapes: B images per shard, C channels, h x w tokens, t in [0, 1]; x uint8 -> [-1, 1], z what the space makes of it.
"""
import argparse
import copy
import dataclasses
import itertools
import json
import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import LATEST, VERSION, draw_loss, keep_copy, name_newest, newest, open_log, read_checkpoint, save_atomic
from cost import report
from data import UserError, command_line, grid, holdout, load_images, to_float, to_uint8
from latents import encode_once
from losses import OBJECTIVES, RECON_TARGETS, WEIGHTS
from machine import amp_type, start_machine
from mask import POLICIES, RATIOS, draw, ratio_at, visible_count
from recipes import RECIPES, settings
from reconstruct import masked_errors, picture, reconstruct
from sample import Loaded, build, restore, run, sample, seeded
from schedules import PREDICTIONS, SCHEDULES, TIMES, times
from tasks import TASKS, pose, strip
from vae import SPACES
from vit import ECONOMIES, MODELS


# --- options: a field is a default and a line of help; argparse is made from them ------------------------------------------------

def option(default, help, kind=None, choices=None, name=None):
    """A field of Options. kind: the type where the default does not tell; choices: a registry; name: the flag where it differs."""
    return field(default=default, metadata=dict(help=help, kind=kind or type(default), choices=choices, name=name))


@dataclass(frozen=True)
class Options:
    """All options of a run, in the order of --help."""
    recipe: str = option(None, "a paper's own settings at its own scale (recipes.py); any flag beside it wins", kind=str, choices=RECIPES)
    data: str = option("faces", "images: a folder, a .zip, cifar-10-python.tar.gz, or faces (drawn by data.py)")
    val: str = option("0.02", "held-out images: a fraction of --data, or a path")
    size: int = option(32, "images are cropped square and resized to this side")
    fraction: float = option(1.0, "share of the training images that is used, in (0, 1]")
    gray: bool = option(False, "one channel instead of three")
    flip: bool = option(True, "mirror half of the images")
    cache_gb: float = option(4.0, "decoded images are kept in memory up to this size, all processes of a machine together")
    workers: int = option(2, "processes that decode images when they do not fit in memory")
    model: str = option("tiny", "size of the network", choices=MODELS)
    patch: int = option(4, "side of a token")
    skips: bool = option(False, "long skip connections (U-ViT, the network of MaskDM)")
    decoder: int = option(0, "blocks of the light decoder on all tokens (MaskDiT); 0 for none")
    economy: str = option("drop", "what hidden tokens do: drop never enters, route skips blocks (TREAD), defer leaves after a light mixer (MicroDiT)",
                          choices=ECONOMIES)
    mask: float = option(0.0, "share of the tokens that is hidden, in [0, 1)")
    mask_from: float = option(None, "share at the start of a ramp", kind=float)
    ramp: str = option("constant", "how the share goes from --mask-from to --mask", choices=RATIOS)
    ramp_share: float = option(None, "share of the run after which a ramp has arrived; left out: 2/3, for cosine4 1", kind=float)
    policy: str = option("patch", "which tokens are hidden", choices=POLICIES)
    block: int = option(4, "side of the squares of --policy block, in tokens")
    objective: str = option("denoise", "what is learned: to denoise, or, without noise and time, to reconstruct hidden patches (LMD)", choices=OBJECTIVES)
    schedule: str = option("ddm", "how the image fades and the noise grows", choices=SCHEDULES)
    predict: str = option("both", "what the network predicts", choices=PREDICTIONS)
    weighting: str = option("plain", "weights of the two heads of --predict both", choices=WEIGHTS)
    time_sampling: str = option("uniform", "how training times are drawn", choices=TIMES)
    recon: float = option(0.0, "weight of reconstructing hidden patches (MaskDiT: 0.1); needs --decoder and --mask")
    recon_target: str = option("clean", "what is reconstructed", choices=RECON_TARGETS)
    space: str = option("pixel", "where diffusion happens", choices=SPACES)
    vae: str = option(None, "weights of the autoencoder for --space latent: from python vae.py, or Stable Diffusion's", kind=str)
    cache_latents: bool = option(True, "with --space latent: encode every image once and keep the latents on disk")
    latents: str = option("runs/latents", "folder of the kept latents")
    task: str = option("generate", "what is predicted, and from what: a task other than generate has a condition", choices=TASKS)
    targets: str = option(None, "maps for --task edges or saliency: a folder or .zip with the file stems of --data; the built-in faces have their own", kind=str)
    labels: bool = option(False, "condition on a class per first-level folder")
    label_dropout: float = option(0.1, "share of the labels dropped, for guidance; used with --labels")
    steps: int = option(None, "number of steps; --minutes decides when left out", kind=int)
    minutes: float = option(None, "length of the run; 4 when neither this nor --steps is given", kind=float)
    batch: int = option(64, "images per step, over all processes")
    micro_batch: int = option(None, "images per forward pass; the rest is accumulated", kind=int)
    lr: float = option(2e-3, "peak learning rate; for the tiny model, larger ones want less (DiT-XL: 1e-4)")
    warmup: int = option(200, "steps of linear warm-up, at most a tenth of the run")
    lr_end: float = option(0.05, "the cosine decay ends at this share of --lr; 1 keeps it constant")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.99, "AdamW")
    wd: float = option(0.01, "weight decay")
    clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.999, "decay of the averaged weights, reached by min(decay, (1 + step) / (10 + step))")
    amp: str = option("auto", "mixed precision; auto: bf16 where the hardware has it", choices=("auto", "bf16", "fp16", "off"))
    compile: bool = option(False, "torch.compile every block (minutes to start; worth it on GPUs)")
    checkpoint_blocks: bool = option(False, "recompute blocks in the backward pass: less memory, a third slower")
    seed: int = option(0, "of everything")
    device: str = option("auto", "auto, cpu, cuda, mps")
    threads: int = option(0, "CPU threads per process; 0: cores divided by processes under torchrun, else torch's own choice")
    dry_run: bool = option(False, "print parameters, tokens, GFLOP, memory and the command for 8 GPUs, and end")
    out: str = option(None, "folder of the run; runs/DATE-TIME when left out", kind=str)
    resume: bool = option(False, "continue --out (or the newest run) if it has a checkpoint")
    save_every: int = option(2000, "steps between checkpoints")
    sample_every: int = option(500, "steps between sample grids and validation losses")


def flag(f):
    """The command line's name of a field of Options."""
    return "--" + (f.metadata["name"] or f.name).replace("_", "-")


def make_parser(options, description):
    """An argument parser with one flag per field; a field that is not given stays absent, so that "given" can be told from "default"."""
    parser = command_line(description, argument_default=argparse.SUPPRESS, formatter_class=argparse.HelpFormatter)
    for f in dataclasses.fields(options):
        kind, choices = f.metadata["kind"], f.metadata["choices"]
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, choices=choices and list(choices))
        parser.add_argument(flag(f), dest=f.name, help=f"{f.metadata['help']} (default: {f.default})", **how)
    return parser


def positive(x):
    return 0 < x < math.inf


REFUSALS = [                                                                    # (is refused, why and what to do); NaN is never in a range
    (lambda o: o.data is None and not o.dry_run, "--recipe needs its paper's images: --data PATH (maskdm CelebA-HQ, maskdit and lmd ImageNet, ddm CIFAR-10)"),
    (lambda o: not 0 <= o.mask < 1, "--mask must be in [0, 1): the share of hidden tokens"),
    (lambda o: o.mask_from is not None and not 0 <= o.mask_from < 1, "--mask-from must be in [0, 1)"),
    (lambda o: o.ramp != "constant" and o.mask_from is None, "--ramp needs --mask-from, the share it starts at"),
    (lambda o: o.ramp == "constant" and o.mask_from is not None, "--mask-from needs a --ramp that is not constant"),
    (lambda o: o.ramp_share is not None and not 0 < o.ramp_share <= 1, "--ramp-share must be in (0, 1]"),
    (lambda o: o.ramp_share is not None and o.ramp == "constant", "--ramp-share is the length of a ramp: it needs --ramp"),
    (lambda o: o.block < 1, "--block must be at least 1"),
    (lambda o: o.block != Options.block and o.policy != "block", "--block is the side of --policy block's squares: use it with that policy"),
    (lambda o: o.patch < 1 or o.size < 1 or o.size % o.patch, "--size must be a positive multiple of --patch"),
    (lambda o: (o.space == "latent") != (o.vae is not None) and not (o.dry_run and o.vae is None),
     "--space latent (which --recipe maskdit and lmd mean) and --vae PATH belong together; python vae.py trains an autoencoder"),
    (lambda o: o.decoder < 0, "--decoder is a number of blocks: at least 0"),
    (lambda o: not 0 <= o.recon < math.inf, "--recon is a weight: at least 0"),
    (lambda o: o.recon and not o.decoder, "--recon needs --decoder: without one, hidden patches have no output"),
    (lambda o: o.recon and not (o.mask or o.mask_from), "--recon needs --mask: there is nothing hidden to reconstruct"),
    (lambda o: o.recon and o.economy != "drop", "--recon guesses what was never seen: --economy route and defer let hidden tokens take part, use drop"),
    (lambda o: o.skips and o.economy == "route", "--economy route does not know --skips: a long skip would join blocks that see different tokens"),
    (lambda o: o.recon_target != Options.recon_target and not o.recon and o.objective == "denoise", "--recon-target needs --recon, the weight of the reconstruction"),
    (lambda o: o.objective == "reconstruct" and not o.decoder, "--objective reconstruct needs --decoder: without one, hidden patches have no output"),
    (lambda o: o.objective == "reconstruct" and not (o.mask and o.mask_from != 0), "--objective reconstruct needs --mask (and --mask-from) above 0: something must be hidden"),
    (lambda o: o.objective == "reconstruct" and o.recon, "--recon weighs reconstruction beside denoising: --objective reconstruct is nothing else, leave it out"),
    (lambda o: o.objective == "reconstruct" and o.recon_target == "noisy", "--recon-target noisy: --objective reconstruct has no noise; take clean or whitened"),
    (lambda o: o.objective == "reconstruct" and o.predict not in (Options.predict, "x0"), "--predict: --objective reconstruct guesses the patches themselves; leave it out"),
    (lambda o: o.objective == "reconstruct" and (o.schedule, o.time_sampling, o.weighting) != (Options.schedule, Options.time_sampling, Options.weighting),
     "--schedule, --time-sampling and --weighting are about noise: --objective reconstruct has none, leave them out"),
    (lambda o: o.objective == "reconstruct" and (o.economy, o.task) != ("drop", "generate"),
     "--economy, --task: --objective reconstruct guesses what was never seen, and from nothing else; leave them out"),
    (lambda o: o.weighting != "plain" and o.predict != "both", "--weighting is about two heads: use --predict both"),
    (lambda o: o.targets is not None and not TASKS[o.task].exact, "--targets are maps to predict: use them with --task edges or saliency"),
    (lambda o: o.targets is not None and o.data == "faces", "--targets: the built-in faces have maps of their own; leave it out, or give --data"),
    (lambda o: TASKS[o.task].needs_map and o.targets is None and o.data != "faces", "--task saliency needs --targets: a folder or .zip of maps with the file stems of --data"),
    (lambda o: not 0 <= o.label_dropout <= 1, "--label-dropout must be in [0, 1]"),
    (lambda o: o.label_dropout != Options.label_dropout and not o.labels, "--label-dropout needs --labels"),
    (lambda o: not 0 < o.fraction <= 1, "--fraction must be in (0, 1]"),
    (lambda o: o.batch < 1 or (o.micro_batch is not None and o.micro_batch < 1), "--batch and --micro-batch must be at least 1"),
    (lambda o: o.steps is not None and o.steps < 1, "--steps must be at least 1"),
    (lambda o: o.minutes is not None and not positive(o.minutes), "--minutes must be positive"),
    (lambda o: o.save_every < 1 or o.sample_every < 1, "--save-every and --sample-every must be at least 1"),
    (lambda o: not (positive(o.lr) and positive(o.clip)), "--lr and --clip must be positive"),
    (lambda o: o.warmup < 0 or not 0 <= o.wd < math.inf, "--warmup and --wd must be at least 0"),
    (lambda o: not (0 <= o.ema < 1 and 0 <= o.beta1 < 1 and 0 <= o.beta2 < 1), "--ema, --beta1 and --beta2 must be in [0, 1)"),
    (lambda o: not 0 <= o.lr_end <= 1, "--lr-end must be in [0, 1]"),
    (lambda o: not 0 <= o.seed < 2**62, "--seed must be at least 0 and have less than 63 bits"),
    (lambda o: o.workers < 0 or o.threads < 0 or not 0 <= o.cache_gb < math.inf, "--workers, --threads and --cache-gb must be at least 0"),
]


def check(o):
    """Refuse, before any work, what cannot be: one table, one line each."""
    for refused, why in REFUSALS:
        if refused(o):
            raise UserError(why)


FREE = {"steps", "out", "resume", "save_every", "sample_every", "device", "threads", "workers", "cache_gb", "cache_latents", "latents", "compile", "checkpoint_blocks"}


def merge(options, given, stage):
    """The run's options from defaults and command line or, with --resume, from the run itself. -> (options, checkpoint or None).

    A resumed run keeps its own options: one that is given with another value is refused by name, unless it is in FREE."""
    o = options(**given)
    o = options(**settings(o.recipe, stage, given))
    out = Path(o.out) if o.out else newest().parent if o.resume and LATEST.exists() else Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    last = out / "last.pt"
    if not last.exists():
        if o.resume:
            print(f"nothing to continue in {out}: starting")
        return dataclasses.replace(o, out=str(out)), None
    if not o.resume:
        raise UserError(f"--out {out} already holds a run: add --resume to continue it, or give another --out")
    ckpt = read_checkpoint(last)
    if ckpt["meta"]["stage"] != stage:
        raise UserError(f"--resume: {out} was made by {ckpt['meta']['stage']}.py, not by {stage}.py; give the --out of the run to continue")
    for f in dataclasses.fields(options):
        was = ckpt["config"].get(f.name, f.default)                             # an option that is younger than the run had its default
        if f.name in given and f.name not in FREE and given[f.name] != was:
            raise UserError(f"{flag(f)} {given[f.name]}: the run in {out} has {was}; resume it without this flag "
                            f"(--steps makes it longer), or start another run with another --out")
    if o.steps is not None and o.steps < (ckpt["meta"]["plan"] or 0):
        raise UserError(f"--steps {o.steps}: the run in {out} has a plan of {ckpt['meta']['plan']} steps; a resumed run can only become longer")
    kept = ckpt["config"] | ({} if o.steps is None else dict(minutes=None))      # a number of steps replaces the clock
    return options(**(kept | {k: v for k, v in given.items() if k in FREE} | dict(out=str(out)))), ckpt


# --- one number that compares runs ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def validate(model, images, schedule, space, predict, device, amp, n=256, levels=8, task="generate"):
    """Denoising error on held-out images at fixed times and noise, all tokens visible: |x0_hat - x0|^2 in units of what a linear
    guess leaves unknown at that time (b^2 s^2 / V), averaged over `levels` equal steps of angle: 1 is as good as linear (an untrained
    `unit` model; other predictions start above). The only loss that compares mask ratios, and predictions, since x0_hat comes after `split`."""
    top = schedule.angle(schedule.start(predict))
    ts = schedule.time_at((torch.arange(levels, dtype=torch.float64) + 0.5) / levels * top)
    errors = []
    for lo in range(0, min(n, len(images)), 64):
        x, y = images.take(torch.arange(lo, min(lo + 64, n, len(images))))
        x, cond = pose(task, to_float(x).to(device), images.maps, space.factor, seeded(2, lo))
        z = space.encode(x)
        noise = schedule.noise(z.cpu(), seeded(1, lo)).to(device)
        t = ts[(lo + torch.arange(len(z))) % levels]
        zt = schedule.corrupt(z, noise, t)
        with amp():
            out = model(zt, t, y.to(device) if model.embed_class is not None else None, None, cond)
        x0, _ = schedule.split(out, zt, t, predict)
        known = (schedule.b(t) * schedule.s * schedule.scale(t)) ** 2
        errors.append(((x0 - z) ** 2).mean((1, 2, 3)).cpu().double() / known)
    return torch.cat(errors).mean().item()


# --- the order of the images ---------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of all n images in one epoch. seed: a tuple of whole numbers. -> (n,)"""
    return torch.randperm(n, generator=seeded(*seed, epoch))


def shard(n, seed, first, count):
    """Images number first ... first + count of an endless sequence of epochs, each a permutation of all n by itself. -> (count,)"""
    i = torch.arange(first, first + count)
    return torch.cat([permutation(n, seed, epoch)[i[i // n == epoch] % n] for epoch in range(first // n, (first + count - 1) // n + 1)])


# --- the run -------------------------------------------------------------------------------------------------------------------------

STAGES = ("train", "finetune")                                                  # each draws from streams of its own
TIMED = 20                                                                      # steps that are timed before --minutes becomes a plan
LOG_EVERY = 10
TOO_MANY = 20                                                                   # non-finite steps in a row that end a run


def network(o, channels, space, classes):
    """The options of the ViT that options `o` ask for: images of `channels`, in a space (its .channels and .factor), with so many classes."""
    return dict(channels=space.channels, heads_out=SCHEDULES[o.schedule].heads(o.predict), patch=o.patch, skips=o.skips, decoder=o.decoder,
                economy=o.economy, classes=classes, cond_channels=TASKS[o.task].channels(channels) * space.factor ** 2, **MODELS[o.model])


def train(o, ckpt=None, first=None, stage="train"):
    """Train with options `o`. ckpt: a checkpoint to continue exactly. first: (state dict, meta) of a first stage to start from."""
    check(o)
    if o.objective == "reconstruct":
        o = dataclasses.replace(o, predict="x0")
    if o.dry_run:
        return print(report(o, network, f"{stage}.py", sys.argv[1:]))
    machine = start_machine(o.device, o.threads)
    rank, world, device = machine.rank, machine.world, machine.device
    micro = o.micro_batch or max(1, o.batch // world)
    if o.batch % (micro * world):
        raise UserError(f"--batch {o.batch} cannot be cut into {world} process(es) x --micro-batch {micro}: it must be a multiple of {micro * world}")
    accumulate = o.batch // (micro * world)                                     # shards per process
    dtype = amp_type(o.amp, device)
    amp = lambda: torch.autocast(device.type, dtype) if dtype else nullcontext()

    # Data: every process knows the same images in the same order; held-out ones never enter training.
    loading = dict(seed=o.seed, cache_gb=o.cache_gb / machine.local_world, progress=rank == 0)
    loading["targets"] = o.targets or (TASKS[o.task].exact if o.data == "faces" else None)
    images, held_out = holdout(load_images(o.data, o.size, o.gray, o.labels, **loading), o.val, **loading)
    if o.fraction < 1:
        images = images.subset(torch.randperm(len(images), generator=seeded(o.seed, 7))[:max(1, round(o.fraction * len(images)))])
    classes = list(images.classes) if o.labels else []

    # Model: all that a reader of the checkpoint needs to rebuild it is in meta.
    torch.manual_seed(o.seed)
    space = build(ckpt["meta"])[2] if ckpt else SPACES[o.space](images.channels, o.vae)
    if o.size % (space.factor * o.patch):
        raise UserError(f"--size {o.size}: must be a multiple of {space.factor * o.patch}, the autoencoder's factor {space.factor} times --patch {o.patch}")
    if first and space.sha != first[1]["vae_sha"]:
        raise UserError(f"--vae {o.vae}: is not the autoencoder of the first stage; its SHA-256 begins with {space.sha}, not {first[1]['vae_sha']}")
    h = w = o.size // space.factor // o.patch
    ratio_of = lambda progress: ratio_at(o.ramp, progress, o.mask if o.mask_from is None else o.mask_from, o.mask, share=o.ramp_share)
    if o.objective == "reconstruct" and visible_count(h * w, min(ratio_of(0), ratio_of(1))) == h * w:
        raise UserError(f"--mask, --mask-from: {min(ratio_of(0), ratio_of(1))} hides none of {h * w} tokens, and --objective reconstruct needs one")
    shown, _ = held_out.take(torch.arange(min(len(held_out), 8)))               # as pictures, for the grid of a reconstruction
    if o.space == "latent" and o.cache_latents and o.task == "generate":   # (a condition is made of pixels)
        (images, held_out), space = encode_once([images, held_out], space, o.latents, o.flip, device, o.workers)
    if ckpt:
        meta = ckpt["meta"]
    else:
        some, _ = images.take(torch.arange(min(len(images), 1024)))
        some, _ = pose(o.task, to_float(some), images.maps, g=seeded(o.seed, 8))                # what diffusion runs on: its size is measured
        same_kind = first and TASKS[first[1].get("task", "generate")].exact == TASKS[o.task].exact     # pictures then and now, or one kind of map
        meta = dict(stage=stage, objective=o.objective, recon_target=o.recon_target, ratio=o.mask,
                    schedule=o.schedule, predict=o.predict, space=o.space, task=o.task, channels=images.channels, size=o.size, classes=classes, vae=o.vae, vae_sha=space.sha,
                    data_std=first[1]["data_std"] if same_kind else space.encode(some).double().square().mean().sqrt().item(),
                    model=network(o, images.channels, space, len(classes)), plan=None, skipped=0, shards=world * accumulate)
    net, schedule, whole_space = build(meta)                                    # with an encoder, whatever `space` has instead
    if first:
        fit(net, first[0], first[1]["classes"], classes)
    net.checkpoint_blocks = o.checkpoint_blocks
    net.to(device)
    averaged = copy.deepcopy(net).eval().requires_grad_(False)                  # the EMA is a model of its own: it is what gets sampled
    objective = OBJECTIVES[o.objective](schedule, o.predict, o.patch, o.weighting, o.recon, o.recon_target, ECONOMIES[o.economy].all_scored)
    optimizer = torch.optim.AdamW(net.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), weight_decay=o.wd, fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, seconds, skipped = 0, 0.0, meta["skipped"]
    if ckpt:
        net.load_state_dict(ckpt["model"])
        averaged.load_state_dict(ckpt["ema"])
        optimizer.load_state_dict(ckpt["optimizer"])
        scaler.load_state_dict(ckpt["scaler"])
        torch.set_rng_state(ckpt["rng"])                                        # ours need none: this is for your own dropout
        step, seconds = ckpt["step"], ckpt["seconds"]
    if o.compile:
        for block in net.all_blocks():
            block.compile(dynamic=False)
    model = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None) if world > 1 else net

    # The plan: how many steps the run has. --minutes becomes one after a few timed steps.
    plan = o.steps or meta["plan"]
    minutes = o.minutes or (None if o.steps else 4.0)
    when = o.time_sampling if o.objective == "denoise" else "zero"              # a reconstruction has no time: t = 0, where x_t is the image
    out = Path(o.out)

    def save(numbered):
        save_atomic(dict(version=VERSION, config=dataclasses.asdict(o), meta=meta | dict(plan=plan, skipped=skipped), step=step, images=step * o.batch, seconds=seconds,
                         model=net.state_dict(), ema=averaged.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                         rng=torch.get_rng_state()), out / "last.pt")
        if numbered:
            keep_copy(out / "last.pt", out / f"{step:06d}.pt")
        name_newest(out)

    def evaluate():
        """Validation loss, and a grid of samples on fixed noise (of reconstructions), both from the averaged weights."""
        loaded = Loaded(averaged, schedule, space, o.predict, meta, device)
        if o.objective == "reconstruct":
            if o.recon_target == "clean":                                       # of whitened patches there is no picture
                picture(reconstruct(dataclasses.replace(loaded, space=whole_space), to_float(shown), o.mask)).save(out / "samples" / f"{step:06d}.png")
            errors = masked_errors(loaded, held_out)
            return sum(errors.values()) / len(errors)
        path = out / "samples" / f"{step:06d}.png"
        if o.task == "generate":
            grid(to_uint8(sample(loaded, 16, 10, labels=torch.arange(16) % len(classes) if classes else None, amp=dtype))).save(path)
        else:                                                                   # condition | result | target of held-out images, and how good
            task, few = TASKS[o.task], min(64, len(held_out))
            x, y = held_out.take(torch.arange(few))
            truth, cond = pose(o.task, to_float(x), images.maps, g=seeded(3))
            result = restore(loaded, cond, steps=10, labels=y if classes else None, amp=dtype)
            grid(strip(cond[:12], result[:12], truth[:12]), 9).save(path)
            tqdm.write("  ".join(f"{name} {score(result, truth, cond):.3f} (without a network {score(task.plain(cond), truth, cond):.3f})"
                                 for name, score in task.scores.items()) + f", {few} held-out images, 10 calls")
        return validate(averaged, held_out, schedule, space, o.predict, device, amp, task=o.task)

    looked = 0.0                                                                # seconds that one look at the model costs: for the plan
    if rank == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(o) | dict(stage=stage), indent=1))
        log = open_log(out / "log.csv", step)
        counts = sorted({visible_count(h * w, ratio_of(i / 1000)) for i in range(1001)})
        print(f"{len(images)} images of {o.data} at {o.size} px ({len(held_out)} held out); {o.model} model, "
              f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters\n"
              f"{h * w} tokens, visible: {', '.join(map(str, counts))}; batch {o.batch} = {world} process(es) x {accumulate} x {micro}; "
              f"{device.type}, {str(dtype or torch.float32)[6:]}, {torch.get_num_threads()} threads\n"
              f"run folder {out}" + (f", continued at step {step}" if ckpt else ""), flush=True)
        if ckpt and meta["shards"] != world * accumulate:
            print(f"note: this run began with {meta['shards']} shards per step, now {world * accumulate}: the same law, not the same numbers")
        if step == 0:
            tick = time.monotonic()
            log.write(f"0,0,0,,{evaluate():.6g},0,{ratio_of(0):.6g},{visible_count(h * w, ratio_of(0))},0\n")
            looked = time.monotonic() - tick

    stop = []                                                                   # the signal that asked for the end, if any did

    def ask_to_stop(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)                                   # a second Ctrl-C ends the program at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    in_a_row, durations, ended = 0, [], False
    logged, counted, loss_sum = step, 0, torch.zeros((), device=device)         # since the last line of the log; summed on the device
    begun = time.monotonic() - seconds
    since = time.monotonic()
    stream = STAGES.index(stage)
    batches = images.batches((shard(len(images), (o.seed, stream), k * o.batch + (rank * accumulate + j) * micro, micro)
                              for k in itertools.count(step) for j in range(accumulate)), o.workers)
    bar = tqdm(total=plan, initial=step, desc=stage, unit="step", disable=None if rank == 0 else True, dynamic_ncols=True)

    while not ended and (plan is None or step < plan):
        tick = time.monotonic()
        progress = step / plan if plan else 0.0
        ratio = ratio_of(progress)
        warm = min(o.warmup, plan // 10 if plan else o.warmup)
        lr = o.lr * min(1.0, (step + 1) / (warm + 1)) * (o.lr_end + (1 - o.lr_end) * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss_now = 0.0
        for j in range(accumulate):
            x, y = next(batches)
            g = torch.Generator(device).manual_seed(seeded(o.seed, stream, step, rank * accumulate + j).initial_seed())
            coin = lambda p: torch.rand(len(x), generator=g, device=device) < p                                      # (B,)
            x = to_float(x.to(device, non_blocking=True))
            x = torch.where(coin(0.5)[:, None, None, None], x.flip(3), x) if o.flip else x
            y = torch.where(coin(o.label_dropout), -1, y.to(device)) if classes else None
            x, cond = pose(o.task, x, images.maps, space.factor, g)         # tasks.py      what is predicted, and from what
            # Gradients are averaged over processes once per step: the last shard's forward and backward do it, the others must not.
            with model.no_sync() if world > 1 and j < accumulate - 1 else nullcontext():
                with amp():
                    z = space.encode(x)                                         # vae.py        pixels or latents
                    m = draw(o.policy, len(z), h, w, ratio, g, o.block)         # mask.py       which tokens are seen
                    n = schedule.noise(z, g)                                    # schedules.py  eps, and DDM's random slopes
                    t = times(when, schedule, len(z), g)                        #               when, in [0, 1]
                    zt = schedule.corrupt(z, n, t)                              # schedules.py  a(t) z + b(t) eps
                    guess = model(zt, t, y, m, cond)                            # vit.py        tokens in, image-shaped out
                loss = objective(guess, z, n, t, m)                             # losses.py     score matching on the visible
                scaler.scale(loss / accumulate).backward()
            loss_now = loss_now + loss.detach() / accumulate

        scaler.unscale_(optimizer)
        gradients = [q.grad for q in net.parameters() if q.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm().item()        # of the averaged gradient, so the same on every rank:
        if math.isfinite(norm):                                                 # all ranks skip a bad step, or none does
            if norm > o.clip:                                                   # (clip_grad_norm_ multiplies by 1 otherwise: 5 % of a masked step)
                torch._foreach_mul_(gradients, o.clip / norm)
            scaler.step(optimizer)
            torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), 1 - min(o.ema, (1 + step) / (10 + step)))
            loss_sum, counted, in_a_row = loss_sum + loss_now, counted + 1, 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds = time.monotonic() - begun
        bar.update()
        if in_a_row >= TOO_MANY:
            raise UserError(f"the last {TOO_MANY} gradients, up to step {step}, were not finite: try a smaller --lr or --amp off")

        durations.append(time.monotonic() - tick)
        if plan is None and len(durations) == TIMED:
            # A ramp changes the cost of a step: count it as proportional to the visible tokens, plus all tokens of the light decoder, plus a little.
            size = MODELS[o.model]
            light = o.decoder * size["decoder_width"] ** 2 / (size["depth"] * size["width"] ** 2)
            cost = lambda p: visible_count(h * w, ratio_of(p)) + h * w * (light + 1 / 16)
            each = sorted(durations)[TIMED // 2] * sum(cost(i / 100) for i in range(101)) / 101 / cost(0)
            left = (60 * minutes - seconds - looked) / (each + looked / o.sample_every)
            plan = step + max(1, int(machine.from_first(left)))
            bar.total = plan
        if world == 1 or step % LOG_EVERY == 0:
            ended = bool(machine.reduce(bool(stop) or (minutes is not None and rank == 0 and seconds > 66 * minutes), dist.ReduceOp.MAX))
        ended = ended or step == plan

        look, keep = step % o.sample_every == 0 or ended, step % o.save_every == 0
        if step % LOG_EVERY == 0 or look or keep:                               # a checkpoint falls on a line of the log: nothing is summed over it
            mean = machine.reduce(float(loss_sum)) / world / counted if counted else math.nan
            speed = (step - logged) * o.batch / (time.monotonic() - since)
            if rank == 0:
                value = evaluate() if look else None
                log.write(",".join([str(step), f"{seconds:.2f}", str(step * o.batch), f"{mean:.6g}", f"{value:.6g}" if look else "", f"{lr:.6g}",
                                    f"{ratio:.6g}", str(visible_count(h * w, ratio)), f"{speed:.4g}"]) + "\n")
                bar.set_postfix(loss=f"{mean:.4f}", img_s=f"{speed:.0f}")
                if look:
                    draw_loss(out / "log.csv", out / "loss.png")
                    tqdm.write(f"step {step}/{plan}: loss {mean:.4f}, val_loss {value:.4f}, {speed:.0f} images/s" + (f", {skipped} steps skipped" if skipped else ""))
            logged, counted, loss_sum, since = step, 0, torch.zeros((), device=device), time.monotonic()
        if rank == 0 and (keep or ended):
            save(numbered=keep)

    bar.close()
    if rank == 0:
        log.close()
        made = [str(p) for p in (out / "last.pt", out / "loss.png", out / "samples" / f"{step:06d}.png") if p.exists()]
        print(f"{'finished' if step == plan else 'stopped'} at step {step} of {plan or 'a plan not made yet'} after {seconds / 60:.1f} minutes: {', '.join(made)}")
    if world > 1:
        dist.destroy_process_group()
    if stop:
        raise SystemExit(128 + stop[0])                                         # what a shell expects of a program ended by a signal
    return out


def fit(net, weights, classes_there, classes_here):
    """Load a first stage's weights. Classes keep their embedding by name; inputs that the first stage did not have (other classes, a
    condition of another shape) start fresh. UserError when anything else differs."""
    mine = net.state_dict()
    weights = {k: v for k, v in weights.items() if k in mine or not k.startswith(("embed_class", "embed_cond"))}
    if "embed_cond.weight" in weights and weights["embed_cond.weight"].shape != mine["embed_cond.weight"].shape:
        del weights["embed_cond.weight"]                                        # of another task
    if "embed_class.weight" in weights:
        rows = mine["embed_class.weight"].clone()
        for i, name in enumerate(classes_here):
            if name in classes_there:
                rows[i] = weights["embed_class.weight"][classes_there.index(name)]
        weights["embed_class.weight"] = rows
    shape = lambda tensors, k: tuple(tensors[k].shape) if k in tensors else "nothing"
    wrong = [f"{k} is {shape(weights, k)} there and {shape(mine, k)} here" for k in sorted(mine | weights)
             if shape(weights, k) != shape(mine, k) and not (k not in weights and k.startswith(("embed_class", "embed_cond")))]
    if wrong:
        raise UserError(f"the checkpoint's network does not fit the options: {wrong[0]}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
                        + "; channels (--gray) and random slopes (--schedule) must stay as they were")
    net.load_state_dict(mine | weights)


def resume(o, ckpt, stage):
    """Continue a run, unless its plan is fulfilled (so that torchrun --max-restarts may repeat the command)."""
    if ckpt["step"] >= (o.steps or ckpt["meta"]["plan"] or math.inf):
        print(f"{o.out} is finished: {ckpt['step']} steps; a larger --steps continues it")
    else:
        train(o, ckpt, stage=stage)


def main(argv=None):
    given = vars(make_parser(Options, __doc__.split("\n")[0]).parse_args(argv))
    o, ckpt = merge(Options, given, "train")
    if ckpt:
        resume(o, ckpt, "train")
    else:
        train(o)


if __name__ == "__main__":
    run(main)
