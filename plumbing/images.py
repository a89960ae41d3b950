"""Images as numbers: uint8 and float, a grid of many, and generators that are a function of whole numbers.

    to_float      x / 127.5 - 1                in [-1, 1]: what a model sees
    to_uint8      round(127.5 x + 127.5)       its inverse on all 256 values, because it rounds and does not truncate

Shapes: n images, C channels (3, or 1 for gray), H x W pixels.
"""
import numpy as np
import torch
from PIL import Image

from plumbing.console import UserError


def seeded(*key):
    """A CPU generator that is a function of some whole numbers: independent streams for neighbouring keys."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([k % 2**63 for k in key]).generate_state(1, np.uint64)[0] >> 1))


def to_float(x):
    """uint8 (...) 0..255 -> float32 (...) in [-1, 1]. What is float already is no picture but cached latents, and stays as it is."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def to_uint8(x):
    """float (...) in [-1, 1] -> uint8 (...), the nearest of 0..255; what lies outside is clamped."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(images, columns=None, pad=2, zoom=None):
    """uint8 (n, C, H, W), C 1 or 3 -> one PIL picture, `columns` images wide (default: near-square), `pad` pixels apart. zoom: a whole
    number; left out, small sheets are enlarged to 512 pixels."""
    n, c, h, w = images.shape
    if n == 0 or c not in (1, 3):
        raise UserError(f"grid: needs at least one image of 1 or 3 channels, got the shape {tuple(images.shape)}")
    columns = columns or int(np.ceil(np.sqrt(n)))
    sheet = np.full((-(-n // columns) * (h + pad) + pad, columns * (w + pad) + pad, 3), 255, np.uint8)
    for i, image in enumerate(images.cpu().numpy()):
        top, left = i // columns * (h + pad) + pad, i % columns * (w + pad) + pad
        sheet[top:top + h, left:left + w] = image.transpose(1, 2, 0)  # one channel is repeated to three
    zoom = zoom or -(-512 // sheet.shape[1])                           # a whole number: small images stay crisp
    return Image.fromarray(sheet).resize((sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.Resampling.NEAREST)
