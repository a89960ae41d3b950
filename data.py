"""Images in: from a folder, a zip, CIFAR-10's own archive, or the built-in faces (faces.py).

Whatever the source, the result is one thing: `Images`, n square pictures of one size as uint8, with a class number each.

    take(indices) -> x (B, C, S, S) uint8 0..255,  y (B,) int64          y is 0 where there are no classes
                     x (B, C + 1, S, S) with `targets`: the last channel is the picture's map (edges, saliency, ...), cut and
                     resized like the picture, so that whatever is done to one is done to both
    to_float      x / 127.5 - 1                in [-1, 1]: what a model sees
    to_uint8      round(127.5 x + 127.5)       its inverse on all 256 values, because it rounds and does not truncate

A picture is turned as its EXIF tag says, flattened to 8 bits, its largest centred square is cut out and resized with LANCZOS.
Real folders hold broken files: they are named, counted and skipped, and only a folder that is mostly wrong stops a program.

Shapes: n images, B batch, C channels (3, or 1 for gray), S the side in pixels.          Run `python data.py` to see the faces.
"""
import argparse
import codecs
import copy
import io
import os
import pickle
import signal
import sys
import tarfile
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from tqdm import tqdm

from faces import EXPRESSIONS, draw_faces

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class UserError(ValueError):
    """Something that the user can mend. The message is one line; commands print it and exit with status 2."""


def command_line(description, **settings):
    """An argument parser as every command here has it: no abbreviations, defaults in --help, bad input is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, **{"formatter_class": argparse.ArgumentDefaultsHelpFormatter} | settings)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    return parser


def reason(error):
    """An exception -> a few words on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"                                          # Pillow's own words name a memory address
    return " ".join(str(error).split()) or type(error).__name__


