"""Images: from a folder, a .zip, CIFAR-10's own archive, or the built-in faces.

Whatever the source, the result is one thing: `Images`, n square pictures of one size as
uint8, with a class number each. plumbing/sources.py reads files, plumbing/faces.py draws
faces.

    take(indices)    x (B, C, S, S) uint8, y (B,) int64; y is 0 where there are no classes.
                     With targets x has one channel more: the picture's map (edges,
                     saliency, ...). It is cut and resized like the picture, so that
                     whatever is done to one is done to both.
    to_float         x / 127.5 - 1, in [-1, 1]: what a model sees
    to_uint8         round(127.5 x + 127.5): the inverse on all 256 values, because it
                     rounds and does not truncate

Real folders hold broken files. They are named, counted and skipped. Only a folder in which
too much is broken stops a program.

Shapes: n images, B batch, C channels (3, or 1 for gray), S the side in pixels.

Run `python data.py` to see the faces.
"""
import atexit
import contextlib
import copy
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from plumbing.console import STOPS, UserError, describe_error, run_picture_command
from plumbing.faces import EXPRESSIONS, STYLES, draw_faces
from plumbing.images import grid, seeded, to_float, to_uint8  # noqa: F401  (handed on)
from plumbing.names import sort_classes
from plumbing.sheets import draw_sheet
from plumbing.sources import Paired, class_folders, open_images, read_picture
from plumbing.writer import is_inside

FACES = 8192                                     # how many faces are drawn unless it is said
EXACT = ("edges", "saliency")                    # maps of the faces, by their names in faces.Faces
PARTS = {"train", "val", "valid", "validation", "test"}       # of a data set: these are no classes
HELD_OUT = 0.02                                  # the share for --val auto, without a folder val/
SHARED = "/dev/shm"                              # where worker processes hand over their batches


# --- a data set ---------------------------------------------------------------------------

class Images:
    """A data set at one size; load_images makes it.

    .size: S.  .channels: C.  .maps: 0, or 1 for one channel more.  .classes: names, [] when
    unlabelled.  .skipped: names of files that could not be read.
    Image i is row rows[i] of the pixels in memory, which subsets share, or else of the
    source's names."""

    def __init__(
        self,
        size,              # pixels along a side
        channels,          # of a picture, without its map
        labels,            # (n,) int64
        classes=(),        # their names
        pixels=None,       # uint8 (n, C + maps, S, S), or None: decode them when they are taken
        source=None,       # where to decode them from (plumbing/sources.py)
        maps=0,            # 1 if the last channel is a map
    ):
        self.size, self.channels, self.maps = size, channels, maps
        self.labels, self.classes = labels, list(classes)
        self.pixels, self.source = pixels, source
        self.rows = torch.arange(len(labels))
        self.skipped, self.warned = [], set()

    def __len__(self):
        return len(self.rows)

    def subset(self, indices):
        """1-D indices -> Images of those, in that order; no pixel is copied."""
        other = copy.copy(self)
        other.rows = self.rows[torch.as_tensor(indices, dtype=torch.int64)]
        return other

    def take(self, indices):
        """1-D indices (B,) -> x uint8 (B, C + maps, S, S), y int64 (B,)."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if self.pixels is not None:
            return self.pixels[self.rows[indices]], self.labels[self.rows[indices]]
        x, rows = zip(*(self.decode(i) for i in indices.tolist()))
        return torch.from_numpy(np.stack(x)), self.labels[list(rows)]

    __getitems__ = take                                          # a DataLoader calls it for a batch

    def decode(self, i):
        """Decode image i from its file -> array (C + maps, S, S), its row.

        A file that broke since it was listed is replaced by the next one.
        UserError when none can be read any more."""
        for later in range(len(self)):
            row = int(self.rows[(i + later) % len(self)])
            name = self.source.names[row]
            try:
                return read_picture(self.source, name, self.size, self.channels == 1), row
            except MemoryError:
                raise too_large(name) from None
            except Exception as error:
                if name not in self.warned:
                    print(f"{name} cannot be read ({describe_error(error)}): the next image "
                          "takes its place", file=sys.stderr)
                self.warned.add(name)
        raise UserError(f"{self.source.path}: not one of the images can be read any more; "
                        "are they still there?")

    def batches(self, order, workers=0):
        """An iterable of 1-D indices -> an iterator of (x, y), one for each, in that order.

        Pixels in memory are indexed here and now. Files are decoded ahead by `workers`
        processes, which live as long as the iterator: so give the order of the whole
        training, not of an epoch."""
        if self.pixels is not None or workers == 0:
            return map(self.take, order)
        order = (torch.as_tensor(indices).tolist() for indices in order)
        first = next(order, [])
        row = 8 + (self.channels + self.maps) * self.size**2               # bytes of an image
        require_shared_memory(workers, len(first) * row)
        atexit.unregister(end_workers)
        atexit.register(end_workers)                            # once, before Python's own
        # There is nothing to collate: `take` makes whole batches. The generator keeps the
        # DataLoader from drawing from the global random state.
        loader = DataLoader(self, batch_sampler=itertools.chain([first], order), collate_fn=tuple,
                            num_workers=workers, worker_init_fn=leave_signals_to_parent,
                            generator=torch.Generator())
        return watch_workers(iter(loader))

    def count_classes(self):
        """How many of these images each class has. -> [int, ...]"""
        return torch.bincount(self.labels[self.rows], minlength=len(self.classes)).tolist()

    def describe_classes(self):
        """"18 images of 3 classes (ant, bee, cow)", at most 10 of them, and a note where
        these look like no classes. How many each has is said where numbers differ."""
        n, names, counts = len(self), self.classes, self.count_classes()
        if not names:
            return f"{n} images"
        differ = len(set(counts)) > 1
        told = [f"{name} {count}" if differ else name for name, count in zip(names, counts)][:10]
        more = ", ..." if len(names) > 10 else ""
        plural = "es" * (len(names) > 1)
        line = f"{n} images of {len(names)} class{plural} ({', '.join(told)}{more})"
        if len(names) == 1 or {name.lower() for name in names} <= PARTS:
            line += "; note: is the folder one level too high or too low?"
        return line


# --- processes that decode ----------------------------------------------------------------

def leave_signals_to_parent(worker):
    """Make a worker ignore the signals that reach all processes of a group.

    The parent saves, and tells its workers to end (or kills them: end_workers)."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """Kill what still decodes when the program ends.

    Python ends such processes with SIGTERM, which they ignore, and then waits for them: a
    program that still holds an iterator of batches would never end."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def require_shared_memory(workers, batch):
    """UserError when the batches of some workers do not fit into the shared memory.

    Each keeps two ready, and one is in use. A worker that finds no room would die, and
    the parent would wait for ever. batch: bytes."""
    if not os.path.isdir(SHARED):
        return
    free, needed = shutil.disk_usage(SHARED).free, (2 * workers + 1) * batch * 1.1 + 2**20
    if needed > free:
        raise UserError(f"--workers {workers}: they need {needed / 1e6:.0f} MB of shared memory, "
                        f"and {SHARED} has {free / 1e6:.0f} MB left; give --workers 0, or more "
                        "of it (docker run --shm-size=8g)")


