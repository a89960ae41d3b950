"""[MaskDM] A quarter of the tokens against all of them, at several lengths of training.

The claim (MaskDM, arXiv 2306.11363). A network that is trained on few of the patches, and
then on all of them, is as good as one that always saw all of them, in a fourth of the time
(the first version of the paper, at 256 px).

Arms. `masked` hides three quarters of the tokens, `all-tokens` none. Each runs once at a
constant rate. At half of each length an end branches off: on all tokens, at a falling rate,
for the other half. So `masked-15` has seen 7.5 minutes of few tokens and 7.5 of all. The
same once more with smaller patches (`-fine`, one seed): the more tokens, the more a mask
saves.

Measured. Distances to training images at the end of each length. The speed-up is the time
of `all-tokens` to its own best distance over the time in which `masked` is as good,
interpolated in the logarithm of time. A distance below its floor counts as the floor, and
one that is larger by no more than seeds differ is as good.

Fairness. Equal time: each network is timed alone at the start, and from then on a minute is
a number of steps. Leave the machine quiet for that. Each arm chooses its rate from the same
three, by the held-out loss of a short run; small patches take the rate of large ones. Data,
network, batch and seed are equal.
"""
import math
from functools import partial

import finetune
import train
from claims.bench import (
    MARGINS, PROXY_ORDER, Bench, count_better, describe_rates, format_distances, format_spread,
    format_table, measure_speed_up, tenth_of)

# lengths, fine, sweep: minutes of an arm, of an arm with small patches, of a short run.
# rates: of both stages.
SCALES = {
    "smoke": dict(steps=4, lengths=[0.5, 1], fine=[1], sweep=0.5, rates=[2e-3], model="tiny",
                  train=["--batch", 4], small=["--patch", 2], n=10, batch=10),
    "cpu": dict(lengths=[7.5, 15, 30, 60], fine=[30], sweep=3, rates=[1e-3, 2e-3, 4e-3],
                model="tiny", train=[], small=["--patch", 2], n=2000, batch=100),
    "gpu": dict(lengths=[3.75, 7.5, 15], fine=[], sweep=1.5, rates=[5e-4, 1e-3, 2e-3],
                model="small", train=["--batch", 256, "--patch", 2], small=[], n=10_000,
                batch=250),
}
ARMS = {"all-tokens": [], "masked": ["--mask", 0.75]}       # name -> flags of its own
CALLS = 10
CLAIMED, BY_LESS = 4, 1.1                                   # a speed-up below 1.1 is none


def run_maskdm(args):
    """few of the tokens against all of them, at several lengths of training [MaskDM]"""
    first = Bench("maskdm", args, SCALES[args.scale])
    benches = first.benches
    for arm in ARMS:
        train_rates(first, arm)
    for fine in (False, True):
        for bench in benches[:seeds_of(fine)]:
            for arm in ARMS:
                train_branches(bench, arm, fine)
    if not first.all_trained():
        return
    cells = {}
    for fine in (False, True):
        cells |= first.compare_seeds(list_ends(first, fine), seeds=seeds_of(fine), steps=CALLS)
    first.write("table.md", describe_branches(benches, cells))
    rows = [(f"{end.rpartition('-')[0]},\n{end.rpartition('-')[2]} minutes",
             first.draw(end, 10, steps=CALLS)) for end in cells]
    first.save_sheet("samples.png", rows, [f"noise {i}" for i in range(1, 11)])


# --- training -----------------------------------------------------------------------------

def branch_lengths(bench, fine):
    """The lengths in minutes, shortest first; each is a multiple of the first."""
    return bench.scale["fine" if fine else "lengths"]


def trunk_name(arm, fine):
    """The run at a constant rate that all ends of an arm branch off from."""
    return f"{arm}-fine" if fine else arm


def end_name(arm, fine, minutes):
    """The run that an arm of some length ends with."""
    return f"{trunk_name(arm, fine)}-{minutes:g}"


def ends_of(bench, arm, fine):
    """The runs that an arm's lengths end with."""
    return [end_name(arm, fine, minutes) for minutes in branch_lengths(bench, fine)]


