"""What data.py promises, as sentences: bytes survive the way to floats and back, faces are
functions of (seed, i), a messy folder loses only its broken files, and every way to the
same images gives the same images."""
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image, ImageOps

import data
from data import holdout, load_images
from plumbing.console import UserError
from plumbing.faces import EXPRESSIONS, PARTS, STYLES, draw_chunk, draw_faces
from plumbing.images import grid, to_float, to_uint8
from plumbing.pictures import crop_square, to_8_bit


def noise(h, w, c=3, seed=0):
    """A random uint8 picture, (h, w, 3), or (h, w) for c = 1."""
    x = np.random.default_rng(seed).integers(0, 256, (h, w, c), np.uint8)
    return x if c > 1 else x[..., 0]


def save(path, seed=0, h=20, w=14, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(h, w, seed=seed)).save(path, **options)
    return path


def pack(folder, archive, top=""):
    """Write a folder into a zip, as macOS would: with shadow files beside the images."""
    with zipfile.ZipFile(archive, "w") as z:
        for path in folder.rglob("*"):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                z.write(path, top + name)
                z.writestr(f"__MACOSX/{top}{name}", b"shadow")
    return archive


def equal(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b))


@pytest.fixture
def classy(tmp_path):
    """Three classes of four pictures."""
    for k, name in enumerate(["ant", "bee", "cow"]):
        for i in range(4):
            save(tmp_path / "classy" / name / f"{i}.png", seed=10 * k + i)
    return tmp_path / "classy"


# --- numbers and pictures -----------------------------------------------------------------

def test_to_uint8_is_the_inverse_of_to_float_on_all_256_values():
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(u)), u)
    assert to_float(u).dtype == torch.float32 and to_float(u)[[0, 255]].tolist() == [-1, 1]


@given(st.floats(-3, 3))
def test_to_uint8_is_the_nearest_byte_clamped(v):
    error = to_float(to_uint8(torch.tensor(v))) - min(max(v, -1), 1)
    assert abs(error) <= 0.5 / 127.5 + 1e-6


def test_a_grid_holds_every_image_in_reading_order_enlarged_by_a_whole_number():
    x = torch.arange(7 * 3 * 4 * 5, dtype=torch.uint8).view(7, 3, 4, 5)
    for images in (x, x[:, :1]):
        picture = grid(images, pad=1)
        zoom = picture.width // (3 * 6 + 1)
        sheet = np.asarray(picture)
        assert zoom > 1 and 512 <= picture.width
        assert (sheet == np.kron(sheet[::zoom, ::zoom], np.ones((zoom, zoom, 1)))).all()
        for i in range(7):
            top, left = 1 + i // 3 * 5, 1 + i % 3 * 6
            cell = sheet[::zoom, ::zoom][top:top + 4, left:left + 5]
            assert (cell == images[i].permute(1, 2, 0).numpy()).all()
    with pytest.raises(UserError, match="grid"):
        grid(x[:0])


# --- one image ----------------------------------------------------------------------------

