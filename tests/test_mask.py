"""Laws of masking, over every policy and every ramp."""
import pytest
import torch
from hypothesis import given, strategies as st

from mask import (POLICIES, RATIOS, Mask, draw, patchify, ratio_at, unpatchify,
                  visible_count)

ratios = st.floats(0, 0.999)
grids = st.integers(1, 9)
unit = st.floats(0, 1)


def g(seed=0):
    return torch.Generator().manual_seed(seed)


@given(grids, grids, st.integers(1, 4), st.integers(1, 3))
def test_unpatchify_inverts_patchify_and_a_token_is_ordered_row_column_channel(h, w, p, C):
    x = torch.randn(2, C, h * p, w * p, generator=g())
    u = patchify(x, p)
    assert u.shape == (2, h * w, p * p * C)
    assert torch.equal(unpatchify(u, p, h, w), x)
    row, column = h - 1, w - 1
    brute = [x[1, c, row * p + i, column * p + j]
             for i in range(p) for j in range(p) for c in range(C)]
    assert torch.equal(u[1, row * w + column], torch.stack(brute))


@pytest.mark.parametrize("policy", POLICIES)
@given(grids, grids, ratios, st.integers(1, 5), st.integers(0, 10))
def test_every_row_has_exactly_the_stated_number_of_visible_tokens(
        policy, h, w, ratio, block, seed):
    m = draw(policy, 3, h, w, ratio, g(seed), block)
    K = max(1, round(h * w * (1 - ratio)))
    if K == h * w:
        assert m is None
        return
    assert m.keep.shape == (3, K) and m.N == h * w
    assert (m.visible.sum(1) == K).all()
    assert (m.keep.diff(dim=1) > 0).all()                       # ascending, so distinct
    assert m.keep.min() >= 0 and m.keep.max() < h * w


@pytest.mark.parametrize("n, ratio, K", [
    (256, 0.9, 26), (400, 0.9, 40), (64, 0.9, 6), (100, 0.8, 20), (256, 0.5, 128), (10, 0.999, 1),
    (7, 0.0, 7)])
def test_counts_are_rounded_once(n, ratio, K):
    assert visible_count(n, ratio) == K


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.1, float("nan")])
def test_a_ratio_outside_0_1_is_refused(ratio):
    with pytest.raises(ValueError, match="mask ratio"):
        visible_count(10, ratio)


@pytest.mark.parametrize("policy", POLICIES)
@given(grids, grids, ratios, st.integers(0, 10))
def test_gather_and_scatter_are_inverse_on_visible_tokens(policy, h, w, ratio, seed):
    m = draw(policy, 2, h, w, ratio, g(seed))
    if m is None:
        return
    u = torch.randn(2, h * w, 5, generator=g(1))
    assert torch.equal(m.gather(u)[1], u[1][m.visible[1]])
    assert torch.equal(m.scatter(m.gather(u)), u * m.visible[:, :, None])
    assert torch.equal(m.gather(m.scatter(m.gather(u))), m.gather(u))
    filled = m.scatter(m.gather(u), fill=torch.arange(5.0))
    assert torch.equal(filled[~m.visible], torch.arange(5.0).expand(int((~m.visible).sum()), 5))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_mask_is_a_function_of_its_generator_and_rows_differ(policy):
    one, two, other = (draw(policy, 8, 8, 8, 0.7, g(s)).keep for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert len({tuple(row.tolist()) for row in one}) > 1


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "crop"])  # seldom at the border
def test_every_token_is_visible_equally_often(policy):
    m = draw(policy, 20000, 4, 8, 0.6, g(), block=2)
    K = visible_count(32, 0.6)
    share = m.visible.float().mean(0)
    assert (share - K / 32).abs().max() < 5 * (K / 32 * (1 - K / 32) / 20000) ** 0.5


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_block_masks_keep_whole_squares_when_the_count_allows(block, rows, cols, seed):
    n = rows * cols
    for keep in range(1, n):
        m = draw("block", 2, rows * block, cols * block, 1 - keep / n, g(seed), block)
        squares = m.visible.view(2, rows, block, cols, block).transpose(2, 3).reshape(2, n, -1)
        assert (squares.all(-1) | ~squares.any(-1)).all()


