"""Laws of reconstruction: visible tokens stay, the ceiling is the autoencoder's, a hole's
content cannot be seen in what fills it."""
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import restore
import train

from plumbing.console import UserError
from data import Images
from mask import patchify
from restore import (
    FIXED_RATIOS, describe_reconstruction, draw_masks, draw_reconstruction, fill_hidden, hole_mask,
    inpaint_hole, mean_image_error, reconstruct, reconstruction_errors,
)
from sample import DiffusionModel
from schedules import SCHEDULES
from tasks import psnr_per_image
from vae import AutoencoderKL, LatentSpace
from vit import ViT
from plumbing.images import to_float
from plumbing.inputs import UserPictures, name_outputs
import spaces

N = 5


def build(kind, recon_target="clean", objective="reconstruct", decoder=2):
    """A network of random weights, gates and head too, in the space `kind`: 16 places along
    a side of z or x, tokens of 2."""
    torch.manual_seed(0)
    space = spaces.PixelSpace(3) if kind == "pixel" else LatentSpace(AutoencoderKL(
        (8, 8), layers=1, groups=4, latent=4, channels=3),
                                                                     std=torch.ones(4) * 0.2)
    schedule = replace(SCHEDULES["ddm"], data_std=0.5)
    net = ViT(schedule,
              channels=space.channels,
              heads_out=1,
              patch=2,
              width=32,
              depth=2,
              heads=1,
              decoder=decoder,
              decoder_width=32)
    for p in [*net.parameters(), *getattr(getattr(space, "vae", None), "parameters", lambda: [])()]:
        p.data += 0.1 * torch.randn_like(p)
    meta = dict(size=16 * space.factor, objective=objective, recon_target=recon_target, classes=[])
    return DiffusionModel(net.eval(), schedule, space, "x0", meta, torch.device("cpu"))


def images(model, n=N, seed=0):
    small = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(small, size=model.meta["size"], mode="bilinear")


def upscaled(visible, model):
    """(n, N) bool of tokens -> (n, 1, H, W) of pixels, by repetition in a loop."""
    square = 2 * model.space.factor
    out = torch.zeros(len(visible), 1, model.meta["size"], model.meta["size"], dtype=torch.bool)
    for b in range(len(visible)):
        for k in range(64):
            i, j = divmod(k, 8)
            out[b, 0, i * square:(i + 1) * square, j * square:(j + 1) * square] = visible[b, k]
    return out


both_spaces = pytest.mark.parametrize("kind", ["pixel", "latent"])


@both_spaces
def test_visible_tokens_pass_through_and_hidden_ones_are_the_networks(kind):
    model = build(kind)
    x = images(model)
    z, m = model.space.encode(x), draw_masks(model, N, 0.7)
    full = fill_hidden(model, z, m)
    seen = m.visible
    assert torch.equal(patchify(full, 2)[seen], patchify(z, 2)[seen])
    guess = model.net(z, torch.zeros(N, dtype=torch.float64), None, m)
    torch.testing.assert_close(patchify(full, 2)[~seen], patchify(guess, 2)[~seen])


@both_spaces
def test_what_is_hidden_has_no_influence(kind):
    """Tokens of z that are hidden may be anything: z' is the same, bit for bit."""
    model = build(kind)
    z, m = model.space.encode(images(model)), draw_masks(model, N, 0.7)
    hidden = ~upscaled(m.visible, replace(model, meta=dict(size=16), space=spaces.PixelSpace(3)))
    assert torch.equal(fill_hidden(model, z, m), fill_hidden(model, torch.where(hidden, 99.0, z),
                                                             m))


@both_spaces
def test_pictures_and_numbers_are_what_they_are_called(kind):
    model = build(kind)
    x, m = images(model), draw_masks(model, N, 0.7, 3)
    done = reconstruct(model, x, 0.7, seed=3)
    z, hidden = model.space.encode(x), ~upscaled(m.visible, model)
    assert torch.equal(done["original"], x) and torch.equal(done["masked"],
                                                            torch.where(hidden, 0.0, x))
    torch.testing.assert_close(done["ceiling"], model.space.decode(z).clamp(-1, 1))
    full = fill_hidden(model, z, m)
    torch.testing.assert_close(done["reconstructed"], model.space.decode(full).clamp(-1, 1))
    for i in range(N):
        mse = ((done["reconstructed"][i].double() - x[i])**2).mean()
        assert done["psnr"][i].item() == pytest.approx((10 * torch.log10(4 / mse)).item(), abs=1e-4)
        error = ((patchify(full, 2) - patchify(z, 2))[i][~m.visible[i]]**2).mean() / 0.25
        assert done["latent_mse"][i].item() == pytest.approx(error.item(), rel=1e-4)
    assert done["psnr"].shape == done["latent_mse"].shape == (
        N, ) and "PSNR" in describe_reconstruction(done) and draw_reconstruction(done).width > 300
    if kind == "pixel":
        assert torch.equal(done["reconstructed"][~hidden.expand_as(x)],
                           x[~hidden.expand_as(x)]) and (done["ceiling_psnr"] > 90).all()


