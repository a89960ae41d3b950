"""[DDM] Four image-conditioned tasks in ten network calls.

The claim (DDM, arXiv 2306.13720). The same ten analytic steps solve super-resolution,
inpainting, edges and saliency, when the network is shown a condition beside the noise. And:
super-resolution and inpainting learn faster from a masked, unconditional first stage.

Arms. `masked` is that first stage, on a tenth of the tokens; its steps come on top, but
serve every task. The `-tuned` arms start from it and take half of the steps,
`superres-scratch` takes all. The `-whole` arms give the tuned ones a short last stage on
all tokens. `edges-scratch` and the faces are learned so fast that a third of the steps will
do.

Measured. The task's own scores on held-out images at 1 to 10 calls, beside what needs no
network. Of photographs the edge map is the gradient of the condition itself. So there
"without a network" is perfect by definition, and the error says how well a network can
learn a formula.

Fairness. All arms have one network, batch, learning rate and seed. Photographs are trained
on a quarter of the tokens, faces at half the size on all of them.
"""
import finetune
import train
from claims.bench import NEVER, Bench, count_calls, format_table
from plumbing.images import choose_subset, seeded, to_float
from plumbing.machine import amp_type
from restore import restore_pictures
from tasks import TASKS, make_condition, place_side_by_side

# pre, tune: steps of the masked first stage, and of a task from scratch.
SCALES = {
    "smoke": dict(pre=8, tune=10, model="tiny", train=["--batch", 4], n=4, calls=[1, 2, 5],
                  batch=4),
    "cpu": dict(pre=1500, tune=1500, model="tiny", train=["--batch", 64], n=256,
                calls=[1, 2, 5, 10], batch=64),
    "gpu": dict(pre=50_000, tune=20_000, model="small", train=["--batch", 256], n=1024,
                calls=[1, 2, 5, 10, 20], batch=256),
}
FIRST, QUARTER = ["--mask", 0.9], ["--mask", 0.75]
ROWS = 4                                                    # of a picture


def run_tasks(args):
    """super-resolution, inpainting, edges and saliency in ten calls [DDM]"""
    bench = Bench("tasks", args, SCALES[args.scale])
    arms = train_task_arms(bench)
    if not bench.all_trained():
        return
    rows = []
    for name, task in arms.items():
        truth, cond = hold_out_pairs(bench, name, task)
        rows += measure_task(bench, name, task, truth, cond)
        draw_task_arm(bench, name, truth, cond)
    bench.write("table.md", describe_tasks(bench, rows))


def train_task_arms(bench):
    """Train the first stage and every task. -> {arm: task}"""
    args, scale, tune = bench.args, bench.scale, bench.scale["tune"]
    gray = ["--gray"] if args.gray else []
    network = ["--model", scale["model"], "--predict", "unit"]
    photos = ["--data", args.data, "--size", args.size, *gray, *network]
    faces = ["--data", "faces", "--size", args.size // 2, *network]
    common = [*scale["train"], "--lr", 2e-3, "--save-every", NEVER, "--workers", 0]
    arms = {}

    def train_task(name, task, command, steps, *flags, before=()):
        arms[name] = task
        length = ["--steps", max(1, steps), "--sample-every", max(1, steps // 5)]
        bench.train_arm(name, command, *flags, *common, "--task", task, *length, before=before)

    wholes = ("superres-whole", "inpaint-whole")            # they need the stages before them
    length = ["--steps", scale["pre"], "--sample-every", scale["pre"]]
    bench.train_arm("masked", train.main, *photos, *common, *FIRST, *length,
                    before=("superres-tuned", "inpaint-tuned", *wholes))
    first = ["--from", bench.folder / "masked", *QUARTER]
    train_task("superres-tuned", "superres", finetune.main, tune // 2, *first, before=wholes[:1])
    train_task("superres-scratch", "superres", train.main, tune, *photos, *QUARTER)
    train_task("inpaint-tuned", "inpaint", finetune.main, tune // 2, *first, before=wholes[1:])
    for task, name in zip(("superres", "inpaint"), wholes):
        tuned = ["--from", bench.folder / f"{task}-tuned"]
        train_task(name, task, finetune.main, tune // 10, *tuned)
    train_task("edges-scratch", "edges", train.main, tune // 3, *photos, *QUARTER)
    for task in ("edges", "saliency"):
        train_task(f"faces-{task}", task, train.main, tune // 3, *faces)
    return arms


def hold_out_pairs(bench, name, task):
    """Truth and condition of held-out images of an arm's own data.

    -> truth (n, C, H, W), cond (n, C', H, W), both in [-1, 1]"""
    args, is_face = bench.args, name.startswith("faces-")
    data, size, gray = args.data, args.size, args.gray
    if is_face:
        data, size, gray = "faces", args.size // 2, False
    exact = TASKS[task].exact if data == "faces" else None
    _, images = bench.split_images(data, size, gray, targets=exact)
    x, _ = images.take(choose_subset(len(images), bench.scale["n"], args.seed))
    return make_condition(task, to_float(x), images.maps, g=seeded(args.seed, 101))


def restore_with(bench, name, cond, calls):
    """The results of an arm's model for some conditions, always of the same noise."""
    loaded = bench.model(name)
    amp = amp_type("auto", loaded.device)
    common = dict(seed=bench.args.seed, batch=bench.scale["batch"], amp=amp)
    return restore_pictures(loaded, cond, steps=calls, **common)


def measure_task(bench, name, task, truth, cond):
    """An arm's scores -> rows of the table, one a score."""
    def measure(restore, *arguments):
        result = restore(*arguments)
        return {key: round(score(result, truth, cond), 4)
                for key, score in TASKS[task].scores.items()}

    n = len(truth)
    key = f"{name}, images drawn n={n}"
    plain = bench.measure_once(f"{key} plain", measure, TASKS[task].plain, cond)
    cells = [bench.measure_once(f"{key} steps={calls}",
                                measure, restore_with, bench, name, cond, calls)
             for calls in bench.scale["calls"]]
    rows = []
    for i, score in enumerate(plain):
        scores = [f"{cell[score]:.3f}" for cell in cells]
        rows.append([name if i == 0 else "", score, f"{plain[score]:.3f}", *scores])
    return rows


def describe_tasks(bench, rows):
    """The claim's table, as text."""
    args, scale = bench.args, bench.scale
    tune, calls = scale["tune"], [count_calls(count) for count in scale["calls"]]
    head = (f"{args.data} and the built-in faces (at half the size), {args.size} px, {scale['n']} "
            f"held-out images at most, seed {args.seed}; {tune} steps from scratch "
            f"(edges, saliency: {tune // 3}), {tune // 2} when tuned from {scale['pre']} "
            "masked steps.")
    table = format_table(["arm", "score", "without a network", *calls], rows)
    return f"{head}\n\n{table}\n"


def draw_task_arm(bench, name, truth, cond):
    """ARM.png: condition, results at every number of calls, truth of the first images."""
    cond, truth = cond[:ROWS], truth[:ROWS]
    counts = bench.scale["calls"]
    columns = [cond, *(restore_with(bench, name, cond, calls) for calls in counts), truth]
    pictures = place_side_by_side(*columns)                             # (B columns, 3, H, W)
    rows = [(f"{name},\nimage {i}", some)
            for i, some in enumerate(pictures.split(len(columns)), 1)]
    bench.save_sheet(f"{name}.png", rows, ["condition", *map(count_calls, counts), "truth"])
