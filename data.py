"""Images in: from a folder, a zip, CIFAR-10's own archive (sources.py), or the built-in faces (faces.py).

Whatever the source, the result is one thing: `Images`, n square pictures of one size as uint8, with a class number each.

    take(indices) -> x (B, C, S, S) uint8 0..255,  y (B,) int64          y is 0 where there are no classes
                     x (B, C + 1, S, S) with `targets`: the last channel is the picture's map (edges, saliency, ...), cut and
                     resized like the picture, so that whatever is done to one is done to both
    to_float      x / 127.5 - 1                in [-1, 1]: what a model sees
    to_uint8      round(127.5 x + 127.5)       its inverse on all 256 values, because it rounds and does not truncate

Real folders hold broken files: they are named, counted and skipped, and only a folder that is mostly wrong stops a program.

Shapes: n images, B batch, C channels (3, or 1 for gray), S the side in pixels.          Run `python data.py` to see the faces.
"""
import copy
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from plumbing.console import UserError, run_picture_command, describe_error
from plumbing.faces import EXPRESSIONS, draw_faces
from plumbing.sources import EXTENSIONS, Paired, class_folders, open_images, read_picture
from plumbing.images import grid, seeded, to_float, to_uint8  # noqa: F401  (handed on)


# --- numbers and pictures ----------------------------------------------------------------------------------------------------

# --- a data set --------------------------------------------------------------------------------------------------------------

class Images:
    """A data set at one size; load_images makes it.

    .n = len(), .size, .channels (of a picture), .maps (0, or 1 channel more), .classes (names, [] when unlabelled), .skipped (names of
    files that could not be read).
    Image i is row rows[i] of the pixels (n, C, S, S) in memory, which subsets share, or else of the source's names.
    """

    def __init__(self, size, channels, labels, classes=(), pixels=None, source=None, maps=0):
        self.size, self.channels, self.maps, self.labels, self.classes = size, channels, maps, labels, list(classes)
        self.pixels, self.source = pixels, source
        self.rows, self.skipped, self.warned = torch.arange(len(labels)), [], set()

    def __len__(self):
        return len(self.rows)

    n = property(__len__)

    def subset(self, indices):
        """1-D indices -> Images of those, in that order; no pixel is copied."""
        other = copy.copy(self)
        other.rows = self.rows[torch.as_tensor(indices, dtype=torch.int64)]
        return other

    def take(self, indices):
        """1-D indices (B) -> x uint8 (B, C + maps, S, S), y int64 (B,), zeros where there are no classes."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if self.pixels is not None:
            return self.pixels[self.rows[indices]], self.labels[self.rows[indices]]
        x, rows = zip(*(self.decode(i) for i in indices.tolist()))
        return torch.from_numpy(np.stack(x)), self.labels[list(rows)]

    __getitems__ = take                                                # what a DataLoader calls for a batch

    def decode(self, i):
        """Image i from its file -> array (C + maps, S, S), its row. A file that broke since it was listed gives way to the next one."""
        for k in range(len(self)):
            row = int(self.rows[(i + k) % len(self)])
            name = self.source.names[row]
            try:
                return read_picture(self.source, name, self.size, self.channels == 1), row
            except Exception as error:
                if name not in self.warned:
                    print(f"{name} cannot be read ({describe_error(error)}): the next image takes its place", file=sys.stderr)
                self.warned.add(name)
        raise UserError(f"{self.source.path}: not one of the images can be read any more; are they still there?")

    def batches(self, order, workers=0):
        """An iterable of 1-D indices -> an iterator of (x, y), one for each, in that order.

        Pixels in memory are indexed here and now. Files are decoded ahead by `workers` processes, which live as long as the
        iterator: hand over the order of the whole training, not of an epoch.
        """
        if self.pixels is not None or workers == 0:
            return map(self.take, order)
        order = (torch.as_tensor(indices).tolist() for indices in order)
        return iter(DataLoader(self, batch_sampler=order, num_workers=workers, worker_init_fn=leave_signals_to_parent,
                               collate_fn=tuple,                       # nothing to collate: `take` makes whole batches
                               generator=torch.Generator()))           # or it would draw from the global random state


def leave_signals_to_parent(worker):
    """Ctrl-C reaches every process of a terminal, and torchrun's SIGTERM a whole group: the parent saves, and tells its workers to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


EXACT = ("edges", "saliency")                                          # what is known of the built-in faces, by their names in faces.Faces


