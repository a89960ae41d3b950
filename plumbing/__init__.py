"""What happens below the ideas: files, pictures, processes, the screen. Nothing here knows
what diffusion is."""
import ctypes
import os

# A thread that waits for another one first spins, then sleeps. GNU's OpenMP spins for
# milliseconds: beside one other busy program, both threads of two cores then mostly wait
# for each other, and a step of training takes 11 seconds instead of 0.45. With a short spin
# a quiet machine is as fast as before. torch reads this once, when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# A step of training on a CPU takes gigabytes and gives them back. GNU's malloc returns
# large blocks to the system at once, which fills them with zeros before it lends them
# again: up to a fifth of a step's CPU time. These two settings keep them in the process.
# Who has set malloc up by hand (MALLOC_..., GLIBC_TUNABLES) is left alone.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                       # malloc.h


def keep_freed_memory():
    """Tell GNU's malloc to keep what is freed; another malloc has no such settings."""
    by_hand = [name for name in os.environ if name.startswith("MALLOC_")]
    if os.name != "posix" or by_hand or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)                              # no block is a mapping of its own
        mallopt(M_TRIM_THRESHOLD, -1)                       # the heap never shrinks


keep_freed_memory()