@given(st.integers(2, 9), st.integers(1, 8), st.integers(0, 20))
def test_crop_shows_one_square_window(side, k, seed):
    if k >= side:
        return
    m = draw("crop", 4, side, side, 1 - k * k / side ** 2, g(seed))
    for seen in m.visible.view(4, side, side):
        y, x = seen.nonzero().T
        assert (y.max() - y.min() + 1, x.max() - x.min() + 1) == (k, k) and seen.sum() == k * k


def test_the_crop_window_sits_uniformly():
    m = draw("crop", 12000, 5, 5, 1 - 9 / 25, g())
    corner = m.keep[:, 0]                   # first visible token: the window's top-left corner
    counts = torch.stack([(corner == y * 5 + x).sum() for y in range(3) for x in range(3)])
    assert counts.sum() == 12000 and (counts - 12000 / 9).abs().max() < 5 * (12000 / 9) ** 0.5


@pytest.mark.parametrize("ramp", RATIOS)
@given(st.floats(0, 0.95), st.floats(0, 0.95))
def test_ramps_start_at_lo_end_at_hi_and_are_monotone_and_continuous(ramp, lo, hi):
    lo = hi if ramp == "constant" else lo
    u = [i / 2000 for i in range(2001)]
    r = [RATIOS[ramp](v, lo, hi) for v in u]
    assert r[0] == pytest.approx(lo, abs=1e-12) and r[-1] == pytest.approx(hi, abs=1e-12)
    sign = 1 if hi >= lo else -1
    steps = [sign * (b - a) for a, b in zip(r, r[1:])]
    assert min(steps) >= -1e-12
    # Lipschitz: no jump (LMD's released piecewise jumps by .35)
    assert max(steps) <= 3 * abs(hi - lo) / 2000 + 1e-12
    assert all(0 <= v < 1 for v in r)


@pytest.mark.parametrize("ramp, mean", [
    ("linear", 0.5500), ("piecewise", 0.5542), ("cosine", 0.5516)])
def test_lmds_ramps_spend_the_published_share_of_tokens(ramp, mean):
    ratios = [RATIOS[ramp]((i + 0.5) / 10000, 0.15, 0.75) for i in range(10000)]
    assert sum(ratios) / 10000 == pytest.approx(mean, abs=1e-4)


def test_piecewise_meets_its_knots():
    knots = {0: 0.15, 1 / 6: 0.40, 0.25: 0.40, 1 / 3: 0.40, 2 / 3: 0.75, 1: 0.75}
    for u, r in knots.items():
        assert RATIOS["piecewise"](u, 0.15, 0.75) == pytest.approx(r)


@given(unit)
def test_cosine4_is_maskdits_formula(u):
    from math import cos, pi
    assert RATIOS["cosine4"](u, 0.5, 0.0) == pytest.approx(0.5 * cos(pi * u / 2) ** 4)


@pytest.mark.parametrize("ramp", RATIOS)
@given(st.floats(0, 0.95), st.floats(0, 0.95), st.integers(2, 300))
def test_a_ramp_visits_at_most_eight_counts_and_reaches_both_ends(ramp, lo, hi, n):
    lo = hi if ramp == "constant" else lo
    used = [ratio_at(ramp, i / 500, lo, hi) for i in range(501)]
    assert len({visible_count(n, r) for r in used}) <= 8
    assert used[0] == pytest.approx(lo, abs=1e-12) and used[-1] == pytest.approx(hi, abs=1e-12)
    sign = 1 if hi >= lo else -1
    assert min(sign * (b - a) for a, b in zip(used, used[1:])) >= -1e-12


LMD = ["linear", "piecewise", "cosine"]     # the three schedules that the paper names


@pytest.mark.parametrize("ramp", LMD)
def test_lmds_ramps_are_at_the_top_after_two_thirds_of_training_and_stay_there(ramp):
    used = [ratio_at(ramp, i / 900, 0.15, 0.75) for i in range(901)]
    assert all(r == 0.75 for r in used[600:]) and used[450] < 0.75
    assert RATIOS[ramp](0.66, 0.15, 0.75) < 0.75


def test_a_mask_is_a_value():
    m = Mask(torch.tensor([[0, 2]]), 3)
    with pytest.raises(AttributeError):
        m.N = 4


@pytest.mark.parametrize("registry", [POLICIES, RATIOS])
def test_every_entry_describes_itself_in_one_line(registry):
    """So that --help takes it from here."""
    for name, entry in registry.items():
        assert entry.__doc__, f"{name}: give it a docstring, --help shows its first line"
        assert 10 < len(entry.__doc__.splitlines()[0]) <= 100, name
