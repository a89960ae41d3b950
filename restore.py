"""Reconstruction: what the hidden patches looked like, in one pass of the network.

The idea (LMD, arXiv 2312.07971; MAE, 2111.06377). A network that was trained with `train.py --objective reconstruct` is shown some tokens of
a clean image and guesses all others at once: no noise, no time, no chain of steps.

    z   = space.encode(x)                       what is hidden is hidden here, among the tokens of z
    z'  = z where visible, s model(z, 0, y, m) where hidden                    s: the data's root mean square, the unit of the target
    x'  = space.decode(z')

Beside it stands what no network could do better: the *ceiling* decode(encode(x)). The gap to the ceiling is the network's, the rest
the autoencoder's, so a PSNR in pixels comes with a mean squared error of hidden latents, where the autoencoder has no part.

A true hole is another matter. An autoencoder's encoder looks everywhere (its group norms and its attention are global), so latents beside
a hole would tell of what is in it. Therefore the hole is filled first and encoded then; a token is hidden if its square meets the hole, or
a neighbour's does, for there the filling has left its traces; and known pixels are pasted back. Two images that differ only inside the hole give
the same result, bit for bit.

    from sample import load; from reconstruct import reconstruct; done = reconstruct(load("runs/A"), x, ratio=0.75)

Shapes: B batch, C channels, N tokens of an h x w grid, f pixels along a place of z, p places along a token; x (n, C, H, W) in [-1, 1].
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from plumbing.console import UserError
from losses import build_reconstruction
from mask import Mask, draw, patchify, unpatchify
from tasks import psnr_per_image, TASKS, fold_condition
from plumbing.images import grid, to_float, to_uint8
from sample import sample

RATIOS = (0.15, 0.40, 0.55, 0.75)                                               # [LMD] where ramps start, rest, are on average, and end
GREY = 0.0                                                                      # what a hidden square looks like in a picture


# --- masks -----------------------------------------------------------------------------------------------------------------------------

def token_side(loaded):
    """The side of the token grid, h = w."""
    return loaded.meta["size"] // loaded.space.factor // loaded.net.p


def draw_masks(loaded, n, ratio, seed=0, policy="patch", block=4):
    """A Mask for n images, a function of the arguments alone. UserError when the ratio hides nothing."""
    side = token_side(loaded)
    m = draw(policy, n, side, side, ratio, torch.Generator().manual_seed(seed), block) if 0 < ratio < 1 else None
    if m is None:
        raise UserError(f"--ratio {ratio}: must be in (0, 1) and hide at least one of {side * side} tokens")
    return m


def mask_rows(m, lo, hi, device):
    """Images lo ... hi of a Mask, on a device."""
    return Mask(m.keep[lo:hi].to(device), m.N)


def hidden_pixels(m, side, square):
    """Mask of a side x side grid -> (B, 1, side square, side square) bool, True where a pixel's token is hidden."""
    hidden = ~m.visible.view(-1, 1, side, side)
    return hidden.repeat_interleave(square, 2).repeat_interleave(square, 3)


# --- one pass ----------------------------------------------------------------------------------------------------------------------

def require_reconstruction(loaded):
    """UserError unless this model can fill in pixels."""
    if loaded.meta.get("objective", "denoise") != "reconstruct":
        raise UserError("this model was trained to denoise whole images: --task reconstruct needs one that train.py --objective reconstruct has trained")
    if loaded.meta["recon_target"] == "whitened":
        raise UserError("this model knows hidden patches only up to their mean and contrast (--recon-target whitened), which no picture can be "
                        "made of; train with --recon-target clean")


@torch.no_grad()
def fill_hidden(loaded, z, m, y=None):
    """z (B, C, h p, w p) and a Mask -> z', the visible tokens as they are and the hidden ones as the network sees them. m None: z."""
    if m is None:
        return z
    side, p = token_side(loaded), loaded.net.p
    guess = loaded.net.eval()(z, torch.zeros(len(z), dtype=torch.float64), y, m) * loaded.schedule.data_std
    tokens = torch.where(m.visible[:, :, None], patchify(z, p), patchify(guess, p))                                  # (B, N, P)
    return unpatchify(tokens, p, side, side)


