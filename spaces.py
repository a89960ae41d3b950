"""Latents: encode once. What an autoencoder makes of a data set is kept on disk, and training never runs the encoder again.

The idea (LMD, arXiv 2312.07971). In the latents of Stable Diffusion's autoencoder a ViT-B step costs a third of MAE's, but its encoder
costs ten such steps: encoded anew at every step, "3 x faster" becomes 4 x slower. The encoder is frozen, so its answers can be kept.

    strip       s = [ encode(x) | mirror(encode(mirror(x))) ]                   (L, h, 2w): both flips of an image, side by side
    encode      the left half of a strip. Mirroring the *strip* brings encode(mirror(x)) to the left, so a training loop that mirrors x and then
                encodes it does not know whether x is an image or a strip: train.py's six lines stay as they are
    file        runs/latents/KEY.npy, float32, read through a memory map by all processes; KEY = SHA-256 of the weights' hash and the transform
                (the pixels, their size, channels and whether they are mirrored), so another autoencoder or other images are another file

Only the mean of the posterior is kept, as `LatentSpace.encode` returns it: nothing here samples it, so a log-variance would double the file
for nothing. And in float32, although half of that would do: a cached latent is then the encoder's answer, not its rounding.

A file grows chunk by chunk under another name, is forced to disk after each, and gets its own name when it is whole. After kill -9 the whole
chunks are kept, but the last one, which may be torn. A lock on it makes one process encode while all others, of this run or of another, wait.
Nothing else depends on a finished file: it may be deleted, and is made again when it is wanted.

Shapes: n images, B batch, L latent channels, h = w places along a side; x (B, C, H, W) in [-1, 1].
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
    import fcntl                                                                # POSIX only: elsewhere two processes would both encode, each its own file
except ImportError:
    fcntl = None

CHUNK = 256                                                                     # images between two visits to the disk


# --- spaces ---

class PixelSpace:
    """Images as they are. `factor` pixels of the image make one place of z."""
    name, factor, sha = "pixel", 1, ""

    def __init__(self, channels):
        self.channels = channels

    def encode(self, x):
        """(B, C, H, W) in [-1, 1] -> the same."""
        return x

    def decode(self, z):
        """(B, C, H, W) -> the same, in [-1, 1] up to the network's errors."""
        return z


def build_latent_space(channels, weights):
    """The LatentSpace of a file of weights, for images of so many channels. UserError when it was made for others."""
    space = load_vae(weights)
    if space.vae.channels != channels:
        raise UserError(f"--vae {weights}: takes images of {space.vae.channels} channel(s), these have {channels}: "
                        f"{'give --gray' if channels == 3 else 'leave --gray out'}, or train another one with python vae.py")
    return space


SPACES = {                                                                      # (channels of the images, file of weights) -> a space
    "pixel": lambda channels, weights=None: PixelSpace(channels),
    "latent": build_latent_space}


# --- a data set of strips, and the space that reads them -----------------------------------------------------------------------------

