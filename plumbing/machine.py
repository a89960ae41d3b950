"""Machine: which process this is among how many, what it computes on and how precisely.

The idea. The same file runs on a laptop and on many GPUs because only this file knows the difference. torchrun starts k processes and tells
each its number in the environment; they meet here, and from then on exchange three things: gradients (DistributedDataParallel averages
them, in train.py), a few numbers for the log and the plan (`reduce`), and the wish to stop. Mixed precision is autocast in bfloat16 where
the hardware has it, weights and optimizer stay in float32; float16 needs a GradScaler and is never chosen by itself.
"""
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional      # DistributedDataParallel would import it once the group exists, its functions would keep the group

from plumbing.console import UserError


                                            # as a default argument, and gloo's threads outlive destroy_process_group: one in hundreds of runs
                                            # then aborts after its last line


def pick_device(name="auto"):
    """auto: cuda, else mps, else cpu. UserError for a device that this machine does not have."""
    cuda, mps = torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    kind, _, index = name.partition(":")
    if name not in ("cpu", "mps", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise UserError(f"--device {name}: give auto, cpu, mps, cuda or cuda:1")
    if (kind == "cuda" and int(index or 0) >= cuda) or (kind == "mps" and not mps):
        raise UserError(f"--device {name}: this torch sees {cuda} CUDA GPU(s) and {'an' if mps else 'no'} Apple GPU; use --device auto")
    return torch.device(name)


@dataclass
class Machine:
    """Which process this is among how many, and what it computes on."""
    rank: int
    world: int
    local_world: int
    device: torch.device

    def reduce(self, value, how=dist.ReduceOp.SUM):
        """The sum (or maximum) of a number over all processes, as a float."""
        if self.world > 1:
            value = torch.tensor([float(value)], dtype=torch.float64, device=self.device if self.device.type == "cuda" else "cpu")
            dist.all_reduce(value, how)
        return float(value)

    def broadcast_first(self, value):
        """The first process's number, everywhere."""
        return self.reduce(value if self.rank == 0 else 0.0)

    def all_equal(self, *values):
        """Whether every process has the same numbers."""
        return all(self.reduce(v, dist.ReduceOp.MAX) == -self.reduce(-v, dist.ReduceOp.MAX) for v in values)

    def run_on_first(self, work):
        """What work() gives, in the first process alone; None in the others. If it fails, all end: that one with its error, the others quietly."""
        result, trouble = None, None
        if self.rank == 0:
            try:
                result = work()
            except (UserError, OSError) as error:
                trouble = error
        if self.broadcast_first(trouble is not None):
            raise trouble or SystemExit(2)
        return result


def start_machine(device="auto", threads=0):
    """Join the other processes of torchrun, if there are any, and choose device and threads. -> Machine. UserError for more processes than GPUs."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world > 1 and ":" in device:
        raise UserError(f"--device {device}: each of {local_world} processes has a GPU of its own; give cuda, or set CUDA_VISIBLE_DEVICES")
    if world > 1 and device == "mps":
        raise UserError("--device mps: one process only, many need gloo, which does not know Apple GPUs; use --device cpu, or no torchrun")
    device = pick_device(device)
    if world > 1 and device.type == "mps":                                      # auto, on a Mac
        device = torch.device("cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else device.index or 0)     # set_device wants a number
        if world > 1 and local_world > torch.cuda.device_count():
            raise UserError(f"{local_world} processes but {torch.cuda.device_count()} GPU(s): give torchrun --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                              # TF32 where float32 is left
    if threads or world > 1:                                                    # torchrun sets OMP_NUM_THREADS=1 unasked
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(threads or max(1, cores // local_world))
    if world > 1 and not dist.is_initialized():
        patience = timedelta(hours=2)                                           # one machine may decode or encode its data while others wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return Machine(rank, world, local_world, device)


def amp_type(amp, device):
    """The autocast type, or None for float32. auto: bfloat16 where it is fast, on CPUs only with AVX512-BF16 (elsewhere it is 40 to
    500 times slower), never float16."""
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs a CUDA GPU; use --amp auto")
    if amp in ("bf16", "fp16"):
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if amp == "off" or device.type == "mps":
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()     # private names: absent means no
    return torch.bfloat16 if fast and getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)() else None
