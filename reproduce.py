"""Reproduce: each paper's claim as one small, fair, side-by-side experiment.

The idea. A claim is worth what a stranger can check in an afternoon. So a claim is a function here: it trains its *arms* (networks of one
size, on the same images, seed, batch and number of steps, that differ in the thing under test and in nothing else), draws from all of
them with the same noise, measures, and writes a table and pictures. It reports what comes out, not what should.

    python reproduce.py maskdm --data faces64.zip --gray --size 64     # a tenth of the tokens against all of them             [MaskDM]
    python reproduce.py ddm   --data cifar10-train.zip         # ten analytic steps against the ancestral sampler of DDPM      [DDM]
    python reproduce.py tasks --data faces64.zip               # super-resolution, inpainting, edges, saliency in ten calls    [DDM]
    python reproduce.py maskdit --data cifar10-train.zip       # half of the tokens and a light decoder against all of them    [MaskDiT]
    python reproduce.py lmd --data faces64.zip --gray --size 64        # a rising mask against a fixed one, in latents         [LMD]

    --scale smoke    does it run? a minute        cpu    the README's numbers, hours on two cores        gpu    the papers' sizes, for one GPU
    --arm NAME       only train this arm          anything that is there already is not done again: kill it, start it again

Below runs/reproduce/CLAIM/ every arm is an ordinary run (log.csv, checkpoints: sample.py and finetune.py work on it), cells.json holds
every number measured so far, table.md and the pictures are made from it (bench.py). Distances are fid.py's proxies: not FID, and only
comparable at equal n.
"""
import functools

import torch

import finetune
import train
import vae
from claims.bench import Bench, format_table, draw_sheet, format_distances
from plumbing.checkpoint import read_checkpoint
from plumbing.console import UserError, build_parser, run_command
from data import holdout, load_images
from plumbing.machine import amp_type
from restore import reconstruction_errors, draw_reconstruction, reconstruct, restore_pictures
from tasks import TASKS, make_condition, place_side_by_side
from plumbing.images import grid, seeded, to_float


# --- [DDM] ten analytic steps ----------------------------------------------------------------------------------------------------------------

SAMPLERS = {                                                                    # of the DDM arm
    "posterior, uniform": dict(churn=1.0, time_grid="uniform"),
    "posterior, quadratic": dict(churn=1.0, time_grid="quadratic"),
    "deterministic, quadratic": dict(time_grid="quadratic"),
    "Heun, quadratic": dict(time_grid="quadratic", solver="heun"),
    "DPM++, edm": dict(solver="dpm++", time_grid="edm"),
}
GRID_TRIALS = {                                                                 # at ten calls only: which is the best default?
    f"{kind}, {grid}": how | dict(time_grid=grid) for kind, how in (("deterministic", {}), ("Heun", dict(solver="heun")), ("DPM++", dict(solver="dpm++")))
    for grid in ("uniform", "angle", "split", "edm")
} | {"posterior, edm": dict(churn=1.0, time_grid="edm"), "DPM++, quadratic": dict(time_grid="quadratic", solver="dpm++")}
DDPM_TRIALS = {"deterministic, uniform": dict(time_grid="uniform"), "deterministic, edm": dict(time_grid="edm"), "DPM++, edm": dict(solver="dpm++", time_grid="edm")}
DDM_SCALES = {
    "smoke": dict(steps=20, half=10, model="tiny", train=["--batch", 8, "--sample-every", 20], n=24, few=16, calls=[1, 2, 5], long=[], ddpm=[5, 10], batch=64),
    # 5,400 steps are 30 minutes, 2,700 are 15, on the two quiet cores (0.33 s a step) on which they were chosen
    "cpu": dict(steps=5400, half=2700, model="tiny", train=["--batch", 64, "--sample-every", 900], n=1000, few=500, calls=[1, 2, 5, 10, 20, 50],
                long=[100, 200], ddpm=[10, 50, 200, 1000], batch=50),
    "gpu": dict(steps=100_000, half=50_000, model="small", train=["--batch", 256, "--sample-every", 10_000, "--patch", 2], n=10_000, few=10_000,
                calls=[1, 2, 5, 10, 20, 50], long=[100, 200], ddpm=[10, 50, 200, 1000], batch=500),
}


