"""Laws of tasks: a condition says nothing about what it hides, known pixels survive,
measures equal brute force, tiles make one picture."""
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

import running.setup
import train
from conftest import status
from plumbing.console import UserError
from data import load_images
from plumbing.faces import draw_faces
from sample import DiffusionModel, sample
from schedules import SCHEDULES
from tasks import (TASKS, back_project, cut_hole, draw_holes, enlarge, fill_with_mean, edge_f,
                   fold_condition, mae, make_condition, max_f, paste_known, place_side_by_side,
                   psnr, read_hole, recover_small, shrink, sobel_edges)
from vit import ViT
from plumbing.images import seeded, to_float, to_uint8
from plumbing.writer import ImageWriter
import spaces
import restore

pytestmark = pytest.mark.usefixtures("narrow")

CONDITIONED = [name for name in TASKS if name != "generate"]


def pictures(n=3, side=16, channels=3, maps=0, seed=0):
    return torch.rand(n, channels + maps, side, side,
                      generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- conditions ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_task_makes_a_target_like_the_picture_and_the_condition_it_declares(name, channels):
    maps = int(bool(TASKS[name].exact))
    x = pictures(channels=channels, maps=maps)
    target, cond = make_condition(name, x, maps, g=torch.Generator().manual_seed(0))
    assert target.shape == (3, channels, 16, 16) and target.abs().max() <= 1
    if name == "generate":
        assert cond is None and torch.equal(target, x)
    else:
        assert cond.shape == (3, TASKS[name].channels(channels), 16, 16) and cond.abs().max() <= 1
        assert TASKS[name].scores
        assert all(
            math.isfinite(score(target, target, cond)) for score in TASKS[name].scores.values())


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_first_line_of_a_tasks_docstring_is_its_help(task):
    line = task.__doc__.splitlines()[0]
    assert 10 < len(line) < 60 and line[0].islower() and line[-1] != ".", (
        "10 to 60 characters that begin small, without a full stop: it is a part of a sentence")


@pytest.mark.parametrize("name", [name for name in CONDITIONED if name != "inpaint"])
def test_a_users_picture_is_shown_like_one_of_training(name):
    """`ask` and `make` give the same condition; inpainting draws its holes itself."""
    task = TASKS[name]
    maps = int(bool(task.exact))
    x = pictures(maps=maps)
    _, cond = make_condition(name, x, maps, g=torch.Generator().manual_seed(0))
    picture = x[:, :3] if task.zoom == 1 else shrink(x)
    assert torch.equal(task.ask(picture, None), cond)


def test_the_condition_of_inpainting_knows_nothing_of_the_hole():
    """Whatever is in the hole, the condition is bitwise the same: nothing can leak."""
    x, hole = pictures(), draw_holes(3, 16, 16, torch.Generator().manual_seed(1))
    other = torch.where(hole, 99.0, x)
    assert torch.equal(cut_hole(x, hole), cut_hole(other, hole))
    assert torch.equal(read_hole(cut_hole(x, hole)), hole)


def test_the_condition_of_super_resolution_is_a_function_of_the_small_picture():
    x = pictures()
    target, cond = make_condition("superres", x)
    assert torch.equal(target, x) and torch.equal(cond, enlarge(shrink(x)))


def test_a_restored_picture_shrinks_to_the_small_one_and_the_truth_is_left_alone():
    x = to_float(draw_faces(4, 32, 7).pixels)
    cond = make_condition("superres", x)[1]
    assert (recover_small(cond) - shrink(x)).abs().mean() < 0.01
    rough = (x + 0.3 * pictures(4, 32, 3)).clamp(-1, 1)
    before, after = ((shrink(u) - shrink(x)).abs().mean()
                     for u in (rough, back_project(rough, cond)))
    assert after < before / 4 and psnr(back_project(rough, cond), x) > psnr(rough, x)
    assert psnr(back_project(x, cond), x) > 40


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 3)])
def test_enlarging_is_pillows(size):
    """Bicubic with a = -.5, of float pictures, at the border, too."""
    x = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(1))
    picture = Image.fromarray(x[0, 0].numpy(), mode="F")
    pillow = np.asarray(picture.resize((4 * size[1], 4 * size[0]), Image.Resampling.BICUBIC))
    assert np.allclose(enlarge(x)[0, 0].numpy(), pillow.clip(-1, 1), atol=1e-5)


