"""Masking: train on a tenth of the image and pay a tenth of the price.

The idea (MaskDM, arXiv 2306.11363). Cut the image into N patches ("tokens"), add noise to all of it, then *drop* most tokens
before the transformer ever sees them. A transformer does not care how many tokens it gets, so at mask ratio 0.9 a step costs
about a tenth, and the network still learns the distribution of every subset of patches. MaskDiT (2306.09305) masks half and
adds a decoder; LMD (2312.07971) raises the ratio while training goes on. All three need the same two decisions:

    how many   a *ratio schedule*  r = RATIOS[name](progress, lo, hi)     ->  K = max(1, round(N (1 - r))) visible tokens
    which      a *mask policy*     score = POLICIES[name](...)  (B, N)    ->  the K lowest scores stay visible

Every image of a batch keeps the same number K (so shapes are static and there is no padding), but at places of its own.
A mask is a value: it is drawn here, outside of the model, and handed to the model and to the loss.

    m = draw("patch", B, h, w, ratio=0.9, generator=g)     # None when nothing is hidden
    seen = m.gather(tokens)                                # (B, N, D) -> (B, K, D): what the encoder gets
    back = m.scatter(seen)                                 # (B, K, D) -> (B, N, D): zeros where it saw nothing

Shapes: B batch, h x w token grid, N = h w tokens, K visible, D width, p patch side, P = p p C values per patch.
Run `python mask.py` to see every policy and every ratio schedule in one picture.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange


# --- images <-> tokens -------------------------------------------------------------------------------------------------------

def patchify(x, p):
    """Image (B, C, H, W) -> tokens (B, N, P), raster order; inside a token the order is (row, column, channel)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(u, p, h, w):
    """Tokens (B, N, P) of an h x w grid -> image (B, C, h p, w p): the exact inverse of `patchify`."""
    return rearrange(u, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=h, w=w)


# --- the mask ------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Mask:
    """Which of n tokens are visible: `keep` (B, K) int64, ascending in each row. Hidden tokens are those not listed."""
    keep: torch.Tensor
    n: int

    @property
    def visible(self):
        """(B, N) bool, True where the network sees the token."""
        return torch.zeros(len(self.keep), self.n, dtype=torch.bool, device=self.keep.device).scatter_(1, self.keep, True)

    def gather(self, u):
        """The visible rows of u: (B, N, D) -> (B, K, D)."""
        return u.gather(1, self.keep[:, :, None].expand(-1, -1, u.shape[2]))

    def scatter(self, v, fill=None):
        """Put visible rows back in their places: (B, K, D) -> (B, N, D). Hidden places get `fill`, (D,) or (B, N, D), or zero."""
        rest = v.new_zeros(()) if fill is None else fill.to(v.dtype)
        rest = rest.expand(len(v), self.n, v.shape[2])
        return rest.scatter(1, self.keep[:, :, None].expand_as(v), v)


def visible_count(n, ratio):
    """How many of n tokens stay visible at a mask ratio in [0, 1): max(1, round(n (1 - ratio))).

    Rounded once, from the ratio that was asked for. The released MaskDM rounds twice in block masking and calls 87.5 % "90 %";
    others truncate, and int(400 * (1 - .9)) = 39 because 1 - .9 is a little less than a tenth in binary."""
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {ratio} is not in [0, 1)")
    return max(1, round(n * (1 - ratio)))


def draw(policy, B, h, w, ratio, generator=None, block=4):
    """Draw a mask for B images on an h x w token grid, or None when the ratio hides nothing.

    `policy` is a name in POLICIES, `ratio` in [0, 1) is the hidden share, `block` the side of the block policy's squares in
    tokens. The result lives on the generator's device and is a function of the generator's state alone."""
    K = visible_count(h * w, ratio)
    if K == h * w:
        return None
    device = generator.device if generator is not None else "cpu"
    rand = partial(torch.rand, generator=generator, device=device)
    score = POLICIES[policy](rand, B, h, w, block)                                                                   # (B, N)
    keep = score.topk(K, largest=False, sorted=False).indices.sort().values                                          # (B, K)
    return Mask(keep, h * w)


