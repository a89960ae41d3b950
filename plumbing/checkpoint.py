"""A run's folder and its checkpoints, which are whole or absent.

The idea. A training run must survive `kill -9`. So a checkpoint is written beside its
place, forced to disk and renamed onto it: a reader sees the old file or the new one, never
half of one. It holds plain dicts, tensors, numbers and strings and is read with
weights_only, so that a file from a stranger cannot run code.

    runs/NAME/      config.json  log.csv  loss.png  samples/000500.png  last.pt  000500.pt
    runs/latest     names the newest run that has a checkpoint
    a checkpoint    version, config, meta (how to build the model, class names, data_std,
                    plan and progress), step, images, seconds, model, ema, optimizer,
                    scaler, rng
"""
import argparse
import contextlib
import os
import shutil
from datetime import datetime
from pathlib import Path

import torch

from plumbing.console import UserError, describe_error, replacing
from plumbing.layout import is_count, require_checkpoint, require_parts
from plumbing.released import find_released, import_released

try:
    import fcntl
except ImportError:                             # Windows: nothing keeps two processes apart
    fcntl = None

VERSION = 2                                     # of the layout above and of what it means
LATEST = Path("runs/latest")
CONTINUED = ("model", "ema", "optimizer", "scaler", "rng", "seconds")       # what a resume reads


def newest_checkpoint():
    """The newest run's last.pt. UserError when there is none."""
    name = os.fsdecode(LATEST.read_bytes()).strip("\r\n") if LATEST.is_file() else ""
    if not name:
        raise UserError(f"no run found: {LATEST} does not exist or is empty; "
                        "train one first (python train.py) or name a checkpoint")
    return Path(name) / "last.pt"


def find_checkpoint(path):
    """A checkpoint's own path, from that of the file, of a run's folder or of
    runs/latest."""
    path = Path(path)
    if path == LATEST:
        return newest_checkpoint()
    return path / "last.pt" if path.is_dir() else path


def read_checkpoint(path, *parts):
    """The checkpoint's dict, on the CPU.

    path: as in `find_checkpoint`. parts: what the caller needs of it (plumbing/layout.py).
    A released file of DiT or MaskDiT becomes one (plumbing/released.py). UserError for a
    file that is missing, damaged, of a newer version or not laid out like a checkpoint."""
    path = find_checkpoint(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; train one first (python train.py) "
                        "or give another path")
    try:
        # DiT's train.py keeps its options in a Namespace, which only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint, perhaps cut short "
                        f"({type(error).__name__}); use another one of its folder") from None
    is_ours = isinstance(ckpt, dict) and {"version", "meta"} <= ckpt.keys()
    if isinstance(ckpt, dict) and not is_ours and find_released(ckpt):
        ckpt, is_ours = import_released(ckpt, path, *parts) | dict(version=VERSION), True
    if not is_ours:
        raise UserError(f"{path} is not a checkpoint of this program: no version, no meta")
    version = ckpt["version"]
    if is_count(version) and version > VERSION:
        raise UserError(f"{path} was made by version {version}, this program reads up to "
                        f"{VERSION}: update the program")
    require_checkpoint(ckpt, path)
    require_parts(ckpt, path, *parts)
    return ckpt


def checkpoint_step(path):
    """The step of one of our own checkpoints, read without its weights."""
    is_mapped = str(path).isprintable()         # torch maps no name that is no Unicode
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)["step"]


def save_atomic(value, path):
    """torch.save that leaves the whole new file or the old one, whatever happens in
    between."""
    with replacing(path, shared=False) as file:         # a run has one writer: `open_run_folder`
        torch.save(value, file)


def name_newest(out):
    """Write runs/latest, whole or not at all. Where it cannot be written, runs go on."""
    with contextlib.suppress(OSError, UserError):
        LATEST.parent.mkdir(exist_ok=True)
        with replacing(LATEST) as file:
            file.write(os.fsencode(out))


def unlink_link(path):
    """Remove a link, so that nothing is written to where it leads."""
    if path.is_symlink():
        path.unlink()


def make_run_folder(out=None):
    """Make the folder of a run: `out`, or a new one named after the time. -> Path"""
    now, k = f"{datetime.now():%Y%m%d-%H%M%S}", 1
    while True:
        folder = Path(out or f"runs/{now}{f'-{k}' * (k > 1)}")
        try:
            folder.mkdir(parents=True, exist_ok=out is not None)
            return folder
        except FileExistsError:                         # two runs began in one second
            if out is not None:
                raise UserError(f"--out {out} is no folder; give another name") from None
            k += 1
        except OSError as error:
            raise UserError(f"{'--out ' if out else ''}{folder} cannot be made "
                            f"({describe_error(error)}); give another --out") from None


def open_run_folder(out=None):
    """Make the folder of a run and keep other processes from training there while this one
    lives.

    -> its path, and its config.json, which is also the lock: keep it open. UserError when
    another process trains there."""
    folder = make_run_folder(out)
    try:
        LATEST.parent.mkdir(exist_ok=True)
        writable = os.access(LATEST.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        print(f"note: {LATEST} cannot be written: name this run with --from or --ckpt later")
    unlink_link(folder / "config.json")
    config = open(folder / "config.json", "a")
    if fcntl:
        try:                                # not flock: worker processes would inherit and keep it
            fcntl.lockf(config, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            config.close()
            raise UserError(f"--out {out}: another process is training there; give another --out, "
                            "or wait for its end") from None
        except OSError:                     # a file system without locks
            pass
    return folder, config


def keep_copy(path, copy_to):
    """A second name for a finished checkpoint, whole or not at all, without a second copy
    on disk where the file system allows it."""
    temporary = copy_to.with_name(f"{copy_to.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, copy_to)


def list_copies(folder):
    """A run's numbered checkpoints, the newest one last."""
    numbered = [path for path in folder.glob("*.pt") if path.stem.isdecimal()]
    return sorted(numbered, key=lambda path: int(path.stem))    # 1000000 comes after 999500


def find_last(folder):
    """A run's last checkpoint, or None: last.pt. Where that is gone, or was never made (the
    number is written first), the newest numbered one."""
    last = folder / "last.pt"
    return last if last.exists() else next(reversed(list_copies(folder)), None)


def remove_old_copies(folder, keep):
    """Of a run's numbered checkpoints only the newest `keep` stay; 0: all of them."""
    for path in list_copies(folder)[:-keep] if keep else []:
        path.unlink(missing_ok=True)
