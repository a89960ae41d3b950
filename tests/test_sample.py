"""Laws of sampling: order of convergence on a Gaussian with a perfect network, counted
calls, noise per image, guidance, files."""
import math
import shlex
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sample as S
from conftest import status
from plumbing.console import UserError
from sample import GRIDS, SOLVERS, DiffusionModel, denoise, count_steps, load
from schedules import PREDICTIONS, SCHEDULES, T_MIN
from vit import ViT
from plumbing.images import seeded
import spaces

f64 = torch.float64


def best_deviation(schedule):
    """Where all grids lead to with many steps: no last step to 0 begins below T_MIN, and
    the mean image at an angle theta of noise has standard deviation s cos(theta)."""
    return schedule.data_std * math.cos(schedule.angle(T_MIN))


def error_of(schedule, steps, grid, churn=0.0):
    """|final standard deviation - that of many steps|, exactly. The network that knows
    zero-mean Gaussian data says 0 in the `unit` prediction, so every step is linear: follow
    one unit of x and one unit of each fresh noise."""
    ts = GRIDS[grid](schedule, schedule.start_time("unit"), steps)
    t, s = ts[:-1], ts[1:]  # all steps at once, as a batch
    one, zero = torch.ones(steps, 1, 1, 1, dtype=f64), torch.zeros(steps, 1, 1, 1, dtype=f64)
    x0, n = schedule.split(torch.zeros(steps, schedule.head_count("unit"), 1, 1, dtype=f64), one, t,
                           "unit")
    slopes = n.split(1, 1)[1:]
    kept = schedule.step(one, x0, t, s, churn, zero, slopes).flatten()
    fresh = schedule.step(zero, zero, t, s, churn, one, slopes).flatten()
    variance = float(schedule.b(ts[0]))**2
    for k, f in zip(kept.tolist(), fresh.tolist()):
        variance = k**2 * variance + f**2
    return abs(math.sqrt(variance) - best_deviation(schedule))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("churn", [0.0, 0.5, 1.0])
def test_on_gaussian_data_the_error_halves_when_the_steps_double(name, churn):
    """First order on a grid that is smooth in the angle."""
    schedule = replace(SCHEDULES[name], data_std=0.5)
    coarse, fine, finest = (error_of(schedule, n, "angle", churn) for n in (50, 100, 200))
    assert fine < coarse and finest < 0.02
    assert coarse / fine == pytest.approx(2, abs=0.35) and fine / finest == pytest.approx(2,
                                                                                          abs=0.2)


def test_the_deterministic_constant_is_a_quarter_turn_squared_over_two_n():
    """In the angle every step multiplies by cos(step): the product is 1 - (pi/2)^2 / (2
    n)."""
    schedule = replace(SCHEDULES["flow"], data_std=0.5)
    assert error_of(schedule, 400, "angle") / schedule.data_std == pytest.approx(
        (math.pi / 2)**2 / 800, rel=0.02)


def test_for_ddm_a_quadratic_grid_beats_a_uniform_one():
    schedule = replace(SCHEDULES["ddm"], data_std=0.5)
    for n in (20, 100, 400):
        assert error_of(schedule, n, "quadratic") < error_of(schedule, n, "uniform")
    order = math.log2(error_of(schedule, 400, "quadratic") / error_of(schedule, 800, "quadratic"))
    assert order == pytest.approx(1.0, abs=0.1)


