"""Arrays: a .npz of a stranger, read without trust.

The idea. A .npz is a zip of arrays. The header of each claims a type and a shape, and
memory is taken for what it claims. So the claims are read first. They must fit what the zip
says that it holds, the zip must fit its own size, and all of it this machine's memory. Only
what is wanted is read, and nothing that would run code.
"""
import math
import zipfile

import numpy as np

from plumbing.console import UserError, describe_error

HIGHEST_RATIO = 1032                    # deflate packs no better, whatever a zip claims


def read_arrays(path, wanted):
    """Some arrays of a .npz. -> {name: array}, those of `wanted` that it holds

    UserError for a file that is none, claims more than it holds, or needs too much
    memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            members = {name: members[name] for name in wanted if name in members}
            total = sum(check_claims(archive, info) for info in members.values())
            free = count_free_memory()
            if total > free:
                raise UserError(f"{path}: its arrays take {total / 1e9:.1f} GB, {free / 1e9:.1f} "
                                "are free; give fewer images in a file")
            return {name: read_member(archive, info) for name, info in members.items()}
    except UserError:
        raise
    except Exception as error:          # zipfile, zlib, numpy and the system have their own
        raise UserError(f"{path}: is no folder, .zip or .npz that can be read "
                        f"({describe_error(error)})") from error


def check_claims(archive, info):
    """The bytes that an array will take. ValueError when its header claims what the file
    does not hold, or Python objects."""
    name = info.filename.removesuffix(".npy")
    if info.file_size > HIGHEST_RATIO * info.compress_size + 1024:
        raise ValueError(f"{name} claims more than the file holds")
    with archive.open(info) as file:
        shape, dtype = read_header(file)
        size, left = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
    if dtype.hasobject or size != left:
        what = "Python objects" if dtype.hasobject else f"the shape {shape}"
        raise ValueError(f"{name} claims {what:.60}, which the file does not hold")
    return size


def read_header(file):
    """The shape and the type that the header of a .npy claims."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if any(side < 0 for side in shape):
        raise ValueError(f"the shape {shape} has a negative side")
    return shape, dtype


def read_member(archive, info):
    """An array of the archive."""
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def count_free_memory():
    """Bytes that can be taken without disturbing others; infinite where nobody tells."""
    try:
        with open("/proc/meminfo", "rb") as file:
            facts = dict(line.split(b":") for line in file.read().splitlines())
        return 1024 * int(facts[b"MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return math.inf
