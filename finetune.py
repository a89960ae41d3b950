"""Fine-tuning: stage two, from a masked model to all tokens, or to other data.

The idea (MaskDM, arXiv 2306.11363, and MaskDiT's unmasking tuning, 2306.09305). A model
that was trained on a tenth of the tokens has never seen a whole image. A short stage with
all tokens visible teaches it how the parts belong together. The first stage's weights are
loaded into a new network with a new optimizer and a new average, and train.py's own loop
runs on. MaskDM starts from the raw weights (`--weights model`), not from their average.
This stage has a warm-up and a decay of its own. On the built-in faces a peak of 2e-3 ended
better than 1e-3 and 5e-4, while MaskDM takes 1e-5 for a large model at 256 px.

    # the newest run, all tokens visible
    python train.py --mask 0.75 --minutes 3 && python finetune.py --minutes 3
    # to other data, a tenth of it [MaskDM transfer]
    python finetune.py --from runs/A/last.pt --data photos/ --fraction 0.1
    # a falling ratio, on 8 token counts, of a model with a decoder [MaskDiT]
    python finetune.py --mask-from 0.5 --mask 0 --ramp cosine4 --recon 0.1
    # the paper's own unmasking: all tokens, half the learning rate
    python finetune.py --recipe maskdit
    # to a task: the condition's embedding starts at zero
    python finetune.py --task superres

What this stage inherits. An option can get its value from four places. The first that has
one wins:

    given      on the command line
    recipe     of --recipe, for stage two
    inherited  the first stage's value, if the option is in the table INHERITED and its
               condition holds
    default    of TuneOptions

So network, prediction and data go on as they were. What a stage is about (mask, ramp,
recon, learning rate, length) is not inherited. The network and what its output means cannot
change. Some options go with another one, and are inherited as long as that one stays as it
was: held-out images and --fraction with their data, maps with their task, the size of
blocks with their policy.
"""
import os
from dataclasses import dataclass
from typing import ClassVar

import train
from plumbing.checkpoint import newest_checkpoint, read_checkpoint
from plumbing.console import UserError, run_command
from running.options import (
    Options, check_values, is_same_value, option, options_parser, recorded_options, resolve_options)
from running.recipes import recipe_options
from running.setup import FirstStage
from sample import check_weights, require_same_meaning


@dataclass(frozen=True)
class TuneOptions(Options):
    """train.py's options with this stage's defaults, and where it starts from."""
    stage: ClassVar[str] = "finetune"
    default_minutes: ClassVar[float] = 2.0

    from_: str = option(
        "run", None, "checkpoint or folder of the first stage; the newest run when left out",
        kind=str, name="from")
    weights: str = option(
        "run", "model", "start from the raw weights (model) or from their average (ema)",
        choices=("model", "ema"))
    minutes: float = option(
        "optimisation", None, f"length of this stage; {default_minutes:g} when neither this nor "
        "--steps is given", kind=float)


# --- what is inherited --------------------------------------------------------------------

# These cannot change: the weights would mean something else.
FIXED = ("objective", "predict", "precondition", "space", "model", "patch", "skips", "decoder",
         "economy")

ALWAYS = (*FIXED, "data", "size", "gray", "flip", "seed", "optimizer", "batch", "micro_batch",
          "amp", "cache_gb", "workers", "schedule", "weighting", "time_sampling", "vae", "task",
          "labels")


def hides_tokens(o):
    """Whether options hide anything."""
    return bool(o.mask or o.mask_from)


# option -> whether it is inherited: a function of the first stage's options (was) and of
# this stage's (now: as if every option of this table were inherited).
INHERITED = dict.fromkeys(ALWAYS, lambda was, now: True) | {
    # held-out images belong to their data, maps to their data and task
    "val": lambda was, now: is_same_value(was.data, now.data),
    "fraction": lambda was, now: is_same_value(was.data, now.data),
    "targets": lambda was, now: is_same_value(was.data, now.data) and was.task == now.task,
    # without labels none is dropped; where nothing is hidden, no policy says what
    "label_dropout": lambda was, now: now.labels,
    "policy": lambda was, now: hides_tokens(now),
    "block": lambda was, now: hides_tokens(now) and now.policy == "block",
    # where hidden patches are guessed, their target stays
    "recon_target": lambda was, now: now.objective == "reconstruct" or now.recon,
    # of latents for a task nothing is kept, so there is no folder for it
    "cache_latents": lambda was, now: now.task == "generate",
    "latents": lambda was, now: now.task == "generate" and now.cache_latents,
}


def first_options(ckpt):
    """The options of the run that made a checkpoint. One that is younger than the run is
    what such runs did; the autoencoder is where it lies now."""
    o = Options(**recorded_options(Options, ckpt["config"]) | dict(vae=ckpt["meta"]["vae"]))
    check_values(o)
    return o


def inherit_options(was, chosen):
    """What a second stage takes over from its first. was: the first stage's Options.
    chosen: {name: value} of command line and recipe. -> {name: value}, without `chosen`."""
    everything = {name: getattr(was, name) for name in INHERITED}
    now = TuneOptions(**(everything | chosen))
    return {name: everything[name] for name, applies in INHERITED.items() if applies(was, now)}


def check_fits(was, given, source):
    """Refuse what the weights of `source` do not fit: another network, another output."""
    for name in FIXED:
        if name in given and given[name] != getattr(was, name):
            raise UserError(f"--{name} {given[name]}: {source} was trained with "
                            f"{getattr(was, name)}, and its weights fit nothing else")


# --- the command --------------------------------------------------------------------------

def main(argv=None):
    parser = options_parser(TuneOptions, __doc__.split("\n")[0], INHERITED)
    given = vars(parser.parse_args(argv))
    o, ckpt = resolve_options(TuneOptions, given)
    if ckpt:
        return train.continue_run(o, ckpt)
    source = o.from_ or str(newest_checkpoint())
    first = read_checkpoint(source, "config", o.weights)
    require_same_meaning(first, source, trains=True)
    check_weights(first, o.weights)
    was = first_options(first)
    check_fits(was, given, source)
    chosen = recipe_options(o.recipe, "finetune", given)
    o = TuneOptions(**(inherit_options(was, chosen) | chosen | dict(from_=source, out=o.out)))
    if os.environ.get("RANK", "0") == "0":
        kind = "averaged" if o.weights == "ema" else "raw"
        print(f"from {source}, step {first['step']}, {kind} weights")
    train.train(o, first=FirstStage(first[o.weights], first["meta"]))


if __name__ == "__main__":
    run_command(main)