def test_shrinking_is_pillows_of_float_pictures():
    x = torch.rand(1, 1, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pillow = Image.fromarray(x[0, 0].numpy(), mode="F").resize((6, 4), Image.Resampling.BICUBIC)
    assert np.allclose(shrink(x)[0, 0].numpy(), np.asarray(pillow).clip(-1, 1), atol=1e-5)


def test_shrinking_is_pillows():
    face = draw_faces(1, 64, 3).pixels[0]
    pillow = Image.fromarray(face.permute(1, 2, 0).numpy())
    pillow = np.array(pillow.resize((16, 16), Image.Resampling.BICUBIC))
    ours = to_uint8(shrink(to_float(face[None])))[0].permute(1, 2, 0).numpy()
    # Pillow rounds and clips once more, between rows and columns.
    off = np.abs(pillow.astype(int) - ours.astype(int))
    assert off.max() <= 4 and off.mean() < 0.5


@given(st.integers(0, 2**40), st.integers(1, 4), st.sampled_from([8, 16, 33]))
def test_holes_are_of_a_sensible_size_and_a_function_of_the_generator(seed, n, side):
    draw = lambda: draw_holes(n, side, side + 3, torch.Generator().manual_seed(seed))
    hole = draw()
    assert hole.shape == (n, 1, side, side + 3) and hole.dtype == torch.bool
    assert torch.equal(hole, draw())
    share = hole.float().mean((1, 2, 3))
    assert (share > 0.01).all() and (share < 0.75).all()


def test_images_of_a_batch_have_holes_of_their_own():
    hole = draw_holes(20, 32, 32, torch.Generator().manual_seed(0))
    assert len({h.numpy().tobytes() for h in hole}) == 20


def test_known_pixels_are_kept_bit_for_bit():
    x = to_float(torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8))
    hole = draw_holes(3, 16, 16, torch.Generator().manual_seed(2))
    out = paste_known(pictures(seed=5), cut_hole(x, hole))
    known = ~hole.expand_as(x)
    assert torch.equal(out[known], x[known]) and not torch.equal(out, x)
    assert torch.equal(to_uint8(out)[known], to_uint8(x)[known])


def test_the_mean_fill_is_the_mean_of_what_is_known():
    x, hole = pictures(1), draw_holes(1, 16, 16, torch.Generator().manual_seed(2))
    filled, seen = fill_with_mean(cut_hole(x, hole)), ~hole[0, 0]
    for c in range(3):
        assert torch.allclose(filled[0, c][hole[0, 0]], x[0, c][seen].mean(), atol=1e-6)
    assert torch.equal(filled[~hole.expand_as(x)], x[~hole.expand_as(x)])


def test_the_gradient_of_a_flat_picture_is_nothing_and_of_a_step_an_edge():
    x = torch.full((1, 3, 8, 8), 0.3)
    assert (sobel_edges(x) == -1).all()
    x[..., 4:] = -0.6  # a step of .45 of the range, above a third
    assert (sobel_edges(x)[0, 0, :, 3:5] == 1).all() and (sobel_edges(x)[0, 0, :, :2] == -1).all()
    assert torch.equal(sobel_edges(x.transpose(2, 3)), sobel_edges(x).transpose(2, 3))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_folding_a_condition_loses_nothing_and_keeps_places(factor):
    cond = pictures(channels=4)
    folded = fold_condition(cond, factor)
    assert folded.shape == (3, 4 * factor**2, 16 // factor, 16 // factor)
    assert torch.equal(torch.pixel_shuffle(folded, factor), cond)
    touched = cond.clone()
    touched[:, :, 0, 0] += 1
    changed = (fold_condition(touched, factor) != folded).any(1)
    assert changed[:, 0, 0].all() and changed.sum() == 3
    assert fold_condition(None, factor) is None


# --- measures -----------------------------------------------------------------------------


def test_psnr_is_its_definition_in_eight_bits():
    a, b = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    byhand = np.mean([
        10 * np.log10(255**2 / np.mean((p.astype(float) - q)**2))
        for p, q in zip(a.numpy(),
                        b.numpy().astype(float))
    ])
    assert psnr(to_float(a), to_float(b)) == pytest.approx(byhand, rel=1e-6)


def test_psnr_in_a_hole_counts_the_hole_alone():
    x, hole = pictures(), draw_holes(3, 16, 16, torch.Generator().manual_seed(3))
    wrong_outside = torch.where(hole, x, x + 1)
    # The error is floored, not infinite.
    assert psnr(wrong_outside, x, hole) == pytest.approx(10 * math.log10(4e10))
    assert psnr(x + 0.2, x, hole) == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-4)


def test_the_mean_absolute_error_of_opposite_maps_is_one():
    assert mae(torch.ones(2, 1, 4, 4), -torch.ones(2, 1, 4, 4)) == 1
    assert mae(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)) == 0.5


def best_f(counts, beta2):
    """The best F. counts: of each threshold (hits among what is said, said, hits among what
    is true, true) of each image."""
    best = 0.0
    for images in counts:
        precision = np.mean([hit / max(1, said) for hit, said, _, _ in images])
        recall = np.mean([hit / max(1, true) for _, _, hit, true in images])
        best = max(best, (1 + beta2) * precision * recall / max(1e-12, beta2 * precision + recall))
    return best


def brute_force_f(guess, truth, beta2):
    """The protocol of saliency: every threshold, every image, every pixel."""
    level, true = to_uint8(guess)[:, 0].tolist(), (truth[:, 0] > 0).tolist()
    counts = []
    for threshold in range(1, 256):
        counts.append([])
        for picture, wanted in zip(level, true):
            pixels = [(a >= threshold, b) for row, line in zip(picture, wanted)
                      for a, b in zip(row, line)]
            hits = sum(a and b for a, b in pixels)
            counts[-1].append((hits, sum(a for a, _ in pixels), hits, sum(b for _, b in pixels)))
    return best_f(counts, beta2)


