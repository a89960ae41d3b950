"""Sources: where pictures lie, and how one of them becomes an array.

A source has `.names` of images, class/.../file where there are classes, and opens a `.picture(name)` with Pillow: a folder, a .zip,
CIFAR-10's own archive, or a pair of sources in which every picture has a map (edges, saliency, ...).

    read(source, name, size) -> uint8 (C, size, size), of a pair (C + 1, size, size): the map is cut and resized like its picture

A picture is turned as its EXIF tag says, flattened to 8 bits, its largest centred square is cut out and resized with LANCZOS. Files
come from anywhere, so nothing here trusts them: a decompression bomb is not opened and a pickle may name no function of its choice.

Shapes: C channels (3, or 1 for gray), size the side in pixels.
"""
import codecs
import io
import os
import pickle
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from plumbing.console import UserError, describe_error

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# --- one image -----------------------------------------------------------------------------------------------------------------

def open_picture(file):
    """Path or file object -> PIL picture, its header read and its pixels not. A decompression bomb raises."""
    picture = Image.open(file)
    limit = Image.MAX_IMAGE_PIXELS                                     # above it Pillow warns, and raises only above twice that
    if limit and picture.width * picture.height > limit:
        raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels, the limit is {limit}")
    return picture


def to_8_bit(picture):
    """PIL picture of any mode -> mode L or RGB: 16 bits scaled to 8, transparency laid over white."""
    if picture.mode[0] in "IF":                                        # 16 and 32 bits, float: convert() would clip them at 255
        v = np.nan_to_num(np.asarray(picture, np.float64)).clip(0)
        white = 65535 if picture.mode[0] == "I" else 1 if v.max() <= 1 else 255
        return Image.fromarray((v * (255 / max(white, v.max()))).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "L" else picture.convert("RGB")


def crop_square(picture, size, gray=False):
    """PIL picture -> uint8 array (C, size, size): its largest centred square, resized with LANCZOS."""
    picture = to_8_bit(ImageOps.exif_transpose(picture)).convert("L" if gray else "RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))       # first: resize(box=...) would look across its border
    small = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.array(small).reshape(size, size, -1).transpose(2, 0, 1)


# --- many images --------------------------------------------------------------------------------------------------------------

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
            raise UserError(f"{path}: is no readable .zip ({describe_error(error)}); download or pack it again") from error
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
            raise UserError(f"{path}: is not CIFAR-10's python archive ({describe_error(error)}); download it again") from error

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


def read_picture(source, name, size, gray=False):
    """Picture `name` of a source -> uint8 (C, size, size); of a Paired one (C + 1, size, size), the map last."""
    with source.picture(name) as picture:
        x, (width, height) = crop_square(picture, size, gray), ImageOps.exif_transpose(picture).size
    if isinstance(source, Paired):
        with source.map(name) as picture:
            w, h = ImageOps.exif_transpose(picture).size
            if abs(w * height - h * width) > 0.02 * w * height:                 # cut to its square it would not fit
                raise ValueError(f"{width} x {height} pixels, but its {source.what} {w} x {h}")
            x = np.concatenate([x, crop_square(picture, size, gray=True)])
    return x


def class_folders(source):
    """The first-level folder of every picture of a source, which names its class. UserError for a picture that lies in none."""
    for name in source.names:
        if "/" not in name:
            raise UserError(f"{source.path}: {name} lies in no subfolder; with labels every class has one of its own")
    return [name.partition("/")[0] for name in source.names]


def open_images(path, also=""):
    """A folder, .zip or cifar-10-python.tar.gz -> a source. UserError for anything else. also: what else could have been given."""
    given, path = path, Path(path).expanduser()
    if not str(given) or not path.exists():
        raise UserError(f"{given or 'an empty name'}: there is no such file or folder; give a folder or a .zip{also}")
    kind = Folder if path.is_dir() else Zip if path.suffix.lower() == ".zip" else Cifar if path.name.endswith(".tar.gz") else None
    if kind is None:
        raise UserError(f"{path}: is no folder, .zip or cifar-10-python.tar.gz; put the images into a folder")
    return kind(path)
