"""Inception-v3, the classifier whose features FID compares (1512.00567), with the weights of TensorFlow's graph of 2015-12-05.

fid.py turns uint8 images into this network's input and its features into a distance. Here is only the network and the file of
its weights: layers as a table, names as in pytorch-fid's file, so that the published weights load.

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

NAME = "pt_inception-2015-12-05-6726825d.pth"       # by torch.hub's convention a name ends with its file's SHA-256
SHA = "6726825d"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + NAME


# --- the network: torchvision's names, the structure of the 2015 graph --------------------------------------------------------
# A block is a set of branches with one input, concatenated; a branch is a chain of poolings, of convolutions (width, kernel,
# stride, padding) and of FORKs, two convolutions side by side. torchvision's Inception-v3 departs from the 2015 graph in the
# poolings: blocks A, C and the first E average over real pixels only (not over the zero border), the last E takes a maximum.
# With torchvision's poolings the very same weights give another FID.

def average(x): return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
def largest(x): return F.max_pool2d(x, 3, stride=1, padding=1)
def halve(x): return F.max_pool2d(x, 3, stride=2)


ROW, COLUMN = (1, 7), (7, 1)                        # 7 x 7 factored in two costs 14 weights a channel instead of 49 ...
FORK = [(384, (1, 3)), (384, (3, 1))]               # ... and on the 8 x 8 grid the two factors stand side by side

def block_a(width): return {
    "branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    "branch_pool": [average, (width, 1)]}
def block_b(): return {
    "branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "pool": [halve]}
def block_c(c): return {
    "branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, ROW), (192, COLUMN)],
    "branch7x7dbl": [(c, 1), (c, COLUMN), (c, ROW), (c, COLUMN), (192, ROW)], "branch_pool": [average, (192, 1)]}
def block_d(): return {
    "branch3x3": [(192, 1), (320, 3, 2)], "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)], "pool": [halve]}
def block_e(pool): return {
    "branch1x1": [(320, 1)], "branch3x3": [(384, 1), FORK], "branch3x3dbl": [(448, 1), (384, 3), FORK],
    "branch_pool": [pool, (192, 1)]}

LAYERS = {                                                                                                   # 3 x 299 x 299
    "Conv2d_1a_3x3": (32, 3, 2), "Conv2d_2a_3x3": (32, 3, 1, "valid"), "Conv2d_2b_3x3": (64, 3), "maxpool1": halve,
    "Conv2d_3b_1x1": (80, 1), "Conv2d_4a_3x3": (192, 3, 1, "valid"), "maxpool2": halve,                      # 192 x 35 x 35
    "Mixed_5b": block_a(32), "Mixed_5c": block_a(64), "Mixed_5d": block_a(64), "Mixed_6a": block_b(),        # 768 x 17 x 17
    "Mixed_6b": block_c(128), "Mixed_6c": block_c(160), "Mixed_6d": block_c(160), "Mixed_6e": block_c(192),
    "Mixed_7a": block_d(), "Mixed_7b": block_e(average), "Mixed_7c": block_e(largest)}                       # 2048 x 8 x 8


class BasicConv2d(nn.Sequential):
    """Convolution without bias, batch norm, ReLU. At stride 1 the grid keeps its size unless `padding` says otherwise."""

    def __init__(self, width_in, width, kernel, stride=1, padding=None):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding or ("same" if stride == 1 else "valid"), bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)


class Mixed(nn.Module):
    """One block of the table: (B, width_in, H, W) -> (B, self.width, H', W')."""

    def __init__(self, width_in, branches):
        super().__init__()
        self.branches, self.width = [], 0
        for name, stages in branches.items():
            chain, width, numbered = [], width_in, sum(not callable(stage) for stage in stages) > 1
            for i, stage in enumerate(stages, 1):
                chain.append([stage])
                if not callable(stage):
                    specs, letters = (stage, "ab") if isinstance(stage, list) else ([stage], [""])
                    chain[-1] = [BasicConv2d(width, *spec) for spec in specs]
                    for letter, conv in zip(letters, chain[-1]):        # branch3x3dbl_3a, but branch1x1
                        self.add_module(name + (f"_{i}{letter}" if numbered else ""), conv)
                    width = sum(spec[0] for spec in specs)
            self.branches.append(chain)
            self.width += width

    def forward(self, x):
        out = [x] * len(self.branches)
        for i, chain in enumerate(self.branches):
            for parts in chain:
                out[i] = torch.cat([part(out[i]) for part in parts], 1)
        return torch.cat(out, 1)


class Inception(nn.Module):
    """Inception-v3 up to its pooled features: a protocol's output, float (B, 3, 299, 299) -> (B, 2048).

    94 convolutions and 23,850,960 parameters, named as in pytorch-fid's weight file. `fc`, the classifier into 1008 classes,
    is in that file and therefore here; no feature needs it."""

    def __init__(self):
        super().__init__()
        width = 3
        for name, layer in LAYERS.items():
            if not callable(layer):
                self.add_module(name, Mixed(width, layer) if isinstance(layer, dict) else BasicConv2d(width, *layer))
                width = layer[0] if isinstance(layer, tuple) else self.get_submodule(name).width
        self.fc = nn.Linear(width, 1008)

    def forward(self, x):
        for name, layer in LAYERS.items():
            x = layer(x) if callable(layer) else self.get_submodule(name)(x)
        return x.mean((2, 3))                                                                                # (B, 2048)


def find_inception():
    """Path of the published weights: in the working folder, else in torch.hub's cache, else downloaded to there, once."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / NAME
    try:
        if not Path(NAME).is_file() and not cached.is_file():
            print(f"downloading {URL} to {cached}", file=sys.stderr)
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(cached), hash_prefix=SHA)
    except Exception as error:                      # no network, a proxy's refusal, a full disk, a wrong hash, ...
        raise UserError(f"FID needs the weights {NAME}, and their download failed ({describe_error(error)}). Fetch {URL} elsewhere and "
                        f"put it here, into {cached.parent}, or pass --inception PATH; --proxy needs no weights") from error
    return Path(NAME) if Path(NAME).is_file() else cached