def brute_force_edge_f(guess, truth, tolerance):
    """Every threshold, every pixel, every neighbour; a pixel may be matched once at
    most."""
    level, true = to_uint8(guess)[:, 0].numpy(), (truth[:, 0] > 0).numpy()

    def near(mask, b, i, j):
        return mask[b,
                    max(0, i - tolerance):i + tolerance + 1,
                    max(0, j - tolerance):j + tolerance + 1].any()

    counts = []
    for threshold in range(1, 256):
        said = level >= threshold
        counts.append([])
        for b in range(len(level)):
            found = sum(near(true, b, i, j) for i, j in zip(*np.nonzero(said[b])))
            recalled = sum(near(said, b, i, j) for i, j in zip(*np.nonzero(true[b])))
            pairs = min(found, recalled)
            counts[-1].append((pairs, said[b].sum(), pairs, true[b].sum()))
    return best_f(counts, 1.0)


def random_maps(seed, images=3):
    """Maps and guesses of them, of images of which each has its own share of true
    pixels."""
    g = torch.Generator().manual_seed(seed)
    share = torch.tensor([0.05, 0.25, 0.6])[:images, None, None, None]
    truth = torch.where(torch.rand(images, 1, 7, 9, generator=g) < share, 1.0, -1.0)
    return (0.4 * truth + torch.randn(images, 1, 7, 9, generator=g) * 0.5).clamp(-1, 1), truth


@pytest.mark.parametrize("beta2", [0.3, 1.0])
def test_max_f_is_that_of_precision_and_recall_averaged_over_images(beta2):
    guess, truth = random_maps(0)
    assert max_f(guess, truth, beta2) == pytest.approx(brute_force_f(guess, truth, beta2), rel=1e-9)
    assert max_f(truth, truth, beta2) == pytest.approx(1) and max_f(-truth, truth) < 0.7


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_the_edge_score_equals_a_brute_force_loop(tolerance):
    guess, truth = random_maps(tolerance)
    expected = brute_force_edge_f(guess, truth, tolerance)
    assert edge_f(guess, truth, tolerance) == pytest.approx(expected, rel=1e-9)


def test_an_edge_may_lie_a_pixel_off_but_not_be_three_pixels_thick():
    truth = torch.full((2, 1, 12, 12), -1.0)
    truth[:, :, :, 5] = 1
    thick = truth.roll(1, 3).maximum(truth).maximum(truth.roll(-1, 3))
    assert edge_f(truth, truth) == pytest.approx(1)
    assert edge_f(truth.roll(1, 3), truth) == pytest.approx(1)
    assert edge_f(truth.roll(2, 3), truth) == 0
    assert edge_f(thick, truth) == pytest.approx(0.5)  # precision 1 / 3, recall 1


