"""Options: what can be asked of a run, and what is refused before any work.

The idea. One frozen dataclass holds the options: a field is a topic, a default and a line
of help. The argument parser is made from it, and `choices` is the registry itself. So a new
schedule or policy is on the command line as soon as it is in its registry. The ideas of the
papers are independent and go together without a branch on a pair. The few pairs that mean
nothing are refused below, one function a topic, each with the reason and what to do
instead.

    given = vars(options_parser(Options, "...").parse_args())   what the command line holds
    o, ckpt = resolve_options(Options, given, "train")          the options of the run
    check(o)                                                    UserError: the first refusal
"""
import argparse
import dataclasses
import json
import math
import numbers
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from losses import OBJECTIVES, RECON_TARGETS, WEIGHTS
from mask import POLICIES, RATIOS
from plumbing.checkpoint import (
    CONTINUED, LATEST, find_last, newest_checkpoint, read_checkpoint)
from plumbing.console import UserError, build_parser, parse_path
from plumbing.downloads import list_published
from running.recipes import RECIPES, recipe_options
from sample import require_same_meaning
from schedules import PREDICTIONS, SCHEDULES, TIMES
from spaces import SPACES
from tasks import TASKS, ZOOM
from vit import ECONOMIES, MODELS

# --- the options --------------------------------------------------------------------------

TOPICS = {                                                                # in the order of --help
    "data": "the images, and the space in which they are worked on",
    "network": "the transformer",
    "mask": "which tokens are hidden, how many, and what becomes of them",
    "noise": "how images are destroyed, and what the network says about it",
    "task": "what is learned, and from what",
    "optimisation": "how long, how fast, in which steps",
    "run": "recipes, machine, files",
}


def option(
    topic,          # a name in TOPICS
    default,
    help,
    kind=None,      # the type, where the default does not tell it
    choices=None,   # a registry, or a tuple of names
    before=None,    # what runs that are older than the option did, where the default differs
    explain=False,  # whether --help lists the first line that each entry of the registry says
    name=None,      # the flag, where it is not the field's name
    metavar=None,   # what --help calls the value, where the type does not tell it
):
    """A field of Options."""
    about = dict(topic=topic, help=help, kind=kind or type(default), choices=choices,
                 before=default if before is None else before)
    shown = dict(explain=explain, name=name, metavar=metavar)
    return field(default=default, metadata=about | shown)


