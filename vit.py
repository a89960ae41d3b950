"""The network: a diffusion transformer that can be given any subset of the tokens.

The idea. An image is a set of patches with positions, and a transformer maps a set of any
size. So the same weights denoise 10 % of the patches (MaskDM, arXiv 2306.11363) or all of
them. Every token carries the position of its place, so the remaining ones still know where
they are (the code gathers first and embeds then, which is cheaper and the same). The blocks
are DiT's (2212.09748): time and class enter by adaptive layer norm, whose gates start at
zero.

    u = embed(c_in x_t) + positions      (B, N, D)     every token
    u = m.gather(u)                      (B, K, D)     dropped tokens stop here
    u = blocks(u, c)                     (B, K, D)     c = embedding of time and class
    u = m.scatter(u, mask token)         (B, N, D')    only with a decoder (MaskDiT,
    u = decoder(u, c)                                  2306.09305): light blocks, all tokens
    out = head(u)                        (B, C_out, H, W)

Dropping is one token economy of three (ECONOMIES). Hidden tokens may instead take a shorter
route (TREAD, 2501.04765), or leave late, after a light mixer has seen them (MicroDiT,
2407.15811). The mask says which tokens those are. It is a value drawn outside, whatever is
done with it. Without a decoder the output at dropped patches is zero. `m = None` is the
plain, unmasked network: the same code, bit for bit.
Options: long skips (U-ViT, the network of MaskDM), a decoder, classes, a condition image.

Every residual branch starts at zero (adaLN-zero) and so does the head. At step 0 a gradient
reaches the head alone, at step 1 the embedding and the gates, from step 2 on everything.
With a decoder, what lies before its connector waits one step more. Do not look for a
gradient of the encoder's embedding and gates before step 2, or of its attention before
step 3.

Shapes: B batch, N tokens of an h x w grid, K visible, D width, D' that of light blocks,
P = p p C values per patch, P' of the condition image, P'' of the output; zt (B, C, H, W),
t (B,) in [0, 1], y (B,) labels, -1 for none; c (B, D), the condition of all blocks.
Run `python vit.py` to see which token is in which block, with each economy.
"""
import math
import re
import textwrap
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mask import Mask, draw, patchify, unpatchify
from plumbing.faces import draw_faces
from plumbing.sheets import draw_sheet
from schedules import SCHEDULES, per_image


# --- positions and time: sines and cosines ------------------------------------------------

def sincos(numbers, width, period=10000.0):
    """Numbers as cosines, then sines, at frequencies period^(-i / (width/2)).

    numbers (...) -> (..., width)"""
    half = width // 2
    index = torch.arange(half, device=numbers.device, dtype=torch.float32)
    angle = numbers.float()[..., None] * period ** (-index / half)
    return torch.cat([angle.cos(), angle.sin()], -1)


