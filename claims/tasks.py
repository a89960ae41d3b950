"""[DDM] Four image-conditioned tasks in at most ten network calls.

The claim (DDM, arXiv 2306.13720). The same analytic steps solve super-resolution,
inpainting, edges and saliency in at most ten calls, when the network is shown a condition
beside the noise.

Arms. One a task. Each has half of its time on a quarter of the tokens and half on all of
them (finetune.py). Super-resolution and inpainting are learned on photographs, edges and
saliency on the drawn faces, whose maps are exact.

Measured. Distortion against realism, at 1 to 10 calls on held-out images. Distortion: the
task's own scores, beside what needs no network. Realism, where the result is a picture: its
distance to real training images. More calls show more detail and agree less with the truth:
a perfect sample of all that is possible has twice the squared error of their mean, which is
3 dB. So ten calls are an improvement when

    they are clearly closer to real images than one call and than no network, in at least
    one distance, and clearly farther in none; and
    PSNR is at most 3 dB below one call's.

Fairness. Equal time: each network is timed alone at the start, and from then on a minute is
a number of steps. Network, batch, rates (train.py's and finetune.py's) and seed are equal.
"""
from functools import partial

import finetune
import train
from claims.bench import Bench, count_better, count_calls, format_distances, format_table
from plumbing.images import choose_subset, seeded, to_float, to_uint8
from plumbing.machine import amp_type
from restore import restore_pictures
from tasks import TASKS, make_condition, place_side_by_side

# minutes: of a task on photographs, and on the drawn faces.
SCALES = {
    "smoke": dict(steps=4, minutes=(1, 1), model="tiny", train=["--batch", 4], n=12,
                  calls=[1, 2], batch=12),
    "cpu": dict(minutes=(30, 10), model="tiny", train=[], n=1000, calls=[1, 2, 5, 10], batch=100),
    "gpu": dict(minutes=(60, 15), model="small", train=["--batch", 256], n=1000,
                calls=[1, 2, 5, 10, 20], batch=250),
}
ARMS = ("superres", "inpaint", "edges", "saliency")
HELD_OUT = 0.1                                              # at most 1,024 images
STAGES = {"masked": ["--mask", 0.75], "whole": []}
CALLS, MOST_DB = 10, 3.0                                    # see above
ROWS = 4                                                    # of a picture


def run_tasks(args):
    """super-resolution, inpainting, edges and saliency in ten calls [DDM]"""
    first = Bench("tasks", args, SCALES[args.scale])
    for bench in first.benches:
        for task in ARMS:
            train_task(bench, task)
    if not first.all_trained():
        return
    for bench in first.benches:                             # a table for each seed
        rows, verdicts = [], []
        for task in ARMS:
            pairs = hold_out_pairs(bench, task)
            cells = measure_task(bench, task, pairs)
            rows += task_rows(bench, task, cells)
            verdicts += judge_task(task, cells)
            draw_task(bench, task, pairs)
        bench.write("table.md", describe_tasks(bench, rows, verdicts))


# --- training -----------------------------------------------------------------------------

def is_picture(task):
    """Whether a task's result is a photograph, not a map."""
    return TASKS[task].exact is None


def source_of(bench, task):
    """Where a task's images come from -> (data, size, gray)"""
    args = bench.args
    return (args.data, args.size, args.gray) if is_picture(task) else ("faces", 32, False)


def task_flags(bench, task):
    """The flags of both stages of a task."""
    data, size, gray = source_of(bench, task)
    return ["--data", data, "--size", size, *(["--gray"] if gray else []), "--val", HELD_OUT,
            "--model", bench.scale["model"], *bench.scale["train"], "--predict", "unit",
            "--task", task]


def count_stage(bench, task, stage):
    """How many steps a task takes in half of its time. Tasks of one source cost the
    same."""
    kind = "photographs" if is_picture(task) else "drawn faces"
    model = "superres" if is_picture(task) else "edges"
    networks = {f"{kind}, {name}": [*task_flags(bench, model), *flags]
                for name, flags in STAGES.items()}
    minutes = bench.scale["minutes"][not is_picture(task)]
    return max(1, round(30 * minutes / bench.seconds_per_step(networks)[f"{kind}, {stage}"]))


def train_task(bench, task):
    """Half of the time on a quarter of the tokens, half on all of them."""
    bench.train_arm(task, train.main, *task_flags(bench, task), *STAGES["masked"], "--steps",
                    partial(count_stage, bench, task, "masked"), before=(f"{task}-whole",))
    bench.train_arm(f"{task}-whole", finetune.main, "--from", bench.folder / task, "--steps",
                    partial(count_stage, bench, task, "whole"))