@dataclass(frozen=True)
class Options:
    """All options of a run, topic by topic."""
    stage: ClassVar[str] = "train"                     # the script that reads them; no option
    default_minutes: ClassVar[float] = 4.0             # without --minutes and --steps

    data: str = option(
        "data", "faces", "images: a folder, a .zip, cifar-10-python.tar.gz, faces (drawn by "
        f"data.py), or a name that is downloaded: {list_published('data')}")
    val: str = option(
        "data", "auto", "held-out images: a fraction of --data, or a path; auto: the folder val/ "
        "where --data holds exactly train/ and val/, else 0.02", before="0.02")
    size: int = option("data", 32, "images are cropped square and resized to this side")
    fraction: float = option(
        "data", 1.0, "share of the training images that is used, in (0, 1]")
    gray: bool = option("data", False, "one channel instead of three")
    flip: bool = option("data", True, "mirror half of the images")
    cache_gb: float = option(
        "data", 4.0, "decoded images are kept in memory up to this size, all processes of a "
        "machine together")
    workers: int = option(
        "data", 2, "processes that decode images when they do not fit in memory")
    space: str = option("data", "pixel", "where diffusion happens", choices=SPACES)
    vae: str = option(
        "data", None, "weights of the autoencoder for --space latent: from python vae.py, "
        f"Stable Diffusion's, or a name that is downloaded: {list_published('vae')}", kind=str)
    cache_latents: bool = option(
        "data", True, "with --space latent: encode every image once and keep the latents on disk")
    latents: str = option("data", "runs/latents", "folder of the kept latents")

    model: str = option("network", "tiny", "size of the network", choices=MODELS)
    patch: int = option("network", 4, "side of a token")
    skips: bool = option(
        "network", False, "long skip connections (U-ViT, the network of MaskDM)")
    decoder: int = option(
        "network", 0, "blocks of the light decoder on all tokens (MaskDiT); 0 for none")

    mask: float = option("mask", 0.0, "share of the tokens that is hidden, in [0, 1)")
    mask_from: float = option("mask", None, "share at the start of a ramp", kind=float)
    ramp: str = option(
        "mask", "constant", "how the share goes from --mask-from to --mask", choices=RATIOS,
        explain=True)
    policy: str = option(
        "mask", "patch", "which tokens are hidden", choices=POLICIES, explain=True)
    block: int = option("mask", 4, "side of the squares of --policy block, in tokens")
    economy: str = option(
        "mask", "drop", "what becomes of hidden tokens", choices=ECONOMIES, explain=True)

    schedule: str = option(
        "noise", "ddm", "how the image fades and the noise grows", choices=SCHEDULES,
        explain=True)
    predict: str = option(
        "noise", "both", "what the network predicts", choices=PREDICTIONS, explain=True)
    precondition: str = option(
        "noise", "patch", "what the network adds to: the best linear guess about each patch from "
        "itself, or nothing", choices=("patch", "none"), before="none")
    weighting: str = option(
        "noise", "plain", "weights of the two heads of --predict both", choices=WEIGHTS,
        explain=True)
    time_sampling: str = option(
        "noise", "mixed", "how training times are drawn", choices=TIMES, explain=True)

    objective: str = option(
        "task", "denoise", "what is learned", choices=OBJECTIVES, explain=True)
    recon: float = option(
        "task", 0.0, "weight of reconstructing hidden patches (MaskDiT: 0.1); needs --decoder "
        "and --mask")
    recon_target: str = option(
        "task", "clean", "what is reconstructed", choices=RECON_TARGETS, explain=True)
    task: str = option(
        "task", "generate", "what is predicted, and from what: a task other than generate has a "
        "condition", choices=TASKS, explain=True)
    targets: str = option(
        "task", None, "maps for --task edges or saliency: a folder or .zip with the file stems "
        "of --data; the built-in faces have their own", kind=str)
    labels: bool = option("task", False, "condition on a class per first-level folder")
    label_dropout: float = option(
        "task", 0.1, "share of the labels dropped, for guidance; used with --labels")

    steps: int = option(
        "optimisation", None, "number of steps; --minutes decides when left out", kind=int)
    minutes: float = option(
        "optimisation", None, f"length of the run; {default_minutes:g} when neither this nor "
        "--steps is given", kind=float)
    optimizer: str = option(
        "optimisation", "muon", "how gradients become steps: muon orthogonalises those of the "
        "blocks' matrices (plumbing/muon.py), the rest has adamw", choices=("adamw", "muon"),
        before="adamw")
    batch: int = option("optimisation", 64, "images per step, over all processes")
    micro_batch: int = option(
        "optimisation", None, "images per forward pass; the rest is accumulated", kind=int)
    lr: float = option(
        "optimisation", 2e-3, "peak learning rate; for the tiny model, larger ones want less "
        "(DiT-XL: 1e-4)")
    warmup: int = option(
        "optimisation", 200, "steps of linear warm-up, at most a tenth of the run")
    lr_end: float = option(
        "optimisation", 0.05, "the cosine decay ends at this share of --lr; 1 keeps it constant")
    beta1: float = option("optimisation", 0.9, "AdamW: decay of the gradient's mean")
    beta2: float = option("optimisation", 0.99, "AdamW: decay of the gradient's mean square")
    wd: float = option("optimisation", 0.01, "weight decay")
    clip: float = option("optimisation", 1.0, "largest norm of the gradient")
    ema: float = option(
        "optimisation", 0.999, "decay of the averaged weights, reached by "
        "min(decay, (1 + step) / (10 + step))")
    amp: str = option(
        "optimisation", "auto", "mixed precision; auto: bf16 where the hardware has it",
        choices=("auto", "bf16", "fp16", "off"))

    recipe: str = option(
        "run", None, "a paper's own settings at its own scale (running/recipes.py); any flag "
        "beside it wins", kind=str, choices=RECIPES)
    compile: bool = option(
        "run", False, "torch.compile every block: a minute to start (several with a ramp), then "
        "faster steps; on CPUs it needs a C++ compiler")
    checkpoint_blocks: bool = option(
        "run", False, "recompute blocks in the backward pass: less memory, a third slower")
    seed: int = option("run", 0, "seed of all random draws")
    device: str = option("run", "auto", "auto, cpu, cuda, mps", metavar="NAME")
    threads: int = option(
        "run", 0, "CPU threads per process; 0: cores divided by processes under torchrun, else "
        "torch's own choice")
    dry_run: bool = option(
        "run", False, "print parameters, tokens, GFLOP, memory and the command for 8 GPUs, and end")
    out: str = option("run", None, "folder of the run; runs/DATE-TIME when left out", kind=str)
    resume: bool = option(
        "run", False, "continue --out (or the newest run) if it has a checkpoint")
    save_every: int = option("run", 2000, "steps between checkpoints")
    keep: int = option(
        "run", 0, "only so many numbered checkpoints stay, the newest; 0: all. last.pt stays")
    sample_every: int = option("run", 500, "steps between sample grids and validation losses")