def list_ends(bench, fine):
    """The names of the runs that are compared, of one size of patches."""
    return [end for arm in ARMS for end in ends_of(bench, arm, fine)]


def seeds_of(fine):
    """How many of the seeds a size of patches has: None means all."""
    return 1 if fine else None


def maskdm_flags(bench, fine):
    """The flags that both arms share."""
    scale = bench.scale
    return [*bench.image_flags(), "--model", scale["model"], *scale["train"],
            *(scale["small"] if fine else [])]


def maskdm_pace(bench, arm, fine):
    """Seconds a step of an arm's network. The first call times all, before any training."""
    networks = {trunk_name(name, size): [*maskdm_flags(bench, size), *flags]
                for size in (False, True) if branch_lengths(bench, size)
                for name, flags in ARMS.items()}
    return bench.seconds_per_step(networks, visits=2)[trunk_name(arm, fine)]


def count_half(bench, arm, fine, minutes):
    """How many steps an arm takes in half of so many minutes. They are a multiple of the
    first length's, so that the run of constant rate has a checkpoint there."""
    unit = min([minutes, *branch_lengths(bench, fine)])
    return round(minutes / unit) * max(1, round(30 * unit / maskdm_pace(bench, arm, fine)))


def train_rates(bench, arm):
    """The short runs that choose an arm's rate, for all seeds and both sizes of patches."""
    if len(bench.scale["rates"]) == 1:
        return
    wanted = []
    for fine in (False, True):
        names = [trunk_name(arm, fine), *ends_of(bench, arm, fine)]
        wanted += bench.on_every_seed(*names, seeds=seeds_of(fine))
    half = partial(count_half, bench, arm, False, bench.scale["sweep"])
    last = partial(count_half, bench, "all-tokens", False, bench.scale["sweep"])
    for rate, name in bench.rate_runs(arm).items():
        end = f"{name}-end"
        common = ["--lr", rate]
        bench.train_arm(name, train.main, *maskdm_flags(bench, False), *ARMS[arm], *common,
                        "--lr-end", 1, "--steps", half, before=(end, *wanted))
        bench.train_arm(end, finetune.main, "--from", bench.folder / name, *common,
                        "--steps", last, before=wanted)


def train_branches(bench, arm, fine):
    """An arm: the run at a constant rate, then an end for each length."""
    lengths, trunk = branch_lengths(bench, fine), trunk_name(arm, fine)
    if not lengths:
        return
    ends = ends_of(bench, arm, fine)
    rate = partial(bench.choose_by_loss, bench.rate_runs(arm, "-end"))
    common = ["--lr", rate]
    halves = [partial(count_half, bench, arm, fine, minutes) for minutes in lengths]
    bench.train_arm(trunk, train.main, *maskdm_flags(bench, fine), *ARMS[arm], *common,
                    "--lr-end", 1, "--warmup", partial(tenth_of, halves[0]),
                    "--save-every", halves[0], "--keep", 0, "--steps", halves[-1], before=ends)
    for end, minutes, half in zip(ends, lengths, halves):
        bench.train_arm(end, finetune.main,
                        "--from", partial(bench.checkpoint_after, trunk, half), *common,
                        "--steps", partial(count_half, bench, "all-tokens", fine, minutes))


# --- the table ----------------------------------------------------------------------------

def list_speed_ups(benches, cells, fine):
    """-> {proxy: a speed-up for each seed}"""
    lengths = branch_lengths(benches[0], fine)
    factors = {}
    for proxy in PROXY_ORDER:
        for seed in range(len(benches)):
            curves = [[max(cells[end][seed][proxy])         # or its floor
                       for end in ends_of(benches[0], arm, fine)] for arm in ARMS]
            factors.setdefault(proxy, []).append(
                measure_speed_up(*((lengths, curve) for curve in curves), MARGINS[proxy]))
    return factors


