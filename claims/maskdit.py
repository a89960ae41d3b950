"""[MaskDiT] Half of the tokens behind a light decoder against all of them.

The claim (MaskDiT, arXiv 2306.09305). An encoder that sees half of the tokens, a light
decoder and a little reconstruction of the hidden half reach the quality of a network that
sees all tokens, class by class, in 0.31 of its time.

Arms. `all-tokens`; `half`, the paper's; `route`, where the hidden half only skips the
middle blocks. Each has three quarters of the time at a constant rate, then a last quarter
on all tokens at half the rate, falling (`-last`): for `half` that is MaskDiT's unmasking
tuning, for the others the same decay. Short runs choose each arm's rate, and first the
weight of the reconstruction: the paper has 0.1 on the denoised image. Here it is on the raw
output, where it weighs about ten times as much.

Measured. Distances to training images, class-conditional, ten calls, before and after the
last quarter; the same for `half` with guidance.

Fairness. Equal time: each network is timed alone at the start, and from then on a minute is
a number of steps. Leave the machine quiet for that; afterwards the arms may be trained side
by side.
"""
from functools import partial

import torch

import finetune
import train
from claims.bench import (
    NEVER, PROXY_ORDER, Bench, format_distances, format_spread, format_table, refuse_gray)

# minutes: of an arm. short: of a run that chooses a rate or a weight.
SCALES = {
    "smoke": dict(steps=8, minutes=1, short=0.5, model="tiny", train=["--batch", 4], rates=[1e-3],
                  recon=[0.1], n=12, batch=12),
    "cpu": dict(minutes=30, short=2, model="tiny", train=["--patch", 2],
                rates=[1e-3, 2e-3, 4e-3], recon=[0, 0.01, 0.1], n=2000, batch=100),
    "gpu": dict(minutes=60, short=3, model="small", train=["--batch", 256, "--patch", 2],
                rates=[5e-4, 1e-3, 2e-3], recon=[0, 0.01, 0.1], n=10_000, batch=250),
}
HALF = ["--mask", 0.5, "--decoder", 2]
ARMS = {                                                    # name -> flags of its own
    "all-tokens": [],
    "half": HALF,                                           # and --recon, of the chosen weight
    "route": ["--mask", 0.5, "--economy", "route"],
}
# The same networks without a mask, for the last stage.
UNMASKED = {"all-tokens": [], "half": ["--decoder", 2], "route": ["--economy", "route"]}
LAST = 1 / 4                                                # of the time, on all tokens
CALLS = 10
GUIDANCE = (1.5, 2.0, 3.0)


def run_maskdit(args):
    """half of the tokens and a light decoder against all of them [MaskDiT]"""
    refuse_gray(args)
    first = Bench("maskdit", args, SCALES[args.scale])
    benches = first.benches()
    train_weights(first)
    for bench in benches:
        for name in ARMS:
            train_both_stages(bench, name)
    if not first.all_trained():
        return
    cells = {}
    for bench in benches:
        images, _ = bench.split_images(labels=True)
        for key, path, how in list_measurements():
            cells.setdefault(key, []).append(measure_classes(bench, images, path, how))
    first.write("table.md", describe_classes(benches, cells))
    draw_classes(first, images.classes)
    draw_guidance(first, images.classes)


# --- training -----------------------------------------------------------------------------

def maskdit_flags(bench):
    """The flags that all arms share."""
    args, scale = bench.args, bench.scale
    return ["--data", args.data, "--size", args.size, "--model", scale["model"], *scale["train"],
            "--labels", "--schedule", "edm", "--predict", "unit", "--time-sampling", "lognormal",
            "--workers", 0, "--sample-every", NEVER]


def maskdit_pace(bench, name, is_last=False):
    """Seconds a step of an arm's network, with its mask or in its last stage."""
    common = maskdit_flags(bench)
    own = {"half": ["--recon", 0.1, "--recon-target", "noisy"]}
    masked = {arm: [*common, *flags, *own.get(arm, [])] for arm, flags in ARMS.items()}
    last = {f"{arm}, last": [*common, *UNMASKED[arm]] for arm in ARMS}
    seconds = bench.seconds_per_step(masked | last, visits=2)
    return seconds[f"{name}, last" if is_last else name]