# --- the command line ---------------------------------------------------------------------

METAVARS = {int: "N", float: "X", str: "PATH"}


class TopicFormatter(argparse.HelpFormatter):
    """Help that keeps its line breaks: an entry of a registry stands on a line of its
    own."""

    def _split_lines(self, text, width):
        lines = []
        for line in text.splitlines():
            deeper = "    " if line.startswith("  ") else ""
            lines += textwrap.wrap(line, width, subsequent_indent=deeper, break_on_hyphens=False)
        return lines


def flag_name(f):
    """The command line's name of a field of Options."""
    return "--" + (f.metadata["name"] or f.name).replace("_", "-")


def describe_entry(entry, registry):
    """What an entry of a registry says of itself: the first sentence of its `doc`, else of
    its docstring, where that is its own. Instances of one class share one, so it tells
    nothing."""
    text = getattr(entry, "doc", None)
    if text is None:
        is_shared = sum(other.__doc__ == entry.__doc__ for other in registry.values()) > 1
        text = "" if is_shared else entry.__doc__ or ""
    return text.strip().split("\n")[0].split(". ")[0].rstrip(".")


def describe_option(f, default):
    """The help of a field: its line, its default, and the entries of its registry."""
    choices = f.metadata["choices"] or ()
    lines = [f"{f.metadata['help']} (default: {default})"]
    told = {}
    if f.metadata["explain"]:
        told = {name: describe_entry(entry, choices) for name, entry in choices.items()}
    if any(told.values()):
        lines += [f"  {name}: {text}".rstrip(": ") for name, text in told.items()]
    elif choices:
        lines += ["  " + ", ".join(choices)]
    return "\n".join(lines).replace("%", "%%")                               # argparse formats it


def options_parser(options, description, inherited=()):
    """An argument parser with one flag per field, grouped by topic. A field that is not
    given stays absent, so that "given" can be told from "default".

    options: Options, or a dataclass made from it. inherited: the fields whose default is
    the first stage's value."""
    parser = build_parser(description, argument_default=argparse.SUPPRESS,
                          formatter_class=TopicFormatter, usage="%(prog)s [options]")
    groups = {topic: parser.add_argument_group(topic, text) for topic, text in TOPICS.items()}
    for f in dataclasses.fields(options):
        kind, choices = f.metadata["kind"], f.metadata["choices"]
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        else:
            metavar = f.metadata["metavar"] or ("NAME" if choices else METAVARS[kind])
            read = parse_path if kind is str and not choices else kind
            how = dict(type=read, choices=choices and list(choices), metavar=metavar)
        default = "the first stage's" if f.name in inherited else f.default
        text = describe_option(f, default)
        groups[f.metadata["topic"]].add_argument(flag_name(f), dest=f.name, help=text, **how)
    return parser


# --- refusals -----------------------------------------------------------------------------

def refuse(condition, why):
    """UserError(why) if the condition holds. why: one line, names the flag and what to
    do."""
    if condition:
        raise UserError(why)


def is_positive(x):
    """Whether a number is above 0 and finite; NaN is not."""
    return 0 < x < math.inf


TYPES = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number"),
         bool: (bool, "True or False")}


def check_values(o):
    """Refuse a name that is in no registry and a number that is none. The command line
    cannot hold one, Options(...) in Python and a strange checkpoint can. What a text means
    is left to whoever reads it."""
    for f in dataclasses.fields(o):
        value, kind, choices = getattr(o, f.name), f.metadata["kind"], f.metadata["choices"]
        if value is None and (f.default is None or f.name == "data"):    # a recipe leaves it open
            continue
        shown = " ".join(str(value).split())[:60]
        if choices:
            is_known = isinstance(value, str) and value in choices
            refuse(not is_known, f"{flag_name(f)} {shown}: unknown; take {', '.join(choices)}")
        elif kind in TYPES:
            wanted, words = TYPES[kind]
            fits = isinstance(value, wanted) and isinstance(value, bool) == (kind is bool)
            fits = fits and (kind is not int or abs(value) < 2**62)
            refuse(not fits, f"{flag_name(f)} {shown}: must be {words}")
        else:
            fits = isinstance(value, str) and "\0" not in value
            refuse(not fits, f"{flag_name(f)} {shown}: must be a text")


