"""Images as numbers: uint8 and float, a grid of many, generators made from whole numbers.

    to_float      x / 127.5 - 1, in [-1, 1]: what a model sees
    to_uint8      round(127.5 x + 127.5): the inverse on all 256 values, because it rounds
                  and does not truncate

Shapes: n images, C channels (3, or 1 for gray), H x W pixels.
"""
import numpy as np
import torch
from PIL import Image

from plumbing.console import UserError


def seeded(*key):
    """Make a CPU generator that is a function of some whole numbers.

    Other numbers give an independent stream, but for zeros at the end: (5,) and (5, 0) are
    one key."""
    entropy = np.random.SeedSequence([number % 2**63 for number in key])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


def choose_subset(count, size, seed=0):
    """Numbers of at most `size` of `count` images, drawn at random, ascending. -> (k,)
    int64

    The first images of a sorted set are its first class: whatever is measured on a part of
    a set is measured on such a part."""
    order = torch.randperm(count, generator=seeded(seed, count, 11))
    return order[:size].sort().values


def to_float(x):
    """Bring pixels to the scale of a model; what is float already stays (kept latents).

    x uint8 in 0..255, or float.  -> float32 of the same shape, in [-1, 1]"""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def to_uint8(x):
    """Bring a model's result to the nearest of 0..255; what lies outside is clamped.

    x float in [-1, 1].  -> uint8 of the same shape"""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(images, columns=None, pad=2, zoom=None):
    """Lay out pictures as one.

    images uint8 (n, C, H, W).  columns: images in a row, near-square if None.  pad: pixels
    between two images.  zoom: a whole number; if None, small pictures are enlarged to 512
    pixels.  -> PIL image
    UserError for no image, or for other channels than 1 or 3."""
    n, channels, height, width = images.shape
    if n == 0 or channels not in (1, 3):
        raise UserError("grid: needs at least one image of 1 or 3 channels, got the shape "
                        f"{tuple(images.shape)}")
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    size = (rows * (height + pad) + pad, columns * (width + pad) + pad, 3)
    sheet = np.full(size, 255, np.uint8)
    for i, image in enumerate(images.cpu().numpy()):
        top = i // columns * (height + pad) + pad
        left = i % columns * (width + pad) + pad
        # One channel is repeated to three.
        sheet[top:top + height, left:left + width] = image.transpose(1, 2, 0)
    zoom = zoom or -(-512 // size[1])                     # a whole number: small images stay crisp
    enlarged = (size[1] * zoom, size[0] * zoom)
    return Image.fromarray(sheet).resize(enlarged, Image.Resampling.NEAREST)
