"""Options: what can be asked of a run, and what is refused before any work.

The idea. One frozen dataclass holds the options: a field is a default and a line of help, argparse is made from it, and `choices` is the
registry itself, so that a new schedule or policy is on the command line the moment it exists. The ideas of the papers are orthogonal and
go together without a branch on a pair; the few pairs that mean nothing stand in one table, REFUSALS, with the reason and what to do instead.

    given = vars(make_parser(Options, "...").parse_args())        only what was on the command line
    o, ckpt = merge(Options, given, "train")                      defaults < recipe < command line; with --resume the run's own
    check(o)                                                      the first refusal that applies is raised, in one line
"""
import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from plumbing.checkpoint import LATEST, newest_checkpoint, read_checkpoint
from plumbing.console import UserError, build_parser
from losses import OBJECTIVES, RECON_TARGETS, WEIGHTS
from mask import POLICIES, RATIOS
from running.recipes import RECIPES, recipe_options
from schedules import PREDICTIONS, SCHEDULES, TIMES
from tasks import TASKS, ZOOM
from vit import ECONOMIES, MODELS
from spaces import SPACES


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


def flag_name(f):
    """The command line's name of a field of Options."""
    return "--" + (f.metadata["name"] or f.name).replace("_", "-")


def options_parser(options, description, inherited=()):
    """An argument parser with one flag per field; a field that is not given stays absent, so that "given" can be told from "default".
    inherited: the fields whose default is the first stage's value."""
    parser = build_parser(description, argument_default=argparse.SUPPRESS, formatter_class=argparse.HelpFormatter)
    for f in dataclasses.fields(options):
        kind, choices, default = f.metadata["kind"], f.metadata["choices"], "the first stage's" if f.name in inherited else f.default
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, choices=choices and list(choices))
        parser.add_argument(flag_name(f), dest=f.name, help=f"{f.metadata['help']} (default: {default})", **how)
    return parser


def is_positive(x):
    return 0 < x < math.inf


REFUSALS = [                                                                    # (is refused, why and what to do); NaN is never in a range
    (lambda o: o.data is None and not o.dry_run, "--recipe needs its paper's images: --data PATH (maskdm CelebA-HQ, maskdit and lmd ImageNet, ddm CIFAR-10)"),
    (lambda o: not 0 <= o.mask < 1, "--mask must be in [0, 1): the share of hidden tokens"),
    (lambda o: o.mask_from is not None and not 0 <= o.mask_from < 1, "--mask-from must be in [0, 1)"),
    (lambda o: o.ramp != "constant" and o.mask_from is None, "--ramp needs --mask-from, the share it starts at"),
    (lambda o: o.ramp == "constant" and o.mask_from is not None, "--mask-from needs a --ramp that is not constant"),
    (lambda o: o.ramp_share is not None and not 0 < o.ramp_share <= 1, "--ramp-share must be in (0, 1]"),
    (lambda o: o.ramp_share is not None and o.ramp == "constant", "--ramp-share is the length of a ramp: it needs --ramp"),
    (lambda o: o.policy != Options.policy and not (o.mask or o.mask_from), "--policy says which tokens are hidden: it needs --mask; without one, --policy patch"),
    (lambda o: o.economy == "route" and not (o.mask or o.mask_from) and not hasattr(o, "from_"),   # the second stage has its first one's network
     "--economy route needs --mask: there is nothing hidden to route around the blocks"),
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
    (lambda o: o.recon_target != "clean" and o.gray and o.patch == 1 and o.space == "pixel", "--recon-target noisy and whitened measure the contrast of a patch: one gray pixel has none"),
    (lambda o: o.skips and not ECONOMIES[o.economy].skips, "--skips: a long skip would join blocks that see different tokens with this --economy (route); leave one out"),
    (lambda o: o.recon_target != Options.recon_target and not o.recon and o.objective == "denoise", "--recon-target needs --recon, the weight of the reconstruction"),
    (lambda o: o.objective == "reconstruct" and (o.economy, o.task) != ("drop", "generate"),
     "--economy, --task: --objective reconstruct guesses what was never seen, and from nothing else; leave them out"),
    (lambda o: o.objective == "reconstruct" and not o.decoder, "--objective reconstruct needs --decoder: without one, hidden patches have no output"),
    (lambda o: o.objective == "reconstruct" and not (o.mask and o.mask_from != 0), "--objective reconstruct needs --mask (and --mask-from) above 0: something must be hidden"),
    (lambda o: o.objective == "reconstruct" and o.recon, "--recon weighs reconstruction beside denoising: --objective reconstruct is nothing else, leave it out"),
    (lambda o: o.objective == "reconstruct" and o.recon_target == "noisy", "--recon-target noisy: --objective reconstruct has no noise; take clean or whitened"),
    (lambda o: o.objective == "reconstruct" and o.predict not in (Options.predict, "x0"), "--predict: --objective reconstruct guesses the patches themselves; leave it out"),
    (lambda o: o.objective == "reconstruct" and (o.schedule, o.time_sampling, o.weighting) != (Options.schedule, Options.time_sampling, Options.weighting),
     "--schedule, --time-sampling and --weighting are about noise: --objective reconstruct has none, leave them out"),
    (lambda o: o.weighting != "plain" and o.predict != "both", "--weighting is about two heads: use --predict both"),
    (lambda o: o.task == "superres" and o.size % ZOOM, f"--task superres enlarges by {ZOOM}: --size must be a multiple of {ZOOM}"),
    (lambda o: o.space != "latent" and (not o.cache_latents or o.latents != Options.latents), "--latents and --no-cache-latents are about --space latent"),
    (lambda o: o.task != "generate" and o.latents != Options.latents, "--latents: with a --task nothing is kept, its conditions are made of pixels"),
    (lambda o: o.targets is not None and not TASKS[o.task].exact, "--targets are maps to predict: use them with --task edges or saliency"),
    (lambda o: o.targets is not None and o.data == "faces", "--targets: the built-in faces have maps of their own; leave it out, or give --data"),
    (lambda o: TASKS[o.task].needs_map and o.targets is None and o.data != "faces", "--task saliency needs --targets: a folder or .zip of maps with the file stems of --data"),
    (lambda o: not 0 <= o.label_dropout <= 1, "--label-dropout must be in [0, 1]"),
    (lambda o: o.label_dropout != Options.label_dropout and not o.labels, "--label-dropout needs --labels"),
    (lambda o: not 0 < o.fraction <= 1, "--fraction must be in (0, 1]"),
    (lambda o: o.batch < 1 or (o.micro_batch is not None and o.micro_batch < 1), "--batch and --micro-batch must be at least 1"),
    (lambda o: o.steps is not None and o.steps < 1, "--steps must be at least 1"),
    (lambda o: o.minutes is not None and not is_positive(o.minutes), "--minutes must be positive"),
    (lambda o: o.save_every < 1 or o.sample_every < 1, "--save-every and --sample-every must be at least 1"),
    (lambda o: not (is_positive(o.lr) and is_positive(o.clip)), "--lr and --clip must be positive"),
    (lambda o: o.warmup < 0 or not 0 <= o.wd < math.inf, "--warmup and --wd must be at least 0"),
    (lambda o: not (0 <= o.ema < 1 and 0 <= o.beta1 < 1 and 0 <= o.beta2 < 1), "--ema, --beta1 and --beta2 must be in [0, 1)"),
    (lambda o: not 0 <= o.lr_end <= 1, "--lr-end must be in [0, 1]"),
    (lambda o: not 0 <= o.seed < 2**62, "--seed must be at least 0 and have less than 63 bits"),
    (lambda o: o.workers < 0 or not 0 <= o.cache_gb < math.inf, "--workers and --cache-gb must be at least 0"),
    (lambda o: not 0 <= o.threads <= 1024, "--threads must be 0 (torch's own choice) to 1024"),
]


