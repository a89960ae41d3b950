"""Machine: which process this is among how many, what it computes on and how precisely.

The same file runs on a laptop and on many GPUs because only this file knows the difference.
torchrun starts k processes and tells each its number in the environment. They meet here.
From then on they exchange three things: gradients (DistributedDataParallel averages them,
in train.py), a few numbers for the log and the plan, and the wish to stop.

Mixed precision is autocast in bfloat16 where the hardware has it. Weights and optimizer
stay in float32. float16 needs a GradScaler and is never chosen by itself.
"""
import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
# DistributedDataParallel would import this once the group exists. Its functions would keep
# the group as a default argument, gloo's threads would outlive destroy_process_group, and
# one in hundreds of runs would abort after its last line.
import torch.distributed.nn.functional  # noqa: F401

from plumbing.console import UserError, describe_error


# --- devices ------------------------------------------------------------------------------

def pick_device(name="auto"):
    """auto: cuda, else mps, else cpu. UserError for a device that this machine does not
    have."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        best = ["cuda"] * (cuda > 0) + ["mps"] * mps + ["cpu"]
        return torch.device(best[0])
    kind, _, index = name.partition(":")
    is_numbered = kind == "cuda" and index.isdecimal()
    if name not in ("cpu", "mps", "cuda") and not is_numbered:
        raise UserError(f"--device {name}: give auto, cpu, mps, cuda or cuda:1")
    if (kind == "cuda" and int(index or 0) >= cuda) or (kind == "mps" and not mps):
        apple = "an" if mps else "no"
        raise UserError(f"--device {name}: this torch sees {cuda} CUDA GPU(s) and {apple} Apple "
                        "GPU; use --device auto")
    return torch.device(name)


def amp_type(amp, device):
    """The autocast type, or None for float32.

    amp: auto, bf16, fp16 or off. auto is bfloat16 where it is fast, and never float16. On
    CPUs that is AVX512-BF16: elsewhere bfloat16 is 40 to 500 times slower. UserError for
    fp16 off CUDA."""
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs a CUDA GPU; use --amp auto")
    if amp in ("bf16", "fp16"):
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if amp == "off" or device.type == "mps":
        return None
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:                                   # private names: where they are absent, the answer is no
        cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        mkldnn = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        has_bf16 = cpu() and mkldnn()
    return torch.bfloat16 if has_bf16 else None


def require_compiler(device):
    """UserError, before any work, unless torch.compile works on this device. It needs a C++
    compiler, and Triton on a GPU."""
    try:
        torch.compile(lambda x: 2 * x.sin())(torch.zeros(8, device=device))
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError(f"--compile: torch cannot compile on this machine ({reason}); install a "
                        "C++ compiler (g++), or leave --compile out") from error


def count_cores():
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


# --- processes ----------------------------------------------------------------------------

@dataclass
class Machine:
    """Which process this is among how many, and what it computes on."""
    rank: int                               # number of this process among all
    world: int                              # how many there are
    local_world: int                        # how many of them are on this machine
    device: torch.device

    def to_tensor(self, values):
        """Numbers as a float64 tensor. It stays on the CPU, where gloo exchanges it: on a
        GPU each exchange would wait for all work that is queued there."""
        return torch.tensor([float(value) for value in values], dtype=torch.float64)

    def reduce(self, value):
        """The sum of a number over all processes, as a float."""
        if self.world > 1:
            value = self.to_tensor([value])
            dist.all_reduce(value, dist.ReduceOp.SUM)
        return float(value)

    def reduce_max(self, *values):
        """The maximum of each number over all processes, in one exchange. -> list of
        floats"""
        if self.world == 1:
            return [float(value) for value in values]
        values = self.to_tensor(values)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def broadcast_first(self, value):
        """The first process's number, everywhere."""
        return self.reduce(value if self.rank == 0 else 0.0)

    def all_equal(self, *values):
        """Whether every process has the same numbers."""
        highest = self.reduce_max(*values)
        lowest = self.reduce_max(*(-value for value in values))
        return all(high == -low for high, low in zip(highest, lowest))

    def run_on_first(self, work):
        """What work() gives, in the first process alone; None in the others. If it fails,
        all end: that one with its error, the others quietly."""
        result, trouble = None, None
        if self.rank == 0:
            try:
                result = work()
            except (UserError, OSError) as error:
                trouble = error
        if self.broadcast_first(trouble is not None):
            raise trouble or SystemExit(2)
        return result

    def close(self):
        """Leave the group of processes, which ends its threads."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def set_threads(threads):
    """--threads of a command: 0 leaves torch's own choice. UserError out of range."""
    if not 0 <= threads <= 1024:
        raise UserError(f"--threads {threads}: must be 0 (torch's own choice) to 1024")
    if threads:
        torch.set_num_threads(threads)


