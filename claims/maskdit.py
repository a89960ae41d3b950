"""[MaskDiT] Half of the tokens behind a light decoder against all of them.

The claim (MaskDiT, arXiv 2306.09305). An encoder that sees half of the tokens, a light
decoder and a little reconstruction of the hidden half reach the quality of a network that
sees all tokens, class by class, in 0.31 of its time.

Arms. `all-tokens`; `half`, the paper's; `route`, where the hidden half only skips the
middle blocks. Each has three quarters of the time at a constant rate, then a last
quarter on all tokens at a falling rate (`-last`): for `half` that is MaskDiT's
unmasking tuning, for the others the same decay. A second end (`-early`) branches off so
early that both stages together have 0.31 of the time. Short runs choose each arm's rate,
and first the weight of the reconstruction: the paper has 0.1 on the denoised image. Here it
is on the raw output, where it weighs about ten times as much.

Measured. Distances to training images, class-conditional, ten calls, before and after the
last quarter and with 0.31 of the time; the same for `half` with guidance.

Fairness. Heads and inputs are EDM's, as in the paper, without a guess about patches
(PatchGuess in vit.py). Equal time: each network is timed alone at the start, and from then
on a minute is a number of steps. Leave the machine quiet for that; afterwards the arms may
be trained side by side.
"""
from functools import partial

import torch

import finetune
import train
from claims.bench import (
    PROXY_ORDER, Bench, count_better, describe_rates, format_distances, format_spread,
    format_table, refuse_gray, tenth_of)
from plumbing.console import count_nouns

