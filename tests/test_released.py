"""Laws of released weights: DiT's and MaskDiT's files run here as their papers say.

Both networks stand here once more, written from the published layout. The real files are
too large for a test: random weights in the same layout take their place."""
import argparse
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import finetune
import probe
import sample as S
import train
import vit
from conftest import status
from mask import Mask
from plumbing import released
from plumbing.checkpoint import read_checkpoint
from plumbing.console import UserError
from running.cost import count_parameters, count_positions
from schedules import SCHEDULES, Schedule
from vae import AutoencoderKL
from vit import ViT, log_alpha_bars, positions

f64 = torch.float64
D, HEADS, DEPTH, C, P, CLASSES = 48, 2, 2, 4, 2, 1000
W, LIGHT = 64, 2                                                # of MaskDiT's decoder
SIDE = 4                                                        # tokens along a side


# --- the published networks, once more ----------------------------------------------------

def waves(side, width):
    """Positions by a loop: column, then row; of each sines, then cosines."""
    rows = []
    for row in range(side):
        for column in range(side):
            numbers = []
            for place in (column, row):
                angles = [place * 10000 ** (-i / (width / 4)) for i in range(width // 4)]
                numbers += [*map(math.sin, angles), *map(math.cos, angles)]
            rows.append(numbers)
    return torch.tensor(rows)[None]


def write_block(shapes, name, width, cond):
    shapes |= {f"{name}.attn.qkv": (3 * width, width), f"{name}.attn.proj": (width, width),
               f"{name}.mlp.fc1": (4 * width, width), f"{name}.mlp.fc2": (width, 4 * width),
               f"{name}.adaLN_modulation.1": (6 * width, cond)}


def random_file(paper, dtype=torch.float32):
    """Random weights in the released layout of "DiT" or "MaskDiT", zero nowhere."""
    g, light = torch.Generator().manual_seed(0), paper == "MaskDiT"
    last, fields = (W, 1) if light else (D, 2)
    linear = {"t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D)}
    for i in range(DEPTH):
        write_block(linear, f"blocks.{i}", D, D)
    for i in range(LIGHT * light):
        write_block(linear, f"decoder_blocks.{i}", W, D)
    if light:
        linear |= {"decoder_layer.adaLN_modulation.1": (2 * D, D), "decoder_layer.linear": (W, D)}
    linear |= {"final_layer.adaLN_modulation.1": (2 * last, D),
               "final_layer.linear": (P * P * fields * C, last)}
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    shapes |= {"x_embedder.proj.weight": (D, C, P, P), "x_embedder.proj.bias": (D,)}
    shapes["y_embedder.embedding_table.weight"] = (D, CLASSES) if light else (CLASSES + 1, D)
    if light:
        shapes["mask_token"] = (1, 1, W)
    scale = {name: 0.02 if len(shape) == 1 else 0.5 / math.prod(shape[1:]) ** 0.5
             for name, shape in shapes.items()}
    state = {name: scale[name] * torch.randn(shape, generator=g) + 0.003
             for name, shape in shapes.items()}
    state["pos_embed"] = waves(SIDE, D)
    if light:
        state["decoder_pos_embed"] = waves(SIDE, W)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x, shift, scale):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]


def run_block(state, name, x, c, heads):
    B, N, width = x.shape
    ada = linear(state, f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6, 1)
    qkv = linear(state, f"{name}.attn.qkv", norm(x, ada[0], ada[1]))
    q, k, v = (part.view(B, N, heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
    weight = (q @ k.transpose(2, 3) / (width // heads) ** 0.5).softmax(-1)
    seen = (weight @ v).transpose(1, 2).reshape(B, N, width)
    x = x + ada[2][:, None] * linear(state, f"{name}.attn.proj", seen)
    hidden = F.gelu(linear(state, f"{name}.mlp.fc1", norm(x, ada[3], ada[4])), approximate="tanh")
    return x + ada[5][:, None] * linear(state, f"{name}.mlp.fc2", hidden)


def embed_time(state, number, B):
    angle = number * 10000 ** (-torch.arange(128) / 128)
    both = torch.cat([angle.cos(), angle.sin()]).expand(B, -1)
    return linear(state, "t_embedder.mlp.2", F.silu(linear(state, "t_embedder.mlp.0", both)))


def embed_patches(state, x):
    u = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=P)
    return u.flatten(2).transpose(1, 2) + state["pos_embed"]


def finish(state, u, c, fields):
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    out = linear(state, "final_layer.linear", norm(u, shift, scale))
    out = out.view(len(u), SIDE, SIDE, P, P, fields * C)
    out = torch.einsum("nhwpqc->nchpwq", out).reshape(len(u), fields * C, SIDE * P, SIDE * P)
    return out[:, :C]


def run_dit(state, x, index, y):
    """DiT's noise; y: numbers of classes, CLASSES itself is "no label"."""
    c = embed_time(state, index, len(x)) + state["y_embedder.embedding_table.weight"][y]
    u = embed_patches(state, x)
    for i in range(DEPTH):
        u = run_block(state, f"blocks.{i}", u, c, HEADS)
    return finish(state, u, c, 2)


def run_maskdit(state, x, sigma, one_hot, visible=None):
    """MaskDiT's F and image D; one_hot (B, classes), zeros: "no label"; visible (B, K)."""
    c = embed_time(state, math.log(sigma) / 4, len(x))
    c = c + one_hot @ state["y_embedder.embedding_table.weight"].T
    u = embed_patches(state, x / (sigma ** 2 + 0.25) ** 0.5)
    if visible is not None:
        u = torch.stack([row[keep] for row, keep in zip(u, visible)])
    for i in range(DEPTH):
        u = run_block(state, f"blocks.{i}", u, c, HEADS)
    shift, scale = linear(state, "decoder_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    u = linear(state, "decoder_layer.linear", norm(u, shift, scale))
    if visible is not None:
        full = state["mask_token"].repeat(len(x), SIDE * SIDE, 1)
        for row, keep, seen in zip(full, visible, u):
            row[keep] = seen
        u = full
    u = u + state["decoder_pos_embed"]
    for i in range(LIGHT):
        u = run_block(state, f"decoder_blocks.{i}", u, c, W // 32)
    out, total = finish(state, u, c, 1), sigma ** 2 + 0.25
    return out, x * 0.25 / total + out * sigma * 0.5 / total ** 0.5


# --- their outputs are ours ---------------------------------------------------------------

@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    """The size of the test's files, as if it were published."""
    size = dict(width=D, depth=DEPTH, heads=HEADS, decoder_width=W)
    monkeypatch.setitem(released.SIZES, D, ("tiny", HEADS))
    monkeypatch.setitem(vit.MODELS, "tiny", size)


def build(held, part="ema"):
    ckpt = released.import_released(held, "file.pt")
    net = ViT(S.build_schedule(ckpt["meta"]), **ckpt["meta"]["model"])
    S.load_weights(net, ckpt[part])
    return net.eval(), ckpt


def noisy():
    return torch.randn(3, C, SIDE * P, SIDE * P, generator=torch.Generator().manual_seed(3))


def close(ours, theirs):
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_our_positions_are_theirs_with_sines_and_cosines_exchanged():
    for width in (48, 64, 1152):
        theirs = released.published_positions(5, width).float()
        close(positions(5, 5, width, torch.device("cpu")), released.reorder(theirs, 1, width))
    torch.testing.assert_close(released.published_positions(4, D).float(), waves(4, D)[0])


@pytest.mark.parametrize("index", [0, 500, 999])
@torch.no_grad()
def test_dit_says_here_what_it_says_there(index):
    state, x = random_file("DiT"), noisy()
    net, ckpt = build(state)
    level = float(log_alpha_bars(torch.device("cpu"))[index])
    net.schedule = Schedule(lambda t: torch.full_like(t, level / 2).exp(),
                            lambda t: (-torch.expm1(torch.full_like(t, level))).sqrt())
    y, t = torch.tensor([0, 207, 999]), torch.zeros(3, dtype=f64)
    assert net.clock.read(net.schedule, t).tolist() == pytest.approx([index] * 3, abs=1e-6)
    close(net(x, t, y), run_dit(state, x, index, y))
    nobody = run_dit(state, x, index, torch.full((3,), CLASSES))
    close(net(x, t, torch.full((3,), -1)), nobody)
    close(net(x, t), nobody)
    assert (nobody - run_dit(state, x, index, y)).abs().max() > 0.01


@pytest.mark.parametrize("sigma", [0.002, 1, 80])
@torch.no_grad()
def test_maskdit_says_here_what_it_says_there(sigma):
    state, x = random_file("MaskDiT"), noisy() * max(1, sigma)
    net, ckpt = build(dict(ema={f"model.{name}": q for name, q in state.items()}))
    t = net.schedule.time_at(torch.full((3,), math.atan(sigma / 0.5), dtype=f64))
    y = torch.tensor([0, 207, -1])
    one_hot = F.one_hot(y.clamp(min=0), CLASSES).float() * (y >= 0)[:, None]
    N = SIDE * SIDE
    orders = [torch.randperm(N, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    keep = torch.stack(orders)[:, :N // 2]
    for m in (None, Mask(keep, N)):
        out = net(x, t, y, m)
        theirs, image = run_maskdit(state, x, sigma, one_hot, m and keep)
        close(out, theirs)
        close(net.schedule.split(out, x, t, "unit")[0], image)


def test_the_index_is_that_at_which_the_noise_levels_agree():
    """By another way: between two indices ln alpha-bar goes along a straight line."""
    schedule, clock = SCHEDULES["vp-linear"], vit.CLOCKS["index"]
    betas = [1e-4 + k * (0.02 - 1e-4) / 999 for k in range(1000)]
    level, levels = 0.0, []
    for beta in betas:
        level += math.log(1 - beta)
        levels.append(level)
    t = torch.linspace(0, 1, 57, dtype=f64)
    for time, index in zip(t.tolist(), clock.read(schedule, t).tolist()):
        level = -(0.1 * time + 9.95 * time ** 2)
        if level > levels[0]:
            assert index == 0
        else:
            k = min(int(index), 998)
            line = levels[k] + (index - k) * (levels[k + 1] - levels[k])
            assert line == pytest.approx(level, abs=1e-9)
    # Continuous and discrete differ by less than five steps in a thousand.
    assert (clock.read(schedule, t) - (1000 * t - 1).clamp(min=0)).abs().max() < 5
    assert clock.read(SCHEDULES["ddm"], torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_every_clock_is_finite_at_all_times_of_all_schedules():
    t = torch.linspace(0, 1, 11, dtype=f64)
    for clock in vit.CLOCKS.values():
        for schedule in SCHEDULES.values():
            told = clock.read(schedule, t)
            assert told.isfinite().all() and (told.diff() >= 0).all()


@pytest.mark.parametrize("steps", [1, 2, 20, 79])
@pytest.mark.parametrize("name", S.GRIDS)
def test_every_grid_stays_inside_the_noise_levels_of_their_training(name, steps):
    for paper, low, high in (("DiT", 0.0100, 157.41), ("MaskDiT", 0.002, 80)):
        net, ckpt = build(random_file(paper))
        schedule = net.schedule
        ts = S.GRIDS[name](schedule, schedule.start_time(ckpt["meta"]["predict"]), steps)
        levels = (schedule.b(ts) / schedule.a(ts))[:-1]
        assert ts[-1] == 0 and len(ts) == steps + 1 and (ts.diff() < 0).all()
        assert levels.min() > low * (1 - 1e-6) and levels.max() < high * (1 + 1e-6)


def test_dit_has_no_input_scaling_and_maskdit_has_edm_s():
    t = torch.linspace(0.01, 1, 9, dtype=f64)
    assert (build(random_file("DiT"))[0].schedule.input_scale(t) - 1).abs().max() < 1e-12
    schedule = build(random_file("MaskDiT"))[0].schedule
    assert torch.allclose(schedule.input_scale(t), (schedule.b(t) ** 2 + 0.25).rsqrt())


# --- files --------------------------------------------------------------------------------

@pytest.mark.parametrize("paper", ["DiT", "MaskDiT"])
def test_a_float16_file_works(paper, tmp_path):
    half, full = random_file(paper, torch.float16), random_file(paper)
    torch.save(half, tmp_path / "half.pt")
    ckpt, exact = read_checkpoint(tmp_path / "half.pt"), build(full)[1]
    for name, tensor in ckpt["ema"].items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, exact["ema"][name], atol=2e-3, rtol=2e-3)


def refusal(state, tmp_path):
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(UserError) as error:
        read_checkpoint(tmp_path / "file.pt")
    line = str(error.value)
    assert "\n" not in line and len(line) < 300 and str(tmp_path / "file.pt") in line
    return line


@pytest.mark.parametrize("paper", ["DiT", "MaskDiT"])
def test_each_missing_extra_or_misshapen_tensor_is_one_line_that_names_it(paper, tmp_path):
    state = random_file(paper)
    for name in state:
        without = {k: q for k, q in state.items() if k != name}
        assert name in refusal(without, tmp_path), name
        longer = torch.cat([state[name], state[name]], -1)
        line = refusal(state | {name: longer}, tmp_path)
        # The first tensor's width, or the mask token's, is what others are measured by.
        assert "must be" in line or "none of the published" in line, line
        assert "something else" in refusal(state | {name: [1]}, tmp_path)
    for extra, word in (("blocks.0.attn.q_norm.weight", "unknown blocks.0.attn.q_norm.weight"),
                        (f"blocks.{DEPTH}.mlp.fc1.bias", f"lacks blocks.{DEPTH}."),
                        ("model.pos_embed", "lacks")):              # a prefix that others lack
        assert word in refusal(state | {extra: torch.ones(1)}, tmp_path)
    if paper == "MaskDiT":
        odd = {"mask_token": torch.ones(1, 1, 50)}
        assert "none of the published" in refusal(state | odd, tmp_path)
    moved = state | {"pos_embed": state["pos_embed"] + 2e-4}
    assert "pos_embed is not the fixed" in refusal(moved, tmp_path)
    swapped = state | {"pos_embed": released.reorder(state["pos_embed"], 2, D)}
    assert "pos_embed is not the fixed" in refusal(swapped, tmp_path)


def test_a_file_of_dit_s_own_training_is_read_and_a_file_that_runs_code_is_not(tmp_path):
    raw, average = random_file("DiT"), random_file("DiT")
    average["final_layer.linear.bias"] += 1
    held = dict(model=raw, ema=average, opt={"state": {}}, args=argparse.Namespace(epochs=3))
    torch.save(held, tmp_path / "a.pt")
    ckpt = read_checkpoint(tmp_path / "a.pt", "config", "model", "ema")
    assert torch.allclose(ckpt["ema"]["head.bias"] - ckpt["model"]["head.bias"], torch.ones(16))
    assert ckpt["unused"] == ["pos_embed", "final_layer.linear: variance", "args", "opt"]
    held["args"] = argparse.ArgumentParser
    assert "not a readable checkpoint" in refusal(held, tmp_path)
    torch.save(dict(ema=average), tmp_path / "b.pt")
    with pytest.raises(UserError, match="--weights ema"):
        read_checkpoint(tmp_path / "b.pt", "model")


@pytest.mark.parametrize("paper", ["DiT", "MaskDiT"])
def test_every_tensor_is_used_or_named_as_unused(paper):
    """Another number anywhere in the file is another network, or a refusal."""
    state = random_file(paper)
    weights = build(state)[1]["ema"]
    for name in state:
        other = released.convert_weights(
            state | {name: state[name] + 1}, released.measure_network(state, ""))
        is_same = all(torch.equal(other[k], q) for k, q in weights.items())
        assert is_same == (name in build(state)[1]["unused"]), name


@pytest.mark.parametrize("paper, published", [("DiT", 675e6), ("MaskDiT", 730.5e6)])
def test_the_xl_layouts_have_as_many_numbers_as_is_published(paper, published):
    light = 8 * (paper == "MaskDiT")
    s = released.Sizes(1152, 4, 2, 256, 28, light, 512)
    theirs = sum(map(math.prod, released.published_shapes(s).values()))
    assert theirs == pytest.approx(published, rel=1e-3)
    with torch.device("meta"):
        meta = released.describe_released(s)["meta"]
        net = ViT(SCHEDULES["edm"], **meta["model"])
        tensors = {k: torch.empty(v) for k, v in released.published_shapes(s).items()}
        ours = {k: v.shape for k, v in released.convert_weights(tensors, s).items()}
    assert ours == {k: v.shape for k, v in net.state_dict().items()}
    # One network's rows of the learned variance and its row for "no label" are not here.
    dropped = 0 if light else 16 * 1152 + 16 + 1152
    assert sum(count_parameters(net).values()) + count_positions(net, 256) + dropped == theirs
    assert meta["size"] == 256 and meta["model"]["heads"] == 16


# --- commands -----------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path, monkeypatch):
    """A released file of each paper, an autoencoder and a folder of images by class."""
    monkeypatch.chdir(tmp_path)
    for paper in ("DiT", "MaskDiT"):
        prefix = "model." if paper == "MaskDiT" else ""
        state = {prefix + name: q for name, q in random_file(paper).items()}
        torch.save(dict(ema=state, model=state) if prefix else state, f"{paper}.pt")
    torch.manual_seed(0)
    for name, widths in (("vae.pt", [8] * 4), ("shallow.pt", [8] * 3)):
        vae = AutoencoderKL(widths=widths, layers=1, groups=4)
        torch.save(dict(config=vae.config, model=vae.state_dict(), mean=torch.zeros(4),
                        std=torch.ones(4)), name)
    for i in range(12):
        folder = tmp_path / "images" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (20 * i, 90, 0)).save(folder / f"{i}.png")
    return tmp_path


RUN = ["--data", "images", "--vae", "vae.pt", "--labels", "--steps", "1", "--batch", "2",
       "--threads", "1", "--amp", "off", "--device", "cpu", "--workers", "0", "--val", "0.2"]


@pytest.mark.parametrize("paper", ["DiT", "MaskDiT"])
def test_a_released_file_is_sampled_from_and_is_a_first_stage(paper, files, capsys, monkeypatch):
    setups, plan = [], train.make_plan
    monkeypatch.setattr(train, "make_plan", lambda setup: setups.append(setup) or plan(setup))
    how = ["--n", "2", "--steps", "3", "--device", "cpu", "--threads", "1", "--label", "207"]
    S.main(["--ckpt", f"{paper}.pt", "--vae", "vae.pt", "--cfg", "4", *how])
    assert "class 207" in capsys.readouterr().out and (files / "samples.png").exists()
    finetune.main(["--from", f"{paper}.pt", "--out", "tuned", *RUN])
    told = capsys.readouterr().out
    assert "finished at step 1 of 1" in told and f"from {paper}.pt" in told
    tuned = read_checkpoint("tuned", "config")
    first = read_checkpoint(f"{paper}.pt")
    assert tuned["meta"]["model"]["clock"] == first["meta"]["model"]["clock"]
    assert tuned["meta"]["data_std"] == first["meta"]["data_std"]
    assert setups[0].schedule == S.build_schedule(first["meta"])        # its unit, its grids' end
    assert tuned["meta"]["size"] == 64 and tuned["meta"]["classes"] == ["0", "1"]
    moved = tuned["model"]["embed.bias"] - first["model"]["embed.bias"]
    assert 0 < moved.abs().max() < 0.1
    S.main(["--ckpt", "tuned", "--cfg", "2", *how[:-1], "1"])


def test_what_lacks_or_does_not_fit_is_one_line(files, capsys):
    for more, word in (([], "--vae"), (["--vae", "shallow.pt"], "8 pixels a place"),
                       (["--vae", "vae.pt", "--label", "1000"], "--label 1000")):
        assert status(S, ["--ckpt", "DiT.pt", *more]) == 2
        told = capsys.readouterr().err
        assert word in told and len(told.splitlines()) == 1
    assert status(finetune, ["--from", "DiT.pt", "--vae", "vae.pt", "--steps", "1"]) == 2
    assert "--data" in capsys.readouterr().err
    assert status(finetune, ["--from", "DiT.pt", "--data", "images", "--steps", "1"]) == 2
    assert "--vae" in capsys.readouterr().err
    assert status(probe, ["--from", "DiT.pt"]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_dry_run_says_how_many_parameters_a_released_file_has(files, capsys):
    finetune.main(["--from", "DiT.pt", "--dry-run", "--vae", "vae.pt", "--data", "images"])
    told = capsys.readouterr().out
    small = ViT(SCHEDULES["edm"], **read_checkpoint("DiT.pt")["meta"]["model"] | dict(classes=2))
    assert f"{sum(q.numel() for q in small.parameters()) / 1e6:.2f} M are trained" in told
    finetune.main(["--from", "DiT.pt", "--dry-run"])                # ImageNet's 1000 classes
    assert "16 tokens" in capsys.readouterr().out.replace("tokens       16", "16 tokens")


@torch.no_grad()
def test_one_step_of_the_sampler_is_the_formula_by_hand(files):
    """DDIM's step with the guided noise of all four channels, from the first time to 0."""
    state = random_file("DiT")
    model = S.load("DiT.pt", device="cpu", vae="vae.pt")
    schedule, x = model.schedule, noisy()
    t, s = (schedule.time_at(math.atan(level)) for level in (2.0, 0.7))
    predict_x0 = S.GuidedPredictor(model, torch.tensor([0, 207, 999]), cfg=4.0)
    ours = S.denoise(predict_x0, x, torch.stack([t, s]), replace(schedule))
    index = float(model.net.clock.read(schedule, t))
    c = run_dit(state, x, index, torch.tensor([0, 207, 999]))
    u = run_dit(state, x, index, torch.full((3,), CLASSES))
    eps = u + 4 * (c - u)
    # Noise levels 2 and .7 with a^2 + b^2 = 1.
    x0 = (x - 2 / 5 ** 0.5 * eps) * 5 ** 0.5
    by_hand = (x0 + 0.7 * eps) / 1.49 ** 0.5
    torch.testing.assert_close(ours, by_hand, atol=1e-4, rtol=1e-4)
