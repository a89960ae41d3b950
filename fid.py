"""How far apart are two sets of images? FID, and honest proxies that need no weights.

The idea (Heusel et al. 2017, arXiv 1706.08500). Turn every image into the 2048 pooled
features of a fixed classifier. Describe a set by the mean m and the covariance S of its
features. Measure how far apart the two Gaussians are (the Fréchet Inception distance):

    FID = |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

The classifier is Inception-v3 (Szegedy et al. 2015, arXiv 1512.00567) with the weights of
TensorFlow's graph of 2015-12-05; plumbing/inception.py holds its layers. Other weights,
another resize or another n give another number. Hence three rules:

    protocol   how a uint8 image becomes a 299 x 299 input. Two are in use, and on CIFAR
               they differ by 7.5 grey levels. Size and shape are measured, too: --size
               measures both sets as training sees them. Saved statistics record protocol,
               weights and size; sets that differ in one are never compared.
    n          two samples of ONE distribution are at a distance of about constant / n, not
               0 (Chong & Forsyth 2020, arXiv 1911.07023). Numbers at different n cannot be
               compared, and n <= 2048 measures mostly this bias.
    float64    for sums, covariances and roots: the formula is a small difference of large
               terms.

    python fid.py samples.zip images/           # FID; weights (95 MB) are downloaded once
    python fid.py images/ --save stats.npz      # keep a reference's statistics
    python fid.py samples.zip stats.npz         # and compare with them
    python fid.py samples.zip images/ --proxy   # no weights and no FID: three distances

Shapes: n, m images in a set, B batch, C = 1 or 3 channels, d features (2048), k images a
side in a proxy. Images are uint8 (n, C, H, W).
"""
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import plumbing  # before torch: how its threads wait

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from plumbing.arrays import count_free_memory, read_arrays
from plumbing.console import (
    UserError, build_parser, describe_error, parse_path, refuse_unused, replacing, run_command)
from plumbing.downloads import is_published, list_published
from plumbing.faces import draw_faces
from plumbing.images import to_float
from plumbing.inception import load_inception
from plumbing.machine import pick_device, require_one_process
from plumbing.pictures import crop_square, to_8_bit, turn_upright
from plumbing.sources import open_images
from plumbing.writer import refuse_overwriting

# --- the protocol: uint8 (B, 3, H, W) -> float (B, 3, 299, 299) ---------------------------


def resize_pytorch_fid(x):
    """half-pixel bilinear to 299, no antialias, x / 127.5 - 1"""
    x = F.interpolate(x.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
    return 2 * x - 1


def resize_tf1(x):
    """TensorFlow 1 bilinear to 299, src = dst * scale, (x - 128) / 128"""
    x = x.float()
    for axis in (2, 3):
        size = x.shape[axis]
        # No half pixel is added: the picture moves up and left.
        place = torch.arange(299, device=x.device) * (size / 299)
        low = place.long()
        high = (low + 1).clamp(max=size - 1)
        part = (place - low).view((-1, 1) if axis == 2 else (-1,))
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), part)
    return (x - 128) / 128


PROTOCOLS = {"pytorch-fid": resize_pytorch_fid, "tf1": resize_tf1}


# --- moments and distance -----------------------------------------------------------------

class Moments:
    """Mean and covariance of features that arrive in batches: one pass, float64, the same
    for every way to cut the batches."""

    def __init__(self):
        self.n, self.total, self.outer = 0, 0, 0

    def add(self, x):
        """Take in some rows of features.

        x (B, d): of any float type. All sums are of x - pilot, the first batch's mean; else
        the covariance would be a difference of large sums."""
        x = x.double()
        self.pilot = self.pilot if self.n else x.mean(0)
        x = x - self.pilot
        self.n += len(x)
        self.total = self.total + x.sum(0)                                                  # (d,)
        self.outer = self.outer + x.T @ x                                                 # (d, d)

    def finish(self):
        """-> mean (d,), covariance (d, d) with divisor n - 1. UserError for fewer than 2
        rows or features that are not finite."""
        if self.n < 2:
            raise UserError(f"n = {self.n}: a covariance needs at least 2 images")
        shift = self.total / self.n
        sigma = (self.outer - self.n * torch.outer(shift, shift)) / (self.n - 1)
        if not sigma.isfinite().all():
            raise UserError("the features are not finite: are the weights broken?")
        return self.pilot + shift, sigma


