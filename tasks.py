"""Tasks: what is predicted, and what the network may look at while it predicts.

The idea (DDM, arXiv 2306.13720, section on conditional generation). Super-resolution, inpainting, edges and saliency are one thing: a
*condition* made from the picture is shown to the network at every time, clean, and the diffusion runs on the *target* alone.

    target, cond = pose(task, x, g)              x (B, C + maps, S, S) -> target (B, C, S, S), cond (B, C', S, S)
    out          = model(zt, t, y, m, cond)      vit.py: the patches of cond are embedded and added; a dropped patch drops its condition

    generate     target x                cond none
    superres     target x                cond x shrunk by 4 and enlarged again, both bicubic
    inpaint      target x                cond x with free-form holes cut out, and a channel that says where they are
    edges        target an edge map      cond x                                 the map: exact for the built-in faces, your own
    saliency     target an object map    cond x                                 (--targets), or for edges the picture's gradient

A map has one channel and is predicted as a grey picture of C channels (and the C guesses are averaged), so a task changes neither the
network's width nor the autoencoder: any masked, unconditional model is the first stage of any task. The embedding of the condition
starts at zero, so that fine-tuning starts from exactly that model. In a latent space the condition is not encoded but folded: the
f x f pixels over one latent become its channels, which loses nothing and needs no second autoencoder.

Shapes: B batch, C channels, C' of the condition, S the side in pixels; pictures and maps in [-1, 1].     Run `python tasks.py` to see all.
"""
from dataclasses import dataclass, field
from typing import Callable

import torch
import torch.nn.functional as F

from plumbing.images import to_float, to_uint8

ZOOM = 4                                                                        # of super-resolution: [DDM] DIV2K x4


# --- conditions --------------------------------------------------------------------------------------------------------------------

def shrink(x, zoom=ZOOM):
    """(B, C, H, W) -> (B, C, H / zoom, W / zoom): bicubic with antialiasing, as Pillow does it."""
    return F.interpolate(x.float(), scale_factor=1 / zoom, mode="bicubic", antialias=True).clamp(-1, 1)


def enlarge(x, zoom=ZOOM):
    """(B, C, h, w) -> (B, C, zoom h, zoom w), bicubic: what super-resolution has to beat."""
    return F.interpolate(x.float(), scale_factor=zoom, mode="bicubic").clamp(-1, 1)


def recover_small(cond, zoom=ZOOM, rounds=8):
    """The small picture that `enlarge` made cond of, by repeated correction: (B, C, H, W) -> (B, C, H / zoom, W / zoom)."""
    small = shrink(cond, zoom)
    for _ in range(rounds):
        small = small + shrink(cond - enlarge(small, zoom), zoom)
    return small


def draw_holes(B, H, W, g, strokes=4):
    """Free-form holes: one rectangle and one brush stroke of a few straight pieces each, all drawn with the generator g.
    -> (B, 1, H, W) bool, True in the hole: about 7 to 55 per cent of the picture, a quarter on average, and never nothing."""
    rand = lambda *shape: torch.rand(B, *shape, 1, 1, generator=g, device=g.device)                            # (B, ..., 1, 1)
    y, x = ((torch.arange(n, device=g.device) + 0.5) / n for n in (H, W))
    y, x = y[:, None], x[None, :]
    height, width = (0.1 + 0.35 * rand()).clamp(min=1.001 / H), (0.1 + 0.35 * rand()).clamp(min=1.001 / W)      # at least one pixel
    top, left = (1 - height) * rand(), (1 - width) * rand()
    box = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)                                         # (B, H, W)
    py, px, radius = rand(strokes + 1), rand(strokes + 1), 0.03 + 0.05 * rand()
    dy, dx = py.diff(dim=1), px.diff(dim=1)                                     # the distance of every pixel from every piece
    along = (((y - py[:, :-1]) * dy + (x - px[:, :-1]) * dx) / (dy ** 2 + dx ** 2 + 1e-9)).clamp(0, 1)              # (B, pieces, H, W)
    away = torch.hypot(y - py[:, :-1] - along * dy, x - px[:, :-1] - along * dx).amin(1)                             # (B, H, W)
    return (box | (away < radius))[:, None]


def cut_hole(x, hole):
    """Picture and hole (B, 1, H, W) bool -> the condition of inpainting (B, C + 1, H, W): grey in the hole, then 1 in it and -1 outside."""
    return torch.cat([x.masked_fill(hole, 0.0), torch.where(hole, 1.0, -1.0).to(x)], 1)