def test_a_reconstruction_does_not_depend_on_the_batch_and_is_reproducible():
    model = build("latent")
    x = images(model)
    one, two, other = (reconstruct(model, x, 0.5, seed, batch=batch)
                       for seed, batch in ((0, 64), (0, 2), (1, 64)))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-4)
    assert not torch.equal(one["masked"], other["masked"])


@both_spaces
@pytest.mark.parametrize("shape", ["square", "rim", "scattered"])
def test_images_that_differ_only_inside_the_hole_give_the_same_result_bit_for_bit(kind, shape):
    """Also beside the hole, also where the autoencoder's norms and attention look
    everywhere."""
    model = build(kind)
    x, side = images(model), model.meta["size"]
    holes = torch.zeros(N, 1, side, side, dtype=torch.bool)
    if shape == "square":
        for i in range(N):
            holes[i, :, 2 + i:side // 2, 3:side // 2 + i] = True
    elif shape == "rim":  # leaves 3 x 3 tokens, too few to hide their neighbours, too
        holes[:] = True
        holes[:, :, side // 4:side // 4 + 3 * side // 8,
              side // 4:side // 4 + 3 * side // 8] = False
    else:
        holes[:, :, 5, 5] = holes[:, :, side - 2, 1] = True
    other = torch.where(holes, torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), x)
    done, again = inpaint_hole(model, x, holes), inpaint_hole(model, other, holes)
    assert not torch.equal(x, other) and torch.equal(
        done["inpainted"], again["inpainted"]) and torch.equal(done["masked"], again["masked"])
    known = ~holes.expand_as(x)
    assert torch.equal(done["inpainted"][known], x[known])  # known pixels are pasted back
    naive = [
        model.space.decode(
            fill_hidden(model, model.space.encode(v[:1]),
                        hole_mask(holes[0, 0], 2 * model.space.factor, 0))) for v in (x, other)
    ]
    if kind == "latent":
        assert not torch.equal(*naive)  # the leak: encoding the hole's content, as training does


def test_a_token_is_hidden_when_its_square_or_a_neighbours_meets_the_hole():
    hole = torch.zeros(32, 32, dtype=torch.bool)
    hole[9, 17] = True  # of the token (2, 4) of 8 x 8
    for dilate in (0, 1, 2):
        m = hole_mask(hole, 4, dilate)
        for k in range(64):
            i, j = divmod(k, 8)
            assert m.visible[0, k] == (max(abs(i - 2), abs(j - 4)) > dilate)
    assert hole_mask(torch.zeros(32, 32, dtype=torch.bool), 4, 1) is None


def test_a_square_in_the_middle_is_filled_and_reported():
    holes = torch.zeros(N, 1, 16, 16, dtype=torch.bool)
    holes[:, :, 4:12, 4:12] = True
    model = build("pixel")
    done = inpaint_hole(model, images(model), holes)
    assert list(done) == [
        "masked", "inpainted", "original"
    ] and "inpainted" in describe_reconstruction(done) and draw_reconstruction(done).width > 300


def test_no_hole_changes_nothing_and_a_hole_over_everything_is_refused():
    model = build("latent")
    x = images(model)
    holes = torch.zeros(N, 1, 32, 32, dtype=torch.bool)
    assert torch.equal(inpaint_hole(model, x, holes)["inpainted"], x)
    with pytest.raises(UserError, match="hole"):
        inpaint_hole(model, x, ~holes)


@pytest.mark.parametrize(
    "use",
    [lambda model, x: reconstruct(model, x), lambda model, x: inpaint_hole(model, x, x[:, :1] > 0)],
    ids=["reconstruct", "inpaint_hole"])
def test_models_that_cannot_fill_in_pixels_are_refused(use):
    for wrong, word in ((build("pixel", objective="denoise"), "--objective reconstruct"),
                        (build("pixel", "whitened"), "--recon-target clean")):
        with pytest.raises(UserError, match=word) as error:
            use(wrong, images(wrong))
        assert "\n" not in str(error.value)
    old = build("pixel")
    del old.meta["objective"], old.meta[
        "recon_target"]  # a checkpoint from before there was a choice
    with pytest.raises(UserError):
        use(old, images(old))


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, 0.001, float("nan")])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(ratio):
    with pytest.raises(UserError, match="--ratio"):
        reconstruct(build("pixel"), images(build("pixel")), ratio)