def frechet(m1, S1, m2, S2):
    """FID's formula for two Gaussians.

    m1, m2 (d,): means. S1, S2 (d, d): covariances. Tensors or arrays. -> float >= 0

    S1 S2 is not symmetric but similar to R S2 R with R = S1^(1/2), which is. So two
    symmetric eigenproblems do, without complex numbers. Where n <= d, zero eigenvalues come
    out slightly negative: they are clamped, and no eps is added."""
    m1, S1, m2, S2 = (torch.as_tensor(v, dtype=torch.float64) for v in (m1, S1, m2, S2))
    w, V = torch.linalg.eigh(S1)
    R = (V * w.clamp(min=0).sqrt()) @ V.T
    root = torch.linalg.eigvalsh(R @ S2 @ R).clamp(min=0).sqrt().sum()      # tr (S1 S2)^(1/2)
    distance = (m1 - m2).square().sum() + S1.trace() + S2.trace() - 2 * root             # [FID]
    return max(0.0, distance.item())


def frechet_features(X1, X2):
    """FID's formula for the moments of two sets of features.

    X1 (n1, d), X2 (n2, d): at least 2 rows each. -> float >= 0

    With S = A^T A, tr (S1 S2)^(1/2) is the nuclear norm of A1 A2^T (n1, n2). For n <= d
    this is the smaller problem (0.8 s instead of 7 at n = 1000, d = 2048). It is the
    exacter one, too: no root is taken of a rounded zero."""
    X1, X2 = X1.double(), X2.double()
    m1, m2 = X1.mean(0), X2.mean(0)
    A1, A2 = ((X - m) / (len(X) - 1) ** 0.5 for X, m in ((X1, m1), (X2, m2)))
    if max(len(X1), len(X2)) > X1.shape[1]:
        return frechet(m1, A1.T @ A1, m2, A2.T @ A2)
    root = torch.linalg.svdvals(A1 @ A2.T).sum()
    distance = (m1 - m2).square().sum() + A1.square().sum() + A2.square().sum() - 2 * root
    return max(0.0, distance.item())


@dataclass(frozen=True)
class Statistics:
    """What FID needs of a set of images, and what says with which others it may be
    compared. A saved .npz has these keys."""
    mu: np.ndarray              # (d,) float64
    sigma: np.ndarray           # (d, d) float64
    n: int
    protocol: str               # a name in PROTOCOLS
    weights: str                # the first 8 hex digits of the weight file's SHA-256
    size: int = 0               # of the centred squares that were measured; 0: images as they are


def statistics(
    images,                     # has a length; images[i] is uint8 (C, H, W), sizes may differ
    net,                        # net and weights come from `load_inception`
    weights,
    protocol="pytorch-fid",     # a name in PROTOCOLS
    device="cpu",
    batch=50,                   # images in one pass
):
    """Inception's moments of a set of images. -> Statistics

    images: a tensor uint8 (n, C, H, W), or anything else that can be indexed like one."""
    net, result = net.to(device), Moments()
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # TF32 keeps 3 digits
    with torch.no_grad(), exact, ThreadPoolExecutor() as threads:   # Pillow decodes in parallel
        for some in tqdm(torch.arange(len(images)).split(batch), unit="batch", disable=None):
            group = threads.map(images.__getitem__, some.tolist())
            group = [x.to(device).expand(1, 3, -1, -1) for x in group]
            inputs = torch.cat([PROTOCOLS[protocol](x) for x in group])         # (B, 3, 299, 299)
            result.add(net(inputs).cpu())                                              # (B, 2048)
    mu, sigma = result.finish()
    return Statistics(mu.numpy(), sigma.numpy(), len(images), protocol, weights)


