"""How much a masked step costs, as ratios measured in one run:  python tests/benchmark.py

A step is the inside of train.py's loop: draw, corrupt, forward, loss, backward, clip, the
optimizer, average. The data are random. Beside each time stands its floor: the step's
counted multiply-adds at this machine's measured matrix-multiplication speed. The gap is the
ratio of the two. `optimizer` is the optimizers' own share of the step's time.

Run it while nothing else runs. Each time is the median of --repeats steps, taken in turns,
so that a slow minute hits every row."""
import argparse
import copy
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from losses import build_objective  # noqa: E402  (found from the line above)
from mask import draw  # noqa: E402
from plumbing.machine import amp_type, pick_device  # noqa: E402
from running.options import Options  # noqa: E402
from schedules import SCHEDULES, times  # noqa: E402
from train import build_optimizer  # noqa: E402
from vit import MODELS, ViT  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
RATIOS = (0.0, 0.5, 0.75, 0.9)


def read_clock(device):
    """The time in seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_peak(dtype, device):
    """Matrix multiplication speed in FLOP/s, the best of six."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        begun = read_clock(device)
        a @ b
        best = min(best, read_clock(device) - begun)
    return 2 * side ** 3 / best


def make_step(args, device, ratio, dtype):
    """A function that takes one step of training at a mask ratio."""
    torch.manual_seed(0)
    schedule = replace(SCHEDULES["ddm"], data_std=0.5)
    side = args.size // args.patch
    net = ViT(schedule, patch=args.patch, guess="unit", **MODELS[args.model]).to(device)
    if args.compile:
        for block in net.blocks:
            block.compile(dynamic=False)
    averaged = copy.deepcopy(list(net.parameters()))
    amp = "bf16" if dtype == torch.bfloat16 else "off"
    optimizers = build_optimizer(net, Options(optimizer=args.optimizer, amp=amp))
    objective = build_objective(schedule, "unit", args.patch)
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(args.batch, 3, args.size, args.size, device=device)
    is_mixed = dtype != torch.float32

    def step():
        with torch.autocast(device.type, dtype) if is_mixed else nullcontext():
            m = draw("patch", len(z), side, side, ratio, generator)
            n = schedule.noise(z, generator)
            t = times("uniform", schedule, len(z), generator)
            out = net(schedule.corrupt(z, n, t), t, None, m)
        objective(out, z, n, t, m).backward()
        gradients = [q.grad for q in net.parameters()]
        norm = torch.stack(torch._foreach_norm(gradients)).norm().item()
        if norm > 1.0:
            torch._foreach_mul_(gradients, 1.0 / norm)
        for optimizer in optimizers:
            optimizer.step()
        weights = [q.data for q in net.parameters()]
        torch._foreach_lerp_([q.data for q in averaged], weights, 0.01)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step_alone():
        for q in net.parameters():
            q.grad = torch.full_like(q, 1e-3)
        begun = read_clock(device)
        for optimizer in optimizers:
            optimizer.step()
        return read_clock(device) - begun

    step.measure_optimizer = step_alone
    return step


def count_flops(step):
    """FLOP of a step; it is taken twice, which warms it up, too."""
    with FlopCounterMode(display=False) as counter:
        step()
    step()
    return counter.get_total_flops()


def time_steps(steps, repeats, device):
    """Take every step in turn, several times. -> the median seconds of each"""
    taken = [[] for _ in steps]
    for _ in range(repeats):
        for step, seconds in zip(steps, taken):
            begun = read_clock(device)
            step()
            seconds.append(read_clock(device) - begun)
    return [statistics.median(seconds) for seconds in taken]


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", choices=MODELS, default="tiny", help="size of the network")
    p.add_argument("--size", type=int, default=64,
                   help="side of the images: 64 at patch 4 is 256 tokens")
    p.add_argument("--patch", type=int, default=4, help="side of a token")
    p.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="of train.py")
    p.add_argument("--batch", type=int, default=64, help="images per step")
    p.add_argument("--repeats", type=int, default=7, help="timed steps per row")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--compile", action="store_true", help="torch.compile every block")
    return p


def main():
    args = parser().parse_args()
    device = pick_device(args.device)
    dtypes = DTYPES
    if amp_type("auto", device) is None:
        print("without bfloat16, which this machine has no fast products for")
        dtypes = (torch.float32,)
    rows = [(dtype, ratio) for dtype in dtypes for ratio in RATIOS]
    steps = [make_step(args, device, ratio, dtype) for dtype, ratio in rows]
    flops = [count_flops(step) for step in steps]
    medians = dict(zip(rows, time_steps(steps, args.repeats, device)))
    speed = {dtype: measure_peak(dtype, device) for dtype in dtypes}
    speeds = ", ".join(f"{v / 1e9:.0f} GFLOP/s {str(dtype)[6:]}" for dtype, v in speed.items())
    alone = [statistics.median(step.measure_optimizer() for _ in range(args.repeats))
             for step in steps]
    print(f"{args.model}, {args.optimizer}, {(args.size // args.patch) ** 2} tokens, "
          f"batch {args.batch}, {device.type}, {torch.get_num_threads()} threads; "
          f"matrix products at {speeds}")
    print(f"{'type':9} {'ratio':>5} {'ms':>8} {'to unmasked':>12} {'to float32':>11} "
          f"{'GFLOP':>8} {'floor ms':>9} {'gap':>5} {'optimizer':>10}")
    for (dtype, ratio), count, own in zip(rows, flops, alone):
        seconds, floor = medians[dtype, ratio], count / speed[dtype]
        unmasked = seconds / medians[dtype, 0.0]
        float32 = seconds / medians[torch.float32, ratio]
        print(f"{str(dtype)[6:]:9} {ratio:5} {1000 * seconds:8.1f} {unmasked:12.3f} "
              f"{float32:11.3f} {count / 1e9:8.1f} {1000 * floor:9.1f} {seconds / floor:5.1f} "
              f"{own / seconds:10.3f}")


if __name__ == "__main__":
    main()