def seeded(*key):
    """A CPU generator that is a function of some whole numbers: independent streams for neighbouring keys."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([k % 2**63 for k in key]).generate_state(1, np.uint64)[0] >> 1))


# --- numbers and pictures ----------------------------------------------------------------------------------------------------

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


# --- one image ---------------------------------------------------------------------------------------------------------------

def open_picture(file):
    """Path or file object -> PIL picture, its header read and its pixels not. A decompression bomb raises."""
    picture = Image.open(file)
    limit = Image.MAX_IMAGE_PIXELS                                     # above it Pillow warns, and raises only above twice that
    if limit and picture.width * picture.height > limit:
        raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels, the limit is {limit}")
    return picture


def flatten(picture):
    """PIL picture of any mode -> mode L or RGB: 16 bits scaled to 8, transparency laid over white."""
    if picture.mode[0] in "IF":                                        # 16 and 32 bits, float: convert() would clip them at 255
        v = np.nan_to_num(np.asarray(picture, np.float64)).clip(0)
        white = 65535 if picture.mode[0] == "I" else 1 if v.max() <= 1 else 255
        return Image.fromarray((v * (255 / max(white, v.max()))).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "L" else picture.convert("RGB")


def square(picture, size, gray=False):
    """PIL picture -> uint8 array (C, size, size): its largest centred square, resized with LANCZOS."""
    picture = flatten(ImageOps.exif_transpose(picture)).convert("L" if gray else "RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))       # first: resize(box=...) would look across its border
    small = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.array(small).reshape(size, size, -1).transpose(2, 0, 1)


# --- many images: a source has .names, class/.../file where there are classes, and opens a .picture(name) --------------------

def images_among(names):
    """Names of files, with '/' between the parts -> sorted, those of images; no hidden ones, no shadows macOS puts into a zip."""
    shadow = lambda name: any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return sorted(name for name in names if name.lower().endswith(EXTENSIONS) and not shadow(name))


class Folder:
    """All images below a folder."""

    def __init__(self, path):
        self.path = path
        self.names = images_among(Path(at, name).relative_to(path).as_posix() for at, _, files in os.walk(path) for name in files)

    def picture(self, name):
        return open_picture(self.path / name)


class Zip:
    """All images in a .zip. One folder that wraps all the others, as many programs pack it, is seen through."""

    def __init__(self, path):
        self.path, self.lock, self.pid = path, threading.Lock(), None
        try:
            with zipfile.ZipFile(path) as archive:
                names = images_among(archive.namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: is no readable .zip ({reason(error)}); download or pack it again") from error
        tops = {name.split("/")[0] for name in names}
        self.top = tops.pop() + "/" if len(tops) == 1 and any(name.count("/") > 1 for name in names) else ""
        self.names = [name.removeprefix(self.top) for name in names]

    def picture(self, name):
        with self.lock:                                                # one reader at a time, and a handle for each process:
            if self.pid != os.getpid():                                # forked ones would share one position in the file
                self.archive, self.pid = zipfile.ZipFile(self.path), os.getpid()
            return open_picture(io.BytesIO(self.archive.read(self.top + name)))

    def __reduce__(self):                                              # how a worker that is not forked gets a copy
        return Zip, (self.path,)


class SafeUnpickler(pickle.Unpickler):
    """A pickle may name any function of any module, to be called. This one may name what arrays and bytes need, no more."""
    ALLOWED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): codecs.encode,
               ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],      # numpy 1's name for it
               ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0]}     # and numpy 2's

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]


class Cifar:
    """The training images of CIFAR-10's archive of pickled arrays, as published."""

    def __init__(self, path):
        self.path = path
        try:
            with tarfile.open(path) as archive:
                files = {Path(member.name).name: archive.extractfile(member) for member in archive if member.isfile()}
                meta, *batches = (SafeUnpickler(files[name], encoding="bytes").load()
                                  for name in ("batches.meta", *(f"data_batch_{i}" for i in range(1, 6))))
            labels = [meta[b"label_names"][label].decode() for batch in batches for label in batch[b"labels"]]
            self.names = [f"{label}/{i:05d}" for i, label in enumerate(labels)]
            self.pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(len(labels), 3, 32, 32).astype(np.uint8)
        except Exception as error:                                     # whatever damage or malice comes up with
            raise UserError(f"{path}: is not CIFAR-10's python archive ({reason(error)}); download it again") from error

    def picture(self, name):
        return Image.fromarray(self.pixels[int(name.split("/")[1])].transpose(1, 2, 0))


class Paired:
    """A source of pictures, and for each a map in another source: the one of the same path without its ending, else of the same file stem
    (the layout of DUTS and BSDS: images/a.jpg, masks/a.png). Maps that lie below the pictures are no pictures. what, flag: words for errors."""

    def __init__(self, source, maps, what="target", flag="--targets"):
        self.source, self.maps, self.path, self.what, self.flag = source, maps, source.path, what, flag
        inside = ""
        if Path(source.path).is_dir() and Path(maps.path).resolve().is_relative_to(Path(source.path).resolve()):
            inside = Path(maps.path).resolve().relative_to(Path(source.path).resolve()).as_posix() + "/"
        if inside == "./" or Path(source.path).resolve() == Path(maps.path).resolve():
            raise UserError(f"{flag} {maps.path}: is the place of the pictures themselves; give another folder or .zip")
        self.names = [name for name in source.names if not inside or not name.startswith(inside)]
        self.by_path, self.by_stem = {}, {}
        for name in maps.names:
            self.by_path.setdefault(name.rpartition(".")[0], []).append(name)
            self.by_stem.setdefault(Path(name).stem, []).append(name)

    def picture(self, name):
        return self.source.picture(name)

    def map(self, name):
        """The map of picture `name`, opened. LookupError, in words for the user, where there is none or no single one."""
        stem = name.rpartition(".")[0].rpartition("/")[2]
        same = self.by_path.get(name.rpartition(".")[0]) or self.by_stem.get(stem, [])
        if len(same) != 1:
            raise LookupError(f"{len(same) or 'no'} {self.what}{'s' * (len(same) > 1)} {stem}.* in {self.flag} {self.maps.path}")
        return self.maps.picture(same[0])


