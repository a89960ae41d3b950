"""The network: a diffusion transformer that can be given any subset of the tokens.

The idea. An image is a set of patches with positions; a transformer maps a set of any size. So the same weights denoise 10 % of
the patches (MaskDM, arXiv 2306.11363) or all of them. Positions are added *before* tokens are dropped, so the survivors still
know where they are. The blocks are DiT's (2212.09748): time and class enter by adaptive layer norm whose gates start at zero.

    u = embed(c_in x_t) + positions          (B, N, D)     every token
    u = m.gather(u)                          (B, K, D)     what is dropped here cannot reach the output
    u = blocks(u, c)                         (B, K, D)     c = embedding of time and class
    u = m.scatter(u, mask token)             (B, N, D')    only with a decoder (MaskDiT, 2306.09305): light blocks on all tokens
    F = head(u)                              (B, C_out, H, W)

Dropping is one token economy of three (ECONOMIES): hidden tokens may instead take a shorter route (TREAD, 2501.04765) or leave late, after
a light mixer has seen them (MicroDiT, 2407.15811). The mask says which tokens those are; it is a value drawn outside, whatever is done with it.
Without a decoder the output at dropped patches is zero. `m = None` is the plain, unmasked network: the same code, bit for bit.
Options: long skips (U-ViT, the network of MaskDM), a decoder, classes, extra condition channels.
Every residual branch starts at zero (adaLN-zero) and so does the head: at step 0 a gradient reaches the head alone, at step 1 the embedding
and the gates, from step 2 on everything. With a decoder, what lies before its connector waits one step more: do not look for the encoder's
first gradient (embedding, gates) before step 2, nor for that of its attention before step 3.

Shapes: B batch, N tokens of an h x w grid, K visible, D width, P = p p C values per patch; t in [0, 1], y labels (-1: no label).
"""
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

from mask import patchify, unpatchify
from schedules import per_image

MODELS = {                                                                      # parameters without classes and decoder
    "tiny": dict(width=192, depth=6, heads=3, decoder_width=128),               # 4 M, this project's own
    "small": dict(width=384, depth=12, heads=6, decoder_width=256),             # 33 M, DiT-S
    "base": dict(width=768, depth=12, heads=12, decoder_width=512),             # 130 M, DiT-B
    "large": dict(width=1024, depth=24, heads=16, decoder_width=512),           # 458 M, DiT-L
    "xl": dict(width=1152, depth=28, heads=16, decoder_width=512),              # 675 M, DiT-XL
}


# --- positions and time: sines and cosines ----------------------------------------------------------------------------------

