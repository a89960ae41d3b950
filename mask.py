"""Masking: train on a tenth of the image and pay a tenth of the price.

The idea (MaskDM, arXiv 2306.11363). Cut the image into N patches ("tokens"), add noise to
all of it, then *drop* most tokens before the transformer ever sees them. A transformer does
not care how many tokens it gets. At mask ratio 0.9 a step costs about a tenth, and the
network still learns the distribution of every subset of patches. MaskDiT (2306.09305) masks
half and adds a decoder; LMD (2312.07971) raises the ratio while training goes on. All three
need the same two decisions:

    how many   ratio = RATIOS[name](progress, lo, hi)         a *ramp*; training takes
               `ratio_at`: the same on a staircase of at most 8 values
               K = max(1, round(N (1 - ratio)))               tokens stay visible
    which      score = POLICIES[name](rand, B, h, w, block)   a *mask policy*, (B, N)
               the K lowest scores stay visible

Every image of a batch keeps the same number K, so shapes are static without any padding.
Each image has its own places. A mask is a value: it is drawn here, outside of the model,
and handed to the model and to the loss.

    m = draw("patch", B, h, w, ratio=0.9, generator=g)   # None when nothing is hidden
    seen = m.gather(u)                                   # (B, N, D) -> (B, K, D)
    back = m.scatter(seen)                               # (B, K, D) -> (B, N, D), hidden: 0

Shapes: B batch, C channels, h x w token grid, N = h w tokens, K visible tokens, D width of
a token, p patch side, P = p p C values per patch; u tokens (B, N, D).
Run `python mask.py` to see every policy and every ramp in one picture.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange

from plumbing.faces import draw_faces
from plumbing.sheets import draw_plot, draw_sheet


# --- images <-> tokens --------------------------------------------------------------------

def patchify(x, p):
    """Cut an image into tokens row by row; inside a token: by row, column, channel.

    x (B, C, h p, w p) -> u (B, N, P)"""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(u, p, h, w):
    """Put the tokens of an h x w grid together: the exact inverse of `patchify`.

    u (B, N, P) -> x (B, C, h p, w p)"""
    return rearrange(u, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=h, w=w)


# --- the mask -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Mask:
    """Which of N tokens are visible.

    keep (B, K): int64, ascending in each row; tokens that are not listed are hidden.
    N: the number of all tokens."""
    keep: torch.Tensor
    N: int

    @property
    def visible(self):
        """(B, N) bool, True where the network sees the token."""
        flags = torch.zeros(len(self.keep), self.N, dtype=torch.bool, device=self.keep.device)
        return flags.scatter_(1, self.keep, True)

    def gather(self, u):
        """The visible tokens: u (B, N, D) -> (B, K, D)."""
        return u.gather(1, self.keep[:, :, None].expand(-1, -1, u.shape[2]))

    def scatter(self, seen, fill=None):
        """Put visible tokens back in their places.

        seen (B, K, D): the visible tokens.
        fill (D,) or (B, N, D): what stands at hidden places; None: zero.
        -> u (B, N, D)"""
        rest = seen.new_zeros(()) if fill is None else fill.to(seen.dtype)
        rest = rest.expand(len(seen), self.N, seen.shape[2])
        return rest.scatter(1, self.keep[:, :, None].expand_as(seen), seen)


def visible_count(N, ratio):
    """How many of N tokens stay visible at a mask ratio in [0, 1) -> K; ValueError outside.

    It is rounded once, from the ratio that was asked for. The released MaskDM rounds to
    whole squares in block masking. So its "90 %" is 87.5 % at 64 px, where 2 of 16 squares
    stay visible, and 89.8 % at 256 px. Others truncate: int(400 * (1 - .9)) is 39, because
    1 - .9 is a little less than a tenth in binary."""
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {ratio} is not in [0, 1)")
    return max(1, round(N * (1 - ratio)))


def draw(
    policy,          # a name in POLICIES: which tokens
    B,               # images
    h,               # rows of the token grid
    w,               # columns of the token grid
    ratio,           # share of hidden tokens, in [0, 1): how many
    generator=None,  # the mask is a function of its state alone and lives on its device
    block=4,         # side of the squares of the policy "block", in tokens
):
    """Draw a mask for B images of h x w tokens -> Mask, or None when nothing is hidden."""
    K = visible_count(h * w, ratio)
    if K == h * w:
        return None
    device = generator.device if generator is not None else "cpu"
    rand = partial(torch.rand, generator=generator, device=device)
    score = POLICIES[policy](rand, B, h, w, block)                                          # (B, N)
    keep = score.topk(K, largest=False, sorted=False).indices.sort().values                 # (B, K)
    return Mask(keep, h * w)


# --- which: policies. score(rand, B, h, w, block) -> (B, N), the K lowest stay visible ----

def patch_score(rand, B, h, w, block):
    """Each token is hidden by itself, uniformly at random. [MaskDM, MaskDiT]"""
    return rand(B, h * w)


def block_score(rand, B, h, w, block):
    """Squares of block x block tokens are hidden or visible together. [MaskDM]

    At most one square is cut: a part of it is visible when K is no multiple of block^2, or
    when squares at the edges of the image are incomplete.
    When K < block^2 only a part of one square is visible. So choose a small `block`: of
    8 x 8 tokens with K = 6, block 4 shows 6 tokens of one square; block 2 shows a whole
    square and half of another."""
    rows, columns = math.ceil(h / block), math.ceil(w / block)
    order = rand(B, rows * columns).argsort(1).float()      # whole numbers: the turn of each square
    order = order.view(B, rows, columns)                                        # (B, rows, columns)
    order = order.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :h, :w]     # (B, h, w)
    return order.flatten(1) + rand(B, h * w)                # plus [0, 1): the turn inside a square


def crop_score(rand, B, h, w, block):
    """One square window is visible and everything else is hidden. [MaskDM]

    The window sits uniformly at random inside the image. A token's score is the side of the
    smallest window that holds it, less 1, so the K lowest are a square of any size that K
    asks for. The last ring of the window may be incomplete."""
    row_side = _smallest_window(rand(B, 1, 1), h, max(h, w))                                # (B, h)
    column_side = _smallest_window(rand(B, 1, 1), w, max(h, w))                             # (B, w)
    side = torch.maximum(row_side[:, :, None], column_side[:, None, :])                  # (B, h, w)
    return side.flatten(1) + rand(B, h * w)


def _smallest_window(place, length, largest):
    """For each of `length` places the side, less 1, of the smallest window that holds it.

    The windows of an image have sides 1, 2, ... and start at
    floor(place (length - side + 1)). place (B, 1, 1) in [0, 1) is fixed, so each window
    holds the one before it. -> (B, length)"""
    side = torch.arange(1, largest + 1, device=place.device)[None, :, None]           # (1, side, 1)
    start = (place * (length - side + 1).clamp(min=1)).floor()                        # (B, side, 1)
    index = torch.arange(length, device=place.device)
    inside = (index >= start) & (index < start + side)                           # (B, side, length)
    return (~inside).sum(1)         # nested windows: as many miss a place as its side, less 1


POLICIES = {"patch": patch_score, "block": block_score, "crop": crop_score}


# --- how many: ramps. ramp(progress, lo, hi) -> ratio -------------------------------------
# progress in [0, 1] is that of the training. Each is monotone, starts at lo and ends at hi.
# The constant one is always hi.

RAMP_END = 2 / 3                    # [LMD] the ramp ends here, then the ratio stays at hi


def interpolate(lo, hi, share):
    """Between lo (share 0) and hi (share 1), exact at both ends.

    lo + share (hi - lo) can miss hi = 0 by a rounding, and 0 is a hard border."""
    return (1 - share) * lo + share * hi


def constant_ratio(progress, lo, hi):
    """The same ratio from start to end: --mask, without --mask-from."""
    return hi


def linear_ratio(progress, lo, hi):
    """Equal increments until 2/3 of the run, then constant. [LMD]

    LMD names a third schedule beside the two below; this form is our reading of it."""
    return interpolate(lo, hi, min(progress / RAMP_END, 1))                     # [LMD] linear


def piecewise_ratio(progress, lo, hi):
    """Rise, hold, rise, hold, each for a sixth to a third of the run. [LMD]

    Through (0, lo), (1/6, mid), (1/3, mid), (2/3, hi): .15, .40, .75 in the released code.
    It multiplies the second slope by progress instead of progress - 1/3: its ratio jumps
    at 1/3 and reaches 1.10."""
    mid = interpolate(lo, hi, (0.40 - 0.15) / (0.75 - 0.15))
    if progress < 1 / 3:
        return interpolate(lo, mid, min(6 * progress, 1))                       # [LMD] piecewise
    return interpolate(mid, hi, min(3 * (progress - 1 / 3), 1))


def cosine_ratio(progress, lo, hi, shift=0.008):
    """Gentle at both ends, arrived at 2/3 of the run. [LMD]

    Nichol and Dhariwal's alpha-bar, with the hidden share in the part of 1 - alpha-bar."""
    angle = math.pi / 2 * (min(progress / RAMP_END, 1) + shift) / (1 + shift)
    first = math.pi / 2 * (0.0 + shift) / (1 + shift)
    alpha_bar = math.cos(angle) ** 2 / math.cos(first) ** 2
    return interpolate(lo, hi, 1 - alpha_bar)                                   # [LMD] cosine