# --- which: policies. score(rand, B, h, w, block) -> (B, N); the K lowest stay visible -------------------------------------

def patch(rand, B, h, w, block):
    """Every token for itself, uniformly at random."""
    return rand(B, h * w)


def blocks(rand, B, h, w, block):
    """Squares of block x block tokens live and die together. Only one square is cut, when K is no multiple of its area."""
    rows, cols = math.ceil(h / block), math.ceil(w / block)
    order = rand(B, rows * cols).argsort(1).float().view(B, rows, cols)         # whole numbers: the turn of each square
    order = order.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :h, :w]
    return order.flatten(1) + rand(B, h * w)                                    # plus [0, 1): the turn inside the square


def crop(rand, B, h, w, block):
    """One square window is visible, everything else is hidden; the window sits uniformly at random inside the image.

    For a fixed u in [0, 1) the windows [floor(u (g-k+1)), ... + k) of side k = 1, 2, ... are nested, so "the smallest window
    that holds this token" is a score, and its K lowest are a square of any size K asks for (a ragged last ring aside)."""
    def smallest_window(g):
        u = rand(B, 1, 1)
        k = torch.arange(1, max(h, w) + 1, device=u.device)[None, :, None]                                           # (1, k, 1)
        start = (u * (g - k + 1).clamp(min=1)).floor()                                                               # (B, k, 1)
        i = torch.arange(g, device=u.device)
        inside = (i >= start) & (i < start + k)                                                                      # (B, k, g)
        return (~inside).sum(1)                                                                                      # (B, g)
    side = torch.maximum(smallest_window(h)[:, :, None], smallest_window(w)[:, None, :])                             # (B, h, w)
    return side.flatten(1) + rand(B, h * w)


POLICIES = {"patch": patch, "block": blocks, "crop": crop}


# --- how many: ratio schedules. r(u, lo, hi), u in [0, 1] the progress of training; r(0) = lo, r(1) = hi --------------------

RAMP = 2 / 3                                                                    # [LMD] the ramp ends here, then r stays at hi


def interpolate(lo, hi, w):
    """Between lo (w = 0) and hi (w = 1), exact at both ends; lo + w (hi - lo) can miss hi = 0 by a rounding, and 0 is a hard border."""
    return (1 - w) * lo + w * hi


def constant(u, lo, hi):
    """The same ratio throughout: lo is not used, and REFUSALS in options.py refuses one that differs."""
    return hi


def linear(u, lo, hi):
    """Equal increments per step until RAMP. LMD names a third schedule beside the two below; this form is our reading of it."""
    return interpolate(lo, hi, min(u / RAMP, 1))


def piecewise(u, lo, hi):
    """[LMD] ramp, hold, ramp, hold: through (0, lo), (1/6, mid), (1/3, mid), (2/3, hi); .15, .40, .75 in the paper's setting.

    The released code multiplies the second slope by u instead of u - 1/3: its ratio jumps at 1/3 and reaches 1.10."""
    mid = interpolate(lo, hi, (0.40 - 0.15) / (0.75 - 0.15))
    return interpolate(lo, mid, min(6 * u, 1)) if u < 1 / 3 else interpolate(mid, hi, min(3 * (u - 1 / 3), 1))


def cosine(u, lo, hi, s=0.008):
    """[LMD] Nichol and Dhariwal's alpha-bar with the hidden share in the part of 1 - alpha-bar: gentle at both ends."""
    c = lambda v: math.cos(math.pi / 2 * (v + s) / (1 + s)) ** 2
    return interpolate(lo, hi, 1 - c(min(u / RAMP, 1)) / c(0))


def cosine4(u, lo, hi):
    """[MaskDiT] unmasking: r = hi + (lo - hi) cos^4(pi u / 2); with lo = .5, hi = 0 it falls over the whole of the run."""
    return interpolate(lo, hi, 1 - math.cos(math.pi / 2 * u) ** 4)


