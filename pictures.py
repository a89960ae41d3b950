"""Pictures out: files of samples, and the way that a sample came.

The idea. Samples are written as they are made, so that fifty thousand of them need no memory, and what cannot be written is said before
the work and not after it. A *trace* shows the sampler at work: at every network call the noisy image and what the network takes it for.

    --out grid.png     one sheet              --out many.zip, --out folder     a PNG for each            --out many.npz     one array
    --trace way.png    x_t (scaled to unit variance, as the network sees it), and below it the guess of x0

Shapes: B images, C channels (1 or 3), H x W pixels; uint8.
"""
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from data import UserError, grid, to_uint8


def png(pixels):
    """uint8 (C, H, W) -> the bytes of a PNG."""
    array = pixels.permute(1, 2, 0).numpy()
    buffer = BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


class Writer:
    """Where samples go, by the name of --out: a .png grid, a .npz, a .zip of PNGs, or a folder of PNGs, written as they come."""

    def __init__(self, out, columns=None):
        self.out, self.columns, self.kept, self.n = Path(out), columns, [], 0
        self.kind = self.out.suffix.lower() or "folder"
        if self.kind not in (".png", ".npz", ".zip", "folder"):
            raise UserError(f"--out {out}: give a name that ends with .png, .npz or .zip, or that has no ending for a folder")
        if self.kind == "folder":
            if self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())):
                raise UserError(f"--out {self.out} exists and is not an empty folder: old images would be mixed with new ones; give another name")
            self.out.mkdir(parents=True, exist_ok=True)
        else:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            open(self.out, "ab").close()                                        # what cannot be written is told now, not after the work
        self.zip = zipfile.ZipFile(self.out, "w") if self.kind == ".zip" else None

    def add(self, images, names=()):
        """uint8 (B, C, H, W), or a list of (C, H, W) of any size; names: of the files, numbers when left out."""
        for i, image in enumerate(images):
            name = f"{names[i] if names else f'{self.n:06d}'}.png"
            if self.kind == "folder":
                (self.out / name).write_bytes(png(image))
            elif self.kind == ".zip":
                self.zip.writestr(name, png(image))
            else:
                self.kept.append(image)
            self.n += 1

    def close(self):
        if self.kind == ".zip":
            self.zip.close()
        elif self.kind == ".png":
            height, width = (max(image.shape[i] for image in self.kept) for i in (1, 2))
            self.kept = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]), value=255) for image in self.kept]
            grid(torch.stack(self.kept), self.columns).save(self.out)
        elif self.kind == ".npz":
            np.savez_compressed(self.out, images=torch.stack(self.kept).permute(0, 2, 3, 1).numpy())


class Trace:
    """Counts network calls and, for a picture of the way (--trace), keeps x_t as the network sees it and its guess of x0, of a few images."""

    def __init__(self, loaded, keep=0):
        self.loaded, self.keep, self.calls, self.frames, self.result = loaded, keep, 0, [], None

    def __call__(self, t, zt, x0):
        self.calls += 1
        if self.keep and self.result is None:
            scale = float(self.loaded.schedule.scale(t))
            self.frames.append([float(t)] + [to_uint8(self.loaded.space.decode(u[:self.keep]).cpu()) for u in (zt * scale, x0)])

    def done(self, images):
        """Tell that the images (B, C, H, W) in [-1, 1] of the calls so far are finished: the trace is of the first ones."""
        self.result = images[:self.keep] if self.result is None else self.result

    def draw(self):
        """A PIL picture: two rows an image, x_t and below it the guess, a column per call, then the result."""
        self.frames.append([0.0] + [to_uint8(self.result).expand_as(self.frames[0][1])] * 2)
        rows = torch.stack([torch.stack([frame[1 + k] for frame in self.frames]) for k in (0, 1)], 2)           # (frames, keep, 2, C, H, W)
        sheet = grid(rows.permute(1, 2, 0, 3, 4, 5).flatten(0, 2), len(self.frames))
        canvas = Image.new("RGB", (sheet.width, sheet.height + 14), "white")
        canvas.paste(sheet, (0, 14))
        for i, (t, *_) in enumerate(self.frames):
            ImageDraw.Draw(canvas).text((4 + i * sheet.width / len(self.frames), 1), f"{t:.2g}", fill="black")
        return canvas
