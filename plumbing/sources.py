"""Sources: where pictures lie, and how one of them becomes an array.

A source has `.path`, the `.names` of its images (class/.../file where there are classes)
and a method `.picture(name)` that opens one with Pillow. It is a folder, a .zip, CIFAR-10's
own archive, or a pair of sources in which every picture has a map (edges, saliency, ...).

    read_picture(source, name, size)   uint8 (C, size, size); of a pair (C + 1, size, size):
                                       the map is cut and resized like its picture

A picture is turned as its EXIF tag says and flattened to 8 bits. Its largest centred square
is cut out and resized with LANCZOS. Files come from anywhere, so nothing here trusts them:
a decompression bomb is not opened, and a pickle may name no function of its choice.

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


# --- one image ----------------------------------------------------------------------------

def open_picture(file):
    """Open a path or a file object with Pillow; its header is read and its pixels are not.

    -> PIL picture.  Image.DecompressionBombError for too many pixels."""
    picture = Image.open(file)
    limit = Image.MAX_IMAGE_PIXELS             # above it Pillow warns; it raises above twice of it
    if limit and picture.width * picture.height > limit:
        raise Image.DecompressionBombError(
            f"{picture.width} x {picture.height} pixels, the limit is {limit}")
    return picture


def to_8_bit(picture):
    """Bring a PIL picture of any mode to mode L or RGB.

    16 bits are scaled to 8, and transparency is laid over white.  -> PIL picture"""
    if picture.mode[0] in "IF":        # 16 and 32 bits, float: convert() would clip them at 255
        values = np.nan_to_num(np.asarray(picture, np.float64)).clip(0)
        white = 65535
        if picture.mode[0] == "F":
            white = 1 if values.max() <= 1 else 255
        values = values * (255 / max(white, values.max()))
        return Image.fromarray(values.round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "L" else picture.convert("RGB")


def crop_square(picture, size, gray=False):
    """Cut out the largest centred square of a PIL picture and resize it with LANCZOS.

    -> uint8 array (C, size, size)"""
    picture = to_8_bit(ImageOps.exif_transpose(picture)).convert("L" if gray else "RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    # Cropped first: resize(box=...) would look across the border.
    picture = picture.crop((left, top, left + side, top + side))
    small = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.array(small).reshape(size, size, -1).transpose(2, 0, 1)


# --- many images --------------------------------------------------------------------------

def is_hidden(name):
    """Whether a part of a name starts with a dot, or macOS put the file into a zip."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def images_among(names):
    """Choose the names of images that are not hidden; '/' stands between a name's parts.

    names: an iterable.  -> a sorted list"""
    return sorted(name for name in names
                  if name.lower().endswith(EXTENSIONS) and not is_hidden(name))


class Folder:
    """All images below a folder."""

    def __init__(self, path):
        self.path = path
        self.names = images_among(Path(at, name).relative_to(path).as_posix()
                                  for at, _, files in os.walk(path) for name in files)

    def picture(self, name):
        return open_picture(self.path / name)


class Zip:
    """All images in a .zip. A folder that wraps all the others is left out of the names."""

    def __init__(self, path):
        self.path, self.lock, self.pid = path, threading.Lock(), None
        try:
            with zipfile.ZipFile(path) as archive:
                names = images_among(archive.namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: is no readable .zip ({describe_error(error)}); download or "
                            "pack it again") from error
        tops = {name.split("/")[0] for name in names}
        is_wrapped = len(tops) == 1 and any(name.count("/") > 1 for name in names)
        self.top = tops.pop() + "/" if is_wrapped else ""
        self.names = [name.removeprefix(self.top) for name in names]

    def picture(self, name):
        # One reader at a time, and a handle for each process: forked ones would share one
        # position in the file.
        with self.lock:
            if self.pid != os.getpid():
                self.archive, self.pid = zipfile.ZipFile(self.path), os.getpid()
            return open_picture(io.BytesIO(self.archive.read(self.top + name)))

    def __reduce__(self):                              # how a worker that is not forked gets a copy
        return Zip, (self.path,)


class SafeUnpickler(pickle.Unpickler):
    """A reader of pickles that calls nothing but what arrays and bytes need.

    A pickle may name any function of any module, and it is called."""
    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
        # The name of numpy 1, then that of numpy 2.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]