def sincos(x, width, period=10000.0):
    """Numbers (...) -> (..., width): cosines, then sines, at frequencies period^(-i / (width/2))."""
    frequency = period ** (-torch.arange(width // 2, device=x.device, dtype=torch.float32) / (width // 2))
    angle = x.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


@lru_cache(maxsize=16)
def positions(h, w, width, device):
    """Fixed 2-D positions (h w, width): the first half encodes the column, the second the row, in whole tokens."""
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    return torch.cat([sincos(x.flatten(), width // 2), sincos(y.flatten(), width // 2)], -1)


# --- one block --------------------------------------------------------------------------------------------------------------

def modulate(u, shift, scale):
    """Layer norm without weights of its own; shift and scale (B, D) come from the condition."""
    return F.layer_norm(u, u.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def attend(q, k, v):
    """softmax(q k^T / sqrt d) v for (B, heads, K, d). torch's fused kernel, except in bfloat16 on CPUs, where its backward pass takes 2 to 4
    times as long as the line that it stands for (torch 2.13, 26 to 256 tokens)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """DiT block: u += g1 * attention(norm(u)), u += g2 * mlp(norm(u)); shifts, scales and gates are linear in silu(c)."""

    def __init__(self, width, heads, cond_width, skip=False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.ada = nn.Linear(cond_width, 6 * width)
        self.skip = nn.Linear(2 * width, width) if skip else None

    def attention(self, u):
        B, K, D = u.shape
        q, k, v = self.qkv(u).view(B, K, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)                      # (B, heads, K, d)
        return self.out(attend(q, k, v).transpose(1, 2).reshape(B, K, D))

    def forward(self, u, c, skipped=None):
        if self.skip is not None:
            u = self.skip(torch.cat([u, skipped], -1))                          # [U-ViT] concatenate, then project back
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(F.silu(c)).chunk(6, -1)
        u = u + gate1[:, None] * self.attention(modulate(u, shift1, scale1))
        return u + gate2[:, None] * self.mlp(modulate(u, shift2, scale2))


# --- token economies: what a hidden token is spared. run(net, see, c, m): see(m) embeds the visible tokens, see(None) all of them -------

def drop(net, see, c, m):
    """[MaskDM, MaskDiT] Hidden tokens are not even embedded. -> (B, K, D)"""
    return net.encode(see(m), c)


def route(net, see, c, m):
    """[TREAD] Hidden tokens skip blocks i ... j - 1 and re-join as they were before block i. Nothing is lost, so all tokens are scored; without
    a mask, as at sampling, nobody skips. -> (B, N, D)"""
    i, j = route_span(len(net.blocks))
    u = net.encode(see(None), c, 0, i)
    u = net.encode(u, c, i, j) if m is None else m.scatter(net.encode(m.gather(u), c, i, j), fill=u)
    return net.encode(u, c, j)


def route_span(depth):
    """(i, j): all tokens meet in the first two and in the last three blocks (TREAD's best; in shallow networks in a quarter at each end)."""
    return min(2, (depth + 1) // 4), depth - min(3, (depth + 1) // 4)


def defer(net, see, c, m):
    """[MicroDiT] A light mixer sees all tokens, so that each visible one knows about its neighbours, then the hidden ones are dropped. -> (B, K, D)"""
    u = see(None)                                                                                                    # (B, N, D')
    for block in net.mixer:
        u = net.run(block, u, c)
    return net.encode(net.enter(u if m is None else m.gather(u)), c)


@dataclass(frozen=True)
class Economy:
    """run: see above. hidden_seen: what a hidden token holds can reach the prediction. all_scored: hidden tokens have an answer of their
    own, so the loss is on all tokens (losses.py) and not on the visible ones alone. mixer: its blocks, for an encoder of some depth. skips:
    whether long skips join blocks that see the same tokens (`run` calls `encode` once)."""
    run: Callable
    hidden_seen: bool
    all_scored: bool
    mixer: Callable = lambda depth: 0
    skips: bool = True


ECONOMIES = {
    "drop": Economy(drop, hidden_seen=False, all_scored=False),
    "route": Economy(route, hidden_seen=True, all_scored=True, skips=False),
    "defer": Economy(defer, hidden_seen=True, all_scored=False, mixer=lambda depth: math.ceil(depth * 6 / 28)),      # [MicroDiT-XL] 6 for 28
}


# --- the whole network ------------------------------------------------------------------------------------------------------

class ViT(nn.Module):
    """Encoder on the visible tokens, optional light decoder on all tokens.

    channels, heads_out: image channels C in and number of image-shaped fields out (`schedule.head_count(predict)`), C_out = C heads_out.
    patch: p. width, depth, heads: the encoder. skips: U-ViT's long skips. decoder: its depth, 0 for none. decoder_width: of the light
    blocks, those of the decoder and of the mixer. classes: number of labels, 0 for none. cond_channels: channels of the condition image,
    0 for none. economy: a name in ECONOMIES. schedule: gives c_in and the time angle."""

    def __init__(self, schedule, channels=3, heads_out=1, patch=4, width=192, depth=6, heads=3, skips=False, decoder=0,
                 decoder_width=128, classes=0, cond_channels=0, checkpoint_blocks=False, economy="drop"):
        super().__init__()
        self.schedule, self.p, self.width, self.checkpoint_blocks = schedule, patch, width, checkpoint_blocks
        self.economy = ECONOMIES[economy]
        light = lambda count: nn.ModuleList(Block(decoder_width, decoder_width // 32, width) for _ in range(count))
        out = patch * patch * channels * heads_out
        self.mixer = light(self.economy.mixer(depth)) or None
        self.enter = nn.Linear(decoder_width, width) if self.mixer else None    # [MicroDiT] from the mixer's width to the encoder's
        first = decoder_width if self.mixer else width
        self.embed = nn.Linear(patch * patch * channels, first)
        self.embed_cond = nn.Linear(patch * patch * cond_channels, first, bias=False) if cond_channels else None
        self.embed_time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_class = nn.Embedding(classes, width) if classes else None
        self.arms = (depth - 1) // 2 if skips else 0                            # [U-ViT] first blocks, a middle of one or two, last blocks
        self.blocks = nn.ModuleList(Block(width, heads, width, skip=i >= depth - self.arms) for i in range(depth))
        self.decoder = None
        if decoder:                                                             # [MaskDiT] connector, mask token, light blocks
            self.connect_ada = nn.Linear(width, 2 * width)
            self.connect = nn.Linear(width, decoder_width)
            self.mask_token = nn.Parameter(torch.zeros(decoder_width))
            self.decoder = light(decoder)
        self.head_ada = nn.Linear(width, 2 * (decoder_width if decoder else width))
        self.head = nn.Linear(decoder_width if decoder else width, out)
        self.initialise()

    def initialise(self):
        """Xavier weights and zero biases; zero for gates, connector, condition and head; skips start as the identity on u."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for weight in [self.embed_time[0].weight, self.embed_time[2].weight] + ([self.embed_class.weight] if self.embed_class else []):
            nn.init.normal_(weight, std=0.02)
        blocks = self.all_blocks()
        zero = [self.head, self.head_ada] + [block.ada for block in blocks] + ([self.embed_cond] if self.embed_cond else [])
        if self.decoder is not None:
            nn.init.normal_(self.mask_token, std=0.02)
            zero += [self.connect, self.connect_ada]
        for linear in zero:
            nn.init.zeros_(linear.weight)
        for block in blocks:
            if block.skip is not None:
                with torch.no_grad():
                    block.skip.weight.copy_(torch.eye(block.skip.out_features, block.skip.in_features))

    def all_blocks(self):
        """The blocks of mixer, encoder and decoder, in their order."""
        return [*(self.mixer or []), *self.blocks, *(self.decoder or [])]

    def run(self, block, *inputs):
        """One block, recomputed in the backward pass instead of remembered when `checkpoint_blocks` is set."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def encode(self, u, c, i=0, j=None):
        """Blocks i ... j - 1, all of them by default: (B, K, D) -> (B, K, D)."""
        stack = []
        for number, block in enumerate(self.blocks[i:j], i):
            u = self.run(block, u, c) if block.skip is None else self.run(block, u, c, stack.pop())
            if number < self.arms:
                stack.append(u)
        return u

    def forward(self, zt, t, y=None, m=None, cond=None):
        """zt (B, C, H, W) at times t (B,), labels y (B,) int64 with -1 for "no label", mask m or None, condition (B, C', H, W)
        in [-1, 1] or None  ->  (B, C_out, H, W), zero at dropped patches unless there is a decoder."""
        h, w = zt.shape[2] // self.p, zt.shape[3] // self.p
        c_in = per_image(self.schedule.input_scale(t), zt)

        def see(m):
            """Tokens at their places, all of them or the visible ones: embedded after they are gathered, for that is cheaper."""
            u = self.embed(patchify(c_in * zt, self.p)) if m is None else self.embed(m.gather(patchify(c_in * zt, self.p)))
            if self.embed_cond is not None:                                     # never noised, dropped with its patch
                tokens = patchify(cond, self.p)
                u = u + self.embed_cond(tokens if m is None else m.gather(tokens))
            place = positions(h, w, u.shape[2], zt.device)                                                           # (N, D)
            return u + (place if m is None else place[m.keep])                                                       # (B, K, D)

        clock = 1000 * self.schedule.angle(t) / (math.pi / 2)                   # the noise level as an angle: finite everywhere
        c = self.embed_time(sincos(clock.float().to(zt.device), 256)).expand(len(zt), -1)                     # (B, D)
        if self.embed_class is not None and y is not None:
            c = c + self.embed_class(y.clamp(min=0)) * (y >= 0)[:, None]        # "no label" is the zero vector [MaskDiT]

        u = self.economy.run(self, see, c, m)                                                                        # (B, K or N, D)

        if self.decoder is not None:
            u = self.connect(modulate(u, *self.connect_ada(F.silu(c)).chunk(2, -1)))                                 # (B, K, D')
            # 0 * token: DistributedDataParallel wants a gradient for every parameter, also when nothing was dropped
            u = u + 0 * self.mask_token if u.shape[1] == h * w else m.scatter(u, fill=self.mask_token)               # (B, N, D')
            u = u + positions(h, w, u.shape[2], zt.device)
            for block in self.decoder:
                u = self.run(block, u, c)
        u = self.head(modulate(u, *self.head_ada(F.silu(c)).chunk(2, -1))).float()
        if u.shape[1] < h * w:
            u = m.scatter(u)                                                                                         # (B, N, P')
        return unpatchify(u, self.p, h, w)
