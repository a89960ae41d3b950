"""Spaces: where diffusion happens, in pixels or in latents; and latents encoded once.

The idea. A *space* has two methods. `encode` takes images to what the network sees.
`decode` takes them back. A training step need not know which space it is given.

    pixel      encode(x) = x,  decode(z) = z
    latent     encode(x) = z: f x f pixels become one place (vae.py)   LMD, arXiv 2312.07971

Kept latents. In the latents of Stable Diffusion's autoencoder a step of ViT-B costs a third
of MAE's, but its encoder costs ten such steps. Encoded anew at every step, "3 x faster"
becomes 4 x slower. The encoder is frozen. So its answers are kept on disk, and training
never runs it.

    kept       k = [ encode(x) | mirror(encode(mirror(x))) ]   (L, h, 2w): both flips of an
               image side by side; without flips encode(x) alone, (L, h, w)
    encode     of a CachedSpace: the left half of k. To mirror k brings encode(mirror(x)) to
               the left. So a training loop that mirrors x and then encodes it need not know
               whether x is an image or a kept latent.
    file       runs/latents/KEY.npy in float32. All processes read it through a memory map.
               KEY is a hash of the weights, the pixels, their size and channels, and
               whether both flips are kept: other images are another file.

Only the mean of the posterior is kept, as `LatentSpace.encode` returns it, because nothing
here samples it. It is kept in float32: a kept latent is the encoder's answer, not its
rounding.

A file grows chunk by chunk under another name and is forced to disk after each chunk. It
gets its own name when it is complete. After kill -9 all complete chunks are kept, but for
the last one, which may be damaged. A lock makes one process encode while all others wait,
those of other runs too. Nothing else depends on a finished file: it may be deleted, and is
made again when needed.

Shapes: n images, B batch, C channels of an image, L latent channels, H x W pixels,
h = w places along a side, f pixels per place; x (B, C, H, W) in [-1, 1]; z (B, L, h, w).
"""
import copy
import hashlib
import os
import sys
from io import BytesIO
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from tqdm import tqdm

from plumbing.console import UserError, describe_error
from plumbing.images import to_float
from vae import load_vae

try:
    import fcntl
except ImportError:       # not POSIX: two processes would both encode, each into a file of its own
    fcntl = None

CHUNK = 256                                                    # images between two writes to disk


# --- spaces -------------------------------------------------------------------------------

class PixelSpace:
    """Images as they are.

    .factor: pixels of an image per place of z along a side.  .sha: names the weights, ""
    for none."""
    name, factor, sha = "pixel", 1, ""

    def __init__(self, channels, weights=None):
        """For images of so many channels. weights: of the other space, None here."""
        self.channels = channels

    def encode(self, x):
        """x (B, C, H, W) in [-1, 1] -> the same."""
        return x

    def decode(self, z):
        """z (B, C, H, W) -> the same, in [-1, 1] up to the network's errors."""
        return z


def build_latent_space(channels, weights):
    """Build the LatentSpace of a file of weights for images of so many channels.

    UserError when the autoencoder was made for images of other channels."""
    space = load_vae(weights)
    if space.vae.channels != channels:
        advice = "give --gray" if channels == 3 else "leave --gray out"
        raise UserError(f"--vae {weights}: takes images of {space.vae.channels} channel(s), these "
                        f"have {channels}: {advice}, or train another one with python vae.py")
    return space


# --- kept latents, in the place of images -------------------------------------------------