def check_data(o):
    """Images, sizes, and the space."""
    is_latent = o.space == "latent"
    refuse(o.data is None and not o.dry_run,
           "--recipe and a paper's own weights need images: --data PATH (maskdm CelebA-HQ, maskdit "
           "and lmd ImageNet, ddm CIFAR-10)")
    refuse(o.patch < 1 or o.size < 1 or o.size % o.patch,
           "--size must be a positive multiple of --patch")
    refuse(is_latent != (o.vae is not None) and not (o.dry_run and o.vae is None),
           "--space latent (which --recipe maskdit and lmd mean) and --vae PATH belong together; "
           "python vae.py trains an autoencoder")
    refuse(not is_latent and (not o.cache_latents or o.latents != Options.latents),
           "--latents and --no-cache-latents are about --space latent")
    refuse(not o.cache_latents and o.latents != Options.latents,
           "--latents is where --no-cache-latents keeps nothing; leave one out")
    refuse(o.task != "generate" and o.latents != Options.latents,
           "--latents: with a --task nothing is kept, its conditions are made of pixels")
    refuse(o.task != "generate" and not o.cache_latents,
           "--no-cache-latents: with a --task nothing is kept anyway; leave it out")
    refuse(not 0 < o.fraction <= 1, "--fraction must be in (0, 1]")
    refuse(not 0 <= o.workers <= 512, "--workers must be 0 to 512, about one for each core")
    refuse(not 0 <= o.cache_gb < math.inf, "--cache-gb must be at least 0")


def check_network(o):
    """Decoder and long skips."""
    refuse(o.decoder < 0, "--decoder is a number of blocks: at least 0")
    refuse(o.skips and not ECONOMIES[o.economy].skips,
           "--skips: with this --economy a long skip would join blocks that see different tokens; "
           "leave one out")


def check_mask(o):
    """How many tokens are hidden, which ones, and what becomes of them."""
    is_ramp, hides = o.ramp != "constant", bool(o.mask or o.mask_from)
    refuse(not 0 <= o.mask < 1, "--mask must be in [0, 1): the share of hidden tokens")
    refuse(o.mask_from is not None and not 0 <= o.mask_from < 1, "--mask-from must be in [0, 1)")
    refuse(is_ramp and o.mask_from is None, "--ramp needs --mask-from, the share it starts at")
    refuse(not is_ramp and o.mask_from is not None,
           "--mask-from needs a --ramp that is not constant")
    refuse(is_ramp and o.mask_from == o.mask,
           "--mask-from is --mask itself, so nothing would rise: leave it and --ramp out")
    refuse(o.policy != Options.policy and not hides,
           "--policy says which tokens are hidden: it needs --mask; without one, --policy patch")
    refuse(o.economy == "route" and not hides and o.stage == "train",  # stage two has no choice
           "--economy route needs --mask: there is nothing hidden to route around the blocks")
    refuse(o.block < 1, "--block must be at least 1")
    refuse(o.block != Options.block and o.policy != "block",
           "--block is the side of --policy block's squares: use it with that policy")


def check_noise(o):
    """Schedule, prediction and times: nearly everything goes with everything."""
    refuse(o.weighting != "plain" and o.predict != "both",
           "--weighting is about two heads: use --predict both")


def check_task(o):
    """Task, maps and labels; and what is learned about hidden patches."""
    task = TASKS[o.task]
    (check_reconstruction if o.objective == "reconstruct" else check_recon)(o)
    refuse(o.recon_target != "clean" and o.gray and o.patch == 1 and o.space == "pixel",
           "--recon-target noisy and whitened measure the contrast of a patch: one gray pixel "
           "has none")
    refuse(o.task == "superres" and o.size % ZOOM,
           f"--task superres enlarges by {ZOOM}: --size must be a multiple of {ZOOM}")
    refuse(o.targets is not None and not task.exact,
           "--targets are maps to predict: use them with --task edges or saliency")
    refuse(o.targets is not None and o.data == "faces",
           "--targets: the built-in faces have maps of their own; leave it out, or give --data")
    refuse(task.needs_map and o.targets is None and o.data != "faces",
           "--task saliency needs --targets: a folder or .zip of maps with the file stems of "
           "--data")
    refuse(not 0 <= o.label_dropout <= 1, "--label-dropout must be in [0, 1]")
    refuse(o.label_dropout != Options.label_dropout and not o.labels,
           "--label-dropout needs --labels")


