"""Fine-tuning: stage two, from a masked model to a whole one, or to other data.

The idea (MaskDM, arXiv 2306.11363, and MaskDiT's unmasking tuning, 2306.09305). A model that was trained on a tenth of the tokens has
never seen a whole image; a short stage with all tokens visible teaches it how the parts belong together. The first stage's weights are
loaded into a fresh network with a fresh optimizer and a fresh average, and train.py's own loop runs on. MaskDM starts from the raw
weights (`--weights model`), not from their average. This stage has a warm-up and a decay of its own: on the built-in faces a peak of 2e-3 ended
better than 1e-3 and 5e-4, while MaskDM takes 1e-5 for a large model at 256 px.

    python train.py --mask 0.9 --minutes 4 && python finetune.py --minutes 2      # the newest run, all tokens visible
    python finetune.py --from runs/A/last.pt --data photos/ --fraction 0.1        # to other data, a tenth of it [MaskDM transfer]
    python finetune.py --mask-from 0.5 --mask 0 --ramp cosine4 --recon 0.1        # a falling ratio, on 8 token counts [MaskDiT]
    python finetune.py --recipe maskdit                                           # the paper's unmasking: zero ratio, half the learning rate
    python finetune.py --task superres                                            # to a task: the condition's embedding starts at zero
    python finetune.py --probe --data cifar10-train.zip                           # a linear probe of the features (probe.py) [MAE, LMD]

Network, objective, schedule, prediction, space, data and batch are the first stage's unless a flag says otherwise.
"""
import os
from dataclasses import dataclass, fields

import probe
import train
from plumbing.checkpoint import newest_checkpoint, read_checkpoint
from plumbing.console import UserError, run_command
from running.options import Options, check, flag_name, options_parser, resolve_options, option, is_same_value
from running.recipes import recipe_options

FIXED = ("objective", "predict", "space", "model", "patch", "skips", "decoder", "economy")  # cannot change: the weights would mean something else
# What a first stage hands on unless a flag says otherwise. The rest (mask, ramp, learning rate, length, ...) is this stage's own.
INHERITED = FIXED + ("vae", "data", "task", "targets", "val", "seed", "size", "gray", "flip", "policy", "block", "schedule", "weighting", "time_sampling",
                     "labels", "label_dropout", "latents", "cache_latents", "batch", "micro_batch", "cache_gb", "workers", "amp")


@dataclass(frozen=True)
class TuneOptions(Options):
    """train.py's options with this stage's defaults, and where it starts from."""
    from_: str = option(None, "checkpoint or folder of the first stage; the newest run when left out", kind=str, name="from")
    weights: str = option("model", "start from the raw weights or from their average", choices=("model", "ema"))
    probe: bool = option(False, "train nothing but a linear classifier on the frozen encoder's features; --data has a folder for each class")
    probe_noise: float = option(None, "noise on the images of --probe, as a share of their contrast; left out: 0.1, for a reconstruction 0", kind=float)
    minutes: float = option(None, "length of this stage; 2 when neither this nor --steps is given", kind=float)


def main(argv=None):
    given = vars(options_parser(TuneOptions, __doc__.split("\n")[0], INHERITED).parse_args(argv))
    asked = TuneOptions(**given)
    unread = [flag_name(f) for f in fields(TuneOptions) if f.name in given and f.name not in probe.READS]
    if asked.probe and unread:
        raise UserError(f"{unread[0]} has no part in --probe: leave it out")
    if asked.probe_noise is not None and not asked.probe:
        raise UserError("--probe-noise needs --probe")
    if not asked.probe:
        o, ckpt = resolve_options(TuneOptions, given, "finetune")
        if ckpt:
            return train.continue_run(o, ckpt, "finetune")
    source = asked.from_ or str(newest_checkpoint())
    first = read_checkpoint(source)
    first["config"]["vae"] = first["meta"]["vae"]                               # where it lies, not what it was called then
    was = lambda name: first["config"].get(name, getattr(Options, name))        # a run from before an option existed has its default
    if asked.probe:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("--probe is the work of one process: start it without torchrun")
        same_data = is_same_value(given.get("data", was("data")), was("data"))
        o = TuneOptions(**({name: was(name) for name in probe.INHERITED if name != "val" or same_data} | given))
        check(o)
        probe.run_probe(o, source)
        return
    for name in FIXED:
        if name in given and given[name] != was(name):
            raise UserError(f"--{name} {given[name]}: {source} was trained with {was(name)}, and its weights fit nothing else")
    inherited = {name: was(name) for name in INHERITED}
    if inherited["objective"] == "reconstruct" or given.get("recon"):           # goes on with the same target
        inherited["recon_target"] = was("recon_target")
    if given.get("labels") is False:
        del inherited["label_dropout"]
    if not all(is_same_value(given.get(name, was(name)), was(name)) for name in ("task", "data")):     # maps belong to the task and the data that they were made for
        del inherited["targets"]
    if not is_same_value(given.get("data", was("data")), was("data")):                    # and held-out images to their data
        del inherited["val"]
    chosen = recipe_options(o.recipe, "finetune", given)
    if chosen.get("task", was("task")) != "generate":                           # of latents for a task, nothing is kept
        del inherited["latents"], inherited["cache_latents"]
    if not (chosen.get("mask") or chosen.get("mask_from")):                     # nothing is hidden: no policy says what
        del inherited["policy"], inherited["block"]
    elif chosen.get("policy", was("policy")) != "block":
        del inherited["block"]
    length = {} if "steps" in chosen or "minutes" in chosen else dict(minutes=2.0)
    o = TuneOptions(**(inherited | length | chosen | dict(from_=source, out=o.out)))
    if os.environ.get("RANK", "0") == "0":
        print(f"from {source}, step {first['step']}, {'averaged' if o.weights == 'ema' else 'raw'} weights")
    train.train(o, first=(first[o.weights], first["meta"]), stage="finetune")


if __name__ == "__main__":
    run_command(main)