def sobel_edges(x, gain=3.0):
    """The edges of a picture as the size of its gradient: Sobel on the mean of the channels, (B, C, H, W) -> (B, 1, H, W) in [-1, 1].
    A step of a third of the whole range is an edge at full strength."""
    grey = F.pad((x.float().mean(1, keepdim=True) + 1) / 2, (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=x.device) / 4
    slope = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None])                                                   # (B, 2, H, W)
    return (gain * slope.norm(dim=1, keepdim=True)).clamp(max=1) * 2 - 1


# --- measures, in float64 ------------------------------------------------------------------------------------------------------------

def psnr_per_image(a, b, where=None):
    """Peak signal to noise in dB of pictures (B, C, H, W) in [-1, 1] (peak 2), each image by itself -> (B,) on the CPU. where: (B, 1, H, W)
    bool, the pixels that count; default all."""
    a, b = a.cpu(), b.cpu()
    square = (a.double() - b.double()) ** 2
    weight = torch.ones_like(square) if where is None else where.double().expand_as(square)
    error = (square * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def psnr(a, b, where=None):
    """The mean of `image_psnr`, a number."""
    return psnr_per_image(a, b, where).mean().item()


def mae(a, b):
    """Mean absolute error of two maps in [-1, 1], on the scale of 0 to 1."""
    return ((a.double() - b.double()).abs().mean() / 2).item()


def max_f(guess, truth, tolerance=0, beta2=0.3):
    """The best F over 255 thresholds of the guess, precision and recall pooled over all images (the edge benchmarks' ODS).

    guess, truth: (B, 1, H, W) in [-1, 1]; true is what is above 0. tolerance: a pixel counts as found within so many pixels, in all
    directions. beta2: weight of the recall; 0.3 is usual for saliency, 1 for edges."""
    grow = lambda u: F.max_pool2d(u.float(), 2 * tolerance + 1, 1, tolerance)
    level, true = to_uint8(guess), truth > 0
    at_least = lambda values: torch.bincount(values.flatten().long(), minlength=256).flip(0).cumsum(0).flip(0)[1:].double()      # (255,)
    precision = at_least(level[grow(true) > 0]) / at_least(level).clamp(min=1)
    recall = at_least(grow(level).byte()[true]) / max(1, int(true.sum()))
    return ((1 + beta2) * precision * recall / (beta2 * precision + recall).clamp(min=1e-12)).max().item()


# --- the registry ----------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """make(x, map, g) -> (target, cond): what is predicted and what is shown; map None where there is none.
    channels(C): of the condition.  ask(x, hole) -> cond: from a picture that is not a target, the user's own.  finish(result, cond): the last touch, with what is known for certain.  plain(cond): what needs no
    network, to compare with.  scores: name -> (result, truth, cond) -> a number.  zoom: the result's side over the picture's.  exact: the name of the built-in faces' map, for tasks
    that predict one.  needs_map: whether a picture without a map can be used in training."""
    make: Callable
    channels: Callable
    ask: Callable = lambda x, hole: x
    finish: Callable = lambda result, cond: result
    plain: Callable = None
    scores: dict = field(default_factory=dict)
    zoom: int = 1
    exact: str = None
    needs_map: bool = False


def read_hole(cond):
    """The hole (B, 1, H, W) bool that a condition of inpainting speaks of."""
    return cond[:, -1:] > 0


def paste_known(result, cond):
    """Known pixels are kept, bit for bit; only the hole is the network's."""
    return torch.where(read_hole(cond), result, cond[:, :-1].to(result))


def back_project(result, cond, rounds=3):
    """The small picture is known, so the large one must shrink to it: what is missing is added, enlarged (back-projection, Irani & Peleg
    1991). On photographs at 64 px this alone turns bicubic's 25.5 dB into 26.1: no merit of a network."""
    small = recover_small(cond)
    for _ in range(rounds):
        result = result + enlarge(small - shrink(result))
    return result.clamp(-1, 1)


def fill_with_mean(cond):
    """Every hole in the mean colour of what is left of its picture."""
    known = (~read_hole(cond)).to(cond)
    mean = (cond[:, :-1] * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(read_hole(cond), mean, cond[:, :-1])


def one_channel(result, cond):
    """The C guesses of a map, averaged: (B, C, H, W) -> (B, 1, H, W)."""
    return result.mean(1, keepdim=True)


def _superres(x, map, g):
    return x, enlarge(shrink(x))


def _inpaint(x, map, g):
    return x, cut_hole(x, draw_holes(len(x), *x.shape[2:], g).to(x.device))


def _edges(x, map, g):
    return (sobel_edges(x) if map is None else map).expand_as(x), x


def _saliency(x, map, g):
    return map.expand_as(x), x


TASKS = {
    "generate": Task(lambda x, map, g: (x, None), lambda C: 0),
    "superres": Task(_superres, lambda C: C, lambda x, hole: enlarge(x), back_project, plain=lambda cond: cond, scores={"PSNR": lambda r, x, cond: psnr(r, x)}, zoom=ZOOM),
    "inpaint": Task(_inpaint, lambda C: C + 1, cut_hole, paste_known, fill_with_mean, {"PSNR in the hole": lambda r, x, cond: psnr(r, x, read_hole(cond))}),
    "edges": Task(_edges, lambda C: C, finish=one_channel, plain=sobel_edges, exact="edges", scores={
        "max-F": lambda r, x, cond: max_f(r[:, :1], x[:, :1], 1, 1.0), "MAE": lambda r, x, cond: mae(r[:, :1], x[:, :1])}),
    "saliency": Task(_saliency, lambda C: C, finish=one_channel, plain=lambda cond: torch.ones_like(cond[:, :1]), exact="saliency", needs_map=True, scores={
        "max-F": lambda r, x, cond: max_f(r[:, :1], x[:, :1]), "MAE": lambda r, x, cond: mae(r[:, :1], x[:, :1])}),
}


def make_condition(task, x, maps=0, factor=1, g=None):
    """Pictures x (B, C + maps, S, S) in [-1, 1] -> (target (B, C, S, S), cond (B, C' f f, S / f, S / f) or None).

    task: a name in TASKS. maps: 1 if the last channel is a map. factor: f, pixels per place of z along a side. g: the generator of
    what is drawn (holes)."""
    C = x.shape[1] - maps
    target, cond = TASKS[task].make(x[:, :C], x[:, C:] if maps else None, g)
    return target, fold_condition(cond, factor)


def fold_condition(cond, factor):
    """The condition at the size of z: (B, C', H, W) -> (B, C' f f, H / f, W / f), every f x f pixels in the channels. None stays None."""
    return cond if cond is None or factor == 1 else F.pixel_unshuffle(cond, factor)


def place_side_by_side(*columns):
    """Conditions, results, truths (B, 1 or more, H, W) in [-1, 1] -> uint8 (B columns, 3, H, W), side by side for data.grid: what has
    more channels than a picture (inpainting's) shows its first."""
    shown = [to_uint8(u[:, :3] if u.shape[1] >= 3 else u[:, :1].expand(-1, 3, -1, -1)) for u in columns]
    return torch.stack(shown, 1).flatten(0, 1)


# --- the picture -------------------------------------------------------------------------------------------------------------------------

def draw_tasks(side=96, n=6, seed=0):
    """Two rows per task: the conditions, and the targets below them, on built-in faces, as a PIL image."""
    from PIL import Image, ImageDraw
    from data import load_images
    g = torch.Generator().manual_seed(seed)
    names = [name for name in TASKS if name != "generate"]
    canvas = Image.new("RGB", (86 + n * (side + 4), len(names) * (2 * side + 16)), "white")
    ink = ImageDraw.Draw(canvas)
    for i, name in enumerate(names):
        x = to_float(load_images("faces", side, count=n, seed=seed, targets=TASKS[name].exact).take(range(n))[0])
        target, cond = make_condition(name, x, int(bool(TASKS[name].exact)), g=g)
        for row, (what, images) in enumerate((("condition", cond), ("target", target))):
            top = i * (2 * side + 16) + row * (side + 4) + 4
            ink.text((6, top + side // 2 - 12), f"{name}\n{what}", fill="black")
            for j, image in enumerate(place_side_by_side(images)):
                canvas.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (86 + j * (side + 4), top))
    return canvas


if __name__ == "__main__":
    from plumbing.console import run_picture_command
    run_picture_command("Draw condition and target of every task.", draw_tasks, "tasks.png", seed=(0, "which faces and which holes"))