def count_timed_steps(bench, name, minutes, is_last=False):
    """How many steps a network takes in some minutes."""
    return max(1, round(60 * minutes / maskdit_pace(bench, name, is_last)))


def choose_by_loss(bench, runs):
    """The choice whose short run has the smallest held-out loss. runs: {choice: run}; a
    single one was not run."""
    if len(runs) == 1:
        return next(iter(runs))
    return min(runs, key=lambda choice: bench.first.log(runs[choice], "val_loss"))


def weight_runs(bench):
    """{weight of the reconstruction: the short run that tries it}"""
    return {weight: f"half-recon-{weight:g}" for weight in bench.scale["recon"]}


def rate_runs(bench, name):
    """{learning rate: the short run that tries it}"""
    return {rate: f"{name}-rate-{rate:g}" for rate in bench.scale["rates"]}


def own_flags(bench, name):
    """An arm's flags. The reconstruction's weight is chosen when the arm is trained."""
    if name != "half":
        return ARMS[name]
    return [*HALF, "--recon-target", "noisy",
            "--recon", partial(choose_by_loss, bench, weight_runs(bench))]


def train_weights(bench):
    """Short runs of `half` with each weight of the reconstruction, at one rate."""
    if len(weight_runs(bench)) == 1:
        return
    steps = partial(count_timed_steps, bench, "half", bench.scale["short"])
    needed = ("half", "half-last", *rate_runs(bench, "half").values())
    for weight, name in weight_runs(bench).items():
        target = ["--recon-target", "noisy"] if weight else []
        bench.train_arm(name, train.main, *maskdit_flags(bench), *HALF, "--recon", weight, *target,
                        "--lr", bench.scale["rates"][len(bench.scale["rates"]) // 2],
                        "--steps", steps, before=needed)


def train_both_stages(bench, name):
    """Short runs that choose the rate (the first seed's, for all), three quarters of the
    time at it, a last quarter on all tokens."""
    scale, last = bench.scale, f"{name}-last"
    flags = [*maskdit_flags(bench), *own_flags(bench, name)]
    if bench.first is bench and len(scale["rates"]) > 1:
        for rate, run in rate_runs(bench, name).items():
            bench.train_arm(run, train.main, *flags, "--lr", rate, before=(name, last), *[
                "--steps", partial(count_timed_steps, bench, name, scale["short"])])
    rate = partial(choose_by_loss, bench, rate_runs(bench, name))
    bench.train_arm(name, train.main, *flags, "--lr", rate, "--lr-end", 1, "--steps", partial(
        count_timed_steps, bench, name, (1 - LAST) * scale["minutes"]), before=(last,))
    bench.train_arm(last, finetune.main, "--from", bench.folder / name, "--sample-every", NEVER,
                    "--lr", partial(halve_rate, rate), "--steps", partial(
                        count_timed_steps, bench, name, LAST * scale["minutes"], True))


def halve_rate(rate):
    """Half of a rate that is chosen when it is asked for."""
    return rate() / 2


# --- numbers ------------------------------------------------------------------------------

def list_measurements():
    """What is measured: (key of the table, run, further arguments of `sample`)."""
    ends = [path for name in ARMS for path in (name, f"{name}-last")]
    plain = [(path, path, {}) for path in ends]
    guided = [((path, scale), path, dict(cfg=scale)) for path in ("half", "half-last")
              for scale in GUIDANCE]
    return plain + guided


def measure_classes(bench, images, path, how):
    """Distances of a model's samples, of every class as many."""
    classes = torch.arange(bench.scale["n"]) % len(images.classes)
    return bench.distances(images, path, bench.scale["n"], labels=classes, steps=CALLS, **how)


def judge_half(cells):
    """One sentence. cells: {run: distances, one a seed}"""
    pairs = [(ours[proxy][0], theirs[proxy][0])
             for ours, theirs in zip(cells["half-last"], cells["all-tokens-last"])
             for proxy in PROXY_ORDER]
    better = sum(ours < theirs for ours, theirs in pairs)
    if better == len(pairs):
        return "**Holds here**: half of the tokens are better at equal time, on every distance."
    if better == 0:
        return "**Does not hold here**: all tokens are better at equal time, on every distance."
    return (f"**Open here**: at equal time half of the tokens are better in {better} of "
            f"{len(pairs)} comparisons (a distance and a seed each).")


def describe_classes(benches, cells):
    """All tables of the claim, as text. cells: {run, or (run, guidance): distances, one a
    seed}"""
    bench, args, scale = benches[0], benches[0].args, benches[0].scale
    rows = []
    for name in ARMS:
        paces = [maskdit_pace(bench, name, is_last) for is_last in (False, True)]
        steps = [bench.log(run, "step") for run in (name, f"{name}-last")]
        losses = [b.log(f"{name}-last", "val_loss") for b in benches]
        rows.append([name, " + ".join(f"{pace:.3f}" for pace in paces),
                     " + ".join(f"{step:.0f}" for step in steps),
                     f"{bench.count_petaflop(name, f'{name}-last'):.3g}", format_spread(losses, 4),
                     format_distances(cells[name]), format_distances(cells[f"{name}-last"])])
    guided = [[run, format_distances(cells[run]),
               *(format_distances(cells[run, scale]) for scale in GUIDANCE)]
              for run in ("half", "half-last")]
    floor = format_distances(cells["half-last"], 1)
    parts = [
        f"Distances to {args.data}, pixel / random-conv / swd (not FID), {scale['n']} "
        f"class-conditional samples of {CALLS} calls, {args.seeds} seed(s) from {args.seed}, floor "
        f"{floor}. {scale['minutes']} minutes of training an arm.",
        format_table(["arm", "seconds a step", "steps", "PFLOP", "val_loss",
                      "before the last stage", "after it"], rows),
        *describe_choices(bench),
        "Guidance:",
        format_table(["run", "none", *(f"{scale:g}" for scale in GUIDANCE)], guided),
        judge_half(cells),
    ]
    return "\n\n".join(parts) + "\n"


def describe_choices(bench):
    """The held-out losses of the short runs; nothing if there was no choice."""
    scale, parts = bench.scale, []
    if len(scale["rates"]) > 1:
        rows = [[name, *(f"{bench.log(run, 'val_loss'):.4f}"
                         for run in rate_runs(bench, name).values())] for name in ARMS]
        parts += [f"The rate was chosen by val_loss after {scale['short']} minutes:",
                  format_table(["arm", *(f"{rate:g}" for rate in scale["rates"])], rows)]
    if len(scale["recon"]) > 1:
        losses = [f"{weight:g}: {bench.log(run, 'val_loss'):.4f}"
                  for weight, run in weight_runs(bench).items()]
        parts += [f"The weight of the reconstruction was chosen so, too: {', '.join(losses)}."]
    return parts


# --- pictures -----------------------------------------------------------------------------

def draw_classes(bench, classes):
    """samples.png: every arm before and after its last stage, always the same noises."""
    few = torch.arange(10) % len(classes)
    rows = [(run, bench.draw(run, 10, labels=few, steps=CALLS))
            for name in ARMS for run in (name, f"{name}-last")]
    bench.save_sheet("samples.png", rows, [classes[c] for c in few])


def draw_guidance(bench, classes):
    """guidance.png: three samples of each class at each scale of guidance."""
    rows = []
    for c, name in enumerate(classes[:10]):
        labels = torch.full((3,), c)
        guided = [bench.draw("half-last", 3, labels=labels, cfg=scale, steps=CALLS)
                  for scale in GUIDANCE]
        rows.append((name, torch.cat(guided)))
    columns = [f"cfg {scale:g},\nnoise {i}" for scale in GUIDANCE for i in (1, 2, 3)]
    bench.save_sheet("guidance.png", rows, columns)
