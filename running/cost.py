"""Cost: what a step takes, counted before it is paid for (train.py --dry-run).

The idea. Masking is about cost, and cost is arithmetic. A linear layer multiplies and adds
once per weight and row, attention twice per channel and pair of tokens. The network runs
once on torch's meta device, where tensors have shapes but no numbers. Every layer tells
what it was given, so no formula here has to know about masks, economies or decoders.

    linear       rows x in x out     multiply-adds; rows: the tokens, or 1 for what is
                                     computed once per image (time, class, modulation)
    attention    2 K^2 D             q k^T, then the weights times v, for K tokens
    training     2 x 3 x them        FLOP: a multiply-add is two, a backward pass costs two
                                     forward passes (blocks recomputed: 4 instead of 3)
    Muon         3 (2 m^2 n + m^3)   multiply-adds for each m x n matrix of a block, m <= n
    parameters   4 + 4 + 8 + 4 + 4   bytes each: weight, gradient, AdamW's moments, average,
                                     DDP's bucket; + 2 for a 16-bit copy; - 4 with Muon
    activations  (4 x 4 + 16 h) K D  bytes per block, h = 2 or 4: four float32 values (both
                                     inputs of the norms, and their outputs) and 16 of the
                                     matrix products' type (2 modulated, 3 qkv, 1 attention,
                                     2 gated, 8 inside the mlp)

Papers on transformers print multiply-adds as "Gflops": DiT-XL/2's 118.6 at 256 px,
MaskDiT's 65.4 at half of the tokens.

Shapes: h x w tokens, K of them visible, D the width of a block.
"""
import os
import shlex
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from data import load_images
from mask import Mask
from plumbing.downloads import DOWNLOADS, is_published
from plumbing.muon import POLYNOMIALS
from plumbing.sources import class_folders, open_images
from running.setup import network_options, require_whole_tokens, visible_shares
from schedules import SCHEDULES
from spaces import SPACES
from vit import Block, ViT

GPUS = 8                                                       # of the machine that is described
NAMES = ("mixer", "encoder", "decoder", "attention", "guess")  # the parts, in reading order
PARTS = {"mixer": "mixer", "enter": "mixer", "connect": "decoder", "connect_ada": "decoder",
         "mask_token": "decoder", "decoder": "decoder"}        # by the name of a layer


# --- counting -----------------------------------------------------------------------------

def part_name(net, name):
    """The part that a parameter or a layer belongs to, by its name: mixer, encoder or
    decoder (the head is the last one's)."""
    top = name.partition(".")[0]
    if top in ("head", "head_ada") and net.decoder is not None:
        return "decoder"
    return PARTS.get(top, "encoder")


def count_parameters(net):
    """-> {part: number of parameters}."""
    counts = Counter()
    for name, q in net.named_parameters():
        counts[part_name(net, name)] += q.numel()
    return counts


def count_positions(net, tokens):
    """Numbers of the fixed positions (sines and cosines): of the encoder's tokens, and of
    the decoder's where there is one. They are computed, not trained; papers count them."""
    width = net.embed.out_features
    if net.decoder is not None:
        width += net.connect.out_features
    return tokens * width


