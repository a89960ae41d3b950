"""[MaskDiT] Half of the tokens behind a light decoder against all of them.

The claim (MaskDiT, arXiv 2306.09305). An encoder that sees half of the tokens, a light
decoder and a little reconstruction of the hidden half train faster than all tokens, class
by class.

Arms. `all-tokens` and `half` have three quarters of the time at a constant rate. Then each
has a last quarter on all tokens at half the rate, falling: for one that is MaskDiT's
unmasking tuning, for the other the same decay. Each chooses its learning rate from the same
three, by the held-out loss of a short run (a twelfth of the time). Five side arms are each
long enough to see that they learn: without reconstruction, its two targets, and the
economies `route` and `defer`.

Measured. Distances to training images at four points of equal time, class-conditional, with
Heun's solver on EDM's grid; held-out losses of the short runs; samples with guidance.

Fairness. Equal time. The clock is only read at the start: every network is timed alone,
five minutes in all, and from then on a minute is a number of steps. Leave the machine quiet
for these minutes; afterwards the arms may be trained side by side.
"""
from functools import partial

import torch

import finetune
import train
from claims.bench import NEVER, Bench, format_distances, format_table, refuse_gray

SCALES = {
    "smoke": dict(steps=8, minutes=1, model="tiny", train=["--batch", 4], rates=[1e-3],
                  n=12, calls=3, batch=12, side_arms=1),
    "cpu": dict(minutes=20, model="tiny", train=["--batch", 64], rates=[5e-4, 1e-3, 2e-3],
                n=500, calls=39, batch=50, side_arms=2),
    "gpu": dict(minutes=240, model="small", train=["--batch", 256, "--patch", 2],
                rates=[2e-4, 5e-4, 1e-3], n=10_000, calls=79, batch=500, side_arms=60),
}
DECODER = ["--decoder", 2]
HALF = ["--mask", 0.5, *DECODER]
SIDE_ARMS = {                                               # name -> flags of its own
    "without-reconstruction": HALF,
    "noisy-target": [*HALF, "--recon", 0.1, "--recon-target", "noisy"],     # as in `half`
    "clean-target": [*HALF, "--recon", 0.1, "--recon-target", "clean"],
    "route": ["--mask", 0.5, "--economy", "route"],
    "defer": ["--mask", 0.75, "--economy", "defer"],
}
ARMS = {                                                    # name -> flags of its own
    "all-tokens": [],
    "half": SIDE_ARMS["noisy-target"],
}
WHOLE = {"all-tokens": "all-tokens", "half": "half-whole"}  # whose pace the last stage has
TIMES = ("1/4", "1/2", "3/4", "all")
GUIDANCE = (1.5, 2.0, 3.0, 4.0)                             # of the picture, on the same noise


def run_maskdit(args):
    """half of the tokens and a light decoder against all of them [MaskDiT]"""
    refuse_gray(args)
    bench = Bench("maskdit", args, SCALES[args.scale])
    for name in ARMS:
        train_in_quarters(bench, name)
    for name, flags in SIDE_ARMS.items():
        steps = partial(count_timed_steps, bench, name, bench.scale["side_arms"])
        bench.train_arm(name, train.main, *maskdit_flags(bench), *flags,
                        "--lr", 1e-3, "--steps", steps, "--sample-every", NEVER)
    if not bench.all_trained():
        return
    images, _ = bench.split_images(labels=True)
    classes = torch.arange(bench.scale["n"]) % len(images.classes)
    how = dict(steps=bench.scale["calls"], solver="heun", time_grid="edm")
    points = {name: checkpoints_in_quarters(bench, name) for name in ARMS}
    cells = {name: [bench.distances(images, path, bench.scale["n"], labels=classes, **how)
                    for path in paths]
             for name, paths in points.items()}
    bench.write("table.md", describe_quarters(bench, cells))
    draw_quarters(bench, points, images.classes, how)
    draw_guidance(bench, points["half"][-1], images.classes, how)


def maskdit_flags(bench):
    """The flags that all arms share."""
    args, scale = bench.args, bench.scale
    return ["--data", args.data, "--size", args.size, "--model", scale["model"], *scale["train"],
            "--labels", "--schedule", "edm", "--predict", "unit", "--time-sampling", "lognormal",
            "--lr-end", 1, "--workers", 0]


def maskdit_pace(bench):
    """Seconds a step of each network, timed once."""
    common = maskdit_flags(bench)
    main = {name: [*common, *flags] for name, flags in ARMS.items()}
    main["half-whole"] = [*common, *DECODER]
    side = {name: [*common, *flags] for name, flags in SIDE_ARMS.items()}
    return bench.seconds_per_step(main, visits=2) | bench.seconds_per_step(side)