@pytest.mark.parametrize("h,w", [(20, 14), (13, 30), (9, 9)])
def test_an_image_is_its_largest_centred_square_resized_with_lanczos(h, w):
    picture = Image.fromarray(noise(h, w))
    side, (left, top) = min(h, w), ((w - min(h, w)) // 2, (h - min(h, w)) // 2)
    square = picture.crop((left, top, left + side, top + side))
    reference = square.resize((8, 8), Image.Resampling.LANCZOS)
    assert (crop_square(picture, 8) == np.asarray(reference).transpose(2, 0, 1)).all()
    assert crop_square(picture, 8, gray=True).shape == (1, 8, 8)


def test_a_turned_photograph_is_turned_upright(tmp_path):
    upright = Image.fromarray(noise(16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6                            # "rotate by 90 degrees clockwise to see it upright"
    upright.rotate(90).save(tmp_path / "a.png", exif=exif)
    x, _ = load_images(tmp_path, 16).take([0])
    assert (x[0].permute(1, 2, 0).numpy() == np.asarray(upright)).all()


# All the way from black to white.
ramp = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)


@pytest.mark.parametrize("picture", [
    Image.fromarray(ramp), Image.fromarray(ramp.astype(np.uint16) * 257),
    Image.fromarray(ramp.astype(np.int32) * 257),
    Image.fromarray(ramp / np.float32(255)), Image.fromarray(ramp.astype(np.float32)),
    Image.merge("RGB", [Image.fromarray(ramp)] * 3), Image.fromarray(ramp).convert("P"),
    Image.fromarray(ramp).convert("LA"),
    Image.merge("CMYK", [Image.new("L", (8, 8))] * 3 + [ImageOps.invert(Image.fromarray(ramp))]),
    Image.fromarray(ramp).convert("YCbCr"),
], ids=lambda picture: picture.mode)
def test_every_mode_shows_the_same_greys(picture):
    flat = to_8_bit(picture)
    assert flat.mode in ("L", "RGB")
    assert np.abs(np.asarray(flat.convert("L")).astype(int) - ramp).max() <= 1


def test_a_dark_16_bit_image_stays_dark():
    dark = to_8_bit(Image.fromarray(ramp.astype(np.uint16) * 64))
    assert np.asarray(dark).max() == round(255 * 64 / 257)


def test_a_bilevel_image_is_black_and_white():
    gray = to_8_bit(Image.fromarray(ramp > 99)).convert("L")
    assert np.asarray(gray).tolist() == ((ramp > 99) * 255).tolist()


def test_transparency_is_laid_over_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(to_8_bit(clear)).min() == 255
    assert np.unique(to_8_bit(half)).tolist() == [127]
    assert np.asarray(to_8_bit(Image.open(tmp_path / "p.png"))).min() == 255


# --- folders and archives -----------------------------------------------------------------

def test_a_messy_folder_loses_only_its_broken_files_and_names_them_in_one_line(tmp_path, capsys):
    fine = ["Großmutter und ich.JPG", "b/ünïcode 写真.png", "b/c/alpha.WebP", "deep.tiff", "g.gif",
            "sixteen.png", "z.bmp"]
    for i, name in enumerate(fine):
        save(tmp_path / name, seed=i)
    Image.fromarray(noise(9, 9, 1).astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    whole = (tmp_path / "Großmutter und ich.JPG").read_bytes()
    save(tmp_path / "cut.jpg", quality=95).write_bytes(whole[:300])
    (tmp_path / "text.png").write_text("I am a letter")
    (tmp_path / "zero.png").touch()
    (tmp_path / "notes.txt").write_text("not meant to be an image")
    save(tmp_path / ".thumbnails" / "a.png"), save(tmp_path / ".hidden.png")
    images = load_images(tmp_path, 8)
    said = capsys.readouterr().err
    assert len(images) == len(fine)
    assert images.skipped == ["cut.jpg", "text.png", "zero.png"]
    assert said.count("\n") == 1
    assert said.startswith("skipped 3 of 10 images that could not be used: cut.jpg (")
    assert "text.png (not an image)" in said and "0x" not in said
    x, y = images.take(range(len(images)))
    assert x.shape == (7, 3, 8, 8) and x.dtype == torch.uint8 and y.tolist() == [0] * 7
    assert images.classes == []
    for i, name in enumerate(sorted(fine)):         # each image stands at the place of its own name
        assert (x[i].numpy() == crop_square(Image.open(tmp_path / name), 8)).all()


@pytest.mark.parametrize("total,broken,survives",
                         [(20, 10, True), (20, 11, False), (1200, 12, True), (1200, 13, False),
                          (3, 3, False)])
def test_more_than_one_percent_and_more_than_ten_broken_files_are_too_many(tmp_path, total, broken,
                                                                           survives, capsys):
    picture = save(tmp_path / "in" / "a.png", h=4, w=4).read_bytes()
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as z:
        for i in range(total):
            z.writestr(f"{i}.png", b"no" if i < broken else picture)
    if survives:
        assert len(load_images(tmp_path / "in.zip", 4)) == total - broken
        assert capsys.readouterr().err.count("(not an image)") == 5    # the first few are named
    else:
        with pytest.raises(UserError, match=f"{broken} of {total}"):
            load_images(tmp_path / "in.zip", 4)


@pytest.mark.parametrize("cache_gb", [1, 0])
@pytest.mark.parametrize("side", [12, 18])                # 144 pixels: Pillow warns; 324: it raises
def test_a_decompression_bomb_is_a_broken_file(tmp_path, monkeypatch, recwarn, side, cache_gb):
    save(tmp_path / "a.png", h=10, w=10), save(tmp_path / "bomb.png", h=side, w=side)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_images(tmp_path, 8, cache_gb=cache_gb).skipped == ["bomb.png"] and not recwarn.list


def test_classes_are_the_first_level_folders_in_order_of_their_names(classy):
    save(classy / "bee" / "nested" / "deep" / "x.png")
    images = load_images(classy, 8, labels=True)
    assert images.classes == ["ant", "bee", "cow"]
    assert images.take(range(13))[1].tolist() == [0] * 4 + [1] * 5 + [2] * 4
    save(classy / "stray.png")
    with pytest.raises(UserError, match="stray.png"):
        load_images(classy, 8, labels=True)


@pytest.mark.parametrize("top", ["", "wrapped in/"])
@pytest.mark.parametrize("cache_gb", [1, 0])
def test_a_zip_is_the_folder_it_was_packed_from(classy, tmp_path, top, cache_gb):
    folder = load_images(classy, 8, labels=True)
    packed = load_images(pack(classy, tmp_path / "c.zip", top), 8, labels=True, cache_gb=cache_gb)
    assert packed.classes == folder.classes and packed.skipped == [] and len(folder) == 12
    assert equal(packed.take(range(12)), folder.take(range(12)))


@pytest.mark.parametrize("make",
                         [lambda p: p / "absent", lambda p: p / "empty", lambda p: p / "a.txt",
                          lambda p: p / "bad.zip",
                                  lambda p: p / "bad.tar.gz"])
def test_a_wrong_source_is_named_in_one_line(tmp_path, make):
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "bad.zip", "bad.tar.gz"):
        (tmp_path / name).write_text("nothing")
    with pytest.raises(UserError) as caught:
        load_images(make(tmp_path), 8)
    assert str(make(tmp_path)) in str(caught.value) and "\n" not in str(caught.value)


# --- CIFAR-10 -----------------------------------------------------------------------------

def cifar(path, protocol=2, poison=None):
    """An archive of two images a batch; image i of batch b has the class (b + i) % 3."""
    # The sixth is the test batch.
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), np.uint8)
    contents = {f"data_batch_{b + 1}": {b"data": pixels[b], b"labels": [b % 3, (b + 1) % 3]}
                for b in range(5)}
    contents |= {"test_batch": {b"data": pixels[5], b"labels": [0, 0]},
                 "batches.meta": {b"label_names": [b"ant", b"bee", b"cow"]}}
    if poison:
        contents["data_batch_2"] = poison
    with tarfile.open(path, "w:gz") as archive:
        for name, value in contents.items():
            blob = pickle.dumps(value, protocol)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(blob)
            archive.addfile(member, io.BytesIO(blob))
    return torch.from_numpy(pixels[:5]).view(10, 3, 32, 32)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("cache_gb", [1, 0])