class Latents:
    """The kept latents of a data.Images, in its place.

    It has the same take, batches, len and .classes. Its x are kept latents
    (B, L, h, 2w or w) in float32."""

    def __init__(self, images, kept, places):
        """kept (all, L, h, 2w or w): an array.  places (n,): image i is kept[places[i]]."""
        self.channels, self.maps = images.channels, 0
        self.classes, self.labels = images.classes, images.labels
        self.rows = images.rows                            # image i has the label labels[rows[i]]
        self.kept, self.places = kept, places

    def __len__(self):
        return len(self.rows)

    def take(self, indices):
        """1-D indices (B,) -> kept latents float32 (B, L, h, 2w or w), y int64 (B,)."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        kept = torch.from_numpy(self.kept[self.places[indices].numpy()])
        return kept, self.labels[self.rows[indices]]

    def batches(self, order, workers=0):
        """An iterable of 1-D indices -> an iterator of (kept latents, y).

        There is nothing to decode, so no workers are started."""
        return map(self.take, order)


class CachedSpace:
    """A LatentSpace whose encoder has already run."""

    def __init__(self, space):
        self.inner, self.name, self.sha = space, space.name, space.sha
        self.factor, self.channels = space.factor, space.channels

    def encode(self, kept):
        """kept (B, L, h, w or 2w) -> z (B, L, h, w): the left half, for h = w."""
        return kept[..., :kept.shape[2]]

    def decode(self, z):
        """z (B, L, h, w) -> x (B, C, f h, f w)."""
        return self.inner.decode(z)


# --- the file -----------------------------------------------------------------------------

def encode_both_flips(x, space, flip):
    """Encode images, and their mirror images if flip.

    x (B, C, H, W) in [-1, 1].  -> (B, L, h, 2w) with both flips, (B, L, h, w) without"""
    if not flip:
        return space.encode(x)
    return torch.cat([space.encode(x), space.encode(x.flip(3)).flip(3)], 3)


def cache_key(images, space, flip):
    """Name these images, seen through this autoencoder.

    Pixels in memory are hashed themselves. Those left on disk are known by the names, sizes
    and times of their files.  -> 16 hex digits"""
    sha = hashlib.sha256(repr((space.sha, images.size, images.channels, flip)).encode())
    if images.pixels is not None:
        for rows in images.rows.split(4096):
            sha.update(images.pixels[rows].numpy().tobytes())
    else:
        for row in images.rows.tolist():
            name = images.source.names[row]
            stat = images.source.file_of(name).stat()
            sha.update(repr((name, stat.st_size, stat.st_mtime_ns)).encode())
    return sha.hexdigest()[:16]


def kept_shape(images, space, flip):
    """The shape of the array of kept latents: (n, L, h, 2w), without flips (n, L, h, w)."""
    side = images.size // space.factor
    return len(images), space.channels, side, side * (1 + flip)


def open_latents(path, shape):
    """The array of a file of kept latents, as a memory map. UserError unless it is of this
    shape."""
    try:
        kept = np.load(path, mmap_mode="r")
        if (kept.shape, kept.dtype) != (shape, np.float32):
            raise ValueError(f"{kept.dtype} {kept.shape}, not float32 {shape}")
    except (ValueError, EOFError, AttributeError) as error:     # EOFError: it is empty
        raise UserError(f"{path} is damaged ({describe_error(error)}): delete it, "
                        "it is made again") from None
    return kept


def build_header(shape):
    """The first bytes of a .npy file of float32 with this shape."""
    header = BytesIO()
    description = dict(descr="<f4", fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def wait_for_lock(file, folder):
    """Lock an open file. The lock is released with the process, however that ends.

    UserError when the file system of the folder has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(f"{folder} is on a file system without locks ({describe_error(error)}); "
                        "give --latents a folder on another one") from None


def start_or_continue(file, shape):
    """Cut a partly written file after its last chunk that is certain, or write its header.

    shape: of the array, (n, ...).  -> how many images it already holds"""
    header = build_header(shape)
    row = 4 * int(np.prod(shape[1:]))                                           # bytes of an image
    chunks = (os.fstat(file.fileno()).st_size - len(header)) // (row * CHUNK)
    done = max(0, chunks - 1) * CHUNK      # the last chunk may have reached the disk only in part
    file.truncate(len(header) + done * row if done else 0)
    if not done:
        file.write(header)
    return done


