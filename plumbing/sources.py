"""Sources: where pictures lie, and how one of them becomes an array.

A source has `.path`, the `.names` of its images (class/.../file where there are classes)
and a method `.picture(name)` that opens one with Pillow. It is a folder, a .zip, CIFAR-10's
own archive, or a pair of sources in which every picture has a map (edges, saliency, ...).
Or it is a name of plumbing/downloads.py: `cifar10`, unless a path has this name.

    read_picture(source, name, size)   uint8 (C, size, size); of a pair (C + 1, size, size):
                                       the map is cut and resized like its picture
    open_images(path, part="train")    of a root that holds exactly train/ and val/ the one
                                       part; any other place is read as a whole

plumbing/pictures.py opens one picture and makes an array of it, plumbing/names.py compares
names. Files come from anywhere, so nothing here trusts them: links may go round in circles,
and a pickle may name no function of its choice.

`.notes` are lines for the user: which files are left out. `.file_of(name)` is the file in
which a picture lies. `.part` is "train" or "val" where a root was split, else "".

Shapes: C channels (3, or 1 for gray), size the side in pixels.
"""
import codecs
import gzip
import io
import os
import pickle
import tarfile
import threading
import zipfile
from collections import deque
from pathlib import Path

import numpy as np
from PIL import Image

from plumbing.console import UserError, describe_error
from plumbing.downloads import DOWNLOADS, fetch_published, is_published, list_published
from plumbing.names import (
    common_folders, count_endings, is_hidden, is_split, normal_name, split_name)
from plumbing.pictures import ENDINGS, crop_square, largest_value, open_picture, upright_size


# --- many images --------------------------------------------------------------------------

def separate_images(names):
    """Tell images from other files by their endings. What is hidden is left out.

    names: an iterable, with '/' between a name's parts.  -> images, others: sorted lists"""
    seen = sorted((name for name in names if not is_hidden(name)), key=normal_name)
    images = [name for name in seen if name.lower().endswith(ENDINGS)]
    return images, [name for name in seen if not name.lower().endswith(ENDINGS)]