def cosine4_ratio(progress, lo, hi):
    """A fourth power of a cosine over the whole run, for a ratio that falls to 0. [MaskDiT]

    r = hi + (lo - hi) cos^4(pi progress / 2); the release has lo = .5 and hi = 0."""
    return interpolate(lo, hi, 1 - math.cos(math.pi / 2 * progress) ** 4)       # [MaskDiT]


RATIOS = {
    "constant": constant_ratio,
    "linear": linear_ratio,
    "piecewise": piecewise_ratio,
    "cosine": cosine_ratio,
    "cosine4": cosine4_ratio,
}


def ratio_at(
    ramp,        # a name in RATIOS
    progress,    # of the training, in [0, 1]
    lo,          # the ratio at the start
    hi,          # the ratio at the end
    levels=8,    # how many values the staircase has at most
):
    """The ratio that training uses: RATIOS[ramp] on a staircase of a few values.

    Each distinct ratio is a distinct token count, so a distinct compilation and a distinct
    speed: eight are enough to follow a curve and few enough to compile. The first value is
    lo and the last is hi, exactly. -> ratio in [0, 1)"""
    ratio = RATIOS[ramp](min(max(progress, 0.0), 1.0), lo, hi)
    if lo == hi or ramp == "constant":
        return ratio
    level = round((ratio - lo) / (hi - lo) * (levels - 1))
    return interpolate(lo, hi, level / (levels - 1))