class Latents:
    """The latents of an Images, in its place: take, batches, len, .classes are the same; x is strips (B, L, h, 2w or w) in float32."""

    def __init__(self, images, strips, places):
        self.size, self.channels, self.maps, self.classes, self.labels = images.size, images.channels, 0, images.classes, images.labels
        self.rows, self.strips, self.places = images.rows, strips, places       # image i: row rows[i] of the labels, places[i] of the strips

    def __len__(self):
        return len(self.rows)

    def take(self, indices):
        """1-D indices (B) -> strips float32, y int64 (B,)."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return torch.from_numpy(self.strips[self.places[indices].numpy()]), self.labels[self.rows[indices]]

    def batches(self, order, workers=0):
        """An iterable of 1-D indices -> an iterator of (strips, y). No workers: there is nothing to decode."""
        return map(self.take, order)


class CachedSpace:
    """A LatentSpace whose encoder has already run."""

    def __init__(self, space):
        self.inner, self.name, self.factor, self.channels, self.sha = space, space.name, space.factor, space.channels, space.sha

    def encode(self, strip):
        """(B, L, h, w or 2w) -> z (B, L, h, w): the left half. Images are square, so w = h."""
        return strip[..., :strip.shape[2]]

    def decode(self, z):
        """z (B, L, h, w) -> x (B, C, f h, f w)."""
        return self.inner.decode(z)


# --- the file ------------------------------------------------------------------------------------------------------------------------

def encode_both_flips(x, space, flip):
    """x (B, C, H, W) in [-1, 1] -> (B, L, h, 2w) with both flips, (B, L, h, w) without."""
    return torch.cat([space.encode(x), space.encode(x.flip(3)).flip(3)], 3) if flip else space.encode(x)


def cache_key(images, space, flip):
    """16 hex digits that name these images, seen through this autoencoder.

    Pixels in memory speak for themselves. Those left on disk are known by the names, sizes and times of their files."""
    sha = hashlib.sha256(repr((space.sha, images.size, images.channels, flip)).encode())
    if images.pixels is not None:
        for rows in images.rows.split(4096):
            sha.update(images.pixels[rows].numpy().tobytes())
    else:
        path = Path(images.source.path)
        for row in images.rows.tolist():
            name = images.source.names[row]
            stat = (path / name if path.is_dir() else path).stat()
            sha.update(repr((name, stat.st_size, stat.st_mtime_ns)).encode())
    return sha.hexdigest()[:16]


def write_cache(path, images, space, flip, device, workers, progress):
    """Make the file `path`, or wait for the process that is making it. -> how many images this call encoded."""
    side = images.size // space.factor
    shape = (space.channels, side, side * (1 + flip))
    part, row = path.with_suffix(".part" if fcntl else f".{os.getpid()}.part"), 4 * int(np.prod(shape))         # bytes of a strip
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "a+b") as f:
        if fcntl:
            try:
                fcntl.flock(f, fcntl.LOCK_EX)                                   # released with the process, however it ends
            except OSError as error:
                raise UserError(f"{path.parent} is on a file system without locks ({describe_error(error)}); give --latents a folder on another one") from None
        if path.exists():                                                       # another one was faster; our handle is its file, or a new, empty one
            if part.exists() and part.stat().st_size == 0:
                part.unlink()
            return 0
        header = BytesIO()
        np.lib.format.write_array_header_1_0(header, dict(descr="<f4", fortran_order=False, shape=(len(images), *shape)))
        start = len(header.getvalue())
        done = max(0, (part.stat().st_size - start) // (row * CHUNK) - 1) * CHUNK      # the last chunk may have reached the disk in part
        f.truncate(start + done * row if done else 0)
        if not done:
            f.write(header.getvalue())
        chunks = torch.arange(done, len(images)).split(CHUNK)
        with tqdm(desc="encoding", total=len(images), initial=done, unit="image", disable=not progress,
                  mininterval=0.5 if sys.stderr.isatty() else 20) as bar:
            for chunk, (x, _) in zip(chunks, images.batches(chunks, workers)):
                f.write(encode_both_flips(to_float(x).to(device), space, flip).cpu().numpy().astype("<f4").tobytes())
                f.flush()
                os.fsync(f.fileno())
                bar.update(len(chunk))
        if fcntl:
            os.replace(part, path)                                              # while we have the lock
    if not fcntl:
        os.replace(part, path)                                                  # Windows renames no open file
    return len(images) - done


def encode_once(parts, space, folder, flip, device="cpu", workers=0, progress=True):
    """The latents of some data sets, encoded now or read from `folder` -> ([Latents, ...], CachedSpace): stand-ins for both.

    parts: Images; those that share their pixels (training and held-out images of one source) share a file, whatever belongs to which.
    flip: keep both flips. Bytes: 4 L h w (1 + flip) an image. OSError when the disk is full: start again, what is done is kept."""
    done = []
    for images in parts:
        kin = [other for other in parts if other.pixels is images.pixels and other.source is images.source]
        everything = copy.copy(images)
        everything.rows = torch.cat([other.rows for other in kin]).unique()     # sorted
        path = Path(folder) / f"{cache_key(everything, space, flip)}.npy"
        if not path.exists():
            begun = perf_counter()
            n = write_cache(path, everything, space, flip, device, workers, progress)
            if progress and n:
                print(f"encoded {n} images in {perf_counter() - begun:.1f} s, once for this and later runs: {path}, {path.stat().st_size / 1e6:.0f} MB", flush=True)
        try:
            strips = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise UserError(f"{path} is damaged ({describe_error(error)}): delete it, it is made again") from None
        done.append(Latents(images, strips, torch.searchsorted(everything.rows, images.rows)))
    return done, CachedSpace(space)