def check_recon(o):
    """--objective denoise: reconstruction beside denoising."""
    refuse(not 0 <= o.recon < math.inf, "--recon is a weight: at least 0")
    refuse(o.recon and not o.decoder,
           "--recon needs --decoder: without one, hidden patches have no output")
    refuse(o.recon and not (o.mask or o.mask_from),
           "--recon needs --mask: there is nothing hidden to reconstruct")
    refuse(o.recon and o.economy != "drop",
           "--recon guesses what was never seen: --economy route and defer let hidden tokens take "
           "part, use drop")
    refuse(o.recon_target != Options.recon_target and not o.recon,
           "--recon-target needs --recon, the weight of the reconstruction")


def check_reconstruction(o):
    """--objective reconstruct: nothing but hidden patches, guessed without noise."""
    refuse((o.economy, o.task) != ("drop", "generate"),
           "--economy, --task: --objective reconstruct guesses what was never seen, and from "
           "nothing else; leave them out")
    refuse(not o.decoder,
           "--objective reconstruct needs --decoder: without one, hidden patches have no output")
    refuse(not (o.mask and o.mask_from != 0),
           "--objective reconstruct needs --mask (and --mask-from) above 0: something must be "
           "hidden")
    refuse(o.recon,
           "--recon weighs reconstruction beside denoising: --objective reconstruct is nothing "
           "else, leave it out")
    refuse(o.recon_target == "noisy",
           "--recon-target noisy: --objective reconstruct has no noise; take clean or whitened")
    refuse(o.predict not in (Options.predict, "x0"),
           "--predict: --objective reconstruct guesses the patches themselves; leave it out")
    refuse((o.schedule, o.weighting) != (Options.schedule, Options.weighting)
           or o.time_sampling not in (Options.time_sampling, "uniform"),    # older runs have it
           "--schedule, --time-sampling and --weighting are about noise: --objective reconstruct "
           "has none, leave them out")


def check_optimisation(o):
    """Lengths, batches, rates."""
    refuse(not 1 <= o.batch <= 2**20 or (o.micro_batch is not None and o.micro_batch < 1),
           "--batch and --micro-batch must be at least 1, and a batch at most 1048576 images")
    refuse(o.steps is not None and not 1 <= o.steps <= 10**15, "--steps must be 1 to 10^15")
    refuse(o.minutes is not None and not 0 < o.minutes <= 10**7,
           "--minutes must be positive, and at most 10^7 (19 years)")
    refuse(not (is_positive(o.lr) and is_positive(o.clip)), "--lr and --clip must be positive")
    refuse(o.warmup < 0 or not 0 <= o.wd < math.inf, "--warmup and --wd must be at least 0")
    refuse(not (0 <= o.ema < 1 and 0 <= o.beta1 < 1 and 0 <= o.beta2 < 1),
           "--ema, --beta1 and --beta2 must be in [0, 1)")
    refuse(not 0 <= o.lr_end <= 1, "--lr-end must be in [0, 1]")


def check_run(o):
    """What happens around the steps."""
    refuse(o.save_every < 1 or o.sample_every < 1,
           "--save-every and --sample-every must be at least 1")
    refuse(o.keep < 0, "--keep is a number of checkpoints: at least 0 (all)")
    refuse(not 0 <= o.seed < 2**62, "--seed must be at least 0 and have less than 63 bits")
    refuse(not 0 <= o.threads <= 1024, "--threads must be 0 (torch's own choice) to 1024")


def check(o):
    """Refuse, before any work, what cannot be: UserError, one line that names the flag."""
    check_values(o)                                    # first: the others look into the registries
    check_data(o)
    check_network(o)
    check_mask(o)
    check_noise(o)
    check_task(o)
    check_optimisation(o)
    check_run(o)


# --- a run's options ----------------------------------------------------------------------

# What a resumed run may change: its length, its place, and what changes the speed alone.
# The autoencoder is named by where it lies now; its hash says whether it is the same one.
MAY_CHANGE = {
    "steps", "out", "resume", "save_every", "sample_every", "keep", "vae", "latents",
    "cache_latents", "device", "threads", "workers", "cache_gb", "compile", "checkpoint_blocks",
    "dry_run"}