class CalmHandler:
    """A handler of SIGCHLD that raises nothing.

    torch's own raises wherever the program is, in the middle of an update, too. The next
    wait for a batch finds the dead worker as well."""

    def __init__(self, handler):
        self.handler = handler

    def __call__(self, number, frame):
        with contextlib.suppress(RuntimeError):
            self.handler(number, frame)


def watch_workers(batches):
    """The batches of a DataLoader's iterator. UserError when a worker was killed."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and not isinstance(handler, CalmHandler):
            signal.signal(signal.SIGCHLD, CalmHandler(handler))
    return describe_deaths(batches)


def describe_deaths(batches):
    """Hand on batches; what workers raise becomes one line.

    The frames of an error are cleared: torch's refer to the error and to the workers, and
    only the garbage collector, which takes their queues first, would find that circle."""
    try:
        yield from batches
        return
    except UserError as error:                          # torch puts a traceback before its line
        why = str(error).rpartition("UserError: ")[2].strip()
        traceback.clear_frames(error.__traceback__)
    except (RuntimeError, ConnectionError, EOFError) as error:
        is_dead = not isinstance(error, RuntimeError) or "DataLoader worker (pid" in str(error)
        if not is_dead:
            raise
        why = ("a process that decodes images was killed, probably for lack of memory; "
               "give fewer --workers")
        traceback.clear_frames(error.__traceback__)
    del batches                                         # its workers end here
    raise UserError(why)


# --- loading ------------------------------------------------------------------------------

def load_faces(
    size,           # pixels along a side
    gray,           # one channel instead of three
    labels,         # whether the classes are their expressions
    seed,           # other seeds, other faces
    count,          # how many, None for all
    targets,        # a name in EXACT, or None
):
    """The built-in faces as Images; arguments as in `load_images`.

    UserError for a number or size that cannot be drawn, and for maps that faces lack."""
    try:
        faces = draw_faces(FACES if count is None else count, size, seed)
    except ValueError as error:
        raise UserError(f"--data faces: {error}") from None
    if targets is not None and targets not in EXACT:
        raise UserError(f"--targets {targets}: the built-in faces have maps of their own "
                        f"({', '.join(EXACT)}); leave it out, or give --data")
    pixels = faces.pixels
    if gray:
        luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)      # weights of Pillow's mode L
        pixels = (pixels * luma).sum(1, keepdim=True).round().byte()
    if targets:
        pixels = torch.cat([pixels, getattr(faces, targets)], 1)
    return Images(size, 1 if gray else 3, faces.labels * labels, EXPRESSIONS if labels else [],
                  pixels, maps=int(targets is not None))


def number_classes(source, labels):
    """The class of every picture of a source: its first-level folder, if labels.

    -> y (n,) int64, the classes' names in order (of numbers, if all are), [] without
    labels"""
    if not labels:
        return torch.zeros(len(source.names), dtype=torch.int64), []
    folders = class_folders(source)
    classes = sort_classes(folders)
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[folder] for folder in folders]), classes


def too_large(name):
    """The error for a picture that does not fit into memory."""
    return UserError(f"{name}: there is not memory enough to decode it; make it smaller, or give "
                     "a smaller --cache-gb")


def find_fault(images, i):
    """Decode image i into its place in memory, or only look at its header.

    images: Images that are still to be filled.  -> None, or why it cannot be read
    UserError when the memory is full."""
    source, name = images.source, images.source.names[i]
    try:
        if images.pixels is not None:
            picture = read_picture(source, name, images.size, images.channels == 1)
            images.pixels[i] = torch.from_numpy(picture)
        else:
            source.picture(name).close()
            if images.maps:
                source.map(name).close()
    except MemoryError:
        raise too_large(name) from None
    except Exception as error:             # on damaged files decoders raise nearly everything
        return describe_error(error)


def find_faults(images, progress):
    """Visit all images in parallel: Pillow releases the lock.

    images: Images that are still to be filled.
    -> for each image None, or why it cannot be read"""
    n, faults = len(images), []
    terminal = sys.stderr.isatty()
    # A log file hears of long loads only, and seldom.
    hidden = not (progress and (terminal or n > 20000))
    visit = lambda some: [find_fault(images, i) for i in some]
    groups = [range(n)[start:start + 32] for start in range(0, n, 32)]
    with (warnings.catch_warnings(), ThreadPoolExecutor() as pool,
          tqdm(desc=Path(images.source.path).name, total=n, disable=hidden,
               mininterval=0.1 if terminal else 10) as bar):
        warnings.simplefilter("ignore")         # remarks on single files: the faults tell enough
        for some in pool.map(visit, groups):
            faults += some
            bar.update(len(some))
    return faults


def report_skipped(path, names, faults):
    """Print in one line which of the names could not be used.

    faults: for each name None, or why.
    UserError when more than 1 % and more than 10 are broken, or all."""
    reasons = [f"{name} ({why})" for name, why in zip(names, faults) if why is not None]
    broken, n = len(reasons), len(names)
    if not broken:
        return
    line = (f"{broken} of {n} images that could not be used: "
            f"{', '.join(reasons[:5])}{', ...' if broken > 5 else ''}")
    if broken == n or broken > max(10, n / 100):
        raise UserError(f"{path}: too much is broken, {line}; fix or remove them")
    print(f"skipped {line}", file=sys.stderr)


def load_images(
    source,            # a folder, a .zip, cifar-10-python.tar.gz, or "faces"
    size,              # pixels along a side
    gray=False,        # 1 channel instead of 3
    labels=False,      # a class per first-level subfolder, in order; of faces: expressions
    cache_gb=4.0,      # above this many 10^9 bytes pixels are not kept but decoded when taken
    progress=True,     # show a bar
    seed=0,            # of the faces
    count=None,        # how many faces, 8192 if None
    targets=None,      # maps, one channel more: a folder or .zip with files of the same stems;
                       # of faces: "edges" or "saliency"
    part="train",      # of a root that holds exactly train/ and val/ this part is read, "" both
):
    """Load a source of pictures at one size -> Images.

    UserError when the source is missing, of another kind or empty, when more than 1 % and
    more than 10 files are broken, and when no map is brighter than middle grey."""
    if size < 1:
        raise UserError(f"--size {size}: an image has at least one pixel")
    if str(source) == "faces":
        return load_faces(size, gray, labels, seed, count, targets)
    path = Path(os.path.expanduser(source))
    source = open_images(source, " (or 'faces')", part)
    if targets is not None:
        source = Paired(source, open_images(targets, part=source.part))
    names, maps = source.names, int(targets is not None)
    if not names:
        raise UserError(f"{path}: holds no images; is it the right place? "
                        f"{'; '.join(source.notes)}".strip())
    y, classes = number_classes(source, labels)
    channels = 1 if gray else 3
    shape = (len(names), channels + maps, size, size)
    pixels = torch.empty(shape, dtype=torch.uint8) if np.prod(shape) <= cache_gb * 1e9 else None
    images = Images(size, channels, y, classes, pixels, source, maps)
    faults = find_faults(images, progress)
    images.rows = torch.tensor([i for i, why in enumerate(faults) if why is None])
    images.skipped = [name for name, why in zip(names, faults) if why is not None]
    report_skipped(path, names, faults)
    if maps:
        source.require_light()
    if progress:
        for note in source.notes:
            print(f"note: {path}: {note}", file=sys.stderr)
    return images


def choose_held_out(labels, count, seed):
    """Draw the numbers of images to hold out, fixed by seed. Each class keeps an image to
    train on, unless no class has two.

    labels (n,) int64.  count: how many at most.  -> (k,) int64, ascending"""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    labels, left, chosen = labels.tolist(), torch.bincount(labels).tolist(), []
    for i in order.tolist():
        if len(chosen) == count:
            break
        if left[labels[i]] > 1:
            left[labels[i]] -= 1
            chosen.append(i)
    return torch.tensor(chosen or order[:count].tolist()).sort().values


def note_empty_classes(images):
    """Say in one line which classes have no image to train on."""
    empty = [name for name, count in zip(images.classes, images.count_classes()) if not count]
    if empty:
        print(f"note: {len(empty)} of {len(images.classes)} classes have no image to train on: "
              f"{', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}", file=sys.stderr)


def refuse_inside(val, held, source):
    """UserError for held-out images that lie among those to train on. A root that is split
    into train/ and val/ is read as train/ alone. held, source: where both lie, or None."""
    if held is None or source is None or source.part == "train":
        return
    if is_inside(held.path, source.path):
        raise UserError(f"--val {val}: lies in --data {source.path}, so its images would be "
                        "trained on, too; put them elsewhere, or give a fraction")


def keep_fraction(images, fraction, seed):
    """A random part of some images: --fraction of the commands, in (0, 1]. -> Images"""
    if fraction == 1:
        return images
    chosen = torch.randperm(len(images), generator=seeded(seed, 7))
    return images.subset(chosen[:max(1, round(fraction * len(images)))])


def holdout(images, val, seed=0, **load_kwargs):
    """Split images into those to train on and those to measure on.

    val: a fraction in (0, 1), a number or text, for a random split fixed by seed that holds
    out 1 to 1024 images; or a source of its own, loaded at the same size and channels,
    which must have the same classes; or "auto", for val/ where the images were read from
    train/ beside it, and a fraction elsewhere.  load_kwargs: as in load_images.
    -> training Images, held-out Images
    UserError for another fraction, other classes, a single image, and as load_images."""
    if val == "auto":
        is_part = images.source is not None and images.source.part == "train"
        val = images.source.path if is_part else HELD_OUT
    try:
        fraction = float(val)
    except (TypeError, ValueError):
        gray, labels = images.channels == 1, bool(images.classes)
        # The seed + 1: not the faces of the training.
        held = load_images(val, images.size, gray, labels, seed=seed + 1, part="val",
                           **load_kwargs)
        refuse_inside(val, held.source, images.source)
        if held.classes != images.classes:
            raise UserError(f"--val {val}: its classes {held.classes} are not the data's "
                            f"{images.classes}") from None
        note_empty_classes(images)
        return images, held
    if not 0 < fraction < 1:
        raise UserError(f"--val {val}: a fraction lies between 0 and 1; or give a folder or a .zip")
    if len(images) < 2:
        raise UserError(f"--val {val}: one image cannot be split; add images, or give a folder of "
                        "held-out ones")
    count = min(max(1, round(len(images) * fraction)), 1024, len(images) - 1)
    held = choose_held_out(images.labels[images.rows], count, seed)
    is_held = torch.zeros(len(images), dtype=torch.bool)
    is_held[held] = True
    rest = images.subset((~is_held).nonzero().flatten())
    note_empty_classes(rest)
    return rest, images.subset(held)


# --- the picture --------------------------------------------------------------------------

def draw_face_sheet(size=64, seed=0):
    """Draw a face of every expression and hair style, and the maps of the last row.

    size: of a face in pixels.  -> PIL image"""
    faces = draw_faces(400, size, seed)
    rows = []
    for i, expression in enumerate(EXPRESSIONS):
        # A face with both, else one with the expression alone.
        has_style = faces.attributes["hair"][:, None] == torch.arange(len(STYLES))
        match = 2 * (faces.labels == i).int()[:, None] + has_style                   # (400, styles)
        chosen = match.argmax(0)                                                 # a face per style
        rows.append((expression, list(faces.pixels[chosen])))
    rows += [(name, list(getattr(faces, name)[chosen])) for name in EXACT]
    return draw_sheet(rows, STYLES)


if __name__ == "__main__":
    run_picture_command("Draw the built-in faces, and outlines and silhouettes of some of them.",
                        draw_face_sheet, "faces.png", size=(64, "pixels along a side of a face"),
                        seed=(0, "other seeds, other faces"))
