"""fid.py: the distance against closed forms and scipy, the network against its published
layout, the command against bad input."""
import os
import subprocess
import sys
import warnings
import zipfile
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from PIL import Image

import fid
from conftest import status
from plumbing.console import UserError
import plumbing.inception


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a shared machine two threads wait for each other: Inception measured 4.7 s with
    two and 0.34 s with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def spd(d, seed, rank=None):
    A = randn(d, rank or 2 * d, seed=seed)
    return A @ A.T / A.shape[1]


def close(a, b, tolerance):
    return abs(a - b) <= tolerance


# --- Fréchet distance ---------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 99))
def test_the_distance_of_diagonal_gaussians_is_the_closed_form(d, seed):
    m1, m2, a, b = (randn(d, seed=seed + i) for i in range(4))
    a, b = a.square(), b.square()
    a[0] = 0  # a direction without variance is no exception
    expected = (m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert close(fid.frechet(m1, a.diag(), m2, b.diag()), expected.item(), 1e-6)


@given(st.integers(1, 12), st.integers(0, 99))
def test_the_distance_is_symmetric_zero_on_itself_and_blind_to_rotations(d, seed):
    m1, m2, S1, S2 = randn(d, seed=seed), randn(d, seed=seed + 1), spd(d,
                                                                       seed + 2), spd(d, seed + 3)
    there = fid.frechet(m1, S1, m2, S2)
    Q = torch.linalg.qr(randn(d, d, seed=seed + 4)).Q
    assert close(there, fid.frechet(m2, S2, m1, S1), 1e-9)
    assert fid.frechet(m1, S1, m1, S1) <= 1e-9 * d
    assert close(there, fid.frechet(Q @ m1, Q @ S1 @ Q.T, Q @ m2, Q @ S2 @ Q.T), 1e-9)


@given(st.integers(1, 10), st.integers(0, 99))
def test_the_distance_of_singular_covariances_is_real_and_right(d, seed):
    S = spd(d, seed, rank=1)  # S and 4 S commute: sqrt(4 S S) = 2 S, left is tr S
    zero = torch.zeros(d)
    assert close(fid.frechet(zero, S, zero, 4 * S), S.trace().item(), 1e-6 * S.trace().item())
    assert close(fid.frechet(zero, S, zero, 0 * S), S.trace().item(), 1e-6 * S.trace().item())


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 16), st.integers(0, 99))
def test_both_paths_agree_with_the_form_by_sqrtm_at_any_n_and_d(n1, n2, d, seed):
    X1, X2 = randn(n1, d, seed=seed), 2 * randn(n2, d, seed=seed + 1) + 1
    (m1, S1), (m2, S2) = ((X.mean(0), torch.cov(X.T).reshape(d, d)) for X in (X1, X2))
    root = np.linalg.eigvals(
        (S1 @ S2
         ).numpy()).astype(complex)**0.5  # scipy's sqrtm fails on singular products: use it below
    trace = root.real.sum()
    if min(n1, n2) > d + 1:
        trace = scipy.linalg.sqrtm((S1 @ S2).numpy()).trace().real
    size = (S1.trace() + S2.trace()).item()
    expected = (m1 - m2).square().sum().item() + size - 2 * trace
    tolerance = (1e-6 if min(n1, n2) > d + 1 else 1e-5) * size
    assert close(fid.frechet(m1, S1, m2, S2), expected, tolerance)
    assert close(fid.frechet_features(X1, X2), expected, tolerance)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 99))
def test_streamed_moments_are_numpys_for_any_split_and_a_large_mean(sizes, seed):
    x = randn(sum(sizes), 5, seed=seed) + 1e6
    moments = fid.Moments()
    for part in x.split(sizes):
        moments.add(part)
    mu, sigma = moments.finish()
    assert np.allclose(mu, x.numpy().mean(0), rtol=1e-14)
    assert np.allclose(sigma, np.cov(x.numpy(), rowvar=False), atol=1e-8)


