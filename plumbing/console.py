"""Console: how every command here speaks to the person who typed it.

The rules. Options are written out, and each stands in --help with its default. What a
person can fix is answered by one line that names it and says what to do, with exit status 2
and never a traceback: raise UserError wherever it is noticed, `run_command` prints it.
Ctrl-C is status 130, as a shell expects. What a command writes is there as a whole or not
at all: `replacing`. A module that draws its own idea does so with `run_picture_command`.
"""
import argparse
import os
import re
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from PIL import Image


class UserError(ValueError):
    """Something that the user can fix. The message is one line; commands print it and exit
    with status 2."""


def describe_error(error):
    """An exception -> a few words on one line."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image"                   # Pillow's own words name a memory address
    return " ".join(str(error).split()) or type(error).__name__


# --- what is shown ------------------------------------------------------------------------

def escape(text):
    """Text that a terminal may be shown: control characters, and what is no Unicode, as
    codes.

    Names of files, classes and labels come from anywhere. One may hold an escape sequence
    that recolours the screen, or bytes that no encoding knows. Line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\r\t" else repr(c)[1:-1] for c in text)


class Screen:
    """Standard output or error: every character goes through `escape`, and a place that
    takes no more (a full disk, a closed pipe) does not end the work. `trouble` is then the
    error."""

    def __init__(self, stream):
        self.stream, self.trouble = stream, None
        if hasattr(stream, "reconfigure"):          # a screen that cannot show a name shows a "?"
            stream.reconfigure(errors="replace")

    def write(self, text):
        self.attempt(lambda: self.stream.write(escape(text)))
        return len(text)

    def flush(self):
        self.attempt(lambda: self.stream.flush())

    def attempt(self, work):
        """Do it, unless it failed before. A stream that was closed is None."""
        if self.trouble or self.stream is None:
            return
        try:
            work()
        except (OSError, ValueError) as error:      # ValueError: closed in between
            self.trouble = error

    def isatty(self):
        return self.stream is not None and not self.trouble and self.stream.isatty()

    def __getattr__(self, name):                    # encoding, fileno, ...
        return getattr(self.stream, name)


@contextmanager
def safe_screens():
    """Standard output and error as `Screen`s. -> both

    A descriptor that was closed would be given to the next file that is opened, and one
    that takes no more would be an error of Python's at its end: both lead nowhere
    instead."""
    before = sys.stdout, sys.stderr
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    sys.stdout, sys.stderr = map(Screen, before)
    try:
        yield sys.stdout, sys.stderr
    finally:
        for number, screen in ((1, sys.stdout), (2, sys.stderr)):
            screen.flush()
            if screen.trouble and screen.stream in (sys.__stdout__, sys.__stderr__):
                os.dup2(spare, number)
        os.close(spare)
        sys.stdout, sys.stderr = before


# --- what is typed ------------------------------------------------------------------------

def count_nouns(number, noun):
    """A number with its noun: 1 call, 2 calls."""
    return f"{number} {noun}{'s' * (number > 1)}"


def parse_int(text):
    """A whole number as people write it, of 64 bits as torch has them. Python would also
    take 1_000, other digits and any length."""
    if not re.fullmatch(r"[+-]?[0-9]+", text) or abs(number := int(text)) >= 2 ** 63:
        raise ValueError(text)
    return number


def parse_float(text):
    """A number as people write it, inf and nan among them."""
    if "_" in text or not text.isascii():
        raise ValueError(text)
    return float(text)


def parse_path(text):
    """A path, or a name that may be one: ~ is the home folder, also in --out=~/runs."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name; leave the option out, or give a path")
    return os.path.expanduser(text)


def build_parser(description, **settings):
    """An argument parser as every command here has it: no abbreviations, defaults in
    --help, bad input is one line and exit status 2. settings: of argparse.ArgumentParser.

    An argument that is a path has type=parse_path; int and float are read strictly."""
    settings = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter} | settings
    if sys.version_info >= (3, 14):
        settings["color"] = False                   # `escape` would show its codes
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, **settings)
    parser.register("type", int, parse_int)
    parser.register("type", float, parse_float)
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(message.split())}\n")
    return parser


def refuse_unused(given, parser, names, why):
    """UserError for the first of some options that is not its default and that nobody would
    read. given: the parsed arguments."""
    for name in names:
        if getattr(given, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')}: {why}; leave it out")


# --- a command ----------------------------------------------------------------------------

def run_command(command):
    """Call a command's main. Bad input is one line (per machine) and exit status 2."""
    with safe_screens() as (out, _):
        try:
            status = find_status(command)
        except SystemExit as stop:
            status = stop.code
        out.flush()
        if out.trouble and not isinstance(out.trouble, BrokenPipeError):
            print(f"error: standard output cannot be written ({describe_error(out.trouble)})",
                  file=sys.stderr)
            status = status or 2
    sys.exit(status)