# --- the picture --------------------------------------------------------------------------

def draw_policies(side=176, seed=0):
    """The picture of `python mask.py`: one row per policy, one plot per ramp.

    side: pixels of a picture, a multiple of 16. seed: which face and masks. -> PIL image"""
    ratios = [0.0, 0.25, 0.5, 0.75, 0.9]
    cells, p = 16, side // 16                                                   # a 16 x 16 grid
    u = patchify(draw_faces(1, side, seed).pixels, p)                                    # (1, N, P)
    hidden = torch.full((u.shape[2],), 235, dtype=torch.uint8)                  # light grey
    rows = []
    for policy in POLICIES:
        pictures = []
        for i, ratio in enumerate(ratios):
            generator = torch.Generator().manual_seed(seed + i)
            m = draw(policy, 1, cells, cells, ratio, generator)
            shown = u if m is None else m.scatter(m.gather(u), hidden)
            pictures.append(unpatchify(shown, p, cells, cells)[0])
        rows.append((f"{policy}\npolicy", pictures))
    titles = [f"ratio {ratio}\n{visible_count(cells ** 2, ratio)} of {cells ** 2} visible"
              for ratio in ratios]
    policies = draw_sheet(rows, titles)
    plots = [draw_ramp(name) for name in RATIOS]
    ramps = draw_sheet([("", plots[i:i + 3]) for i in range(0, len(plots), 3)])
    return draw_sheet([("", [policies]), ("", [ramps])])


def draw_ramp(name, points=500):
    """Plot a ramp and the staircase that training climbs -> PIL image."""
    settings = {"constant": (0.9, 0.9), "cosine4": (0.5, 0.0)}                  # as in the releases
    lo, hi = settings.get(name, (0.15, 0.75))
    times = [i / points for i in range(points + 1)]
    curve = [(time, RATIOS[name](time, lo, hi)) for time in times]
    stairs = [(time, ratio_at(name, time, lo, hi)) for time in times]
    curves = [(f"ramp {name}, {lo} to {hi}", "darkblue", curve), ("staircase used", "red", stairs)]
    return draw_plot(curves, 340, 200, "progress of training", "ratio", (0, 1))


if __name__ == "__main__":
    from plumbing.console import run_picture_command
    run_picture_command("Draw every mask policy and every ramp.", draw_policies,
                        "mask.png", seed=(0, "which face and which masks"))