@both_spaces
@pytest.mark.parametrize("target", ["clean", "whitened"])
def test_held_out_errors_are_the_masked_mse_at_fixed_ratios_and_masks(kind, target):
    model = build(kind, target)
    pixels = (images(model) * 127.5 + 127.5).round().byte()
    data = Images(model.meta["size"], 3, torch.zeros(N, dtype=torch.int64), pixels=pixels)
    errors = reconstruction_errors(model, data, batch=2)
    assert tuple(errors) == FIXED_RATIOS == (0.15, 0.4, 0.55, 0.75)
    z = model.space.encode(to_float(pixels))
    for ratio, error in errors.items():
        m = draw_masks(model, N, ratio, 1)
        out = patchify(model.net(z, torch.zeros(N, dtype=torch.float64), None, m), 2)
        u = patchify(z, 2)
        wanted, variance = u, 0.25
        if target == "whitened":
            deviation = (u.var(-1, keepdim=True) + 1e-6).sqrt()
            wanted, variance = (u - u.mean(-1, keepdim=True)) / deviation, 1
        square = ((out - wanted)[~m.visible]**2).mean().item()
        assert error == pytest.approx(square / variance, rel=1e-4)
        assert len(m.keep[0]) == round(64 * (1 - ratio))
    assert reconstruction_errors(model, data) == reconstruction_errors(model, data)


@pytest.mark.parametrize("decoder", [1, 3])
def test_any_split_of_encoder_and_decoder_reconstructs(decoder):
    model = build("latent", decoder=decoder)
    assert torch.isfinite(reconstruct(model, images(model))["psnr"]).all()


def test_psnr_of_an_error_of_a_tenth_of_the_range_is_20_db():
    assert psnr_per_image(torch.full((1, 1, 2, 2), 0.2),
                          torch.zeros(1, 1, 2, 2)).item() == pytest.approx(20, abs=1e-5)


# --- what a number of a table is beside ---------------------------------------------------


def sorted_images(n, size, seed=0):
    """Dark pictures first, then bright ones: a set that is sorted by class."""
    noise = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    level = torch.arange(n)[:, None, None, None] / n
    pixels = (40 * noise + 215 * level).byte()
    return Images(size, 3, torch.zeros(n, dtype=torch.int64), pixels=pixels)


def test_errors_of_a_part_of_a_sorted_set_are_those_of_the_set():
    model, data = build("pixel"), sorted_images(200, 16)
    every = reconstruction_errors(model, data, n=200, ratios=(0.5, ))[0.5]
    part = reconstruction_errors(model, data, n=50, ratios=(0.5, ))[0.5]
    assert part == pytest.approx(every, rel=0.25)


@both_spaces
@pytest.mark.parametrize("target", ["clean", "whitened"])
def test_the_cost_of_the_mean_image_is_that_of_a_guess_by_hand(kind, target):
    model = build(kind, target)
    side = model.meta["size"]
    train, held = sorted_images(12, side), sorted_images(6, side, 1)

    def targets(data):
        u = patchify(model.space.encode(to_float(data.take(range(len(data)))[0])), 2)
        if target == "clean":
            return u / 0.5
        return (u - u.mean(-1, keepdim=True)) / (u.var(-1, keepdim=True) + 1e-6).sqrt()

    mean = targets(train).mean(0)
    expected = ((targets(held) - mean)**2).mean().item()
    assert mean_image_error(model, train, held, batch=4) == pytest.approx(expected, rel=1e-4)


def test_one_is_the_cost_of_an_all_zero_guess_and_not_of_the_mean_image():
    """The network says nothing: its weights are zero. The pictures' mean is not."""
    model, data = build("pixel"), sorted_images(64, 16)
    data.pixels = data.pixels // 2 + 127
    root = to_float(data.pixels).square().mean().sqrt().item()
    model = replace(model, schedule=replace(model.schedule, data_std=root))
    for p in model.net.parameters():
        p.data.zero_()
    zero = reconstruction_errors(model, data, ratios=(0.5, ))[0.5]
    assert zero == pytest.approx(1, abs=1e-3)
    assert mean_image_error(model, data, data) < 0.5


# --- inputs -------------------------------------------------------------------------------


def paint(path, size=(8, 6), box=None, value=255, colour=None):
    picture = Image.new("L", size, 0) if colour is None else Image.new("RGB", size, colour)
    if box:
        picture.paste(value, box)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return str(path)


def test_targets_that_are_maps_are_read_as_in_training_whatever_their_colour(tmp_path):
    photo = paint(tmp_path / "photo.png", colour="red")
    truths = []
    for colour in ("white", "lime"):
        truth = paint(tmp_path / f"{colour}.png", colour=colour)
        truths.append(list(UserPictures(photo, targets=truth, maps=True))[0].truth)
    assert truths[0].shape == (1, 1, *truths[0].shape[2:]) == truths[1].shape
    assert (truths[0] == 1).all() and (truths[1] > 0).all()
    dark = paint(tmp_path / "dark.png", colour=(1, 1, 1))
    with pytest.raises(UserError, match="the largest value is 1"):
        UserPictures(photo, targets=dark, maps=True)


