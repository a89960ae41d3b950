"""Restoration: a model of a task, or of reconstruction, at work on pictures of your own.

The idea of tasks (DDM, arXiv 2306.13720). A network that was trained with `train.py --task`
sees a condition c at every call: a small picture, one with a hole, one whose edges are
asked for. So sampling as in sample.py, with model(x_t, t, c), restores the picture behind
the condition:

    c = ask(x)                                  what tasks.py makes of a picture x
    y = finish(sample(c), c)                    what c tells for certain is kept

Your picture may be larger than the images of the training. Then the network sees
overlapping tiles, and its outputs are averaged at every call [MultiDiffusion, 2302.08113]:

    out[place] = sum_tiles window out_tile / sum_tiles window

The idea of reconstruction (LMD, arXiv 2312.07971; MAE, 2111.06377). A network that was
trained with `train.py --objective reconstruct` sees some tokens of a clean image and
guesses all others in one pass: no noise, no time, no chain of steps.

    z   = encode(x)                             tokens of z are hidden, not of x
    z'  = z where visible, unit model(z, 0, y, m) where hidden        unit: see losses.py
    x'  = decode(z')

Beside it stands the *ceiling* decode(encode(x)), which no network could pass. A PSNR in
pixels measures the network and the autoencoder. The mean squared error of hidden latents
measures the network alone.

A true hole is another matter. An encoder looks everywhere (its group norms and its
attention are global), so latents beside a hole would tell of what is in it. Therefore:

    x_filled = x outside the hole, the mean of what is known inside
    m        hides each token whose square meets the hole; in latents also its neighbours
    x'       = x outside the hole, decode(z') inside

Two images that differ only inside the hole give the same result, bit for bit.

    python restore.py --input photos/                   the newest run's own task
    python restore.py --task inpaint --input photos/ --holes random --out restored.png
    python restore.py --task reconstruct --input photos/ --ratio 0.75
    from sample import load; from restore import reconstruct, restore_pictures
    done = reconstruct(load("runs/NAME"), x, ratio=0.75)

Shapes: B batch, n pictures, C channels, C' of a condition, N tokens of an h x w grid, f
pixels along a place of z, p places along a token; x (n, C, H, W) in [-1, 1]; hole
(n, 1, H, W) bool.
"""
import math
import sys
import time
from dataclasses import replace

import plumbing  # before torch: how its threads wait

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from losses import RECON_TARGETS, build_reconstruction, image_unit
from mask import Mask, draw, patchify, unpatchify
from plumbing.checkpoint import VERSION
from plumbing.console import (
    UserError, build_parser, count_nouns, parse_path, refuse_unused, run_command)
from plumbing.images import choose_subset, grid, to_float, to_uint8
from plumbing.inputs import UserPictures
from plumbing.machine import require_one_process, set_threads
from plumbing.sheets import draw_sheet
from plumbing.writer import ImageWriter, refuse_among
from sample import (
    SamplingRun, add_sampling_arguments, check_arguments, check_guided_labels, choose_seed,
    load, resolve_labels, sample,
)
from tasks import TASKS, draw_holes, fold_condition, place_side_by_side, psnr_per_image

FIXED_RATIOS = (0.15, 0.40, 0.55, 0.75)         # [LMD] where ramps start, rest, are on average, end
GREY = 0.0                                          # what a hidden square looks like in a picture


# --- tasks: pictures of any size ----------------------------------------------------------

def tile_starts(length, side):
    """Where tiles begin along an axis: they overlap by half or more and end with it."""
    steps = math.ceil(2 * (length - side) / side)
    return [round(i * (length - side) / max(steps, 1)) for i in range(steps + 1)]