def test_cifar_is_its_five_training_batches_with_their_class_names(tmp_path, protocol, cache_gb):
    pixels = cifar(tmp_path / "cifar-10-python.tar.gz", protocol)
    images = load_images(tmp_path / "cifar-10-python.tar.gz", 32, labels=True, cache_gb=cache_gb)
    assert images.classes == ["ant", "bee", "cow"]
    assert equal(images.take(range(10)), (pixels, torch.tensor([0, 1, 1, 2, 2, 0, 0, 1, 1, 2])))


class Poison:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_calls_a_function_is_refused_and_does_not_call_it(tmp_path):
    path, target = tmp_path / "cifar-10-python.tar.gz", tmp_path / "made by a stranger"
    cifar(path, poison={b"data": Poison(target), b"labels": [0, 0]})
    with pytest.raises(UserError, match="mkdir"):
        load_images(path, 32)
    assert not target.exists()


# --- a data set ---------------------------------------------------------------------------

@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_images_are_the_cached_ones(classy, tmp_path, gray, workers):
    cached = load_images(classy, 8, gray, labels=True)
    streamed = load_images(pack(classy, tmp_path / "c.zip"), 8, gray, labels=True, cache_gb=0)
    assert cached.pixels is not None and streamed.pixels is None
    state = torch.random.get_rng_state()
    order = [torch.tensor([3, 11, 3]), [0], torch.arange(12)]
    got = list(streamed.subset(range(11, -1, -1)).batches(order, workers))
    assert len(got) == 3 and all(map(equal, got, cached.subset(range(11, -1, -1)).batches(order)))
    assert torch.equal(got[0][1], torch.tensor([2, 0, 2]))
    assert got[2][0].shape == (12, 1 if gray else 3, 8, 8)
    assert torch.equal(torch.random.get_rng_state(), state)   # no draw from the global random state


