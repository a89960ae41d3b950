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
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plumbing.console import UserError, unwinding
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

    A file is made beside its place and takes it at the end: an old one survives a failure,
    a link is replaced and not followed, and a signal leaves nothing behind.

        with ImageWriter("samples.zip") as writer:
            writer.add(images)

    columns: of a .png. sheet: a PIL picture to write instead of a grid."""

    def __init__(self, out, columns=None):
        self.out, self.columns = Path(out), columns
        self.kept, self.n, self.sheet = [], 0, None
        self.kind = self.out.suffix.lower() or "folder"
        endings = (".png", ".npz", ".zip")
        if self.kind not in (*endings, "folder") or self.out.name.lower() in endings:
            raise UserError(f"--out {out}: give a name that ends with .png, .npz or .zip, "
                            "or that has no ending for a folder")
        if self.kind == "folder":
            if self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())):
                raise UserError(f"--out {self.out} exists and is not an empty folder: old images "
                                "would be mixed with new ones; give another name")
            self.out.mkdir(parents=True, exist_ok=True)
        elif self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder; give a name in it")
        else:
            self.part = self.out.with_name(f"{self.out.name}.{os.getpid()}.tmp")    # one a process
            try:                                                      # told now, not after the work
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self.part.unlink(missing_ok=True)
                open(self.part, "xb").close()
            except OSError as error:
                raise UserError(f"--out {self.out} cannot be written ({error.strerror}); give "
                                "another place") from None
        self.zip = zipfile.ZipFile(self.part, "w") if self.kind == ".zip" else None
        self.signals = unwinding()

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

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.finish()
            elif self.zip:
                with suppress(OSError):             # a full disk: what was written goes anyway
                    self.zip.close()
        finally:
            if self.kind != "folder":
                self.part.unlink(missing_ok=True)   # unless it has its name by now
            self.signals.__exit__(None, None, None)

    def finish(self):
        """Give a file its name, now that all is in it."""
        if self.kind == "folder":
            return
        if self.kind == ".png":
            sheet = self.sheet or grid(torch.stack(self.kept), self.columns)
            sheet.save(self.part, "PNG")
        elif self.kind == ".npz":
            images = torch.stack(self.kept).permute(0, 2, 3, 1).numpy()
            with open(self.part, "wb") as file:
                np.savez_compressed(file, images=images)
        else:
            self.zip.close()
        os.replace(self.part, self.out)
