"""A run's folder: checkpoints that are whole or absent, a log without gap or repeat, and its picture.

The idea. A training run must survive `kill -9`. So a checkpoint is written beside its place, forced to disk and renamed onto it: a reader
sees the old file or the new one, never half of one. It holds plain dicts, tensors, numbers and strings and is read with weights_only, so
a file from a stranger cannot run code. What ran after the last checkpoint runs again, so the log is cut back to it first.

    runs/NAME/   config.json   log.csv   loss.png   samples/000500.png   last.pt   000500.pt          runs/latest names the newest run
    a checkpoint: version, config, meta (how to rebuild the model, class names, data std, plan), step, images, seconds,
                  model, ema, optimizer, scaler, rng
"""
import os
import shutil
from datetime import datetime
from pathlib import Path

import torch

from plumbing.console import UserError, replacing

try:
    import fcntl
except ImportError:                                                             # Windows: nothing keeps two processes apart
    fcntl = None

VERSION = 1                                                                     # of the layout above
# --- checkpoints -----------------------------------------------------------------------------------------------------------------

LATEST = Path("runs/latest")                                                    # names the newest run that has a checkpoint


def newest_checkpoint():
    """The newest run's last.pt. UserError when there is none."""
    name = LATEST.read_text().strip() if LATEST.exists() else ""
    if not name:
        raise UserError(f"no run found: {LATEST} does not exist or is empty; train one first (python train.py) or name a checkpoint")
    return Path(name) / "last.pt"


def read_checkpoint(path):
    """The checkpoint's dict, on the CPU; plain data only (weights_only), so a file from a stranger cannot run code."""
    path = Path(path)
    path = newest_checkpoint() if path == LATEST else path / "last.pt" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist; train one first (python train.py) or give another path")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint, perhaps cut short ({type(error).__name__}); use another one of its folder") from None
    if not isinstance(ckpt, dict) or "model" not in ckpt or "meta" not in ckpt or ckpt.get("version") != VERSION:
        raise UserError(f"{path} is not a checkpoint of this program's version {VERSION}")
    return ckpt


def save_atomic(value, path):
    """torch.save that is either the whole new file or the old one, whatever happens in between."""
    with replacing(path, shared=False) as file:                                 # a run has one writer: `claim`
        torch.save(value, file)


def name_newest(out):
    """Write runs/latest, whole or not at all."""
    LATEST.parent.mkdir(exist_ok=True)
    with replacing(LATEST) as file:
        file.write(str(out).encode())


def open_run_folder(out=None):
    """Make the folder of a run, of a new name when `out` is None, and keep other processes from training there while this one lives.
    -> its path, and its config.json, which is also the lock: keep it open. UserError when another process is there."""
    now, k = f"{datetime.now():%Y%m%d-%H%M%S}", 1
    while True:
        folder = Path(out or f"runs/{now}{f'-{k}' * (k > 1)}")
        try:
            folder.mkdir(parents=True, exist_ok=out is not None)
            break
        except FileExistsError:                                                 # two runs began in one second
            if out is not None:
                raise UserError(f"--out {out} is no folder; give another name") from None
            k += 1
    LATEST.parent.mkdir(exist_ok=True)                                          # where `name_newest` will write: if not, then not after an hour
    config = open(folder / "config.json", "a")
    if fcntl:
        try:
            fcntl.lockf(config, fcntl.LOCK_EX | fcntl.LOCK_NB)                  # not flock: worker processes would inherit it and outlive us
        except BlockingIOError:
            raise UserError(f"--out {out}: another process is training there; give another --out, or wait for its end") from None
        except OSError:                                                         # a file system without locks
            pass
    return folder, config


def keep_copy(path, copy_to):
    """A second name for a finished checkpoint, without a second copy on disk where the file system allows it."""
    copy_to.unlink(missing_ok=True)
    try:
        os.link(path, copy_to)
    except OSError:
        shutil.copyfile(path, copy_to)
