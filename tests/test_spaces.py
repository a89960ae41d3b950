"""Laws of kept latents: each is the encoder's own, whatever happens while it is written,
and whoever else writes."""
import os
import signal

import numpy as np
import pytest
import torch

import spaces
from data import Images, holdout
from plumbing.console import UserError
from plumbing.images import to_float
from spaces import CachedSpace, Latents, encode_once
from vae import AutoencoderKL, LatentSpace

N, SIDE = 45, 8


def space(seed=0, sha="0123abcd"):
    torch.manual_seed(seed)
    return LatentSpace(AutoencoderKL((8, 8), layers=1, groups=4, latent=2, channels=3),
                       torch.randn(2), torch.rand(2) + 0.5, sha)


def images(seed=0, n=N):
    pixels = torch.randint(256, (n, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed),
                           dtype=torch.uint8)
    return Images(SIDE, 3, torch.arange(n), [str(i) for i in range(n)], pixels)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(spaces, "CHUNK", 8)


def files(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("flip", [False, True])
def test_a_cached_latent_is_what_the_encoder_says_of_the_same_image_mirrored_or_not(tmp_path, flip):
    """The loop's own lines on kept latents, against the same lines on pixels."""
    x, inner = images(), space()
    (cached,), outer = encode_once([x], inner, tmp_path, flip)
    assert isinstance(cached, Latents) and isinstance(outer, CachedSpace) and len(cached) == N
    order = torch.tensor([3, 0, 44, 17, 8])
    coin = torch.tensor([True, False, True, True, False])[:, None, None, None] & flip
    z = []
    for source, sees in ((x, inner), (cached, outer)):
        v, y = source.take(order)
        v = to_float(v)
        z.append(sees.encode(torch.where(coin, v.flip(3), v)))
        assert torch.equal(y, order)
    assert z[0].shape == z[1].shape == (5, 2, 4, 4)
    # Another batch, so another rounding.
    torch.testing.assert_close(z[1], z[0], atol=1e-5, rtol=1e-5)
    if flip:
        assert (z[1] - z[1].flip(3)).abs().max() > 0.1
        assert (inner.encode(to_float(x.take([3])[0])) - z[0][:1]).abs().max() > 1e-3
    assert torch.equal(outer.decode(z[0]), inner.decode(z[0]))


def test_in_batches_of_the_chunks_the_cache_is_the_encoder_bit_for_bit(tmp_path):
    x, inner = images(), space()
    (cached,), outer = encode_once([x], inner, tmp_path, True)
    for some in torch.arange(N).split(8):
        v = to_float(x.take(some)[0])
        kept = cached.take(some)[0]
        assert kept.dtype == torch.float32 and torch.equal(outer.encode(kept), inner.encode(v))
        assert torch.equal(outer.encode(kept.flip(3)), inner.encode(v.flip(3)))


def test_batches_are_takes_in_their_order(tmp_path):
    (cached,), _ = encode_once([images()], space(), tmp_path, False)
    order = [torch.tensor([4, 2]), torch.tensor([40])]
    for (z, y), some in zip(cached.batches(order, workers=2), order):
        assert torch.equal(y, some) and torch.equal(z, cached.take(some)[0])


def test_training_and_held_out_images_share_a_file_whatever_the_split(tmp_path):
    x, inner = images(), space()
    for seed in (0, 1):
        parts = holdout(x, 0.2, seed)
        cached, outer = encode_once(parts, inner, tmp_path, True)
        for part, kept in zip(parts, cached):
            v, y = part.take(torch.arange(len(part)))
            z, y_kept = kept.take(torch.arange(len(part)))
            assert torch.equal(y, y_kept)
            torch.testing.assert_close(outer.encode(z), inner.encode(to_float(v)), atol=1e-5,
                                       rtol=1e-5)
    assert len(files(tmp_path)) == 1
    encode_once([x, images(1)], inner, tmp_path, True)  # a held-out set of its own has its own file
    assert len(files(tmp_path)) == 2


def test_other_weights_other_pixels_another_transform_are_another_file(tmp_path):
    base = dict(x=images(), s=space(), flip=True)
    for change in ({}, dict(x=images(1)), dict(x=images(n=44)), dict(s=space(sha="other")),
                   dict(flip=False)):
        v = base | change
        encode_once([v["x"]], v["s"], tmp_path, v["flip"])
    assert len(files(tmp_path)) == 5


def test_a_latent_is_never_kept_under_another_images_class(tmp_path, monkeypatch):
    some = images()
    monkeypatch.setattr(Images, "batches", lambda self, order, workers: (
        (self.take(i)[0], self.take(i)[1].flip(0)) for i in order))     # the next one, if broken
    with pytest.raises(UserError, match="another class"):
        encode_once([some], space(), tmp_path, False)


def test_what_is_kept_is_not_encoded_again(tmp_path, monkeypatch):
    inner = space()
    encode_once([images()], inner, tmp_path, True)
    monkeypatch.setattr(LatentSpace, "encode", None)                      # a call would be an error
    (cached,), _ = encode_once([images()], inner, tmp_path, True)
    assert cached.take([44])[0].shape == (1, 2, 4, 8)


def fork(work):
    """Run work() in a child -> how it ended."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


def dying_after(calls):
    """A space that kills its process, as kill -9 does, at the encoding after `calls`."""
    inner = space()
    real, count = inner.encode, iter(range(10**6))
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    inner.encode = lambda x: real(x) if next(count) < calls else die()
    return inner


@pytest.mark.parametrize("torn", [0, 1, 500, 100000])
def test_kill_9_half_way_then_again_is_as_if_nothing_had_happened(tmp_path, torn):
    """torn: bytes of the next chunk, or garbage, that reached the disk."""
    encode_once([images()], space(), tmp_path / "straight", True)
    work = lambda: encode_once([images()], dying_after(6), tmp_path / "killed", True)
    _, status = os.waitpid(fork(work), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (part,) = (tmp_path / "killed").iterdir()
    assert part.suffix == ".part"                               # half a file does not look like one
    if torn == 100000:                                                         # not even the header
        part.write_bytes(part.read_bytes()[:100])
    else:
        part.write_bytes(part.read_bytes() + b"x" * torn)
    encoded, inner = [], space()
    real = inner.encode
    inner.encode = lambda x: encoded.append(len(x)) or real(x)
    encode_once([images()], inner, tmp_path / "killed", True)
    assert files(tmp_path / "killed") == files(tmp_path / "straight")
    (name,) = files(tmp_path / "straight")
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    # Three chunks were whole: two are kept, the last is made again.
    assert sum(encoded) == 2 * (N if torn == 100000 else N - 16)


def test_many_processes_encode_once_and_all_read_it(tmp_path):
    """As the processes of torchrun do.

    Each writes how many images it encoded and the checksum of what it reads."""
    def work():
        inner, count = space(), []
        real = inner.encode
        inner.encode = lambda x: count.append(len(x)) or real(x)
        (cached,), _ = encode_once([images()], inner, tmp_path / "latents", True, progress=False)
        np.save(tmp_path / f"{os.getpid()}.npy",
                [sum(count), cached.take(range(N))[0].double().sum().item()])

    for child in [fork(work) for _ in range(3)]:
        assert os.waitpid(child, 0)[1] == 0
    told = np.array([np.load(p) for p in tmp_path.glob("*.npy")])
    assert sorted(told[:, 0]) == [0, 0, 2 * N] and len(set(told[:, 1])) == 1
    assert len(files(tmp_path / "latents")) == 1


@pytest.mark.parametrize("kept", [-100, 60, 0])
def test_a_damaged_file_is_named(tmp_path, kept):
    encode_once([images()], space(), tmp_path, True)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="delete it"):
        encode_once([images()], space(), tmp_path, True)


@pytest.mark.parametrize("change", [
    lambda kept: kept[1:], lambda kept: kept[..., :1], lambda kept: kept.astype(np.float64)])
def test_latents_of_another_shape_are_named_as_damaged(tmp_path, change):
    encode_once([images()], space(), tmp_path, True)
    (path,) = tmp_path.iterdir()
    np.save(path, change(np.load(path)))
    with pytest.raises(UserError, match="damaged .*float.*delete it"):
        encode_once([images()], space(), tmp_path, True)


@pytest.mark.parametrize("locks", [True, False])
def test_without_locks_the_file_is_the_same(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(spaces, "fcntl", None)                             # as on Windows
    encode_once([images()], space(), tmp_path / "a", True)
    assert [p.suffix for p in (tmp_path / "a").iterdir()] == [".npy"]


def test_images_left_on_disk_are_known_by_their_files(tmp_path):
    from PIL import Image
    from data import load_images
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), 80 * i, np.uint8)).save(tmp_path / "a" / f"{i}.png")
    load, keys = lambda: load_images(tmp_path / "a", 8, cache_gb=0), []
    keys += [spaces.cache_key(load(), space(), True), spaces.cache_key(load(), space(), True)]
    (cached,), outer = encode_once([load()], space(), tmp_path / "latents", True)
    torch.testing.assert_close(outer.encode(cached.take([1])[0]),
                               space().encode(to_float(load().take([1])[0])), atol=1e-5, rtol=1e-5)
    Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(tmp_path / "a" / "1.png")
    keys.append(spaces.cache_key(load(), space(), True))
    assert keys[0] == keys[1] != keys[2]