def append_latents(
    file,           # open for appending
    images,         # data.Images
    done,           # how many of them are in the file
    encode,         # x (B, C, H, W) -> latents
    workers,        # processes that decode images
    progress,       # whether a bar is shown
):
    """Encode the images from number `done` on, chunk by chunk, each forced to disk.

    encode: x uint8 (B, C, H, W) -> an array (B, L, h, 2w or w).  progress: show a bar."""
    chunks = torch.arange(done, len(images)).split(CHUNK)
    with tqdm(desc="encoding", total=len(images), initial=done, unit="image", disable=not progress,
              mininterval=0.5 if sys.stderr.isatty() else 20) as bar:
        for chunk, (x, y) in zip(chunks, images.batches(chunks, workers)):
            if not torch.equal(y, images.labels[images.rows[chunk]]):       # see Images.decode
                raise UserError("an image of another class would take the place of one that "
                                "cannot be read; repair it or remove it")
            file.write(encode(x).astype("<f4").tobytes())
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(chunk))


def write_cache(
    path,            # the file to make
    images,          # data.Images
    space,           # LatentSpace
    flip,            # whether to keep both flips
    device,          # where to encode
    workers,         # processes that decode images
    progress,        # whether to show a bar
):
    """Make the file of kept latents, or wait for the process that is making it.

    -> how many images this call encoded
    UserError when the file system has no locks; OSError when the disk is full."""
    part = path.with_suffix(".part" if fcntl else f".{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.is_symlink():                           # a link to elsewhere is replaced, not followed
        part.unlink()

    def encode(x):
        return encode_both_flips(to_float(x).to(device), space, flip).cpu().numpy()

    with open(part, "a+b") as file:
        if fcntl:
            wait_for_lock(file, path.parent)
        if path.exists():
            # Another process was faster. Our handle is its file, or a new, empty one.
            if part.exists() and part.stat().st_size == 0:
                part.unlink()
            return 0
        done = start_or_continue(file, kept_shape(images, space, flip))
        append_latents(file, images, done, encode, workers, progress)
        if fcntl:
            os.replace(part, path)                                         # while we have the lock
    if not fcntl:
        os.replace(part, path)                                    # Windows renames no open file
    return len(images) - done


def merge_rows(images, parts):
    """All images of those data sets that share their pixels with one of them.

    images: one of parts.  parts: several data.Images.  -> data.Images, rows ascending"""
    same = [other for other in parts
            if other.pixels is images.pixels and other.source is images.source]
    merged = copy.copy(images)
    merged.rows = torch.cat([other.rows for other in same]).unique()                      # sorted
    return merged


def encode_once(
    parts,             # several data.Images
    space,             # LatentSpace
    folder,            # where the files are
    flip,              # whether to keep both flips
    device="cpu",      # where to encode
    workers=0,         # processes that decode images
    progress=True,     # whether to show a bar and to tell how long it took
):
    """Encode some data sets now, or read their latents from the folder.

    Data sets that share their pixels (training and held-out images of one source) share a
    file, whichever image belongs to which. A file has 4 L h w (1 + flip) bytes per image.
    -> [Latents, ...], CachedSpace: they take the places of parts and space
    UserError for a damaged file; OSError when the disk is full: then start again, what is
    done is kept."""
    latents = []
    for images in parts:
        merged = merge_rows(images, parts)
        path = Path(folder) / f"{cache_key(merged, space, flip)}.npy"
        if not path.exists():
            started = perf_counter()
            count = write_cache(path, merged, space, flip, device, workers, progress)
            if progress and count:
                seconds, megabytes = perf_counter() - started, path.stat().st_size / 1e6
                print(f"encoded {count} images in {seconds:.1f} s, once for this and later runs: "
                      f"{path}, {megabytes:.0f} MB", flush=True)
        kept = open_latents(path, kept_shape(merged, space, flip))
        latents.append(Latents(images, kept, torch.searchsorted(merged.rows, images.rows)))
    return latents, CachedSpace(space)


# (channels of the images, file of weights) -> a space
SPACES = {"pixel": PixelSpace, "latent": build_latent_space}
