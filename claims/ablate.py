"""Ablation: what each part of the recipe is worth, at equal time.

The question. train.py's defaults are a recipe: optimizer, blocks, hidden share, noise. Is
each part worth its time? An arm below differs from `recipe` in one thing. Add a row of your
own and run `python reproduce.py ablate --arm NAME`; without --arm, all of them. The table
has all arms that are trained.

Arms. The first stage hides tokens, the second one (finetune.py) sees all of them. `share`
is the first one's part of the time. An arm with share 0 has one stage, on all tokens.

Measured. Held-out loss and distances to training images at the end, ten calls. Do not read
val_loss alone: it does not see what the samples look like, and it does not compare networks
whose error lies at the lowest noise.

The drawn faces have six minutes an arm, other images half an hour.

Fairness. Equal time: each network is timed alone at the start, and from then on a minute is
a number of steps. Data, seed, batch and evaluation are equal. One seed is one draw: run
another (--seed 1 --out ...) before you believe a small difference.
"""
from dataclasses import dataclass
from functools import partial

import finetune
import train
from claims.bench import Bench, format_distances, format_spread, format_table
from plumbing.console import count_nouns

SCALES = {
    "smoke": dict(steps=6, minutes=1, model="tiny", train=["--batch", 4], n=10, batch=10),
    "cpu": dict(minutes=6, model="tiny", train=[], n=1000, batch=100),  # the drawn faces
    "gpu": dict(minutes=15, model="small", train=["--batch", 256], n=10_000, batch=250),
}
PHOTOGRAPHS = dict(minutes=30, n=2000)                      # instead, at "cpu"
CALLS = 10


@dataclass(frozen=True)
class Arm:
    """A row of the ablation."""
    mask: float = 0.75          # hidden share of the first stage
    share: float = 1 / 2        # of the time, in the first stage
    optimizer: str = "muon"
    dit: bool = False           # DiT's blocks instead of the rotary ones
    flags: tuple = ()           # of both stages; such as cost no time


ARMS = {
    "recipe": Arm(),
    "adamw": Arm(optimizer="adamw"),
    "dit": Arm(dit=True),
    "dit-adamw": Arm(optimizer="adamw", dit=True),
    "ratio-0.5": Arm(mask=0.5),
    "ratio-0.9": Arm(mask=0.9),
    "all-tokens": Arm(mask=0.0, share=0.0),
    "two-thirds-masked": Arm(share=2 / 3),
    "one-third-masked": Arm(share=1 / 3),
    "no-guess": Arm(flags=("--precondition", "none")),
    "rate-x2": Arm(flags=("--lr", 4e-3)),
    "rate-x0.5": Arm(flags=("--lr", 1e-3)),
    "uniform-times": Arm(flags=("--time-sampling", "uniform")),
    "angle-times": Arm(flags=("--time-sampling", "angle")),
    "lognormal-times": Arm(flags=("--time-sampling", "lognormal")),
    # the recipe before: .9 hidden for two thirds of the time
    "before": Arm(mask=0.9, share=2 / 3, optimizer="adamw", dit=True,
                  flags=("--time-sampling", "uniform", "--precondition", "none")),
}


def run_ablate(args):
    """what each part of the recipe is worth"""
    longer = PHOTOGRAPHS if args.scale == "cpu" and args.data != "faces" else {}
    first = Bench("ablate", args, SCALES[args.scale] | longer)
    benches = first.benches
    for bench in benches:
        for name in ARMS:
            train_recipe(bench, name)
    first.all_trained()                                     # an unknown --arm is one line
    trained = [name for name in ARMS
               if all(bench.is_finished(last_stage(name)) for bench in benches)]
    if not trained:
        return
    found = first.compare_seeds([last_stage(name) for name in trained], steps=CALLS)
    cells = dict(zip(trained, found.values()))
    first.write("table.md", describe_arms(benches, cells))
    rows = [(name, first.draw(last_stage(name), 10, steps=CALLS)) for name in trained]
    first.save_sheet("samples.png", rows, [f"noise {i}" for i in range(1, 11)])


def network_flags(bench, arm):
    """The flags of both stages that decide what a step costs."""
    model = bench.scale["model"] + "-dit" * arm.dit
    return [*bench.image_flags(), *bench.scale["train"], "--model", model,
            "--optimizer", arm.optimizer]


def recipe_pace(bench, arm):
    """Seconds a step of both stages, timed once for all arms that have the same network.
    -> (masked, all tokens)"""
    flags, name = network_flags(bench, arm), f"{'dit' if arm.dit else 'rotary'} {arm.optimizer}"
    networks = {f"{name} {mask}": [*flags, "--mask", mask] for mask in (arm.mask, 0.0)}
    seconds = bench.seconds_per_step(networks, visits=2)
    return seconds[f"{name} {arm.mask}"], seconds[f"{name} 0.0"]


def count_steps_of(bench, arm, stage):
    """How many steps a stage (0 or 1) of an arm has in its part of the time."""
    share = (arm.share, 1 - arm.share)[stage]
    return max(1, round(60 * bench.scale["minutes"] * share / recipe_pace(bench, arm)[stage]))


def last_stage(name):
    """The run that an arm ends with."""
    return f"{name}-last" if ARMS[name].share else name


def train_recipe(bench, name):
    """Both stages of an arm."""
    arm, last = ARMS[name], last_stage(name)
    flags = [*network_flags(bench, arm), *arm.flags]
    steps = [partial(count_steps_of, bench, arm, stage) for stage in (0, 1)]
    if last == name:
        bench.train_arm(name, train.main, *flags, "--steps", steps[1])
    else:
        bench.train_arm(name, train.main, *flags, "--mask", arm.mask, "--steps", steps[0],
                        before=(last,))
        # before: so that --arm NAME trains the last stage, too
        bench.train_arm(last, finetune.main, "--from", bench.folder / name, *arm.flags,
                        "--steps", steps[1], before=(name,))


def describe_arms(benches, cells):
    """The ablation's table, as text. cells: {arm: distances, one a seed}"""
    bench, args, scale = benches[0], benches[0].args, benches[0].scale
    floor = format_distances(next(iter(cells.values())), 1)
    head = (f"Distances to {args.data}, pixel / random-conv / swd (not FID), {scale['n']} samples "
            f"of {CALLS} calls, {args.seeds} seed(s) from {args.seed}, floor {floor}. "
            f"{count_nouns(scale['minutes'], 'minute')} of training an arm.")
    rows = []
    for name, cell in cells.items():
        arm, last = ARMS[name], last_stage(name)
        pace = recipe_pace(bench, arm)
        what = ["DiT's blocks,"] * arm.dit + [f"{arm.optimizer}, {arm.mask} hidden,",
                                              f"{arm.share:.2g} of the time", *arm.flags]
        stages = dict.fromkeys((name, last))
        steps = [bench.log(stage, "step") for stage in stages]
        losses = [b.log(last, "val_loss") for b in benches]
        rows.append([name, " ".join(map(str, what)), f"{pace[0]:.3f}, {pace[1]:.3f}",
                     " + ".join(f"{step:.0f}" for step in steps),
                     f"{bench.count_petaflop(*stages):.3g}",
                     format_spread(losses, 4), format_distances(cell)])
    columns = ["arm", "what it is", "seconds a step, masked and all", "steps", "PFLOP",
               "val_loss", "distances"]
    return f"{head}\n\n{format_table(columns, rows)}\n"
