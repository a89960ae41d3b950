"""Pictures out: files of samples, and the way that a sample came.

The idea. Samples are written as they are made, so that fifty thousand of them need no memory, and what cannot be written is said before
the work and not after it. A *trace* shows the sampler at work: at every network call the noisy image and what the network takes it for.

    --out grid.png     one sheet              --out many.zip, --out folder     a PNG for each            --out many.npz     one array
    --trace way.png    x_t (scaled to the images' contrast), and below it the guess of x0

Shapes: B images, C channels (1 or 3), H x W pixels; uint8.
"""
import os
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plumbing.console import UserError
from plumbing.images import grid


def encode_png(pixels):
    """uint8 (C, H, W) -> the bytes of a PNG."""
    array = pixels.permute(1, 2, 0).numpy()
    buffer = BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


class ImageWriter:
    """Where samples go, by the name of --out: a .png sheet, a .npz, a .zip of PNGs, or a folder of PNGs, written as they come. A file is made
    beside its place and takes it at the end, so that what stood there survives a failure:

        with Writer("samples.zip") as writer:
            writer.add(images)
    """

    def __init__(self, out, columns=None):
        self.out, self.columns, self.kept, self.n, self.sheet = Path(out), columns, [], 0, None
        self.kind = self.out.suffix.lower() or "folder"
        if self.kind not in (".png", ".npz", ".zip", "folder") or self.out.name.lower() in (".png", ".npz", ".zip"):
            raise UserError(f"--out {out}: give a name that ends with .png, .npz or .zip, or that has no ending for a folder")
        if self.kind == "folder":
            if self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())):
                raise UserError(f"--out {self.out} exists and is not an empty folder: old images would be mixed with new ones; give another name")
            self.out.mkdir(parents=True, exist_ok=True)
        elif self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder; give a name in it")
        else:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.part = self.out.with_name(f"{self.out.name}.{os.getpid()}.part")        # another process may write this name, too
            open(self.part, "wb").close()                                       # what cannot be written is told now, not after the work
        self.zip = zipfile.ZipFile(self.part, "w") if self.kind == ".zip" else None

    def add(self, images, names=()):
        """uint8 (B, C, H, W), or a list of (C, H, W) of any size; names: of the files, numbers when left out. On a sheet of several sizes, every
        call is `columns` images of one size."""
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
        return self

    def __exit__(self, kind, error, trace):
        if self.zip:
            self.zip.close()
        if self.kind == "folder":
            return
        if kind is not None:
            self.part.unlink(missing_ok=True)
            return
        if self.kind == ".png":
            (self.sheet or stack_rows(self.kept, self.columns)).save(self.part, "PNG")
        elif self.kind == ".npz":
            with open(self.part, "wb") as file:
                np.savez_compressed(file, images=torch.stack(self.kept).permute(0, 2, 3, 1).numpy())
        os.replace(self.part, self.out)


def stack_rows(images, columns):
    """uint8 images (C, H, W) -> one PIL picture: a grid, or where sizes differ a row for every `columns` of them."""
    if len({image.shape for image in images}) == 1:
        return grid(torch.stack(images), columns)
    rows = [grid(torch.stack(images[lo:lo + columns]), columns, zoom=1) for lo in range(0, len(images), columns)]
    canvas = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        canvas.paste(row, (0, sum(other.height for other in rows[:i])))
    return canvas


