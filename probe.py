"""Linear probe: does a network know what it sees, although nobody told it?

The idea (MAE, arXiv 2111.06377, after 1603.08511). Freeze the encoder, show it whole images, average its tokens, and ask whether a *linear*
classifier on that average finds the labels. What the classifier cannot compute the features must already hold.

    features   f = mean over tokens of blocks(embed(x))              all tokens visible, decoder unused                     (n, D)
    standard   f' = (f - mean) / std                                 of the training features: MAE's batch norm without affine weights
    classifier argmin_W  mean cross-entropy(W f' + c, y) + l2 |W|^2 / 2        convex: L-BFGS from zero, no learning rate and no draw

A model of `--objective reconstruct` is shown the image itself. A denoiser has hardly seen any without noise, so it is shown images with a little,
b / (a s) = 0.1, and told so. Beside its accuracy stand those of the same network before training, of the pixels alone, and of always naming the most
frequent class: without them a number says nothing.

    python finetune.py --probe --data cifar10-train.zip                           # the newest run's features, labels from the folders

Shapes: n images, B batch, D width, K classes.
"""
import math
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from plumbing.console import UserError
from data import holdout, load_images
from spaces import encode_once
from sample import build_model, load
from plumbing.images import seeded, to_float

PIXELS = 16                                                                     # side to which raw pixels are shrunk: 768 numbers, as many as ViT-B's
NOISE = 0.1                                                                     # b / (a s) for denoisers


@torch.no_grad()
def extract_features(model, loaded, images, noise=0.0, seed=0, batch=256):
    """Mean of the encoder's last tokens for all of data.Images -> features (n, D), labels (n,). noise: b / (a s) of what the model sees;
    image i's is a function of (seed, i's batch)."""
    kept, features, labels = [], [], []
    handle = model.blocks[-1].register_forward_hook(lambda block, inputs, u: kept.append(u.float().mean(1)))         # (B, D)
    schedule = loaded.schedule
    t = schedule.time_at(torch.atan(torch.tensor([float(noise)], dtype=torch.float64))) if noise else torch.zeros(1, dtype=torch.float64)
    try:
        for i, some in enumerate(tqdm(torch.arange(len(images)).split(batch), desc="features", unit="batch", disable=not sys.stderr.isatty())):
            x, y = images.take(some)
            z = loaded.space.encode(to_float(x).to(loaded.device))
            n = schedule.noise(z.cpu(), seeded(seed, i)).to(z.device)
            model(schedule.corrupt(z, n, t), t.expand(len(z)))
            features.append(kept.pop().cpu())
            labels.append(y)
    finally:
        handle.remove()
    return torch.cat(features), torch.cat(labels)


def pixel_features(images, side=PIXELS):
    """The images themselves, shrunk: (n, C side side), labels (n,)."""
    x, y = zip(*(images.take(some) for some in torch.arange(len(images)).split(1024)))
    return torch.cat([F.adaptive_avg_pool2d(to_float(part), min(side, images.size)).flatten(1) for part in x]), torch.cat(y)


def fit_classifier(f, y, f_held, classes, l2=1e-3, steps=200):
    """Fit a linear classifier on features f (n, D) with labels y (n,) -> its answers (n',) for f_held (n', D). Deterministic."""
    mean, std = f.double().mean(0), f.double().std(0, correction=0).clamp(min=1e-6)
    f, f_held = (((v.double() - mean) / std).float() for v in (f, f_held))
    W = torch.zeros(f.shape[1] + 1, classes, requires_grad=True)                # the last row is the bias
    optimizer = torch.optim.LBFGS([W], max_iter=steps, history_size=20, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(f @ W[:-1] + W[-1], y) + l2 / 2 * W[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return (f_held @ W[:-1] + W[-1]).argmax(1).detach()


def probe_accuracy(loaded, images, held_out, noise=0.0, seed=0, batch=256, folder=None):
    """Held-out accuracy in [0, 1] of a linear classifier on four kinds of features: {"trained", "untrained", "pixels", "chance"}.

    images, held_out: data.Images with labels. folder: where latents are kept, so that both networks share them; None: nowhere."""
    torch.manual_seed(seed)                                                     # of the untrained network's weights
    fresh, parts = build_model(loaded.meta)[0].to(loaded.device).eval(), [images, held_out]
    if loaded.space.name == "latent" and folder:
        parts, space = encode_once(parts, loaded.space, folder, False, loaded.device)
        loaded = replace(loaded, space=space)
    kinds = {"trained": [extract_features(loaded.net, loaded, part, noise, seed, batch) for part in parts],
             "untrained": [extract_features(fresh, loaded, part, noise, seed, batch) for part in parts], "pixels": [pixel_features(images), pixel_features(held_out)]}
    accuracy = {}
    for name, ((f, y), (f_held, y_held)) in kinds.items():
        accuracy[name] = (fit_classifier(f, y, f_held, len(images.classes)) == y_held).double().mean().item()
    accuracy["chance"] = (y_held == y.bincount().argmax()).double().mean().item()
    return accuracy


# What `finetune.py --probe` takes over from the run unless a flag says otherwise, and all options that it reads.
INHERITED = ("space", "vae", "data", "val", "seed", "size", "gray", "patch", "cache_gb", "latents", "cache_latents")
READS = {"probe", "probe_noise", "from_", "weights", "fraction", "device", "threads", *INHERITED} - {"patch", "space"}


def run_probe(o, source):
    """`finetune.py --probe`: with its options o, probe the checkpoint `source`, print one line. -> as `probe`."""
    loaded = load(source, o.weights, o.device, o.vae)
    meta, reconstructs = loaded.meta, loaded.meta.get("objective") == "reconstruct"
    torch.set_num_threads(o.threads or torch.get_num_threads())
    noise = (0.0 if reconstructs else NOISE) if o.probe_noise is None else o.probe_noise
    if not 0 <= noise < math.inf or (noise and reconstructs):
        raise UserError(f"--probe-noise {noise}: must be at least 0, and 0 for a model of --objective reconstruct, which has seen none")
    if meta["task"] != "generate":
        raise UserError(f"--probe: {source} was trained for the task {meta['task']} and sees its condition, too; probe a model that generates or reconstructs")
    square = loaded.space.factor * loaded.net.p
    if (1 if o.gray else 3) != meta["channels"] or o.size % square:
        raise UserError(f"--size {o.size}, --gray: this model takes {meta['channels']} channel(s) and multiples of {square} pixels")
    settings = dict(seed=o.seed, cache_gb=o.cache_gb)
    images, held_out = holdout(load_images(o.data, o.size, o.gray, labels=True, **settings), o.val, **settings)
    if len(images.classes) < 2:
        raise UserError(f"--data {o.data}: --probe needs labels, a first-level folder for each of at least two classes")
    if o.fraction < 1:
        images = images.subset(torch.randperm(len(images), generator=seeded(o.seed, 7))[:max(1, round(o.fraction * len(images)))])
    accuracy = probe_accuracy(loaded, images, held_out, noise, o.seed, folder=o.latents if o.cache_latents else None)
    print(f"linear probe of {source}, step {meta['step']}: {len(images)} images, {len(images.classes)} classes; accuracy on {len(held_out)} held-out images: "
          f"encoder {accuracy['trained']:.1%}, untrained encoder {accuracy['untrained']:.1%}, pixels {accuracy['pixels']:.1%}, chance {accuracy['chance']:.1%}")
    return accuracy