def oracle(schedule):
    """A network call that knows zero-mean Gaussian data: it says 0 in the `unit`
    prediction."""
    def predict_x0(zt, t):
        x0, n = schedule.split(torch.zeros(1, schedule.head_count("unit"), 1, 1, dtype=f64), zt, t,
                               "unit")
        return x0, n.split(1, 1)[1:]

    return predict_x0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_solver_converges_and_at_least_with_first_order(name, solver):
    schedule = replace(SCHEDULES[name], data_std=0.5)

    def error(calls):
        ts = GRIDS["angle"](schedule, 1.0, count_steps(solver, schedule, 1.0, calls))
        start = schedule.b(ts[0]) * torch.ones(1, 1, 1, 1, dtype=f64)
        end = denoise(oracle(schedule), start, ts, schedule, solver, calls)
        return abs(end.item() - best_deviation(schedule))

    assert error(320) < 0.01 and (error(320) < 1e-4 or error(80) / error(320) > 3.5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_an_exact_guess_cannot_be_refined(name, solver):
    """The true image, noise and slopes: then each solver's better x0 is the true one."""
    schedule = replace(SCHEDULES[name], data_std=0.5)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 2, 3, 3, generator=generator, dtype=f64)
    n = schedule.noise(x0, generator)
    before, t, s = torch.tensor([0.8, 0.6, 0.4], dtype=f64)
    slopes = n.split(2, 1)[1:]
    refined = SOLVERS[solver].refine(lambda zt, t: (x0, slopes), schedule,
                                     schedule.corrupt(x0, n, t), slopes, s, [(before, x0), (t, x0)])
    assert torch.allclose(refined, x0, atol=1e-9)


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if solver.order > 1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_solvers_of_a_higher_order_keep_it_when_the_calls_double(name, solver):
    """On a grid that is smooth in ln sigma: a second-order solver quarters its error, or
    does better (the midpoint rule has a ratio of 5.4 here).

    Equal steps of angle cost a logarithm: the ratio there is 3.1."""
    schedule = replace(SCHEDULES[name], data_std=0.5)

    def error(grid, calls):
        first, _ = GRIDS[grid](schedule, 1.0, 1)
        ts = GRIDS[grid](schedule, 1.0, count_steps(solver, schedule, first, calls))
        end = denoise(oracle(schedule),
                      schedule.b(ts[0]) * torch.ones(1, 1, 1, 1, dtype=f64), ts, schedule, solver,
                      calls)
        return abs(end.item() - best_deviation(schedule))

    ratio = error("edm", 80) / error("edm", 160)
    assert error("edm", 160) < 1e-6 or ratio > 0.96 * 2**SOLVERS[solver].order
    assert error("angle", 320) < error_of(schedule, 320, "angle") / 10


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("calls", [1, 2, 3, 9, 10, 79])
def test_every_solver_makes_exactly_the_stated_number_of_calls(solver, name, calls):
    schedule, made = replace(SCHEDULES[name], data_std=0.5), []
    ts = GRIDS["angle"](schedule, 1.0, count_steps(solver, schedule, 1.0, calls))
    predict_x0 = oracle(schedule)
    denoise(lambda zt, t: (made.append(1), predict_x0(zt, t))[1], torch.ones(1, 1, 1, 1, dtype=f64),
            ts, schedule, solver, calls)
    assert len(made) == calls


def test_edms_forty_points_are_seventy_nine_calls():
    schedule = replace(SCHEDULES["edm"], data_std=0.5)
    assert count_steps("heun", schedule, 1.0, 79) == 40
    sigma = schedule.b(GRIDS["edm"](schedule, 1.0, 40))
    i = torch.arange(40, dtype=f64)
    assert torch.allclose(sigma[:-1], (80**(1 / 7) + i / 39 * (0.002**(1 / 7) - 80**(1 / 7)))**7,
                          rtol=1e-6) and sigma[-1] == 0


@pytest.mark.parametrize("predict", ["x0"])
def test_heun_on_the_edm_schedule_is_edms_algorithm(predict):
    """[EDM] Algorithm 2 with S_churn = 0, written out, on a curved denoiser."""
    schedule = replace(SCHEDULES["edm"], data_std=0.5)
    D = lambda x, sigma: torch.tanh(x / (1 + sigma**2))
    ts = GRIDS["edm"](schedule, 1.0, 6)
    x = torch.linspace(-80, 80, 5, dtype=f64).view(5, 1, 1, 1)
    ours = denoise(lambda zt, t: (D(zt, schedule.b(t)), ()), x, ts, schedule, "heun", 11)
    sigma = schedule.b(ts)
    for i in range(6):
        d = (x - D(x, sigma[i])) / sigma[i]
        y = x + (sigma[i + 1] - sigma[i]) * d
        if sigma[i + 1] > 0:
            y = x + (sigma[i + 1] - sigma[i]) * (d + (y - D(y, sigma[i + 1])) / sigma[i + 1]) / 2
        x = y
    assert torch.allclose(ours, x, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_loop_computes_what_the_propagation_says(name):
    """`denoise` itself, on one number, against the exact propagation above."""
    schedule = replace(SCHEDULES[name], data_std=0.5)
    ts = GRIDS["angle"](schedule, 1.0, 20)
    start = schedule.b(ts[0]).item() * torch.ones(1, 1, 1, 1, dtype=f64)
    end = denoise(oracle(schedule), start, ts, schedule)
    error = abs(abs(end.item()) - best_deviation(schedule))
    assert error == pytest.approx(error_of(schedule, 20, "angle"), rel=1e-9)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 20_000])
