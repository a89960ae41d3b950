"""Cost: what a step takes, counted before it is paid for (train.py --dry-run).

The idea. Masking is about cost, and cost is arithmetic: a linear layer multiplies and adds once per weight and row, attention twice per
channel and pair of tokens. The network runs once on torch's meta device, where tensors have shapes but no numbers, and every layer tells
what it was given; so no formula here has to know about masks, economies or decoders.

    linear       rows x in x out       multiply-adds; rows: the tokens, or 1 for what is computed once per image (time, class, modulation)
    attention    2 K^2 D               q k^T, then the weights times v, for K tokens of width D
    training     2 x 3 x them          FLOP: a multiply-add is two, and the backward pass costs two forward passes (blocks recomputed: 4)
    parameters   4 + 4 + 8 + 4 + 4     bytes each: weight, gradient, AdamW's moments, average, DDP's bucket; + 2 for a 16-bit copy
    activations  (4 x 4 + 16 h) K D    bytes per block, h = 2 or 4: four float32 values (both inputs of the norms, and their outputs) and 16 of
                                       the matrix products' type (2 modulated, 3 qkv, 1 attention, 2 gated, 8 inside the mlp)

Papers on transformers print multiply-adds as "Gflops": DiT-XL/2's 118.6 at 256 px, MaskDiT's 65.4 at half of the tokens.
"""
import shlex
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from data import load_images
from mask import Mask, ratio_at, visible_count
from schedules import SCHEDULES
from plumbing.sources import class_folders, open_images
from vit import Block, ViT
from spaces import SPACES

PARTS = {"mixer": "mixer", "enter": "mixer", "connect": "decoder", "connect_ada": "decoder", "mask_token": "decoder", "decoder": "decoder"}


def part_name(net, name):
    """The part that a parameter or a layer belongs to, by its name: mixer, encoder or decoder (the head is the last one's)."""
    top = name.partition(".")[0]
    return "decoder" if top in ("head", "head_ada") and net.decoder is not None else PARTS.get(top, "encoder")


def count_parameters(net):
    """-> {part: number of parameters}."""
    counts = Counter()
    for name, q in net.named_parameters():
        counts[part_name(net, name)] += q.numel()
    return counts


def forward_cost(net, h, w, visible=None):
    """One image of h x w tokens, `visible` of them (None: no mask), through a network on the meta device. -> ({part: multiply-adds}, with
    "attention" for the products of tokens with tokens; K D of every block, in the order in which they run)."""
    adds, blocks, handles = Counter(), [], []
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            def count(layer, given, out, where=part_name(net, name)):
                adds[where] += out.numel() * layer.in_features
            handles.append(module.register_forward_hook(count))
        elif isinstance(module, Block):
            def pairs(block, given, out):
                _, K, D = out.shape
                adds["attention"] += 2 * K * K * D
                blocks.append(K * D)
            handles.append(module.register_forward_hook(pairs))
    with torch.device("meta"), torch.no_grad():
        image = lambda layer: torch.empty(1, layer.in_features // net.p ** 2, h * net.p, w * net.p) if layer is not None else None
        y = torch.zeros(1, dtype=torch.int64) if net.embed_class is not None else None
        m = None if visible in (None, h * w) else Mask(torch.zeros(1, visible, dtype=torch.int64), h * w)
        net(image(net.embed), torch.zeros(1), y, m, image(net.embed_cond))
    for handle in handles:
        handle.remove()
    return adds, blocks


def estimate_memory(net, blocks, images, half=True, recompute=False):
    """About how many bytes training holds, on each of several GPUs: (for the parameters, for the activations of `images` images)."""
    each = 16 + 16 * (2 if half else 4)
    kept = 4 * sum(blocks) + (each - 4) * max(blocks) if recompute else each * sum(blocks)
    return sum(q.numel() for q in net.parameters()) * (26 if half else 24), images * kept


def class_count(o):
    """How many classes the data has, from names alone. Without data, for a recipe: ImageNet's 1000."""
    if not o.labels or o.data is None:
        return 1000 if o.labels else 0
    path = Path(o.data).expanduser()
    if o.data == "faces" or not path.exists():
        return len(load_images(o.data, o.size, labels=True, count=1).classes)   # or its one clear line
    return len(set(class_folders(open_images(path))))


def describe_cost(o, network, script, arguments):
    """What `python script arguments` would train and what it would take, as text. network: train.network, the options of a ViT."""
    channels = 1 if o.gray else 3
    if o.space != "pixel" and o.vae is None:                                    # a recipe without its files: Stable Diffusion's
        space = SimpleNamespace(channels=4, factor=8)
    else:
        space = SPACES[o.space](channels, o.vae)
    with torch.device("meta"):
        net = ViT(SCHEDULES[o.schedule], **network(o, channels, space, class_count(o)))
    side = o.size // space.factor // o.patch
    lo, gpus, half = o.mask if o.mask_from is None else o.mask_from, 8, o.amp != "off"
    shares = Counter(visible_count(side * side, ratio_at(o.ramp, i / 1000, lo, o.mask, share=o.ramp_share)) for i in range(1001))
    costs = {k: forward_cost(net, side, side, k) for k in shares}
    mean = {name: sum(costs[k][0][name] * share for k, share in shares.items()) / shares.total() for name in ("mixer", "encoder", "decoder", "attention")}
    times = 4 if o.checkpoint_blocks else 3
    micro = o.micro_batch or max(1, o.batch // gpus)
    fixed, moving = estimate_memory(net, costs[max(shares)][1], micro, half, o.checkpoint_blocks)
    split = lambda counts, unit: ", ".join(f"{name} {counts[name] / unit:.4g}" for name in ("mixer", "encoder", "decoder", "attention") if counts.get(name))
    missing = [f"--{name} PATH" for name in ("data", "vae") if getattr(o, name) is None and (name == "data" or o.space != "pixel")]
    command = ["torchrun", f"--nproc_per_node={gpus}", script, *(a for a in arguments if a != "--dry-run")]
    total, full = sum(mean.values()), sum(forward_cost(net, side, side)[0].values())
    return "\n".join([
        f"parameters   {sum(count_parameters(net).values()) / 1e6:.2f} M: {split(count_parameters(net), 1e6)}",
        f"tokens       {side * side} of {space.factor * o.patch} x {space.factor * o.patch} pixels, visible {', '.join(map(str, sorted(shares)))}",
        f"forward      {total / 1e9:.4g} G multiply-adds per image" + (" in the mean" if len(shares) > 1 else "")
        + (f", {full / 1e9:.4g} with all tokens, as in a call of sampling" if full != total else ""),
        f"training     {2 * times * total / 1e9:.4g} GFLOP per image: {split({name: 2 * times * value for name, value in mean.items()}, 1e9)}",
        f"memory       about {(fixed + moving) / 1e9:.3g} GB on each of {gpus} GPUs: {fixed / 1e9:.3g} for the parameters, {moving / 1e9:.3g} for the activations of "
        f"{micro} images in {'16' if half else '32'} bits",
        f"{gpus} GPUs       {shlex.join(command)}{''.join(' ' + m for m in missing)}"
        + (f"    (--batch {o.batch} must become a multiple of {gpus * micro})" if o.batch % (gpus * micro) else "")])
