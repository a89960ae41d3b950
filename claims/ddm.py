"""[DDM] Ten analytic steps against the ancestral sampler of DDPM.

The claim (DDM, arXiv 2306.13720). When the image fades to zero analytically while the noise
grows, ten network calls are enough; DDPM needs hundreds.

Arms. `ddm-both` is DDM's own: its schedule and two heads. `vp-linear-eps` is DDPM. Both
have the full length. Their checkpoints at half the length are arms too, for the learning
rate is constant and the average does the annealing. `vp-linear-unit` and `ddm-unit` have
half the length and stand between the two.

Measured. Distances of samples to training images, as is usual: DDM's arm by five samplers
at 1 to 50 calls, DDPM's by its ancestral sampler at up to 1000; every solver and grid at
ten calls; and a ladder from DDPM to DDM that changes one thing at a time.

Fairness. All arms have the same images, network, batch, learning rate and seed. They differ
in schedule, prediction and steps, and in nothing else.
"""
import train
from claims.bench import Bench, count_calls, format_distances, format_table, refuse_gray

SCALES = {
    "smoke": dict(
        steps=8, half=4, model="tiny", train=["--batch", 4, "--sample-every", 8], batch=12,
        n=12, few=8, calls=[1, 2, 5], long=[], ddpm=[2, 5],
    ),
    # 5,400 steps were 30 minutes on the two quiet cores (0.33 s a step) where they were
    # chosen.
    "cpu": dict(
        steps=5400, half=2700, model="tiny", train=["--batch", 64, "--sample-every", 900], batch=50,
        n=1000, few=500, calls=[1, 2, 5, 10, 20, 50], long=[100, 200], ddpm=[10, 50, 200, 1000],
    ),
    "gpu": dict(
        steps=100_000, half=50_000, model="small", batch=500,
        train=["--batch", 256, "--sample-every", 10_000, "--patch", 2],
        n=10_000, few=10_000, calls=[1, 2, 5, 10, 20, 50], long=[100, 200],
        ddpm=[10, 50, 200, 1000],
    ),
}
OURS, DDPM = "ddm-both", "vp-linear-eps"

# --- samplers: name -> arguments of `sample`; their order is part of a cell's name --------

SAMPLERS = {                                                # of the DDM arm, at every length
    "posterior, uniform": dict(churn=1.0, time_grid="uniform"),
    "posterior, quadratic": dict(churn=1.0, time_grid="quadratic"),
    "deterministic, quadratic": dict(time_grid="quadratic"),
    "Heun, quadratic": dict(time_grid="quadratic", solver="heun"),
    "DPM++, edm": dict(solver="dpm++", time_grid="edm"),
}
SOLVERS = {"deterministic": {}, "Heun": dict(solver="heun"), "DPM++": dict(solver="dpm++")}
GRID_TRIALS = {                                             # at ten calls: the best default?
    f"{name}, {grid}": how | dict(time_grid=grid)
    for name, how in SOLVERS.items() for grid in ("uniform", "angle", "split", "edm")
} | {
    "posterior, edm": dict(churn=1.0, time_grid="edm"),
    "DPM++, quadratic": dict(time_grid="quadratic", solver="dpm++"),
}
DDPM_TRIALS = {                                             # of the DDPM arm
    "deterministic, uniform": dict(time_grid="uniform"),
    "deterministic, edm": dict(time_grid="edm"),
    "DPM++, edm": dict(solver="dpm++", time_grid="edm"),
}
ANCESTRAL = dict(churn=1.0)
QUADRATIC = dict(time_grid="quadratic")
LAST = dict(time_grid="edm", solver="dpm++")
LADDER = [                                                  # what changed, arm, sampler
    ("DDPM: vp-linear, eps, ancestral, uniform", DDPM, ANCESTRAL),
    ("solver: deterministic", DDPM, {}),
    ("grid: quadratic", DDPM, QUADRATIC),
    ("prediction: unit", "vp-linear-unit", QUADRATIC),
    ("schedule: ddm", "ddm-unit", QUADRATIC),
    ("prediction: both heads", OURS, QUADRATIC),
    ("grid: edm", OURS, dict(time_grid="edm")),
    ("solver: DPM++", OURS, LAST),
]
CROSSED = [DDPM, "vp-linear-unit", "ddm-unit", OURS]        # all with the last sampler
LONG = ("posterior, uniform", "deterministic, quadratic")   # these also at 100 and 200 calls


def run_ddm(args):
    """ten analytic steps against DDPM's ancestral sampler at up to a thousand [DDM]"""
    refuse_gray(args)
    bench = Bench("ddm", args, SCALES[args.scale])
    full, half = bench.scale["steps"], bench.scale["half"]
    train_denoiser(bench, OURS, "ddm", "both", full)
    train_denoiser(bench, DDPM, "vp-linear", "eps", full)
    if args.arm is None:                                    # first the claim ...
        images, _ = bench.split_images()
        cells = measure_few_steps(bench, images)
    train_denoiser(bench, "vp-linear-unit", "vp-linear", "unit", half)
    train_denoiser(bench, "ddm-unit", "ddm", "unit", half)
    if not bench.all_trained():
        return
    measure_differences(bench, images, cells)               # ... then where it comes from
    bench.write("table.md", describe_few_steps(bench, cells))
    draw_few_steps(bench)