def blank_image(layer, net, h, w):
    """An image on the default device that an embedding `layer` takes; None for no layer."""
    if layer is None:
        return None
    return torch.empty(1, layer.in_features // net.p ** 2, h * net.p, w * net.p)


def forward_cost(net, h, w, visible=None):
    """Count one image's way through a network on the meta device.

    h, w: the grid of tokens. visible: how many are seen (None: no mask).
    -> {part: multiply-adds}, with "attention" for the products of tokens with tokens and
    "guess" for those of a PatchGuess; and the list of K D of every block, in the order in
    which they run."""
    adds, blocks, handles = Counter(), [], []

    def count_pairs(block, given, out):
        _, K, D = out.shape
        adds["attention"] += 2 * K * K * D
        blocks.append(K * D)

    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            def count_rows(layer, given, out, part=part_name(net, name)):
                adds[part] += out.numel() * layer.in_features
            handles.append(module.register_forward_hook(count_rows))
        elif isinstance(module, Block):
            handles.append(module.register_forward_hook(count_pairs))
    with torch.device("meta"), torch.no_grad():
        y, m = None, None
        if net.embed_class is not None:
            y = torch.zeros(1, dtype=torch.int64)
        if visible not in (None, h * w):
            m = Mask(torch.zeros(1, visible, dtype=torch.int64), h * w)
        image, cond = (blank_image(e, net, h, w) for e in (net.embed, net.embed_cond))
        net(image, torch.zeros(1), y, m, cond)
    for handle in handles:
        handle.remove()
    if net.guess is not None:
        tokens, P = h * w, len(net.guess.mean)
        answered = tokens if net.decoder is not None or visible is None else visible
        answered = tokens if net.economy.all_scored else answered
        adds["guess"] = (tokens + answered * net.guess.prediction.heads) * P * P
    return adds, blocks


def orthogonalisation_cost(net):
    """Multiply-adds of the matrix products in a step of Muon, whatever the batch."""
    sides = [sorted(q.shape) for q in net.block_matrices()]
    return len(POLYNOMIALS) * sum(2 * m * m * n + m**3 for m, n in sides)


def count_moments(net, optimizer):
    """Bytes of an optimizer's state: two moments, or one of a matrix that has Muon."""
    single = net.block_matrices() if optimizer == "muon" else []
    return 8 * sum(q.numel() for q in net.parameters()) - 4 * sum(q.numel() for q in single)


def estimate_memory(
    net,                    # on the meta device
    blocks,                 # K D of every block, from `forward_cost`
    images,                 # per forward pass
    half=True,              # matrix products in 16 bits
    recompute=False,        # --checkpoint-blocks
    optimizer="adamw",      # --optimizer
):
    """About how many bytes training holds on each of several GPUs.

    -> (bytes for the parameters, bytes for the activations)"""
    each = 16 + 16 * (2 if half else 4)
    kept = each * sum(blocks)
    if recompute:                                           # one input a block, and one block whole
        kept = 4 * sum(blocks) + (each - 4) * max(blocks)
    parameters = sum(q.numel() for q in net.parameters())
    return parameters * (18 if half else 16) + count_moments(net, optimizer), images * kept


# --- the text of --dry-run ----------------------------------------------------------------

def count_classes(o):
    """How many classes the data has, from names alone. Without data, for a recipe:
    ImageNet's 1000."""
    if not o.labels:
        return 0
    if o.data is None:
        return 1000
    if is_published(o.data, "data"):
        return DOWNLOADS[o.data].classes
    path = Path(os.path.expanduser(o.data))
    if o.data == "faces" or not path.exists():              # a wrong path gets its one clear line
        return len(load_images(o.data, o.size, labels=True, count=1).classes)
    return len(set(class_folders(open_images(path, part="train"))))


def build_without_numbers(o):
    """The network of options `o` on the meta device, and its space. -> (net, space)"""
    channels = 1 if o.gray else 3
    is_open = o.vae is None or is_published(o.vae, "vae")   # a recipe without its files, or sd:
    if o.space != "pixel" and is_open:                      # Stable Diffusion's autoencoder
        space = SimpleNamespace(channels=4, factor=8)
    else:
        space = SPACES[o.space](channels, o.vae)
    require_whole_tokens(o, space)
    with torch.device("meta"):
        settings = network_options(o, channels, space, count_classes(o))
        return ViT(SCHEDULES[o.schedule], **settings), space


def list_parts(counts, unit):
    """{part: number} -> text, in the order of NAMES; parts without any are left out."""
    return ", ".join(f"{name} {counts[name] / unit:.4g}" for name in NAMES if counts.get(name))


def training_flop_per_add(o):
    """FLOP of training for each multiply-add of a forward pass: forward, twice as much
    backward, and once more forward with --checkpoint-blocks."""
    return 2 * (4 if o.checkpoint_blocks else 3)


def describe_work(o, total, full, is_ramp, mean):
    """Two lines of --dry-run: one forward pass, and training. total, full: multiply-adds
    per image with the masks of the run and with all tokens. mean: `total` by parts."""
    forward = f"forward      {total / 1e9:.4g} G multiply-adds per image"
    if is_ramp:
        forward += " in the mean"
    if full != total:
        forward += f", {full / 1e9:.4g} with all tokens, as in a call of sampling"
    flop = training_flop_per_add(o)
    parts = list_parts({name: flop * adds for name, adds in mean.items()}, 1e9)
    return [forward, f"training     {flop * total / 1e9:.4g} GFLOP per image: {parts}"]


def describe_optimizer(o, net):
    """The line of --dry-run about Muon, as a list; none for AdamW, which costs nothing."""
    if o.optimizer != "muon":
        return []
    cost = 2 * orthogonalisation_cost(net) / 1e9
    return [f"optimizer    {cost:.4g} GFLOP a step for Muon, whatever the batch"]


def describe_memory(o, net, blocks, micro):
    """A line of --dry-run: what one GPU holds. micro: images per forward pass."""
    half = o.amp != "off"
    fixed, moving = estimate_memory(net, blocks, micro, half, o.checkpoint_blocks, o.optimizer)
    return (f"memory       about {(fixed + moving) / 1e9:.3g} GB on each of {GPUS} GPUs: "
            f"{fixed / 1e9:.3g} for the parameters, {moving / 1e9:.3g} for the activations of "
            f"{micro} images in {16 if half else 32} bits")


def describe_disk(o, net):
    """The line about checkpoints: weights, average and the optimizer's moments."""
    parameters = sum(q.numel() for q in net.parameters())
    size = (8 * parameters + count_moments(net, o.optimizer)) / 1e9
    line = f"disk         {size:.3g} GB a checkpoint"
    if o.steps:
        count = o.steps // o.save_every + (o.steps % o.save_every > 0)
        kept = min(count, o.keep + 1) if o.keep else count
        line += f", {kept} of them at --save-every {o.save_every}"
    return line + ("" if o.keep else "; --keep N keeps the newest N")


def describe_command(o, script, arguments, micro):
    """A line of --dry-run: the command for several GPUs, with the files that are
    missing."""
    words = [a for a in arguments if a != "--dry-run"]
    line = shlex.join(["torchrun", f"--nproc_per_node={GPUS}", script, *words])
    if o.data is None:
        line += " --data PATH"
    if o.vae is None and o.space != "pixel":
        line += " --vae PATH"
    if o.batch % (GPUS * micro):
        line += f"    (--batch {o.batch} must become a multiple of {GPUS * micro})"
    return f"{GPUS} GPUs       {line}"


def mean_cost(o, net, side):
    """One image's way through a network, in the mean over the masks of a run.

    side: of the grid of tokens. -> {part: multiply-adds}; {K: K D of every block}"""
    shares = visible_shares(o, side * side)
    costs = {k: forward_cost(net, side, side, k) for k in shares}
    mean = {name: sum(costs[k][0][name] * share for k, share in shares.items()) / shares.total()
            for name in NAMES}
    return mean, {k: blocks for k, (_, blocks) in costs.items()}


def training_flop(o):
    """What a run computes: forward, backward and Muon.

    o: Options with --steps. -> FLOP"""
    net, space = build_without_numbers(o)
    mean, _ = mean_cost(o, net, o.size // space.factor // o.patch)
    step = training_flop_per_add(o) * o.batch * sum(mean.values())
    if o.optimizer == "muon":
        step += 2 * orthogonalisation_cost(net)
    return o.steps * step


def describe_cost(o, script, arguments):
    """What `python script arguments` would train and what it would take, as text."""
    net, space = build_without_numbers(o)
    square = space.factor * o.patch                                   # pixels along a token's side
    side = o.size // space.factor // o.patch
    mean, blocks = mean_cost(o, net, side)
    full = sum(forward_cost(net, side, side)[0].values())
    sizes = count_parameters(net)
    trained, fixed = sum(sizes.values()) / 1e6, count_positions(net, side * side) / 1e6
    seen = ", ".join(map(str, sorted(blocks)))
    micro = o.micro_batch or max(1, o.batch // GPUS)
    return "\n".join([
        f"parameters   {trained:.2f} M are trained: {list_parts(sizes, 1e6)}",
        f"positions    {fixed:.2f} M more are fixed sines and cosines, which papers count: "
        f"{trained + fixed:.2f} M",
        f"tokens       {side * side} of {square} x {square} pixels, visible {seen}",
        *describe_work(o, sum(mean.values()), full, len(blocks) > 1, mean),
        *describe_optimizer(o, net),
        describe_memory(o, net, blocks[max(blocks)], micro),
        describe_disk(o, net),
        describe_command(o, script, arguments, micro)])