class Cifar:
    """The training images of CIFAR-10's archive of pickled arrays, as published."""

    FILES = ["batches.meta", *(f"data_batch_{i}" for i in range(1, 6))]

    def __init__(self, path):
        self.path = path
        try:
            meta, *batches = self.read_parts()
            labels = [meta[b"label_names"][label].decode()
                      for batch in batches for label in batch[b"labels"]]
            self.names = [f"{label}/{i:05d}" for i, label in enumerate(labels)]
            pixels = np.concatenate([batch[b"data"] for batch in batches])
            self.pixels = pixels.reshape(len(labels), 3, 32, 32).astype(np.uint8)
        except Exception as error:                         # whatever damage or malice comes up with
            raise UserError(f"{path}: is not CIFAR-10's python archive ({describe_error(error)}); "
                            "download it again") from error

    def read_parts(self):
        """-> the unpickled contents of FILES."""
        with tarfile.open(self.path) as archive:
            files = {Path(member.name).name: archive.extractfile(member)
                     for member in archive if member.isfile()}
            return [SafeUnpickler(files[name], encoding="bytes").load() for name in self.FILES]

    def picture(self, name):
        return Image.fromarray(self.pixels[int(name.split("/")[1])].transpose(1, 2, 0))


class Paired:
    """A source of pictures in which each has a map, which lies in another source.

    The map of a picture has the same path but for the ending, or else the same file stem.
    (The layout of DUTS and BSDS: images/a.jpg, masks/a.png.) Maps that lie below the
    pictures are no pictures."""

    def __init__(
        self,
        source,               # of the pictures
        maps,                 # of the maps
        what="target",        # a word for a map, in errors
        flag="--targets",     # the option that named the maps, in errors
    ):
        self.source, self.maps, self.path = source, maps, source.path
        self.what, self.flag = what, flag
        here, there = Path(source.path).resolve(), Path(maps.path).resolve()
        if here == there:
            raise UserError(f"{flag} {maps.path}: is the place of the pictures themselves; "
                            "give another folder or .zip")
        self.names = source.names
        if Path(source.path).is_dir() and there.is_relative_to(here):
            inside = there.relative_to(here).as_posix() + "/"
            self.names = [name for name in source.names if not name.startswith(inside)]
        self.by_path, self.by_stem = {}, {}
        for name in maps.names:
            self.by_path.setdefault(name.rpartition(".")[0], []).append(name)
            self.by_stem.setdefault(Path(name).stem, []).append(name)

    def picture(self, name):
        return self.source.picture(name)

    def map(self, name):
        """Open the map of a picture.

        LookupError, in words for the user, where there is none or no single one."""
        path = name.rpartition(".")[0]
        stem = path.rpartition("/")[2]
        same = self.by_path.get(path) or self.by_stem.get(stem, [])
        if len(same) != 1:
            found = f"{len(same) or 'no'} {self.what}{'s' * (len(same) > 1)}"
            raise LookupError(f"{found} {stem}.* in {self.flag} {self.maps.path}")
        return self.maps.picture(same[0])


def read_picture(source, name, size, gray=False):
    """Read a picture of a source, and its map where the source has maps.

    -> uint8 (C, size, size); of a Paired source (C + 1, size, size), the map last
    ValueError when the map has another shape than the picture."""
    with source.picture(name) as picture:
        x = crop_square(picture, size, gray)
        width, height = ImageOps.exif_transpose(picture).size
    if isinstance(source, Paired):
        with source.map(name) as picture:
            map_width, map_height = ImageOps.exif_transpose(picture).size
            # Of another shape, it would not fit when both are cut to their squares.
            if abs(map_width * height - map_height * width) > 0.02 * map_width * height:
                raise ValueError(f"{width} x {height} pixels, but its {source.what} "
                                 f"{map_width} x {map_height}")
            x = np.concatenate([x, crop_square(picture, size, gray=True)])
    return x


def class_folders(source):
    """The first-level folder of every picture of a source, which names its class.

    -> [name, ...].  UserError for a picture that lies in no folder."""
    for name in source.names:
        if "/" not in name:
            raise UserError(f"{source.path}: {name} lies in no subfolder; with labels every class "
                            "has one of its own")
    return [name.partition("/")[0] for name in source.names]


def open_images(path, also=""):
    """Open a folder, a .zip or cifar-10-python.tar.gz as a source.

    also: what else could have been given, for the error.  UserError for anything else."""
    given, path = path, Path(path).expanduser()
    if not str(given) or not path.exists():
        raise UserError(f"{given or 'an empty name'}: there is no such file or folder; give a "
                        f"folder or a .zip{also}")
    if path.is_dir():
        return Folder(path)
    if path.suffix.lower() == ".zip":
        return Zip(path)
    if path.name.endswith(".tar.gz"):
        return Cifar(path)
    raise UserError(f"{path}: is no folder, .zip or cifar-10-python.tar.gz; put the images into a "
                    "folder")