def count_timed_steps(bench, name, minutes):
    """How many steps a network takes in some minutes."""
    return max(1, round(60 * minutes / maskdit_pace(bench)[name]))


def count_quarter(bench, name, times=1):
    """How many steps a network takes in so many quarters of the time."""
    return times * count_timed_steps(bench, name, bench.scale["minutes"] / 4)


def count_twelfth(bench, name):
    """How many steps a network takes in a twelfth of the time."""
    return max(1, count_quarter(bench, name) // 3)


def choose_rate(bench, name, share=1):
    """A share of the learning rate whose short run has the smallest held-out loss."""
    losses = {rate: bench.log(f"{name}-lr-{rate:g}", "val_loss") for rate in bench.scale["rates"]}
    return share * min(losses, key=losses.get)


def train_in_quarters(bench, name):
    """Short runs that choose the rate, three quarters at it, a last quarter on all
    tokens."""
    flags = [*maskdit_flags(bench), *ARMS[name]]
    last = f"{name}-last"
    for rate in bench.scale["rates"]:
        short = ["--steps", partial(count_twelfth, bench, name), "--sample-every", NEVER]
        bench.train_arm(f"{name}-lr-{rate:g}", train.main, *flags, "--lr", rate, *short,
                        before=(name, last))
    quarter = partial(count_quarter, bench, name)           # called when the arm is trained
    length = ["--steps", partial(count_quarter, bench, name, 3),
              "--save-every", quarter, "--sample-every", quarter]
    bench.train_arm(name, train.main, *flags, "--lr", partial(choose_rate, bench, name), *length,
                    before=(last,))
    bench.train_arm(last, finetune.main, "--from", bench.folder / name,
                    "--lr-end", 0.05, "--sample-every", NEVER,
                    "--lr", partial(choose_rate, bench, name, 0.5),
                    "--steps", partial(count_quarter, bench, WHOLE[name]))


def checkpoints_in_quarters(bench, name):
    """An arm's checkpoints at each quarter of the time."""
    steps = [count_quarter(bench, name, times) for times in (1, 2, 3)]
    return [*(f"{name}/{step:06d}.pt" for step in steps), f"{name}-last/last.pt"]


def describe_quarters(bench, cells):
    """All tables of the claim, as text. cells: {arm: [distances at each of TIMES]}"""
    args, scale, pace = bench.args, bench.scale, maskdit_pace(bench)
    floor = format_distances(cells["half"][-1], 1)
    distances = [[name, *map(format_distances, row)] for name, row in cells.items()]
    rates = []
    for name in ARMS:
        losses = [bench.log(f"{name}-lr-{rate:g}", "val_loss") for rate in scale["rates"]]
        rates.append([name, f"{pace[name]:.3f}", *(f"{loss:.4f}" for loss in losses)])
    side = [[name, f"{bench.log(name, 'val_loss'):.4f}", f"{bench.log(name, 'step'):.0f}"]
            for name in SIDE_ARMS]
    parts = [
        f"Distances to {args.data}, pixel / random-conv / swd (not FID), {scale['n']} "
        f"class-conditional samples of {scale['calls']} calls, seed {args.seed}, floor {floor}. "
        f"{scale['minutes']} minutes of training an arm, the last quarter of both with all tokens "
        "at a falling rate.",
        format_table(["arm", "1/4 of the time", *TIMES[1:]], distances),
        "The learning rate was chosen by val_loss after a twelfth of the time:",
        format_table(["arm", "seconds a step", *(f"{rate:g}" for rate in scale["rates"])], rates),
        f"Short runs of {scale['side_arms']} minutes:",
        format_table(["arm", "val_loss", "steps"], side),
    ]
    return "\n\n".join(parts) + "\n"


def draw_quarters(bench, points, classes, how):
    """samples.png: both arms at every quarter, the same noises and classes in every row."""
    few = torch.arange(10) % len(classes)
    rows = [(f"{name},\n{when}", bench.draw(path, 10, labels=few, **how))
            for name, paths in points.items() for when, path in zip(TIMES, paths)]
    bench.save_sheet("samples.png", rows, [classes[c] for c in few])


def draw_guidance(bench, path, classes, how):
    """guidance.png: three samples of each class at each scale of guidance."""
    rows = []
    for c, name in enumerate(classes[:10]):
        labels = torch.full((3,), c)
        guided = [bench.draw(path, 3, labels=labels, cfg=scale, **how) for scale in GUIDANCE]
        rows.append((name, torch.cat(guided)))
    columns = [f"cfg {scale:g},\nnoise {i}" for scale in GUIDANCE for i in (1, 2, 3)]
    bench.save_sheet("guidance.png", rows, columns)