def identify_folder(path):
    """What tells two folders apart, whatever names lead to them."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def walk_folder(path):
    """List all files below a folder, through links to other folders, too.

    A folder is visited once, so that links cannot go round in circles.
    -> names of files, names of the links that lead to a folder visited before
    UserError for a folder that may not be read."""
    def refuse(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); "
                        "allow it, or move the folder elsewhere")

    files, repeated, visited = [], [], {identify_folder(path)}
    links = deque([""])
    while links:
        link = links.popleft()
        if link:
            identity = identify_folder(path / link)
            if identity in visited:
                repeated.append(link)
                continue
            visited.add(identity)
        for at, folders, inside in os.walk(path / link, onerror=refuse):
            here = Path(at).relative_to(path)
            files += [(here / name).as_posix() for name in inside]
            links += [(here / name).as_posix() for name in sorted(folders)
                      if os.path.islink(Path(at, name))]
            folders[:] = [name for name in sorted(folders) if enter_folder(Path(at, name), visited)]
    return files, repeated


def enter_folder(path, visited):
    """Whether a folder, which is no link, was not visited before. From now on it was."""
    if os.path.islink(path) or identify_folder(path) in visited:
        return False
    visited.add(identify_folder(path))
    return True


def choose_part(names, part):
    """The images of one part of a root that holds exactly train/ and val/; all of another.

    names: of all images.  part: "train", "val", or "" for both.
    -> the folders that lead to them ("a/train/"), those names, "train", "val" or "" """
    top = common_folders(names)
    if not part or not is_split([name.removeprefix(top) for name in names]):
        return top, names, ""
    top += f"{part}/"
    names = [name for name in names if name.startswith(top)]
    return top + common_folders([name.removeprefix(top) for name in names]), names, part


def describe_choice(others, part):
    """Lines for the user: files that are no images, and which part of a root is read."""
    told = [f"is split into train/ and val/: {part}/ is read"] if part else []
    return told + [line for line in [count_endings(others)] if line]


class Folder:
    """All images below a folder, or of its part train/ or val/. Folders that wrap all the
    others are left out of the names."""

    def __init__(self, path, part=""):
        self.path = Path(path)
        files, repeated = walk_folder(self.path)
        names, others = separate_images(files)
        self.top, names, self.part = choose_part(names, part)
        self.names = [name.removeprefix(self.top) for name in names]
        self.notes = describe_choice(others, self.part)
        if repeated:
            self.notes.append(f"{len(repeated)} link(s) lead to folders that are read already "
                              f"({', '.join(repeated[:5])}{', ...' * (len(repeated) > 5)})")

    def file_of(self, name):
        """The path of the file that holds a picture."""
        return self.path / self.top / name

    def picture(self, name):
        return open_picture(self.file_of(name))


class Zip:
    """All images in a .zip, or of its part train/ or val/. Folders that wrap all the others
    are left out of the names."""

    def __init__(self, path, part=""):
        self.path, self.lock, self.pid = Path(path), threading.Lock(), None
        try:
            with zipfile.ZipFile(path) as archive:
                members = {"/".join(split_name(name)): name for name in archive.namelist()
                           if not name.endswith(("/", "\\"))}
        except Exception as error:                         # names that are none are a ValueError
            raise UserError(f"{path}: is no readable .zip ({describe_error(error)}); download or "
                            "pack it again") from error
        names, others = separate_images(members)
        self.top, names, self.part = choose_part(names, part)
        self.members = {name.removeprefix(self.top): members[name] for name in names}
        self.names = list(self.members)
        self.notes = describe_choice(others, self.part)

    def file_of(self, name):
        """The path of the file that holds a picture: the archive."""
        return self.path

    def picture(self, name):
        # One reader at a time, and a handle for each process: forked ones would share one
        # position in the file.
        with self.lock:
            if self.pid != os.getpid():
                self.archive, self.pid = zipfile.ZipFile(self.path), os.getpid()
            return open_picture(io.BytesIO(self.archive.read(self.members[name])))

    def __reduce__(self):                              # how a worker that is not forked gets a copy
        return Zip, (self.path, self.part)


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
        self.path, self.part, self.notes = path, "", []
        try:
            meta, *batches = self.read_parts()
            labels = [meta[b"label_names"][label].decode()
                      for batch in batches for label in batch[b"labels"]]
            self.names = [f"{label}/{i:05d}" for i, label in enumerate(labels)]
            pixels = np.concatenate([batch[b"data"] for batch in batches])
            self.pixels = pixels.reshape(len(labels), 3, 32, 32).astype(np.uint8)
        except UserError:
            raise
        except Exception as error:                         # whatever damage or malice comes up with
            raise UserError(f"{path}: is not CIFAR-10's python archive ({describe_error(error)}); "
                            "download it again") from error

    def read_parts(self):
        """-> the unpickled contents of FILES."""
        with tarfile.open(self.path) as archive:
            files = {Path(member.name).name: archive.extractfile(member)
                     for member in archive if member.isfile()}
            if "batches.meta" not in files:
                raise UserError(f"{self.path}: is an archive, but not CIFAR-10's; "
                                "unpack it into a folder and give that")
            return [SafeUnpickler(files[name], encoding="bytes").load() for name in self.FILES]

    def file_of(self, name):
        """The path of the file that holds a picture: the archive."""
        return self.path

    def picture(self, name):
        return Image.fromarray(self.pixels[int(name.split("/")[1])].transpose(1, 2, 0))


def read_idx(path, dimensions):
    """Read a file of MNIST's form (.gz): big-endian sizes, then bytes.

    -> uint8 with so many dimensions.  UserError for anything else."""
    try:
        data = gzip.decompress(Path(path).read_bytes())
        begins = 4 + 4 * dimensions
        magic, *shape = np.frombuffer(data[:begins], ">i4").tolist()
        if magic != 0x800 + dimensions:                 # 8: unsigned bytes
            raise ValueError(f"it begins with {magic}")
        return np.frombuffer(data[begins:], np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: is no file of MNIST's form ({describe_error(error)}); "
                        "download it again") from error


class FashionMnist:
    """The training images of Fashion-MNIST: grey, 28 x 28. They are resized as all others
    are.

    Source: the README of zalandoresearch/fashion-mnist names the labels."""

    CLASSES = ["T-shirt or top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt",
               "Sneaker", "Bag", "Ankle boot"]

    def __init__(self, images, labels):
        self.path, self.part, self.notes = images, "", []
        self.pixels, numbers = read_idx(images, 3), read_idx(labels, 1).tolist()
        if len(numbers) != len(self.pixels) or max(numbers, default=0) >= len(self.CLASSES):
            raise UserError(f"{labels}: are not the labels of {images}")
        self.names = [f"{self.CLASSES[label]}/{i:05d}" for i, label in enumerate(numbers)]

    def file_of(self, name):
        """The path of the file that holds a picture: the one of all."""
        return self.path

    def picture(self, name):
        return Image.fromarray(self.pixels[int(name.split("/")[1])])


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
        self.part = source.part
        self.what, self.flag = what, flag
        self.notes = source.notes + [f"{flag} {maps.path}: {note}" for note in maps.notes]
        if Path(source.path).resolve() == Path(maps.path).resolve():
            raise UserError(f"{flag} {maps.path}: is the place of the pictures themselves; "
                            "give another folder or .zip")
        self.names = source.names
        inside = find_inside(source, maps)
        if inside:
            self.names = [name for name in source.names
                          if not f"{source.top}{name}".startswith(inside)]
        self.by_path, self.by_stem = {}, {}
        for name in maps.names:
            path = normal_name(name).rpartition(".")[0]
            self.by_path.setdefault(path, []).append(name)
            self.by_stem.setdefault(path.rpartition("/")[2], []).append(name)

    def file_of(self, name):
        """The path of the file that holds a picture."""
        return self.source.file_of(name)

    def picture(self, name):
        return self.source.picture(name)

    def find_map(self, name):
        """The name of a picture's map.

        LookupError, in words for the user, where there is none or no single one."""
        path = normal_name(name).rpartition(".")[0]
        stem = path.rpartition("/")[2]
        same = self.by_path.get(path) or self.by_stem.get(stem, [])
        if len(same) != 1:
            found = f"{len(same) or 'no'} {self.what}{'s' * (len(same) > 1)}"
            raise LookupError(f"{found} {stem}.* in {self.flag} {self.maps.path}")
        return same[0]

    def map(self, name):
        """Open the map of a picture. LookupError as `find_map`."""
        return self.maps.picture(self.find_map(name))

    def require_light(self):
        """UserError when no map reaches middle grey: maps of 0 and 1 look black.

        Nearly always the first map answers."""
        highest = 0
        for name in self.names:
            try:
                with self.map(name) as picture:
                    value, is_light = largest_value(picture)
            except Exception:                          # it will be named and skipped
                continue
            if is_light:
                return
            highest = max(highest, value)
        raise UserError(f"{self.flag} {self.maps.path}: the largest value is {highest:g}, so all "
                        "look black; are they 0/1, or numbers of classes? Spread them to 0..255")


def find_inside(source, maps):
    """The folder of maps that lie below their pictures, seen from the pictures.

    -> "masks/", or "" """
    for find in (os.path.abspath, os.path.realpath):          # a link to maps may lead elsewhere
        here, there = Path(find(source.path)), Path(find(maps.path))
        if here.is_dir() and there.is_relative_to(here):
            return there.relative_to(here).as_posix() + "/"
    return ""


def read_picture(source, name, size, gray=False):
    """Read a picture of a source, and its map where the source has maps.

    -> uint8 (C, size, size); of a Paired source (C + 1, size, size), the map last
    ValueError when the map has another shape than the picture."""
    with source.picture(name) as picture:
        width, height = upright_size(picture)
        x = crop_square(picture, size, gray)
    if isinstance(source, Paired):
        with source.map(name) as picture:
            map_width, map_height = upright_size(picture)
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
    return [normal_name(name.partition("/")[0]) for name in source.names]


def open_images(path, also="", part=""):
    """Open a folder, a .zip, cifar-10-python.tar.gz or a name of DOWNLOADS as a source.

    also: what else could have been given, for the error.  part: "train" or "val", to read
    that part alone of a root that holds exactly these two.  UserError for anything else."""
    if is_published(path, "data"):
        return PUBLISHED[str(path)](*fetch_published(str(path)))
    given, path = path, Path(os.path.expanduser(path))
    if not str(given) or not (path.is_dir() or path.is_file()):       # nor a pipe, a device
        raise UserError(f"{given or 'an empty name'}: there is no such file or folder; give a "
                        f"folder or a .zip{also}, or a name that is downloaded "
                        f"({list_published('data')})")
    source = open_place(path, part)
    if str(given) in DOWNLOADS:
        source.notes.append("the path of this name is read, not the data set of this name")
    return source


def open_place(path, part):
    """`open_images` of a path that exists."""
    if path.is_dir():
        return Folder(path, part)
    if path.suffix.lower() == ".zip":
        return Zip(path, part)
    if path.name.endswith(".tar.gz"):
        return Cifar(path)
    raise UserError(f"{path}: is no folder, .zip or cifar-10-python.tar.gz; put the images into a "
                    "folder")


# How the files behind a name are read: those of DOWNLOADS, in their order.
PUBLISHED = {"cifar10": Cifar, "fashion-mnist": FashionMnist, "pets": Zip}