def start_machine(device="auto", threads=0):
    """Join the other processes of torchrun, if there are any, and choose device and
    threads.

    -> Machine. UserError for a device that this machine lacks, or more processes than
    GPUs."""
    rank, world = read_variable("RANK", 0), read_variable("WORLD_SIZE", 1)
    local_world = read_variable("LOCAL_WORLD_SIZE", world)
    if rank >= world:                                   # it would train, and write nothing
        raise UserError(f"RANK is {rank}, WORLD_SIZE {world}: start with torchrun, or unset RANK")
    if world > 1 and ":" in device:
        raise UserError(f"--device {device}: each of {local_world} processes has a GPU of its own; "
                        "give cuda, or set CUDA_VISIBLE_DEVICES")
    if world > 1 and device == "mps":
        raise UserError("--device mps: one process only, many need gloo, which does not know Apple "
                        "GPUs; use --device cpu, or no torchrun")
    device = pick_device(device)
    if world > 1 and device.type == "mps":              # auto, on a Mac
        device = torch.device("cpu")
    if device.type == "cuda":
        device = start_cuda(device, world, local_world)
    if threads or world > 1:                            # torchrun sets OMP_NUM_THREADS=1 unasked
        torch.set_num_threads(threads or max(1, count_cores() // local_world))
    if world > 1 and not dist.is_initialized():
        end_with_parent()
        join_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Machine(rank, world, local_world, device)


def read_variable(name, default):
    """A whole number that torchrun has put into the environment. UserError for anything
    else."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} is {text}, not a whole number: start with torchrun, or unset it")
    return int(text)


def require_one_process(command):
    """UserError when torchrun has started a command that is the work of one process: each
    of them would write the same files."""
    if read_variable("WORLD_SIZE", 1) != 1:
        raise UserError(f"{command} is the work of one process: start it without torchrun")


def join_group(backend):
    """Meet the other processes.

    After a restart by torchrun the store still holds the addresses of the processes before,
    and one in three attempts would try to reach a dead one. So each attempt has keys of its
    own."""
    patience = timedelta(minutes=10)                    # to meet: all start at once
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=patience))
    except ValueError as error:                         # another program set WORLD_SIZE
        raise UserError(f"{describe_error(error)}: start with torchrun, or unset "
                        "WORLD_SIZE") from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    # Later one process may decode or encode its data while the others wait. NCCL itself
    # meets in its first exchange, after all images are loaded, through this store.
    later = timedelta(hours=2)
    store.set_timeout(later)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=later)


def end_with_parent():
    """Linux: be told (SIGTERM, so a run still saves) when torchrun itself was killed.
    Without it nobody would end this process, and the others would wait for it."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # 1: PR_SET_PDEATHSIG
        if os.getppid() != parent:                      # it died just before
            os.kill(os.getpid(), signal.SIGTERM)


def start_cuda(device, world, local_world):
    """The GPU of this process, chosen and set. -> its device, with a number"""
    index = read_variable("LOCAL_RANK", 0) if world > 1 else device.index or 0
    gpus = torch.cuda.device_count()
    if world > 1 and local_world > gpus:
        raise UserError(f"{local_world} processes but {gpus} GPU(s): "
                        f"give torchrun --nproc_per_node={gpus}")
    device = torch.device("cuda", index)                # set_device wants a number
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")          # TF32 where float32 is left
    return device
