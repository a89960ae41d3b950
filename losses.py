"""Losses: denoise what is seen, reconstruct what is hidden.

The idea. Score matching regresses the noise (or the image) in every patch. If only K
patches went through the network, only K patches have an answer. So only those are scored
(MaskDM, arXiv 2306.11363), and the sum is divided by K: it is the error of one patch,
however many are seen. With a decoder (MaskDiT, 2306.09305) hidden patches have an
answer, too. To guess them from their neighbours is a second task:

    L = mean over visible tokens of  sum_f w_f(t) |out_f - target_f|^2
      + lambda mean over hidden tokens of  |out - patch|^2

f counts the heads of the network, |.|^2 is a mean over the P values of a patch. A token
economy that lets hidden tokens take part (routing, vit.py) has an answer for them: then all
tokens are scored, the ordinary loss. LMD (2312.07971) drops the noise and the time, and
with them the first term. It reconstructs the hidden patches of a clean image.

The targets belong to the prediction (schedules.py). The weights w_f are per image and are
applied before any mean, in float32. The reconstruction reads the network's *raw* output:
through EDM's c_skip the noisy patch would leak in, which may be the target. It is in the
head's own unit: the image z where the head gives z on visible tokens (predictions x0 and
both), z / data_std elsewhere.

Shapes: B batch, C channels, N tokens, P values per patch and field; out (B, heads C, H, W),
z (B, C, H, W), n as drawn by schedule.noise, t (B,); errors (B, N).
Run `python losses.py` to see both terms of the loss on one image.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from mask import draw, patchify, unpatchify
from plumbing.faces import draw_faces
from plumbing.images import to_float, to_uint8
from plumbing.sheets import draw_sheet
from schedules import PREDICTIONS, SCHEDULES


# --- the first term: score matching -------------------------------------------------------

def plain_weights(t):
    """Weight 1 for the image head and for the noise head."""
    return torch.ones_like(t), torch.ones_like(t)


def ddm_weights(t):
    """1/t for the image head and 1/(1 - t + 1e-4) for the noise head, as released. [DDM]"""
    return 1 / t, 1 / (1 - t + 1e-4)                                            # [DDM] t >= 1e-4


# Of the two heads of the prediction `both`. A prediction with one head has weight 1.
WEIGHTS = {"plain": plain_weights, "ddm": ddm_weights}


def head_weights(t, predict, weighting, heads):
    """A weight for each of `heads` fields: WEIGHTS for the two of `both`, 1 for all others.

    t (B,) -> list of `heads` weights (B,), float32"""
    weights = list(WEIGHTS[weighting](t)) if predict == "both" else []
    weights += [torch.ones_like(t)] * (heads - len(weights))
    return [weight.float() for weight in weights]


def denoising_error(
    out,                # (B, heads C, H, W): the network's output
    z,                  # (B, C, H, W): the clean image
    n,                  # the noise bundle
    t,                  # (B,): times
    schedule,           # gives the targets
    predict,            # a name in PREDICTIONS
    patch,              # side of a token
    weighting="plain",  # a name in WEIGHTS
):
    """Score matching, token by token: sum_f w_f(t) |out_f - target_f|^2 -> (B, N)."""
    targets = schedule.target(z, n, t, predict)
    weights = head_weights(t, predict, weighting, len(targets))
    error = 0
    for weight, guess, target in zip(weights, out.float().split(z.shape[1], 1), targets):
        square = patchify((guess - target) ** 2, patch).mean(-1)                            # (B, N)
        error = error + weight.to(square)[:, None] * square
    return error


# --- the second term: reconstruction. target(z, unit, corrupt, patch) -> (B, N, P) --------
# unit: what z is divided by, see `image_unit`. corrupt() -> x_t (B, C, H, W)

def clean_target(z, unit, corrupt, patch):
    """The image itself, in the unit of the head that gives it."""
    return patchify(z / unit, patch)


def noisy_target(z, unit, corrupt, patch):
    """The noisy image, normalised patch by patch: the released code. [MaskDiT]"""
    return normalise_patches(patchify(corrupt(), patch))


def whitened_target(z, unit, corrupt, patch):
    """The image, normalised patch by patch: better features, but no picture. [LMD, MAE]"""
    return normalise_patches(patchify(z, patch))


RECON_TARGETS = {"clean": clean_target, "noisy": noisy_target, "whitened": whitened_target}


def normalise_patches(u, eps=1e-6):
    """Every patch to mean 0 and (unbiased) variance 1: u (B, N, P) -> (B, N, P). [MAE]"""
    return (u - u.mean(-1, keepdim=True)) / (u.var(-1, keepdim=True) + eps).sqrt()


def image_unit(schedule, predict):
    """The unit of the head that reconstructs: out = z / unit.

    1 where the prediction's first head is the image itself, so that one head gives one
    thing on visible and on hidden tokens; elsewhere the data's root mean square."""
    return 1.0 if PREDICTIONS[predict].has_image else schedule.data_std