def run_ddm(args):
    """[DDM] `ddm` with two heads at 10 calls against DDPM (`vp-linear`, eps) at up to 1000, and what each difference contributes.

    Two arms of the full length, which are also arms of half the length (the learning rate is constant, the average does the
    annealing), and two more of half the length that stand between them. Distances are to training images, as is usual."""
    bench = Bench("ddm", args, scale := DDM_SCALES[args.scale])
    common = ["--data", args.data, "--size", args.size, "--model", scale["model"], *scale["train"], "--lr", 1e-3, "--lr-end", 1,
              "--save-every", scale["half"], "--workers", 0]             # the half-way checkpoint is an arm of half the length
    ours, ddpm = "ddm-both", "vp-linear-eps"
    arm = lambda name, schedule, predict, steps: bench.train_arm(name, train.main, *common, "--schedule", schedule, "--predict", predict, "--steps", steps)
    arm(ours, "ddm", "both", scale["steps"])
    arm(ddpm, "vp-linear", "eps", scale["steps"])
    images, _ = holdout(load_images(args.data, args.size, seed=args.seed), "0.02", seed=args.seed)
    distances = lambda path, n, **how: bench.distances(images, path, n, **how)
    half = lambda name: f"{name}/{scale['half']:06d}.pt"
    n, few, best = scale["n"], scale["few"], scale["calls"][min(3, len(scale["calls"]) - 1)]

    if args.arm is None:                                                        # the claim first
        ten = {label: distances(ours, few, steps=best, **how) for label, how in (SAMPLERS | GRID_TRIALS).items()}
        baseline = {c: distances(ddpm, few, steps=c, churn=1.0) for c in scale["ddpm"][:-1]}
        rivals = {label: {c: distances(ddpm, few, steps=c, **how) for c in scale["ddpm"][:2]} for label, how in DDPM_TRIALS.items()}
        table = {label: {c: distances(ours, n, steps=c, **how) for c in scale["calls"]} for label, how in SAMPLERS.items()}
    arm("vp-linear-unit", "vp-linear", "unit", scale["half"])                   # then where it comes from
    arm("ddm-unit", "ddm", "unit", scale["half"])
    if not bench.all_trained():
        return
    ladder = [("DDPM: vp-linear, eps, ancestral, uniform", distances(half(ddpm), few, steps=best, churn=1.0)),
              ("solver: deterministic", distances(half(ddpm), few, steps=best)),
              ("grid: quadratic", distances(half(ddpm), few, steps=best, time_grid="quadratic")),
              ("prediction: unit", distances(half("vp-linear-unit"), few, steps=best, time_grid="quadratic")),
              ("schedule: ddm", distances(half("ddm-unit"), few, steps=best, time_grid="quadratic")),
              ("prediction: both heads", distances(half(ours), few, steps=best, time_grid="quadratic")),
              ("grid: edm", distances(half(ours), few, steps=best, time_grid="edm")),
              ("solver: DPM++", distances(half(ours), few, steps=best, time_grid="edm", solver="dpm++"))]
    crossed = [(name, distances(half(name), few, steps=best, time_grid="edm", solver="dpm++")) for name in (ddpm, "vp-linear-unit", "ddm-unit", ours)]
    long = {label: {c: distances(ours, few, steps=c, **SAMPLERS[label]) for c in scale["long"]} for label in ("posterior, uniform", "deterministic, quadratic")}
    baseline |= {c: distances(ddpm, few, steps=c, churn=1.0) for c in scale["ddpm"][-1:]}       # the slowest last

    calls, floors = scale["calls"], (next(iter(table["posterior, uniform"].values())), ten["posterior, uniform"])
    text = [f"Distances to {args.data}: pixel / random-conv / swd (fid.py --proxy; not FID). {n} samples, seed {args.seed}, floor {format_distances(floors[0], 1)}.", "",
            format_table(["`ddm`, two heads", *(f"{c} calls" for c in calls)],
                     [[label, *(format_distances(row[c]) if c in row else "" for c in calls)] for label, row in table.items()]),
            "", f"{few} samples, on both sides, floor {format_distances(floors[1], 1)}:", "",
            format_table(["", *(f"{c} calls" for c in scale["ddpm"])], [["DDPM, ancestral", *(format_distances(baseline[c]) for c in scale["ddpm"])]]
                     + [[f"DDPM, {label}", *(format_distances(row[c]) if c in row else "" for c in scale["ddpm"])] for label, row in rivals.items()]), "",
            format_table(["", f"{best} calls", *(f"{c} calls" for c in scale["long"])],
                     [[f"`ddm`, {label}", format_distances(cell), *(format_distances(long[label][c]) if label in long else "" for c in scale["long"])] for label, cell in ten.items()]),
            "", f"One change at a time, at {best} calls, {scale['half']} steps of training, {few} samples:", "",
            format_table(["change", "distances"], [[label, format_distances(cell)] for label, cell in ladder]),
            "", "Every arm with the last solver and grid:", "", format_table(["arm", "distances"], [[name, format_distances(cell)] for name, cell in crossed])]
    bench.write("table.md", "\n".join(text) + "\n")
    rows = [(f"{arm}, {c} call{'s' * (c > 1)}", bench.draw(path, 12, steps=c, **how)) for arm, path, how, counts in
            (("ddm", ours, SAMPLERS["DPM++, edm"], scale["calls"]), ("DDPM ancestral", ddpm, dict(churn=1.0), scale["ddpm"])) for c in counts]
    draw_sheet(rows, [], 2).save(bench.folder / "samples.png")
    print(f"wrote {bench.folder / 'samples.png'}: the same twelve noises in every row")