def test_grids_fall_from_the_start_to_zero_in_the_stated_number_of_steps(grid, name, steps):
    schedule = replace(SCHEDULES[name], data_std=0.5)
    ts = GRIDS[grid](schedule, 1.0, steps)
    assert len(ts) == steps + 1 and ts.dtype == f64 and ts[-1] == 0 and (ts.diff() < 0).all()
    assert float(schedule.b(ts[0]) / (schedule.a(ts[0]) * schedule.data_std)) > 50


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 79, 1000, 20_000])
def test_no_grid_calls_the_network_below_its_training_range(grid, name, steps):
    """Training draws times in [T_MIN, 1]: t = T_MIN + (1 - T_MIN) u."""
    schedule = replace(SCHEDULES[name], data_std=0.5)
    t = torch.tensor(T_MIN, dtype=f64)
    for start in (1.0, schedule.start_time("eps")):
        ts = GRIDS[grid](schedule, start, steps)[:-1]
        assert ts.min() >= T_MIN * (1 - 1e-9)
        assert (schedule.b(ts) / schedule.a(ts)).min() >= schedule.b(t) / schedule.a(t) * (1 - 1e-9)


def test_the_lowest_level_of_edms_grid_is_002_or_that_of_training():
    """On b = sqrt t training ends at sigma .01, with DDPM's betas at .0033."""
    def lowest(name):
        schedule = SCHEDULES[name]
        t = GRIDS["edm"](schedule, 1.0, 10)[-2]
        return (schedule.b(t) / schedule.a(t)).item()

    assert lowest("ddm") == pytest.approx(0.01 / (1 - 1e-4))
    assert lowest("edm") == pytest.approx(0.002)
    assert lowest("flow") == pytest.approx(0.002)
    assert lowest("vp-linear") == pytest.approx(math.sqrt(math.exp(0.1 * 1e-4 + 9.95 * 1e-8) - 1))


def test_grids_that_stay_in_the_training_range_are_their_formulas():
    """Nothing is moved that need not be. Otherwise steps are equal from 1 to the lowest."""
    schedule = SCHEDULES["ddm"]
    for steps in (1, 10, 50):
        i = torch.arange(steps, -1, -1, dtype=f64)
        assert torch.allclose(GRIDS["uniform"](schedule, 1.0, steps), i / steps, atol=1e-15)
        quadratic = GRIDS["quadratic"](schedule, 1.0, steps)
        assert torch.allclose(quadratic, (i / steps)**2, atol=1e-15)
    long = GRIDS["quadratic"](schedule, 1.0, 300)[:-1].sqrt()
    assert long[-1].item() == pytest.approx(0.01)
    assert torch.allclose(long.diff(), torch.full((299, ), -0.99 / 299, dtype=f64))
    split = torch.tensor([*(i / 9 for i in range(9, 0, -1)), 1e-4, 0], dtype=f64)
    assert torch.allclose(GRIDS["split"](schedule, 1.0, 10), split)


def heun_by_hand(schedule, ts):
    """[EDM] Heun's method on Gaussian data, in y = x / a and sigma = b / a:
    dy / dsigma = y sigma / (s^2 + sigma^2). From where sigma is infinite, one step
    x_s = b_s eps; the last step is Euler's."""
    s, sigma = schedule.data_std, [(schedule.b(t) / schedule.a(t)).item() for t in ts]
    y = sigma[1] if math.isinf(sigma[0]) else sigma[0]
    for now, then in zip(sigma[math.isinf(sigma[0]):], sigma[1 + math.isinf(sigma[0]):]):
        slope = y * now / (s * s + now * now)
        if then > 0:
            there = y + (then - now) * slope
            slope = (slope + there * then / (s * s + then * then)) / 2
        y = y + (then - now) * slope
    return y