def is_same_value(one, other):
    """Whether two values of an option are one, or two spellings of one file or folder."""
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def find_run(out, resume):
    """The folder that `out` names, or the newest run's to resume. -> Path, or None: a new
    one."""
    refuse(bool(out) and Path(out).absolute() == LATEST.absolute(),
           f"--out {out}: this file names the newest run; give another name, or --resume alone")
    if out:
        return Path(out)
    return newest_checkpoint().parent if resume and LATEST.exists() else None


def require_own_folder(out):
    """UserError for a folder with a config.json of somebody else, for a run replaces it."""
    config = out / "config.json"
    try:
        text = config.read_text() if config.exists() else ""
        is_own = not text or "stage" in json.loads(text)    # empty: killed while it was written
    except (OSError, ValueError, TypeError):
        is_own = False
    refuse(not is_own, f"--out {out}: its config.json is not a run's; give another folder")


def list_runs():
    """The folders below runs/ that hold a checkpoint, in words."""
    names = sorted(str(path.parent) for path in LATEST.parent.glob("*/last.pt"))
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "none"


def check_same_run(options, given, out, ckpt):
    """Refuse, by name, an option that would make the run in `out` another run. given: what
    the command line holds. ckpt: the run's checkpoint."""
    for f in dataclasses.fields(options):
        was = ckpt["config"].get(f.name, f.metadata["before"])
        is_free = f.name not in given or f.name in MAY_CHANGE
        if not is_free and not is_same_value(given[f.name], was):
            raise UserError(
                f"{flag_name(f)} {given[f.name]}: the run in {out} has {was}; resume it without "
                f"this flag (--steps makes it longer), or start another run with another --out")
    steps, plan = given.get("steps"), ckpt["meta"]["plan"]
    refuse(steps is not None and steps < (plan or 0),
           f"--steps {steps}: the run in {out} has a plan of {plan} steps; a resumed run can only "
           f"become longer")


def recorded_options(options, config):
    """What a run did, by its config. Of options younger than the run: what such runs did;
    one that is gone now is left out. options: a class. -> {name: value}"""
    return {f.name: config.get(f.name, f.metadata["before"]) for f in dataclasses.fields(options)}


def continue_options(options, given, out, ckpt):
    """The options of the run in `out`, with what `given` may change."""
    kept = recorded_options(options, ckpt["config"]) | dict(vae=ckpt["meta"]["vae"])
    if given.get("steps") is not None:                              # a number replaces the clock
        kept["minutes"] = None
    changed = {k: v for k, v in given.items() if k in MAY_CHANGE}
    return options(**(kept | changed | dict(out=str(out))))


def resolve_options(options, given):
    """The run's options: defaults < recipe < command line or, with --resume, the run's own.

    options: Options or TuneOptions. given: {name: value} of the command line. -> (options,
    checkpoint to continue or None). A new run without --out has no name yet:
    `open_run_folder` finds one. UserError when a run would be overwritten, or would become
    another run."""
    if {"steps", "minutes"} <= given.keys():
        raise UserError("--steps and --minutes: give one of them")
    o = options(**recipe_options(given.get("recipe"), options.stage, given))
    out = find_run(o.out, o.resume)
    last = find_last(out) if out else None
    if last is None:
        says_what = given.keys() - (MAY_CHANGE - {"steps"})
        refuse(o.resume and not says_what,
               f"--resume: there is no run{f' in {out}' if out else ''}; the runs here are "
               f"{list_runs()}. To start one, say with what (--data faces)")
        if out:
            require_own_folder(out)
        if o.resume:
            print(f"nothing to continue{f' in {out}' if out else ''}: starting")
        return dataclasses.replace(o, out=out and str(out)), None
    refuse(not o.resume,
           f"--out {out} already holds a run: add --resume to continue it, or give another --out")
    ckpt = read_checkpoint(last, "config", *CONTINUED)
    require_same_meaning(ckpt, last, trains=True)
    made_by = ckpt["meta"]["stage"]
    refuse(made_by != options.stage,
           f"--resume: {out} was made by {made_by}.py, not by {options.stage}.py; give the --out "
           f"of the run to continue")
    check_same_run(options, given, out, ckpt)
    return continue_options(options, given, out, ckpt), ckpt
