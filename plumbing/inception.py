"""Inception-v3, the classifier whose features FID compares (Szegedy et al. 2015,
1512.00567).

fid.py turns uint8 images into this network's input, and its features into a distance. Here
are only the network and the file of its weights, those of TensorFlow's graph of 2015-12-05.
Layers stand in a table, with the names of pytorch-fid's file, so that the published weights
load.

Shapes: B batch; input float (B, 3, 299, 299), features (B, 2048).
"""
import hashlib
import io
import sys
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.console import UserError, describe_error

# By torch.hub's convention a file's name ends with its SHA-256.
NAME = "pt_inception-2015-12-05-6726825d.pth"
SHA = "6726825d"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + NAME


# --- the table of layers: torchvision's names, the structure of the 2015 graph ------------
# A block is a set of branches with one input; their outputs are concatenated. A branch is a
# chain of poolings, of convolutions (width, kernel, stride, padding) and of FORKs, which
# are two convolutions side by side. torchvision's Inception-v3 departs from the 2015 graph
# in the poolings: blocks A, C and the first E average over real pixels only (not over the
# zero border), the last E takes a maximum. With torchvision's poolings the very same
# weights give another FID.

def average(x):
    """The mean of each pixel's 3 x 3 window, of real pixels only."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def largest(x):
    """The maximum of each pixel's 3 x 3 window."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x):
    """The maximum of every second 3 x 3 window."""
    return F.max_pool2d(x, 3, stride=2)


# A 7 x 7 kernel factored in two costs 14 weights a channel instead of 49. On the 8 x 8 grid
# the two factors of a 3 x 3 kernel stand side by side.
ROW, COLUMN = (1, 7), (7, 1)
FORK = [(384, (1, 3)), (384, (3, 1))]


def block_a(width):
    """A 35 x 35 block; width: of its pooling branch."""
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [average, (width, 1)],
    }


def block_b():
    """From 35 x 35 to 17 x 17."""
    return {
        "branch3x3": [(384, 3, 2)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
        "pool": [halve],
    }


def block_c(width):
    """A 17 x 17 block; width: inside its 7 x 7 branches."""
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, ROW), (192, COLUMN)],
        "branch7x7dbl": [(width, 1), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)],
        "branch_pool": [average, (192, 1)],
    }


def block_d():
    """From 17 x 17 to 8 x 8."""
    return {
        "branch3x3": [(192, 1), (320, 3, 2)],
        "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)],
        "pool": [halve],
    }


def block_e(pool):
    """An 8 x 8 block; pool: `average` or `largest`."""
    return {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), FORK],
        "branch3x3dbl": [(448, 1), (384, 3), FORK],
        "branch_pool": [pool, (192, 1)],
    }


LAYERS = {                                                                         # 3 x 299 x 299
    "Conv2d_1a_3x3": (32, 3, 2),
    "Conv2d_2a_3x3": (32, 3, 1, "valid"),
    "Conv2d_2b_3x3": (64, 3),
    "maxpool1": halve,
    "Conv2d_3b_1x1": (80, 1),
    "Conv2d_4a_3x3": (192, 3, 1, "valid"),
    "maxpool2": halve,                                                             # 192 x 35 x 35
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": block_b(),                                                         # 768 x 17 x 17
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": block_d(),
    "Mixed_7b": block_e(average),
    "Mixed_7c": block_e(largest),                                                   # 2048 x 8 x 8
}


# --- the network --------------------------------------------------------------------------

class BasicConv2d(nn.Sequential):
    """Convolution without bias, batch norm, ReLU. At stride 1 the grid keeps its size
    unless `padding` says otherwise."""

    def __init__(self, width_in, width, kernel, stride=1, padding=None):
        super().__init__()
        padding = padding or ("same" if stride == 1 else "valid")
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)


class Mixed(nn.Module):
    """One block of the table: (B, width_in, H, W) -> (B, self.width, H', W')."""

    def __init__(self, width_in, branches):
        super().__init__()
        self.branches, self.width = [], 0
        for name, stages in branches.items():
            chain, width = self.add_branch(name, stages, width_in)
            self.branches.append(chain)
            self.width += width

    def add_branch(self, name, stages, width):
        """Build the convolutions of one branch.

        Their names are numbered where there are several: branch3x3dbl_3a, but branch1x1.
        -> its chain, a list of lists of what runs side by side; and the width it ends
        with."""
        numbered = sum(not callable(stage) for stage in stages) > 1
        chain = []
        for i, stage in enumerate(stages, 1):
            if callable(stage):
                chain.append([stage])
                continue
            fork = stage if isinstance(stage, list) else [stage]
            letters = "ab" if isinstance(stage, list) else [""]
            convolutions = [BasicConv2d(width, *spec) for spec in fork]
            for letter, convolution in zip(letters, convolutions):
                self.add_module(name + (f"_{i}{letter}" if numbered else ""), convolution)
            chain.append(convolutions)
            width = sum(spec[0] for spec in fork)
        return chain, width

    def forward(self, x):
        out = [x] * len(self.branches)
        for i, chain in enumerate(self.branches):
            for parts in chain:
                out[i] = torch.cat([part(out[i]) for part in parts], 1)
        return torch.cat(out, 1)