@torch.no_grad()
def reconstruct(loaded, x, ratio=0.75, seed=0, policy="patch", block=4, labels=None, batch=64):
    """Hide a share `ratio` of the tokens of x (n, C, H, W) and guess them.

    -> dict of pictures (n, C, H, W) in [-1, 1] on the CPU: masked, reconstructed, ceiling, original; and of numbers (n,): psnr,
    ceiling_psnr (against the original, in dB) and latent_mse (over the hidden tokens of z, in units of the data's variance).
    labels: (n,) class numbers for a model that was trained with labels. UserError for a model of another kind, or a ratio that hides nothing."""
    require_reconstruction(loaded)
    side, square = token_side(loaded), loaded.space.factor * loaded.net.p
    whole, done = draw_masks(loaded, len(x), ratio, seed, policy, block), []
    score = build_reconstruction(loaded.schedule, loaded.predict, loaded.net.p)
    for lo in range(0, len(x), batch):
        part = x[lo:lo + batch].to(loaded.device)
        m = mask_rows(whole, lo, lo + batch, loaded.device)
        z = loaded.space.encode(part)
        full = fill_hidden(loaded, z, m, None if labels is None else torch.as_tensor(labels)[lo:lo + batch].to(loaded.device))
        made, ceiling = (loaded.space.decode(v).clamp(-1, 1).float() for v in (full, z))
        error = torch.stack([score(full[i:i + 1] / loaded.schedule.data_std, z[i:i + 1], None, None, mask_rows(m, i, i + 1, z.device)) for i in range(len(z))])
        masked = torch.where(hidden_pixels(m, side, square), GREY, part)
        done.append([v.cpu() for v in (masked, made, ceiling, part, psnr_per_image(made, part), psnr_per_image(ceiling, part), error)])
    names = ("masked", "reconstructed", "ceiling", "original", "psnr", "ceiling_psnr", "latent_mse")
    return {name: torch.cat(values) for name, values in zip(names, zip(*done))}


# --- a true hole -----------------------------------------------------------------------------------------------------------------

def hole_mask(hole, square, dilate):
    """hole (H, W) bool, True where pixels are missing -> Mask of one image, or None when nothing is missing. A token is hidden when its
    square meets the hole, or a square at most `dilate` tokens away does. UserError when nothing is left to see."""
    met = F.max_pool2d(hole[None, None].float(), square)                                                             # (1, 1, h, w)
    for reach in range(dilate, -1, -1):                                         # a narrow rim would vanish: then look closer at the hole
        grown = F.max_pool2d(met, 2 * reach + 1, stride=1, padding=reach)
        if grown.min() == 0:
            keep = (grown.flatten() == 0).nonzero()[:, 0]
            return Mask(keep[None], grown.numel()) if len(keep) < grown.numel() else None
    raise UserError(f"the hole leaves no square of {square} x {square} pixels whole, and so no token to be seen: make it smaller (a random one: give another --seed)")


@torch.no_grad()
def inpaint_hole(loaded, x, holes, labels=None, dilate=None, names=None):
    """Fill in missing pixels. What x holds inside its hole has no influence on the result.

    x (n, C, H, W) in [-1, 1]; holes (n, 1, H, W) bool, True where pixels are missing. dilate: how far around a hole tokens are hidden,
    too; 1 when left out, 0 in pixels, where an encoder cannot spread the filling. names: of the pictures, for errors. -> dict of pictures
    (n, C, H, W) on the CPU: masked, inpainted (known pixels are x's own), original. UserError as `reconstruct`, and when a hole leaves nothing."""
    require_reconstruction(loaded)
    dilate = int(loaded.space.factor > 1) if dilate is None else dilate
    done, hidden = [], []
    for i, hole in enumerate(holes):                                            # all of them before any work
        try:
            hidden.append(hole_mask(hole[0], loaded.space.factor * loaded.net.p, dilate))
        except UserError as error:
            raise UserError(f"{names[i] if names else f'picture {i}'}: {error}") from None
    for i, (image, hole, m) in enumerate(zip(x.to(loaded.device), holes.to(loaded.device), hidden)):   # one by one: they hide different numbers of tokens
        known = torch.where(hole, 0.0, image)
        fill = known.sum((1, 2), keepdim=True) / (~hole).sum().clamp(min=1)     # the mean colour of what is known
        z = loaded.space.encode(torch.where(hole, fill, image)[None])
        m = m and mask_rows(m, 0, 1, z.device)
        y = None if labels is None else torch.as_tensor(labels)[i:i + 1].to(loaded.device)
        made = loaded.space.decode(fill_hidden(loaded, z, m, y))[0].clamp(-1, 1).float()
        done.append([v.cpu() for v in (torch.where(hole, GREY, image), torch.where(hole, made, image), image)])
    return {name: torch.stack(values) for name, values in zip(("masked", "inpainted", "original"), zip(*done))}


# --- numbers and pictures for a report ----------------------------------------------------------------------------------------

@torch.no_grad()
def reconstruction_errors(loaded, images, ratios=RATIOS, n=256, seed=1, batch=64):
    """Held-out error of reconstruction at fixed ratios: {ratio: mean over hidden tokens of |out - patch|^2}, in the units of the model's own
    target, so 1 is about what the mean image costs. Masks are a function of (seed, ratio) and n: the same for every model and every moment of
    training, which training losses under a ramp are not. images: data.Images, or latents.Latents with their space."""
    score = build_reconstruction(loaded.schedule, loaded.predict, loaded.net.p, recon_target=loaded.meta["recon_target"])
    n, errors = min(n, len(images)), {ratio: 0.0 for ratio in ratios}
    whole = {ratio: draw_masks(loaded, n, ratio, seed) for ratio in ratios}
    for some in torch.arange(n).split(batch):
        x, y = images.take(some)
        z, y = loaded.space.encode(to_float(x).to(loaded.device)), y.to(loaded.device) if loaded.net.embed_class is not None else None
        for ratio in ratios:
            m = mask_rows(whole[ratio], int(some[0]), int(some[-1]) + 1, loaded.device)
            out = loaded.net.eval()(z, torch.zeros(len(z), dtype=torch.float64), y, m)
            errors[ratio] += score(out, z, None, torch.zeros(()), m).item() * len(some) / n
    return errors


