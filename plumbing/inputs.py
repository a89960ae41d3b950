"""Inputs: your own pictures, with their holes and targets, checked before any work.

The idea. A long computation must not fail at its end, so every file is opened once at the
beginning. A picture that cannot be read is named and skipped. A hole or a target that is
missing or of another size stops the program with one line. Pictures keep their own size.

    --input photos/                    every picture below it; or a single picture
    --holes random | masks/ | nothing  for inpainting: drawn; or white in a mask of the same
                                       file stem; or the transparent part of the picture
    --targets truth/                   what should come out, of the same file stem

A single picture takes a single mask and target, whatever their names.

Shapes: x (1, C, H, W) in [-1, 1]; hole (1, 1, H, W) bool, True where to paint; truth like
the result.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plumbing.console import UserError, describe_error
from plumbing.images import seeded, to_float, to_uint8
from plumbing.names import normal_name
from plumbing.pictures import (
    crop_square, open_picture, to_8_bit, turn_upright, upright_size)
from plumbing.sources import Paired, open_images


@dataclass
class UserPicture:
    """One picture to work on. `name` is without folders and ending."""
    name: str
    x: torch.Tensor
    hole: torch.Tensor                  # or None
    truth: torch.Tensor                 # or None


def picture_to_tensor(picture, mode, side=None):
    """A PIL picture -> (1, C, H, W) in [-1, 1], turned as its EXIF tag says.

    side: cut it to its centred square and resize that, as in training."""
    if side:
        return to_float(torch.from_numpy(crop_square(picture, side, mode == "L"))[None])
    array = np.array(to_8_bit(turn_upright(picture)).convert(mode))
    pixels = torch.from_numpy(array.reshape(*array.shape[:2], -1))
    return to_float(pixels.permute(2, 0, 1)[None].contiguous())


def flatten_over_black(picture):
    """A mask as mode L, what is transparent as if it lay on black."""
    picture = turn_upright(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return to_8_bit(picture).convert("L")


def read_transparency(picture):
    """The opacity of a PIL picture as mode L: black where it is transparent."""
    picture = turn_upright(picture)
    if picture.has_transparency_data:
        return picture.convert("RGBA").getchannel("A")
    return Image.new("L", picture.size, 255)


class UserPictures:
    """The pictures of --input, an iterable of UserPicture with a length.

    UserError for whatever would fail later: nothing to read, no hole, a partner that is
    missing or of another size."""

    def __init__(
        self,
        path,                   # a folder or .zip
        n=None,                 # at most so many of them
        gray=False,             # one channel instead of three
        holes=None,             # "random", a source of masks, or None: the transparent parts
        targets=None,           # a source of what should come out, or None
        needs_hole=False,       # whether every picture must have a hole
        maps=False,             # whether the targets are maps: one channel, white where it is
        zoom=1,                 # the targets' side over the pictures' side
        side=None,              # cut everything to a square of so many pixels
        seed=0,                 # of random holes
        draw_holes=None,        # (B, H, W, generator) -> (B, 1, H, W) bool: the random ones
    ):
        self.mode, self.needs_hole, self.zoom = "L" if gray else "RGB", needs_hole, zoom
        self.target_mode = "L" if maps else self.mode
        self.side, self.seed, self.draw_holes = side, seed, draw_holes
        self.random = holes == "random"
        self.source = open_flag("--input", path)
        self.holes = self.targets = None
        if holes and not self.random:
            self.holes = Partners(self.source, open_flag("--holes", holes), "mask", "--holes")
        if targets:
            self.targets = Partners(self.source, open_flag("--targets", targets), "target",
                                    "--targets")
            if maps:
                self.targets.require_light()
        names = self.list_names()
        if not names:
            raise UserError(f"--input {path}: holds no images")
        self.names, self.sizes, skipped = [], [], []        # (number, name); (H, W); why it is none
        for i, name in enumerate(names[:n]):
            trouble = self.find_trouble(name)
            if trouble:
                skipped.append(f"{name} ({trouble})")
                continue
            x, _, _ = self.read(name, i)                           # a UserError now, not in an hour
            self.names.append((i, name))
            self.sizes.append(tuple(x.shape[2:]))
        if skipped:
            print(f"skipped {len(skipped)} of {len(skipped) + len(self.names)} pictures that could "
                  f"not be read: {', '.join(skipped[:5])}", file=sys.stderr)
        if not self.names:
            raise UserError(f"--input {path}: none of its pictures can be read")
        self.outs = name_outputs([name for _, name in self.names])

    def __len__(self):
        return len(self.names)

    def __iter__(self):
        for out, (i, name) in zip(self.outs, self.names):
            yield UserPicture(out, *self.read(name, i))

    def list_names(self):
        """The pictures' names, without masks and targets that lie below --input."""
        partners = [set(pairs.names) for pairs in (self.holes, self.targets) if pairs]
        return [name for name in self.source.names if all(name in some for some in partners)]

    def find_trouble(self, name):
        """Why picture `name` cannot be read, or None."""
        try:
            with self.source.picture(name) as picture:
                picture.load()
        except Exception as error:                                # decoders raise nearly everything
            return describe_error(error)

    def read(self, name, i):
        """Picture `name`, the i-th -> x, hole, truth."""
        with self.source.picture(name) as picture:
            x = picture_to_tensor(picture, self.mode, self.side)
            size = upright_size(picture)                           # before any square is cut
            hole = None
            if self.needs_hole:
                hole = self.read_hole(name, picture, i, x.shape[2:], size)
        truth = None
        if self.targets:
            size = tuple(self.zoom * k for k in size)
            side = self.side and self.side * self.zoom
            truth = self.read_partner(self.targets, name, size, self.target_mode, side)
        return x, hole, truth

    def read_partner(self, pairs, name, size, mode, side, prepare=lambda picture: picture):
        """The file that belongs to picture `name`. size: its width and height, upright and
        before any square is cut. -> (1, C, H, W)

        UserError when it is missing, unreadable or of another size."""
        try:
            with pairs.map(name) as picture:
                width, height = upright_size(picture)
                out = picture_to_tensor(prepare(picture), mode, side)
        except Exception as error:
            raise UserError(f"{name}: {describe_error(error)}") from None
        if (width, height) != size:
            raise UserError(f"{name}: its {pairs.what} has {width} x {height} pixels, "
                            f"it should have {size[0]} x {size[1]}")
        return out

    def read_hole(self, name, picture, i, shape, size):
        """Where to paint. shape: (H, W) of x. size: as in `read_partner`.

        -> (1, 1, H, W) bool. UserError for none and for everywhere."""
        if self.random:
            return self.draw_holes(1, *shape, seeded(self.seed, i, 1))
        if self.holes:
            mask = self.read_partner(self.holes, name, size, "L", self.side, flatten_over_black)
            hole, everywhere = mask > 0, "its mask is white"
            nowhere, largest = "its mask is nowhere white", int(to_uint8(mask).max())
            if largest:
                nowhere += (f", the largest value is {largest}; are they 0/1, or numbers of "
                            "classes? Spread them to 0..255")
        else:
            hole = picture_to_tensor(read_transparency(picture), "L", self.side) < 0
            nowhere = ("make a part of it transparent, or give --holes FOLDER (white where to "
                       "paint) or --holes random")
            everywhere = "it is transparent"
        if not hole.any():
            raise UserError(f"{name} has no hole: {nowhere}")
        if hole.all():
            raise UserError(f"{name} is nothing but a hole: {everywhere} everywhere")
        return hole