@pytest.mark.parametrize("name, grid, order", [("ddm", "uniform", 1), ("ddm-cosine", "uniform", 1),
                                               ("ddm", "edm", 2), ("flow", "uniform", 2),
                                               ("edm", "edm", 2)])
def test_heun_is_first_order_on_the_uniform_grid_of_b_equal_to_sqrt_t(name, grid, order):
    """There the last step is from sigma = 1 / sqrt n. Compared with a program of its own,
    in which every step but the ends is Heun's."""
    schedule = replace(SCHEDULES[name], data_std=0.5)
    first, _ = GRIDS[grid](schedule, 1.0, 1)
    single = 1 + (schedule.a(first).item() == 0)  # at the end, and where sigma is infinite
    errors = []
    for steps in (80, 160):
        calls = 2 * steps - single
        ts = GRIDS[grid](schedule, 1.0, count_steps("heun", schedule, first, calls))
        assert len(ts) == steps + 1
        start = schedule.b(ts[0]) * torch.ones(1, 1, 1, 1, dtype=f64)
        ours = denoise(oracle(schedule), start, ts, schedule, "heun", calls).item()
        assert ours == pytest.approx(heun_by_hand(schedule, ts), rel=1e-9)
        errors.append(abs(ours - best_deviation(schedule)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if solver.order > 1])
def test_help_says_where_the_order_is_one(solver):
    assert "first order where b = sqrt t" in " ".join(S.parser().format_help().split())


def test_a_grid_that_begins_at_a_finite_level_has_two_calls_at_every_step_but_the_last():
    """EDM's begins at sigma 80 on every schedule, also where a(1) = 0: 2 n - 1 calls are n
    steps."""
    for name in SCHEDULES:
        schedule = replace(SCHEDULES[name], data_std=0.5)
        for steps in (2, 5, 40):
            first, _ = GRIDS["edm"](schedule, 1.0, 1)
            assert count_steps("heun", schedule, first, 2 * steps - 1) == steps
    loaded, calls = tiny(), []
    loaded.net.register_forward_pre_hook(lambda module, args: calls.append(args[1][0].item()))
    S.sample(loaded, 1, 9, solver="heun", time_grid="edm")
    assert len(calls) == 9 and len({round(t, 12) for t in calls}) == 5


def tiny(classes=0, predict="unit", schedule="ddm", channels=1):
    """A small random network, awake, ready to sample 8 x 8 images."""
    torch.manual_seed(0)
    schedule = replace(SCHEDULES[schedule], data_std=0.5)
    net = ViT(schedule,
              channels=channels,
              heads_out=schedule.head_count(predict),
              patch=4,
              width=32,
              depth=1,
              heads=1,
              classes=classes)
    with torch.no_grad():
        for q in net.parameters():
            q.add_(0.1 * torch.randn_like(q))
    meta = dict(size=8, classes=[f"class{i}" for i in range(classes)], step=7)
    return DiffusionModel(net, schedule, spaces.PixelSpace(channels), predict, meta,
                          torch.device("cpu"))


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_steps_are_network_calls(steps):
    model, calls = tiny(), []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    S.sample(model, n=3, steps=steps, batch=3)
    assert len(calls) == steps


@pytest.mark.parametrize("churn", [0.0, 0.7])
def test_an_image_depends_on_its_seed_and_number_not_on_its_batch(churn):
    model = tiny()
    together = S.sample(model, n=5, steps=4, seed=3, churn=churn)
    for batch in (1, 2):
        assert torch.allclose(S.sample(model, n=5, steps=4, seed=3, churn=churn, batch=batch),
                              together,
                              atol=1e-5)
    assert torch.allclose(S.sample(model, n=2, steps=4, seed=3, churn=churn, first=3),
                          together[3:],
                          atol=1e-5)
    assert not torch.allclose(
        S.sample(model, n=5, steps=4, seed=4, churn=churn), together, atol=1e-2)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_churn_changes_the_path_and_its_absence_draws_no_noise():
    model = tiny()
    assert not torch.allclose(
        S.sample(model, n=2, steps=4, churn=1.0), S.sample(model, n=2, steps=4), atol=1e-3)
    assert torch.equal(S.sample(model, n=2, steps=4), S.sample(model, n=2, steps=4))