def read(source, name, size, gray=False):
    """Picture `name` of a source -> uint8 (C, size, size); of a Paired one (C + 1, size, size), the map last."""
    with source.picture(name) as picture:
        x, (width, height) = square(picture, size, gray), ImageOps.exif_transpose(picture).size
    if isinstance(source, Paired):
        with source.map(name) as picture:
            w, h = ImageOps.exif_transpose(picture).size
            if abs(w * height - h * width) > 0.02 * w * height:                 # cut to its square it would not fit
                raise ValueError(f"{width} x {height} pixels, but its {source.what} {w} x {h}")
            x = np.concatenate([x, square(picture, size, gray=True)])
    return x


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
        for row in self.rows.roll(-i).tolist():
            name = self.source.names[row]
            try:
                return read(self.source, name, self.size, self.channels == 1), row
            except Exception as error:
                if name not in self.warned:
                    print(f"{name} cannot be read ({reason(error)}): the next image takes its place", file=sys.stderr)
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
    """Ctrl-C reaches every process of a terminal: the parent saves and ends its workers, by SIGTERM where need be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


EXACT = ("edges", "saliency")                                          # what is known of the built-in faces, by their names in faces.Faces


def open_images(path, also=""):
    """A folder, .zip or cifar-10-python.tar.gz -> a source. UserError for anything else. also: what else could have been given."""
    given, path = path, Path(path).expanduser()
    if not str(given) or not path.exists():
        raise UserError(f"{given or 'an empty name'}: there is no such file or folder; give a folder or a .zip{also}")
    kind = Folder if path.is_dir() else Zip if path.suffix.lower() == ".zip" else Cifar if path.name.endswith(".tar.gz") else None
    if kind is None:
        raise UserError(f"{path}: is no folder, .zip or cifar-10-python.tar.gz; put the images into a folder")
    return kind(path)


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
    folders = [name.rpartition("/")[0].partition("/")[0] if labels else "" for name in names]
    if labels and "" in folders:
        raise UserError(f"{path}: {names[folders.index('')]} lies in no subfolder; with labels every class has one of its own")
    classes = sorted(set(folders))
    y = torch.tensor([{name: i for i, name in enumerate(classes)}[folder] for folder in folders])

    cached = n * (channels + maps) * size * size <= cache_gb * 1e9
    pixels = torch.empty(n, channels + maps, size, size, dtype=torch.uint8) if cached else None

    def visit(i):
        """Decode image i into its place, or only look at its header -> None, or why it cannot be read."""
        try:
            if cached:
                pixels[i] = torch.from_numpy(read(source, names[i], size, gray))
            else:
                source.picture(names[i]).close()
                if maps:
                    source.map(names[i]).close()
        except Exception as error:                                     # on damaged files decoders raise nearly everything
            return reason(error)

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


def main():
    parser = command_line("Draw a picture of the synthetic faces.")
    parser.add_argument("--out", default="faces.png", help="where the picture goes")
    parser.add_argument("--size", type=int, default=64, help="pixels along a side of a face")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other faces")
    args = parser.parse_args()
    try:
        faces = draw_faces(60, args.size, args.seed)
        masks = [mask[-12:].expand(-1, 3, -1, -1) for mask in (faces.edges, faces.saliency)]
        grid(torch.cat([faces.pixels, *masks]), columns=12).save(args.out)
    except (ValueError, OSError) as error:
        parser.error(f"--out {args.out}, --size {args.size}, --seed {args.seed}: {reason(error)}")
    print(f"{args.out}: 60 faces, then the outlines and the silhouettes of the last twelve")


if __name__ == "__main__":
    main()