def draw_reconstruction(done, margin=170):
    """What `reconstruct` or `inpaint_hole` gave -> a PIL picture: a row for each image, its numbers beside it."""
    pictures = [to_uint8(v) for v in done.values() if v.ndim == 4]
    sheet = grid(torch.stack(pictures, 1).flatten(0, 1), columns=len(pictures))
    if "psnr" not in done:
        return sheet
    canvas = Image.new("RGB", (sheet.width + margin, sheet.height), "white")
    canvas.paste(sheet)
    ink, height = ImageDraw.Draw(canvas), sheet.height / len(pictures[0])
    for i, (got, best, error) in enumerate(zip(done["psnr"], done["ceiling_psnr"], done["latent_mse"])):
        ink.multiline_text((sheet.width + 8, (i + 0.5) * height), f"PSNR {got:.1f} dB, ceiling {best:.1f}\nlatent MSE {error:.3f}", fill="black", anchor="lm")
    return canvas


def describe_reconstruction(done):
    """What `reconstruct` or `inpaint_hole` gave, in one line."""
    if "psnr" not in done:
        return f"{' | '.join(done)}: {len(done['original'])} images, known pixels as they were"
    mean = {name: v.mean().item() for name, v in done.items() if v.ndim == 1}
    return (f"masked | reconstructed | ceiling | original: PSNR {mean['psnr']:.2f} dB, ceiling {mean['ceiling_psnr']:.2f} dB, "
            f"MSE of hidden latents {mean['latent_mse']:.4f} ({len(done['psnr'])} images)")


# --- pictures of any size ---

class Tiled(torch.nn.Module):
    """A network for images of one side as a network for larger ones: overlapping tiles, each seen as if it were alone, and their outputs
    averaged under a window that falls off towards a tile's border [MultiDiffusion, 2302.08113]. One call for all tiles, so that a whole
    picture is sampled at once: tiles that were sampled one by one would not fit together. side: of a tile, in places of z; batch: tiles at once."""

    def __init__(self, net, side, batch=64):
        super().__init__()
        self.net, self.side, self.batch = net, side, batch
        edge = torch.arange(1, side + 1, dtype=torch.float32).minimum(torch.arange(side, 0, -1, dtype=torch.float32))
        self.window = edge[:, None] * edge[None, :]                                                                  # (side, side)

    def starts(self, length):
        """Where tiles begin along an axis: they overlap by at least half and end with the picture."""
        steps = math.ceil(2 * (length - self.side) / self.side)
        return [round(i * (length - self.side) / max(steps, 1)) for i in range(steps + 1)]

    def forward(self, zt, t, y=None, m=None, cond=None):
        """As ViT.forward without a mask: zt (B, C, H, W), H and W at least `side` -> (B, C_out, H, W)."""
        places = [(b, i, j) for b in range(len(zt)) for i in self.starts(zt.shape[2]) for j in self.starts(zt.shape[3])]
        total, weight, window = 0, zt.new_zeros(zt.shape[0], 1, *zt.shape[2:]), self.window.to(zt)
        for lo in range(0, len(places), self.batch):
            some = places[lo:lo + self.batch]
            tiles = lambda u: torch.stack([u[b, :, i:i + self.side, j:j + self.side] for b, i, j in some])
            rows = torch.tensor([b for b, _, _ in some])                        # on the CPU, where it may index tensors of any device
            out = self.net(tiles(zt), t[rows], None if y is None else y[rows], None, None if cond is None else tiles(cond))
            total = total if torch.is_tensor(total) else zt.new_zeros(len(zt), out.shape[1], *zt.shape[2:])
            for tile, (b, i, j) in zip(out, some):
                total[b, :, i:i + self.side, j:j + self.side] += tile * window
                weight[b, :, i:i + self.side, j:j + self.side] += window
        return total / weight


def restore_pictures(loaded, cond, **how):
    """A task's results for conditions of one size, whatever size: cond (n, C', H, W) in [-1, 1], as tasks.py makes it -> (n, C, H, W), maps
    (n, 1, H, W). how: steps, seed, churn, ... of `sample`. What is known for certain is kept: inpainting changes the holes alone."""
    H, W = cond.shape[2:]
    f, side = loaded.space.factor, loaded.meta["size"]
    bottom, right = max(side, -(-H // f) * f) - H, max(side, -(-W // f) * f) - W
    whole = F.pad(cond, (0, right, 0, bottom), mode="replicate")                # a picture smaller than a tile goes on with its border
    if max(whole.shape[2:]) > side:
        loaded = replace(loaded, net=Tiled(loaded.net, side // f, how.get("batch", 64)))
    return TASKS[loaded.meta["task"]].finish(sample(loaded, len(cond), cond=fold_condition(whole, f), **how)[:, :, :H, :W], cond)
