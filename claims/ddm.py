"""[DDM] Ten analytic steps against the ancestral sampler of DDPM.

The claim (DDM, arXiv 2306.13720). When the image fades to zero analytically while the noise
grows, a twentieth of DDPM's steps is enough: ten network calls instead of two hundred.

Arms. `ddm-both` is DDM's own: its schedule and two heads. `vp-linear-eps` is DDPM.
`vp-linear-unit` and `ddm-unit` stand between the two. All see all tokens.

Measured. Distances of samples to training images, as is usual: DDM's arm at 1 to 50 calls,
DDPM's by its ancestral sampler at up to 1000; every solver and grid at ten calls; and a
ladder from DDPM to DDM that changes one thing at a time. Above 50 calls there are fewer
samples; what is compared with those rows has as few.

Fairness. All arms have the same images, network, batch, seed and number of steps, and
choose their learning rate from the same three, by the held-out loss of a short run. They
differ in schedule and prediction, and in nothing else. Their heads are the papers', without
a guess about patches (PatchGuess in vit.py).
"""
from functools import partial

import train
from claims.bench import (
    PROXY_ORDER, Bench, count_better, count_calls, describe_rates, format_distances, format_table,
    refuse_gray)

# short: steps of a run that chooses a rate. few: samples of a row of more than 50 calls,
# and of what it is compared with.
SCALES = {
    "smoke": dict(steps=8, short=4, rates=[2e-3], model="tiny", train=["--batch", 4], batch=12,
                  n=12, few=8, calls=[1, 2], ddpm=[2], long=[3]),
    # 15 minutes an arm on two cores, if a step takes 0.2 s
    "cpu": dict(steps=4500, short=450, rates=[1e-3, 2e-3, 4e-3], model="tiny", train=[],
                batch=100, n=2000, few=500,
                calls=[1, 2, 5, 10, 20, 50], ddpm=[10, 50], long=[200, 1000]),
    "gpu": dict(steps=50_000, short=2500, rates=[5e-4, 1e-3, 2e-3], model="small",
                train=["--batch", 256, "--patch", 2], batch=500, n=10_000, few=10_000,
                calls=[1, 2, 5, 10, 20, 50], ddpm=[10, 50], long=[200, 1000]),
}
ARMS = {                                                    # name -> schedule, prediction
    "ddm-both": ("ddm", "both"),
    "vp-linear-eps": ("vp-linear", "eps"),
    "vp-linear-unit": ("vp-linear", "unit"),
    "ddm-unit": ("ddm", "unit"),
}
OURS, DDPM = "ddm-both", "vp-linear-eps"

# --- samplers: name -> arguments of `sample` ----------------------------------------------

ANCESTRAL = dict(churn=1.0, time_grid="uniform", solver="analytic")
DETERMINISTIC = dict(time_grid="uniform", solver="analytic")
BEST = dict(solver="dpm++", time_grid="edm")                # sample.py's default
SAMPLERS = {                                                # of both arms, at several lengths
    "posterior, uniform": ANCESTRAL,
    "deterministic, uniform": DETERMINISTIC,
    "DPM++, edm": BEST,
}
SOLVERS = {"deterministic": dict(solver="analytic"), "Heun": dict(solver="heun"),
           "DPM++": dict(solver="dpm++"), "posterior": dict(churn=1.0, solver="analytic")}
GRIDS = ("uniform", "quadratic", "angle", "split", "edm")
LADDER = [                                                  # what changed, arm, sampler
    ("DDPM: vp-linear, eps, ancestral, uniform", DDPM, ANCESTRAL),
    ("solver: deterministic", DDPM, DETERMINISTIC),
    ("prediction: unit", "vp-linear-unit", DETERMINISTIC),
    ("schedule: ddm", "ddm-unit", DETERMINISTIC),
    ("prediction: both heads", OURS, DETERMINISTIC),
    ("grid: edm", OURS, dict(time_grid="edm", solver="analytic")),
    ("solver: DPM++", OURS, BEST),
]


def run_ddm(args):
    """ten analytic steps against DDPM's ancestral sampler at up to a thousand [DDM]"""
    refuse_gray(args)
    first = Bench("ddm", args, SCALES[args.scale])
    for bench in first.benches:
        for name in ARMS:
            train_denoiser(bench, name)
    if not first.all_trained():
        return
    for bench in first.benches:                             # a table for each seed
        images, _ = bench.split_images()
        tables = measure_samplers(bench, images), measure_slow_rows(bench, images)
        bench.write("table.md", describe_samplers(bench, *tables))
        draw_few_steps(bench)


def ddm_flags(bench, name):
    """The flags of an arm, but for its rate and its steps."""
    schedule, predict = ARMS[name]
    return [*bench.image_flags(), "--model", bench.scale["model"], *bench.scale["train"],
            "--schedule", schedule, "--predict", predict, "--precondition", "none"]


def train_denoiser(bench, name):
    """Train an arm at the best rate of its short runs, which serve all seeds."""
    flags, runs = ddm_flags(bench, name), bench.rate_runs(name)
    if bench.first is bench and len(runs) > 1:
        for rate, run in runs.items():
            bench.train_arm(run, train.main, *flags, "--lr", rate, "--steps",
                            bench.scale["short"], before=bench.on_every_seed(name))
    bench.train_arm(name, train.main, *flags, "--lr", partial(bench.choose_by_loss, runs),
                    "--steps", bench.scale["steps"])