def test_the_edge_score_is_never_below_that_of_a_true_one_to_one_matching():
    """scipy finds the largest matching of every image at every threshold."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_bipartite_matching
    guess, truth = random_maps(5)
    counts = []
    for threshold in range(1, 256):
        counts.append([])
        for said, true in zip((to_uint8(guess)[:, 0] >= threshold), truth[:, 0] > 0):
            p, q = said.nonzero(), true.nonzero()
            close = ((p[:, None] - q[None]).abs().amax(2) <= 1).int().numpy()
            pairs = close.size and (maximum_bipartite_matching(csr_matrix(close)) >= 0).sum()
            counts[-1].append((pairs, len(p), pairs, len(q)))
    strict = best_f(counts, 1.0)
    assert strict <= edge_f(guess, truth) + 1e-9 and edge_f(guess, truth) < strict + 0.05


# --- training -----------------------------------------------------------------------------


def small(task="superres", channels=1, predict="unit", classes=0, awake=True):
    torch.manual_seed(0)
    schedule = SCHEDULES["ddm"]
    net = ViT(schedule,
              channels=channels,
              heads_out=schedule.head_count(predict),
              patch=4,
              width=32,
              depth=1,
              heads=1,
              classes=classes,
              cond_channels=TASKS[task].channels(channels))
    if awake:
        with torch.no_grad():
            for q in net.parameters():
                q.add_(0.1 * torch.randn_like(q))
    return DiffusionModel(
        net, schedule, spaces.PixelSpace(channels), predict,
        dict(size=8,
             task=task,
             classes=[f"class{i}" for i in range(classes)],
             channels=channels,
             step=0), torch.device("cpu"))


def test_a_new_condition_leaves_the_network_as_it_was():
    """The embedding of the condition starts at zero: fine-tuning to a task starts from
    exactly the unconditional model."""
    with_cond, without = small("superres"), small("generate")
    first = {k: v for k, v in without.net.state_dict().items()}
    net = small("superres", awake=False).net
    train.load_first_stage(net, running.setup.FirstStage(first, dict(classes=[])), [])
    x, t = pictures(2, 8, 1), torch.tensor([0.3, 0.9])
    assert torch.equal(net(x, t, cond=pictures(2, 8, 1, seed=1)), without.net(x, t))
    assert not torch.equal(with_cond.net(x, t, cond=pictures(2, 8, 1, seed=1)),
                           with_cond.net(x, t, cond=pictures(2, 8, 1, seed=2)))


def test_a_condition_of_another_task_starts_afresh():
    first, net = small("superres").net.state_dict(), small("inpaint", awake=False).net
    train.load_first_stage(net, running.setup.FirstStage(first, dict(classes=[])), [])
    assert (net.embed_cond.weight == 0).all() and torch.equal(net.embed.weight,
                                                              first["embed.weight"])


FLAGS = [
    "--data", "faces", "--model", "tiny", "--size", "8", "--steps", "2", "--batch", "2",
    "--sample-every", "2", "--patch", "4"
]


@pytest.fixture
def few_faces(monkeypatch):
    """The built-in faces, but 40 of them."""
    from data import load_images
    monkeypatch.setattr(
        running.setup, "load_images", lambda source, *args, **how: load_images(
            source, *args, **how | (dict(count=40) if source == "faces" else {})))


@pytest.mark.parametrize("task", CONDITIONED)
def test_a_task_trains_and_restores_pictures_of_other_sizes_from_the_command_line(
        task, few_faces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*FLAGS, "--task", task, "--mask", "0.5", "--out", "run"])
    faces = draw_faces(2, 24, 1)
    for folder in ("in", "truth"):
        (tmp_path / folder).mkdir()
    for i, size in enumerate([(13, 24), (24, 5)
                              ]):  # larger than the training's 8 in one way, smaller in another
        face = Image.fromarray(faces.pixels[i].permute(1, 2, 0).numpy()).resize(size)
        face.save(tmp_path / "in" / f"face{i}.png")
        face.resize((4 * size[0], 4 * size[1]) if task == "superres" else size).convert(
            "L" if TASKS[task].exact else "RGB").save(tmp_path / "truth" / f"face{i}.png")
    more = ["--holes", "random"] if task == "inpaint" else []
    restore.main([
        "--task", task, "--input", "in", "--targets", "truth", "--out", "out", "--steps", "2",
        "--trace", "way.png", *more
    ])
    said = capsys.readouterr().out
    assert "2 network calls each" in said and all(name in said for name in TASKS[task].scores)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "face0-compare.png", "face0.png", "face1-compare.png", "face1.png"
    ]
    for i in range(2):
        result, truth = (Image.open(tmp_path / folder / f"face{i}.png")
                         for folder in ("out", "truth"))
        assert result.size == truth.size and result.mode == truth.mode
        assert Image.open(tmp_path / "out" / f"face{i}-compare.png").size == (3 * truth.size[0],
                                                                              truth.size[1])
    assert Image.open(tmp_path / "way.png").size[0] > 100


def test_your_own_hole_is_a_transparent_part_or_a_mask_and_the_rest_survives(
        few_faces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*FLAGS, "--task", "inpaint", "--out", "run"])
    face = draw_faces(1, 24, 1).pixels[0].permute(1, 2, 0).numpy()
    hole = np.zeros((24, 24), bool)
    hole[4:15, 6:11] = True
    for folder in ("alpha", "plain", "holes"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.dstack([face, np.where(hole, 0, 255).astype(np.uint8)])).save("alpha/a.png")
    Image.fromarray(face).save("plain/a.png")
    Image.fromarray((hole * 255).astype(np.uint8)).save("holes/a.png")
    restore.main(["--input", "alpha", "--out", "one", "--steps", "2"])
    restore.main(["--input", "plain", "--holes", "holes", "--out", "two", "--steps", "2"])
    one, two = (np.array(Image.open(f"{folder}/a.png")) for folder in ("one", "two"))
    assert (one[~hole] == face[~hole]).all() and (two[~hole]
                                                  == face[~hole]).all() and (one[hole]
                                                                             != face[hole]).any()
    with pytest.raises(UserError, match="has no hole"):
        restore.main(["--input", "plain", "--out", "three"])
    (tmp_path / "holes" / "a.png").unlink()
    Image.fromarray((hole * 255).astype(np.uint8)).resize((20, 20)).save("holes/a.png")
    with pytest.raises(UserError, match="20 x 20"):
        restore.main(["--input", "plain", "--holes", "holes", "--out", "four"])


@pytest.mark.parametrize("calls", [1, 3])
def test_a_task_has_a_number_of_calls_of_its_own(calls, few_faces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TASKS["superres"], "calls", calls)
    train.main([*FLAGS, "--task", "superres", "--out", "run"])
    word = "call" + "s" * (calls > 1)
    assert f"held-out images, {calls} {word}\n" in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save("small.png")
    restore.main(["--input", "small.png"])
    assert f" {calls} network {word} each " in capsys.readouterr().out
    restore.main(["--input", "small.png", "--steps", "2"])
    assert " 2 network calls each " in capsys.readouterr().out


@pytest.mark.parametrize("arguments, why",
                         [(["--task", "edges", "--input", "x"], "was trained for"),
                          ([], "give the pictures"), (["--input", "nowhere"], "no such file"),
                          (["--holes", "random"], "goes with --input"),
                          (["--input", "x", "--out", "a.npz"], "npz"),
                          (["--input", "empty"], "holds no images"),
                          (["--trace", "way.jpg", "--input", "x"], "png"),
                          (["--input", "x", "--holes", "x"], "not to inpaint"),
                          (["--input", "x", "--targets", "empty"], "no target")])
def test_what_cannot_be_restored_is_refused_in_one_line(arguments, why, few_faces, tmp_path,
                                                        monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x").mkdir()
    Image.new("RGB", (8, 8)).save("x/a.png")
    train.main([*FLAGS[:6], "--steps", "1", *FLAGS[8:], "--task", "superres", "--out", "run"])
    with pytest.raises(UserError, match=why) as error:
        restore.main(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, why",
                         [(["--task", "saliency", "--data", "photos"], "needs --targets"),
                          (["--targets", "x"], "maps to predict"),
                          (["--task", "edges", "--targets", "x"], "of their own"),
                          (["--task", "superres", "--size", "18", "--patch", "3"], "multiple of 4"),
                          (["--latents", "x"], "--space latent"),
                          (["--no-cache-latents"], "--space latent")])
def test_tasks_that_cannot_be_trained_are_refused(flags, why):
    o = train.Options(**vars(train.options_parser(train.Options, "").parse_args(flags)))
    with pytest.raises(UserError, match=why):
        train.check(o)


def test_flips_and_cuts_reach_picture_and_map_alike(tmp_path):
    """Maps of --targets stay aligned with their pictures, cached or streamed, in whatever
    folder they lie."""
    faces = draw_faces(6, 16, 2)
    for i in range(6):
        folder = tmp_path / "images" / ("train" if i < 3 else "test")
        (tmp_path / "maps").mkdir(exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(faces.pixels[i].permute(1, 2, 0).numpy()).save(folder / f"f{i}.png")
        Image.fromarray(faces.saliency[i, 0].numpy()).save(tmp_path / "maps" / f"f{i}.gif")
    for cache in (1.0, 0.0):
        images = load_images(tmp_path / "images", 16, targets=tmp_path / "maps", cache_gb=cache)
        x, _ = images.take(range(6))
        assert images.maps == 1 and images.channels == 3 and x.shape == (6, 4, 16, 16)
        order = [3, 4, 5, 0, 1, 2]  # test before train
        assert torch.equal(x[:, :3], faces.pixels[order]) and torch.equal(
            x[:, 3:], faces.saliency[order])
    exact = load_images("faces", 16, count=6, seed=2, targets="saliency").take(range(6))[0]
    assert torch.equal(exact, torch.cat([faces.pixels, faces.saliency], 1))


def test_a_picture_without_a_map_is_named(tmp_path, capsys):
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
    for i in range(30):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"f{i:02d}.png")
        if i != 7:
            Image.new("L", (8, 8), 255).save(tmp_path / "maps" / f"f{i:02d}.png")
    assert len(load_images(tmp_path / "images", 8, targets=tmp_path / "maps")) == 29
    assert "f07.png (no target f07.* in" in capsys.readouterr().err
    (tmp_path / "maps" / "again").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "maps" / "again" / "f07.png")
    Image.new("L", (8, 8)).save(tmp_path / "maps" / "f07.gif")  # the path decides before the stem
    assert len(load_images(tmp_path / "images", 8, targets=tmp_path / "maps")) == 30
    with pytest.raises(UserError, match="of their own"):
        load_images("faces", 8, count=3, targets="maps")


# --- any size -----------------------------------------------------------------------------


@given(st.integers(8, 60))
def test_tiles_cover_every_place_and_overlap_by_half(length):
    starts = restore.tile_starts(length, 8)
    assert starts[0] == 0 and starts[-1] == length - 8 and all(0 <= b - a <= 4
                                                               for a, b in zip(starts, starts[1:]))


def test_tiles_of_a_pointwise_network_are_the_network():
    """Where a network looks at each place alone, tiling changes nothing."""
    net = lambda zt, t, y, m, cond: torch.cat([zt * t[:, None, None, None] + cond, zt**2], 1)
    zt, cond, t = pictures(2, 21, 2), pictures(2, 21, 2, seed=1), torch.tensor([0.2, 0.7])
    for batch in (1, 3, 64):
        assert torch.allclose(restore.Tiled(net, 8, batch)(zt, t, cond=cond),
                              net(zt, t, None, None, cond),
                              atol=1e-5)


def test_a_picture_of_the_training_size_is_not_tiled():
    model, cond = small("edges"), pictures(2, 8, 1)
    assert torch.equal(restore.restore_pictures(model, cond, steps=3), sample(model,
                                                                              2,
                                                                              3,
                                                                              cond=cond))


@pytest.mark.parametrize("size", [(8, 8), (5, 8), (3, 3), (20, 9), (8, 31)])
def test_any_size_is_restored_and_a_part_far_away_does_not_matter(size):
    model = small("inpaint")
    cond = cut_hole(
        pictures(1, 40, 1)[:, :, :size[0], :size[1]],
        draw_holes(1, 40, 40, seeded(1))[:, :, :size[0], :size[1]])
    out = restore.restore_pictures(model, cond, steps=2)
    assert out.shape == (1, 1, *size) and torch.isfinite(out).all()
    if size == (8, 31):
        touched = cond.clone()
        touched[..., :4] = 0.9
        again = restore.restore_pictures(model, touched, steps=1)
        assert torch.equal(again[..., 20:],
                           restore.restore_pictures(model, cond, steps=1)[..., 20:])


def test_the_condition_is_shown_at_every_call_and_doubled_for_guidance():
    model, seen = small("superres", classes=2), []
    model.net.register_forward_pre_hook(lambda module, args: seen.append(args[4]))
    cond = pictures(2, 8, 1)
    sample(model, 2, 3, cond=cond, labels=torch.tensor([0, 1]))
    assert len(seen) == 3 and all(torch.equal(c, cond) for c in seen)
    sample(model, 2, 1, cond=cond, labels=torch.tensor([0, 1]), cfg=2.0)
    assert torch.equal(seen[-1], torch.cat([cond, cond]))


def test_a_strip_lays_condition_result_and_truth_side_by_side():
    a, b = pictures(2, 4, 4), pictures(2, 4, 1, seed=1)
    rows = place_side_by_side(a, b)
    assert rows.shape == (4, 3, 4, 4) and torch.equal(rows[0], to_uint8(a[0, :3])) and torch.equal(
        rows[3],
        to_uint8(b[1]).expand(3, -1, -1))


# --- your own pictures --------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch, few_faces):
    """A folder to work in with three pictures in mine/ (20 x 14 pixels), and models of
    superres and inpaint in sr/ and ip/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for i, face in enumerate(draw_faces(3, 20, 1).pixels):
        Image.fromarray(face.permute(1, 2, 0).numpy()).crop((0, 0, 20, 14)).save(f"mine/f{i}.png")
    train.main([*FLAGS, "--task", "superres", "--out", "sr"])
    train.main([*FLAGS, "--task", "inpaint", "--out", "ip"])
    return tmp_path


