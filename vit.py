"""The network: a diffusion transformer that can be given any subset of the tokens.

The idea. An image is a set of patches with positions, and a transformer maps a set of any
size. So the same weights denoise 10 % of the patches (MaskDM, arXiv 2306.11363) or all of
them. Every token carries the position of its place, so the remaining ones still know where
they are (the code gathers first and embeds then, which is cheaper and the same). The blocks
are DiT's (2212.09748): time and class enter by adaptive layer norm, whose gates start at
zero. The small sizes have them with three later changes (RotaryBlock).

    u = embed(c_in x_t) + positions      (B, N, D)     every token
    u = m.gather(u)                      (B, K, D)     dropped tokens stop here
    u = blocks(u, c, turns)              (B, K, D)     c = embedding of time and class;
                                                       turns: rotary positions
    u = m.scatter(u, mask token)         (B, N, D')    only with a decoder (MaskDiT,
    u = decoder(u, c)                                  2306.09305): light blocks, all tokens
    out = head(u)                        (B, C_out, H, W)

With a PatchGuess the network is given each patch along the data's principal axes. What it
answers is added to the best linear guess about a patch that uses this patch alone.
Dropping is one token economy of three (ECONOMIES). Hidden tokens may instead take a shorter
route (TREAD, 2501.04765), or leave late, after a light mixer has seen them (MicroDiT,
2407.15811). The mask says which tokens those are. It is a value drawn outside, whatever is
done with it. Without a decoder the output at dropped patches is zero. `m = None` is the
plain, unmasked network: the same code, bit for bit.
Options: long skips (U-ViT, the network of MaskDM), a decoder, classes, a condition image.

Every residual branch starts at zero (adaLN-zero) and so does the head. At step 0 a gradient
reaches the head alone, at step 1 the embedding and the gates, from step 2 on everything.
With a decoder it is the same: its connector starts with random weights, so nothing waits
for it. Do not look for a gradient of the attention before step 2.

Shapes: B batch, N tokens of an h x w grid, K visible, D width, D' that of light blocks,
P = p p C values per patch, P' of the condition image, P'' of the output; zt (B, C, H, W),
t (B,) in [0, 1], y (B,) labels, -1 for none; c (B, D), the condition of all blocks.
Run `python vit.py` to see which token is in which block, with each economy.
"""
import math
import re
import textwrap
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mask import Mask, draw, patchify, unpatchify
from plumbing.faces import draw_faces
from plumbing.sheets import draw_sheet
from schedules import PREDICTIONS, SCHEDULES, per_image, to_float64


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


class Places:
    """Where tokens are: on an h x w grid, all of them or the visible ones of a mask."""

    def __init__(self, h, w, device, m=None):
        self.h, self.w, self.device, self.m = h, w, device, m

    def of(self, m):
        """The places of a mask's visible tokens; the same places for None."""
        return self if m is None else Places(self.h, self.w, self.device, m)

    def pick(self, table):
        """The rows (N, d) of these tokens -> (N, d), or (B, K, d) with a mask."""
        return table if self.m is None else table[self.m.keep]

    def embed(self, width):
        """Fixed 2-D positions, to be added to tokens -> (N, width) or (B, K, width)."""
        return self.pick(positions(self.h, self.w, width, self.device))

    def turns(self, d):
        """Rotary positions for heads of d channels -> (N, d), masked (B, 1, K, d)."""
        turns = self.pick(rotary_turns(self.h, self.w, d, self.device))
        return turns if self.m is None else turns[:, None]