# --- numbers ------------------------------------------------------------------------------

def ten_calls(scale):
    """The number of calls of the claim: the fourth of the scale's, or its last."""
    return scale["calls"][:4][-1]


def measure_samplers(bench, images):
    """Everything of up to 50 calls. -> {table: {row: {calls: cell}, or cell}}"""
    scale, ten = bench.scale, ten_calls(bench.scale)

    def measure(name, calls, how):
        return bench.distances(images, name, scale["n"], steps=calls, **how)

    rows = [(name, label, counts) for name, counts in ((OURS, scale["calls"]),
                                                       (DDPM, scale["ddpm"]))
            for label in SAMPLERS]
    return dict(
        calls={f"`{name}`, {label}": {calls: measure(name, calls, SAMPLERS[label])
                                      for calls in counts} for name, label, counts in rows},
        grids={solver: {grid: measure(OURS, ten, how | dict(time_grid=grid)) for grid in GRIDS}
               for solver, how in SOLVERS.items()},
        ladder={label: measure(name, ten, how) for label, name, how in LADDER},
        arms={name: measure(name, ten, BEST) for name in ARMS})


def measure_slow_rows(bench, images):
    """DDPM's long rows, and ten of our calls with as few samples.
    -> {row: {calls: cell}}"""
    scale, ten = bench.scale, ten_calls(bench.scale)
    rows = {f"`{OURS}`, {label}": (OURS, [ten], SAMPLERS[label])
            for label in ("posterior, uniform", "DPM++, edm")}
    rows[f"`{DDPM}`, ancestral"] = (DDPM, [ten, *scale["long"]], ANCESTRAL)
    return {row: {calls: bench.distances(images, name, scale["few"], steps=calls, **how)
                  for calls in counts} for row, (name, counts, how) in rows.items()}


# --- the tables ---------------------------------------------------------------------------

def format_rows(rows, columns):
    """Rows of a table; what was not measured stays blank."""
    return [[label, *(format_distances(cells[c]) if c in cells else "" for c in columns)]
            for label, cells in rows.items()]


def judge_few_calls(bench, arms, slow):
    """What the numbers say about ten calls and two hundred, and to whom the merit belongs.

    arms: {arm: distances at ten calls of the best sampler}. slow: from
    `measure_slow_rows`."""
    ten, many = ten_calls(bench.scale), bench.scale["long"][0]
    papers, best, ddpm = slow.values()
    words = []
    for row in (papers, best):
        _, worse = count_better(row[ten], ddpm[many])
        words.append(f"does not hold on {worse} of {len(PROXY_ORDER)} distances" if worse
                     else "holds")
    better, worse = count_better(arms[OURS], arms[DDPM])
    return (f"{ten} calls are as good as {many} of DDPM: with the paper's own sampler this "
            f"**{words[0]}** here, with DPM++ on EDM's grid it **{words[1]}**. With that solver, "
            f"too, `{OURS}` is better than DDPM's network at {ten} calls on {better} and worse on "
            f"{worse} of {len(PROXY_ORDER)} distances: so much is not the solver's merit.")


def describe_samplers(bench, tables, slow):
    """All tables of the claim, as text."""
    args, scale = bench.args, bench.scale
    ten, calls = ten_calls(scale), sorted({*scale["calls"], *scale["ddpm"]})
    many = [ten, *scale["long"]]
    floor = format_distances(next(iter(tables["arms"].values())), 1)
    floor_few = format_distances(next(iter(slow.values()))[ten], 1)
    ladder = [[label, format_distances(cell)] for label, cell in tables["ladder"].items()]
    arms = [[name, format_distances(cell)] for name, cell in tables["arms"].items()]
    parts = [
        f"Distances to {args.data}: pixel / random-conv / swd (fid.py --proxy; not FID). "
        f"{scale['n']} samples, seed {args.seed}, floor {floor}.",
        format_table(["", *map(count_calls, calls)], format_rows(tables["calls"], calls)),
        f"{scale['few']} samples, on both sides, floor {floor_few}:",
        format_table(["", *map(count_calls, many)], format_rows(slow, many)),
        f"`{OURS}` at {ten} calls, {scale['n']} samples, every solver and grid:",
        format_table(["", *GRIDS], format_rows(tables["grids"], GRIDS)),
        f"One change at a time, at {ten} calls:",
        format_table(["change", "distances"], ladder),
        "Every arm with the last solver and grid:",
        format_table(["arm", "distances"], arms),
        *describe_rates(bench, {name: bench.rate_runs(name) for name in ARMS},
                        f"{scale['short']} steps"),
        judge_few_calls(bench, tables["arms"], slow),
    ]
    return "\n\n".join(parts) + "\n"


def draw_few_steps(bench):
    """samples.png: both arms at every number of calls, the same twelve noises in every
    row."""
    rows = []
    for title, name, how, counts in (
            ("ddm, DPM++", OURS, BEST, bench.scale["calls"]),
            ("ddm, posterior", OURS, ANCESTRAL, bench.scale["calls"]),
            ("DDPM ancestral", DDPM, ANCESTRAL, [*bench.scale["ddpm"], *bench.scale["long"]])):
        for calls in counts:
            pictures = bench.draw(name, 12, steps=calls, **how)
            rows.append((f"{title},\n{count_calls(calls)}", pictures))
    bench.save_sheet("samples.png", rows, [f"noise {i}" for i in range(1, 13)])