def test_every_process_opens_a_zip_for_itself(classy, tmp_path, monkeypatch):
    """Two processes that share a handle share its position."""
    images = load_images(pack(classy, tmp_path / "c.zip"), 8, cache_gb=0)
    x, ours = images.take([0])[0], images.source.archive
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert torch.equal(images.take([0])[0], x) and images.source.archive is not ours


def test_a_file_that_breaks_later_gives_way_to_the_next_and_is_named_once(classy, capsys):
    images = load_images(classy, 8, labels=True, cache_gb=0).subset([3, 4, 5])
    expected = images.take([1, 1, 2])
    (classy / "ant" / "3.png").write_bytes(b"broken meanwhile")
    # The label comes along.
    assert equal(images.take([0, 1, 2]), expected) and images.take([0])[1].tolist() == [1]
    assert capsys.readouterr().err.count("ant/3.png") == 1
    for path in classy.rglob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="not one"):
        images.take([0])


def test_a_subset_is_those_images_in_that_order(classy):
    images = load_images(classy, 8, labels=True)
    part = images.subset([8, 2, 5]).subset([2, 0])
    assert len(part) == 2 and equal(part.take([0, 1]), images.take([5, 8]))
    assert part.classes == images.classes


@pytest.mark.parametrize("val,held", [(0.25, 3), ("0.25", 3), (1e-9, 1), (0.999, 11)])
def test_a_fraction_holds_out_other_images_than_it_leaves_and_always_the_same(classy, val, held):
    images = load_images(classy, 8)
    train, out = holdout(images, val)
    rows = sorted(train.rows.tolist() + out.rows.tolist())
    assert len(out) == held and rows == list(range(12))
    assert torch.equal(holdout(images, val)[1].rows, out.rows)
    if held == 3:
        assert not torch.equal(holdout(images, val, seed=1)[1].rows, out.rows)


def test_at_most_1024_images_are_held_out():
    images = data.Images(1, 3, torch.zeros(9000, dtype=torch.int64),
                         pixels=torch.zeros(9000, 3, 1, 1, dtype=torch.uint8))
    assert len(holdout(images, 0.5)[1]) == 1024


def test_a_path_holds_out_its_own_images_at_the_same_size_and_classes(classy, tmp_path):
    images = load_images(classy, 8, gray=True, labels=True)
    held = shutil.copytree(classy, tmp_path / "held")
    train, out = holdout(images, str(held), cache_gb=0)
    assert train is images and out.pixels is None
    assert equal(out.take(range(12)), images.take(range(12)))
    save(tmp_path / "other" / "dog" / "a.png")
    for val in (tmp_path / "other", tmp_path / "absent", 0, 1.5, "nan"):
        with pytest.raises(UserError):
            holdout(images, val)
    with pytest.raises(UserError, match="one image"):
        holdout(images.subset([0]), 0.5)
    faces = load_images("faces", 16, count=4)
    assert not torch.equal(holdout(faces, "faces", count=4)[1].pixels, faces.pixels)


# --- faces --------------------------------------------------------------------------------

def test_face_i_depends_on_the_seed_and_i_alone():
    many, few, other = draw_faces(70, 32), draw_faces(3, 32), draw_faces(3, 32, seed=1)
    for a, b in zip(many[:4], few[:4]):
        assert torch.equal(a[:3], b)
    assert all(torch.equal(many.attributes[name][:3], few.attributes[name])
               for name in few.attributes)
    assert not torch.equal(few.pixels, other.pixels)
    assert len({bytes(face.numpy().tobytes()) for face in many.pixels}) == 70         # no two alike