def test_a_covariance_of_one_image_or_of_nan_is_refused():
    for x, word in ((torch.zeros(1, 3), "at least 2"), (torch.full((4, 3),
                                                                   torch.nan), "not finite")):
        moments = fid.Moments()
        moments.add(x)
        with pytest.raises(UserError, match=word):
            moments.finish()


# --- the network --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net():
    """Random weights that keep the scale: with torch's own, which shrink it, features are
    1e-7 and any test of them passes."""
    torch.manual_seed(0)
    net = plumbing.inception.Inception().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.2, 0.2)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def weights(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({k: v for k, v in net.state_dict().items() if "num_batches_tracked" not in k}, path)
    return path


def test_the_network_has_the_published_layout(net):
    state = net.state_dict()
    assert len(state) == 566 and sum("num_batches_tracked" not in name for name in state) == 472
    assert sum(isinstance(m, plumbing.inception.BasicConv2d) for m in net.modules()) == 94
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    assert sum(p.numel() for name, p in net.named_parameters()
               if not name.startswith("fc.")) == 21_785_568
    golden = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_4a_3x3.bn.running_var": (192, ),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3,
                                           3), "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6b.branch7x7_3.conv.weight": (192, 128, 7, 1),
        "Mixed_6d.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1,
                                                7), "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192,
                                                                                           3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1,
                                              3), "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384,
                                                                                           3, 1),
        "Mixed_7c.branch1x1.bn.bias": (320, ), "fc.weight": (1008, 2048), "fc.bias": (1008, )
    }
    assert {name: tuple(state[name].shape) for name in golden} == golden
    assert all(m.eps == 1e-3 for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert all(m.bias is None for m in net.modules() if isinstance(m, torch.nn.Conv2d))


def average_of_real_pixels(x):
    """The mean over the part of each 3 x 3 window that lies in the image, by a loop."""
    h, w = x.shape[2:]
    return torch.stack([
        torch.stack(
            [x[:, :, max(i - 1, 0):i + 2, max(j - 1, 0):j + 2].mean((2, 3)) for j in range(w)], -1)
        for i in range(h)
    ], -2)


def maximum(x):
    h, w = x.shape[2:]
    return torch.stack([
        torch.stack(
            [x[:, :, max(i - 1, 0):i + 2, max(j - 1, 0):j + 2].amax((2, 3)) for j in range(w)], -1)
        for i in range(h)
    ], -2)


@pytest.mark.parametrize("name, pool", [("Mixed_5b", average_of_real_pixels),
                                        ("Mixed_5d", average_of_real_pixels),
                                        ("Mixed_6b", average_of_real_pixels),
                                        ("Mixed_6e", average_of_real_pixels),
                                        ("Mixed_7b", average_of_real_pixels),
                                        ("Mixed_7c", maximum)])
@torch.no_grad()
def test_the_pool_branch_of_each_block_is_the_2015_graphs(net, name, pool):
    block = net.get_submodule(name)
    x = 1 + torch.rand(2, block.branch1x1.conv.in_channels, 5, 4,
                       generator=rng(0))  # positive: a zero border would show
    conv, bn = block.branch_pool.conv, block.branch_pool.bn
    expected = F.conv2d(pool(x), conv.weight)
    scale, shift = bn.weight / (bn.running_var + 1e-3).sqrt(), bn.bias
    expected = ((expected - bn.running_mean[:, None, None]) * scale[:, None, None] +
                shift[:, None, None]).relu()
    assert expected.max() > 0.5 and torch.allclose(
        block(x)[:, -conv.out_channels:], expected, atol=1e-4)


@torch.no_grad()
def test_the_branches_of_the_last_block_stand_in_the_published_order(net):
    block, x = net.Mixed_7c, torch.randn(1, 2048, 3, 3, generator=rng(0))
    h, g = block.branch3x3_1(x), block.branch3x3dbl_2(block.branch3x3dbl_1(x))
    expected = [
        block.branch1x1(x),
        block.branch3x3_2a(h),
        block.branch3x3_2b(h),
        block.branch3x3dbl_3a(g),
        block.branch3x3dbl_3b(g),
        block.branch_pool(maximum(x))
    ]
    assert torch.allclose(block(x), torch.cat(expected, 1), atol=1e-4)


@pytest.mark.parametrize("size", [(7, 11), (32, 32), (400, 310)])
def test_the_tf1_resize_is_a_brute_force_loop(size):
    x = torch.randint(0, 256, (1, 3, *size), generator=rng(0), dtype=torch.uint8)
    got, v = fid.resize_tf1(x)[0], x[0].numpy().astype(np.float64)
    for i, j in [(0, 0), (1, 2), (150, 149), (298, 298), (298, 0), (77, 291)]:
        y, z = i * size[0] / 299, j * size[1] / 299
        i0, j0 = int(y), int(z)
        i1, j1 = min(i0 + 1, size[0] - 1), min(j0 + 1, size[1] - 1)
        top = v[:, i0, j0] * (1 - z + j0) + v[:, i0, j1] * (z - j0)
        low = v[:, i1, j0] * (1 - z + j0) + v[:, i1, j1] * (z - j0)
        assert np.allclose(got[:, i, j], (top * (1 - y + i0) + low * (y - i0) - 128) / 128,
                           atol=1e-4)


def test_the_two_protocols_scale_as_published():
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    assert fid.resize_pytorch_fid(white).shape == (1, 3, 299, 299)
    for protocol, top in ((fid.resize_pytorch_fid, 1.0), (fid.resize_tf1, 127 / 128)):
        assert torch.allclose(protocol(white), torch.tensor(top)) and torch.allclose(
            protocol(0 * white), torch.tensor(-1.0))


def test_weights_load_with_a_hash_a_warning_and_no_touch_of_the_global_generator(net, weights):
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="not the published"):
        loaded, sha = plumbing.inception.load_inception(weights)
    assert torch.equal(before, torch.get_rng_state())
    assert len(sha) == 8 and not loaded.training
    assert all(
        torch.equal(v,
                    loaded.state_dict()[k]) for k, v in net.state_dict().items()
        if "num_batches" not in k)