def refuse_mixing(a, b):
    """UserError unless the triples (protocol, weights, size) of two sets are the same."""
    if a != b:
        ways = [f"protocol {protocol}, weights {weights} and "
                + (f"size {size}" if size else "images of their own size")
                for protocol, weights, size in (a, b)]
        raise UserError(f"not comparable: one side has {ways[0]}, the other {ways[1]}")


def way_of(measured):
    """How Statistics were measured: (protocol, weights, size)."""
    return measured.protocol, measured.weights, measured.size


def fid(a, b):
    """FID of two Statistics. -> float

    UserError if protocol, weights or size differ; a warning where n makes it mostly
    bias."""
    refuse_mixing(way_of(a), way_of(b))
    n, d = min(a.n, b.n), len(a.mu)
    if d != len(b.mu):
        raise UserError(f"not comparable: one side has {d} features, the other {len(b.mu)}")
    if n <= d:
        warnings.warn(f"n = {n} images for {d} features: mostly bias, "
                      "compare only with values at the same n")
    return frechet(a.mu, a.sigma, b.mu, b.sigma)


# --- proxies: three views that need no weights --------------------------------------------
# None is FID, and none is enough alone. Random convolutions see noise, blur and collapse
# but hardly a broken structure. Averages see structure but no texture. Patches see texture
# and nothing larger. Each stands beside its floor. Look at the pictures, too.