def is_first_here():
    """Whether this is the first process of this machine: it speaks for all of them."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def is_out_of_memory(error):
    """Whether the CPU's memory is full: Python and torch say it in two ways."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def is_compiler_error(error):
    """Whether torch.compile failed. Its errors have no public names."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def find_status(command):
    """The exit status of a command's main, after its one line where there is one."""
    try:
        return command()
    except (UserError, OSError) as error:           # OSError: an unwritable folder, a full disk
        if is_first_here():
            print(f"error: {describe_error(error)}", file=sys.stderr)
    except torch.cuda.OutOfMemoryError:
        print("error: the GPU's memory is full: try a smaller --micro-batch or "
              "--checkpoint-blocks (train.py, finetune.py), or --batch (sample.py)",
              file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if is_compiler_error(error):            # a cache that was cut short, too
            print(f"error: --compile: torch cannot compile this ({describe_error(error)[:200]}); "
                  "delete torch's folder torchinductor_NAME of temporary files, or leave --compile "
                  "out", file=sys.stderr)
        elif is_out_of_memory(error):
            print("error: the memory is full: try a smaller --batch, --size or --cache-gb",
                  file=sys.stderr)
        else:
            raise
    except KeyboardInterrupt:
        return 130
    return 2


STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
         if hasattr(signal, name)]                  # Windows has two of them


@contextmanager
def hearing_signals(handler, is_free=lambda before: before is not signal.SIG_IGN):
    """While it lasts, a handler hears the signals that stop a program; as it stands here,
    all but those that are ignored (by nohup).

    is_free(its handler so far): whether a signal is taken."""
    taken = {}
    if threading.current_thread() is threading.main_thread():           # Python's own rule
        taken = {number: signal.signal(number, handler) for number in STOPS
                 if is_free(signal.getsignal(number))}
    try:
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)


@contextmanager
def unwinding():
    """While it lasts, a signal that would end the process at once is a SystemExit, so that
    temporary files vanish. A signal that somebody handles stays his."""
    def leave(number, frame):
        signal.signal(number, signal.SIG_IGN)       # a second one would disturb the tidying
        raise SystemExit(128 + number)              # what a shell expects after a signal

    with hearing_signals(leave, lambda before: before is signal.SIG_DFL):
        yield


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
        with unwinding():
            temporary.unlink(missing_ok=True)       # a link to elsewhere is replaced, not followed
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):                     # a file where a folder should be
            temporary.unlink(missing_ok=True)
        # torch.save makes a RuntimeError of a full disk
        if isinstance(error, OSError) or "inline_container" in str(error):
            # strerror: the system's own words do not name the temporary file
            words = getattr(error, "strerror", None) or describe_error(error)
            why = words.partition(" at: ")[0]
            raise UserError(f"{path} cannot be written ({why}); "
                            "give another place, or make room") from error
        raise


def run_picture_command(description, draw, out, **numbers):
    """The command of a module that shows its idea: save the picture draw(**numbers) as
    --out.

    numbers: an option each, name=(default, help)."""
    run_command(partial(draw_to_file, description, draw, out, numbers))


def draw_to_file(description, draw, out, numbers):
    """What `run_picture_command` does, from its arguments."""
    parser = build_parser(description)
    parser.add_argument("--out", type=parse_path, default=out, help="the picture to write")
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    given = vars(parser.parse_args())
    options = ", ".join(f"--{name} {value}" for name, value in given.items())
    out = given.pop("out")
    try:
        ending, kinds = Path(out).suffix.lower(), Image.registered_extensions()
        if kinds.get(ending) not in Image.SAVE:             # some kinds can only be read
            raise UserError(f"give a name that ends with .png, not with {ending or 'nothing'}")
        with replacing(out) as file:
            draw(**given).save(file, kinds[ending])
    # ValueError: an unknown kind of file
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        parser.error(f"{options}: {describe_error(error)}")
    print(f"wrote {out}")
