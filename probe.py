"""Linear probe: does a network know what it sees, although nobody told it?

The idea (MAE, arXiv 2111.06377, after 1603.08511). Freeze the encoder, show it whole
images, and average its tokens. Does a *linear* classifier on that average find the labels?
What the classifier cannot compute, the features must already hold.

    features    f  = mean over tokens of blocks(embed(x))    all tokens visible, no decoder
    standard    f' = (f - mean) / std                        of the training features
    classifier  argmin_W  mean cross-entropy(W f' + c, y) + l2 |W|^2 / 2

The classifier's loss is convex: L-BFGS from zero needs no learning rate and no draw.

A model of `--objective reconstruct` is shown the image itself. A denoiser has hardly seen
any image without noise. So it is shown images with a little, b / (a data_std) = 0.1, and
told so. Beside its accuracy stand those of the same network before training, of the pixels
alone, and of always naming the most frequent class: without them a number says nothing.

    python probe.py --data cifar10-train.zip        # newest run, a folder for each class
    python probe.py --from runs/A --weights model   # a run's own data, its raw weights

Shapes: n images, B batch, D width, K classes; f (n, D), y (n,), W (D + 1, K) with the bias.
"""
import argparse
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import plumbing  # before torch: how its threads wait

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import holdout, keep_fraction, load_images
from plumbing.checkpoint import newest_checkpoint, read_checkpoint
from plumbing.console import UserError, build_parser, parse_path, run_command
from plumbing.downloads import list_published
from plumbing.images import seeded, to_float
from plumbing.machine import require_one_process, set_threads
from running.options import Options, is_same_value, recorded_options
from sample import load
from spaces import encode_once
from vit import ViT

PIXELS = 16                     # side to which raw pixels are shrunk: 768 numbers, as ViT-B's width
NOISE = 0.1                     # b / (a data_std) for denoisers


# --- features -----------------------------------------------------------------------------

@torch.no_grad()
def extract_features(
    net,                        # a ViT: the model's own, or another one like it
    model,                      # a DiffusionModel: its space and schedule
    images,                     # data.Images
    noise=0.0,                  # b / (a data_std) of what the network sees
    seed=0,                     # of the noise, with the number of the batch
    batch=256,                  # images at once
):
    """Mean of the encoder's last tokens for all images. -> features (n, D), labels (n,)"""
    kept, features, labels = [], [], []
    hook = net.blocks[-1].register_forward_hook(lambda block, given, u: kept.append(u))
    schedule, t = model.schedule, torch.zeros(1, dtype=torch.float64)
    if noise:
        t = schedule.time_at(torch.atan(torch.tensor([float(noise)], dtype=torch.float64)))
    bar = tqdm(torch.arange(len(images)).split(batch), desc="features", unit="batch",
               disable=not sys.stderr.isatty())
    try:
        for i, some in enumerate(bar):
            x, y = images.take(some)
            z = model.space.encode(to_float(x).to(model.device))
            n = schedule.noise(z.cpu(), seeded(seed, i)).to(z.device)
            net(schedule.corrupt(z, n, t), t.expand(len(z)))
            features.append(kept.pop().float().mean(1).cpu())                               # (B, D)
            labels.append(y)
    finally:
        hook.remove()
    return torch.cat(features), torch.cat(labels)


def shrink_pixels(images, side=PIXELS):
    """The images themselves, shrunk, as features. -> (n, C side side), labels (n,)"""
    side, features, labels = min(side, images.size), [], []
    for some in torch.arange(len(images)).split(1024):
        x, y = images.take(some)
        features.append(F.adaptive_avg_pool2d(to_float(x), side).flatten(1))
        labels.append(y)
    return torch.cat(features), torch.cat(labels)


# --- the classifier -----------------------------------------------------------------------