def random_conv(images):
    """Features of an untrained network: mean and deviation of every channel of 4 random
    convolutions, always the same ones.

    images (n, C, H, W): uint8; gray counts as RGB.
    -> (n, 512)
    Random networks order generators much as trained ones (Lee et al. 2022, 2208.09218)."""
    most = max(1, 256 * 64 ** 2 // max(64 ** 2, images[0, 0].numel()))  # bounds the memory
    if len(images) > most:
        return torch.cat([random_conv(some) for some in images.split(most)])
    g = torch.Generator().manual_seed(0)
    x = to_float(images).expand(-1, 3, -1, -1)
    rows = []
    for width, stride in ((32, 1), (64, 2), (64, 2), (96, 2)):
        kernel = torch.randn(width, x.shape[1], 3, 3, generator=g)
        kernel = kernel * (2 / (9 * x.shape[1])) ** 0.5                 # He: ReLU keeps the scale
        x = F.relu(F.conv2d(x, kernel, stride=stride, padding=1))
        rows += [x.mean((2, 3)), x.std((2, 3), correction=0)]
    return torch.cat(rows, 1)


def average_pixels(images):
    """Coarse pictures: uint8 (n, C, H, W) -> (n, 64 C), the means of 8 x 8 squares."""
    return F.adaptive_avg_pool2d(to_float(images), 8).flatten(1)


def keep_images(images):
    """The images themselves, for a distance that is not one of rows of features."""
    return images


def laplacian_bands(x):
    """The bands of a Laplacian pyramid, finest first; the last is what is left.

    x (k, C, H, W): float. Yields (k, C, H', W') while a side has at least 32 pixels."""
    while min(x.shape[2:]) >= 32:
        small = F.avg_pool2d(x, 2)
        large = F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
        yield x - large
        x = small
    yield x


def cut_patches(x, size, top, left):
    """Cut squares out of some images.

    x (k, C, H, W): images. top, left (k, each): the squares' corners.
    -> (k each, C, size, size)"""
    rows = torch.arange(len(x))[:, None]
    return x.unfold(2, size, 1).unfold(3, size, 1)[rows, :, top, left].flatten(0, 1)


def sliced_wasserstein(a, b, patch=7, directions=64, points=8192):
    """Mean 1-Wasserstein distance of two sets' patches, over directions and pyramid levels.

    a, b (k, C, H, W): uint8.
    -> float
    Karras et al. 2018 (arXiv 1710.10196), with a departure: a and b are both scaled by b's
    mean and deviation, not each by its own, so that lost contrast counts. The same places
    and directions serve both, so equal sets are at distance 0."""
    g = torch.Generator().manual_seed(0)
    each = -(-points // len(a))                                         # patches of an image
    levels = []
    for band in laplacian_bands(to_float(torch.cat([a, b]))):
        size = min(patch, *band.shape[2:])
        top, left = (torch.randint(side - size + 1, (len(a), each), generator=g)
                     for side in band.shape[2:])
        p, q = (cut_patches(half, size, top, left) for half in band.split(len(a)))
        mean = q.mean((0, 2, 3), keepdim=True)
        scale = q.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
        lines = F.normalize(torch.randn(q[0].numel(), directions, generator=g), dim=0)
        p, q = ((lines.T @ ((v - mean) / scale).flatten(1).T).sort(1).values
                for v in (p, q))                                           # (directions, points)
        levels.append((p - q).abs().mean())
    return torch.stack(levels).mean().item()


# name -> (images -> rows, distance of two sets of rows)
PROXIES = {
    "random-conv": (random_conv, frechet_features),
    "pixel": (average_pixels, frechet_features),
    "swd": (keep_images, sliced_wasserstein),
}
ROUNDS = 4


def refuse_strange_sets(a, b):
    """UserError unless two sets of images can be compared by `proxy_distances`."""
    numbers = a.dtype == b.dtype == torch.uint8
    if not (numbers and a.ndim == 4 and a.shape[1:] == b.shape[1:]
            and a.shape[1] in (1, 3) and min(a.shape[2:]) >= 8):
        raise UserError("proxy: wants two sets (n, C, H, W) of uint8, C 1 or 3, of one size of at "
                        f"least 8 x 8, not {tuple(a.shape)} {a.dtype} and "
                        f"{tuple(b.shape)} {b.dtype}")
    if min(len(a), len(b) // 2) < 2:
        raise UserError(f"proxy: {len(a)} and {len(b)} images are too few; "
                        "at least 2 of A and 4 of B are needed")


def proxy_distances(a, b, seed=0):
    """Distances of a set to a reference that need no weights.

    a (n, C, H, W): the set. b (m, C, H, W): the reference. Both uint8, C 1 or 3, of one
    size of at least 8 x 8.
    -> {name: (value, floor)} for every name in PROXIES
    UserError for other shapes and fewer than 2 images of a or 4 of b.

    Every such distance has a bias that falls with n, so all is measured at one k, the
    smaller of n and m // 2. In each of 4 rounds b is cut at random into disjoint b1, b2 of
    k images, and a is thinned to k:

        floor = D(b1, b2)        value = (D(a, b1) + D(a, b2)) / 2

    A value at its floor cannot be told from the reference. One clearly below it means that
    a holds images of b. Compare at equal k only."""
    refuse_strange_sets(a, b)
    k = min(len(a), len(b) // 2)
    g = torch.Generator().manual_seed(seed)
    cuts = []
    for _ in range(ROUNDS):
        some = torch.randperm(len(a), generator=g)[:k]
        cuts.append((some, *torch.randperm(len(b), generator=g)[:2 * k].split(k)))
    result = {}
    for name, (make_rows, distance) in PROXIES.items():
        A, B = make_rows(a), make_rows(b)
        value = sum(distance(A[i], B[half]) for i, *halves in cuts for half in halves)
        floor = sum(distance(B[i], B[j]) for _, i, j in cuts)
        result[name] = value / (2 * ROUNDS), floor / ROUNDS
    return result


# --- what is measured ---------------------------------------------------------------------

class MeasuredPictures:
    """At most n images of a source: picture(i) is a PIL picture, [i] a tensor uint8
    (3, H, W).

    They are drawn at random, for the first n of a sorted folder would be its first
    class."""

    def __init__(
        self,
        names,                  # of all images
        read,                   # opens a name with Pillow
        n,                      # at most so many; None: all
        seed,                   # of the draw
        # True: turned as EXIF says and laid over white where transparent, as in training.
        # False: neither, as pytorch-fid reads it; but 16 bits become 8, there they become
        # white.
        flat=False,
        side=0,                 # of the centred square that is measured; 0: images as they are
    ):
        g = torch.Generator().manual_seed(seed)
        keep = torch.randperm(len(names), generator=g)[:n].sort().values
        self.names = [names[i] for i in keep]
        self.read, self.flat, self.side = read, flat, side

    def __len__(self):
        return len(self.names)

    def picture(self, i):
        """Image i as a PIL picture in RGB. UserError if it is broken: training may skip a
        broken image, a measurement must not."""
        with self.opening(i) as picture:
            if self.side:
                return Image.fromarray(crop_square(picture, self.side).transpose(1, 2, 0))
            if self.flat or picture.mode[0] in "IF":
                picture = to_8_bit(turn_upright(picture))
            return picture.convert("RGB")

    def shape(self):
        """Width and height of the first image, before any square is cut."""
        with self.opening(0) as picture:
            return picture.size

    @contextmanager
    def opening(self, i):
        """Image i as it is in its file; an error in the block is a UserError with its
        name."""
        try:
            with self.read(self.names[i]) as picture:
                yield picture
        except Exception as error:
            raise UserError(f"{self.names[i]}: cannot be decoded ({describe_error(error)}); "
                            "fix or delete it") from error

    def __getitem__(self, i):
        return torch.from_numpy(np.array(self.picture(i))).permute(2, 0, 1)


def read_pixels(pixels, i):
    """Picture i of an array uint8 (n, H, W, C), C 1 or 3, as a PIL picture in RGB."""
    return Image.fromarray(pixels[i].repeat(3 // pixels.shape[3], axis=2))


def open_measured(
    path,           # what a user names, see below
    n=None,         # at most so many images; None: all
    seed=0,         # of their draw
    size=32,        # of drawn faces
    flat=False,     # as in MeasuredPictures
    side=0,         # as in MeasuredPictures
    proxy=False,    # whether a .npz of statistics and images is opened for its images
):
    """Open what a user names on the command line.

    path: a folder, .zip or .npz of images, a .npz of saved statistics, "faces": 2048 drawn
    ones of `size` pixels, which no training has seen; or the name of a data set that is
    downloaded. Of a root that holds exactly train/ and val/, train/ is measured.
    -> MeasuredPictures, or Statistics. UserError for anything else."""
    if path == "faces":
        try:
            faces = draw_faces(2048, size, seed=2**20)
        except ValueError as error:
            raise UserError(f"faces: {error}") from None
        pixels = faces.pixels.permute(0, 2, 3, 1).numpy()
        return MeasuredPictures(range(len(pixels)), partial(read_pixels, pixels), n, seed)
    is_name = is_published(path, "data")
    path = Path(path)
    if is_name or path.is_dir() or path.suffix.lower() == ".zip":
        source = open_images(path, part="train")
        if not source.names:
            raise UserError(f"{path}: holds no images")
        if source.part:
            warnings.warn(f"{path}: is split into train/ and val/; {source.part}/ is measured")
        names = leave_out_comparisons(path, source.names)
        return MeasuredPictures(names, source.picture, n, seed, flat, side)
    refuse_other_files(path)
    arrays = read_arrays(path, ("images", "arr_0", *Statistics.__dataclass_fields__))
    pixels = arrays.pop("images", arrays.pop("arr_0", None))
    if "mu" in arrays and not (proxy and pixels is not None):
        return parse_statistics(path, arrays, 0 if pixels is None else len(np.atleast_1d(pixels)))
    pixels = np.empty(0) if pixels is None else pixels
    channels = {pixels.shape[1], pixels.shape[3]} & {1, 3} if pixels.ndim == 4 else set()
    if pixels.dtype != np.uint8 or not pixels.size or not channels:
        raise UserError(f"{path}: wants uint8 images (n, H, W, C) or (n, C, H, W), C 1 or 3, "
                        "under the key images or arr_0")
    pixels = pixels if pixels.shape[3] in (1, 3) else pixels.transpose(0, 2, 3, 1)
    return MeasuredPictures(range(len(pixels)), partial(read_pixels, pixels), n, seed, flat, side)


def leave_out_comparisons(path, names):
    """Names of images without each NAME-compare.png that lies beside its NAME.png:
    restore.py writes both, and only the result is to be measured."""
    every, ending = set(names), "-compare.png"
    kept = [name for name in names
            if not (name.endswith(ending) and f"{name.removesuffix(ending)}.png" in every)]
    if len(kept) < len(names):
        warnings.warn(f"{path}: {len(names) - len(kept)} pictures NAME-compare.png are left out, "
                      "for each has a NAME.png beside it")
    return kept


def refuse_other_files(path):
    """UserError, with what to do, for a path that is no .npz."""
    ending = path.suffix.lower()
    if ending == ".npy":
        raise UserError(f"{path}: one bare array; give a .npz, "
                        "which np.savez('images.npz', images=array) writes")
    if ending in (".gz", ".tgz", ".tar", ".7z", ".rar", ".xz", ".bz2"):
        raise UserError(f"{path}: unpack it, and give the folder")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is a pipe or a device; give a folder, a .zip or a .npz")
    if path.is_file() and ending in Image.registered_extensions():
        raise UserError(f"{path}: is one picture; give a folder of pictures, a .zip or a .npz")


def parse_statistics(path, arrays, images=0):
    """The arrays of a saved .npz -> Statistics. UserError where they are not this
    program's.

    images: how many images lie beside them."""
    remedy = f"make them with python fid.py IMAGES --save {path.stem}-measured.npz"
    if images:
        remedy = f"it holds {images} images, too: take them out, and {remedy}"
    values = {key: v.item() if v.ndim == 0 else v for key, v in arrays.items()}
    lacking = [name for name in ("mu", "sigma", "n", "protocol", "weights") if name not in values]
    if lacking:
        raise UserError(f"{path}: statistics without a record of n, protocol and weights are "
                        f"comparable with nothing ({lacking[0]} is missing); {remedy}")
    for name, is_right in STATISTICS.items():
        if name in values and not is_right(values[name]):
            raise UserError(f"{path}: {name} must be {is_right.__doc__}; {remedy}")
    mu, sigma = (values[name].astype(np.float64) for name in ("mu", "sigma"))
    if not is_covariance(sigma, len(mu)):
        raise UserError(f"{path}: sigma must be the covariance of {len(mu)} features, symmetric "
                        f"and without a negative variance; {remedy}")
    return Statistics(**values | dict(mu=mu, sigma=sigma))


def is_moments(value):
    """an array of finite numbers"""
    is_real = isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size > 0
    return is_real and bool(np.isfinite(value).all()) and float(np.abs(value).max()) < 1e30


def is_mean(value):
    """one row of finite numbers"""
    return is_moments(value) and value.ndim == 1


def is_covariance(sigma, features):
    """Whether a matrix may be the covariance of so many features."""
    if sigma.shape != (features, features):
        return False
    slack = 1e-3 * np.abs(sigma).max()                          # of half precision, at most
    return bool(np.abs(sigma - sigma.T).max() <= slack and sigma.diagonal().min() >= -slack)


def is_image_count(value):
    """a whole number of at least 2"""
    return type(value) is int and 2 <= value < 2**53


def is_protocol(value):
    """a protocol of this program"""
    return isinstance(value, str) and value in PROTOCOLS


def is_digest(value):
    """the first digits of the weights' SHA-256"""
    return isinstance(value, str) and len(value) <= 64 and value.isalnum()


def is_square(value):
    """the side of a square, or 0"""
    return type(value) is int and 0 <= value < 2**16


# What a saved .npz must hold; the first line of each docstring says it.
STATISTICS = {"mu": is_mean, "sigma": is_moments, "n": is_image_count, "protocol": is_protocol,
              "weights": is_digest, "size": is_square}


# --- the command --------------------------------------------------------------------------

def parser():
    p = build_parser("FID, or proxies for it, of images A to a reference B.")
    p.add_argument("A", type=parse_path,
                   help="a folder, a .zip or a .npz of images, or a .npz of saved statistics")
    p.add_argument("B", nargs="?", type=parse_path,
                   help="the reference, likewise, or faces for the built-in ones, or a name that "
                        f"is downloaded ({list_published('data')}); may be left out with --save")
    p.add_argument("--inception", metavar="PATH", type=parse_path,
                   help="weights; None: the working folder, torch.hub's cache, or a download")
    p.add_argument("--protocol", choices=PROTOCOLS, default="pytorch-fid",
                   help="how images become Inception's input")
    p.add_argument("--proxy", action="store_true",
                   help="three distances that need no weights, instead of FID")
    p.add_argument("--save", metavar="PATH.npz", type=parse_path,
                   help="keep the statistics of A")
    p.add_argument("--size", type=int,
                   help="measure centred squares of so many pixels, as training sees them; None: "
                        "images as they are, with --proxy squares of the smaller side of A and B")
    p.add_argument("--n", type=int,
                   help="at most so many images of each set, drawn at random; None: all")
    p.add_argument("--batch", type=int, default=50, help="images in one pass through Inception")
    p.add_argument("--device", default="auto",
                   help="where Inception runs: auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--seed", type=int, default=0,
                   help="of the draw of --n and of the proxies' rounds")
    return p


def print_proxy(o, a, b):
    """Every proxy of image sources a and b beside its floor, on standard output."""
    if isinstance(a, Statistics) or isinstance(b, Statistics):
        raise UserError("--proxy needs images on both sides: saved statistics have none")
    sides = min(a.shape()), min(b.shape())
    size = o.size or min(sides)
    if sides[0] > 2 * sides[1]:
        warnings.warn(f"A has much larger pictures ({sides[0]} pixels) than B ({sides[1]}): is the "
                      "order samples, reference?")
    require_memory(len(a) + len(b), size)
    a, b = (torch.stack([torch.tensor(crop_square(source.picture(i), size))
                         for i in range(len(source))]) for source in (a, b))
    for name, (value, floor) in proxy_distances(a, b, o.seed).items():
        ratio = value / floor if floor else float("nan")
        print(f"proxy/{name:12} {value:10.5f}   floor {floor:10.5f}   ratio {ratio:.2f}")
    print(f"  {o.A}: n {len(a)}\n  {o.B}: n {len(b)}")
    what = "--size" if o.size else "the smaller side of A and B"
    print(f"  k {min(len(a), len(b) // 2)} images a side, all cut to their centred square "
          f"and resized to {size} x {size}, {what}")
    print("  This is not FID. Compare only at the same B, k and size.")


def require_memory(count, size):
    """UserError when the proxies of so many images in all would not fit into memory."""
    needed = 30 * count * size ** 2                     # bytes; 3 for the images, 24 for the swd
    free = count_free_memory()
    if needed > free:
        raise UserError(f"--proxy: {count} images of {size} x {size} pixels need about "
                        f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; give --size 256 or --n")


def check_measurement(o):
    """UserError for arguments that do not go together."""
    if o.proxy:
        refuse_unused(o, parser(), ("inception", "protocol", "batch", "device"),
                      "--proxy needs no network")
    if o.B is None and (o.proxy or not o.save):
        raise UserError("B is missing: python fid.py A B (A alone goes with --save only)")
    if o.save:
        here = Path(o.save).parent.is_dir()
        if o.proxy or not o.save.endswith(".npz") or not here:
            raise UserError(f"--save {o.save}: wants a name that ends with .npz in a folder that "
                            "exists, and no --proxy")
    refuse_overwriting({"--save": o.save}, {"A": o.A, "B": o.B, "--inception": o.inception})
    if o.batch < 1 or (o.n is not None and o.n < 2):
        raise UserError("--batch must be at least 1, and --n at least 2")
    if not -2 ** 63 < o.seed < 2 ** 63:
        raise UserError(f"--seed {o.seed}: must have less than 64 bits")
    if o.size is not None and not 8 <= o.size <= 4096:
        raise UserError(f"--size {o.size}: must be 8 to 4096 pixels")


def measure_statistics(o, sets, device):
    """Statistics in place of images: {path: MeasuredPictures or Statistics} -> {path:
    Statistics}. Two saved statistics need no weights."""
    images = {path: s for path, s in sets.items() if isinstance(s, MeasuredPictures)}
    if not images:
        refuse_unused(o, parser(), ("inception", "protocol", "size", "n", "batch", "device"),
                      "both sets are saved statistics already")
        return sets
    net, weights = load_inception(o.inception)
    for saved in sets.values():
        if isinstance(saved, Statistics):       # before the long computation, not after it
            refuse_mixing(way_of(saved), (o.protocol, weights, o.size or 0))
    measured = {}
    for path, some in images.items():
        result = statistics(some, net, weights, o.protocol, device, o.batch)
        measured[path] = replace(result, size=o.size or 0)
    return sets | measured


def warn_of_sizes(o, sets):
    """A warning where A and B have images of another size or shape: FID measures both."""
    shapes = [s.shape() for s in sets.values() if isinstance(s, MeasuredPictures)]
    if o.size or o.proxy or len(set(shapes)) < 2:
        return
    texts = [f"{width} x {height}" for width, height in shapes]
    warnings.warn(f"A has {texts[0]} pixels, B {texts[1]}: size and shape are measured, too; "
                  f"--size {max(8, min(shapes[0]))} measures both as training sees them, as "
                  "centred squares")


def open_sets(o):
    """A and B of the command line. -> {path: MeasuredPictures or Statistics}"""
    how = dict(flat=o.proxy or bool(o.size), side=o.size or 0, proxy=o.proxy)
    sets = {o.A: open_measured(o.A, o.n, o.seed, o.size or 32, **how)}
    if o.B:
        is_images = isinstance(sets[o.A], MeasuredPictures)
        size = o.size or (min(256, *sets[o.A].shape()) if is_images else 32)       # of drawn faces
        sets[o.B] = open_measured(o.B, o.n, o.seed, size, **how)
    warn_of_sizes(o, sets)
    return sets


def run_measurement(o):
    """The command's work, from parsed arguments."""
    require_one_process("fid.py")
    check_measurement(o)
    device = pick_device(o.device)
    sets = open_sets(o)
    if o.proxy:
        return print_proxy(o, sets[o.A], sets[o.B])

    with replacing(o.save) if o.save else nullcontext() as file:
        sets = measure_statistics(o, sets, device)
        if o.save:
            np.savez(file, **vars(sets[o.A]))
    if o.B:
        print(f"FID {fid(sets[o.A], sets[o.B]):.4f}")
    for path, s in sets.items():
        how = f"{PROTOCOLS[s.protocol].__doc__}{f' of squares of {s.size} pixels' * bool(s.size)}"
        print(f"  {path}: n {s.n}, protocol {s.protocol} ({how}), weights {s.weights}")


def main(argv=None):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        run_measurement(parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