def name_outputs(names):
    """The pictures' names -> names of the results: file stems, paths where stems repeat.

    NAME-compare is written beside NAME, and may be another picture's name. An accent is
    written in one way (NFC): some disks take both ways for one name."""
    names = [normal_name(name) for name in names]
    stems = [Path(name).stem for name in names]
    wanted = []
    for stem, name in zip(stems, names):
        wanted.append(name.replace("/", "_") if stems.count(stem) > 1 else stem)
    outs, taken = [], set()
    for k, name in enumerate(wanted):
        name = f"{name}-{k}" if wanted.count(name) > 1 else name
        while {name, f"{name}-compare"} & taken:
            name = f"{name}-{k}"
        outs.append(name)
        taken |= {name, f"{name}-compare"}
    return outs


class SinglePicture:
    """A picture as a source of one."""

    def __init__(self, path):
        self.path, self.names, self.notes = Path(path), [Path(path).name], []
        self.part = ""

    def picture(self, name):
        return open_picture(self.path)


class Partners(Paired):
    """Masks or targets of pictures. Where both sides are a single file, they belong
    together."""

    def __init__(self, source, maps, what, flag):
        super().__init__(source, maps, what, flag)
        if isinstance(maps, SinglePicture):                     # it may lie among the pictures
            top = Path(source.path) / getattr(source, "top", "")
            self.names = [name for name in self.names
                          if (top / name).resolve() != maps.path.resolve()]

    def map(self, name):
        if isinstance(self.maps, SinglePicture) and len(self.names) == 1:
            return self.maps.picture(name)
        return super().map(name)


def open_flag(flag, path):
    """A source of pictures or a single one, or a UserError that names the flag."""
    if Path(path).is_file() and Path(path).suffix.lower() in Image.registered_extensions():
        return SinglePicture(path)
    return open_set(flag, path)


def open_set(flag, path):
    """A source of pictures, or a UserError that names the flag."""
    try:
        return open_images(path)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
