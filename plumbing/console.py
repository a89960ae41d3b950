"""Console: how every command here speaks to the person who typed it.

The rules. Options are written out, and each stands in --help with its default. What a
person can fix is answered by one line that names it and says what to do, with exit status 2
and never a traceback: raise UserError wherever it is noticed, `run_command` prints it.
Ctrl-C is status 130, as a shell expects. What a command writes is there as a whole or not
at all: `replacing`. A module that draws its own idea does so with `run_picture_command`.
"""
import argparse
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch


class UserError(ValueError):
    """Something that the user can fix. The message is one line; commands print it and exit
    with status 2."""


def describe_error(error):
    """An exception -> a few words on one line."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image"                   # Pillow's own words name a memory address
    return " ".join(str(error).split()) or type(error).__name__


def build_parser(description, **settings):
    """An argument parser as every command here has it: no abbreviations, defaults in
    --help, and bad input is one line and exit status 2. settings: of
    argparse.ArgumentParser."""
    settings = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter} | settings
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, **settings)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    return parser


def run_command(command):
    """Call a command's main. Bad input is one line (per machine) and exit status 2."""
    try:
        sys.exit(command())
    except (UserError, OSError) as error:       # OSError: an unwritable folder, a full disk
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {describe_error(error)}", file=sys.stderr)
    except torch.cuda.OutOfMemoryError:
        print("error: the GPU's memory is full: try a smaller --micro-batch or --checkpoint-blocks "
              "(train.py, finetune.py), or --batch (sample.py)", file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(2)


@contextmanager
def replacing(path, shared=True):
    """A file to write. It takes the name `path` when the block has ended well and vanishes
    when it has not: the name always holds the whole new file or the old one.

    It is opened at once, so a place that cannot be written is told before the work. shared:
    other processes may write this name at the same time; then each has a temporary name of
    its own."""
    path = Path(path)
    ending = f"{os.getpid()}.tmp" if shared else "tmp"
    temporary = path.with_name(f"{path.name}.{ending}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save makes a RuntimeError of a full disk
        if isinstance(error, OSError) or "inline_container" in str(error):
            why = describe_error(error).partition(" at: ")[0]
            raise UserError(f"{path} cannot be written ({why}); "
                            "give another place, or make room") from error
        raise


def run_picture_command(description, draw, out, **numbers):
    """The command of a module that shows its idea: save the picture draw(**numbers) as
    --out.

    numbers: an option each, name=(default, help)."""
    parser = build_parser(description)
    parser.add_argument("--out", default=out, help="the picture to write")
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    given = vars(parser.parse_args())
    options = ", ".join(f"--{name} {value}" for name, value in given.items())
    out = given.pop("out")
    try:
        draw(**given).save(out)
    except (OSError, ValueError, RuntimeError) as error:    # ValueError: an unknown kind of file
        parser.error(f"{options}: {describe_error(error)}")
    print(f"wrote {out}")