def fit_classifier(
    f,                          # features (n, D) to learn from
    y,                          # their labels (n,)
    f_held,                     # features (m, D) to classify
    classes,                    # K
    l2=1e-3,                    # weight of |W|^2 / 2
    steps=200,                  # of L-BFGS, at most
):
    """Fit a linear classifier. -> its answers (m,) for f_held. Deterministic."""
    mean, std = f.double().mean(0), f.double().std(0, correction=0).clamp(min=1e-6)
    f, f_held = (((v.double() - mean) / std).float() for v in (f, f_held))
    W = torch.zeros(f.shape[1] + 1, classes, requires_grad=True)                # the last row is c
    optimizer = torch.optim.LBFGS([W], max_iter=steps, history_size=20, tolerance_grad=1e-5,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        error = F.cross_entropy(f @ W[:-1] + W[-1], y)
        loss = error + l2 / 2 * W[:-1].square().sum()                           # [MAE] linear probe
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return (f_held @ W[:-1] + W[-1]).argmax(1).detach()


def probe_accuracy(
    model,                      # a DiffusionModel
    images,                     # data.Images with labels, to learn from
    held_out,                   # data.Images with labels, to measure on
    noise=0.0,                  # b / (a data_std) of what the network sees
    seed=0,                     # of the untrained network's weights and of the noise
    batch=256,                  # images at once
    folder=None,                # where latents are kept for both networks; None: nowhere
):
    """Held-out accuracy of a linear classifier on three kinds of features, and of chance.

    -> {"trained", "untrained", "pixels", "chance": accuracy in [0, 1]}"""
    torch.manual_seed(seed)
    fresh = ViT(model.schedule, **model.meta["model"]).to(model.device).eval()
    if fresh.guess is not None:                             # measured, not trained
        fresh.guess.load_state_dict(model.net.guess.state_dict())
    parts = [images, held_out]
    if model.space.name == "latent" and folder:
        parts, space = encode_once(parts, model.space, folder, False, model.device)
        model = replace(model, space=space)
    kinds = {}
    for name, net in (("trained", model.net), ("untrained", fresh)):
        kinds[name] = [extract_features(net, model, part, noise, seed, batch) for part in parts]
    kinds["pixels"] = [shrink_pixels(images), shrink_pixels(held_out)]
    accuracy = {}
    for name, ((f, y), (f_held, y_held)) in kinds.items():
        answers = fit_classifier(f, y, f_held, len(images.classes))
        accuracy[name] = (answers == y_held).double().mean().item()
    accuracy["chance"] = (y_held == y.bincount().argmax()).double().mean().item()
    return accuracy


# --- the command --------------------------------------------------------------------------

INHERITED = ("data", "val", "size", "gray", "seed", "cache_gb", "latents", "cache_latents")


def parser():
    p = build_parser("Measure what a frozen encoder knows: a linear probe.",
                     argument_default=argparse.SUPPRESS, formatter_class=argparse.HelpFormatter)
    run = "(default: the run's)"
    switch = dict(action=argparse.BooleanOptionalAction)
    p.add_argument("--from", dest="from_", type=parse_path,
                   help="a checkpoint or a run's folder (default: the newest run)")
    p.add_argument("--weights", choices=["ema", "model"],
                   help="averaged weights or the raw ones (default: model)")
    p.add_argument("--noise", type=float, help="noise on the images, as a share of their contrast "
                                               "(default: 0.1, for a reconstruction 0)")
    p.add_argument("--data", type=parse_path,
                   help=f"images with a first-level folder for each class, or a name that is "
                        f"downloaded: {list_published('data')} {run}")
    p.add_argument("--val", type=parse_path,
                   help=f"held-out images: a fraction of --data, or a path {run}")
    p.add_argument("--fraction", type=float,
                   help="share of the other images that is used, in (0, 1] (default: 1)")
    p.add_argument("--size", type=int, help=f"side of the images {run}")
    p.add_argument("--gray", **switch, help=f"one channel instead of three {run}")
    p.add_argument("--seed", type=int, help=f"of all random draws {run}")
    p.add_argument("--vae", type=parse_path,
                   help=f"the autoencoder of a model of latents, when it has moved {run}")
    p.add_argument("--cache-gb", type=float,
                   help=f"decoded images are kept in memory up to this size {run}")
    p.add_argument("--latents", type=parse_path, help=f"folder of the kept latents {run}")
    p.add_argument("--cache-latents", **switch,
                   help=f"encode every image once and keep the latents on disk {run}")
    p.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    return p


def inherit_probe_options(given, config):
    """All options: what was given, then what the run's config has, then the defaults.

    given: dict. config: a checkpoint's. Held-out images belong to their data: with other
    --data, --val is not the run's."""
    o = dict(weights="model", noise=None, fraction=1.0, vae=None, device="auto", threads=0)
    was = recorded_options(Options, config)
    o |= {name: was[name] for name in INHERITED}
    if given.get("data", o["data"]) is None:
        raise UserError("--data PATH is needed: a paper's own weights do not name their images")
    if not is_same_value(given.get("data", o["data"]), o["data"]):
        o["val"] = Options.val
    return SimpleNamespace(**(o | given))


def check_numbers(o):
    """UserError for a number out of range."""
    if not 0 < o.fraction <= 1:
        raise UserError(f"--fraction {o.fraction}: must be in (0, 1]")
    if o.noise is not None and not 0 <= o.noise < math.inf:
        raise UserError(f"--noise {o.noise}: must be at least 0")
    if not 0 <= o.seed < 2 ** 62:
        raise UserError(f"--seed {o.seed}: must be at least 0 and have less than 63 bits")
    if not 0 <= o.cache_gb < math.inf:
        raise UserError(f"--cache-gb {o.cache_gb}: must be at least 0")


def check_probed(o, given, model, source):
    """UserError for a model that cannot be probed with these options."""
    meta, square = model.meta, model.space.factor * model.net.p
    if meta["task"] != "generate":
        raise UserError(f"--from {source}: it was trained for the task {meta['task']} and sees its "
                        "condition, too; probe a model that generates or reconstructs")
    if o.noise and meta["objective"] == "reconstruct":
        raise UserError(f"--noise {o.noise}: must be 0 for a model of --objective reconstruct, "
                        "which has seen none")
    if (1 if o.gray else 3) != meta["channels"] or o.size < 1 or o.size % square:
        raise UserError(f"--size {o.size}, --gray: this model takes {meta['channels']} channel(s) "
                        f"and multiples of {square} pixels")
    if "latents" in given and not o.cache_latents:
        raise UserError("--latents is where --no-cache-latents keeps nothing; leave one out")
    if model.space.name != "latent" and ("latents" in given or "cache_latents" in given):
        raise UserError("--latents and --no-cache-latents are about models of --space latent; "
                        "leave them out")


def load_parts(o):
    """(images, held-out images) with labels. UserError for fewer than two classes."""
    settings = dict(seed=o.seed, cache_gb=o.cache_gb)
    images = load_images(o.data, o.size, o.gray, labels=True, **settings)
    images, held_out = holdout(images, o.val, **settings)
    if len(images.classes) < 2:
        raise UserError(f"--data {o.data}: a probe needs labels, a first-level folder for each of "
                        "at least two classes")
    return keep_fraction(images, o.fraction, o.seed), held_out


def probe_checkpoint(given):
    """Probe a checkpoint with the options that were given, a dict, and print one line."""
    require_one_process("probe.py")
    source = given.get("from_") or str(newest_checkpoint())
    o = inherit_probe_options(given, read_checkpoint(source, "config")["config"])
    check_numbers(o)
    set_threads(o.threads)
    model = load(source, o.weights, o.device, o.vae)
    check_probed(o, given, model, source)
    noise = o.noise
    if noise is None:
        noise = 0.0 if model.meta["objective"] == "reconstruct" else NOISE
    images, held_out = load_parts(o)
    folder = o.latents if o.cache_latents else None
    accuracy = probe_accuracy(model, images, held_out, noise, o.seed, folder=folder)
    print(f"linear probe of {source}, step {model.meta['step']}: {len(images)} images, "
          f"{len(images.classes)} classes; accuracy on {len(held_out)} held-out images: "
          f"encoder {accuracy['trained']:.1%}, untrained encoder {accuracy['untrained']:.1%}, "
          f"pixels {accuracy['pixels']:.1%}, chance {accuracy['chance']:.1%}")


def main(argv=None):
    probe_checkpoint(vars(parser().parse_args(argv)))


if __name__ == "__main__":
    run_command(main)