def mask(path, size=(20, 14), box=(3, 3, 9, 8), mode="L", paint=255):
    picture = Image.new(mode, size, 0)
    if box:
        picture.paste(paint, box)
    path.parent.mkdir(exist_ok=True)
    picture.save(path)


def test_the_users_own_files_are_never_overwritten_and_an_older_result_survives_a_failure(own):
    for flags in (["--input", "mine", "--out",
                   "mine"], ["--input", "in.zip", "--out",
                             "in.zip"], ["--input", "mine", "--out", "a.png", "--trace", "a.png"]):
        with pytest.raises(UserError, match="would overwrite"):
            restore.main(["--ckpt", "sr", *flags])
    restore.main(["--ckpt", "sr", "--input", "mine", "--out", "good.zip", "--steps", "1"])
    before = (own / "good.zip").read_bytes()
    with pytest.raises(UserError), ImageWriter("good.zip") as writer:
        writer.add(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
        raise UserError("half way")
    assert (own / "good.zip").read_bytes() == before and not list(own.glob("*.part"))


@pytest.mark.parametrize("out", ["mine/results", "mine/a.png", "mine/deep/a.zip"])
def test_results_do_not_become_inputs_nor_a_trace_a_sample(own, out):
    with pytest.raises(UserError, match="lies in --input mine"):
        restore.main(["--ckpt", "sr", "--input", "mine", "--out", out, "--steps", "1"])
    with pytest.raises(UserError, match="--trace .* one of the samples"):
        restore.main(["--ckpt", "sr", "--input", "mine", "--out", "new", "--trace", "new/a.png"])


def test_a_broken_picture_is_named_and_skipped_and_names_never_collide(own, capsys):
    (own / "mine" / "broken.png").write_bytes((own / "mine" / "f0.png").read_bytes()[:100])
    Image.open("mine/f0.png").save("mine/f0.bmp")
    (own / "mine" / "deep").mkdir()
    Image.open("mine/f1.png").save("mine/deep/f1.png")
    restore.main(["--ckpt", "sr", "--input", "mine", "--out", "out", "--steps", "1"])
    said = capsys.readouterr()
    assert "skipped 1 of 6 pictures that could not be read: broken.png" in said.err
    assert "wrote 5 images" in said.out
    assert len(list((own / "out").iterdir())) == 10
    Image.open("mine/f0.png").save("mine/f2-compare.png")  # what stands beside f2 has this name
    restore.main(["--ckpt", "sr", "--input", "mine", "--out", "again", "--steps", "1"])
    assert "wrote 6 images" in capsys.readouterr().out and len(list(
        (own / "again").iterdir())) == 12


def test_masks_that_lie_below_the_pictures_are_no_pictures(own, capsys):
    (own / "mine" / "masks").mkdir()
    for i in range(3):
        mask(own / "mine" / "masks" / f"f{i}.png")
    restore.main([
        "--ckpt", "ip", "--input", "mine", "--holes", "mine/masks", "--out", "out", "--steps", "1"
    ])
    assert "wrote 3 images" in capsys.readouterr().out


def test_holes_and_targets_are_checked_before_anything_is_computed(own, monkeypatch):
    monkeypatch.setattr(restore, "restore_pictures", None)  # a network call would fail
    for i in range(2):
        mask(own / "holes" / f"f{i}.png")
    for why, flags in (("no mask f2", ["--holes", "holes"]), ("--holes nowhere: there is no such",
                                                              ["--holes", "nowhere"]),
                       ("no target f0", ["--holes", "random", "--targets", "empty"])):
        (own / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=why):
            restore.main(["--ckpt", "ip", "--input", "mine", "--out", "out", *flags])
    for box, why in ((None, "nowhere white"), ((0, 0, 20, 14), "white everywhere")):
        mask(own / "holes" / "f2.png", box=box)
        with pytest.raises(UserError, match=why):
            restore.main(["--ckpt", "ip", "--input", "mine", "--out", "out", "--holes", "holes"])
    assert not (own / "out").exists()


def test_a_mask_and_a_target_are_of_their_pictures_size(own, monkeypatch):
    """Also where all are cut to the model's square: of another size it lies elsewhere."""
    train.main([*FLAGS, "--objective", "reconstruct", "--decoder", "1", "--mask", "0.5", "--out",
                "rec"])
    monkeypatch.setattr(restore, "restore_pictures", None)  # a network call would fail
    monkeypatch.setattr(restore, "inpaint_hole", None)
    for size in ((40, 28), (28, 28), (20, 15)):
        for i in range(3):
            mask(own / "holes" / f"f{i}.png", size)
        for flags in (["--ckpt", "ip"], ["--ckpt", "rec", "--task", "inpaint"]):
            why = f"mask has {size[0]} x {size[1]} pixels, it should have 20 x 14"
            with pytest.raises(UserError, match=why):
                restore.main([*flags, "--input", "mine", "--holes", "holes", "--out", "a.png"])
    with pytest.raises(UserError, match="target has 20 x 15 pixels, it should have 20 x 14"):
        restore.main(["--ckpt", "ip", "--input", "mine", "--holes", "random", "--targets", "holes",
                      "--out", "a.png"])


@pytest.mark.parametrize("folder", ["mine", "holes"])
@pytest.mark.parametrize("flag", ["--out", "--trace"])
def test_no_result_becomes_a_picture_a_mask_or_a_target(own, flag, folder):
    for i in range(3):
        mask(own / "holes" / f"f{i}.png")
    given = ["--ckpt", "ip", "--input", "mine", "--holes", "holes", "--steps", "1"]
    with pytest.raises(UserError, match=f"{flag} .*lies in --.* {folder}"):
        restore.main([*given, flag, f"{folder}/new.png"])
    assert not (own / folder / "new.png").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_among_pictures_is_skipped_and_does_not_wait(own, capsys):
    os.mkfifo("mine/pipe.png")
    restore.main(["--ckpt", "sr", "--input", "mine", "--out", "out", "--steps", "1"])
    assert "skipped 1 of 4" in capsys.readouterr().err
    with pytest.raises(UserError, match="pipe"):
        restore.main(["--ckpt", "sr", "--input", "mine/pipe.png", "--out", "other"])


def test_a_mask_painted_white_on_nothing_is_what_is_white(own):
    for i in range(3):
        mask(own / "holes" / f"f{i}.png", mode="RGBA", paint=(255, 255, 255, 255))
    restore.main(
        ["--ckpt", "ip", "--input", "mine", "--holes", "holes", "--out", "out", "--steps", "1"])
    before, after = (np.array(Image.open(own / folder / "f0.png")).astype(int)
                     for folder in ("mine", "out"))
    same = (before == after).all(2)
    same[3:8, 3:9] = True
    assert same.all() and (before != after).any()


@pytest.mark.parametrize("size", [(3, 200), (500, 7), (5, 9)])
def test_a_picture_of_any_shape_gets_a_hole(size):
    holes = torch.cat([draw_holes(1, *size, seeded(i)) for i in range(40)])
    assert holes.flatten(1).any(1).all() and not holes.flatten(1).all(1).any()


def test_a_trace_and_a_sheet_of_small_and_long_pictures_fit(own):
    Image.new("RGB", (4, 3), "red").save("mine/a.png")  # smaller than a tile, and the first
    Image.new("RGB", (60, 3), "blue").save("mine/z.png")
    restore.main([
        "--ckpt", "sr", "--input", "mine", "--out", "new/sheet.png", "--trace", "new/way.png",
        "--steps", "2"
    ])
    assert Image.open("new/sheet.png").size[0] >= 2 * 240 and Image.open(
        "new/way.png").size[0] > 100


def test_guidance_of_a_task_needs_a_class(own):
    train.main([*FLAGS, "--task", "superres", "--labels", "--out", "lab"])
    with pytest.raises(UserError, match="give --label"):
        restore.main(["--ckpt", "lab", "--input", "mine", "--cfg", "3", "--out", "a.png"])
    images = []
    for cfg in ("1", "3"):
        restore.main([
            "--ckpt", "lab", "--input", "mine", "--cfg", cfg, "--label", "happy", "--out",
            f"cfg{cfg}", "--steps", "1"
        ])
        images.append(np.array(Image.open(f"cfg{cfg}/f0.png")))
    assert images[0].shape == images[1].shape


def test_a_model_of_reconstruction_takes_holes_by_name_and_refuses_what_it_does_not_read(
        own, capsys, monkeypatch):
    train.main(
        [*FLAGS, "--objective", "reconstruct", "--decoder", "1", "--mask", "0.5", "--out", "rec"])
    for i, box in enumerate(((0, 0, 10, 14), (10, 0, 20, 14), (0, 0, 20, 6))):
        mask(own / "holes" / f"f{i}.png", box=box)
    restore.main(["--task", "inpaint", "--input", "mine", "--holes", "holes", "--out", "a.png"])
    sheet = np.array(Image.open("a.png")).astype(int)
    restore.main(
        ["--task", "inpaint", "--input", "mine", "--holes", "holes", "--n", "1", "--out", "b.png"])
    assert sheet.shape[2] == 3 and Image.open("b.png").size[0] > 100
    restore.main([
        "--task", "reconstruct", "--input", "mine", "--ratio", "0.5", "--out", "c.png", "--seed",
        "-1"
    ])
    assert "PSNR" in capsys.readouterr().out
    for flags, why in ((["--solver", "heun"], "--solver: a reconstruction is one pass"),
                       (["--steps", "3"], "--steps"), (["--cfg",
                                                        "2"], "--cfg"), (["--out",
                                                                          "x.zip"], "one sheet"),
                       (["--task", "reconstruct", "--holes",
                         "holes"], "--task inpaint"), (["--task", "inpaint"], "has no hole"),
                       (["--task", "edges"], "was trained to reconstruct")):
        with pytest.raises(UserError, match=why):
            restore.main(["--ckpt", "rec", "--input", "mine", *flags])
    ckpt = torch.load("rec/last.pt", weights_only=True)
    del ckpt["meta"]["ratio"], ckpt["meta"]["recon_target"]             # as a hand may
    torch.save(ckpt, "bare.pt")
    with pytest.raises(UserError, match="--ratio: the checkpoint names none"):
        restore.main(["--ckpt", "bare.pt", "--input", "mine", "--out", "d.png"])
    restore.main(["--ckpt", "bare.pt", "--input", "mine", "--out", "d.png", "--ratio", "0.5"])
    (own / "file").write_text("")
    monkeypatch.setattr(restore, "reconstruct", None)                   # told before the work
    assert status(restore, ["--ckpt", "rec", "--input", "mine", "--out", "file/c.png"]) == 2


def test_maps_belong_to_their_pictures(tmp_path):
    for i in range(3):
        for folder, size in (("data", (8, 8)), ("data/masks", (8, 8)), ("long", (16, 8))):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, "white").save(tmp_path / folder / f"f{i}.png")
    # Maps below the data are no pictures.
    assert len(load_images(tmp_path / "data", 8, targets=tmp_path / "data" / "masks")) == 3
    with pytest.raises(UserError, match="place of the pictures"):
        load_images(tmp_path / "data", 8, targets=tmp_path / "data")
    with pytest.raises(UserError, match="8 x 8 pixels, but its target 16 x 8"):
        load_images(tmp_path / "data" / "masks", 8, targets=tmp_path / "long")
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "masks" / "f1.jpg")
    with pytest.raises(UserError, match="2 targets f1"):
        load_images(tmp_path / "long", 8, targets=tmp_path / "data" / "masks")


def test_stage_two_keeps_the_maps_of_its_task_and_data(tmp_path, monkeypatch, few_faces):
    monkeypatch.chdir(tmp_path)
    for i, face in enumerate(draw_faces(8, 8, 1).pixels):
        for folder, picture in (("data", Image.fromarray(face.permute(1, 2, 0).numpy())),
                                ("maps", Image.new("L", (8, 8), 100 * (i % 3)))):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"f{i}.png")
    import finetune
    flags = ["--size", "8", "--batch", "2", "--patch", "4", "--val", "0.2"]
    train.main([
        "--data", "data", "--targets", "maps", "--task", "saliency", "--steps", "1", *flags,
        "--out", "a"
    ])
    finetune.main(["--task", "saliency", "--data", "data", "--steps", "1", "--out", "b"])
    with pytest.raises(UserError, match="needs --targets"):
        finetune.main(["--data", "maps", "--steps", "1", "--out", "c"])
    finetune.main(["--data", "faces", "--steps", "1", "--out", "d"])