# --- [DDM] image-conditioned tasks in ten calls ------------------------------------------------------------------------------------------

TASK_SCALES = {                                                                 # steps of: the masked first stage, a task from scratch; tuned ones take half
    "smoke": dict(pre=20, tune=10, model="tiny", train=["--batch", 8], n=16, calls=[1, 2, 5], batch=64),
    "cpu": dict(pre=1500, tune=1500, model="tiny", train=["--batch", 64], n=256, calls=[1, 2, 5, 10], batch=64),
    "gpu": dict(pre=50_000, tune=20_000, model="small", train=["--batch", 256], n=1024, calls=[1, 2, 5, 10, 20], batch=256),
}


def run_tasks(args):
    """[DDM] Every task at up to 10 calls on held-out images, and whether super-resolution learns faster from a masked, unconditional first stage
    (whose steps come on top, but serve every task).

    Photographs are trained on a quarter of the tokens (the first stage on a tenth, a short last one on all), faces at half the size on all of
    them: edges and silhouettes are learned so fast that a third of the steps will do. Of photographs the edge map is the gradient of the condition
    itself, so there "without a network" is perfect by definition, and the error says how well a network can learn a formula."""
    bench = Bench("tasks", args, scale := TASK_SCALES[args.scale])
    common = [*scale["train"], "--lr", 2e-3, "--save-every", 10**9, "--workers", 0]
    photos = ["--data", args.data, "--size", args.size, *(["--gray"] if args.gray else [])]
    network = ["--model", scale["model"], "--predict", "unit"]
    tune, arms = scale["tune"], {}                                              # arms: name -> task

    def arm(name, task, command, steps, *flags, before=()):
        arms[name] = task
        bench.train_arm(name, command, *flags, *common, "--task", task, "--steps", max(1, steps), "--sample-every", max(1, steps // 5), before=before)

    bench.train_arm("masked", train.main, *photos, *network, *common, "--mask", 0.9, "--steps", scale["pre"], "--sample-every", scale["pre"],
              before=("superres-tuned", "inpaint-tuned", "superres-whole", "inpaint-whole"))
    first, quarter = ["--from", bench.folder / "masked"], ["--mask", 0.75]
    arm("superres-tuned", "superres", finetune.main, tune // 2, *first, *quarter, before=("superres-whole",))
    arm("superres-scratch", "superres", train.main, tune, *photos, *network, *quarter)
    arm("inpaint-tuned", "inpaint", finetune.main, tune // 2, *first, *quarter, before=("inpaint-whole",))
    for task in ("superres", "inpaint"):                                        # and a last, short stage on all tokens
        arm(f"{task}-whole", task, finetune.main, tune // 10, "--from", bench.folder / f"{task}-tuned")
    arm("edges-scratch", "edges", train.main, tune // 3, *photos, *network, *quarter)
    for task in ("edges", "saliency"):
        arm(f"faces-{task}", task, train.main, tune // 3, "--data", "faces", "--size", args.size // 2, *network)
    if not bench.all_trained():
        return

    def held_out(name, task):
        """Truth and condition of held-out images of the arm's own data."""
        data, gray = ("faces", False) if name.startswith("faces-") else (args.data, args.gray)
        exact = TASKS[task].exact if data == "faces" else None
        size = args.size // 2 if name.startswith("faces-") else args.size
        _, images = holdout(load_images(data, size, gray, seed=args.seed, targets=exact), "0.02", seed=args.seed)
        x, _ = images.take(torch.arange(min(scale["n"], len(images))))
        return make_condition(task, to_float(x), images.maps, g=seeded(args.seed, 101))

    rows, pictures, calls = [], {}, [f"{c} call{'s' * (c > 1)}" for c in scale["calls"]]
    for name, task in arms.items():
        truth, cond = held_out(name, task)
        loaded = bench.model(name)
        how = dict(seed=args.seed, batch=scale["batch"], amp=amp_type("auto", loaded.device))

        def score(result):
            return {k: round(f(result, truth, cond), 4) for k, f in TASKS[task].scores.items()}

        plain = bench.measure_once(f"{name} plain n={len(truth)}", lambda: score(TASKS[task].plain(cond)))
        cells = {c: bench.measure_once(f"{name} n={len(truth)} steps={c}", lambda: score(restore_pictures(loaded, cond, steps=c, **how))) for c in scale["calls"]}
        rows += [[name if i == 0 else "", key, f"{plain[key]:.3f}", *(f"{cells[c][key]:.3f}" for c in scale["calls"])] for i, key in enumerate(plain)]
        few = {c: restore_pictures(loaded, cond[:4], steps=c, **how) for c in scale["calls"]}
        pictures[name] = [(f"{name}" if i == 0 else "", place_side_by_side(cond[i:i + 1], *(few[c][i:i + 1] for c in scale["calls"]), truth[i:i + 1])) for i in range(min(4, len(truth)))]
    text = [f"{args.data} and the built-in faces (at half the size), {args.size} px, {scale['n']} held-out images at most, seed {args.seed}; {tune} steps from scratch "
            f"(edges, saliency: {tune // 3}), {tune // 2} when tuned from {scale['pre']} masked steps.", "",
            format_table(["arm", "score", "without a network", *calls], rows)]
    bench.write("table.md", "\n".join(text) + "\n")
    titles = ["condition", *calls, "truth"]
    for name, lines in pictures.items():
        draw_sheet(lines, titles, left=110).save(bench.folder / f"{name}.png")
    print(f"wrote {', '.join(f'{name}.png' for name in pictures)} in {bench.folder}")


# --- [MaskDM] a tenth of the tokens ----------------------------------------------------------------------------------------------------

MASKDM_SCALES = {
    "smoke": dict(steps=6, minutes=1, model="tiny", train=["--batch", 4], n=12, batch=12),
    "cpu": dict(minutes=9, model="tiny", train=["--batch", 64], n=250, batch=25),
    "gpu": dict(minutes=120, model="small", train=["--batch", 256], n=10_000, batch=250),
}


def run_maskdm(args):
    """[MaskDM] All tokens against a tenth of them, in blocks, at three points of equal training time: a third, two thirds, and, after a last
    third on all tokens at half the rate, falling, for both, the end. As in `maskdit`, a minute is a number of steps, timed at the start."""
    bench = Bench("maskdm", args, scale := MASKDM_SCALES[args.scale])
    common = ["--data", args.data, "--size", args.size, *(["--gray"] if args.gray else []), "--model", scale["model"], *scale["train"], "--lr", 2e-3, "--lr-end", 1, "--workers", 0]
    arms = {"all-tokens": [], "masked": ["--mask", 0.9, "--policy", "block", "--block", 2]}
    pace = functools.cache(lambda: bench.seconds_per_step({name: [*common, *flags] for name, flags in arms.items()}, visits=2))
    third = lambda name: max(1, round(20 * scale["minutes"] / pace()[name]))
    for name, flags in arms.items():
        bench.train_arm(name, train.main, *common, *flags, "--steps", lambda: 2 * third(name), "--save-every", lambda: third(name), "--sample-every", lambda: third(name),
                  before=(f"{name}-last",))
        bench.train_arm(f"{name}-last", finetune.main, "--from", bench.folder / name, "--lr", 1e-3, "--lr-end", 0.05, "--sample-every", 10**9, "--steps", lambda: third("all-tokens"))
    if not bench.all_trained():
        return
    images, _ = holdout(load_images(args.data, args.size, args.gray, seed=args.seed), "0.02", seed=args.seed)
    points = {name: [f"{name}/{third(name):06d}.pt", f"{name}/{2 * third(name):06d}.pt", f"{name}-last/last.pt"] for name in arms}
    cells = {name: [bench.distances(images, path, scale["n"], steps=10) for path in paths] for name, paths in points.items()}
    bench.write("table.md", "\n".join([
        f"Distances to {args.data}, pixel / random-conv / swd (not FID), {scale['n']} samples of 10 calls, seed {args.seed}, floor {format_distances(cells['masked'][-1], 1)}. "
        f"{scale['minutes']} minutes of training an arm, the last third of both on all tokens at a falling rate.", "",
        format_table(["arm", "seconds a step", "1/3 of the time", "2/3", "all", "steps", "val_loss at the end"],
                 [[name, f"{pace()[name]:.3f}", *map(format_distances, row), f"{bench.log(name, 'step'):.0f} + {bench.log(f'{name}-last', 'step'):.0f}",
                   f"{bench.log(f'{name}-last', 'val_loss'):.4f}"] for name, row in cells.items()])]) + "\n")
    draw_sheet([(f"{name}, {when}", bench.draw(path, 10, steps=10)) for name, paths in points.items() for when, path in zip(("1/3", "2/3", "all"), paths)],
          [], 1).save(bench.folder / "samples.png")
    print(f"wrote {bench.folder / 'samples.png'}: the same ten noises in every row")


# --- [MaskDiT] half of the tokens ------------------------------------------------------------------------------------------------------

MASKDIT_SCALES = {
    "smoke": dict(steps=8, minutes=1, model="tiny", train=["--batch", 4], rates=[1e-3], n=12, calls=3, batch=12, side_arms=1),
    "cpu": dict(minutes=20, model="tiny", train=["--batch", 64], rates=[5e-4, 1e-3, 2e-3], n=500, calls=39, batch=50, side_arms=2),
    "gpu": dict(minutes=240, model="small", train=["--batch", 256, "--patch", 2], rates=[2e-4, 5e-4, 1e-3], n=10_000, calls=79, batch=500, side_arms=60),
}
HALF = ["--mask", 0.5, "--decoder", 2]
GUIDANCE = (1.5, 2.0, 3.0, 4.0)                                                 # scales of the picture, the same noise at each
SIDE_ARMS = {                                                                   # each enough to see that it learns; name -> flags of its own
    "without-reconstruction": HALF,
    "noisy-target": [*HALF, "--recon", 0.1, "--recon-target", "noisy"],         # as in the arm `half`
    "clean-target": [*HALF, "--recon", 0.1, "--recon-target", "clean"],
    "route": ["--mask", 0.5, "--economy", "route"],
    "defer": ["--mask", 0.75, "--economy", "defer"],
}


def run_maskdit(args):
    """[MaskDiT] All tokens against half of them behind a light decoder with reconstruction, class-conditional, at four points of equal
    training time. Both choose their learning rate from the same three by a short run's val_loss, and both end with a quarter of the time on all
    tokens at half the rate: for one that is unmasking, for the other the same decay.

    The clock is only read at the start: every network is timed alone, five minutes in all, and from then on a minute is a number of steps.
    Leave the machine quiet for these; afterwards the arms may be trained side by side."""
    bench = Bench("maskdit", args, scale := MASKDIT_SCALES[args.scale])
    common = ["--data", args.data, "--size", args.size, "--model", scale["model"], *scale["train"], "--labels", "--schedule", "edm", "--predict", "unit",
              "--time-sampling", "lognormal", "--lr-end", 1, "--workers", 0]
    half = SIDE_ARMS["noisy-target"]
    arms = {"all-tokens": ([], "all-tokens"), "half": (half, "half-whole")}     # flags, and whose pace it has when nothing is hidden
    networks = {"all-tokens": [], "half": half, "half-whole": HALF[2:]}
    pace = functools.cache(lambda: bench.seconds_per_step({name: [*common, *flags] for name, flags in networks.items()}, visits=2)
                           | bench.seconds_per_step({name: [*common, *flags] for name, flags in SIDE_ARMS.items()}))    # when the first arm wants it
    steps = lambda minutes, name: max(1, round(60 * minutes / pace()[name]))
    quarter = lambda name: steps(scale["minutes"] / 4, name)
    for name, (flags, whole) in arms.items():
        for lr in scale["rates"]:
            bench.train_arm(f"{name}-lr-{lr:g}", train.main, *common, *flags, "--lr", lr, "--steps", lambda: max(1, quarter(name) // 3), "--sample-every", 10**9,
                      before=(name, f"{name}-last"))
        best = lambda: min(scale["rates"], key=lambda lr: bench.log(f"{name}-lr-{lr:g}", "val_loss"))
        bench.train_arm(name, train.main, *common, *flags, "--lr", best, "--steps", lambda: 3 * quarter(name), "--save-every", lambda: quarter(name), "--sample-every", lambda: quarter(name),
                  before=(f"{name}-last",))
        # the last quarter of the time, for both: all tokens, half the rate, decaying. [MaskDiT] calls it unmasking tuning
        bench.train_arm(f"{name}-last", finetune.main, "--from", bench.folder / name, "--lr-end", 0.05, "--sample-every", 10**9, "--lr", lambda: best() / 2, "--steps", lambda: quarter(whole))
    for name, flags in SIDE_ARMS.items():
        bench.train_arm(name, train.main, *common, *flags, "--lr", 1e-3, "--steps", lambda: steps(scale["side_arms"], name), "--sample-every", 10**9)
    if not bench.all_trained():
        return
    points = {name: [f"{name}/{quarter(name) * k:06d}.pt" for k in (1, 2, 3)] + [f"{name}-last/last.pt"] for name in arms}
    images, _ = holdout(load_images(args.data, args.size, labels=True, seed=args.seed), "0.02", seed=args.seed)
    labels = torch.arange(scale["n"]) % len(images.classes)
    how = dict(steps=scale["calls"], solver="heun", time_grid="edm")
    distances = lambda path: bench.distances(images, path, scale["n"], labels=labels, **how)
    table = [[name, *(format_distances(distances(path)) for path in paths)] for name, paths in points.items()]
    rates = [[name, f"{pace()[name]:.3f}", *(f"{bench.log(f'{name}-lr-{lr:g}', 'val_loss'):.4f}" for lr in scale["rates"])] for name in arms]
    side = [[name, f"{bench.log(name, 'val_loss'):.4f}", f"{bench.log(name, 'step'):.0f}"] for name in SIDE_ARMS]
    bench.write("table.md", "\n".join([
        f"Distances to {args.data}, pixel / random-conv / swd (not FID), {scale['n']} class-conditional samples of {scale['calls']} calls, seed {args.seed}, floor "
        f"{format_distances(distances(points['half'][-1]), 1)}. {scale['minutes']} minutes of training an arm, the last quarter of both with all tokens at a falling rate.", "",
        format_table(["arm", "1/4 of the time", "1/2", "3/4", "all"], table), "",
        "The learning rate was chosen by val_loss after a twelfth of the time:", "",
        format_table(["arm", "seconds a step", *(f"{lr:g}" for lr in scale["rates"])], rates), "",
        f"Short runs of {scale['side_arms']} minutes:", "", format_table(["arm", "val_loss", "steps"], side)]) + "\n")
    few = torch.arange(10) % len(images.classes)
    draw_sheet([(f"{name}, {when}", bench.draw(path, 10, labels=few, **how)) for name, paths in points.items() for when, path in zip(("1/4", "1/2", "3/4", "all"), paths)],
          [], 2).save(bench.folder / "samples.png")
    guided = [(images.classes[c], torch.cat([bench.draw(points["half"][-1], 3, labels=torch.full((3,), c), cfg=s, **how) for s in GUIDANCE])) for c in range(min(10, len(images.classes)))]
    draw_sheet(guided, [f"cfg {s:g}" if i == 0 else "" for s in GUIDANCE for i in range(3)], 2).save(bench.folder / "guidance.png")
    print(f"wrote samples.png and guidance.png in {bench.folder}")


# --- [LMD] a rising mask, in latents -----------------------------------------------------------------------------------------------------

LMD_SCALES = {
    "smoke": dict(steps=8, minutes=1, vae=["--steps", 4], model="tiny", train=["--batch", 4], batch=8),
    "cpu": dict(minutes=10, vae=["--minutes", 10], model="tiny", train=["--batch", 64], batch=64),
    "gpu": dict(minutes=60, vae=["--minutes", 60], model="base", train=["--batch", 256], batch=256),
}


def run_lmd(args):
    """[LMD] Reconstruction of hidden latents: a fixed ratio of 0.75 against a cosine ramp from 0.15, at equal training time, by the held-out
    error at fixed ratios; then a generator in the same latents, trained on a quarter of the tokens and fine-tuned on all."""
    bench = Bench("lmd", args, scale := LMD_SCALES[args.scale])
    photos = ["--data", args.data, "--size", args.size, *(["--gray"] if args.gray else [])]

    def autoencoder():                                                          # trained when the first arm wants it
        weights = bench.folder / "vae.pt"
        if not weights.exists():
            vae.main([str(f) for f in (*photos, *scale["vae"], "--seed", args.seed, "--device", args.device, "--out", weights)])
        return weights

    common = [*photos, "--space", "latent", "--vae", autoencoder, "--latents", bench.folder / "latents", "--patch", 2, "--model", scale["model"], *scale["train"]]
    guess = [*common, "--objective", "reconstruct", "--decoder", 4, "--mask", 0.75]
    fifth = lambda: max(1, round(12 * scale["minutes"] / bench.seconds_per_step({"fixed": guess})["fixed"]))
    # a ramp's steps cost more while more is visible, so both arms are given the time, not the number of steps
    length = ["--steps", scale["steps"]] if "steps" in scale else ["--minutes", scale["minutes"]]
    arms = {"fixed": [], "cosine": ["--mask-from", 0.15, "--ramp", "cosine"]}
    for name, flags in arms.items():
        bench.train_arm(name, train.main, *guess, *flags, *length, "--save-every", fifth, "--sample-every", fifth)
    bench.train_arm("generator", train.main, *common, "--mask", 0.75, *length, before=("generator-whole",))
    bench.train_arm("generator-whole", finetune.main, "--from", bench.folder / "generator",
              *(["--steps", scale["steps"]] if "steps" in scale else ["--minutes", scale["minutes"] / 2]))
    if not bench.all_trained():
        return
    _, held_out = holdout(load_images(args.data, args.size, args.gray, seed=args.seed), "0.02", seed=args.seed)
    rows = []
    for name in arms:
        for path in sorted((bench.folder / name).glob("0*.pt")) + [bench.folder / name / "last.pt"]:
            key = f"{name}/{path.name}"
            errors = bench.measure_once(key, lambda: {f"{ratio:g}": round(error, 5) for ratio, error in reconstruction_errors(bench.model(key), held_out).items()}
                                | dict(minutes=round(read_checkpoint(path)["seconds"] / 60, 2), step=read_checkpoint(path)["step"]))
            rows.append([name, f"{errors['minutes']:.1f}", errors["step"], *(f"{errors[k]:.4f}" for k in ("0.15", "0.4", "0.55", "0.75"))])
    bench.write("table.md", f"Held-out error of hidden latents (1: the mean image), {args.data}, seed {args.seed}.\n\n"
                + format_table(["arm", "minutes", "step", "ratio 0.15", "0.4", "0.55", "0.75"], rows) + "\n")
    x = to_float(held_out.take(torch.arange(min(4, len(held_out))))[0])
    for name in arms:
        draw_reconstruction(reconstruct(bench.model(name), x, 0.75)).save(bench.folder / f"{name}.png")
    grid(bench.draw("generator-whole", 16, steps=10)).save(bench.folder / "faces.png")
    print(f"wrote {', '.join(f'{name}.png' for name in (*arms, 'faces'))} in {bench.folder}")


# --- the command -------------------------------------------------------------------------------------------------------------------------

CLAIMS = {"maskdm": run_maskdm, "ddm": run_ddm, "tasks": run_tasks, "maskdit": run_maskdit, "lmd": run_lmd}


def parser():
    p = build_parser("Reproduce a claim as a small, fair experiment: a table and pictures below --out.")
    p.add_argument("claim", choices=CLAIMS, help="which: maskdm (a tenth of the tokens), ddm (ten analytic steps), tasks (image-conditioned, ten calls), maskdit (half of the tokens), lmd (a rising mask)")
    p.add_argument("--scale", choices=("smoke", "cpu", "gpu"), default="cpu", help="smoke: a minute; cpu: hours on two cores; gpu: for one GPU")
    p.add_argument("--data", default="faces", help="a folder, a .zip, cifar-10-python.tar.gz, or faces for the built-in ones")
    p.add_argument("--size", type=int, default=32, help="pixels along a side")
    p.add_argument("--gray", action="store_true", help="one channel (maskdm, tasks, lmd)")
    p.add_argument("--arm", default=None, help="train this arm and nothing else; all, and the measurements, when left out")
    p.add_argument("--seed", type=int, default=0, help="of training, noise and held-out images")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--out", default="runs/reproduce", help="the claim's files go to a folder of its name in here")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if args.scale == "smoke" and args.out == "runs/reproduce":
        args.out = "runs/reproduce-smoke"                                       # never mixed with the real thing
    if args.threads < 0 or args.size < 8 or args.size % 8:
        raise UserError(f"--threads {args.threads}, --size {args.size}: threads must be at least 0, the size a multiple of 8")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.gray and args.claim in ("ddm", "maskdit"):
        raise UserError(f"--gray is for maskdm, tasks and lmd: the claim {args.claim} is measured in colour")
    CLAIMS[args.claim](args)


if __name__ == "__main__":
    run_command(main)
