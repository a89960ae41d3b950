"""Pictures out: files of samples.

The idea. Samples are written as they are made, so fifty thousand of them need no memory.
What cannot be written is said before the work and not after it. Nothing is written over
what is read.

    --out grid.png     one sheet              --out many.zip    a PNG for each
    --out many.npz     one array              --out many        a folder of PNGs

Shapes: B images, C channels (1 or 3), H x W pixels; uint8.
"""
import os
import zipfile
from contextlib import ExitStack, suppress
from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plumbing.console import UserError, replacing, unwinding
from plumbing.images import grid


# --- never over an input ------------------------------------------------------------------

def refuse_overwriting(outputs, inputs):
    """UserError for an output that is one of the inputs, or a picture of one, or another
    output.

    outputs, inputs: {option: path, or None}. Links are followed, those in folders, too."""
    outputs, seen = {k: v for k, v in outputs.items() if v}, {}
    for flag, out in outputs.items():
        for name, path in ({k: v for k, v in inputs.items() if v} | seen).items():
            if is_part(out, path):
                raise UserError(f"{flag} {out} would overwrite {name} {path}: "
                                "give it another name")
        seen[flag] = out


def refuse_among(outputs, inputs):
    """UserError for an output that lies in a folder of inputs: next time it would be one of
    them. outputs, inputs: {option: path, or None}."""
    for (flag, out), (name, folder) in product(outputs.items(), inputs.items()):
        if out and folder and Path(folder).is_dir() and is_inside(out, folder):
            raise UserError(f"{flag} {out}: lies in {name} {folder}, and would be one of its "
                            "pictures next time; give another place")


def is_inside(path, folder):
    """Whether a path lies in a folder, or is that folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def is_part(out, path):
    """Whether to write `out` would change `path`: it is the same file or folder, or a file
    of that folder which may be a picture."""
    out = Path(out)
    place, source = Path(os.path.realpath(out)), Path(os.path.realpath(path))
    if place == source:
        return True
    if not source.is_dir() or not out.is_file() or out.suffix.lower() in (".npz", ".zip"):
        return False
    links = (os.path.realpath(Path(at, name)) for at, folders, files in os.walk(source)
             for name in (*folders, *files) if os.path.islink(Path(at, name)))
    return place.is_relative_to(source) or any(place.is_relative_to(inside) for inside in links)


# --- samples ------------------------------------------------------------------------------

def encode_png(pixels):
    """uint8 (C, H, W) -> the bytes of a PNG."""
    array = pixels.permute(1, 2, 0).numpy()
    buffer = BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


class ImageWriter:
    """Where samples go, by the name of --out: a .png, a .npz, a .zip or a folder.

    A file takes its name at the end (`replacing`): an old one survives a failure. That it
    cannot be written is told at the start of the block.

        with ImageWriter("samples.zip") as writer:
            writer.add(images)

    columns: of a .png. sheet: a PIL picture to write instead of a grid."""

    def __init__(self, out, columns=None):
        self.out, self.columns = Path(out), columns
        self.kept, self.n, self.sheet = [], 0, None
        self.kind = self.out.suffix.lower() or "folder"
        self.stack = ExitStack()
        endings = (".png", ".npz", ".zip")
        if self.kind not in (*endings, "folder") or self.out.name.lower() in endings:
            raise UserError(f"--out {out}: give a name that ends with .png, .npz or .zip, "
                            "or that has no ending for a folder")
        if self.kind == "folder" and (
                self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir()))):
            raise UserError(f"--out {self.out} exists and is not an empty folder: old images "
                            "would be mixed with new ones; give another name")

    def __enter__(self):
        if self.kind == "folder":
            self.out.mkdir(parents=True, exist_ok=True)
            self.stack.enter_context(unwinding())
            return self
        with suppress(OSError):                                 # the next line tells why
            self.out.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.stack.enter_context(replacing(self.out))
        if self.kind == ".zip":
            self.zip = self.stack.enter_context(zipfile.ZipFile(self.file, "w"))
        self.stack.push(self.finish)
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def add(self, images, names=()):
        """Write uint8 (B, C, H, W) or a list of (C, H, W), of one size in a .png or .npz.

        names: of the files, without ending; numbers when left out."""
        for i, image in enumerate(images):
            name = f"{names[i] if names else f'{self.n:06d}'}.png"
            if self.kind == "folder":
                (self.out / name).write_bytes(encode_png(image))
            elif self.kind == ".zip":
                self.zip.writestr(name, encode_png(image))
            else:
                self.kept.append(image)
            self.n += 1

    def finish(self, kind, error, trace):
        """The end of the block: write what needs all images, unless there was an error."""
        if kind is None and self.kind == ".png":
            sheet = self.sheet or grid(torch.stack(self.kept), self.columns)
            sheet.save(self.file, "PNG")
        elif kind is None and self.kind == ".npz":
            images = torch.stack(self.kept).permute(0, 2, 3, 1).numpy()
            np.savez_compressed(self.file, images=images)