@lru_cache(maxsize=16)
def positions(h, w, width, device):
    """Fixed 2-D positions, in whole tokens -> (h w, width).

    The first half of the width encodes the column, the second half the row."""
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([sincos(column.flatten(), width // 2), sincos(row.flatten(), width // 2)], -1)


# --- one block ----------------------------------------------------------------------------

def modulate(u, shift, scale):
    """Layer norm; its shift and scale (B, D) come from the condition."""
    return F.layer_norm(u, u.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def attend(q, k, v):
    """softmax(q k^T / sqrt d) v for (B, heads, K, d).

    This is torch's fused kernel, except in bfloat16 on CPUs. There its backward pass takes
    2 to 4 times as long as the line that it stands for (torch 2.13, 26 to 256 tokens)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """DiT block: u += g1 attention(norm(u)), u += g2 mlp(norm(u)).

    Shifts, scales and gates are linear in silu(c). skip: whether a long skip ends here."""

    def __init__(self, width, heads, cond_width, skip=False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.ada = nn.Linear(cond_width, 6 * width)
        self.skip = nn.Linear(2 * width, width) if skip else None

    def attention(self, u):
        """Self-attention between the tokens that are there: u (B, K, D) -> (B, K, D)."""
        B, K, D = u.shape
        qkv = self.qkv(u).view(B, K, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                      # (B, heads, K, d)
        u = attend(q, k, v).transpose(1, 2).reshape(B, K, D)                             # (B, K, D)
        return self.out(u)

    def forward(self, u, c, skipped=None):
        """u, skipped (B, K, D), c (B, D) -> (B, K, D)."""
        if self.skip is not None:
            u = self.skip(torch.cat([u, skipped], -1))          # [U-ViT] concatenate, then project
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(F.silu(c)).chunk(6, -1)
        u = u + gate1[:, None] * self.attention(modulate(u, shift1, scale1))    # [DiT] adaLN-zero
        return u + gate2[:, None] * self.mlp(modulate(u, shift2, scale2))


def build_light_blocks(count, decoder_width, cond_width):
    """`count` blocks of another width, with heads of 32: for the decoder and the mixer."""
    heads = decoder_width // 32
    return nn.ModuleList(Block(decoder_width, heads, cond_width) for _ in range(count))


# --- token economies: what a hidden token is spared ---------------------------------------

class Economy:
    """What happens to hidden tokens on their way through the encoder.

    hidden_seen: what a hidden token holds can reach the prediction.
    all_scored: hidden tokens have an answer of their own, so the loss is on all tokens
    (losses.py) and not on the visible ones alone.
    skips: whether long skips join blocks that see the same tokens."""
    hidden_seen = False
    all_scored = False
    skips = True

    def build_parts(self, depth, width, decoder_width):
        """The economy's own layers for an encoder of `depth` blocks -> {name: module}.

        They become attributes of the network, so the names are those of its parameters."""
        return {}

    def embed_width(self, width, decoder_width):
        """The width at which tokens are embedded."""
        return width

    def encode(self, net, inputs, c, m):
        """Embed the tokens and run the encoder's blocks.

        inputs: what net.embed_tokens takes. c (B, D): the condition. m: the mask, or None.
        -> u (B, K, D), or (B, N, D) for all tokens"""
        raise NotImplementedError


class DropEconomy(Economy):
    """Hidden tokens never enter. [MaskDM, MaskDiT]"""

    def encode(self, net, inputs, c, m):
        u = net.embed_tokens(*inputs, m)                                                 # (B, K, D)
        return net.run_blocks(u, c)


class RouteEconomy(Economy):
    """Hidden tokens skip the blocks in the middle and come back unchanged. [TREAD]

    Nothing is lost, so all tokens are scored. Without a mask none skips."""
    hidden_seen = True
    all_scored = True
    skips = False

    def encode(self, net, inputs, c, m):
        i, j = route_span(len(net.blocks))
        u = net.embed_tokens(*inputs)                                                    # (B, N, D)
        u = net.run_blocks(u, c, 0, i)
        if m is None:
            u = net.run_blocks(u, c, i, j)
        else:
            routed = net.run_blocks(m.gather(u), c, i, j)                                # (B, K, D)
            u = m.scatter(routed, fill=u)                           # [TREAD] the others as before
        return net.run_blocks(u, c, j)


def route_span(depth):
    """The blocks i ... j - 1 that hidden tokens skip -> (i, j).

    All tokens meet in the first two and in the last three blocks (TREAD's best). In shallow
    networks they meet in a quarter of the blocks at each end."""
    return min(2, (depth + 1) // 4), depth - min(3, (depth + 1) // 4)


class DeferEconomy(Economy):
    """Hidden tokens leave late, after a light mixer has seen all of them. [MicroDiT]

    So each visible token knows about its neighbours. The mixer has the decoder's width."""
    hidden_seen = True

    def build_parts(self, depth, width, decoder_width):
        count = math.ceil(depth * 6 / 28)                           # [MicroDiT-XL] 6 for 28
        return {
            "mixer": build_light_blocks(count, decoder_width, width),
            "enter": nn.Linear(decoder_width, width),               # [MicroDiT] to width D
        }

    def embed_width(self, width, decoder_width):
        return decoder_width

    def encode(self, net, inputs, c, m):
        u = net.embed_tokens(*inputs)                                                   # (B, N, D')
        for block in net.mixer:
            u = net.run_block(block, u, c)
        if m is not None:
            u = m.gather(u)                                                             # (B, K, D')
        return net.run_blocks(net.enter(u), c)


ECONOMIES = {"drop": DropEconomy(), "route": RouteEconomy(), "defer": DeferEconomy()}


# --- the whole network --------------------------------------------------------------------

class ViT(nn.Module):
    """Encoder on the visible tokens, and an optional light decoder on all tokens."""

    def __init__(
        self,
        schedule,                 # gives c_in and the time's angle
        channels=3,               # of the image: C
        heads_out=1,              # image-shaped fields: C_out = C heads_out, schedule.head_count
        patch=4,                  # side of a token: p
        width=192,                # of the encoder: D
        depth=6,                  # blocks of the encoder
        heads=3,                  # attention heads of the encoder
        skips=False,              # long skips [U-ViT]
        decoder=0,                # blocks of the decoder, 0 for none [MaskDiT]
        decoder_width=128,        # of the light blocks: those of decoder and mixer
        classes=0,                # number of labels, 0 for none
        cond_channels=0,          # channels of the condition image, 0 for none
        checkpoint_blocks=False,  # recompute blocks in the backward pass: less memory
        economy="drop",           # a name in ECONOMIES
    ):
        super().__init__()
        self.schedule = schedule
        self.p, self.width = patch, width
        self.checkpoint_blocks = checkpoint_blocks
        # The order of the layers is the order of their random weights: it must stay.
        self.economy = ECONOMIES[economy]
        for name, part in self.economy.build_parts(depth, width, decoder_width).items():
            setattr(self, name, part)
        first = self.economy.embed_width(width, decoder_width)
        area = patch * patch
        self.embed = nn.Linear(area * channels, first)
        self.embed_cond = None
        if cond_channels:
            self.embed_cond = nn.Linear(area * cond_channels, first, bias=False)
        self.embed_time = nn.Sequential(
            nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_class = nn.Embedding(classes, width) if classes else None
        # [U-ViT] block i feeds block depth - 1 - i; one or two in the middle stay alone
        self.skip_count = (depth - 1) // 2 if skips else 0
        self.blocks = nn.ModuleList(
            Block(width, heads, width, skip=i >= depth - self.skip_count) for i in range(depth))
        self.decoder = None
        if decoder:                                                 # [MaskDiT]
            self.connect_ada = nn.Linear(width, 2 * width)
            self.connect = nn.Linear(width, decoder_width)
            self.mask_token = nn.Parameter(torch.zeros(decoder_width))
            self.decoder = build_light_blocks(decoder, decoder_width, width)
        last = decoder_width if decoder else width
        self.head_ada = nn.Linear(width, 2 * last)
        self.head = nn.Linear(last, area * channels * heads_out)
        self.initialise()

    def initialise(self):
        """Xavier weights, zero biases; gates, connector, condition and head start at zero.

        A skip starts as the identity on u, so that it changes nothing at first."""
        linears = [layer for layer in self.modules() if isinstance(layer, nn.Linear)]
        blocks = self.all_blocks()
        for layer in linears:
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.embed_time[0].weight, std=0.02)
        nn.init.normal_(self.embed_time[2].weight, std=0.02)
        if self.embed_class is not None:
            nn.init.normal_(self.embed_class.weight, std=0.02)
        zero = [self.head, self.head_ada, *(block.ada for block in blocks)]
        if self.embed_cond is not None:
            zero.append(self.embed_cond)
        if self.decoder is not None:
            nn.init.normal_(self.mask_token, std=0.02)
            zero += [self.connect, self.connect_ada]
        for layer in zero:
            nn.init.zeros_(layer.weight)
        for block in blocks:
            if block.skip is not None:
                nn.init.eye_(block.skip.weight)

    def all_blocks(self):
        """The blocks of economy, encoder and decoder, in their order."""
        return [layer for layer in self.modules() if isinstance(layer, Block)]

    def embed_tokens(self, x, cond, place, m=None):
        """Patches as tokens at their places: all of them, or a mask's visible ones.

        They are embedded after they are gathered, for that is cheaper.
        x (B, N, P), cond (B, N, P') or None, place (N, D) -> u (B, K, D), or (B, N, D)"""
        if m is not None:
            x = m.gather(x)                                                              # (B, K, P)
            place = place[m.keep]                                                        # (B, K, D)
        u = self.embed(x)                                                                # (B, K, D)
        if self.embed_cond is not None:                     # never noised, dropped with its patch
            u = u + self.embed_cond(cond if m is None else m.gather(cond))
        return u + place

    def embed_condition(self, t, y, B, device):
        """Times (B,) or (1,) and labels (B,) or None -> c (B, D)."""
        clock = 1000 * self.schedule.angle(t) / (math.pi / 2)       # an angle: finite everywhere
        c = self.embed_time(sincos(clock.float().to(device), 256)).expand(B, -1)            # (B, D)
        if self.embed_class is None or y is None:
            return c
        # [MaskDiT] "no label" is the zero vector
        return c + self.embed_class(y.clamp(min=0)) * (y >= 0)[:, None]

    def run_block(self, block, *inputs):
        """One block, recomputed in the backward pass if `checkpoint_blocks` is set."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def run_blocks(self, u, c, i=0, j=None):
        """The encoder's blocks i ... j - 1, by default all: (B, K, D) -> (B, K, D)."""
        kept = []                                                   # [U-ViT] for the long skips
        for number, block in enumerate(self.blocks[i:j], i):
            if block.skip is None:
                u = self.run_block(block, u, c)
            else:
                u = self.run_block(block, u, c, kept.pop())
            if number < self.skip_count:
                kept.append(u)
        return u

    def decode(self, u, c, m, h, w):
        """[MaskDiT] light blocks on all tokens; hidden ones start as the mask token.

        u (B, K, D) or (B, N, D) -> (B, N, D')"""
        shift, scale = self.connect_ada(F.silu(c)).chunk(2, -1)
        u = self.connect(modulate(u, shift, scale))                                     # (B, K, D')
        if u.shape[1] == h * w:
            # DistributedDataParallel wants a gradient for every parameter, also when
            # nothing was dropped.
            u = u + 0 * self.mask_token
        else:
            u = m.scatter(u, fill=self.mask_token)                                      # (B, N, D')
        u = u + positions(h, w, u.shape[2], u.device)
        for block in self.decoder:
            u = self.run_block(block, u, c)
        return u

    def forward(self, zt, t, y=None, m=None, cond=None):
        """The network's output for noisy images.

        zt (B, C, H, W): x_t at times t (B,).
        y (B,): labels, int64, -1 for "no label"; None: no labels.
        m: the mask, or None when nothing is hidden.
        cond (B, C', H, W): the condition image in [-1, 1], or None.
        -> (B, C_out, H, W), float32, zero at dropped patches unless there is a decoder"""
        B, _, H, W = zt.shape
        h, w = H // self.p, W // self.p
        x = patchify(per_image(self.schedule.input_scale(t), zt) * zt, self.p)           # (B, N, P)
        if self.embed_cond is not None:
            cond = patchify(cond, self.p)                                               # (B, N, P')
        place = positions(h, w, self.embed.out_features, zt.device)                         # (N, D)
        c = self.embed_condition(t, y, B, zt.device)                                        # (B, D)
        u = self.economy.encode(self, (x, cond, place), c, m)                       # (B, K or N, D)
        if self.decoder is not None:
            u = self.decode(u, c, m, h, w)                                              # (B, N, D')
        shift, scale = self.head_ada(F.silu(c)).chunk(2, -1)
        out = self.head(modulate(u, shift, scale)).float()                        # (B, K or N, P'')
        if out.shape[1] < h * w:
            out = m.scatter(out)                                                       # (B, N, P'')
        return unpatchify(out, self.p, h, w)


# Parameters of ours, for latents (4 channels, patch 2) without classes and decoder. DiT's
# own 33, 130, 458 and 675 M have classes and a learned variance.
MODELS = {
    "tiny": dict(width=192, depth=6, heads=3, decoder_width=128),       # 4.2 M, this project's own
    "small": dict(width=384, depth=12, heads=6, decoder_width=256),     # 32.5 M, DiT-S
    "base": dict(width=768, depth=12, heads=12, decoder_width=512),     # 129.5 M, DiT-B
    "large": dict(width=1024, depth=24, heads=16, decoder_width=512),   # 456.8 M, DiT-L
    "xl": dict(width=1152, depth=28, heads=16, decoder_width=512),      # 673.7 M, DiT-XL
}


# --- the picture --------------------------------------------------------------------------

def draw_economies(side=80, seed=0):
    """The picture of `python vit.py`: which token is in which block, with each economy.

    side: pixels of a picture, a multiple of 8. seed: which face and mask. -> PIL image"""
    cells, p = 8, side // 8                                                     # an 8 x 8 grid
    x = patchify(draw_faces(1, side, seed).pixels, p)                                    # (1, N, P)
    m = draw("patch", 1, cells, cells, 0.5, torch.Generator().manual_seed(seed))
    absent = torch.full((x.shape[2],), 235, dtype=torch.uint8)                  # light grey
    mask_token = torch.tensor([90, 130, 190], dtype=torch.uint8).repeat(p * p)  # blue
    every = unpatchify(x, p, cells, cells)[0]
    visible = unpatchify(m.scatter(m.gather(x), absent), p, cells, cells)[0]
    returned = unpatchify(m.scatter(m.gather(x), mask_token), p, cells, cells)[0]
    nothing = torch.full_like(every, 255)
    networks = [(f"{name}: {economy.__doc__.splitlines()[0]}", economy, dict(economy=name))
                for name, economy in ECONOMIES.items()]
    text = "drop, with a decoder: hidden tokens come back as mask tokens (blue). [MaskDiT]"
    networks.append((text, ECONOMIES["drop"], dict(decoder=2)))
    traces = [trace_tokens(m, cells, cells, depth=6, **options) for *_, options in networks]
    columns = sorted({name for trace in traces for name in trace}, key=column_place)
    rows = []
    for (text, economy, _), trace in zip(networks, traces):
        pictures = [nothing] * len(columns)
        for name, count in trace.items():
            full = returned if name.startswith("decoder") else every
            pictures[columns.index(name)] = full if count == m.N else visible
        scored = every if economy.all_scored else visible
        rows.append((textwrap.fill(text, 24), [visible, *pictures, scored]))
    titles = ["mask", *columns, "tokens that are\nscored (losses.py)"]
    return draw_sheet(rows, titles)


def column_place(name):
    """The place of a block in the picture: an economy's own first, the decoder last."""
    part = name.partition("[")[0]
    return {"blocks": 1, "decoder": 2}.get(part, 0), name


def trace_tokens(m, h, w, **options):
    """How many tokens enter each block of a network -> {block's name: K or N}.

    The network runs on torch's meta device: shapes without numbers. options: ViT's."""
    counts = {}
    with torch.device("meta"), torch.no_grad():
        net = ViT(SCHEDULES["ddm"], patch=1, width=32, heads=1, decoder_width=32, **options)
        for name, layer in net.named_modules():
            if isinstance(layer, Block):
                layer.register_forward_pre_hook(partial(_count_tokens, counts, name))
        net(torch.empty(1, 3, h, w), torch.zeros(1), None, Mask(m.keep.to("meta"), m.N))
    return counts


def _count_tokens(counts, name, block, inputs):
    """Note the number of tokens that enter a block: blocks.3 is noted as blocks[3]."""
    counts[re.sub(r"\.(\d+)", r"[\1]", name)] = inputs[0].shape[1]


if __name__ == "__main__":
    from plumbing.console import run_picture_command
    run_picture_command("Draw which token is in which block, with each token economy.",
                        draw_economies, "vit.png", seed=(0, "which face and which mask"))