class Tiled(torch.nn.Module):
    """A network for images of one side as one for larger images [MultiDiffusion].

    Tiles overlap, each is seen as if it were alone, and their outputs are averaged under a
    window that falls off towards a tile's border. All tiles are in one call, so that a
    whole picture is sampled at once: tiles that were sampled one by one would not fit
    together.

    side: of a tile, in places of z. batch: tiles at once."""

    def __init__(self, net, side, batch=64):
        super().__init__()
        self.net, self.side, self.batch = net, side, batch
        rise = torch.arange(1, side + 1, dtype=torch.float32)
        edge = rise.minimum(rise.flip(0))
        self.window = edge[:, None] * edge[None, :]                                   # (side, side)

    def cut_tiles(self, u, places):
        """Tiles of u (B, C, H, W) at places [(b, i, j), ...]. -> (tiles, C, side, side)"""
        if u is None:
            return None
        side = self.side
        return torch.stack([u[b, :, i:i + side, j:j + side] for b, i, j in places])

    def forward(self, zt, t, y=None, m=None, cond=None):
        """As ViT.forward without a mask: zt (B, C, H, W), H and W at least `side`.
        -> (B, C_out, H, W)"""
        B, _, H, W = zt.shape
        rows, columns = tile_starts(H, self.side), tile_starts(W, self.side)
        places = [(b, i, j) for b in range(B) for i in rows for j in columns]
        window, total, weight = self.window.to(zt), None, zt.new_zeros(B, 1, H, W)
        for lo in range(0, len(places), self.batch):
            some = places[lo:lo + self.batch]
            owners = torch.tensor([b for b, _, _ in some])       # on the CPU: it indexes any device
            labels = None if y is None else y[owners]
            tiles, shown = self.cut_tiles(zt, some), self.cut_tiles(cond, some)
            out = self.net(tiles, t[owners], labels, None, shown)
            if total is None:
                total = zt.new_zeros(B, out.shape[1], H, W)
            for tile, (b, i, j) in zip(out, some):
                total[b, :, i:i + self.side, j:j + self.side] += tile * window
                weight[b, :, i:i + self.side, j:j + self.side] += window
        return total / weight                                                   # [MultiDiffusion]