def check(o):
    """Refuse, before any work, what cannot be: one table, one line each."""
    for refused, why in REFUSALS:
        if refused(o):
            raise UserError(why)


MAY_CHANGE = {"steps", "out", "resume", "save_every", "sample_every", "device", "threads", "workers", "cache_gb", "cache_latents", "latents", "compile", "checkpoint_blocks",
        "vae"}                                                                  # wherever it lies now: its hash says whether it is the one


def is_same_value(one, other):
    """Whether two values of an option are one, or two spellings of one file or folder."""
    return one == other or (isinstance(one, str) and isinstance(other, str) and Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def resolve_options(options, given, stage):
    """The run's options from defaults and command line or, with --resume, from the run itself. -> (options, checkpoint or None).

    A resumed run keeps its own options: one that is given with another value is refused by name, unless it is in FREE. A new run
    without --out has none yet: `checkpoint.claim` names it."""
    o = options(**given)
    o = options(**recipe_options(o.recipe, stage, given))                             # under what was given lies the recipe, under it the defaults
    out = Path(o.out) if o.out else newest_checkpoint().parent if o.resume and LATEST.exists() else None
    last = out and out / "last.pt"
    if not (last and last.exists()):
        if o.resume:
            print(f"nothing to continue{f' in {out}' if out else ''}: starting")
        return dataclasses.replace(o, out=out and str(out)), None
    if not o.resume:
        raise UserError(f"--out {out} already holds a run: add --resume to continue it, or give another --out")
    ckpt = read_checkpoint(last)
    if ckpt["meta"]["stage"] != stage:
        raise UserError(f"--resume: {out} was made by {ckpt['meta']['stage']}.py, not by {stage}.py; give the --out of the run to continue")
    for f in dataclasses.fields(options):
        was = ckpt["config"].get(f.name, f.default)                             # an option that is younger than the run had its default
        if f.name in given and f.name not in MAY_CHANGE and not is_same_value(given[f.name], was):
            raise UserError(f"{flag_name(f)} {given[f.name]}: the run in {out} has {was}; resume it without this flag "
                            f"(--steps makes it longer), or start another run with another --out")
    steps = given.get("steps")                                                  # o.steps may be the recipe's
    if steps is not None and steps < (ckpt["meta"]["plan"] or 0):
        raise UserError(f"--steps {steps}: the run in {out} has a plan of {ckpt['meta']['plan']} steps; a resumed run can only become longer")
    kept = ckpt["config"] | dict(vae=ckpt["meta"]["vae"]) | ({} if steps is None else dict(minutes=None))      # a number of steps replaces the clock
    return options(**(kept | {k: v for k, v in given.items() if k in MAY_CHANGE} | dict(out=str(out)))), ckpt
