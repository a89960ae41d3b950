"""Inputs: your own pictures, with their holes and targets, checked before the first network call.

The idea. A long computation must not fail at its end, so every file is opened once at the beginning: a picture that cannot be read is named
and skipped, a hole or a target that is missing or of another size stops the program with one line. Pictures keep their own size.

    --input photos/                       every picture below it
    --holes random | masks/ | nothing     for inpainting: drawn; white in a mask of the same file stem; or the transparent part of the picture
    --targets truth/                      what should come out, of the same file stem

Shapes: x (1, C, H, W) in [-1, 1]; hole (1, 1, H, W) bool, True where to paint; truth like the result.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from plumbing.console import UserError, describe_error
from plumbing.sources import Paired, to_8_bit, open_images, crop_square
from tasks import draw_holes
from plumbing.images import seeded, to_float


@dataclass
class UserPicture:
    """One picture to work on. `name` is its own, without folders and ending; hole and truth may be None."""
    name: str
    x: torch.Tensor
    hole: torch.Tensor
    truth: torch.Tensor


def picture_to_tensor(picture, mode, side=None):
    """A PIL picture -> (1, C, H, W) in [-1, 1], turned as its EXIF tag says; side: cut to its centred square and resized, as in training."""
    if side:
        return to_float(torch.from_numpy(crop_square(picture, side, mode == "L"))[None])
    array = np.array(to_8_bit(ImageOps.exif_transpose(picture)).convert(mode))
    return to_float(torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)[None].contiguous())


def flatten_over_black(picture):
    """A mask as mode L: what is transparent does not count, so white painted on nothing is white on black."""
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return to_8_bit(picture).convert("L")


class UserPictures:
    """The pictures of --input (at most n of them), an iterable of Input with a length. UserError for whatever would fail later.

    gray: one channel instead of three. holes: "random", a source of masks, or None for transparency; needed if needs_hole. targets: a
    source, or None; they have `zoom` times the size. side: cut everything to a square of so many pixels. seed: of random holes."""

    def __init__(self, path, n=None, gray=False, holes=None, targets=None, needs_hole=False, zoom=1, side=None, seed=0):
        self.mode, self.needs_hole, self.zoom, self.side, self.seed = "L" if gray else "RGB", needs_hole, zoom, side, seed
        self.source = open_flag("--input", path)
        self.random = holes == "random"
        self.holes = Paired(self.source, open_flag("--holes", holes), "mask", "--holes") if holes and not self.random else None
        self.targets = Paired(self.source, open_flag("--targets", targets), "target", "--targets") if targets else None
        partners = [set(pairs.names) for pairs in (self.holes, self.targets) if pairs]
        names = [name for name in self.source.names if all(name in some for some in partners)]         # masks that lie below the pictures are none
        if not names:
            raise UserError(f"--input {path}: holds no images")
        self.names, skipped = [], []
        for i, name in enumerate(names[:n]):
            try:
                with self.source.picture(name) as picture:
                    picture.load()
            except Exception as error:                                          # on damaged files decoders raise nearly everything
                skipped.append(f"{name} ({describe_error(error)})")
                continue
            self.read(name, i)                                                  # holes and targets: a UserError now, not in an hour
            self.names.append((i, name))
        if skipped:
            print(f"skipped {len(skipped)} of {len(skipped) + len(self.names)} pictures that could not be read: {', '.join(skipped[:5])}", file=sys.stderr)
        if not self.names:
            raise UserError(f"--input {path}: none of its pictures can be read")
        stems = [Path(name).stem for _, name in self.names]
        whole = [name.replace("/", "_") if stems.count(stem) > 1 else stem for stem, (_, name) in zip(stems, self.names)]
        self.outs, taken = [], set()
        for k, name in enumerate(whole):                                        # NAME-compare is written beside NAME, and may be another's name
            name = f"{name}-{k}" if whole.count(name) > 1 else name
            while {name, f"{name}-compare"} & taken:
                name = f"{name}-{k}"
            self.outs.append(name)
            taken |= {name, f"{name}-compare"}

    def __len__(self):
        return len(self.names)

    def __iter__(self):
        for out, (i, name) in zip(self.outs, self.names):
            yield UserPicture(out, *self.read(name, i))

    def read(self, name, i):
        """Picture `name`, the i-th -> x, hole, truth."""
        with self.source.picture(name) as picture:
            x = picture_to_tensor(picture, self.mode, self.side)
            hole = self.hole(name, picture, i, x.shape[2:]) if self.needs_hole else None
        truth = None
        if self.targets:
            wanted = tuple(self.zoom * k for k in x.shape[2:])
            truth = self.partner(self.targets, name, wanted, lambda picture: picture_to_tensor(picture, self.mode, self.side and self.side * self.zoom))
        return x, hole, truth

    def partner(self, pairs, name, size, convert):
        """The file that belongs to picture `name`, converted; it must have the size (H, W)."""
        try:
            with pairs.map(name) as picture:
                out = convert(picture)
        except Exception as error:
            raise UserError(f"{name}: {describe_error(error)}") from None
        if out.shape[2:] != size:
            raise UserError(f"{name}: its {pairs.what} has {out.shape[3]} x {out.shape[2]} pixels, it should have {size[1]} x {size[0]}")
        return out

    def hole(self, name, picture, i, size):
        """Where to paint, (1, 1, H, W) bool."""
        if self.random:
            return draw_holes(1, *size, seeded(self.seed, i, 1))
        if self.holes:
            hole = self.partner(self.holes, name, size, lambda mask: picture_to_tensor(flatten_over_black(mask), "L", self.side)) > 0
        else:
            picture = ImageOps.exif_transpose(picture)
            alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else Image.new("L", picture.size, 255)
            hole = picture_to_tensor(alpha, "L", self.side) < 0
        if not hole.any():
            raise UserError(f"{name} has no hole: " + ("its mask is nowhere white" if self.holes else
                            "make a part of it transparent, or give --holes FOLDER (white where to paint) or --holes random"))
        if hole.all():
            raise UserError(f"{name} is nothing but a hole: " + ("its mask is white everywhere" if self.holes else "it is transparent everywhere"))
        return hole


def open_flag(flag, path):
    """A source of pictures, or a UserError that names the flag."""
    try:
        return open_images(path)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
