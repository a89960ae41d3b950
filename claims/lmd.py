"""[LMD] A rising mask against a fixed one, in latents.

The claim (LMD, arXiv 2312.07971). Training is at least three times as fast as MAE's. Two
things differ from MAE: latents, and a hidden share that rises as training goes on. Here
only the second is tested: does a rising share learn as much as a fixed one in a third of
the time?

Arms. `fixed-0.75` and `fixed-0.15` hide a fixed share of the tokens; `piecewise` and
`cosine` start at 0.15 and rise to 0.75. All work in the latents of one autoencoder, which
is trained when the first arm wants it.

Measured. At every fifth of its steps: the held-out error of hidden latents at four fixed
ratios, beside that of the mean image, and the PSNR of pictures with 0.75 hidden. Of images
with classes, also the accuracy of a linear classifier on what two encoders see.

Fairness. Equal time, not equal steps: a ramp's steps cost more while more is visible. Three
fixed ratios are timed alone at the start. What a step costs in between is interpolated, and
from then on a minute is a number of steps. Leave the machine quiet for that. The rate is
train.py's and constant: what is measured on the way is then as good as an end.
"""
import time
from functools import partial

import numpy as np
import torch

import train
import vae
from claims.bench import Bench, call_flags, format_spread, format_table, measure_speed_up
from mask import ratio_at
from plumbing.console import UserError
from plumbing.images import choose_subset, to_float
from plumbing.sheets import save_picture
from probe import probe_accuracy
from restore import draw_reconstruction, mean_image_error, reconstruct, reconstruction_errors

# fifths: of its steps, at which an arm is measured.
SCALES = {
    "smoke": dict(steps=8, minutes=1, vae=["--steps", 4], model="tiny", train=["--batch", 4],
                  fifths=[2, 5]),
    "cpu": dict(minutes=10, vae=["--minutes", 10], model="tiny", train=[],
                fifths=[1, 2, 3, 4, 5]),
    "gpu": dict(minutes=60, vae=["--minutes", 60], model="base", train=["--batch", 256],
                fifths=[1, 2, 3, 4, 5]),
}
ARMS = {                                                    # name -> ramp, from, to
    "fixed-0.75": ("constant", 0.75, 0.75),
    "fixed-0.15": ("constant", 0.15, 0.15),
    "piecewise": ("piecewise", 0.15, 0.75),
    "cosine": ("cosine", 0.15, 0.75),
}
PROBED = ("fixed-0.75", "cosine")
TIMED = (0.15, 0.45, 0.75)                                  # hidden shares that are timed
RATIOS = ("0.15", "0.4", "0.55", "0.75")                    # the cells' keys
SHOWN = 256                                                 # pictures of a mean PSNR
CLAIMED = 3                                                 # times as fast as MAE


def run_lmd(args):
    """a rising mask against a fixed one, in latents [LMD]"""
    first = Bench("lmd", args, SCALES[args.scale])
    for bench in first.benches:
        for name in ARMS:
            train_reconstruction(bench, name)
    if not first.all_trained():
        return
    for bench in first.benches:                             # a table for each seed
        images, held_out = bench.split_images(gray=args.gray)
        rows = [measure_fifth(bench, name, fifth, held_out)
                for name in ARMS for fifth in bench.scale["fifths"]]
        mean = bench.measure_once("the mean image", measure_mean_image, bench, images, held_out)
        speed = bench.measure_once("encoded images a second", measure_encoding, bench, images)
        bench.write("table.md", describe_reconstructions(bench, rows, mean, speed))
        x = to_float(held_out.take(choose_subset(len(held_out), 4))[0])
        for name in ARMS:
            done = reconstruct(bench.model(name), x, 0.75)
            save_picture(draw_reconstruction(done), bench.folder / f"{name}.png")
        print(f"wrote {', '.join(f'{name}.png' for name in ARMS)} in {bench.folder}")


# --- training -----------------------------------------------------------------------------

def train_autoencoder(bench):
    """Train the claim's autoencoder unless that was done, with the first seed. -> its file

    What another seed holds out, this one has mostly trained on; all arms alike."""
    args, weights = bench.first.args, bench.first.folder / "vae.pt"
    if not weights.exists():
        status = vae.main(call_flags([*bench.image_flags(), *bench.scale["vae"],
                                      "--seed", args.seed, "--device", args.device,
                                      "--out", weights]))
        if status:                                          # a signal: these weights are half done
            weights.unlink()
            raise SystemExit(status)
    return weights


def lmd_flags(bench):
    """The flags that all arms share."""
    return [*bench.image_flags(), "--space", "latent",
            "--vae", partial(train_autoencoder, bench),
            "--latents", bench.first.folder / "latents", "--patch", 2,
            "--objective", "reconstruct", "--decoder", 4, "--model", bench.scale["model"],
            *bench.scale["train"], "--lr-end", 1]


def mean_step(bench, name, progress=1.0):
    """Mean seconds a step of an arm, from its start to a progress in (0, 1]."""
    networks = {f"ratio {ratio}": [*lmd_flags(bench), "--mask", ratio] for ratio in TIMED}
    paces = list(bench.seconds_per_step(networks, visits=2).values())
    ramp, low, high = ARMS[name]
    places = progress * (torch.arange(200) + 0.5) / 200
    ratios = [ratio_at(ramp, p, low, high) for p in places.tolist()]
    return float(np.interp(ratios, TIMED, paces).mean())


def count_fifth(bench, name, fifths=1):
    """How many steps an arm takes in so many fifths of its steps."""
    return fifths * max(1, round(12 * bench.scale["minutes"] / mean_step(bench, name)))