@given(st.integers(8, 96), st.integers(0, 1000))
def test_faces_come_in_every_size_with_their_labels_outlines_and_silhouettes(size, seed):
    faces = draw_faces(2, size, seed)
    assert faces.pixels.shape == (2, 3, size, size) and faces.pixels.dtype == torch.uint8
    assert torch.equal(faces.labels, faces.attributes["expression"])
    assert faces.labels.dtype == torch.int64
    for mask in (faces.edges, faces.saliency):
        assert mask.shape == (2, 1, size, size) and set(mask.unique().tolist()) == {0, 255}
    person = faces.saliency == 255                # where it ends there is an outline, on every side
    assert (faces.edges[..., :-1][person[..., :-1] != person[..., 1:]] == 255).all()
    assert (faces.edges[..., :-1, :][person[..., :-1, :] != person[..., 1:, :]] == 255).all()
    share = person.float().mean((1, 2, 3))
    assert (share > 0.25).all() and (share < 0.9).all()


def test_the_silhouette_is_everything_but_the_background():
    _, part, _ = draw_chunk(np.random.default_rng(0).random((40, 40), np.float32), 32)
    background = np.isin(part, [PARTS.index("backdrop"), PARTS.index("wall")])
    assert torch.equal(draw_faces(40, 32).saliency[:, 0] == 0, torch.from_numpy(background))
    assert (part == PARTS.index("tresses")).any()                   # long hair counts as the person


def test_faces_show_every_expression_style_and_accessory():
    faces = draw_faces(400, 16)
    assert faces.labels.unique().tolist() == list(range(len(EXPRESSIONS)))
    for name, value in faces.attributes.items():
        assert value.shape == (400,) and value.dtype == torch.int64, name
        assert len(value.unique()) >= 2, name
    assert faces.attributes["hair"].unique().tolist() == list(range(len(STYLES)))


def test_an_expression_is_a_matter_of_the_face_alone():
    """The same numbers with another mood leave background, shirt and hair as they were."""
    table = np.full((len(EXPRESSIONS), 40), 0.5, np.float32)
    table[:, 0] = (np.arange(len(EXPRESSIONS)) + 0.5) / len(EXPRESSIONS)
    pixels, part, traits = draw_chunk(table, 64)
    assert traits["expression"].tolist() == list(range(len(EXPRESSIONS)))
    assert (pixels[:, :, 60] == pixels[:1, :, 60]).all()
    assert (pixels[:, :, :6] == pixels[:1, :, :6]).all()
    for a in range(len(EXPRESSIONS)):
        for b in range(a):
            # A difference one can see.
            assert (np.abs(pixels[a].astype(int) - pixels[b]).max(0) > 40).sum() > 30
    teeth = (part == PARTS.index("teeth")).sum((1, 2))
    assert (teeth > 0).tolist() == [name in ("happy", "angry") for name in EXPRESSIONS]


def test_the_faces_are_a_data_set_like_any_other():
    drawn = draw_faces(6, 16, seed=3)
    images = load_images("faces", 16, labels=True, seed=3, count=6)
    assert images.classes == EXPRESSIONS and equal(images.take(range(6)), drawn[:2])
    plain = load_images("faces", 16, gray=True, seed=3, count=6)
    x, y = plain.take(range(6))
    reference = [np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).convert("L"))
                 for p in drawn.pixels]
    assert plain.classes == [] and not y.any()
    assert np.abs(x[:, 0].numpy().astype(int) - np.stack(reference)).max() <= 1
    assert len(load_images("faces", 8)) == 8192
    for bad in (dict(count=0, size=16), dict(count=2, size=4), dict(size=0)):
        with pytest.raises(UserError):
            load_images("faces", **bad)


def test_the_command_draws_a_picture_and_refuses_what_it_does_not_know(tmp_path):
    run = lambda *flags: subprocess.run([sys.executable, data.__file__, *flags], cwd=tmp_path,
                                        capture_output=True, text=True)
    assert run("--size", "32").returncode == 0 and Image.open(tmp_path / "faces.png").width >= 400
    failed = run("--size", "32", "--out", "absent/faces.png")
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert run("--siz", "32").returncode == 2
