"""[MaskDM] A tenth of the tokens against all of them.

The claim (MaskDM, arXiv 2306.11363). A network that is trained on a tenth of the patches,
and then for a short time on all of them, is as good at the same time of training.

Arms. `all-tokens` and `masked` (a tenth of the tokens, in blocks of 2 x 2) have two thirds
of the time at a constant rate. Then each has a last third on all tokens at half the rate,
falling: `all-tokens-last` and `masked-last`.

Measured. Distances to training images after a third, two thirds and all of the time, and
the held-out loss at the end.

Fairness. Equal time: each network is timed alone at the start, and from then on a minute is
a number of steps. Leave the machine quiet for that. Data, network, batch, rates and seed
are equal.
"""
from functools import partial

import finetune
import train
from claims.bench import NEVER, Bench, format_distances, format_table

SCALES = {
    "smoke": dict(steps=6, minutes=1, model="tiny", train=["--batch", 4], n=10, batch=10),
    "cpu": dict(minutes=9, model="tiny", train=["--batch", 64], n=250, batch=25),
    "gpu": dict(minutes=120, model="small", train=["--batch", 256], n=10_000, batch=250),
}
ARMS = {                                                    # name -> flags of its own
    "all-tokens": [],
    "masked": ["--mask", 0.9, "--policy", "block", "--block", 2],
}
TIMES = ("1/3", "2/3", "all")
CALLS = 10


def run_maskdm(args):
    """a tenth of the tokens against all of them [MaskDM]"""
    bench = Bench("maskdm", args, SCALES[args.scale])
    for name in ARMS:
        train_in_thirds(bench, name)
    if not bench.all_trained():
        return
    images, _ = bench.split_images(gray=args.gray)
    points = {name: checkpoints_in_thirds(bench, name) for name in ARMS}
    cells = {name: [bench.distances(images, path, bench.scale["n"], steps=CALLS) for path in paths]
             for name, paths in points.items()}
    bench.write("table.md", describe_thirds(bench, cells))
    rows = [(f"{name},\n{when}", bench.draw(path, 10, steps=CALLS))
            for name, paths in points.items() for when, path in zip(TIMES, paths)]
    bench.save_sheet("samples.png", rows, [f"noise {i}" for i in range(1, 11)])


def maskdm_flags(bench):
    """The flags that both arms share."""
    args, scale = bench.args, bench.scale
    gray = ["--gray"] if args.gray else []
    return ["--data", args.data, "--size", args.size, *gray, "--model", scale["model"],
            *scale["train"], "--lr", 2e-3, "--lr-end", 1, "--workers", 0]


def maskdm_pace(bench):
    """Seconds a step of each arm, timed once."""
    common = maskdm_flags(bench)
    networks = {name: [*common, *flags] for name, flags in ARMS.items()}
    return bench.seconds_per_step(networks, visits=2)


def count_third(bench, name, times=1):
    """How many steps an arm takes in so many thirds of the time."""
    seconds = maskdm_pace(bench)[name]
    return times * max(1, round(20 * bench.scale["minutes"] / seconds))


def train_in_thirds(bench, name):
    """Two thirds of the time at a constant rate, then the last third on all tokens,
    falling."""
    third = partial(count_third, bench, name)               # called when the arm is trained
    length = ["--steps", partial(count_third, bench, name, 2),
              "--save-every", third, "--sample-every", third]
    bench.train_arm(name, train.main, *maskdm_flags(bench), *ARMS[name], *length,
                    before=(f"{name}-last",))
    bench.train_arm(f"{name}-last", finetune.main, "--from", bench.folder / name,
                    "--lr", 1e-3, "--lr-end", 0.05, "--sample-every", NEVER,
                    "--steps", partial(count_third, bench, "all-tokens"))


def checkpoints_in_thirds(bench, name):
    """An arm's checkpoints after a third, two thirds and all of the time."""
    steps = [count_third(bench, name, times) for times in (1, 2)]
    return [*(f"{name}/{step:06d}.pt" for step in steps), f"{name}-last/last.pt"]


def describe_thirds(bench, cells):
    """The claim's table, as text. cells: {arm: [distances at each of TIMES]}"""
    args, scale, pace = bench.args, bench.scale, maskdm_pace(bench)
    floor = format_distances(cells["masked"][-1], 1)
    head = (f"Distances to {args.data}, pixel / random-conv / swd (not FID), {scale['n']} samples "
            f"of {CALLS} calls, seed {args.seed}, floor {floor}. "
            f"{scale['minutes']} minutes of training an arm, the last third of both on all tokens "
            "at a falling rate.")
    rows = []
    for name, row in cells.items():
        first, last = bench.log(name, "step"), bench.log(f"{name}-last", "step")
        loss = bench.log(f"{name}-last", "val_loss")
        rows.append([name, f"{pace[name]:.3f}", *map(format_distances, row),
                     f"{first:.0f} + {last:.0f}", f"{loss:.4f}"])
    columns = ["arm", "seconds a step", "1/3 of the time", "2/3", "all", "steps",
               "val_loss at the end"]
    return f"{head}\n\n{format_table(columns, rows)}\n"
