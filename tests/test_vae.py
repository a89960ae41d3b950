"""vae.py: the autoencoder against diffusers' layout and numbers, files under every name,
latents, the training command."""
import hashlib
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import spaces
import vae
from conftest import ROOT, status
from data import load_images
from plumbing.console import UserError
from plumbing.images import to_float
from vae import PRESETS, AutoencoderKL, LatentSpace, load_vae

FILES = {"a": PRESETS["tiny"], "b": dict(widths=[8, 16], layers=2, groups=4),
         "c": dict(widths=[8, 8, 16, 16], layers=1, groups=4, latent=3, channels=1)}


@pytest.fixture(autouse=True)
def one_thread():
    """The command under test sets the number of threads; two would wait for each other."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=rng(seed)) * 2 - 1


def made(config="tiny", seed=0):
    """An autoencoder whose weights, biases too, are all random."""
    config = PRESETS[config] if isinstance(config, str) else config
    model = AutoencoderKL(**config).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=rng(seed)) * 0.05)
    return model


def old_names(state):
    """Today's names -> those of early diffusers, of the attentions alone."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                     ("to_out.0", "proj_attn")):
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v
                 for k, v in state.items()}
    return state


def compvis(state, stages):
    """Today's names -> CompVis', part by part: an independent inverse of the renaming."""
    done = {}
    for name, v in state.items():
        side, *rest = name.split(".")
        if rest[0] in ("down_blocks", "up_blocks"):
            i = int(rest[1]) if rest[0] == "down_blocks" else stages - 1 - int(rest[1])
            tail = [rest[2].replace("samplers", "sample")]
            if rest[2] == "resnets":
                tail = ["block", rest[3]]
            rest = [rest[0][:-7], str(i), *tail, *rest[4:]]
        elif rest[:2] == ["mid_block", "resnets"]:
            rest = ["mid", f"block_{int(rest[2]) + 1}", *rest[3:]]
        elif rest[:2] == ["mid_block", "attentions"]:
            what = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
                    "to_out": "proj_out"}[rest[3]]
            rest, v = ["mid", "attn_1", what, rest[-1]], v if v.ndim == 1 else v[:, :, None, None]
        rest = [{"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}.get(part, part)
                for part in rest]
        done[".".join([side, *rest])] = v
    return done


# --- the network --------------------------------------------------------------------------

def test_stable_diffusions_names_shapes_and_numbers_of_parameters_are_golden():
    with torch.device("meta"):
        model = AutoencoderKL(**PRESETS["sd"])
    state, count = model.state_dict(), lambda part: sum(p.numel() for p in part.parameters())
    assert len(state) == 248 and count(model) == 83_653_863 and model.factor == 8
    assert model.latent == 4
    parts = (model.encoder, model.decoder, model.quant_conv, model.post_quant_conv)
    assert [count(part) for part in parts] == [34_163_592, 49_490_179, 72, 20]
    # Computed with diffusers 0.42.1.
    layout = "\n".join(sorted(f"{name} {tuple(v.shape)}" for name, v in state.items()))
    expected = "600696bc94ffc80f250f7a2b836e289ff191e5f194ce89f9aa389cfc8ef4a0ab"
    assert hashlib.sha256(layout.encode()).hexdigest() == expected


def test_the_numbers_are_those_of_diffusers():
    """Weights and image come from a formula, the expected values from diffusers 0.42.1.

    Its class gave the same bits as ours."""
    model = AutoencoderKL(**PRESETS["tiny"]).eval().requires_grad_(False)
    for i, (name, v) in enumerate(sorted(model.state_dict().items())):
        wave = torch.sin(torch.arange(v.numel(), dtype=torch.float64) * (0.7 + 0.01 * (i % 50))
                         + i).float().view(v.shape)
        v.copy_(wave * 0.1 + ("norm" in name and name.endswith("weight"))
                if v.ndim == 1 else wave * (2 / v[0].numel()) ** 0.5)
    mean, logvar = model.encode(torch.sin(torch.arange(2 * 3 * 16 * 16) * 0.37).view(2, 3, 16, 16))
    out = model.decode(mean)
    for value, expected in ((mean[1, :, 1, 2], [-0.46539, -0.43356, -0.24757, 0.01912]),
                            (logvar[1, :, 3, 0], [0.58363, 0.47612, 0.19559, -0.15093]),
                            (out[0, :, 15, 7], [-0.24311, -0.24774, -0.01551]),
                            (mean.square().mean(), 0.117335), (out.square().mean(), 0.194944)):
        torch.testing.assert_close(value, torch.tensor(expected), atol=5e-5, rtol=0)


def test_every_group_norm_has_the_epsilon_of_stable_diffusion():
    with torch.device("meta"):
        norms = [m for m in AutoencoderKL(**PRESETS["sd"]).modules()
                 if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 10 * 2 + 14 * 2 + 4
    assert {(m.eps, m.num_groups) for m in norms} == {(1e-6, 32)}


def test_going_down_pads_on_the_right_and_below_only():
    stage = vae.Stage(2, 2, 1, 1, "downsamplers").requires_grad_(False)
    for p in stage.resnets.parameters():
        p.zero_()                                                   # the resnet is now the identity
    conv, x = stage.downsamplers[0]["conv"], images(1, 2, 6, 4)
    expected = conv.bias[None, :, None, None].repeat(1, 1, 3, 2)
    for o, i, y, u, dy, du in np.ndindex(2, 2, 3, 2, 3, 3):
        if 2 * y + dy < 6 and 2 * u + du < 4:        # what lies below or right of the image is zero
            expected[0, o, y, u] += conv.weight[o, i, dy, du] * x[0, i, 2 * y + dy, 2 * u + du]
    torch.testing.assert_close(stage(x), expected)


def test_attention_is_one_head_on_the_normed_map_beside_its_input():
    layer, x = vae.Attention(8, 2).requires_grad_(False), images(1, 8, 3, 2)
    u = layer.group_norm(x).reshape(8, 6).T.double()
    q, k, v = (u @ to.weight.T.double() + to.bias.double()
               for to in (layer.to_q, layer.to_k, layer.to_v))
    weight, bias = layer.to_out[0].weight.double(), layer.to_out[0].bias.double()
    out = (q @ k.T / math.sqrt(8)).softmax(1) @ v @ weight.T + bias
    torch.testing.assert_close(layer(x), x + out.T.reshape(1, 8, 3, 2).float())


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_all_stages_but_the_last_halve_the_sides(stages):
    model = AutoencoderKL([8] * stages, 1, 4, latent=3, channels=1).requires_grad_(False)
    f = 2 ** (stages - 1)
    mean, logvar = model.encode(images(2, 1, 8, 16))
    assert model.factor == f and mean.shape == logvar.shape == (2, 3, 8 // f, 16 // f)
    assert model.decode(mean).shape == (2, 1, 8, 16)


@pytest.mark.parametrize("shape", [(1, 3, 8, 10), (1, 3, 6, 8), (1, 1, 8, 8)])
def test_sides_that_are_no_multiple_of_the_factor_and_other_channels_are_refused(shape):
    with pytest.raises(UserError, match=r"3 channels and sides that are multiples of 4, not .* x"):
        made().encode(images(*shape))


def test_the_log_variance_is_clamped():
    model = made()
    model.quant_conv.bias[4:] = torch.tensor([-1e3, 1e3, 0, 0])
    logvar = model.encode(images(1, 3, 8, 8))[1]
    assert (logvar[:, 0] == -30).all() and (logvar[:, 1] == 20).all()
    assert (logvar[:, 2:].abs() < 20).all()


# --- latent space -------------------------------------------------------------------------

def test_a_latent_space_has_the_interface_of_a_pixel_space():
    pixel, latent, x = spaces.PixelSpace(3), LatentSpace(made(), batch=2), images(5, 3, 8, 16)
    assert {n for n in dir(pixel) if n[0] != "_"} <= set(dir(latent))
    assert (pixel.name, latent.name) == ("pixel", "latent")
    for space in (pixel, latent):
        z = space.encode(x)
        assert z.shape == (5, space.channels, 8 // space.factor, 16 // space.factor)
        assert z.dtype == torch.float32 and not z.requires_grad
        assert space.decode(z).shape == x.shape and space.encode(x[:0]).shape[0] == 0
    # Frozen both ways.
    assert not latent.encode(x.requires_grad_()).requires_grad
    assert not latent.decode(z.requires_grad_()).requires_grad
    assert isinstance(spaces.SPACES["pixel"](3, None), spaces.PixelSpace)
    assert set(spaces.SPACES) == {"pixel", "latent"}


def test_encoding_is_deterministic_and_does_not_depend_on_the_batch_or_on_autocast():
    model, x = made(), images(5, 3, 8, 8)
    z = LatentSpace(model, batch=2).encode(x)
    assert torch.equal(z, LatentSpace(model, batch=2).encode(x))
    torch.testing.assert_close(z, LatentSpace(model, batch=16).encode(x), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(z, LatentSpace(model, batch=2).encode(x))
    torch.testing.assert_close(LatentSpace(model).decode(z)[3:4],
                               LatentSpace(model, batch=1).decode(z[3:4]), atol=1e-5, rtol=1e-5)


def test_latents_are_the_mode_scaled_and_decoding_undoes_the_scaling():
    model = made()
    x = images(3, 3, 8, 8)
    mean = torch.tensor([1.0, 2, 3, 4])
    std = torch.tensor([0.5, 1, 2, 4])
    raw, space, view = model.encode(x)[0], LatentSpace(model, mean, std), lambda v: v[:, None, None]
    torch.testing.assert_close(space.encode(x), (raw - view(mean)) / view(std))
    torch.testing.assert_close(space.decode(space.encode(x)), model.decode(raw), atol=1e-5,
                               rtol=1e-5)


def test_without_statistics_the_scaling_of_stable_diffusion_stands_in():
    model, x = made(PRESETS["tiny"] | dict(scaling=0.18215)), images(2, 3, 8, 8)
    torch.testing.assert_close(LatentSpace(model).encode(x), 0.18215 * model.encode(x)[0])
    assert PRESETS["sd"]["scaling"] == 0.18215


def test_standardised_latents_have_mean_0_and_deviation_1_on_the_data_of_the_statistics():
    model, x = made(), images(40, 3, 8, 8)
    mean, std = vae.latent_statistics(model, x.split(16))
    z = LatentSpace(model, mean, std).encode(x).double()
    assert z.mean((0, 2, 3)).abs().max() < 1e-5
    assert (z.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert std.max() / std.min() > 1.05
    assert (std == LatentSpace(model, mean, std).std.flatten()).all()


def test_the_statistics_live_outside_of_the_autoencoders_state():
    model = made()
    before = set(model.state_dict())
    space = LatentSpace(model, torch.ones(4), torch.ones(4))
    assert set(space.vae.state_dict()) == before
    assert not any(p.requires_grad for p in space.parameters())


# --- files --------------------------------------------------------------------------------

@pytest.mark.parametrize("config", FILES.values(), ids=FILES)
@pytest.mark.parametrize("names", ["today's", "early", "CompVis", "CompVis, the whole model"])
def test_a_file_loads_under_every_name_that_its_tensors_have_had(tmp_path, config, names):
    model = made(config)
    state = model.state_dict()
    if names == "early":
        state = old_names(state)
        assert "encoder.mid_block.attentions.0.proj_attn.bias" in state
    if names.startswith("CompVis"):
        state = compvis(state, len(config["widths"]))
        assert {"encoder.down.0.block.0.conv1.weight", "encoder.mid.block_1.norm1.bias",
                "encoder.down.0.downsample.conv.bias", "decoder.norm_out.weight",
                f"decoder.up.{len(config['widths']) - 1}.upsample.conv.weight"} <= state.keys()
        assert state["decoder.mid.attn_1.q.weight"].ndim == 4
        assert not any("_blocks" in name or "to_" in name for name in state)
        state = {**state, "loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    if names.endswith("whole model"):
        state = {"first_stage_model." + k: v for k, v in state.items()}
        state |= {"model.diffusion_model.out.weight": torch.zeros(1)}
        state = {"state_dict": state, "epoch": 3}
    torch.save(state, tmp_path / "file.bin")
    space, x = load_vae(tmp_path / "file.bin", config), images(2, config.get("channels", 3), 16, 16)
    for name, v in model.state_dict().items():
        assert torch.equal(v, space.vae.state_dict()[name]), name
    assert torch.equal(space.encode(x), model.encode(x)[0] * model.scaling)
    assert space.sha == hashlib.sha256((tmp_path / "file.bin").read_bytes()).hexdigest()[:8]


def test_the_names_of_compvis_count_the_decoders_stages_from_the_pixels():
    names = dict([
        ("decoder.up.3.block.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
        ("decoder.norm_out.bias", "decoder.conv_norm_out.bias"),
        ("decoder.up.1.upsample.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
        ("encoder.mid.block_2.conv1.bias", "encoder.mid_block.resnets.1.conv1.bias"),
        ("encoder.down.1.block.0.nin_shortcut.weight",
         "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"),
        ("encoder.down.2.downsample.conv.weight",
         "encoder.down_blocks.2.downsamplers.0.conv.weight"),
        ("quant_conv.weight", "quant_conv.weight"),
        ("encoder.mid.attn_1.proj_out.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
        ("encoder.conv_norm_out.bias", "encoder.conv_norm_out.bias"),
    ])
    renamed = vae.rename_keys(dict.fromkeys(names, torch.zeros(2)), stages=4)
    assert list(renamed) == list(names.values())


def test_half_precision_files_become_float32(tmp_path):
    torch.save({k: v.half() for k, v in made().state_dict().items()}, tmp_path / "half.bin")
    space = load_vae(tmp_path / "half.bin", "tiny")
    assert {p.dtype for p in space.parameters()} == {torch.float32}


def test_loading_draws_no_random_numbers(tmp_path):
    torch.save(made().state_dict(), tmp_path / "w.bin")
    before = torch.get_rng_state()
    load_vae(tmp_path / "w.bin", "tiny")
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_weights_are_refused_by_name(tmp_path):
    state = made().state_dict()
    del state["encoder.conv_in.bias"], state["decoder.mid_block.attentions.0.to_q.weight"]
    state |= {"encoder.extra": torch.zeros(1), "decoder.conv_out.bias": torch.zeros(5)}
    torch.save(state, tmp_path / "wrong.bin")
    with pytest.raises(UserError) as error:
        load_vae(tmp_path / "wrong.bin", "tiny")
    for part in ("wrong.bin",
                 "2 missing: decoder.mid_block.attentions.0.to_q.weight, encoder.conv_in.bias",
                 "1 unexpected: encoder.extra",
                 "1 misshapen: decoder.conv_out.bias"):
        assert part in str(error.value)
    torch.save(made().state_dict(), tmp_path / "tiny.bin")
    with pytest.raises(UserError, match=r"missing: .*, \.\.\.; .*misshapen"):
        load_vae(tmp_path / "tiny.bin")                     # the tiny one is not Stable Diffusion's


class Evil:
    def __reduce__(self):
        return print, ("a file of weights ran code",)


@pytest.mark.parametrize("content",
                         ["absent", "text", "cut", "list", "evil", "statistics", "configuration"])
def test_files_that_are_none_are_refused_in_one_line(tmp_path, capsys, content):
    path, state = tmp_path / "file.pt", made().state_dict()
    ours = dict(config=made().config, model=state, mean=torch.zeros(4), std=torch.ones(4))
    if content == "text":
        path.write_text("hello")
    elif content != "absent":
        torch.save({"list": [1, 2], "cut": state, "evil": {"a": Evil()},
                    "statistics": ours | dict(std=torch.ones(3)),
                    "configuration": ours | dict(config=dict(widths=3, wings=2))}[content], path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="file.pt") as error:
        load_vae(path, "tiny")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert "ran code" not in capsys.readouterr().out


def test_safetensors_are_read_by_their_package_and_its_absence_is_told(tmp_path, monkeypatch):
    path, state = tmp_path / "w.safetensors", made().state_dict()
    path.write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        load_vae(path, "tiny")
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    package = types.ModuleType("safetensors.torch")
    package.load_file = lambda given: state if given == path else None
    monkeypatch.setitem(sys.modules, "safetensors.torch", package)
    assert torch.equal(load_vae(path, "tiny").vae.decoder.conv_in.weight,
                       state["decoder.conv_in.weight"])


# --- the command --------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = F.interpolate(torch.rand(24, 3, 4, 4, generator=rng(1)), size=(16, 16),
                           mode="bicubic").clamp(0, 1)
    for i, image in enumerate(pixels):
        array = (image.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(array).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def command(folder, *more):
    return ["--data", str(folder), "--size", "16", "--batch", "8", "--device", "cpu", "--threads",
            "1", "--out", str(folder.parent / "vae.pt"), *more]


@pytest.mark.parametrize("gray", [False, True])
def test_the_command_trains_writes_and_reports(folder, capsys, gray):
    assert status(vae, command(folder, "--steps", "3", *["--gray"] * gray)) == 0
    said, path = capsys.readouterr().out, folder.parent / "vae.pt"
    channels = 1 if gray else 3
    assert "held-out PSNR" in said and "patch-PCA" in said and "(2 images)" in said
    assert "after 3 steps" in said and f"16 x 16 x {channels} -> 4 x 4 x 4" in said
    space, x = load_vae(path), to_float(load_images(folder, 16, gray).take(range(22))[0])
    assert (space.factor, space.channels, space.vae.channels) == (4, 4, channels)
    assert len(space.sha) == 8
    z = space.encode(x)
    assert space.decode(z).shape == x.shape and z.mean().abs() < 0.5 and 0.5 < z.std() < 2
    assert Image.open(path.with_suffix(".png")).width >= 500
    assert not list(folder.parent.glob("*.tmp"))


def test_training_is_reproducible_and_improves(folder):
    out = folder.parent / "vae.pt"
    x, loss, shas = to_float(load_images(folder, 16).take(range(24))[0]), [], []
    for steps in ("1", "40", "40"):
        out.unlink(missing_ok=True)
        assert status(vae, command(folder, "--steps", steps, "--lr", "0.005")) == 0
        space = load_vae(out)
        loss.append((space.decode(space.encode(x)) - x).square().mean().item())
        shas.append([v.clone() for v in space.state_dict().values()])
    assert loss[1] < 0.75 * loss[0] and all(torch.equal(a, b) for a, b in zip(*shas[1:]))


def test_minutes_become_a_plan_after_ten_timed_steps(folder, capsys, monkeypatch):
    """A clock that advances by what each step costs: the first 5 s, the others 1 s.

    A minute holds 60 of those."""
    now = [0.0]
    step = torch.optim.AdamW.step

    def slow(self, *args):
        now[0] += 1 if self.state else 5
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    rates = []
    monkeypatch.setattr(torch.optim.AdamW, "step", slow)
    monkeypatch.setattr(vae, "perf_counter", lambda: now[0])
    assert status(vae, command(folder, "--minutes", "1", "--batch", "1")) == 0
    assert "after 60 steps" in capsys.readouterr().out and len(rates) == 60
    assert max(rates) <= 2e-3 and rates[0] == pytest.approx(2e-3 / 50) and rates[-1] < 1e-5


def test_a_training_that_diverges_says_so_and_leaves_nothing(folder, capsys):
    assert status(vae, command(folder, "--steps", "20", "--lr", "1e30")) == 2
    assert "--lr 1e+30" in capsys.readouterr().err
    assert not list(folder.parent.glob("vae*"))


def test_an_autoencoder_that_runs_may_need_is_never_replaced(folder, capsys):
    (folder.parent / "vae.pt").write_text("old")
    assert status(vae, command(folder, "--steps", "1")) == 2
    assert "exists already" in capsys.readouterr().err
    assert (folder.parent / "vae.pt").read_text() == "old"


@pytest.mark.parametrize("wrong",
                         [["--size", "18"], ["--size", "0"], ["--size", "-4"], ["--steps", "0"],
                          ["--minutes", "nan"], ["--minutes", "0"], ["--batch", "0"],
                          ["--lr", "0"], ["--lr", "inf"], ["--seed", "-1"],
                          ["--threads", "-1"], ["--steps", "3", "--minutes", "1"],
                          ["--out", "/no/such/folder/vae.pt"], ["--out", "vae.png"],
                          ["--out", ""], ["--picture", "vae.gif"], ["--data", "/no/such/data"]],
                         ids=" ".join)
def test_bad_options_are_one_line_and_2(folder, capsys, wrong):
    assert status(vae, command(folder, *wrong)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert wrong[0] in said or "/no/such" in said


def test_a_place_that_cannot_be_written_is_told_before_the_training(folder, capsys, monkeypatch):
    monkeypatch.setattr(vae, "train_vae", None)                                  # a step would fail
    (folder.parent / "folder.pt").mkdir()
    assert status(vae,
                  command(folder, "--steps", "3", "--out", str(folder.parent / "folder.pt"))) == 2
    real = open

    def read_only(path, mode="r", *rest, **more):
        if "w" in mode or "x" in mode:
            raise OSError(30, "Read-only file system")
        return real(path, mode, *rest, **more)

    monkeypatch.setattr("builtins.open", read_only)
    assert status(vae, command(folder, "--steps", "3")) == 2
    assert "vae.pt cannot be written" in capsys.readouterr().err


def test_one_image_is_too_few(folder, capsys):
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    assert status(vae, command(folder, "--steps", "1")) == 2 and "--data" in capsys.readouterr().err


def test_patch_pca_with_all_components_is_the_identity_and_with_few_the_best_linear_code():
    x = F.interpolate(images(20, 3, 4, 4), size=(8, 8), mode="bilinear")
    torch.testing.assert_close(vae.patch_pca(x, x, 4, 48), x, atol=1e-4, rtol=0)
    patches = np.stack([x[i, :, a:a + 4, b:b + 4].flatten().numpy() for i in range(20)
                        for a in (0, 4) for b in (0, 4)]).astype(np.float64)
    singular = np.linalg.svd(patches - patches.mean(0), compute_uv=False)
    error = (vae.patch_pca(x, x, 4, 5) - x).square().sum().item()
    assert error == pytest.approx((singular[5:] ** 2).sum(), rel=1e-3)


def test_an_unknown_flag_is_exit_2_without_a_traceback(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "vae.py"), "--no-such-flag"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--no-such-flag" in done.stderr


def test_ctrl_c_ends_the_command_without_a_traceback_and_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert status(vae, command(folder, "--steps", "3")) == 130
    assert not list(folder.parent.glob("vae*"))


def test_a_folder_of_diffusers_is_taken_for_the_one_file_of_weights_in_it(tmp_path):
    folder = tmp_path / "sd-vae"
    folder.mkdir()
    with pytest.raises(UserError, match="folder with 0 files of weights"):
        load_vae(folder)
    tiny = AutoencoderKL(**vae.PRESETS["tiny"])
    torch.save(tiny.state_dict(), folder / "diffusion_pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    space = load_vae(folder, "tiny")
    assert torch.equal(space.vae.quant_conv.weight, tiny.quant_conv.weight)
    torch.save(tiny.state_dict(), folder / "another.bin")
    with pytest.raises(UserError, match="2 files of weights"):
        load_vae(folder, "tiny")


@pytest.mark.parametrize("change, word", [
    (dict(mean=torch.tensor([0.0, 0.0, 0.0, float("nan")])), "mean must be a row of finite"),
    (dict(std=torch.zeros(4)), "std must be"), (dict(std=torch.ones(3)), "4 numbers each"),
    (dict(mean=torch.zeros(())), "mean"), (dict(mean="x"), "mean"), (dict(model={"a": 1}), "model"),
    (dict(config=[]), "config"), (dict(layers=10**9), "layers must be a whole number from 1 to 64"),
    (dict(widths=[16] * 10**5), "widths"), (dict(widths=[10**9, 32, 32]), "widths"),
    (dict(latent=10**12), "latent"), (dict(scaling=float("nan")), "scaling"),
    (dict(no=1), "unknown"),
    (dict(layers=2), "not the weights"), (dict(groups=7), "holds no autoencoder")])
def test_a_strange_file_of_an_autoencoder_is_one_line(tmp_path, change, word):
    tiny = AutoencoderKL(**PRESETS["tiny"])
    held = dict(config=tiny.config, model=tiny.state_dict(), mean=torch.zeros(4), std=torch.ones(4))
    inside = change.keys() & held.keys()
    held |= change if inside else dict(config=tiny.config | change)
    torch.save(held, tmp_path / "strange.pt")
    with pytest.raises(UserError, match=word) as error:
        load_vae(tmp_path / "strange.pt")
    assert len(str(error.value).splitlines()) == 1
