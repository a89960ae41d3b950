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
    PROXY_ORDER, Bench, count_better, describe_rates, format_distances, format_spread,
    format_table, refuse_gray)

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
# The same networks without a mask, for the last stage. Where all tokens are seen, there is
# none to route: that is the network of `all-tokens`.
UNMASKED = {"all-tokens": [], "half": ["--decoder", 2], "route": []}
LAST = 1 / 4                                                # of the time, on all tokens
CALLS = 10
GUIDANCE = (1.5, 2.0, 3.0)


def run_maskdit(args):
    """half of the tokens and a light decoder against all of them [MaskDiT]"""
    refuse_gray(args)
    first = Bench("maskdit", args, SCALES[args.scale])
    benches = first.benches
    train_choices(first)
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
    return [*bench.image_flags(), "--model", bench.scale["model"], *bench.scale["train"],
            "--labels", "--schedule", "edm", "--predict", "unit", "--time-sampling", "lognormal"]


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


def weight_runs(bench):
    """{weight of the reconstruction: the short run that tries it}"""
    return {weight: f"half-recon-{weight:g}" for weight in bench.scale["recon"]}


def chosen_weight(bench, of_target=False):
    """The reconstruction's weight; or its target, which a weight of 0 has not."""
    weight = bench.choose_by_loss(weight_runs(bench))
    if of_target:
        return "noisy" if weight else "clean"
    return weight


def own_flags(bench, name):
    """An arm's flags. The reconstruction's weight is chosen when the arm is trained."""
    if name != "half":
        return ARMS[name]
    return [*HALF, "--recon", partial(chosen_weight, bench),
            "--recon-target", partial(chosen_weight, bench, True)]


def train_choices(bench):
    """Short runs, of the first seed for all: `half` with each weight of the reconstruction,
    then every arm with each rate."""
    scale, rates = bench.scale, bench.scale["rates"]
    common = [*maskdit_flags(bench), "--lr-end", 1]
    needed = {name: bench.on_every_seed(name, f"{name}-last") for name in ARMS}
    steps = {name: partial(count_timed_steps, bench, name, scale["short"]) for name in ARMS}
    for weight, run in weight_runs(bench).items():
        if len(scale["recon"]) > 1:
            target = ["--recon-target", "noisy"] if weight else []
            bench.train_arm(run, train.main, *common, *HALF, "--recon", weight, *target,
                            "--lr", rates[len(rates) // 2], "--steps", steps["half"],
                            before=(*bench.rate_runs("half").values(), *needed["half"]))
    for name in ARMS if len(rates) > 1 else ():
        for rate, run in bench.rate_runs(name).items():
            bench.train_arm(run, train.main, *common, *own_flags(bench, name), "--lr", rate,
                            "--steps", steps[name], before=needed[name])


def train_both_stages(bench, name):
    """Three quarters of the time at the chosen rate, a last quarter on all tokens."""
    minutes, last = bench.scale["minutes"], f"{name}-last"
    rate = partial(bench.choose_by_loss, bench.rate_runs(name))
    bench.train_arm(name, train.main, *maskdit_flags(bench), *own_flags(bench, name), "--lr", rate,
                    "--lr-end", 1, "--steps",
                    partial(count_timed_steps, bench, name, (1 - LAST) * minutes), before=(last,))
    bench.train_arm(last, finetune.main, "--from", bench.folder / name,
                    "--lr", partial(halve_rate, rate), "--steps",
                    partial(count_timed_steps, bench, name, LAST * minutes, True))


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
    better, worse = count_better(cells["half-last"], cells["all-tokens-last"])
    of = f"of {len(PROXY_ORDER) * len(cells['half-last'])} comparisons (a distance and a seed each)"
    if better and not worse:
        return f"**Holds here**: at equal time half of the tokens are better in {better} {of}."
    if worse and not better:
        return f"**Does not hold here**: at equal time all tokens are better in {worse} {of}."
    return (f"**No time is saved here**: at equal time half of the tokens are better in {better} "
            f"and worse in {worse} {of}.")


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
    scale, runs = bench.scale, {name: bench.rate_runs(name) for name in ARMS}
    parts = describe_rates(bench, runs, f"{scale['short']} minutes")
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
