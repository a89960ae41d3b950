"""[MaskDM] A masked model on a tenth of other images.

The claim (MaskDM, arXiv 2306.11363). A network that was pre-trained with masks on one set
of images and is fine-tuned on a tenth of another has 46 % better quality than one that
starts from nothing.

Arms. `masked` is pre-trained on --data with three quarters of the tokens hidden, `unmasked`
in equal time on all of them. `masked-tenth` and `unmasked-tenth` go on with a tenth of
--target, on all tokens. From nothing: `tenth-short` has the time of that second stage,
`tenth` that of both, and `all` too, but on all of --target.

Measured. Distances to the training images of --target, all of them.

Fairness. Equal time: each network is timed alone at the start, and from then on a minute is
a number of steps. Leave the machine quiet for that. Network, batch, rates (train.py's and
finetune.py's) and seed are equal.
"""
from functools import partial

import finetune
import train
from claims.bench import (
    PROXY_ORDER, Bench, count_better, format_distances, format_spread, format_table)
from plumbing.console import UserError
from plumbing.inputs import open_set

# pre, tune: minutes of the first stage and of the second.
SCALES = {
    "smoke": dict(steps=4, pre=1, tune=1, model="tiny", train=["--batch", 4], n=10, batch=10),
    "cpu": dict(pre=20, tune=10, model="tiny", train=[], n=2000, batch=100),
    "gpu": dict(pre=60, tune=15, model="small", train=["--batch", 256], n=10_000, batch=250),
}
FIRST = {"masked": ["--mask", 0.75], "unmasked": []}        # name -> flags of its own
TENTH = ["--fraction", 0.1]
SCRATCH = {                                                 # from nothing: flags, whole time?
    "tenth-short": (TENTH, False),
    "tenth": (TENTH, True),
    "all": ([], True),
}
ENDS = {                                                    # what is compared, and what it is
    "masked-tenth": "masked model, then a tenth",
    "unmasked-tenth": "unmasked model, then a tenth",
    "tenth-short": "a tenth from nothing, time of the second stage",
    "tenth": "a tenth from nothing, time of both stages",
    "all": "all images from nothing, time of both stages",
}
CALLS = 10


def run_transfer(args):
    """a masked model, fine-tuned on a tenth of other images (--target) [MaskDM]"""
    if args.target is None and args.scale != "smoke":
        raise UserError("--target: transfer needs a second set of images to fine-tune on, such as "
                        "faces for the built-in ones; --data is the set to pre-train on")
    if args.target not in (None, "faces"):
        open_set("--target", args.target)                   # now, not after the first arm
    first = Bench("transfer", args, SCALES[args.scale])
    benches = first.benches
    for bench in benches:
        train_transfers(bench)
    if not first.all_trained():
        return
    cells = first.compare_seeds(ENDS, target_of(first), steps=CALLS)
    first.write("table.md", describe_transfers(benches, cells))
    rows = [(end, first.draw(end, 10, steps=CALLS)) for end in ENDS]
    first.save_sheet("samples.png", rows, [f"noise {i}" for i in range(1, 11)])


def target_of(bench):
    """The second set of images."""
    return bench.args.target or "faces"


def transfer_flags(bench, data=None):
    """The flags of an arm that is trained from nothing. data: None means --data."""
    return [*bench.image_flags(data), "--model", bench.scale["model"], *bench.scale["train"]]


def count_steps_in(bench, name, minutes):
    """How many steps a network takes in some minutes; `unmasked` sees all tokens."""
    networks = {arm: [*transfer_flags(bench), *flags] for arm, flags in FIRST.items()}
    return max(1, round(60 * minutes / bench.seconds_per_step(networks, visits=2)[name]))


def train_transfers(bench):
    """Both pre-trained models and what they become, then the arms from nothing."""
    target, scale = target_of(bench), bench.scale
    tune = partial(count_steps_in, bench, "unmasked", scale["tune"])
    both = partial(count_steps_in, bench, "unmasked", scale["pre"] + scale["tune"])
    for name, own in FIRST.items():
        end = f"{name}-tenth"
        bench.train_arm(name, train.main, *transfer_flags(bench), *own,
                        "--steps", partial(count_steps_in, bench, name, scale["pre"]),
                        before=(end,))
        bench.train_arm(end, finetune.main, "--from", bench.folder / name, "--data", target,
                        *TENTH, "--steps", tune)
    for name, (own, is_long) in SCRATCH.items():
        bench.train_arm(name, train.main, *transfer_flags(bench, target), *own,
                        "--steps", both if is_long else tune)


def list_gains(cells, rival):
    """By how much `masked-tenth` is better than a rival: {proxy: per cent, one a seed}."""
    gains = {}
    for proxy in PROXY_ORDER:
        pairs = zip(cells["masked-tenth"], cells[rival])
        gains[proxy] = [100 * (1 - ours[proxy][0] / theirs[proxy][0]) if theirs[proxy][0] else 0.0
                        for ours, theirs in pairs]
    return gains


def judge_transfer(cells):
    """One sentence about pre-training with masks."""
    def beats(rival):
        better, worse = count_better(cells["masked-tenth"], cells[rival])
        return better and not worse

    if not (beats("tenth-short") and beats("tenth")):
        return ("**Does not hold here**: from nothing, a tenth is learned as well or better, by "
                "some distance or seed at least.")
    if not beats("unmasked-tenth"):
        return ("**Pre-training holds, the mask's part does not**: the masked model beats starting "
                "from nothing, but not the unmasked model of equal time.")
    return "**Holds here**: the masked model beats starting from nothing and the unmasked model."


def describe_transfers(benches, cells):
    """The claim's table, as text. cells: {end: distances, one a seed}"""
    bench, args = benches[0], benches[0].args
    floor = format_distances(next(iter(cells.values())), 1)
    rows = []
    for end, what in ENDS.items():
        losses = [b.log(end, "val_loss") for b in benches]
        first = end.removesuffix("-tenth")
        work = bench.count_petaflop(*([first] if first in FIRST else []), end)
        rows.append([end, what, f"{bench.log(end, 'step'):.0f}", f"{work:.3g}",
                     format_spread(losses, 4), format_distances(cells[end])])
    gains = []
    for rival in ENDS:
        if rival != "masked-tenth":
            values = list_gains(cells, rival).values()
            gains.append([rival, " / ".join(format_spread(v) for v in values)])
    parts = [
        f"Pre-trained on {args.data} for {bench.scale['pre']} minutes, then {target_of(bench)} for "
        f"{bench.scale['tune']}. Distances to {target_of(bench)}, pixel / random-conv / swd (not "
        f"FID), {bench.scale['n']} samples of {CALLS} calls, {args.seeds} seed(s) from "
        f"{args.seed}, floor {floor}.",
        format_table(["arm", "what it is", "steps of its last stage", "PFLOP", "val_loss",
                      "distances"], rows),
        "By how many per cent `masked-tenth` is better (pixel / random-conv / swd):",
        format_table(["than", "%"], gains),
        judge_transfer(cells),
    ]
    return "\n\n".join(parts) + "\n"
