"""Downloads: data sets and weights that are known by a name, fetched once and kept.

`--data cifar10` is the archive that its authors publish. From the first use on it lies in
~/.cache/glimpse, or in the folder that GLIMPSE_CACHE names. DOWNLOADS at the end of this
file is the whole list. Each file has a hash there, and the public page on which the hash
stands. A file with another hash is never used, wherever it came from.

    is_published("cifar10", "data")      whether this is such a name, and no path
    fetch_published("cifar10")           [Path, ...], after a download if one is needed

A download that was cut goes on where it stopped, also when a program starts anew. Of
several processes one downloads and the others wait. GLIMPSE_MIRROR may name another server
(http://host/folder), which is laid out like the cache: NAME/FILE. The hashes stay.
"""
import hashlib
import http.client
import os
import re
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from plumbing.console import UserError, describe_error, is_first_here, replacing
from plumbing.names import is_hidden

try:
    import fcntl
except ImportError:                             # Windows: every process downloads for itself
    fcntl = None

BLOCK = 2**18                                   # bytes that are read at once
ATTEMPTS = 8                                    # how often one start of a program resumes
PAUSE = 1.0                                     # seconds before it does
PATIENCE = 30.0                                 # seconds without a byte after which it is cut


# --- what is published --------------------------------------------------------------------

@dataclass(frozen=True)
class PublishedFile:
    """A file as its authors publish it."""
    name: str                                   # in the cache, and on a mirror
    address: str
    size: int                                   # bytes
    algorithm: str                              # "md5" or "sha256"
    digest: str                                 # hex digits
    page: str                                   # the public page on which the digest stands

    def describe(self):
        """"cifar-10-python.tar.gz (170 MB, MD5 c58f...)", for errors."""
        return f"{self.name} ({self.size / 1e6:.3g} MB, {self.algorithm.upper()} {self.digest})"


@dataclass(frozen=True)
class PublishedSet:
    """What stands behind a name."""
    kind: str                                   # "data" or "vae": the option that takes the name
    licence: str                                # in a few words, or "not stated"
    files: tuple[PublishedFile, ...]
    classes: int = 0                            # how many, of data
    # (downloaded file, file to write): puts it into a form that can be read in any order.
    pack: Callable | None = None


def list_published(kind):
    """The names for an option, in words: "cifar10, fashion-mnist, pets"."""
    return ", ".join(name for name, entry in DOWNLOADS.items() if entry.kind == kind)


def is_published(path, kind):
    """Whether a path is a name of DOWNLOADS for this option. A path that exists wins."""
    entry = DOWNLOADS.get(str(path))
    return entry is not None and entry.kind == kind and not Path(path).exists()


def cache_folder():
    """Where downloads are kept."""
    return Path(os.path.expanduser(os.environ.get("GLIMPSE_CACHE") or "~/.cache/glimpse"))


def find_address(name, file):
    """The address of a file of the set `name`: the authors', or the mirror's."""
    mirror = os.environ.get("GLIMPSE_MIRROR")
    if not mirror:
        return file.address
    if not mirror.startswith(("http://", "https://")):
        raise UserError(f"GLIMPSE_MIRROR {mirror}: must begin with http:// or https://")
    return f"{mirror.rstrip('/')}/{name}/{file.name}"


# --- one download -------------------------------------------------------------------------

class PartialFile:
    """The part of a file that has come so far, and its hash. It grows at its end."""

    def __init__(self, path, algorithm):
        self.path, self.algorithm = path, algorithm
        self.file = open(path, "a+b", buffering=0)
        self.size, self.hash = 0, hashlib.new(algorithm)
        self.file.seek(0)
        while block := self.file.read(BLOCK):
            self.count(block)
        self.was_there = self.size

    def count(self, block):
        self.hash.update(block)
        self.size += len(block)

    def append(self, block):
        """UserError when it cannot be written: a full disk."""
        try:
            view = memoryview(block)
            while view:
                view = view[self.file.write(view):]
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({describe_error(error)}); make room, "
                            "or let GLIMPSE_CACHE name another folder") from error
        self.count(block)

    def restart(self):
        """Forget all that has come."""
        self.file.truncate(0)
        self.size, self.hash, self.was_there = 0, hashlib.new(self.algorithm), 0

    def close(self):
        """Everything is on the disk from here on."""
        os.fsync(self.file.fileno())
        self.file.close()


