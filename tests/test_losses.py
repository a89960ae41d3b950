"""Laws of the objective: hidden tokens are not denoised, visible ones not reconstructed.

The scale does not know the ratio."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from plumbing.faces import draw_faces
from losses import (OBJECTIVES, RECON_TARGETS, WEIGHTS, build_objective, build_reconstruction,
                    normalise_patches)
from mask import Mask, draw, patchify, unpatchify
from schedules import PREDICTIONS, SCHEDULES, times
from vit import ViT
from plumbing.images import to_float

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_prediction = pytest.mark.parametrize("predict", PREDICTIONS)


def scene(schedule, predict, ratio=0.6, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(4, 2, 8, 8, generator=g)
    n = schedule.noise(z, g)
    t = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    out = torch.randn(4, 2 * schedule.head_count(predict), 8, 8, generator=g, requires_grad=True)
    return out, z, n, t, draw("patch", 4, 4, 4, ratio, g)


def brute_force(schedule, predict, weighting, out, z, n, t, m):
    """The formula, one token at a time."""
    targets = schedule.target(z, n, t, predict)
    total = 0.0
    for b in range(len(z)):
        for i in m.keep[b].tolist():
            row, column = divmod(i, 4)
            window = (slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
            for f, target in enumerate(targets):
                weight = float(WEIGHTS[weighting](t)[f][b]) if predict == "both" and f < 2 else 1.0
                guess = out[b, 2 * f:2 * f + 2][:, window[0], window[1]]
                total = total + weight * ((guess - target[b][:, window[0], window[1]]) ** 2).mean()
    return total / m.keep.numel()


@every_schedule
@every_prediction
def test_score_matching_is_the_mean_over_visible_tokens(name, predict):
    schedule = SCHEDULES[name]
    out, z, n, t, m = scene(schedule, predict)
    for weighting in WEIGHTS if predict == "both" else ["plain"]:
        loss = build_objective(schedule, predict, 2, weighting)(out, z, n, t, m)
        assert loss.dtype == torch.float32
        expected = brute_force(schedule, predict, weighting, out, z, n, t, m).item()
        assert loss.item() == pytest.approx(expected, rel=1e-4)


@every_schedule
@every_prediction
def test_hidden_tokens_get_no_gradient_from_score_matching(name, predict):
    schedule = SCHEDULES[name]
    out, z, n, t, m = scene(schedule, predict)
    build_objective(schedule, predict, 2)(out, z, n, t, m).backward()
    gradient = patchify(out.grad, 2).abs().sum(-1)
    assert (gradient[~m.visible] == 0).all() and (gradient[m.visible] > 0).all()


@pytest.mark.parametrize("target", RECON_TARGETS)
def test_visible_tokens_get_no_gradient_from_reconstruction(target):
    schedule = SCHEDULES["ddm"]
    out, z, n, t, m = scene(schedule, "unit")
    both = build_objective(schedule, "unit", 2, recon=1.0, recon_target=target)(out, z, n, t, m)
    alone = build_objective(schedule, "unit", 2)(out, z, n, t, m)
    gradient = patchify(torch.autograd.grad(both - alone, out)[0], 2).abs().sum(-1)
    assert (gradient[m.visible] < 1e-7).all() and (gradient[~m.visible] > 1e-5).all()


def test_reconstruction_is_the_mean_over_hidden_tokens_of_the_raw_output():
    schedule = replace(SCHEDULES["edm"], data_std=0.5)
    out, z, n, t, m = scene(schedule, "unit")
    both = build_objective(schedule, "unit", 2, recon=0.1, recon_target="clean")(out, z, n, t, m)
    alone = build_objective(schedule, "unit", 2)(out, z, n, t, m)
    hidden = ~m.visible
    expected = ((patchify(out, 2) - patchify(z, 2) / 0.5) ** 2)[hidden].mean()
    assert (both - alone).item() == pytest.approx(0.1 * expected.item(), rel=1e-4)


def test_the_released_target_is_the_noisy_patch_normalised():
    schedule = SCHEDULES["ddm"]
    out, z, n, t, m = scene(schedule, "unit")
    both = build_objective(schedule, "unit", 2, recon=1.0, recon_target="noisy")(out, z, n, t, m)
    alone = build_objective(schedule, "unit", 2)(out, z, n, t, m)
    noisy = patchify(schedule.corrupt(z, n, t), 2)
    noisy = (noisy - noisy.mean(-1, keepdim=True)) / noisy.std(-1, keepdim=True)
    expected = ((patchify(out, 2) - noisy) ** 2)[~m.visible].mean()
    assert (both - alone).item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("target", RECON_TARGETS)
def test_reconstruction_reads_the_raw_output_and_not_the_preconditioned_one(target):
    """What sigma is cannot matter but through the target.

    The same output and target cost the same in every schedule. Through EDM's c_skip x_t,
    the released reading, the noisy patch would be part of the prediction."""
    losses = []
    for name in ("edm", "flow"):
        schedule = replace(SCHEDULES[name], data_std=0.5)
        out, z, n, t, m = scene(schedule, "unit")
        # One angle, two schedules: x_t differs by a factor, which normalisation removes.
        at = schedule.time_at(torch.full((4,), 0.7, dtype=torch.float64))
        with_recon = build_objective(schedule, "unit", 2, recon=1.0, recon_target=target)
        both = with_recon(out, z, n, at, m)
        losses.append((both - build_objective(schedule, "unit", 2)(out, z, n, at, m)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_whole_of_maskdits_loss_is_as_published_with_the_raw_output_in_place_of_d():
    """[MaskDiT 1.3 to 1.6] from EDM's formulas.

    w = (s^2 + sd^2) / (s sd)^2 on |D - y|^2 over visible tokens, plus 0.1 |F - T|^2 over
    hidden ones."""
    sd = 0.5
    schedule = replace(SCHEDULES["edm"], data_std=sd)
    F, y, n, _, m = scene(schedule, "unit")
    sigma = torch.tensor([0.05, 0.3, 1.0, 20.0], dtype=torch.float64)
    objective = build_objective(schedule, "unit", 2, recon=0.1, recon_target="noisy")
    loss = objective(F, y, n, (sigma / 80) ** (1 / 7), m)
    s = sigma.view(4, 1, 1, 1)
    x = y + s * n
    D = sd ** 2 / (s ** 2 + sd ** 2) * x + s * sd / (s ** 2 + sd ** 2).sqrt() * F
    e = patchify((s ** 2 + sd ** 2) / (s * sd) ** 2 * (D - y) ** 2, 2).mean(-1)
    P = patchify(x, 2)
    T = (P - P.mean(-1, keepdim=True)) / (P.var(-1, keepdim=True) + 1e-6).sqrt()
    hidden = ((patchify(F, 2) - T) ** 2).mean(-1)[~m.visible]
    expected = e[m.visible].mean() + 0.1 * hidden.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@every_prediction
def test_all_tokens_are_scored_where_the_economy_says_so(predict):
    schedule = SCHEDULES["ddm"]
    out, z, n, t, m = scene(schedule, predict)
    loss = build_objective(schedule, predict, 2, all_scored=True)(out, z, n, t, m)
    assert torch.equal(loss, build_objective(schedule, predict, 2)(out, z, n, t, None))
    loss.backward()
    assert (out.grad != 0).all()
    with pytest.raises(ValueError):
        build_objective(schedule, predict, 2, recon=0.1, all_scored=True)


@every_prediction
@pytest.mark.parametrize("target", RECON_TARGETS)
def test_without_hidden_tokens_the_reconstruction_is_absent(predict, target):
    schedule = SCHEDULES["ddm"]
    out, z, n, t, _ = scene(schedule, predict)
    plain = build_objective(schedule, predict, 2)
    objective = build_objective(schedule, predict, 2, recon=0.1, recon_target=target)
    with_recon = objective(out, z, n, t, None)
    assert torch.equal(with_recon, plain(out, z, n, t, None)) and torch.isfinite(with_recon)
    # (The release divides 0 by 0 at the end of its cosine ramp.)
    all_visible = Mask(torch.arange(16).expand(4, -1), 16)
    assert torch.equal(with_recon, objective(out, z, n, t, all_visible))


@every_prediction
def test_ratio_0_is_the_ordinary_denoising_loss(predict):
    schedule = SCHEDULES["ddm"]
    out, z, n, t, _ = scene(schedule, predict)
    targets = schedule.target(z, n, t, predict)
    expected = sum(((o - w) ** 2).mean() for o, w in zip(out.split(2, 1), targets))
    loss = build_objective(schedule, predict, 2)(out, z, n, t, None)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@given(st.floats(0.1, 0.95))
def test_the_scale_does_not_depend_on_the_ratio(ratio):
    """A predictor that is wrong by a constant pays the same at every mask ratio."""
    schedule = SCHEDULES["ddm"]
    out, z, n, t, m = scene(schedule, "eps", ratio)
    wrong = n + 0.3
    loss = build_objective(schedule, "eps", 2)(wrong, z, n, t, m)
    assert loss.item() == pytest.approx(0.09, rel=1e-4)


def test_weights_are_applied_to_each_image_before_the_mean():
    """The released DDM multiplies (B) by (B, 1) and means over the (B, B) product.

    Every image then gets the average weight."""
    schedule = SCHEDULES["ddm"]
    out, z, n, t, m = scene(schedule, "both")
    objective = build_objective(schedule, "both", 2, "ddm")
    each = torch.stack([objective(out[b:b + 1], z[b:b + 1], n[b:b + 1], t[b:b + 1], None)
                        for b in range(4)])
    assert objective(out, z, n, t, None).item() == pytest.approx(each.mean().item(), rel=1e-5)
    assert WEIGHTS["ddm"](torch.tensor([0.25]))[0].item() == 4


def test_normalised_patches_have_mean_0_and_variance_1():
    u = normalise_patches(torch.randn(2, 3, 16) * 5 + 2)
    assert u.mean(-1).abs().max() < 1e-5 and (u.var(-1) - 1).abs().max() < 1e-3


def test_a_perfect_prediction_costs_nothing():
    for name, schedule in SCHEDULES.items():
        for predict in PREDICTIONS:
            out, z, n, t, m = scene(schedule, predict)
            perfect = torch.cat(schedule.target(z, n, t, predict), 1)
            loss = build_objective(schedule, predict, 2)(perfect, z, n, t, m)
            assert loss.item() == 0, (name, predict)


def test_two_heads_learn_different_things():
    """One head twice would be no gain. Trained for a moment, each is better somewhere.

    The noise head guesses the image, through (x_t - b eps) / a, better while there is
    little noise; the image head does when the image has nearly faded."""
    schedule, g = replace(SCHEDULES["ddm"], data_std=0.5), torch.Generator().manual_seed(0)
    x = to_float(draw_faces(256, 8, 0).pixels)
    torch.manual_seed(0)
    net = ViT(schedule, channels=3, heads_out=2, patch=4, width=64, depth=2, heads=2)
    objective = build_objective(schedule, "both", 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(150):
        z = x[torch.randint(256, (64,), generator=g)]
        n, t = schedule.noise(z, g), times("uniform", schedule, 64, g)
        objective(net(schedule.corrupt(z, n, t), t), z, n, t, None).backward()
        optimizer.step()
        optimizer.zero_grad()

    def errors(time):
        t, n = torch.full((256,), time, dtype=torch.float64), schedule.noise(x, g)
        zt = schedule.corrupt(x, n, t)
        with torch.no_grad():
            image, eps = net(zt, t).chunk(2, 1)
        a, b = schedule.coefficients(t, zt)
        return ((image - x) ** 2).mean().item(), (((zt - b * eps) / a - x) ** 2).mean().item()

    early, late = errors(0.02), errors(0.9)
    assert early[1] < 0.7 * early[0] and late[0] < 0.7 * late[1]


# --- reconstruction alone -----------------------------------------------------------------

@every_schedule
def test_at_time_zero_what_the_network_sees_is_the_image_bit_for_bit(name):
    """So an objective without noise and time needs no other loop: t = 0 is none."""
    schedule = replace(SCHEDULES[name], data_std=0.5)
    z = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    t = times("zero", schedule, 4, torch.Generator().manual_seed(1))
    assert torch.equal(schedule.corrupt(z, schedule.noise(z), t), z)
    twos = torch.full((4,), 2.0, dtype=torch.float64)
    assert (schedule.angle(t) == 0).all() and torch.equal(schedule.input_scale(t), twos)


def test_the_objective_of_reconstruction_is_the_mean_over_hidden_tokens_and_nothing_else():
    schedule = replace(SCHEDULES["ddm"], data_std=0.5)
    out, z, n, t, m = scene(schedule, "x0")
    hidden, patches = ~m.visible, patchify(z, 2)
    whitened = (patches - patches.mean(-1, keepdim=True)) / patches.std(-1, keepdim=True)
    for target, wanted in (("clean", patches), ("whitened", whitened)):
        loss = build_reconstruction(schedule, "x0", 2, recon_target=target)(out, z, n, t, m)
        expected = ((patchify(out, 2) - wanted) ** 2)[hidden].mean().item()
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-4)
        gradient = patchify(torch.autograd.grad(loss, out)[0], 2).abs().sum(-1)
        assert (gradient[~hidden] == 0).all() and (gradient[hidden] > 0).all()


def test_the_objective_of_reconstruction_does_not_look_at_visible_targets():
    schedule = SCHEDULES["ddm"]
    out, z, n, t, m = scene(schedule, "x0")
    other = unpatchify(torch.where(m.visible[:, :, None], 99.0, patchify(z, 2)), 2, 4, 4)
    objective = build_reconstruction(schedule, "x0", 2)
    assert torch.equal(objective(out, z, n, t, m), objective(out, other, n, t, m))


# --- descriptions -------------------------------------------------------------------------

@pytest.mark.parametrize("registry", [WEIGHTS, RECON_TARGETS, OBJECTIVES])
def test_every_entry_describes_itself_in_one_line(registry):
    """So that --help takes it from here."""
    for name, entry in registry.items():
        assert 10 < len(entry.__doc__.splitlines()[0]) <= 100, name


# --- the unit of a reconstruction ---------------------------------------------------------

@every_prediction
@pytest.mark.parametrize("objective", ["denoise", "reconstruct"])
def test_a_clean_patch_is_in_the_unit_of_the_head_that_gives_it(predict, objective):
    """z where the first head is the image on visible tokens too, z / s elsewhere; token by
    token."""
    schedule = replace(SCHEDULES["ddm"], data_std=0.5)
    out, z, n, t, m = scene(schedule, predict)
    build = OBJECTIVES[objective]
    loss = build(schedule, predict, 2, recon=1.0, recon_target="clean")(out, z, n, t, m).item()
    if objective == "denoise":
        loss -= brute_force(schedule, predict, "plain", out, z, n, t, m).item()
    wanted, count = 0.0, 0
    for b in range(len(z)):
        for i in set(range(16)) - set(m.keep[b].tolist()):
            row, column = divmod(i, 4)
            window = (slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
            patch = z[b][:, window[0], window[1]] / (1 if predict in ("x0", "both") else 0.5)
            wanted += ((out[b, :2][:, window[0], window[1]] - patch) ** 2).mean().item()
            count += 1
    assert loss == pytest.approx(wanted / count, rel=1e-4)


@pytest.mark.parametrize("predict", ["x0", "both"])
def test_a_head_that_gives_the_image_everywhere_costs_nothing(predict):
    schedule = replace(SCHEDULES["ddm"], data_std=0.5)
    _, z, n, t, m = scene(schedule, predict)
    out = torch.cat(schedule.target(z, n, t, predict), 1)
    assert build_objective(schedule, predict, 2, recon=1.0)(out, z, n, t, m).item() == 0


@pytest.mark.parametrize("target", ["noisy", "whitened"])
@every_prediction
def test_a_normalised_patch_has_no_unit(target, predict):
    schedule = SCHEDULES["ddm"]
    out, z, n, t, m = scene(schedule, predict)
    losses = []
    for s in (0.3, 3.0):
        unit = replace(schedule, data_std=s)
        whole = build_objective(unit, predict, 2, recon=1.0, recon_target=target)
        alone = build_objective(unit, predict, 2)
        losses.append((whole(out, z, n, t, m) - alone(out, z, n, t, m)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
