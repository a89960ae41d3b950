"""How much a masked step costs, as ratios measured in one run on one machine:  python tests/benchmark.py

A step is the inside of train.py's loop: draw, corrupt, forward, loss, backward, clip, AdamW, average; the data are random. Beside each time
stands its floor, the step's counted multiply-adds at this machine's measured matrix-multiplication speed, and the gap between the two.
Run it while nothing else runs; each time is the median of --repeats steps, taken in turns so that a slow minute hits every row."""
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
from losses import build_objective  # noqa: E402
from plumbing.machine import pick_device  # noqa: E402
from mask import draw  # noqa: E402
from schedules import SCHEDULES, times  # noqa: E402
from vit import MODELS, ViT  # noqa: E402


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def synchronised(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(dtype, device, n=2048):
    """Matrix multiplication speed in FLOP/s, the best of five."""
    n = 8192 if device.type == "cuda" else n
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        begun = synchronised(device)
        a @ b
        best = min(best, synchronised(device) - begun)
    return 2 * n ** 3 / best


def make_step(args, device, ratio, dtype):
    torch.manual_seed(0)
    schedule = replace(SCHEDULES["ddm"], data_std=0.5)
    side = args.size // args.patch
    net = ViT(schedule, patch=args.patch, **MODELS[args.model]).to(device)
    if args.compile:
        for block in net.blocks:
            block.compile(dynamic=False)
    averaged = copy.deepcopy(list(net.parameters()))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    objective = build_objective(schedule, "unit", args.patch)
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(args.batch, 3, args.size, args.size, device=device)

    def step():
        with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
            m = draw("patch", len(z), side, side, ratio, generator)
            n = schedule.noise(z, generator)
            t = times("uniform", schedule, len(z), generator)
            out = net(schedule.corrupt(z, n, t), t, None, m)
        objective(out, z, n, t, m).backward()
        gradients = [q.grad for q in net.parameters()]
        norm = torch.stack(torch._foreach_norm(gradients)).norm().item()
        if norm > 1.0:
            torch._foreach_mul_(gradients, 1.0 / norm)
        optimizer.step()
        torch._foreach_lerp_([q.data for q in averaged], [q.data for q in net.parameters()], 0.01)
        optimizer.zero_grad(set_to_none=True)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny", help="size of the network")
    parser.add_argument("--size", type=int, default=64, help="side of the images: 64 at patch 4 is 256 tokens")
    parser.add_argument("--patch", type=int, default=4, help="side of a token")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps per row")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile every block")
    args = parser.parse_args()
    device = pick_device(args.device)
    rows = [(dtype, ratio) for dtype in (torch.float32, torch.bfloat16) for ratio in (0.0, 0.5, 0.75, 0.9)]
    steps, flops = [make_step(args, device, ratio, dtype) for dtype, ratio in rows], []
    for step in steps:                                                          # the first call warms up and counts
        with FlopCounterMode(display=False) as counter:
            step()
        flops.append(counter.get_total_flops())
        step()
    taken = [[] for _ in rows]
    for _ in range(args.repeats):
        for step, times_ in zip(steps, taken):
            begun = synchronised(device)
            step()
            times_.append(synchronised(device) - begun)
    speed = {dtype: peak(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    print(f"{args.model}, {(args.size // args.patch) ** 2} tokens, batch {args.batch}, {device.type}, {torch.get_num_threads()} threads; matrix products at "
          + ", ".join(f"{v / 1e9:.0f} GFLOP/s {str(k)[6:]}" for k, v in speed.items()))
    print(f"{'type':9} {'ratio':>5} {'ms':>8} {'to unmasked':>12} {'to float32':>11} {'GFLOP':>8} {'floor ms':>9} {'gap':>5}")
    medians = {row: statistics.median(t) for row, t in zip(rows, taken)}
    for (dtype, ratio), count in zip(rows, flops):
        t, floor = medians[dtype, ratio], count / speed[dtype]
        print(f"{str(dtype)[6:]:9} {ratio:5} {1000 * t:8.1f} {t / medians[dtype, 0.0]:12.3f} {t / medians[torch.float32, ratio]:11.3f} "
              f"{count / 1e9:8.1f} {1000 * floor:9.1f} {t / floor:5.1f}")


if __name__ == "__main__":
    main()