def restore_pictures(model, cond, **how):
    """A task's results for conditions of one size, whatever size.

    cond (n, C', H, W) in [-1, 1]: as tasks.py makes it.
    how: steps (the task's own number when left out), seed, churn, ... of `sample`.
    -> (n, C, H, W), maps (n, 1, H, W). What is known is kept: inpainting changes holes.
    UserError as `sample`."""
    H, W = cond.shape[2:]
    f, side = model.space.factor, model.meta["size"]
    height, width = padded_size(model, H, W)
    # A small picture goes on.
    whole = F.pad(cond, (0, width - W, 0, height - H), mode="replicate")
    task = TASKS[model.meta["task"]]
    if max(whole.shape[2:]) > side:
        model = replace(model, net=Tiled(model.net, side // f, how.get("batch", 64)))
    how = dict(steps=task.calls) | how
    made = sample(model, len(cond), cond=fold_condition(whole, f), **how)
    return task.finish(made[:, :, :H, :W], cond)


def padded_size(model, height, width):
    """The size at which the network works on a picture: at least that of the training's
    images, and whole places of z."""
    f, side = model.space.factor, model.meta["size"]
    return tuple(max(side, -(-length // f) * f) for length in (height, width))


def count_tiles(model, height, width):
    """How many tiles, and so passes, a network call takes for a result of this size."""
    f, side = model.space.factor, model.meta["size"]
    return math.prod(len(tile_starts(length // f, side // f))
                     for length in padded_size(model, height, width))


class PassBar:
    """A bar over the passes of the network. For pictures in tiles it first says how many
    passes there are, and after the first ones how long all will take.

    total: of all passes, at most. title: of the bar. pictures: how many. tiles: of the
    largest one."""

    def __init__(self, total, title, pictures, tiles):
        self.total, self.tells, self.begun = total, tiles > 1, time.monotonic()
        self.bar = tqdm(total=total, desc=title, unit="pass",
                        disable=pictures == tiles == 1 or None)
        if self.tells:
            self.say(f"{count_nouns(pictures, 'picture')}, {total} passes of the network; "
                     f"the largest is {tiles} tiles a call")

    def say(self, text):
        """A line that does not disturb the bar."""
        tqdm.write(text, file=sys.stderr)

    def __call__(self, module, given, out):
        """A hook of the network: its passes are counted."""
        self.bar.update(len(out))
        if self.tells:
            seconds = (time.monotonic() - self.begun) * self.total / len(out)
            self.say(f"about {describe_duration(seconds)} for all of them, if each takes as long "
                     "as the first")
            self.tells = False


def describe_duration(seconds):
    """A time in the unit that a person would use."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def make_pass_bar(run, task, sizes):
    """The PassBar of pictures of some sizes (H, W)."""
    tiles = [count_tiles(run.model, task.zoom * H, task.zoom * W) for H, W in sizes]
    each = run.args.steps * (1 if run.args.cfg in (0, 1) else 2)
    return PassBar(sum(tiles) * each, run.model.meta["task"], len(sizes), max(tiles))


# --- reconstruction: masks ----------------------------------------------------------------

def token_side(model):
    """The side of the token grid, h = w."""
    return model.meta["size"] // model.space.factor // model.net.p


def token_pixels(model):
    """The side of a token's square in pixels, f p."""
    return model.space.factor * model.net.p


def draw_masks(
    model,              # its token grid counts
    n,                  # how many images
    ratio,              # share of the tokens to hide, in (0, 1)
    seed=0,             # of the draw
):
    """A Mask for n images, a function of the arguments alone.

    UserError when the ratio hides nothing."""
    side, m = token_side(model), None
    if 0 < ratio < 1:
        m = draw("patch", n, side, side, ratio, torch.Generator().manual_seed(seed))
    if m is None:
        raise UserError(f"--ratio {ratio}: must be in (0, 1) and hide at least one of "
                        f"{side * side} tokens")
    return m


def mask_rows(m, lo, hi, device):
    """Images lo ... hi of a Mask, on a device."""
    return Mask(m.keep[lo:hi].to(device), m.N)


def hidden_pixels(m, side, square):
    """Mask of a side x side grid -> (B, 1, side square, side square), True where hidden."""
    hidden = ~m.visible.view(-1, 1, side, side)
    return hidden.repeat_interleave(square, 2).repeat_interleave(square, 3)


# --- reconstruction: one pass -------------------------------------------------------------

def require_reconstruction(model):
    """UserError unless this model can fill in pixels."""
    if model.meta.get("objective", "denoise") != "reconstruct":
        raise UserError("this model was trained to denoise whole images: --task reconstruct needs "
                        "one that train.py --objective reconstruct has trained")
    if model.meta["recon_target"] == "whitened":
        raise UserError("this model knows hidden patches only up to their mean and contrast "
                        "(--recon-target whitened), which no picture can be made of; train with "
                        "--recon-target clean")


def output_unit(model):
    """What the raw output of a reconstruction is multiplied by to be z."""
    if model.meta.get("version", VERSION) == 1:            # there it was z / s for any prediction
        return model.schedule.data_std
    return image_unit(model.schedule, model.predict)


@torch.no_grad()
def fill_hidden(model, z, m, y=None):
    """z (B, C, h p, w p), Mask or None -> z', hidden tokens as the network sees them."""
    if m is None:
        return z
    side, p = token_side(model), model.net.p
    now = torch.zeros(len(z), dtype=torch.float64)                              # t = 0: no noise
    guess = model.net.eval()(z, now, y, m) * output_unit(model)  # [LMD] unit model(z, 0, y, m)
    seen = m.visible[:, :, None]
    tokens = torch.where(seen, patchify(z, p), patchify(guess, p))                       # (B, N, P)
    return unpatchify(tokens, p, side, side)


def decode_pictures(model, z):
    """z -> pictures (B, C, H, W) in [-1, 1], float32."""
    return model.space.decode(z).clamp(-1, 1).float()


@torch.no_grad()
def reconstruct(
    model,              # of --objective reconstruct
    x,                  # pictures (n, C, H, W) in [-1, 1], of the training's size
    ratio=0.75,         # share of the tokens to hide, in (0, 1)
    seed=0,             # of the masks
    labels=None,        # class names or numbers, for a model that was trained with labels
    batch=64,           # pictures at once
):
    """Hide a share `ratio` of the tokens of x and guess them.

    -> dict of pictures (n, C, H, W) in [-1, 1] on the CPU: masked, reconstructed, ceiling,
    original; and of numbers (n,): psnr and ceiling_psnr, against the original in dB, and
    latent_mse, over the hidden tokens of z in units of the data's variance.
    UserError for a model of another kind, or a ratio that hides nothing."""
    require_reconstruction(model)
    side, square = token_side(model), token_pixels(model)
    masks = draw_masks(model, len(x), ratio, seed)
    labels = resolve_labels(labels, len(x), model.meta["classes"])
    done = []
    for lo in range(0, len(x), batch):
        part = x[lo:lo + batch].to(model.device)
        m = mask_rows(masks, lo, lo + batch, model.device)
        y = None if labels is None else labels[lo:lo + batch].to(model.device)
        z = model.space.encode(part)
        filled = fill_hidden(model, z, m, y)
        made, ceiling = decode_pictures(model, filled), decode_pictures(model, z)
        done.append(dict(
            masked=torch.where(hidden_pixels(m, side, square), GREY, part), reconstructed=made,
            ceiling=ceiling, original=part, psnr=psnr_per_image(made, part),
            ceiling_psnr=psnr_per_image(ceiling, part),
            latent_mse=latent_errors(model, filled, z, m)))
    return {name: torch.cat([part[name].cpu() for part in done]) for name in done[0]}


def latent_errors(model, filled, z, m):
    """Each image's mean squared error of hidden tokens over the data's variance. -> (B,)"""
    square = ((filled - z) / model.schedule.data_std) ** 2              # 0 where z is visible
    return patchify(square, model.net.p).mean(-1).sum(1) / (m.N - m.keep.shape[1])


# --- a true hole --------------------------------------------------------------------------

def hole_mask(hole, square, dilate):
    """hole (H, W) bool, True where pixels miss -> Mask of one image, or None for no hole.

    A token is hidden when its square meets the hole, or a square at most `dilate` tokens
    away. UserError when nothing is left to see."""
    met = F.max_pool2d(hole[None, None].float(), square)                              # (1, 1, h, w)
    for reach in range(dilate, -1, -1):                          # smaller, where a rim would vanish
        grown = F.max_pool2d(met, 2 * reach + 1, stride=1, padding=reach)
        if grown.min() == 0:
            keep = (grown.flatten() == 0).nonzero()[:, 0]
            return Mask(keep[None], grown.numel()) if len(keep) < grown.numel() else None
    raise UserError(f"the hole leaves no square of {square} x {square} pixels whole, and so no "
                    "token to be seen: make it smaller (a random one: give another --seed)")


@torch.no_grad()
def inpaint_hole(
    model,              # of --objective reconstruct
    x,                  # pictures (n, C, H, W) in [-1, 1], of the training's size
    holes,              # (n, 1, H, W) bool, True where pixels are missing
    labels=None,        # class names or numbers, for a model that was trained with labels
    names=None,         # of the pictures, for errors
):
    """Fill in missing pixels. What x holds inside its hole has no influence on the result.

    -> dict of pictures (n, C, H, W) on the CPU: masked, inpainted (known pixels are x's
    own), original. UserError as `reconstruct`, and when a hole leaves nothing."""
    require_reconstruction(model)
    # An encoder spreads the filling into the tokens around a hole: they are hidden, too.
    dilate = int(model.space.factor > 1)
    labels = resolve_labels(labels, len(x), model.meta["classes"])
    masks, done = [], []
    for i, hole in enumerate(holes):                                   # all of them before any work
        try:
            masks.append(hole_mask(hole[0], token_pixels(model), dilate))
        except UserError as error:
            raise UserError(f"{names[i] if names else f'picture {i}'}: {error}") from None
    for i, m in enumerate(masks):                            # they hide different numbers of tokens
        image, hole = x[i].to(model.device), holes[i].to(model.device)
        y = None if labels is None else labels[i:i + 1].to(model.device)
        known = torch.where(hole, 0.0, image)
        mean = known.sum((1, 2), keepdim=True) / (~hole).sum().clamp(min=1)
        z = model.space.encode(torch.where(hole, mean, image)[None])    # filled first, encoded then
        m = m and mask_rows(m, 0, 1, z.device)
        made = decode_pictures(model, fill_hidden(model, z, m, y))[0]
        done.append(dict(masked=torch.where(hole, GREY, image),
                         inpainted=torch.where(hole, made, image), original=image))
    return {name: torch.stack([one[name].cpu() for one in done]) for name in done[0]}


# --- numbers and pictures for a report ----------------------------------------------------

@torch.no_grad()
def reconstruction_errors(
    model,                  # of --objective reconstruct
    images,                 # data.Images, or spaces.Latents with their space
    ratios=FIXED_RATIOS,    # shares of hidden tokens
    n=256,                  # images at most, drawn at random
    seed=1,                 # of the masks
    batch=64,               # images at once
):
    """Held-out error of reconstruction at fixed ratios.

    Masks are a function of (seed, ratio) and n: the same for every model and every moment
    of training, which training losses under a ramp are not.
    -> {ratio: mean over hidden tokens of |out - patch|^2}, in units of the data's variance,
    of normalised patches in their own: 1 is what an all-zero guess costs (1 - 1/P of
    normalised patches of P values). What the mean image costs is `mean_image_error`."""
    target, net = model.meta["recon_target"], model.net.eval()
    score = build_reconstruction(model.schedule, "unit", net.p, recon_target=target)
    scale = output_unit(model) / model.schedule.data_std if target == "clean" else 1.0
    chosen, errors = choose_subset(len(images), n), {ratio: 0.0 for ratio in ratios}
    n = len(chosen)
    masks = {ratio: draw_masks(model, n, ratio, seed) for ratio in ratios}
    for some in torch.arange(n).split(batch):
        x, y = images.take(chosen[some])
        z = model.space.encode(to_float(x).to(model.device))
        y = y.to(model.device) if net.embed_class is not None else None
        now = torch.zeros(len(z), dtype=torch.float64)
        for ratio in ratios:
            m = mask_rows(masks[ratio], int(some[0]), int(some[-1]) + 1, model.device)
            out = scale * net(z, now, y, m)
            error = score(out, z, None, torch.zeros(()), m).item()
            errors[ratio] += error * len(some) / n
    return errors


def mean_image_error(
    model,              # of --objective reconstruct
    images,             # data.Images of the training, or spaces.Latents with their space
    held_out,           # the same, held out
    n=256,              # held-out images at most, those of `reconstruction_errors`
    count=4096,         # training images at most, drawn at random
    batch=64,           # images at once
):
    """What it costs to guess the mean of the training images everywhere, a number.

    It is in the units of `reconstruction_errors` and, on average, the same at every ratio:
    a network that has learnt nothing but the mean image has this error."""
    total, square, part = 0, 0.0, choose_subset(len(images), count)
    for some in part.split(batch):
        total = total + recon_targets(model, images, some).sum(0)                           # (N, P)
    chosen = choose_subset(len(held_out), n)
    for some in chosen.split(batch):
        error = recon_targets(model, held_out, some) - total / len(part)
        square += error.square().mean((1, 2)).sum().item()
    return square / len(chosen)


@torch.no_grad()
def recon_targets(model, images, some):
    """What a network should say of some images, in the unit of the data's deviation.

    some (k,): their numbers.  -> (k, N, P) float64"""
    x, _ = images.take(some)
    z = model.space.encode(to_float(x).to(model.device))
    target = RECON_TARGETS[model.meta["recon_target"]]
    return target(z, model.schedule.data_std, None, model.net.p).cpu().double()


def choose_zoom(rows, width=512):
    """A whole number that enlarges rows of pictures (C, H, W) to about `width` pixels."""
    return max(1, width // max(sum(picture.shape[2] for picture in row) for row in rows))


def draw_reconstruction(done, names=None):
    """What `reconstruct` or `inpaint_hole` gave -> a PIL sheet with titles and numbers.

    names: of the pictures; numbers when left out."""
    pictures = {name: to_uint8(v) for name, v in done.items() if v.ndim == 4}
    rows = []
    for i, row in enumerate(zip(*pictures.values())):
        title = names[i] if names else f"image {i}"
        if "psnr" in done:
            title += f"\nPSNR {done['psnr'][i]:.1f} dB\nceiling {done['ceiling_psnr'][i]:.1f} dB"
            title += f"\nlatent MSE {done['latent_mse'][i]:.3f}"
        rows.append((title, row))
    return draw_sheet(rows, list(pictures), choose_zoom([row for _, row in rows]))


def stack_reconstruction(done, margin=170):
    """What `reconstruct` gave -> a PIL picture without titles, for samples/ of a run."""
    pictures = [to_uint8(v) for v in done.values() if v.ndim == 4]
    sheet = grid(torch.stack(pictures, 1).flatten(0, 1), columns=len(pictures))
    canvas = Image.new("RGB", (sheet.width + margin, sheet.height), "white")
    canvas.paste(sheet)
    ink, height = ImageDraw.Draw(canvas), sheet.height / len(pictures[0])
    for i, psnr in enumerate(done["psnr"]):
        text = f"PSNR {psnr:.1f} dB, ceiling {done['ceiling_psnr'][i]:.1f}\n"
        text += f"latent MSE {done['latent_mse'][i]:.3f}"
        ink.multiline_text((sheet.width + 8, (i + 0.5) * height), text, fill="black", anchor="lm")
    return canvas


def describe_reconstruction(done):
    """What `reconstruct` or `inpaint_hole` gave, in one line."""
    if "psnr" not in done:
        return f"{' | '.join(done)}: {len(done['original'])} images, known pixels as they were"
    mean = {name: v.mean().item() for name, v in done.items() if v.ndim == 1}
    return (f"masked | reconstructed | ceiling | original: PSNR {mean['psnr']:.2f} dB, "
            f"ceiling {mean['ceiling_psnr']:.2f} dB, MSE of hidden latents "
            f"{mean['latent_mse']:.4f} ({len(done['psnr'])} images)")


# --- the command --------------------------------------------------------------------------

def parser():
    p = build_parser("Restore pictures of your own with a model that was trained for it.")
    tasks = [name for name in TASKS if name != "generate"]
    p.add_argument("--task", choices=[*tasks, "reconstruct"],
                   help="what the model must have been trained for; its own task when left out")
    p.add_argument("--input", type=parse_path,
                   help="your pictures: a folder, a .zip or a single one; for a task of any size")
    p.add_argument("--holes", type=parse_path,
                   help="for inpaint: a folder or .zip of masks of the same file stems, white "
                        "where the hole is, or the mask of a single picture, or random; "
                        "transparent pixels of --input when left out")
    p.add_argument("--targets", type=parse_path,
                   help="for a task: what should come out, a folder or .zip of the same file "
                        "stems, or that of a single picture, to be compared with")
    p.add_argument("--ratio", type=float, help="for reconstruct: the share of the tokens to hide; "
                                               "the training's when left out")
    add_sampling_arguments(p, None, "how many pictures; all when left out", "restored.png",
                           steps=None)
    return p


def check_inputs(args):
    """UserError, before any work, for pictures that no model could take."""
    if args.input is None and (args.holes or args.targets):
        raise UserError(f"--{'holes' if args.holes else 'targets'} goes with --input, the pictures "
                        "to work on")
    if args.input is None:
        raise UserError("--input: give the pictures to work on, a folder or a .zip (python "
                        "sample.py makes images from noise)")
    refuse_among({"--out": args.out, "--trace": args.trace},
                 {"--input": args.input, "--holes": args.holes, "--targets": args.targets})
    if args.out.lower().endswith(".npz"):
        raise UserError(f"--out {args.out}: pictures of different sizes do not fit into a .npz; "
                        "give a .png, a .zip or a folder")


def check_restoration(args, meta):
    """UserError for flags that a model of a task, with this meta, has no use for."""
    task = meta["task"]
    if args.task not in (None, task):
        way = f"train.py --task {args.task}"
        if args.task == "reconstruct":
            way = "--objective reconstruct"
        raise UserError(f"--task {args.task}: this model was trained for {task}; give --ckpt of "
                        f"one that was trained with {way}")
    if task == "generate":
        raise UserError("--input: this model was trained to generate, from nothing (python "
                        "sample.py); train one for it (train.py --task superres, inpaint, ...)")
    if args.holes and task != "inpaint":
        raise UserError(f"--holes: this model was trained for {task}, not to inpaint")
    if args.ratio is not None:
        raise UserError(f"--ratio: this model was trained for {task}, not to reconstruct what is "
                        "hidden")
    labels = resolve_labels(args.label, 1, meta["classes"])
    check_guided_labels(args.cfg, labels, meta)


def check_one_pass(args, inpaint):
    """UserError for flags that a model of --objective reconstruct has no use for."""
    if args.task not in (None, "reconstruct", "inpaint"):
        raise UserError("this model was trained to reconstruct hidden patches: give --task "
                        "reconstruct (or inpaint), or --ckpt of one that was trained with train.py "
                        f"--task {args.task}, without --objective reconstruct")
    unused = ("steps", "churn", "time_grid", "solver", "cfg", "cfg_interval", "amp", "targets",
              "trace")
    refuse_unused(args, parser(), unused,
                  "a reconstruction is one pass of the network, without noise and time")
    if (args.holes and not inpaint) or (args.ratio is not None and inpaint):
        raise UserError("--ratio is the share of the tokens that --task reconstruct hides; --holes "
                        "belong to --task inpaint")
    if not args.out.lower().endswith(".png"):
        raise UserError(f"--out {args.out}: a reconstruction is one sheet of pictures beside their "
                        "originals, a .png")


def open_pictures(args, meta, seed, **how):
    """The pictures of --input with their holes and targets, for a model with this meta."""
    return UserPictures(args.input, n=args.n, gray=meta["channels"] == 1, holes=args.holes,
                        targets=args.targets, seed=seed, draw_holes=draw_holes, **how)


def reconstruct_to_file(args, model):
    """Guess what is hidden of the user's pictures in one pass, and write the sheet."""
    inpaint = args.task == "inpaint" or (args.task is None and args.holes is not None)
    check_one_pass(args, inpaint)
    seed, meta = choose_seed(args), model.meta
    inputs = list(open_pictures(args, meta, seed, needs_hole=inpaint, side=meta["size"]))
    names, x = [one.name for one in inputs], torch.cat([one.x for one in inputs])
    with ImageWriter(args.out) as writer:                   # it tells now if it cannot write
        if inpaint:
            holes = torch.cat([one.hole for one in inputs])
            done = inpaint_hole(model, x, holes, args.label, names=names)
        else:
            ratio = meta.get("ratio") if args.ratio is None else args.ratio
            if ratio is None:
                raise UserError("--ratio: the checkpoint names none; give a share of the tokens")
            done = reconstruct(model, x, ratio, seed, labels=args.label, batch=args.batch)
        writer.sheet = draw_reconstruction(done, names)
    print(f"{describe_reconstruction(done)}; wrote {args.out}, seed {seed}")


def restore_to_file(run):
    """Restore the user's pictures one by one, and score them where there are targets.

    -> how many pictures"""
    args, meta = run.args, run.model.meta
    task, scores, rows = TASKS[meta["task"]], [], []
    inputs = open_pictures(args, meta, run.seed, needs_hole=meta["task"] == "inpaint",
                           zoom=task.zoom, maps=bool(task.exact))
    labels = resolve_labels(args.label, 1, meta["classes"])
    bar = make_pass_bar(run, task, inputs.sizes)
    run.model.net.register_forward_hook(bar)
    with bar.bar, ImageWriter(args.out) as writer:
        for i, one in enumerate(inputs):
            cond = task.ask(one.x, one.hole)
            result = restore_pictures(run.model, cond, first=i, labels=labels, watch=run.trace,
                                      **run.how)
            run.trace.finish(result)
            shown = [cond, result] if one.truth is None else [cond, result, one.truth]
            row = list(place_side_by_side(*shown))
            if writer.kind == ".png":
                rows.append((one.name, row))
            else:                                                      # by itself, and side by side
                names = [one.name, f"{one.name}-compare"]
                writer.add([to_uint8(result[0]), torch.cat(row, 2)], names)
            if one.truth is not None:
                scores.append(score_result(task, result, one.truth, cond))
        if rows:
            columns = ["condition", "result", "target"][:len(shown)]
            writer.sheet = draw_sheet(rows, columns, choose_zoom([row for _, row in rows]))
    print_scores(task, scores)
    return len(inputs)


def score_result(task, result, truth, cond):
    """How good a result is, and what needs no network. -> {name: (score, score without)}"""
    plain = task.plain(cond) if task.plain else None
    scores = {}
    for name, score in task.scores.items():
        without = np.nan if plain is None else score(plain, truth, cond)
        scores[name] = score(result, truth, cond), without
    return scores


def print_scores(task, scores):
    """Print the means of what `score_result` gave for some pictures."""
    for name in scores[0] if scores else ():
        mean, without = np.mean([one[name] for one in scores], 0)
        beside = f" (without a network {without:.3f})" if task.plain else ""
        print(f"{name}: {mean:.3f}{beside}, the mean over {len(scores)} pictures")


def main(argv=None):
    args = parser().parse_args(argv)
    require_one_process("restore.py")
    check_arguments(args, inputs=("input", "holes", "targets"))
    check_inputs(args)
    set_threads(args.threads)
    model = load(args.ckpt, args.weights, args.device, args.vae)
    if model.meta["objective"] == "reconstruct":
        return reconstruct_to_file(args, model)
    check_restoration(args, model.meta)
    args.steps = args.steps or TASKS[model.meta["task"]].calls
    run = SamplingRun(args, model)
    n = restore_to_file(run)
    run.report(n, n)


if __name__ == "__main__":
    run_command(main)