def find_range(response):
    """Where an answer begins in its file, and how long that is; None: it does not say."""
    length = response.headers.get("Content-Length", "")
    if response.status != 206:
        return 0, int(length) if length.isdigit() else None
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not found:
        return None, None
    return int(found[1]), int(found[2]) if found[2].isdigit() else None


def receive_rest(address, file, part, bar):
    """Ask for what a part lacks, and append it until all is there or the server stops.

    A server that knows no ranges sends everything, and the part begins anew. OSError or
    HTTPException of the network; UserError for a file of another length."""
    headers = {"User-Agent": "glimpse"} | ({"Range": f"bytes={part.size}-"} if part.size else {})
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        begins, length = find_range(response)
        if length not in (None, file.size):
            raise UserError(f"{address} is a file of {length} bytes, but {file.describe()} has "
                            f"{file.size}")
        if begins != part.size:
            part.restart()
            bar.reset(file.size)
        if begins not in (0, part.size):                # not what was asked for: from the start
            return
        while part.size < file.size:
            block = response.read(min(BLOCK, file.size - part.size))
            if not block:
                return
            part.append(block)
            bar.update(len(block))


def try_to_receive(address, file, part, bar):
    """`receive_rest`, once. -> None, or in a few words why it ended early"""
    try:
        receive_rest(address, file, part, bar)
    except urllib.error.HTTPError as error:
        if error.code == 416:                           # the part is longer than the file there
            part.restart()
        return f"{error.code} {error.reason}"
    except urllib.error.URLError as error:
        return describe_error(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return describe_error(error)
    return None if part.size == file.size else "the connection was cut"


def receive_file(address, file, part):
    """Receive what a part lacks, in several attempts as long as each brings something.

    -> None, or in a few words why it is not complete"""
    if part.size > file.size:
        part.restart()
    terminal = sys.stderr.isatty()
    with tqdm(desc=file.name, total=file.size, initial=part.size, unit="B", unit_scale=True,
              mininterval=0.1 if terminal else 10, miniters=1) as bar:
        for attempt in range(ATTEMPTS):
            before = part.size
            if before == file.size:
                return None
            why = try_to_receive(address, file, part, bar)
            if why is None or part.size == before:
                return why
            time.sleep(PAUSE)
    return why


def download_file(name, file, target):
    """Download a file of the set `name`. It has the name `target` when its hash is right.

    UserError, in one line: which file to put where."""
    address = find_address(name, file)
    by_hand = f"or put {file.describe()} from {file.address} into {target.parent}"
    place = target.with_name(f"{file.name}.part" if fcntl else f"{file.name}.{os.getpid()}.part")
    part = PartialFile(place, file.algorithm)
    try:
        for _ in range(2):
            why = receive_file(address, file, part)
            if why is not None:
                kept = f" after {part.size / 1e6:.3g} MB, which are kept" if part.size else ""
                raise UserError(f"{name}: {address} cannot be read{kept} ({why}); try again, "
                                f"{by_hand}")
            if part.hash.hexdigest() == file.digest:
                break
            was_resumed, found = part.was_there, part.hash.hexdigest()
            part.restart()                              # nothing of it can be trusted
            if not was_resumed:
                raise UserError(f"{name}: {address} is another file, with the "
                                f"{file.algorithm.upper()} {found}; try again, {by_hand}")
    finally:
        part.close()
        if not part.size:
            place.unlink()
    os.replace(place, target)


# --- the cache ----------------------------------------------------------------------------

@contextmanager
def hold_lock(path):
    """One process at a time. The lock ends with the process, however that ends."""
    with open(path, "ab") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process, which downloads {path.stem}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def require_digest(file, path):
    """UserError unless a file is the published one."""
    digest = hashlib.new(file.algorithm)
    with open(path, "rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    found = digest.hexdigest()
    if found != file.digest:
        raise UserError(f"{path}: is not the published file; its {file.algorithm.upper()} is "
                        f"{found}, {file.page} says {file.digest}. Remove it")


def fetch_file(name, file, folder):
    """The path of a file of the set `name`, in its folder of the cache.

    UserError when it cannot be downloaded, and when another file has its name."""
    path = folder / file.name
    if not path.exists():
        with hold_lock(folder / f"{file.name}.lock"):
            if not path.exists():                       # another process may have been faster
                download_file(name, file, path)
                return path
    require_digest(file, path)
    return path


def fetch_published(name, entry=None):
    """The files behind a name, downloaded where they are not in the cache.

    entry: a PublishedSet; None: that of DOWNLOADS.  -> [Path, ...]
    UserError, in one line, which says what to put where."""
    entry = entry or DOWNLOADS[name]
    folder = cache_folder() / name
    packed = folder / f"{name}.zip"
    if entry.pack and packed.exists():
        return [packed]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_there = all((folder / file.name).exists() for file in entry.files)
        if not is_there and is_first_here():
            size = sum(file.size for file in entry.files) / 1e6
            print(f"{name}: {size:.3g} MB are fetched once, into {folder}; "
                  f"licence: {entry.licence}", file=sys.stderr)
        paths = [fetch_file(name, file, folder) for file in entry.files]
        if entry.pack:
            with hold_lock(folder / f"{packed.name}.lock"):
                if not packed.exists():
                    entry.pack(paths[0], packed)
            return [packed]
    except OSError as error:
        raise UserError(f"{folder} cannot be used ({describe_error(error)}); let GLIMPSE_CACHE "
                        "name another folder") from error
    return paths


def pack_pets(archive, path):
    """The pictures of the pets' archive as a .zip with a folder for each breed.

    A picture's name is its breed and a number. A .tar.gz is read from its start alone."""
    with (tarfile.open(archive) as tar, replacing(path) as file,
          zipfile.ZipFile(file, "w") as pictures):
        for member in tqdm(tar, desc=f"packing {path.name}", unit="file",
                           mininterval=0.1 if sys.stderr.isatty() else 10):
            picture = member.name.rpartition("/")[2]
            if member.isfile() and picture.endswith(".jpg") and not is_hidden(picture):
                breed = picture.rpartition("_")[0]
                info = zipfile.ZipInfo(f"{breed}/{picture}")
                pictures.writestr(info, tar.extractfile(member).read())


# --- the table ----------------------------------------------------------------------------

CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
FASHION_PAGE = "https://github.com/zalandoresearch/fashion-mnist"
FASHION_FILES = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
# The authors of the pets state no hash. TensorFlow Datasets does, with the size.
PETS_PAGE = ("https://github.com/tensorflow/datasets/blob/0e9172b5521d740222f9aca5a7a92bcc546546ce/"
             "tensorflow_datasets/datasets/oxford_iiit_pet/checksums.tsv")
# The page of a copy, in MuseV's folder vae/sd-vae-ft-mse.
SD_PAGE = ("https://huggingface.co/TMElyralab/MuseV/blob/a20536b51aad8191907a51c23bdcc3fd9047ae8e/"
           "vae/sd-vae-ft-mse/diffusion_pytorch_model.safetensors")

DOWNLOADS = {
    # 50,000 training images of 32 x 32
    "cifar10": PublishedSet("data", "not stated", (
        PublishedFile(
            "cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            170498071, "md5", "c58f30108f718f92721af3b95e74349a", CIFAR_PAGE),
    ), classes=10),
    # 60,000 training images of 28 x 28, grey
    "fashion-mnist": PublishedSet("data", "MIT", (
        PublishedFile(
            "train-images-idx3-ubyte.gz", f"{FASHION_FILES}/train-images-idx3-ubyte.gz",
            26421880, "md5", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", FASHION_PAGE),
        PublishedFile(
            "train-labels-idx1-ubyte.gz", f"{FASHION_FILES}/train-labels-idx1-ubyte.gz",
            29515, "md5", "25c81989df183df01b3e8a0aad5dffbe", FASHION_PAGE),
    ), classes=10),
    # Oxford-IIIT Pet: 7,390 photographs of cats and dogs, most of about 500 x 375
    "pets": PublishedSet("data", "CC BY-SA 4.0", (
        PublishedFile(
            "images.tar.gz", "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz",
            791918971, "sha256",
            "67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d", PETS_PAGE),
    ), classes=37, pack=pack_pets),
    # Stable Diffusion's autoencoder, with the decoder that was tuned on the squared error
    "sd": PublishedSet("vae", "MIT", (
        PublishedFile(
            "diffusion_pytorch_model.safetensors",
            "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main/"
            "diffusion_pytorch_model.safetensors",
            334643276, "sha256",
            "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815", SD_PAGE),
    )),
}