def describe_fifth(bench, name, fifth):
    """An arm after so many fifths of its steps. -> step, minutes, its checkpoint"""
    step = count_fifth(bench, name, fifth)
    return step, step * mean_step(bench, name, fifth / 5) / 60, f"{name}/{step:06d}.pt"


def train_reconstruction(bench, name):
    """Train an arm, with a checkpoint every fifth of its steps."""
    ramp, low, high = ARMS[name]
    rising = ["--ramp", ramp, "--mask-from", low] if low < high else []
    bench.train_arm(name, train.main, *lmd_flags(bench), "--mask", high, *rising,
                    "--save-every", partial(count_fifth, bench, name), "--keep", 0,
                    "--steps", partial(count_fifth, bench, name, 5))


# --- numbers ------------------------------------------------------------------------------

def measure_mean_image(bench, images, held_out):
    """What it costs to guess the mean of the training images. All arms have one space."""
    return round(mean_image_error(bench.model("fixed-0.75"), images, held_out), 5)


def measure_errors(bench, path, held_out):
    """Errors of a checkpoint at every ratio, and the PSNR of its pictures."""
    model = bench.model(path)
    errors = reconstruction_errors(model, held_out)
    x = to_float(held_out.take(choose_subset(len(held_out), SHOWN))[0])
    done = reconstruct(model, x, 0.75)
    psnr = {name: round(done[name].mean().item(), 3) for name in ("psnr", "ceiling_psnr")}
    return {f"{ratio:g}": round(error, 5) for ratio, error in errors.items()} | psnr


def measure_fifth(bench, name, fifth, held_out):
    """An arm after so many fifths of its steps -> a row of the table."""
    step, minutes, path = describe_fifth(bench, name, fifth)
    cell = bench.measure_once(path, measure_errors, bench, path, held_out)
    return [name, f"{minutes:.1f}", step, *(f"{cell[ratio]:.4f}" for ratio in RATIOS),
            f"{cell['psnr']:.2f}"]


def measure_encoding(bench, images):
    """Images a second through the autoencoder's encoder."""
    model = bench.model("fixed-0.75")
    x = to_float(images.take(choose_subset(len(images), 256))[0]).to(model.device)
    begun = time.monotonic()
    for part in x.split(64):
        model.space.encode(part).cpu()                      # waits for a GPU
    return round(len(x) / (time.monotonic() - begun), 1)


def measure_probe(bench, name):
    """Accuracies of linear classifiers (probe.py), or why there are none."""
    try:
        images, held_out = bench.split_images(gray=bench.args.gray, labels=True)
    except UserError as error:
        return f"not probed: {error}"
    if len(images.classes) < 2:
        return "not probed: these images have one class"
    accuracy = probe_accuracy(bench.model(name), images, held_out, seed=bench.args.seed,
                              folder=bench.folder / "probe-latents")
    return ", ".join(f"{kind} {share:.1%}" for kind, share in accuracy.items())


# --- the table ----------------------------------------------------------------------------

def list_ramp_speed_ups(bench):
    """How many times faster `cosine` is as good as `fixed-0.75` ever is: {ratio: factor}"""
    factors = {}
    for ratio in RATIOS:
        curves = []
        for name in PROBED:
            points = [describe_fifth(bench, name, fifth) for fifth in bench.scale["fifths"]]
            curves.append(([minutes for _, minutes, _ in points],
                           [bench.cells[path][ratio] for *_, path in points]))
        factors[ratio] = measure_speed_up(*curves)
    return factors


def judge_ramp(factors):
    """One sentence. factors: {ratio: a speed-up}"""
    known = [factor for factor in factors.values() if not np.isnan(factor)]
    if not known:
        verdict = "**Cannot be told here**"
    elif min(known) >= CLAIMED:
        verdict = "**Holds here**"
    elif min(known) > 1:
        verdict = "**Faster here, but less than claimed**"
    else:
        verdict = "**Does not hold here**"
    found = ", ".join(f"{format_spread([factor], 2)} at {ratio}"
                      for ratio, factor in factors.items())
    return (f"{verdict}: `cosine` is so many times as fast as `fixed-0.75` (the paper, against "
            f"MAE: {CLAIMED}; 0: never as good; ?: cannot be told): {found}.")


def describe_reconstructions(bench, rows, mean, encoding):
    """The claim's tables of one seed, as text. mean: the mean image's error. encoding:
    images a second."""
    args, cell = bench.args, bench.cells[describe_fifth(bench, "fixed-0.75", 5)[-1]]
    table = format_table(["arm", "minutes", "step", *(f"error at {ratio}" for ratio in RATIOS),
                          "PSNR at 0.75, dB"], rows)
    batch = bench.log("cosine", "images") / bench.log("cosine", "step")
    speeds = ", ".join(f"{name} {batch / mean_step(bench, name):.0f}" for name in ARMS)
    probes = [[name, bench.measure_once(f"{bench.name_model(name)}: probe",
                                        measure_probe, bench, name)] for name in PROBED]
    parts = [
        "Held-out error of hidden latents in units of the data's variance (1: an all-zero guess; "
        f"{mean:.4f}: the mean of the training images), {args.data}, seed {args.seed}. The "
        f"autoencoder's own PSNR is {cell['ceiling_psnr']:.2f} dB.",
        table,
        f"Images a second in training: {speeds}. The autoencoder encodes {encoding:g} a second, "
        "once.",
        "Linear classifiers on the encoder's features, held-out accuracy:",
        format_table(["arm", "accuracy"], probes),
        judge_ramp(list_ramp_speed_ups(bench)),
    ]
    return "\n\n".join(parts) + "\n"