def judge_speed_up(factors):
    """One sentence. factors: {proxy: a speed-up for each seed}, of several lengths."""
    every = [value for values in factors.values() for value in values]
    found = [value for value in every if not math.isnan(value)]
    reached = [value for value in found if value]
    if not found:
        return ("**Cannot be told here**: all tokens are as good after the shortest length as "
                "after any other.")
    if not reached:
        return "**Does not hold here**: masked training is never as good as all tokens at best."
    times = " to ".join(dict.fromkeys(f"{value:.1f}" for value in (min(reached), max(reached))))
    span = f"masked training is {times} times as fast (the paper: {CLAIMED})"
    if len(reached) < len(found):
        span += (f" where it gets as good; in {len(found) - len(reached)} of {len(found)} "
                 "comparisons (a distance and a seed each) it never does")
    if len(found) < len(every):
        span += (f"; in {len(every) - len(found)} of {len(every)} it cannot be told, for there all "
                 "tokens need the shortest length only")
    if min(found) >= CLAIMED:
        return f"**Holds here**: {span}."
    if min(found) >= BY_LESS:
        return f"**Faster here, but less than claimed**: {span}."
    if max(found) < BY_LESS:
        return f"**Does not hold here**: {span}."
    return f"**Depends on the distance and the seed**: {span}."


def judge_fine(benches, cells):
    """A sentence about each length of the small patches, as a list."""
    sentences = []
    for minutes in branch_lengths(benches[0], True):
        theirs, ours = (cells[end_name(arm, True, minutes)] for arm in ARMS)
        better, worse = count_better(ours, theirs)
        sentences.append(
            f"With small patches, after {minutes:g} min: masked training is clearly better in "
            f"{better} and clearly worse in {worse} of {len(PROXY_ORDER) * len(ours)} "
            "comparisons (a distance and a seed each).")
    return sentences


def describe_branches(benches, cells):
    """The claim's table, as text. cells: {end: distances, one a seed}"""
    bench, args = benches[0], benches[0].args
    floor = format_distances(next(iter(cells.values())), 1)
    rows = []
    for fine in (False, True):
        for arm in ARMS:
            rows += [describe_end(benches, arm, fine, minutes, cells)
                     for minutes in branch_lengths(bench, fine)]
    factors = list_speed_ups(benches, cells, False)
    speed = ", ".join(f"{proxy} {format_spread(values)}" for proxy, values in factors.items())
    parts = [
        f"Distances to {args.data}, pixel / random-conv / swd (not FID), {bench.scale['n']} "
        f"samples of {CALLS} calls, {args.seeds} seed(s) from {args.seed}, floor {floor}. The "
        "second half of each length is on all tokens.",
        format_table(["arm", "minutes", "seconds a step", "steps", "images seen", "PFLOP",
                      "val_loss", "distances"], rows),
        *describe_rates(bench, {arm: bench.rate_runs(arm, "-end") for arm in ARMS},
                        f"{bench.scale['sweep']} minutes"),
        "Speed-up to the best distance of all tokens (0: never as good; where the shortest length "
        f"is enough, a lower bound; ?: where it is enough for all tokens, too): {speed}.",
        judge_speed_up(factors),
        *judge_fine(benches, cells),
    ]
    return "\n\n".join(parts) + "\n"


def describe_end(benches, arm, fine, minutes, cells):
    """A row of the table."""
    bench, end = benches[0], end_name(arm, fine, minutes)
    pace = maskdm_pace(bench, arm, fine)
    last = bench.log(end, "step")
    steps = f"{count_half(bench, arm, fine, minutes)} + {last:.0f}"
    images = count_half(bench, arm, fine, minutes) * bench.log(end, "images") / last
    losses = [b.log(end, "val_loss") for b in benches[:seeds_of(fine)]]
    # The trunk goes on to the longest length; this end has seen a part of it.
    part = minutes / max(branch_lengths(bench, fine))
    work = part * bench.count_petaflop(trunk_name(arm, fine)) + bench.count_petaflop(end)
    return [trunk_name(arm, fine), f"{minutes:g}", f"{pace:.3f}", steps,
            f"{images + bench.log(end, 'images'):.3g}", f"{work:.3g}", format_spread(losses, 4),
            format_distances(cells[end])]