def load_images(source, size, gray=False, labels=False, cache_gb=4.0, threads=None, progress=True, seed=0, count=None, targets=None):
    """source -> Images of size x size pixels in 1 channel if gray, else 3.

    source    a folder, a .zip, cifar-10-python.tar.gz, or "faces": `count` drawn ones (8192 if None), others for another seed
    labels    a class per first-level subfolder, in the order of their names; for faces their expression
    cache_gb  pixels are kept in memory when they need no more than this many 10^9 bytes, else decoded whenever they are taken
    targets   a map for each picture, as one channel more: a folder or .zip with files of the same stems; for faces "edges" or "saliency"
    threads   how many decode (default: a few per core, Pillow releases the interpreter's lock); progress: show a bar
    UserError when the source is missing, of another kind or empty, and when more than 1 % and more than 10 files are broken.
    """
    if size < 1:
        raise UserError(f"--size {size}: an image has at least one pixel")
    channels, path = 1 if gray else 3, Path(source).expanduser()
    if str(source) == "faces":
        try:
            faces = draw_faces(8192 if count is None else count, size, seed)
        except ValueError as error:
            raise UserError(f"--data faces: {error}") from None
        luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)       # the weights of Pillow's mode L
        pixels = (faces.pixels * luma).sum(1, keepdim=True).round().byte() if gray else faces.pixels
        if targets is not None and targets not in EXACT:
            raise UserError(f"--targets {targets}: the built-in faces have maps of their own ({', '.join(EXACT)}); leave it out, or give --data")
        pixels = torch.cat([pixels, getattr(faces, targets)], 1) if targets else pixels
        return Images(size, channels, faces.labels * labels, EXPRESSIONS if labels else [], pixels, maps=int(targets is not None))
    source = open_images(source, " (or 'faces')")
    if targets is not None:
        source = Paired(source, open_images(targets))
    names, n, maps = source.names, len(source.names), int(targets is not None)
    if n == 0:
        raise UserError(f"{path}: holds no images ({' '.join(EXTENSIONS)}); is it the right place?")
    folders = class_folders(source) if labels else [""] * n
    classes = sorted(set(folders))
    number = {name: i for i, name in enumerate(classes)}
    y = torch.tensor([number[folder] for folder in folders])

    cached = n * (channels + maps) * size * size <= cache_gb * 1e9
    pixels = torch.empty(n, channels + maps, size, size, dtype=torch.uint8) if cached else None

    def visit(i):
        """Decode image i into its place, or only look at its header -> None, or why it cannot be read."""
        try:
            if cached:
                pixels[i] = torch.from_numpy(read_picture(source, names[i], size, gray))
            else:
                source.picture(names[i]).close()
                if maps:
                    source.map(names[i]).close()
        except Exception as error:                                     # on damaged files decoders raise nearly everything
            return describe_error(error)

    failures, terminal = [], sys.stderr.isatty()
    hidden = not (progress and (terminal or n > 20000))                # a log file hears of long loads only, and seldom
    with (warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool,
          tqdm(desc=path.name, total=n, disable=hidden, mininterval=0.1 if terminal else 10) as bar):
        warnings.simplefilter("ignore")                                # remarks on single files: what matters is a reason below
        for some in pool.map(lambda at: [visit(i) for i in range(at, min(at + 32, n))], range(0, n, 32)):
            failures += some
            bar.update(len(some))
    images = Images(size, channels, y, classes if labels else [], pixels, source, maps)
    images.rows = torch.tensor([i for i in range(n) if failures[i] is None])
    images.skipped = [names[i] for i in range(n) if failures[i] is not None]
    if images.skipped:
        broken = len(images.skipped)
        examples = ", ".join([f"{name} ({why})" for name, why in zip(names, failures) if why is not None][:5])
        line = f"{broken} of {n} images that could not be used: {examples}{', ...' if broken > 5 else ''}"
        if broken == n or broken > max(10, n / 100):
            raise UserError(f"{path}: too much is broken, {line}; mend or remove them")
        print(f"skipped {line}", file=sys.stderr)
    return images


def holdout(images, val, seed=0, **load_kwargs):
    """Images -> (training Images, held-out Images).

    val: a fraction in (0, 1), a number or text, for a random split fixed by seed that holds out 1 to 1024 images; or a source
    of its own, loaded at the same size and channels, which must have the same classes (load_kwargs: as in load_images).
    """
    try:
        fraction = float(val)
    except (TypeError, ValueError):
        gray, labels = images.channels == 1, bool(images.classes)
        held = load_images(val, images.size, gray, labels, seed=seed + 1, **load_kwargs)   # + 1: not the training's faces
        if held.classes != images.classes:
            raise UserError(f"--val {val}: its classes {held.classes} are not the data's {images.classes}") from None
        return images, held
    if not 0 < fraction < 1:
        raise UserError(f"--val {val}: a fraction lies between 0 and 1; or give a folder or a .zip")
    if len(images) < 2:
        raise UserError(f"--val {val}: one image cannot be split; add images, or give a folder of held-out ones")
    k = min(max(1, round(len(images) * fraction)), 1024, len(images) - 1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(order[k:].sort().values), images.subset(order[:k].sort().values)


def draw_face_sheet(size=64, seed=0):
    """Sixty of the built-in faces, then the outlines and the silhouettes of the last twelve."""
    faces = draw_faces(60, size, seed)
    masks = [mask[-12:].expand(-1, 3, -1, -1) for mask in (faces.edges, faces.saliency)]
    return grid(torch.cat([faces.pixels, *masks]), columns=12)


if __name__ == "__main__":
    run_picture_command("Draw the built-in faces, and of some their outlines and silhouettes.", draw_face_sheet, "faces.png",
                    size=(64, "pixels along a side of a face"), seed=(0, "other seeds, other faces"))