@pytest.mark.filterwarnings("ignore")
def test_wrong_weights_are_refused(net, tmp_path, monkeypatch):
    state, path = dict(net.state_dict()), tmp_path / "wrong.pth"
    for broken in ({k: v
                    for k, v in state.items()
                    if k != "fc.bias"}, state | {"AuxLogits.fc.weight": torch.zeros(1)},
                   state | {"fc.weight": torch.zeros(1000, 2048)}):
        torch.save({k: torch.zeros(()).expand(v.shape)
                    for k, v in broken.items()}, path)  # right shapes in a small file
        with pytest.raises(UserError, match="not FID's Inception; 1 tensors"):
            plumbing.inception.load_inception(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be read"):
        plumbing.inception.load_inception(path)
    monkeypatch.chdir(tmp_path)  # a wrong file under the published name is no published file
    torch.save({}, tmp_path / plumbing.inception.NAME)
    with pytest.raises(UserError, match="not the published"):
        plumbing.inception.load_inception()


# --- statistics ---------------------------------------------------------------------------


def stats(n=5000, protocol="tf1", weights="6726825d", d=4, seed=0):
    return fid.Statistics(randn(d, seed=seed).numpy(), spd(d, seed).numpy(), n, protocol, weights)


def test_statistics_of_different_protocols_or_weights_are_never_compared():
    for other in (stats(protocol="pytorch-fid"), stats(weights="00000000")):
        with pytest.raises(UserError, match="not comparable"):
            fid.fid(stats(), other)
    assert fid.fid(stats(), stats()) < 1e-9


def test_small_n_is_warned_about(recwarn):
    fid.fid(stats(n=5), stats())
    assert not recwarn
    with pytest.warns(UserWarning, match="n = 4 images for 4 features"):
        fid.fid(stats(n=4), stats())


# --- proxies ------------------------------------------------------------------------------


def pictures(n, seed, c=3, size=16):
    """Smooth random images with a little structure: a disc of random place and colour on a
    gradient."""
    g, t = rng(seed), torch.linspace(-1, 1, size)
    at, colour, slope = torch.rand(n, 2, generator=g) - 0.5, torch.rand(
        n, c, generator=g), torch.rand(n, generator=g)
    d = ((t - at[:, :1])[:, :, None].square() + (t - at[:, 1:])[:, None, :].square()).sqrt()
    disc = torch.sigmoid(20 * (0.4 - d))[:, None]
    return (255 * (disc * colour[:, :, None, None] + (1 - disc) * 0.5 *
                   (1 + slope[:, None, None, None] * t))).byte()


def ratios(a, b):
    return {name: value / floor for name, (value, floor) in fid.proxy_distances(a, b).items()}


def distances(a, b):
    return {name: distance(rows(a), rows(b)) for name, (rows, distance) in fid.PROXIES.items()}


@pytest.fixture(scope="module")
def reference():
    return pictures(160, 0)


@pytest.fixture
def few_patches(monkeypatch):
    """An eighth of the patches: `proxy_distances` asks for a distance twelve times."""
    few = partial(fid.sliced_wasserstein, points=1024)
    monkeypatch.setitem(fid.PROXIES, "swd", (fid.keep_images, few))


def noisy(x, s):
    return (x + s * torch.randn(x.shape, generator=rng(7))).clamp(0, 255).byte()


def blurred(x, times):
    y = x.float()
    for _ in range(times):
        y = F.avg_pool2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return y.byte()


def test_proxies_are_at_their_floor_for_the_same_distribution_and_below_it_for_copies(
        reference, few_patches):
    copies, others, noise = (ratios(a, reference[:80]) for a in (
        reference[:40], pictures(40, 1),
        torch.randint(0, 256, (40, 3, 16, 16), generator=rng(2), dtype=torch.uint8)))
    assert set(copies) == {"random-conv", "pixel", "swd"}
    assert all(copies[name] < 0.9 for name in ("random-conv", "pixel"))
    assert all(0.5 < others[name] < 1.6 for name in others)
    assert all(noise[name] > 4 for name in noise)


def test_proxies_grow_with_noise_and_with_blur(reference):
    others = pictures(80, 1)
    for steps in ([others] + [noisy(others, s)
                              for s in (20, 60)], [others] + [blurred(others, t) for t in (2, 6)]):
        clean, some, much = (distances(a, reference[:80]) for a in steps)
        assert all(clean[name] < some[name] < much[name] for name in ("random-conv", "swd"))
        assert clean["pixel"] < much["pixel"]


def test_patches_see_a_texture_that_lives_in_the_finest_band_alone():
    x, y = pictures(40, 1, size=32), pictures(40, 0, size=32)
    # Every 2 x 2 average of it is 0.
    checks = 6 * (-1)**(torch.arange(32)[:, None] + torch.arange(32))
    texture = (x.int() + checks).clamp(0, 255).byte()
    assert distances(texture, y)["swd"] > 3 * distances(x, y)["swd"]


def test_shuffled_tiles_are_seen_by_the_pixel_distance(reference):
    x = pictures(80, 1)
    flipped = torch.cat([x[:, :, 8:], x[:, :, :8]], 2)
    assert distances(flipped, reference[:80])["pixel"] > 1.5 * distances(x, reference[:80])["pixel"]


def test_a_gray_image_and_its_rgb_copy_have_the_same_random_features_and_one_channel_works(
        few_patches):
    a, b = pictures(12, 0, c=1), pictures(30, 1, c=1)
    assert torch.allclose(fid.random_conv(a), fid.random_conv(a.expand(-1, 3, -1, -1)), atol=1e-6)
    result = fid.proxy_distances(a, b)
    assert all(value > 0 and floor > 0 for value, floor in result.values())
    assert result == fid.proxy_distances(a, b, seed=0) and result != fid.proxy_distances(
        a, b, seed=1)


def test_each_distance_of_a_set_to_itself_is_zero():
    x = pictures(20, 0)
    assert all(value < 1e-6 for value in distances(x, x).values())


def test_proxy_refuses_what_it_cannot_compare():
    x = pictures(8, 0)
    for a, b in ((x, pictures(8, 0, size=32)), (x, pictures(8, 0, c=1)), (x.float(), x), (x, x[:3]),
                 (x[:1], x), (x[..., :7], x[..., :7])):
        with pytest.raises(UserError, match="proxy"):
            fid.proxy_distances(a, b)


# --- the command --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Eight tiny images as a folder, a zip, and a npz of either layout."""
    x = pictures(8, 3).permute(0, 2, 3, 1).numpy()
    (tmp_path / "images").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i, pixels in enumerate(x):
            Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
            archive.write(tmp_path / "images" / f"{i}.png", f"{i}.png")
    np.savez(tmp_path / "nhwc.npz", images=x)
    np.savez(tmp_path / "nchw.npz", x.transpose(0, 3, 1, 2))
    return tmp_path


def test_folder_zip_and_both_npz_layouts_are_the_same_images(folder):
    sources = [
        fid.open_measured(folder / name)
        for name in ("images", "images.zip", "nhwc.npz", "nchw.npz")
    ]
    for source in sources:
        assert len(source) == 8 and source[0].shape == (3, 16,
                                                        16) and source[0].dtype == torch.uint8
        assert all(torch.equal(source[i], sources[0][i]) for i in range(8))
    assert fid.open_measured(folder / "images", 3,
                             seed=1).names == fid.open_measured(folder / "images.zip", 3,
                                                                seed=1).names
    gray = np.zeros((2, 1, 8, 8), np.uint8)
    np.savez(folder / "gray.npz", images=gray)
    assert fid.open_measured(folder / "gray.npz")[0].shape == (3, 8, 8)


def test_sixteen_bits_are_scaled_and_a_proxy_sees_what_training_sees(tmp_path):
    """Read as pytorch-fid reads them, 16 bits would all be white."""
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(tmp_path / "deep.png")
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.save(tmp_path / "glass.png")
    for flat, glass in ((False, 0), (True, 255)):
        deep, clear = (fid.open_measured(tmp_path, flat=flat)[i] for i in (0, 1))
        assert deep.unique().tolist() == [128] and clear.unique().tolist() == [glass]
    with zipfile.ZipFile(tmp_path / "A.ZIP", "w") as archive:
        archive.write(tmp_path / "deep.png", "deep.png")
    assert len(fid.open_measured(tmp_path / "A.ZIP")) == 1


def test_end_to_end_with_random_weights(folder, weights, capsys, monkeypatch):
    # Two eigenproblems of size 2048 take 10 s and are tested above at small size; here the
    # moments that reach them are looked at.
    monkeypatch.setattr(fid, "frechet",
                        lambda m1, S1, m2, S2: np.abs(m1 - m2).max() + np.abs(S1 - S2).max())
    common = ["--inception", str(weights), "--device", "cpu", "--batch", "2"]
    assert status(fid, [str(folder / "images"), str(folder / "nhwc.npz"), *common, "--n", "2"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert abs(float(lines[0].removeprefix(
        "FID "))) < 1e-3 and "n 2, protocol pytorch-fid (half-pixel" in lines[1]
    assert "2 images for 2048 features" in err and "not the published" in err
    assert "Traceback" not in err

    saved = str(folder / "stats.npz")
    assert status(fid, [str(folder / "images"), "--save", saved, *common, "--n", "3"]) == 0
    kept = fid.open_measured(saved)
    assert kept.n == 3 and kept.protocol == "pytorch-fid" and kept.mu.shape == (
        2048, ) and kept.sigma.dtype == np.float64
    assert np.allclose(kept.sigma, kept.sigma.T) and np.linalg.norm(kept.sigma) > 0
    capsys.readouterr()
    assert status(fid, [str(folder / "images"), saved, *common, "--protocol", "tf1"]) == 2
    assert "not comparable" in capsys.readouterr().err


@torch.no_grad()
def test_statistics_of_a_tensor_are_numpys_of_all_features_at_once(net):
    x = pictures(3, 0, size=20)
    got, features = fid.statistics(x, net, "none",
                                   batch=2), net(fid.resize_pytorch_fid(x)).double().numpy()
    assert features.std(0).max() > 1e-2  # there is something to get wrong
    assert np.allclose(got.mu, features.mean(0), atol=1e-5) and got.n == 3
    assert np.allclose(got.sigma, np.cov(features, rowvar=False), rtol=1e-3, atol=1e-5)


def test_without_weights_and_network_two_lines_say_what_to_do(folder, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.chdir(folder)
    assert status(fid, ["images", "nhwc.npz"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) <= 2 and "Traceback" not in err
    for needed in (plumbing.inception.NAME, plumbing.inception.URL, "Name or service not known",
                   "--inception", "--proxy", str(folder / "hub")):
        assert needed in err


def test_the_proxy_command_prints_three_ratios_and_never_a_line_that_begins_with_fid(
        folder, capsys, few_patches):
    np.savez(folder / "large.npz", images=pictures(12, 5, size=24).permute(0, 2, 3, 1).numpy())
    assert status(fid, [str(folder / "images"), str(folder / "large.npz"), "--proxy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0]
            for line in lines[:3]] == ["proxy/random-conv", "proxy/pixel", "proxy/swd"]
    assert all("floor" in line and "ratio" in line for line in lines[:3])
    assert not any(line.strip().startswith("FID") for line in lines)
    assert "resized to 16 x 16, the smaller side" in "\n".join(lines) and "k 6 images" in "\n".join(
        lines)


@pytest.mark.parametrize(
    "argv",
    [["images"], ["images", "nowhere"], ["images", "--proxy"], ["images", "empty"],
     ["images", "text.txt"], ["images", "broken.npz"], ["images", "float.npz"],
     ["images", "foreign.npz", "--proxy"], ["images", "broken.zip"], ["bad", "images", "--proxy"],
     ["images", "images", "--inception", "nowhere.pth"], ["images", "--save", "x.pt"],
     ["images", "--save", "no/x.npz"], ["images", "images", "--proxy", "--save", "x.npz"],
     ["stats.npz", "--save", "folder.npz"], ["images", "one.npy"], ["small", "faces", "--proxy"],
     ["stats.npz", "shape.npz"], ["stats.npz", "protocol.npz"],
     ["images", "images", "--batch", "0"], ["images", "images", "--n", "1"],
     ["stats.npz", "images", "--proxy"], ["stats.npz", "other.npz"],
     ["images", "images", "--proxy", "--seed", "99999999999999999999"],
     ["images", "images", "--proxy", "--protocol", "tf1"],
     ["images", "images", "--proxy", "--inception", "nowhere.pth"],
     ["images", "images", "--proxy", "--device", "cpu"],
     ["stats.npz", "stats.npz", "--device", "cpu"], ["images", "pipe"], ["images", os.devnull],
     ["images", "images", "--proxy", "--batch", "7"], ["stats.npz", "stats.npz", "--n", "10"],
     ["stats.npz", "stats.npz", "--size", "64"], ["images", "images", "--device", "nowhere"],
     ["images", "images", "--n", "two"], ["images", "images", "--prox"], []])
def test_bad_input_is_one_line_and_status_2(folder, argv, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    for name in ("text.txt", "broken.npz", "broken.zip", "bad/0.png"):
        (folder / name).write_text("not what it says")
    np.savez("float.npz", images=np.zeros((2, 8, 8, 3)))
    np.savez("foreign.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("stats.npz", **vars(stats()))
    np.savez("other.npz", **vars(stats(protocol="pytorch-fid")))
    np.save("one.npy", np.zeros((2, 8, 8, 3), np.uint8))
    np.savez("shape.npz", **vars(stats()) | dict(sigma=np.eye(2)))
    np.savez("protocol.npz", **vars(stats()) | dict(protocol="xx"))
    (folder / "folder.npz").mkdir()
    os.mkfifo("pipe")                                               # who reads it waits for ever
    (folder / "small").mkdir()
    Image.new("RGB", (4, 4)).save("small/0.png")
    code = status(fid, argv)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")


def test_two_saved_statistics_need_no_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fid, "load_inception", None)
    np.savez(tmp_path / "a.npz", **vars(stats(seed=0)))
    np.savez(tmp_path / "b.npz", **vars(stats(seed=1)))
    assert status(fid, [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert close(float(first.split()[1]), fid.fid(stats(seed=0), stats(seed=1)), 1e-4)


def test_every_option_is_in_the_help_with_its_default():
    text = subprocess.run([sys.executable, fid.__file__, "--help"],
                          capture_output=True,
                          text=True,
                          check=True).stdout
    for action in fid.parser()._actions:
        if action.option_strings and action.dest != "help":
            assert action.option_strings[0] in text
    assert text.count("default:") == len(
        fid.parser()._actions) - 2  # all but --help and the required A


# --- sizes, orders and what lies beside ---------------------------------------------------


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """photos/ of 48 x 27 pixels, small/ the same as training sees them, squares of 16."""
    monkeypatch.chdir(tmp_path)
    for k, pixels in enumerate(pictures(6, 3, size=48).permute(0, 2, 3, 1).numpy()):
        for folder in ("photos", "small"):
            (tmp_path / folder).mkdir(exist_ok=True)
        photo = Image.fromarray(pixels[:27])
        photo.save(f"photos/{k}.png")
        square = fid.crop_square(photo, 16).transpose(1, 2, 0)
        Image.fromarray(square).save(f"small/{k}.png")
    return tmp_path


@pytest.fixture
def few_features(monkeypatch):
    """A network of a few features in place of Inception."""
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    monkeypatch.setattr(fid, "load_inception", lambda path: (net, "6726825d"))


def read_fid(capsys):
    out, err = capsys.readouterr()
    return float(out.splitlines()[0].removeprefix("FID ")), err


def test_samples_of_one_size_against_photographs_are_warned_about_and_can_be_measured(
        photographs, few_features, capsys):
    common = ["--device", "cpu"]
    assert status(fid, ["small", "photos", *common]) == 0
    apart, err = read_fid(capsys)
    assert apart > 1e-3
    assert "A has 16 x 16 pixels, B 48 x 27" in err and "--size 16 measures both" in err
    assert status(fid, ["small", "photos", "--size", "16", *common]) == 0
    same, err = read_fid(capsys)
    assert same < 1e-9 and "A has" not in err
    assert status(fid, ["small", "small", *common]) == 0
    assert "A has" not in capsys.readouterr().err


def test_faces_are_drawn_at_the_size_of_the_pictures_but_at_most_256(tmp_path, monkeypatch):
    sizes, real = [], fid.draw_faces

    def few(n, size, seed):
        sizes.append(size)
        return real(2, size, seed)

    monkeypatch.setattr(fid, "draw_faces", few)
    for side in (20, 3000):
        folder = tmp_path / str(side)
        folder.mkdir()
        Image.new("L", (side, side + 1)).save(folder / "0.png")
        fid.open_sets(fid.parser().parse_args([str(folder), "faces", "--proxy"]))
    assert sizes == [20, 256]


def test_statistics_of_squares_are_never_compared_with_others(photographs, few_features, capsys):
    assert status(fid, ["photos", "--size", "16", "--save", "ref.npz"]) == 0
    assert status(fid, ["small", "ref.npz", "--size", "16"]) == 0
    capsys.readouterr()
    for argv in (["small", "ref.npz"], ["small", "ref.npz", "--size", "24"]):
        assert status(fid, argv) == 2
        assert "size 16" in capsys.readouterr().err
    old = {key: value for key, value in np.load("ref.npz").items() if key != "size"}
    np.savez("old.npz", **old)  # a file from before there was a choice
    assert fid.open_measured("old.npz").size == 0 and fid.open_measured("ref.npz").size == 16
    for size in ("7", "100000", "0"):
        assert status(fid, ["small", "photos", "--size", size]) == 2


def test_a_proxy_takes_the_smaller_side_of_both_and_asks_about_the_order(
        photographs, capsys, few_patches):
    assert status(fid, ["small", "photos", "--proxy"]) == 0
    assert capsys.readouterr().err == ""
    Image.new("RGB", (300, 200)).save("photos/0.png")
    assert status(fid, ["photos", "small", "--proxy"]) == 0
    out, err = capsys.readouterr()
    assert "resized to 16 x 16, the smaller side" in out and "is the order samples, ref" in err
    assert status(fid, ["photos", "small", "--proxy", "--size", "8"]) == 0
    assert "resized to 8 x 8, --size" in capsys.readouterr().out


def test_little_memory_is_one_line(photographs, capsys, monkeypatch):
    monkeypatch.setattr(fid, "count_free_memory", lambda: 1000)
    assert status(fid, ["small", "photos", "--proxy"]) == 2
    assert "need about 0.0 GB, 0.0 are free; give --size" in capsys.readouterr().err


def test_comparisons_beside_results_are_left_out_and_others_are_not(photographs, capsys,
                                                                    few_patches):
    for k in range(3):
        Image.new("RGB", (48, 16)).save(f"small/{k}-compare.png")
    Image.new("RGB", (16, 16)).save("small/z-compare.png")
    assert len(fid.open_measured("photos").names) == 6
    with pytest.warns(UserWarning, match="small: 3 pictures NAME-compare.png are left out"):
        names = fid.open_measured("small").names
    assert len(names) == 7 and "z-compare.png" in names and "0-compare.png" not in names


@pytest.mark.parametrize(
    "argv", [["a.npz", "b.npz", "--save", "b.npz"], ["a.npz", "b.npz", "--save", "a.npz"],
             ["a.npz", "b.npz", "--save", "link.npz"], ["link.npz", "b.npz", "--save", "a.npz"],
             ["small", "--inception", "a.npz", "--save", "./small/../a.npz"]])
def test_saved_statistics_never_replace_an_input(photographs, capsys, argv):
    for k, name in enumerate("ab"):
        np.savez(f"{name}.npz", **vars(stats(seed=k)))
    (photographs / "link.npz").symlink_to("a.npz")
    before = [(photographs / f"{name}.npz").read_bytes() for name in "ab"]
    assert status(fid, argv) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "--save" in err and "would overwrite" in err
    assert before == [(photographs / f"{name}.npz").read_bytes() for name in "ab"]


def test_a_reference_with_moments_and_images_is_used_for_its_images(photographs, capsys,
                                                                    few_patches):
    images = pictures(8, 3).permute(0, 2, 3, 1).numpy()
    np.savez("adm.npz", mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(4), arr_0=images)
    assert status(fid, ["adm.npz", "adm.npz", "--proxy"]) == 0
    assert "n 8" in capsys.readouterr().out
    assert status(fid, ["adm.npz", "small"]) == 2
    err = capsys.readouterr().err
    assert "without a record" in err and "it holds 8 images, too: take them out" in err
    assert "adm-measured.npz" in err and "--save adm.npz" not in err


@pytest.mark.parametrize("name, advice", [("photos/0.png", "is one picture; give a folder"),
                                          ("photos.tar.gz", "unpack it"),
                                          ("photos.7z", "unpack it")])
def test_the_advice_is_right(photographs, capsys, name, advice):
    if not (photographs / name).exists():
        (photographs / name).write_bytes(b"archive")
    assert status(fid, [name, "small", "--proxy"]) == 2
    assert advice in capsys.readouterr().err


def test_weights_of_a_stranger_are_one_line(net, tmp_path):
    good = dict(net.state_dict())
    name = "Conv2d_1a_3x3.conv.weight"
    for bad in (good | {3: torch.zeros(1)}, [1], good | {name: good[name] * torch.nan},
                good | {name: good[name].to(torch.complex64)},
                good | {name: good[name].to_sparse()}):
        torch.save(bad, tmp_path / "bad.pth")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not the published weights
            with pytest.raises(UserError, match="bad.pth: .*(cannot be read|not FID's Inception)"):
                plumbing.inception.load_inception(tmp_path / "bad.pth")