@lru_cache(maxsize=16)
def rotary_turns(h, w, d, device):
    """[RoPE] How far each pair of a head's d channels turns at each token: the cosines of
    the angles, then their sines -> (h w, d).

    The first half of the pairs turns with the column, the second half with the row."""
    frequency = 100.0 ** (-torch.arange(d // 4, device=device) / (d // 4))
    row = torch.arange(h, device=device).repeat_interleave(w)
    column = torch.arange(w, device=device).repeat(h)
    angles = torch.cat([column[:, None] * frequency, row[:, None] * frequency], -1)
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotate(x, turns):
    """Turn each pair of channels: x (B, heads, K, d), turns (..., K, d).

    The product of two turned vectors depends on how far their tokens lie apart. [RoPE]"""
    (a, b), (cos, sin) = x.chunk(2, -1), turns.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


# --- the network's clock: what it is told of a time ---------------------------------------

class AngleClock:
    """The noise level as an angle, from 0 to 1000: finite everywhere.

    A clock's `low` is the lowest noise level b / a that it saw in training; 0: no limit."""
    low = 0.0

    def read(self, schedule, t):
        """Times as the numbers that `sincos` embeds, float64."""
        return 1000 * schedule.angle(t) / (math.pi / 2)


class IndexClock:
    """The step of DDPM's 1,000, 0 to 999, with a fraction: where ln alpha-bar agrees. [DiT]

    Its betas go from 1e-4 to .02 in equal steps."""
    low = math.sqrt(1e-4 / (1 - 1e-4))

    def read(self, schedule, t):
        t = to_float64(t)
        a, b = schedule.a(t), schedule.b(t)
        table = log_alpha_bars(t.device)
        # alpha-bar = a^2 / (a^2 + b^2), also where a schedule does not keep the variance
        level = (2 * a.log() - (a ** 2 + b ** 2).log()).clamp(table[-1], table[0])
        after = torch.searchsorted(-table, -level).clamp(1, len(table) - 1)
        fraction = (table[after - 1] - level) / (table[after - 1] - table[after])
        return after - 1 + fraction


@lru_cache(maxsize=4)
def log_alpha_bars(device):
    """[DDPM] ln alpha-bar of the indices 0 ... 999 -> (1000,), float64, falling."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=device)
    return torch.log1p(-betas).cumsum(0)


class LogSigmaClock:
    """A quarter of the logarithm of the noise level, ln(b / a) / 4. [EDM, MaskDiT]"""
    low = 0.002

    def read(self, schedule, t):
        t = to_float64(t)
        # clamp: finite where nothing is left of the image or of the noise
        return (schedule.b(t) / schedule.a(t)).clamp(1e-5, 1e5).log() / 4


CLOCKS = {"angle": AngleClock(), "index": IndexClock(), "log_sigma": LogSigmaClock()}


# --- one block ----------------------------------------------------------------------------

def modulate(u, shift, scale):
    """Layer norm; its shift and scale (B, D) come from the condition."""
    return F.layer_norm(u, u.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def attend(q, k, v):
    """softmax(q k^T / sqrt d) v for (B, heads, K, d).

    This is torch's fused kernel, except in bfloat16 on CPUs. There its backward pass takes
    2 to 4 times as long as the line that it stands for (torch 2.13, 26 to 256 tokens; with
    1,024 tokens both are equal)."""
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
            nn.Linear(width, 4 * width), self.activation(), nn.Linear(4 * width, width))
        self.ada = nn.Linear(cond_width, 6 * width)
        self.skip = nn.Linear(2 * width, width) if skip else None

    def activation(self):
        """Between the two layers of the mlp."""
        return nn.GELU(approximate="tanh")

    def relate(self, q, k, turns):
        """What queries and keys (B, heads, K, d) are before they meet: here as they are."""
        return q, k

    def attention(self, u, turns=None):
        """Self-attention between the tokens that are there: u (B, K, D) -> (B, K, D)."""
        B, K, D = u.shape
        qkv = self.qkv(u).view(B, K, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                      # (B, heads, K, d)
        q, k = self.relate(q, k, turns)
        u = attend(q, k, v).transpose(1, 2).reshape(B, K, D)                             # (B, K, D)
        return self.out(u)

    def forward(self, u, c, skipped=None, turns=None):
        """u, skipped (B, K, D), c (B, D), turns: of `Places` -> (B, K, D)."""
        if self.skip is not None:
            u = self.skip(torch.cat([u, skipped], -1))          # [U-ViT] concatenate, then project
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(F.silu(c)).chunk(6, -1)
        u = u + gate1[:, None] * self.attention(modulate(u, shift1, scale1), turns)
        return u + gate2[:, None] * self.mlp(modulate(u, shift2, scale2))       # [DiT] adaLN-zero


class RotaryBlock(Block):
    """DiT's block with three later changes, each measured in RESULTS.md.

    Queries and keys have a root mean square of 1, times a learned scale a channel, so that
    attention cannot saturate [QK-norm]. They are turned by their place, so that it knows
    how far tokens lie apart [RoPE, in 2-D]. The mlp squares a ReLU, which is cheaper than
    GELU [Primer]."""

    def __init__(self, width, heads, cond_width, skip=False):
        super().__init__(width, heads, cond_width, skip)
        self.q_scale = nn.Parameter(torch.ones(width // heads))
        self.k_scale = nn.Parameter(torch.ones(width // heads))

    def activation(self):
        return SquaredReLU()

    def relate(self, q, k, turns):
        d = q.shape[-1:]
        turned = [rotate(F.rms_norm(x.float(), d, scale.float(), eps=1e-6), turns)
                  for x, scale in ((q, self.q_scale), (k, self.k_scale))]
        return turned[0].to(q.dtype), turned[1].to(k.dtype)


class SquaredReLU(nn.Module):
    """max(x, 0)^2."""

    def forward(self, x):
        x = F.relu(x)
        return x * x                            # autocast on CUDA would make a square float32


BLOCKS = {"dit": Block, "rotary": RotaryBlock}


def build_light_blocks(count, decoder_width, cond_width, block="dit"):
    """`count` blocks of another width, with heads of 32: for the decoder and the mixer."""
    heads = decoder_width // 32
    return nn.ModuleList(BLOCKS[block](decoder_width, heads, cond_width) for _ in range(count))


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

    def build_parts(self, depth, width, decoder_width, block="dit"):
        """The economy's own layers for an encoder of `depth` blocks -> {name: module}.

        They become attributes of the network, so the names are those of its parameters."""
        return {}

    def embed_width(self, width, decoder_width):
        """The width at which tokens are embedded."""
        return width

    def encode(self, net, inputs, c, place, m):
        """Embed the tokens and run the encoder's blocks.

        inputs: what net.embed_tokens takes. c (B, D): the condition. place: the Places of
        all tokens. m: the mask, or None.
        -> u (B, K, D), or (B, N, D) for all tokens"""
        raise NotImplementedError


class DropEconomy(Economy):
    """Hidden tokens never enter. [MaskDM, MaskDiT]"""

    def encode(self, net, inputs, c, place, m):
        u = net.embed_tokens(*inputs, place.of(m))                                       # (B, K, D)
        return net.run_blocks(net.blocks, u, c, place.of(m))


class RouteEconomy(Economy):
    """Hidden tokens skip the blocks in the middle and come back unchanged. [TREAD]

    Nothing is lost, so all tokens are scored. Without a mask none skips."""
    hidden_seen = True
    all_scored = True
    skips = False

    def encode(self, net, inputs, c, place, m):
        i, j = route_span(len(net.blocks))
        u = net.embed_tokens(*inputs, place)                                             # (B, N, D)
        u = net.run_blocks(net.blocks[:i], u, c, place)
        if m is None:
            u = net.run_blocks(net.blocks[i:j], u, c, place)
        else:
            routed = net.run_blocks(net.blocks[i:j], m.gather(u), c, place.of(m))        # (B, K, D)
            u = m.scatter(routed, fill=u)                           # [TREAD] the others as before
        return net.run_blocks(net.blocks[j:], u, c, place)


def route_span(depth):
    """The blocks i ... j - 1 that hidden tokens skip -> (i, j).

    All tokens meet in the first two and in the last three blocks (TREAD's best). In shallow
    networks they meet in a quarter of the blocks at each end."""
    return min(2, (depth + 1) // 4), depth - min(3, (depth + 1) // 4)


class DeferEconomy(Economy):
    """Hidden tokens leave late, after a light mixer has seen all of them. [MicroDiT]

    So each visible token knows about its neighbours. The mixer has the decoder's width."""
    hidden_seen = True

    def build_parts(self, depth, width, decoder_width, block="dit"):
        count = math.ceil(depth * 6 / 28)                           # [MicroDiT-XL] 6 for 28
        return {
            "mixer": build_light_blocks(count, decoder_width, width, block),
            "enter": nn.Linear(decoder_width, width),               # [MicroDiT] to width D
        }

    def embed_width(self, width, decoder_width):
        return decoder_width

    def encode(self, net, inputs, c, place, m):
        u = net.embed_tokens(*inputs, place)                                            # (B, N, D')
        u = net.run_blocks(net.mixer, u, c, place)
        if m is not None:
            u = m.gather(u)                                                             # (B, K, D')
        return net.run_blocks(net.blocks, net.enter(u), c, place.of(m))


ECONOMIES = {"drop": DropEconomy(), "route": RouteEconomy(), "defer": DeferEconomy()}


# --- what the network need not learn ------------------------------------------------------

@contextmanager
def full_precision(device):
    """The block in which matrix products are true float32: without autocast, which does not
    know the meta device, and without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        is_meta = device.type == "meta"
        with nullcontext() if is_meta else torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class PatchGuess(nn.Module):
    """The best linear guess about a patch from itself: the network adds the rest.

    U are the principal axes of the data's patches, mu their mean, s_i the standard
    deviation along axis i. Each axis is data with a unit of its own, so it has the angle
    of schedule.angle, with s_i for data_std. A noisy patch is turned by it:

        theta_i = arctan(b / (a s_i))
        w       = U^T (x_t - a mu) / sqrt(a^2 s^2 + b^2)       variance 1 on every axis
        x0      = mu + U s (cos theta w + sin theta f)
        eps     =      U   (sin theta w - cos theta f)

    The network is given w and answers f, which has variance 1, too. f = 0 is the best
    linear guess (Wiener's filter). This is EDM's preconditioning (2206.00364) with a
    variance for each axis instead of one for all values: fine detail, which has little
    variance, is then quiet from the start. Each head has an f of its own.

    It looks at one patch at a time, so nothing of a hidden patch gets into a visible one.
    predict: a name in PREDICTIONS. area: pixels of a patch. Shapes: f (B, K, heads P)."""

    def __init__(self, schedule, predict, area, channels):
        super().__init__()
        self.schedule, self.prediction = schedule, PREDICTIONS[predict]
        self.area, self.channels = area, channels
        self.register_buffer("axes", torch.eye(area * channels))            # U: a column is an axis
        self.register_buffer("spread", torch.ones(area * channels))         # s
        self.register_buffer("mean", torch.zeros(area * channels))          # mu

    def fit(self, u):
        """Measure patches of the data, u (n, P). One imaginary patch is added, with the
        mean variance on every axis: so no axis has variance 0, even with few patches."""
        u, n = u.double(), len(u)
        covariance = torch.cov(u.T, correction=0).view(2 * u.shape[1:])     # of one value, too
        variances, axes = torch.linalg.eigh(covariance)
        variances = (n * variances + variances.mean()) / (n + 1)
        self.axes.copy_(axes)
        self.spread.copy_(variances.clamp(min=1e-6).sqrt())
        self.mean.copy_(u.mean(0))

    def coefficients(self, t):
        """a, b at times t, each (B, 1, 1) or (1, 1, 1), float32."""
        t = to_float64(t)
        return [per_image(f(t), self.mean[None, None]) for f in (self.schedule.a, self.schedule.b)]

    def whiten(self, x, t):
        """Patches x (B, N, P) of x_t -> w (B, N, P)."""
        a, b = self.coefficients(t)
        with full_precision(x.device):
            return (x - a * self.mean) @ self.axes / torch.hypot(a * self.spread, b)

    def complete(self, f, w, t):
        """The network's answer f (B, K, heads P) beside w (B, K, P), as the fields of the
        prediction -> (B, K, heads P). DDM's slopes are heads that stay as they are."""
        a, b = self.coefficients(t)
        norm = torch.hypot(a * self.spread, b)
        cos, sin = a * self.spread / norm, b / norm
        # Within a token: pixel, then head, then channel.
        heads = list(f.unflatten(-1, (self.area, -1, self.channels)).unbind(-2))
        zero = torch.zeros_like(self.mean)
        from_mean = self.prediction.target(self.mean, zero, a, b, self.schedule)
        with full_precision(w.device):
            for i in range(self.prediction.heads):
                own = heads[i].flatten(-2)                                              # (B, K, P)
                x0, eps = self.spread * (cos * w + sin * own), sin * w - cos * own
                # Every target is linear in x0 and eps, so it may be turned as a whole.
                field = self.prediction.target(x0, eps, a, b, self.schedule)[i] @ self.axes.T
                heads[i] = (field + from_mean[i]).view_as(heads[i])
        return torch.stack(heads, -2).flatten(-3)


# --- the whole network --------------------------------------------------------------------

class ViT(nn.Module):
    """Encoder on the visible tokens, and an optional light decoder on all tokens."""

    def __init__(
        self,
        schedule,                 # gives c_in and the noise level of a time
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
        block="dit",              # a name in BLOCKS
        clock="angle",            # a name in CLOCKS
        guess=None,               # a prediction, for which a PatchGuess begins; None: no guess
    ):
        super().__init__()
        self.schedule, self.clock = schedule, CLOCKS[clock]
        self.p, self.width = patch, width
        self.checkpoint_blocks = checkpoint_blocks
        # The order of the layers is the order of their random weights: it must stay.
        self.economy = ECONOMIES[economy]
        for name, part in self.economy.build_parts(depth, width, decoder_width, block).items():
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
        skip_count = (depth - 1) // 2 if skips else 0
        self.blocks = nn.ModuleList(
            BLOCKS[block](width, heads, width, skip=i >= depth - skip_count)
            for i in range(depth))
        self.decoder = None
        if decoder:                                                 # [MaskDiT]
            self.connect_ada = nn.Linear(width, 2 * width)
            self.connect = nn.Linear(width, decoder_width)
            self.mask_token = nn.Parameter(torch.zeros(decoder_width))
            self.decoder = build_light_blocks(decoder, decoder_width, width, block)
        last = decoder_width if decoder else width
        self.head_ada = nn.Linear(width, 2 * last)
        self.head = nn.Linear(last, area * channels * heads_out)
        self.guess = PatchGuess(schedule, guess, area, channels) if guess else None
        self.initialise()

    def initialise(self):
        """Xavier weights, zero biases; gates, condition and head start at zero.

        A skip starts as the identity on u, so that it changes nothing at first. MaskDiT's
        release starts the connector at zero, too. Then the head sees nothing of the image,
        and the connector has no head to learn from: both wait, a hundred steps here
        (RESULTS.md)."""
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
            zero.append(self.connect_ada)
        for layer in zero:
            nn.init.zeros_(layer.weight)
        for block in blocks:
            if block.skip is not None:
                nn.init.eye_(block.skip.weight)

    def all_blocks(self):
        """The blocks of economy, encoder and decoder, in their order."""
        return [layer for layer in self.modules() if isinstance(layer, Block)]

    def block_matrices(self):
        """The weight matrices of all blocks, but for those that make shifts, scales and
        gates of the condition: a list, for an optimizer that treats matrices as such."""
        return [q for block in self.all_blocks() for name, q in block.named_parameters()
                if q.ndim == 2 and not name.startswith("ada")]

    def embed_tokens(self, x, cond, place):
        """Patches as tokens at their places: all of them, or a mask's visible ones.

        They are embedded after they are gathered, for that is cheaper.
        x (B, N, P), cond (B, N, P') or None -> u (B, K, D), or (B, N, D)"""
        m = place.m
        u = self.embed(x if m is None else m.gather(x))                                  # (B, K, D)
        if self.embed_cond is not None:                     # never noised, dropped with its patch
            u = u + self.embed_cond(cond if m is None else m.gather(cond))
        return u + place.embed(self.embed.out_features)

    def embed_condition(self, t, y, B, device):
        """Times (B,) or (1,) and labels (B,) or None -> c (B, D)."""
        told = self.clock.read(self.schedule, t).float().to(device)
        c = self.embed_time(sincos(told, 256)).expand(B, -1)                                # (B, D)
        if self.embed_class is None or y is None:
            return c
        # [MaskDiT] "no label" is the zero vector
        return c + self.embed_class(y.clamp(min=0)) * (y >= 0)[:, None]

    def run_block(self, block, *inputs):
        """One block, recomputed in the backward pass if `checkpoint_blocks` is set."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def run_blocks(self, blocks, u, c, place):
        """Blocks, one after the other, on tokens at `place`: (B, K, D) -> (B, K, D)."""
        if len(blocks) == 0:                                        # routes of a shallow network
            return u
        kept = []                                                   # [U-ViT] for the long skips
        skips = sum(block.skip is not None for block in blocks)
        turns = place.turns(u.shape[-1] // blocks[0].heads)
        for number, block in enumerate(blocks):
            skipped = kept.pop() if block.skip is not None else None
            u = self.run_block(block, u, c, skipped, turns)
            if number < skips:                  # the first ones push, the last ones pop
                kept.append(u)
        return u

    def decode(self, u, c, place, m):
        """[MaskDiT] light blocks on all tokens; hidden ones start as the mask token.

        u (B, K, D) or (B, N, D) -> (B, N, D')"""
        shift, scale = self.connect_ada(F.silu(c)).chunk(2, -1)
        u = self.connect(modulate(u, shift, scale))                                     # (B, K, D')
        if u.shape[1] == place.h * place.w:
            # DistributedDataParallel wants a gradient for every parameter, also when
            # nothing was dropped.
            u = u + 0 * self.mask_token
        else:
            u = m.scatter(u, fill=self.mask_token)                                      # (B, N, D')
        return self.run_blocks(self.decoder, u + place.embed(u.shape[2]), c, place)

    def add_guess(self, out, x, t, m):
        """The head's output (B, K or N, P'') with the linear guess of each patch that was
        seen. A decoder's answer for the others stays as it is: nothing of them is known."""
        if m is not None and out.shape[1] < x.shape[1]:
            return self.guess.complete(out, m.gather(x), t)
        whole = self.guess.complete(out, x, t)
        if m is None or self.economy.hidden_seen:
            return whole
        return torch.where(m.visible[:, :, None], whole, out)

    def forward(self, zt, t, y=None, m=None, cond=None):
        """The network's output for noisy images.

        zt (B, C, H, W): x_t at times t (B,).
        y (B,): labels, int64, -1 for "no label"; None: no labels.
        m: the mask, or None when nothing is hidden.
        cond (B, C', H, W): the condition image in [-1, 1], or None.
        -> (B, C_out, H, W), float32, zero at dropped patches unless there is a decoder"""
        B, _, H, W = zt.shape
        h, w = H // self.p, W // self.p
        if self.guess is None:
            x = patchify(per_image(self.schedule.input_scale(t), zt) * zt, self.p)       # (B, N, P)
        else:
            x = self.guess.whiten(patchify(zt, self.p), t)
        if self.embed_cond is not None:
            cond = patchify(cond, self.p)                                               # (B, N, P')
        place = Places(h, w, zt.device)
        c = self.embed_condition(t, y, B, zt.device)                                        # (B, D)
        u = self.economy.encode(self, (x, cond), c, place, m)                       # (B, K or N, D)
        if self.decoder is not None:
            u = self.decode(u, c, place, m)                                             # (B, N, D')
        shift, scale = self.head_ada(F.silu(c)).chunk(2, -1)
        out = self.head(modulate(u, shift, scale)).float()                        # (B, K or N, P'')
        if self.guess is not None:
            out = self.add_guess(out, x, t, m)
        if out.shape[1] < h * w:
            out = m.scatter(out)                                                       # (B, N, P'')
        return unpatchify(out, self.p, h, w)


# Parameters of ours, for latents (4 channels, patch 2) without classes and decoder. DiT's
# own 33, 130, 458 and 675 M have classes and a learned variance.
MODELS = {
    "tiny": dict(width=192, depth=6, heads=3, decoder_width=128, block="rotary"),       # 4.2 M
    "tiny-dit": dict(width=192, depth=6, heads=3, decoder_width=128),   # the same, DiT's blocks
    "small": dict(width=384, depth=12, heads=6, decoder_width=256, block="rotary"),     # 32.5 M
    "small-dit": dict(width=384, depth=12, heads=6, decoder_width=256),     # the same, DiT-S
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