RATIOS = {"constant": constant, "linear": linear, "piecewise": piecewise, "cosine": cosine, "cosine4": cosine4}
RAMP_END = {"linear": RAMP, "piecewise": RAMP, "cosine": RAMP, "cosine4": 1.0}  # the progress at which each is at hi, to stay there; not named: 1


def ratio_at(ramp, u, lo, hi, levels=8, share=None):
    """The ratio that training uses at progress u: RATIOS[ramp] on a staircase of at most `levels` values from lo to hi.

    Each distinct ratio is a distinct token count, so a distinct compilation and a distinct speed: eight are enough to follow
    a curve and few enough to compile. The first value is lo and the last is hi, exactly. share: the progress in (0, 1] at which the
    ramp arrives; ARRIVES[ramp] when left out."""
    end = RAMP_END.get(ramp, 1.0)
    r = RATIOS[ramp](min(max(u, 0.0), 1.0) if share is None else min(max(u, 0.0) / share, 1.0) * end, lo, hi)
    if lo == hi or ramp == "constant":
        return r
    return interpolate(lo, hi, round((r - lo) / (hi - lo) * (levels - 1)) / (levels - 1))


# --- the picture ---------------------------------------------------------------------------------------------------------------

def draw_policies(side=96, seed=0):
    """One row per policy (ratios 0 to 0.9), one plot per ratio schedule, as a PIL image."""
    from PIL import Image, ImageDraw
    ratios, p = [0.0, 0.25, 0.5, 0.75, 0.9], side // 16
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    disc = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.14)[None]
    scene = torch.where(disc, torch.stack([1 - 0.2 * y, 0.75 - 0.5 * y, 0.25 + 0 * y]), torch.stack([0.2 + 0 * y, 0.4 * y + 0.3, 0.7 - 0.3 * y]))
    tokens = patchify(scene[None], p)
    width = 90 + max(len(ratios), len(RATIOS)) * (side + 8)
    canvas = Image.new("RGB", (width, 26 + len(POLICIES) * (side + 8) + 150), "white")
    ink = ImageDraw.Draw(canvas)
    for j, r in enumerate(ratios):
        ink.text((90 + j * (side + 8), 8), f"ratio {r}: {visible_count(256, r)} of 256", fill="black")
    for i, policy in enumerate(POLICIES):
        ink.text((8, 26 + i * (side + 8) + side // 2), policy, fill="black")
        for j, r in enumerate(ratios):
            m = draw(policy, 1, 16, 16, r, torch.Generator().manual_seed(seed + j))
            shown = tokens if m is None else m.scatter(m.gather(tokens), fill=torch.full((tokens.shape[2],), 0.92))
            tile = (unpatchify(shown, p, 16, 16)[0].permute(1, 2, 0) * 255).byte().numpy()
            canvas.paste(Image.fromarray(tile), (90 + j * (side + 8), 26 + i * (side + 8)))
    top, height = 26 + len(POLICIES) * (side + 8) + 24, 90
    for j, (name, schedule) in enumerate((n, r) for n, r in RATIOS.items()):
        lo, hi = {"constant": (0.9, 0.9), "cosine4": (0.5, 0.0)}.get(name, (0.15, 0.75))
        left = 90 + j * (side + 8)
        ink.rectangle([left, top, left + side - 1, top + height], outline="lightgray")
        ink.text((left, top - 14), f"{name} {lo} > {hi}", fill="black")
        for u in range(side):
            ink.point((left + u, top + height * (1 - schedule(u / (side - 1), lo, hi))), fill="darkblue")
            ink.point((left + u, top + height * (1 - ratio_at(name, u / (side - 1), lo, hi))), fill="red")
    ink.text((8, top + 30), "ratio over", fill="black")
    ink.text((8, top + 44), "training", fill="black")
    ink.text((8, top + height + 8), "red: the staircase of at most 8 token counts that training climbs", fill="red")
    return canvas


if __name__ == "__main__":
    from plumbing.console import run_picture_command
    run_picture_command("Draw every mask policy and every ratio schedule.", draw_policies, "mask.png", seed=(0, "which masks"))