def test_a_single_picture_is_taken_with_a_single_mask_and_target(tmp_path):
    photo = paint(tmp_path / "photo.png", colour="red")
    mask = paint(tmp_path / "mask.png", box=(0, 0, 3, 3))
    truth = paint(tmp_path / "truth.png", colour="blue")
    pictures = UserPictures(photo, holes=mask, targets=truth, needs_hole=True)
    one, = list(pictures)
    assert one.name == "photo" and one.hole.sum() == 9
    assert one.truth[0, :, 0, 0].tolist() == [-1, -1, 1]
    folder = paint(tmp_path / "masks" / "photo.png", box=(0, 0, 2, 2))
    one, = list(UserPictures(photo, holes=str(tmp_path / "masks"), needs_hole=True))
    assert folder and one.hole.sum() == 4
    paint(tmp_path / "many" / "photo.png", colour="red")
    one, = list(UserPictures(str(tmp_path / "many"), holes=mask, needs_hole=True))
    assert one.hole.sum() == 9  # of a folder that holds one picture
    paint(tmp_path / "many" / "other.png", colour="red")
    with pytest.raises(UserError, match="no mask (photo|other)"):
        UserPictures(str(tmp_path / "many"), holes=mask, needs_hole=True)
    with pytest.raises(UserError, match="is the place of the pictures themselves"):
        UserPictures(photo, holes=photo, needs_hole=True)


@pytest.mark.parametrize("value", [1, 2, 127])
def test_a_mask_of_small_numbers_is_refused_with_its_largest(tmp_path, value):
    photo = paint(tmp_path / "a.png", colour="red")
    mask = paint(tmp_path / "m.png", box=(0, 0, 3, 3), value=value)
    with pytest.raises(UserError, match=f"nowhere white.* largest value is {value}.*0/1") as error:
        UserPictures(photo, holes=mask, needs_hole=True)
    assert len(str(error.value).splitlines()) == 1


def test_names_of_results_have_one_form():
    one, two = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert name_outputs([f"{two}.png"]) == [one]
    names = name_outputs([f"{one}.png", f"{two}.png", f"deep/{one}.png"])
    assert len({unicodedata.normalize("NFC", name) for name in names}) == 3


def test_a_name_with_an_accent_finds_its_mask_in_either_form(tmp_path):
    one, two = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    paint(tmp_path / "p" / f"{two}.png", colour="red")
    paint(tmp_path / "m" / f"{one}.png", box=(0, 0, 3, 3))
    pictures = UserPictures(str(tmp_path / "p"), holes=str(tmp_path / "m"), needs_hole=True)
    assert [p.name for p in pictures] == [one]


# --- long work says so first --------------------------------------------------------------


def test_passes_are_counted_before_the_work(monkeypatch):
    """By a network that counts, over pictures of any size, guided and not."""
    model = build("pixel", objective="denoise")
    model.meta.update(task="superres", size=16, classes=[])
    for height, width in ((16, 16), (5, 40), (33, 16), (64, 50)):
        seen = []
        net = lambda zt, t, y, m, cond: seen.append(len(zt)) or zt
        tiled = restore.Tiled(net, 16)
        H, W = restore.padded_size(model, height, width)
        tiled(torch.zeros(1, 3, H, W), torch.zeros(1))
        assert restore.count_tiles(model, height, width) == sum(seen)


def test_a_large_picture_tells_how_many_passes_and_how_long(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([
        "--size", "16", "--steps", "1", "--batch", "2", "--threads", "1", "--device", "cpu",
        "--amp", "off", "--sample-every", "1000", "--task", "superres", "--out", "sr", "--model",
        "tiny"
    ])
    paint(tmp_path / "big.png", size=(14, 10), colour="red")
    paint(tmp_path / "small.png", size=(4, 4), colour="red")
    capsys.readouterr()
    common = ["--ckpt", "sr", "--device", "cpu", "--amp", "off", "--steps", "2", "--batch", "4"]
    restore.main([*common, "--input", "big.png", "--out", "big"])
    out, err = capsys.readouterr()
    tiles = restore.count_tiles(
        SimpleNamespace(space=spaces.PixelSpace(3), net=None, meta=dict(size=16)), 40, 56)
    assert tiles > 12 and f"1 picture, {2 * tiles} passes of the network" in err
    assert "for all of them" in err and f"{2 * tiles} passes (" in out
    restore.main([*common, "--input", "small.png", "--out", "small"])
    assert "passes of the network" not in capsys.readouterr().err
