"""[LMD] A rising mask against a fixed one, in latents.

The claim (LMD, arXiv 2312.07971). When hidden latents are to be reconstructed, a hidden
share that rises as training goes on learns more than a fixed one in the same time.

Arms. `fixed` hides 0.75 of the tokens all the time. `cosine` starts at 0.15 and rises to
0.75. Both work in the latents of one autoencoder, which is trained when the first arm wants
it. `generator` is a denoiser in the same latents, trained on a quarter of the tokens, and
`generator-whole` its fine-tuning on all of them.

Measured. The held-out error of reconstruction at four fixed ratios, at every fifth of the
time, beside that of the mean image.

Fairness. Equal time, not equal steps: a ramp's steps cost more while more is visible.
"""
from functools import partial

import finetune
import train
import vae
from claims.bench import Bench, call_flags, format_table
from plumbing.checkpoint import read_checkpoint
from plumbing.images import choose_subset, grid, to_float
from plumbing.sheets import save_picture
from restore import (
    draw_reconstruction, mean_image_error, reconstruct, reconstruction_errors,
)

SCALES = {
    "smoke": dict(steps=8, minutes=1, vae=["--steps", 4], model="tiny", train=["--batch", 4],
                  batch=8),
    "cpu": dict(minutes=10, vae=["--minutes", 10], model="tiny", train=["--batch", 64], batch=64),
    "gpu": dict(minutes=60, vae=["--minutes", 60], model="base", train=["--batch", 256],
                batch=256),
}
ARMS = {"fixed": [], "cosine": ["--mask-from", 0.15, "--ramp", "cosine"]}
GUESS = ["--objective", "reconstruct", "--decoder", 4, "--mask", 0.75]
RATIO_COLUMNS = {"0.15": "ratio 0.15", "0.4": "0.4", "0.55": "0.55", "0.75": "0.75"}


def run_lmd(args):
    """a rising mask against a fixed one, in latents [LMD]"""
    bench = Bench("lmd", args, SCALES[args.scale])
    train_reconstructions(bench)
    train_latent_generator(bench)
    if not bench.all_trained():
        return
    images, held_out = bench.split_images(gray=args.gray)
    rows = []
    for name in ARMS:
        rows += measure_reconstructions(bench, name, held_out)
    table = format_table(["arm", "minutes", "step", *RATIO_COLUMNS.values()], rows)
    mean = bench.measure_once("the mean image", measure_mean_image, bench, images, held_out)
    bench.write("table.md", "Held-out error of hidden latents in units of the data's variance "
                f"(1: an all-zero guess; {mean:.4f}: the mean of the training images), "
                f"{args.data}, seed {args.seed}.\n\n{table}\n")
    x = to_float(held_out.take(choose_subset(len(held_out), 4))[0])
    for name in ARMS:
        done = reconstruct(bench.model(name), x, 0.75)
        save_picture(draw_reconstruction(done), bench.folder / f"{name}.png")
    faces = grid(bench.draw("generator-whole", 16, steps=10))
    save_picture(faces, bench.folder / "faces.png")
    print(f"wrote {', '.join(f'{name}.png' for name in (*ARMS, 'faces'))} in {bench.folder}")


def photo_flags(args):
    """What the autoencoder and all arms are told about the images."""
    return ["--data", args.data, "--size", args.size, *(["--gray"] if args.gray else [])]


def train_autoencoder(bench):
    """Train the claim's autoencoder unless that was done. -> its file"""
    args, weights = bench.args, bench.folder / "vae.pt"
    if not weights.exists():
        vae.main(call_flags([*photo_flags(args), *bench.scale["vae"], "--seed", args.seed,
                             "--device", args.device, "--out", weights]))
    return weights


def lmd_flags(bench):
    """The flags that all arms share."""
    space = ["--space", "latent", "--vae", partial(train_autoencoder, bench),
             "--latents", bench.folder / "latents", "--patch", 2]
    return [*photo_flags(bench.args), *space, "--model", bench.scale["model"],
            *bench.scale["train"]]


def length_flags(bench, share=1):
    """A share of the time. The smoke scale counts steps and knows no shares."""
    if "steps" in bench.scale:
        return ["--steps", bench.scale["steps"]]
    return ["--minutes", bench.scale["minutes"] * share]


def count_fifth(bench):
    """How many steps the arm `fixed` takes in a fifth of the time."""
    seconds = bench.seconds_per_step({"fixed": [*lmd_flags(bench), *GUESS]})["fixed"]
    return max(1, round(12 * bench.scale["minutes"] / seconds))


def train_reconstructions(bench):
    """Train both arms, with a checkpoint every fifth of the time."""
    fifth = partial(count_fifth, bench)
    for name, flags in ARMS.items():
        bench.train_arm(name, train.main, *lmd_flags(bench), *GUESS, *flags, *length_flags(bench),
                        "--save-every", fifth, "--sample-every", fifth)


def train_latent_generator(bench):
    """Train a denoiser on a quarter of the tokens, then half as long on all."""
    bench.train_arm("generator", train.main, *lmd_flags(bench), "--mask", 0.75,
                    *length_flags(bench), before=("generator-whole",))
    bench.train_arm("generator-whole", finetune.main, "--from", bench.folder / "generator",
                    *length_flags(bench, 1 / 2))


def measure_mean_image(bench, images, held_out):
    """What it costs to guess the mean of the training images. All arms have one space."""
    return round(mean_image_error(bench.model("fixed"), images, held_out), 5)


def measure_errors(bench, path, held_out):
    """Errors of a checkpoint at every ratio, its minutes and its step."""
    errors = reconstruction_errors(bench.model(path), held_out)
    checkpoint = read_checkpoint(bench.folder / path)
    minutes = round(checkpoint["seconds"] / 60, 2)
    return ({f"{ratio:g}": round(error, 5) for ratio, error in errors.items()}
            | dict(minutes=minutes, step=checkpoint["step"]))


def measure_reconstructions(bench, name, held_out):
    """An arm's errors over time -> rows of the table, one a checkpoint."""
    rows = []
    folder = bench.folder / name
    for path in [*sorted(folder.glob("0*.pt")), folder / "last.pt"]:
        arm = f"{name}/{path.name}"
        cell = bench.measure_once(f"{arm}, images drawn", measure_errors, bench, arm, held_out)
        errors = [f"{cell[ratio]:.4f}" for ratio in RATIO_COLUMNS]
        rows.append([name, f"{cell['minutes']:.1f}", cell["step"], *errors])
    return rows