def load_inception(path=None):
    """-> (Inception in eval mode on the CPU, the first 8 hex digits of the file's SHA-256).

    Without `path` the published file is looked for (`find_inception`) and no other accepted. A file named by `path` may be
    another one: it is used with a warning, and its hash keeps its numbers apart. UserError when a file is missing, unreadable or
    not this network; only num_batches_tracked, which inference ignores, may be absent."""
    file = find_inception() if path is None else Path(path)
    try:
        content = file.read_bytes()
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        given = {name: tensor.shape for name, tensor in weights.items()}
    except Exception as error:                      # the system, torch, zipfile and pickle each have their own
        raise UserError(f"{file}: cannot be read as a file of weights ({type(error).__name__})") from error
    sha = hashlib.sha256(content).hexdigest()[:8]
    if sha != SHA:
        problem = f"{file}: its SHA-256 begins with {sha}, not {SHA}: these are not the published weights"
        if path is None:
            raise UserError(problem + "; delete it to download it again, or insist with --inception PATH")
        warnings.warn(problem + ", and the numbers are comparable with nobody else's")
    with torch.device("meta"):                      # neither memory nor random numbers for weights that will be replaced
        net = Inception()
    needed = {name: tensor.shape for name, tensor in net.state_dict().items()}
    given = {name: shape for name, shape in needed.items() if name.endswith("num_batches_tracked")} | given
    wrong = [name for name in sorted(needed | given) if needed.get(name) != given.get(name)]
    if wrong:
        raise UserError(f"{file}: not FID's Inception; {len(wrong)} tensors are missing, superfluous or misshapen: {wrong[0]} ...")
    net.to_empty(device="cpu").load_state_dict(weights, strict=False)
    return net.eval().requires_grad_(False), sha