def token_error(
    out,           # (B, heads C, H, W): the network's raw output; its first C channels are read
    z,             # (B, C, H, W): the clean image
    n,             # the noise bundle
    t,             # (B,): times
    schedule,      # gives the unit and x_t
    predict,       # a name in PREDICTIONS, gives the unit
    patch,         # side of a token
    recon_target,  # a name in RECON_TARGETS
):
    """Reconstruction, token by token: |out - patch|^2 -> (B, N)."""
    unit, corrupt = image_unit(schedule, predict), partial(schedule.corrupt, z, n, t)
    target = RECON_TARGETS[recon_target](z, unit, corrupt, patch)                        # (B, N, P)
    return ((patchify(out[:, :z.shape[1]].float(), patch) - target) ** 2).mean(-1)


# --- the means ----------------------------------------------------------------------------

def visible_mean(error, m):
    """The mean of error (B, N) over the K visible tokens of each image."""
    return error.gather(1, m.keep).mean()


def hidden_mean(error, m):
    """The mean of error (B, N) over hidden tokens."""
    hidden = ~m.visible
    return (error * hidden).sum() / hidden.sum()


def build_objective(
    schedule,              # gives the targets
    predict,               # a name in PREDICTIONS
    patch,                 # side of a token
    weighting="plain",     # a name in WEIGHTS, used by the prediction `both`
    recon=0.0,             # lambda, 0 for none; needs a decoder, which answers for hidden patches
    recon_target="clean",  # a name in RECON_TARGETS
    all_scored=False,      # score matching on all tokens, hidden or not (ECONOMIES of vit.py)
):
    """Denoise the visible tokens and, with a weight, reconstruct the hidden ones.

    -> objective(out, z, n, t, m), the scalar training loss in float32. When nothing is
    hidden (m None), the reconstruction is absent, not 0/0. ValueError for a reconstruction
    where all tokens are scored."""
    if recon and all_scored:
        raise ValueError("reconstruction is about tokens that score matching leaves out: "
                         "there are none when all are scored")

    def objective(out, z, n, t, m):
        error = denoising_error(out, z, n, t, schedule, predict, patch, weighting)          # (B, N)
        if m is None or all_scored or m.keep.shape[1] == m.N:
            return error.mean()
        loss = visible_mean(error, m)                               # [MaskDM] 1/K sum over visible
        if recon:
            guessed = token_error(out, z, n, t, schedule, predict, patch, recon_target)     # (B, N)
            loss = loss + recon * hidden_mean(guessed, m)           # [MaskDiT] lambda = 0.1
        return loss

    return objective


def build_reconstruction(
    schedule,              # gives the targets
    predict,               # a name in PREDICTIONS, gives the unit of the patches
    patch,                 # side of a token
    weighting="plain",     # not used: there is one term
    recon=0.0,             # not used: its weight is 1
    recon_target="clean",  # a name in RECON_TARGETS
    all_scored=False,      # not used: visible tokens are never scored
):
    """Reconstruct hidden patches, without noise and time. [LMD]

    -> objective(out, z, n, t, m), the mean over hidden tokens of |out - patch|^2. m always
    hides something. The arguments are those of build_objective."""

    def objective(out, z, n, t, m):
        error = token_error(out, z, n, t, schedule, predict, patch, recon_target)           # (B, N)
        return hidden_mean(error, m)                                # [LMD]

    return objective