# minutes: of an arm. short: of a run that chooses a rate or a weight.
SCALES = {
    "smoke": dict(steps=8, minutes=1, short=0.5, model="tiny", train=["--batch", 4], rates=[1e-3],
                  recon=[0.1], n=12, batch=12),
    "cpu": dict(minutes=30, short=3, model="tiny", train=["--patch", 2],
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
# What is timed: the networks of the first stages, and that of `half` without a mask. Where
# all tokens are seen there is none to route: that is the network of `all-tokens`.
TIMED = {
    **ARMS,
    "half": [*HALF, "--recon", 0.1, "--recon-target", "noisy"],
    "half, last": ["--decoder", 2],
}
LAST_STAGE = {"all-tokens": "all-tokens", "half": "half, last", "route": "all-tokens"}
LAST = 1 / 4                                                # of the time, on all tokens
EARLY = 0.31                                                # of the time, as the paper claims
ENDS = {"early": EARLY, "last": 1}                          # name -> share of the time
CALLS = 10
GUIDANCE = (1.5, 2.0, 3.0)


def run_maskdit(args):
    """half of the tokens and a light decoder against all of them [MaskDiT]"""
    refuse_gray(args)
    first = Bench("maskdit", args, SCALES[args.scale])
    benches = first.benches
    train_choices(first)
    for bench in benches:
        train_arms(bench)
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
            "--labels", "--schedule", "edm", "--predict", "unit", "--time-sampling", "lognormal",
            "--precondition", "none"]


def maskdit_pace(bench, name, is_last=False):
    """Seconds a step of an arm's network, with its mask or in its last stage."""
    networks = {timed: [*maskdit_flags(bench), *flags] for timed, flags in TIMED.items()}
    seconds = bench.seconds_per_step(networks, visits=2)
    return seconds[LAST_STAGE[name] if is_last else name]


def count_timed_steps(bench, name, minutes, is_last=False):
    """How many steps a network takes in some minutes."""
    return max(1, round(60 * minutes / maskdit_pace(bench, name, is_last)))


def list_stages(name):
    """The runs of an arm: its first stage and its ends."""
    return [name, *(f"{name}-{end}" for end in ENDS)]


def weight_runs(bench, end="-end"):
    """{weight of the reconstruction: the short run that tries it, or its end}"""
    return {weight: f"half-recon-{weight:g}{end}" for weight in bench.scale["recon"]}


def chosen_weight(bench, of_target=False):
    """The reconstruction's weight; or, with of_target, its target: the default for none."""
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
    """Short runs of both stages, of the first seed for all: `half` with each weight of the
    reconstruction, then every arm with each rate."""
    rates, common, short = bench.scale["rates"], maskdit_flags(bench), dict(end=1)
    needed = {name: bench.on_every_seed(*list_stages(name)) for name in ARMS}
    if len(bench.scale["recon"]) > 1:
        before = [*bench.rate_runs("half").values(), *bench.rate_runs("half", "-end").values(),
                  *needed["half"]]
        for weight, run in weight_runs(bench, "").items():
            flags = [*HALF, "--recon", weight, "--recon-target", "noisy" if weight else "clean"]
            train_stages(bench, "half", run, bench.scale["short"], short, [*common, *flags],
                         rates[len(rates) // 2], before)
    for name in ARMS if len(rates) > 1 else ():
        for rate, run in bench.rate_runs(name).items():
            train_stages(bench, name, run, bench.scale["short"], short,
                         [*common, *own_flags(bench, name)], rate, needed[name])


def train_arms(bench):
    """Every arm, at its chosen rate, with an end for the whole time and one for a part."""
    for name in ARMS:
        rate = partial(bench.choose_by_loss, bench.rate_runs(name, "-end"))
        train_stages(bench, name, name, bench.scale["minutes"], ENDS,
                     [*maskdit_flags(bench), *own_flags(bench, name)], rate)


def train_stages(
    bench,
    arm,        # a name in ARMS: whose network it is
    run,        # the name of the first stage; its ends are called RUN-END
    minutes,    # of both stages together
    ends,       # {END: share of the time}
    flags,      # of the first stage
    rate,       # of both stages
    before=(),  # the arms that cannot do without this one
):
    """A first stage at a constant rate; then for each end a last stage on all tokens, at a
    falling rate. An end with a part of the time branches off earlier."""
    branch, whole = (partial(count_timed_steps, bench, arm, share * (1 - LAST) * minutes)
                     for share in (min(ends.values()), 1))
    names = [f"{run}-{end}" for end in ends]
    bench.train_arm(run, train.main, *flags, "--lr", rate, "--lr-end", 1,
                    "--warmup", partial(tenth_of, branch), "--save-every", branch, "--keep", 0,
                    "--steps", whole, before=(*names, *before))
    for name, share in zip(names, ends.values()):
        start = partial(bench.checkpoint_after, run, branch) if share < 1 else bench.folder / run
        steps = partial(count_timed_steps, bench, arm, share * LAST * minutes, True)
        bench.train_arm(name, finetune.main, "--from", start, "--lr", rate, "--steps", steps,
                        before=before)


# --- numbers ------------------------------------------------------------------------------

def list_measurements():
    """What is measured: (key of the table, run, further arguments of `sample`)."""
    plain = [(path, path, {}) for name in ARMS for path in list_stages(name)]
    guided = [((path, scale), path, dict(cfg=scale)) for path in ("half", "half-last")
              for scale in GUIDANCE]
    return plain + guided


def measure_classes(bench, images, path, how):
    """Distances of a model's samples, of every class as many."""
    classes = torch.arange(bench.scale["n"]) % len(images.classes)
    return bench.distances(images, path, bench.scale["n"], labels=classes, steps=CALLS, **how)


def judge_arm(cells, name):
    """Two sentences about `half` or `route`. cells: {run: distances, one a seed}"""
    whole = cells["all-tokens-last"]
    of = f"of {len(PROXY_ORDER) * len(whole)} comparisons (a distance and a seed each)"
    better, worse = count_better(cells[f"{name}-early"], whole)
    if worse:
        verdict = f"`{name}`: **does not hold here**, in {EARLY} of the time it is worse than all "
        verdict += f"tokens in all of it in {worse} and better in {better} {of}."
    else:
        verdict = f"`{name}`: **holds here**, in {EARLY} of the time it is as good as all tokens "
        verdict += f"in all of it; it is better in {better} {of}."
    better, worse = count_better(cells[f"{name}-last"], whole)
    return f"{verdict} In equal time it is better in {better} and worse in {worse}."


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
                     *(format_distances(cells[path])
                       for path in (name, f"{name}-early", f"{name}-last"))])
    guided = [[run, format_distances(cells[run]),
               *(format_distances(cells[run, scale]) for scale in GUIDANCE)]
              for run in ("half", "half-last")]
    floor = format_distances(cells["half-last"], 1)
    parts = [
        f"Distances to {args.data}, pixel / random-conv / swd (not FID), {scale['n']} "
        f"class-conditional samples of {CALLS} calls, {args.seeds} seed(s) from {args.seed}, floor "
        f"{floor}. {count_nouns(scale['minutes'], 'minute')} of training an arm.",
        format_table(["arm", "seconds a step", "steps", "PFLOP", "val_loss",
                      "before its last stage", f"after it, in {EARLY} of the time",
                      "after it, in all of the time"], rows),
        *describe_choices(bench),
        "Guidance:",
        format_table(["run", "none", *(f"{scale:g}" for scale in GUIDANCE)], guided),
        judge_arm(cells, "half"),
        judge_arm(cells, "route"),
    ]
    return "\n\n".join(parts) + "\n"


def describe_choices(bench):
    """The held-out losses of the short runs; nothing if there was no choice."""
    scale, runs = bench.scale, {name: bench.rate_runs(name, "-end") for name in ARMS}
    parts = describe_rates(bench, runs, f"{scale['short']} minutes")
    if len(scale["recon"]) > 1:
        losses = [f"{weight:g}: {bench.log(run, 'val_loss'):.4f}"
                  for weight, run in weight_runs(bench).items()]
        parts += [f"The weight of the reconstruction was chosen so, too: {', '.join(losses)}."]
    return parts


# --- pictures -----------------------------------------------------------------------------

def draw_classes(bench, classes):
    """samples.png: every arm before and after its last stages, always the same noises."""
    few = torch.arange(10) % len(classes)
    rows = [(run, bench.draw(run, 10, labels=few, steps=CALLS))
            for name in ARMS for run in list_stages(name)]
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