# --- numbers ------------------------------------------------------------------------------

def hold_out_pairs(bench, task):
    """Training images; truth and condition of held-out ones.

    -> data.Images, truth (n, C, H, W), cond (n, C', H, W), both in [-1, 1]"""
    data, size, gray = source_of(bench, task)
    exact = TASKS[task].exact if data == "faces" else None
    images, held_out = bench.split_images(data, size, gray, targets=exact, val=HELD_OUT)
    x, _ = held_out.take(choose_subset(len(held_out), bench.scale["n"], bench.args.seed))
    pair = make_condition(task, to_float(x), images.maps, g=seeded(bench.args.seed, 101))
    return images, *pair


def restore_with(bench, task, cond, calls):
    """The results of a task's model for some conditions, always of the same noise."""
    loaded = bench.model(f"{task}-whole")
    amp = amp_type("auto", loaded.device)
    common = dict(seed=bench.args.seed, batch=bench.scale["batch"], amp=amp)
    return restore_pictures(loaded, cond, steps=calls, **common)


def score_pictures(bench, task, pairs, calls):
    """The task's scores of its results; of pictures also their distances to real ones.

    pairs: from `hold_out_pairs`. calls: 0 for what needs no network.
    -> {score: number, proxy: [value, floor]}"""
    images, truth, cond = pairs
    result = restore_with(bench, task, cond, calls) if calls else TASKS[task].plain(cond)
    scores = {name: round(score(result, truth, cond), 4)
              for name, score in TASKS[task].scores.items()}
    if is_picture(task):
        scores |= bench.compare(to_uint8(result), images)
    return scores


def measure_task(bench, task, pairs):
    """-> {number of calls: what `score_pictures` says}, with 0 for no network"""
    key = f"{bench.name_model(f'{task}-whole')} n={len(pairs[1])}"
    return {calls: bench.measure_once(f"{key} calls={calls}",
                                      score_pictures, bench, task, pairs, calls)
            for calls in (0, *bench.scale["calls"])}


# --- the table ----------------------------------------------------------------------------

def task_rows(bench, task, cells):
    """Rows of the table, one a score."""
    rows = [[name, *(f"{cells[calls][name]:.3f}" for calls in cells)]
            for name in TASKS[task].scores]
    if is_picture(task):
        floor = format_distances(cells[0], 1)
        rows.append([f"distances (floor {floor})", *map(format_distances, cells.values())])
    return [[task if i == 0 else "", *row] for i, row in enumerate(rows)]


def judge_task(task, cells):
    """A sentence about a task whose result is a picture, as a list; none about maps."""
    if not is_picture(task):
        return []
    name = next(iter(TASKS[task].scores))
    many = CALLS if CALLS in cells else max(cells)
    loss = cells[1][name] - cells[many][name]
    counts = [count_better(cells[many], cells[other]) for other in (0, 1)]
    closer = all(better > 0 and not worse for better, worse in counts)
    gain = cells[1][name] - cells[0][name]
    verdict = "holds" if closer and loss <= MOST_DB and gain > 0 else "does not hold"
    return [f"{task}: by its numbers the claim **{verdict}** here. One call gains {gain:.1f} dB "
            f"on no network; {many} calls lose {loss:.1f} dB of it and are "
            f"{'' if closer else 'not '}closer to real images than both. Look for seams and for "
            f"wrong detail in {task}.png."]


def describe_tasks(bench, rows, verdicts):
    """The claim's table, as text."""
    args, scale = bench.args, bench.scale
    calls = ["without a network", *map(count_calls, scale["calls"])]
    head = (f"Super-resolution and inpainting on {args.data}, {args.size} px; edges and saliency "
            f"on the drawn faces, 32 px. {scale['n']} held-out images at most, seed {args.seed}; "
            f"{scale['minutes'][0]} and {scale['minutes'][1]} minutes of training. Distances to "
            "training images are pixel / random-conv / swd (not FID).")
    return "\n\n".join([head, format_table(["task", "score", *calls], rows), *verdicts]) + "\n"


def draw_task(bench, task, pairs):
    """TASK.png: condition, results at every number of calls, truth of the first images."""
    truth, cond = (pictures[:ROWS] for pictures in pairs[1:])
    counts = bench.scale["calls"]
    columns = [cond, *(restore_with(bench, task, cond, calls) for calls in counts), truth]
    pictures = place_side_by_side(*columns)                             # (B columns, 3, H, W)
    rows = [(f"{task},\nimage {i}", some)
            for i, some in enumerate(pictures.split(len(columns)), 1)]
    bench.save_sheet(f"{task}.png", rows, ["condition", *map(count_calls, counts), "truth"])