def test_the_grid_and_the_solver_matter():
    model = tiny()
    images = (
        [S.sample(model, n=2, steps=5, time_grid=g, solver="analytic") for g in GRIDS] +
        [S.sample(model, n=2, steps=5, solver=s, time_grid="uniform") for s in ("heun", "dpm++")])
    for a in range(len(images)):
        for b in range(a):
            assert not torch.allclose(images[a], images[b], atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_sampling_starts_from_noise_of_the_schedules_own_size(name):
    model, seen = tiny(schedule=name), []
    model.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    S.sample(model, n=16, steps=1)
    assert seen[0].std().item() == pytest.approx(model.schedule.b(torch.tensor(1.0,
                                                                               dtype=f64)).item(),
                                                 rel=0.1)


def test_auto_is_dpm_on_edms_grid_and_with_churn_the_analytic_step_on_a_uniform_one():
    model = tiny()
    assert torch.equal(S.sample(model, 2, 5), S.sample(model, 2, 5, solver="dpm++",
                                                       time_grid="edm"))
    assert torch.equal(S.sample(model, 2, 4),
                       S.sample(model, 2, 4, solver="dpm++", time_grid="uniform"))
    assert torch.equal(S.sample(model, 2, 4, churn=0.5),
                       S.sample(model, 2, 4, churn=0.5, solver="analytic", time_grid="uniform"))
    assert S.resolve_auto("heun", "auto", 0.0, 10) == ("heun", "edm") and S.resolve_auto(
        "auto", "split", 1.0, 10) == ("analytic", "split")


def test_neighbouring_seeds_are_unrelated():
    numbers = {seeded(a, b).initial_seed() for a in range(30) for b in range(30)}
    assert len(numbers) == 900
    x = torch.stack([torch.randn(1000, generator=seeded(0, i)) for i in range(20)])
    assert (torch.corrcoef(x) - torch.eye(20)).abs().max() < 0.15


def test_guidance_1_is_conditional_and_0_unconditional_bit_for_bit_each_in_one_pass():
    model, sizes = tiny(classes=3), []
    model.net.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    labels = torch.tensor([0, 1, 2])
    conditional = S.sample(model, 3, 4, labels=labels, cfg=1.0)
    unconditional = S.sample(model, 3, 4, labels=labels, cfg=0.0)
    assert set(sizes) == {3}
    assert torch.equal(unconditional, S.sample(model, 3, 4, labels=torch.full((3, ), -1)))
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    S.sample(model, 3, 4, labels=labels, cfg=2.0)
    assert sizes[-1] == 6


def test_guidance_extrapolates_from_the_unconditional_guess():
    model = tiny(classes=2)
    labels = torch.tensor([0, 1])
    ends = [S.sample(model, 2, 1, labels=labels, cfg=cfg) for cfg in (0.0, 1.0, 0.5)]
    inside = (ends[0].abs() < 1) & (ends[1].abs() < 1) & (
        ends[2].abs() < 1)  # one step is linear in the guess where nothing clips
    assert inside.float().mean() > 0.3
    assert torch.allclose(ends[2][inside], (ends[0] + ends[1])[inside] / 2, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["ddm", "edm"])
def test_outside_of_the_interval_a_guided_call_is_one_conditional_pass(name, solver):
    """Twice the batch where low < b / a <= high and once elsewhere, in whatever order a
    solver calls."""
    model, calls = tiny(classes=2, schedule=name), []
    model.net.register_forward_pre_hook(lambda module, args: calls.append(
        (float(model.schedule.b(args[1][0]) / model.schedule.a(args[1][0])), len(args[0]))))
    labels = torch.tensor([0, 1])
    S.sample(model,
             2,
             9,
             labels=labels,
             cfg=2.0,
             solver=solver,
             time_grid="angle",
             cfg_interval=(0.3, 3.0))
    assert all(size == (4 if 0.3 < level <= 3 else 2)
               for level, size in calls) and {size
                                              for _, size in calls} == {2, 4} and len(calls) == 9
    everywhere, nowhere = (S.sample(model, 2, 9, labels=labels, cfg=2.0, cfg_interval=i)
                           for i in ((0.0, math.inf), (1e8, 1e9)))
    assert torch.equal(everywhere, S.sample(model, 2, 9, labels=labels, cfg=2.0))
    assert torch.equal(nowhere, S.sample(model, 2, 9, labels=labels))


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_and_prediction_samples_finite_images(name, predict):
    images = S.sample(tiny(predict=predict, schedule=name), n=2, steps=3, churn=0.5)
    assert images.shape == (2, 1, 8, 8) and torch.isfinite(images).all() and images.abs().max() <= 1


# --- checkpoints and files ----------------------------------------------------------------


def test_the_written_formats_hold_the_same_pixels(tmp_path):
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    for out in ("many", "many.zip", "many.npz", "many.png"):
        with S.ImageWriter(tmp_path / out) as writer:
            writer.add(images[:2])
            writer.add(images[2:])
    read = lambda file: np.asarray(Image.open(file)).transpose(2, 0, 1)
    names = sorted(p.name for p in (tmp_path / "many").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png"]
    for i, name in enumerate(names):
        assert (read(tmp_path / "many" / name) == images[i].numpy()).all()
        with zipfile.ZipFile(tmp_path / "many.zip") as archive, archive.open(name) as file:
            assert (read(file) == images[i].numpy()).all()
    assert (np.load(tmp_path / "many.npz")["images"] == images.permute(0, 2, 3, 1).numpy()).all()
    assert Image.open(tmp_path / "many.png").size[0] >= 16
    with pytest.raises(UserError, match="not an empty folder"):
        S.ImageWriter(tmp_path / "many")


def test_bad_checkpoints_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load(tmp_path / "text.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="version"):
        load(tmp_path / "other.pt")
    whole = (tmp_path / "other.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="cut short"):
        load(tmp_path / "cut.pt")
    torch.save({"version": 1, "model": test_bad_checkpoints_are_refused_in_one_line},
               tmp_path / "code.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load(tmp_path / "code.pt")


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_is_handed_the_last_guesses_from_old_to_new(solver, monkeypatch):
    """The times in the history are those of the path, the last one is now, and each x0 is
    the network's own."""
    schedule, seen = replace(SCHEDULES["ddm"], data_std=0.5), []
    refine = SOLVERS[solver].refine
    monkeypatch.setitem(
        SOLVERS, solver,
        replace(SOLVERS[solver],
                calls=1,
                refine=lambda *args: (seen.append((args[2], args[-1])), refine(*args))[1]))
    ts = GRIDS["angle"](schedule, 1.0, 8)
    denoise(oracle(schedule), torch.ones(1, 1, 1, 1, dtype=f64), ts, schedule, solver, 8)
    assert len(seen) == 6  # not where a = 0, not to 0
    for k, (zt, history) in enumerate(seen):
        times = [t for t, _ in history]
        assert times == list(ts[:k + 2][-S.HISTORY:]) and torch.equal(
            history[-1][1],
            oracle(schedule)(zt, times[-1])[0])


def test_labels_are_given_by_name_or_number():
    assert S.find_class("cat", ["dog", "cat"]) == 1 and S.find_class("0", ["dog", "cat"]) == 0
    for name, classes in (("cow", ["dog", "cat"]), ("2", ["dog",
                                                          "cat"]), ("²", ["dog",
                                                                          "cat"]), ("dog", [])):
        with pytest.raises(UserError, match="--label"):
            S.find_class(name, classes)


def test_the_function_takes_names_and_one_label_for_all():
    model = tiny(classes=3)
    numbers = S.sample(model, 3, 2, labels=torch.tensor([0, 2, -1]))
    for labels in (["class0", "class2",
                    -1], ["0", 2, -1], (0, "class2", -1), torch.tensor([0, 2, -1]).numpy()):
        assert torch.equal(S.sample(model, 3, 2, labels=labels), numbers)
    for label in ("class1", "1", 1, torch.tensor(1)):
        assert torch.equal(S.sample(model, 3, 2, labels=label),
                           S.sample(model, 3, 2, labels=[1, 1, 1]))


@pytest.mark.parametrize("how, why",
                         [(dict(n=0), "--n 0"), (dict(steps=0), "--steps 0"),
                          (dict(steps=-1), "--steps -1"), (dict(batch=0), "--batch 0"),
                          (dict(solver="euler"), "--solver euler"),
                          (dict(time_grid="log"), "--time-grid log"),
                          (dict(churn=1.5), "--churn 1.5"),
                          (dict(churn=0.5, solver="heun"), "--solver heun"),
                          (dict(cfg=2.0), "--label"), (dict(cfg=math.nan, labels=0), "--cfg nan"),
                          (dict(cfg_interval=(0.3, 3)), "--cfg-interval"),
                          (dict(cfg=2.0, labels=0, cfg_interval=(3, 0.3)), "--cfg-interval 3 0.3"),
                          (dict(labels=[0]), "1 labels for 2 images"),
                          (dict(labels=torch.zeros(3, dtype=torch.int64)), "3 labels for 2 images"),
                          (dict(labels=[0, 3]), "--label 3"), (dict(labels=-2), "--label -2"),
                          (dict(labels=["class0", "cow"]), "--label cow"),
                          (dict(labels=[0, 0.5]), "--label 0.5"),
                          (dict(cond=torch.zeros(2, 1, 8, 8)), "trained to generate")])
def test_what_the_command_refuses_the_function_refuses(how, why):
    """In one line, before the first call of the network."""
    model = tiny(classes=3)
    model.net.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(UserError, match=why) as error:
        S.sample(model, **dict(n=2, steps=2) | how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "meta, how, why",
    [(dict(task="superres"), {}, "trained for superres"),
     (dict(task="superres"), dict(cond=torch.zeros(3, 1, 8, 8)), "3 conditions for 2"),
     (dict(objective="reconstruct"), {}, "reconstruct hidden patches"),
     ({}, dict(cfg=2.0), "without labels"), ({}, dict(labels=0), "without labels")])
def test_models_of_another_kind_are_refused_by_the_function(meta, how, why):
    model = tiny()
    model.meta |= meta
    with pytest.raises(UserError, match=why) as error:
        S.sample(model, 2, 2, **how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags", [["--task", "inpaint"], ["--input", "photos"], ["--holes=random"], ["--targets", "x"],
              ["--ratio", "0.5"], ["--steps", "3", "--input", "my photos"]])
def test_pictures_of_ones_own_are_another_command_which_is_named(flags, capsys):
    assert status(S, flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "python restore.py " + shlex.join(flags) in said


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "0"], ["--threads", "-1"], ["--n", "0"], ["--churn", "1.5"],
     ["--churn", "0.5", "--solver", "heun"], ["--ckpt", "nowhere"], ["--device", "cuda:77"],
     ["--device", "foo"], ["--cfg", "nan"], ["--cfg", "2", "--cfg-interval", "3", "0.3"],
     ["--cfg", "2", "--cfg-interval", "nan", "1"], ["--cfg-interval", "0.3", "3"],
     ["--out", "x.jpg"], ["--no-such-flag"], ["--ckpt", ""],
     ["--out", "many", "--trace", "many/trace.png"]])
def test_bad_arguments_are_one_line_and_exit_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(S, arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_grid_and_every_solver_describes_itself_in_one_line():
    """So that --help takes it from here."""
    for name, entry in [*GRIDS.items(), *((k, solver.refine) for k, solver in SOLVERS.items())]:
        assert entry.__doc__, f"{name}: give it a docstring, --help shows its first line"
        assert 10 < len(entry.__doc__.splitlines()[0]) <= 100, name


@pytest.mark.parametrize("field", ["schedule", "predict", "space", "task", "economy", "block",
                                   "clock"])
def test_a_checkpoint_with_a_name_of_no_registry_is_one_line(field):
    meta = dict(schedule="ddm", predict="unit", space="pixel", task="generate", vae=None,
                vae_sha="", data_std=0.5, size=8, channels=3, model=dict(patch=4))
    part = meta if field in meta else meta["model"]
    part[field] = "nonsense"
    for build in (S.build_model, S.build_space):
        with pytest.raises(UserError, match=f"the checkpoint's {field} is nonsense"):
            build(meta)