def train_denoiser(bench, name, schedule, predict, steps):
    """Train an arm; the checkpoint at half the length is an arm of its own."""
    args, scale = bench.args, bench.scale
    common = ["--data", args.data, "--size", args.size, "--model", scale["model"], *scale["train"],
              "--lr", 1e-3, "--lr-end", 1, "--save-every", scale["half"], "--workers", 0]
    own = ["--schedule", schedule, "--predict", predict, "--steps", steps]
    bench.train_arm(name, train.main, *common, *own)


def ten_calls(scale):
    """The number of calls of the claim: the fourth of the scale's, or its last."""
    return scale["calls"][:4][-1]


def measure_few_steps(bench, images):
    """The claim's numbers. -> {table: {row: {calls: cell}}}"""
    scale = bench.scale
    n, few, ten = scale["n"], scale["few"], ten_calls(scale)
    cells = {}
    cells["trials"] = {
        label: {ten: bench.distances(images, OURS, few, steps=ten, **how)}
        for label, how in (SAMPLERS | GRID_TRIALS).items()}
    cells["ancestral"] = {
        calls: bench.distances(images, DDPM, few, steps=calls, **ANCESTRAL)
        for calls in scale["ddpm"][:-1]}
    cells["rivals"] = {
        label: {calls: bench.distances(images, DDPM, few, steps=calls, **how)
                for calls in scale["ddpm"][:2]}
        for label, how in DDPM_TRIALS.items()}
    cells["ours"] = {
        label: {calls: bench.distances(images, OURS, n, steps=calls, **how)
                for calls in scale["calls"]}
        for label, how in SAMPLERS.items()}
    return cells


def measure_differences(bench, images, cells):
    """What each difference contributes, at half the length, and the slow rows, added to
    cells."""
    scale = bench.scale
    few, ten = scale["few"], ten_calls(scale)
    paths = {name: f"{name}/{scale['half']:06d}.pt" for name in CROSSED}
    cells["ladder"] = {
        label: bench.distances(images, paths[name], few, steps=ten, **how)
        for label, name, how in LADDER}
    cells["crossed"] = {
        name: bench.distances(images, paths[name], few, steps=ten, **LAST) for name in CROSSED}
    for label in LONG:
        for calls in scale["long"]:
            cell = bench.distances(images, OURS, few, steps=calls, **SAMPLERS[label])
            cells["trials"][label][calls] = cell
    for calls in scale["ddpm"][-1:]:                        # the slowest last
        cell = bench.distances(images, DDPM, few, steps=calls, **ANCESTRAL)
        cells["ancestral"][calls] = cell


def distance_row(label, cells, columns):
    """A row of a table; a number of calls that was not measured stays blank."""
    return [label, *(format_distances(cells[c]) if c in cells else "" for c in columns)]


def describe_few_steps(bench, cells):
    """All tables of the claim, as text."""
    args, scale = bench.args, bench.scale
    ten = ten_calls(scale)
    wide, ddpm, long = scale["calls"], scale["ddpm"], [ten, *scale["long"]]
    first = "posterior, uniform"
    floor = format_distances(cells["ours"][first][wide[0]], 1)
    floor_few = format_distances(cells["trials"][first][ten], 1)
    baseline = distance_row("DDPM, ancestral", cells["ancestral"], ddpm)
    ours = [distance_row(label, row, wide) for label, row in cells["ours"].items()]
    rivals = [distance_row(f"DDPM, {label}", row, ddpm) for label, row in cells["rivals"].items()]
    trials = [distance_row(f"`ddm`, {label}", row, long) for label, row in cells["trials"].items()]
    ladder = [[label, format_distances(cell)] for label, cell in cells["ladder"].items()]
    crossed = [[name, format_distances(cell)] for name, cell in cells["crossed"].items()]
    parts = [
        f"Distances to {args.data}: pixel / random-conv / swd (fid.py --proxy; not FID). "
        f"{scale['n']} samples, seed {args.seed}, floor {floor}.",
        format_table(["`ddm`, two heads", *(f"{c} calls" for c in wide)], ours),
        f"{scale['few']} samples, on both sides, floor {floor_few}:",
        format_table(["", *(f"{c} calls" for c in ddpm)], [baseline, *rivals]),
        format_table(["", *(f"{c} calls" for c in long)], trials),
        f"One change at a time, at {ten} calls, {scale['half']} steps of training, "
        f"{scale['few']} samples:",
        format_table(["change", "distances"], ladder),
        "Every arm with the last solver and grid:",
        format_table(["arm", "distances"], crossed),
    ]
    return "\n\n".join(parts) + "\n"


def draw_few_steps(bench):
    """samples.png: both arms at every number of calls, the same twelve noises in every
    row."""
    rows = []
    for title, name, how, counts in (
            ("ddm", OURS, SAMPLERS["DPM++, edm"], bench.scale["calls"]),
            ("DDPM ancestral", DDPM, ANCESTRAL, bench.scale["ddpm"])):
        for calls in counts:
            pictures = bench.draw(name, 12, steps=calls, **how)
            rows.append((f"{title},\n{count_calls(calls)}", pictures))
    bench.save_sheet("samples.png", rows, [f"noise {i}" for i in range(1, 13)])