class Inception(nn.Module):
    """Inception-v3 up to its pooled features: float (B, 3, 299, 299) -> (B, 2048).

    94 convolutions and 23,850,960 parameters, named as in pytorch-fid's weight file. `fc`,
    the classifier into 1008 classes, is in that file and therefore here; no feature needs
    it."""

    def __init__(self):
        super().__init__()
        width = 3
        for name, layer in LAYERS.items():
            if isinstance(layer, dict):
                self.add_module(name, Mixed(width, layer))
                width = self.get_submodule(name).width
            elif isinstance(layer, tuple):
                self.add_module(name, BasicConv2d(width, *layer))
                width = layer[0]
        self.fc = nn.Linear(width, 1008)

    def forward(self, x):
        for name, layer in LAYERS.items():
            x = layer(x) if callable(layer) else self.get_submodule(name)(x)
        return x.mean((2, 3))                                                          # (B, 2048)


# --- the weights --------------------------------------------------------------------------

def find_inception():
    """Path of the published weights: in the working folder, else in torch.hub's cache, else
    downloaded to there, once."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / NAME
    try:
        if not Path(NAME).is_file() and not cached.is_file():
            print(f"downloading {URL} to {cached}", file=sys.stderr)
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(cached), hash_prefix=SHA)
    except Exception as error:          # no network, a proxy's refusal, a full disk, a wrong hash
        raise UserError(f"FID needs the weights {NAME}, and their download failed "
                        f"({describe_error(error)}). Fetch {URL} elsewhere and put it here, "
                        f"into {cached.parent}, or pass --inception PATH; --proxy needs no "
                        "weights") from error
    return Path(NAME) if Path(NAME).is_file() else cached


def read_inception(file):
    """A file of weights -> {name: tensor}, the first 8 hex digits of its SHA-256. UserError
    for one that cannot be read."""
    try:
        content = file.read_bytes()
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not all(isinstance(name, str) and torch.is_tensor(tensor)
                   and tensor.layout == torch.strided
                   for name, tensor in weights.items()):
            raise TypeError("it holds other things than tensors and their names")
    except Exception as error:          # the system, torch, zipfile and pickle have their own
        raise UserError(f"{file}: cannot be read as a file of weights "
                        f"({type(error).__name__})") from error
    return weights, hashlib.sha256(content).hexdigest()[:8]


def load_inception(path=None):
    """Inception with its weights. -> (network in eval mode on the CPU, the first 8 hex
    digits of the file's SHA-256)

    path: None looks for the published file (`find_inception`) and accepts no other. A file
    that is named may be another one: it is used with a warning, and its hash keeps its
    numbers apart.
    UserError when a file is missing, unreadable or not this network; only
    num_batches_tracked, which inference ignores, may be absent."""
    file = find_inception() if path is None else Path(path)
    weights, sha = read_inception(file)
    if sha != SHA:
        problem = (f"{file}: its SHA-256 begins with {sha}, not {SHA}: "
                   "these are not the published weights")
        if path is None:
            raise UserError(f"{problem}; delete it to download it again, "
                            "or insist with --inception PATH")
        warnings.warn(f"{problem}, and the numbers are comparable with nobody else's")
    with torch.device("meta"):          # no memory, no random numbers: weights will be replaced
        net = Inception()
    needed = {name: tensor.shape for name, tensor in net.state_dict().items()}
    given = {name: needed[name] for name in needed if name.endswith("num_batches_tracked")}
    given |= {name: tensor.shape for name, tensor in weights.items()}
    wrong = [name for name in sorted(needed | given) if needed.get(name) != given.get(name)]
    if wrong:
        raise UserError(f"{file}: not FID's Inception; {len(wrong)} tensors are missing, "
                        f"superfluous or misshapen: {wrong[0]} ...")
    broken = [name for name, tensor in weights.items()
              if tensor.dtype.is_complex or not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{file}: not FID's Inception; {broken[0]} is not of finite numbers")
    net.to_empty(device="cpu").load_state_dict(weights, strict=False)
    return net.eval().requires_grad_(False), sha