OBJECTIVES = {"denoise": build_objective, "reconstruct": build_reconstruction}


# --- the picture --------------------------------------------------------------------------

def draw_terms(side=160, seed=0):
    """The picture of `python losses.py`: both terms of the loss, token by token.

    There is no network here. A blur stands in for it: each pixel of `out` is a mean of the
    visible pixels around it. Like MaskDiT's decoder, it has an answer at every token.
    side: pixels of a picture, a multiple of 16. seed: which face and masks. -> PIL image"""
    cells, patch = 16, side // 16                                               # a 16 x 16 grid
    schedule = SCHEDULES["ddm"]
    recon = 0.1
    generator = torch.Generator().manual_seed(seed)
    z = to_float(draw_faces(1, side, seed).pixels)                                    # (1, 3, H, W)
    n = schedule.noise(z, generator)
    t = torch.tensor([0.1], dtype=torch.float64)
    zt = schedule.corrupt(z, n, t)
    objective = build_objective(schedule, "x0", patch, recon=recon)
    rows = []
    for ratio in (0.25, 0.5, 0.75, 0.9):
        m = draw("patch", 1, cells, cells, ratio, generator)
        flags = m.visible[:, :, None].expand(-1, -1, patch ** 2).float()
        visible = unpatchify(flags, patch, cells, cells)                              # (1, 1, H, W)
        out = blur_visible(zt, visible)
        first = denoising_error(out, z, n, t, schedule, "x0", patch)                        # (1, N)
        second = token_error(out, z, n, t, schedule, "x0", patch, "clean")                  # (1, N)
        terms = f"{visible_mean(first, m):.3f} + {recon} x {hidden_mean(second, m):.3f}"
        title = f"mask ratio {ratio}\n\nL = {terms}\n   = {objective(out, z, n, t, m):.3f}"
        seen = torch.where(visible > 0, zt, 0.8)                                # hidden: grey
        pictures = [to_uint8(x)[0] for x in (z, zt, seen, out)]
        pictures += [draw_errors(first, m.visible, side), draw_errors(second, ~m.visible, side)]
        rows.append((title, pictures))
    titles = [
        "clean image",
        "noisy image\n(ddm, t = 0.1)",
        "what the network sees:\nvisible tokens",
        "out: a guess of the image\n(a blur stands in)",
        "1. score matching: error of\nvisible tokens, white (0) to\nred (0.2); grey: not scored",
        "2. reconstruction: error of\nhidden tokens, white (0) to\nred (0.2); grey: not scored",
    ]
    return draw_sheet(rows, titles)


def blur_visible(x, visible):
    """A mean of the visible pixels around each pixel, mostly of the nearest ones.

    x (B, C, H, W), visible (B, 1, H, W), 1 where seen and 0 elsewhere -> (B, C, H, W)"""
    weighted, weight = x * visible, visible
    total = norm = 0
    for radius, share in ((2, 1.0), (8, 0.01), (24, 1e-4)):
        for _ in range(2):
            weighted = F.avg_pool2d(weighted, 2 * radius + 1, 1, radius)
            weight = F.avg_pool2d(weight, 2 * radius + 1, 1, radius)
        total, norm = total + share * weighted, norm + share * weight
    return total / norm.clamp(min=1e-9)


def draw_errors(error, counted, side, largest=0.2):
    """Errors of one image's tokens, white (0) to red (`largest`); grey where not counted.

    error, counted (1, N) -> uint8 (3, side, side)"""
    shade = (error / largest).clamp(0, 1)
    colours = torch.stack([torch.ones_like(shade), 1 - shade, 1 - shade], 1)             # (1, 3, N)
    colours = torch.where(counted[:, None], colours, 0.8)
    cells = math.isqrt(error.shape[1])
    tiles = F.interpolate(colours.view(1, 3, cells, cells), size=(side, side))
    return (255 * tiles[0]).to(torch.uint8)


if __name__ == "__main__":
    from plumbing.console import run_picture_command
    run_picture_command("Draw both terms of the loss on one image.", draw_terms,
                        "losses.png", seed=(0, "which face, noise and masks"))
