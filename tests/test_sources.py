"""Pictures as people have them: names of any system, links, damage beside the pixels, maps
of 0 and 1, classes that are numbers, little memory. Each law was a fault before."""
import io
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import data
import fid
import vae
from conftest import ROOT, status
from data import Images, holdout, load_images
from plumbing.console import UserError, safe_screens
from plumbing.sources import open_images

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def picture(seed=0, side=8, mode="RGB"):
    x = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(x).convert(mode)


def save(path, seed=0, side=8, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, side).save(path, **options)
    return path


def png(seed=0):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


# --- names --------------------------------------------------------------------------------


def test_names_are_the_same_however_their_accents_are_written(tmp_path):
    from plumbing.names import normal_name
    assert NFC != NFD and normal_name(NFD) == normal_name(NFC) == NFC
    assert normal_name("\udcff") == "\udcff"
    for form in (NFC, NFD):
        save(tmp_path / form / form / "0.png")
        save(tmp_path / form / "ant" / "0.png")
        assert load_images(tmp_path / form, 8, labels=True).classes == ["ant", NFC]


def test_a_map_is_found_whose_accent_is_written_in_another_way(tmp_path):
    save(tmp_path / "pictures" / f"{NFC}.png")
    save(tmp_path / "masks" / "deep" / f"{NFD}.png")
    x, _ = load_images(tmp_path / "pictures", 8, targets=tmp_path / "masks").take([0])
    assert x.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("change", [
    lambda name: f"./{name}", lambda name: name.replace("/", "\\"), lambda name: f"/home/me/{name}",
    lambda name: f"../{name}", lambda name: f"a/b/{name}", lambda name: f"C:\\me\\{name}"
],
                         ids=["dot", "backslash", "absolute", "up", "wrapped twice", "drive"])
def test_a_zip_has_the_same_classes_however_its_names_are_written(tmp_path, change):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for k, name in enumerate(("ant/0.png", "bee/0.png", "cow/0.png")):
            archive.writestr(change(name), png(k))
        for shadow in ("__MACOSX/._0.png", "cow/.hidden/0.png", "cow/@eaDir/0.png"):
            archive.writestr(change(shadow), png(9))
    images = load_images(tmp_path / "z.zip", 8, labels=True)
    assert images.classes == ["ant", "bee", "cow"] and len(images) == 3
    expected = np.asarray(picture(2)).transpose(2, 0, 1)
    assert (images.take([2])[0][0].numpy() == expected).all()


def test_folders_that_wrap_all_others_are_seen_through_as_in_a_zip(tmp_path):
    for name in ("ant", "bee"):
        save(tmp_path / "data" / "photos" / "photos" / name / "0.png")
    images = load_images(tmp_path / "data", 8, labels=True, cache_gb=0)
    assert images.classes == ["ant", "bee"] and images.take([1])[0].shape == (1, 3, 8, 8)
    save(tmp_path / "one" / "ant" / "0.png")  # a class is no wrapping
    assert load_images(tmp_path / "one", 8, labels=True).classes == ["ant"]


def test_maps_below_wrapped_pictures_are_no_pictures(tmp_path):
    save(tmp_path / "data" / "set" / "images" / "0.png")
    save(tmp_path / "data" / "set" / "masks" / "0.png")
    images = load_images(tmp_path / "data", 8, targets=tmp_path / "data" / "set" / "masks")
    assert images.source.names == ["images/0.png"]


def test_names_that_are_no_unicode_are_read_counted_and_kept(tmp_path, capsys):
    import spaces
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder + b"/b\xfce")
    os.makedirs(folder + b"/ant")
    for name in (b"/b\xfce/\xe9.png", b"/ant/0.png", b"/b\xfce/broken\xe9.png"):
        with open(folder + name, "wb") as file:
            file.write(png() if b"broken" not in name else b"")
    with safe_screens():  # as every command has them
        images = load_images(os.fsdecode(folder), 8, labels=True, cache_gb=0)
    assert "broken\\udce9.png" in capsys.readouterr().err
    assert len(images) == 2 and images.classes == ["ant", "b\udcfce"]
    assert len(spaces.cache_key(images, vae.LatentSpace(vae.AutoencoderKL([8, 8], 1, 4)), 0)) == 16
    torch.save(images.classes, tmp_path / "classes.pt")
    assert torch.load(tmp_path / "classes.pt", weights_only=True) == images.classes


def test_links_to_folders_are_followed_once_and_circles_are_told(tmp_path, capsys):
    save(tmp_path / "store" / "0.png", 1), save(tmp_path / "data" / "ant" / "0.png", 2)
    (tmp_path / "data" / "bee").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "ant" / "round").symlink_to(tmp_path / "data")
    (tmp_path / "store" / "up").symlink_to(tmp_path)
    images = load_images(tmp_path / "data", 8, labels=True)
    said = capsys.readouterr().err
    assert images.source.names == ["ant/0.png", "bee/0.png"] and images.classes == ["ant", "bee"]
    assert said.count("\n") == 1 and "1 link(s)" in said and "ant/round" in said


def test_a_folder_that_cannot_be_read_does_not_vanish(tmp_path, monkeypatch):
    for name in "ab":
        save(tmp_path / name / "1.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="b: cannot be read .Permission denied"):
        load_images(tmp_path, 8, labels=True)


def test_held_out_images_never_lie_among_those_to_train_on(tmp_path):
    for i in range(4):
        save(tmp_path / "data" / "some" / f"{i}.png", i)
        save(tmp_path / "other" / f"{i}.png", i)
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    images = load_images(tmp_path / "data", 8)
    for place in ("data", "data/some", "linked"):
        with pytest.raises(UserError, match="--val .*lies in --data"):
            holdout(images, tmp_path / place)
    assert len(holdout(images, tmp_path / "other")[1]) == 4


def test_a_folder_that_cannot_be_written_is_read(tmp_path):
    save(tmp_path / "data" / "0.png")
    (tmp_path / "data").chmod(0o555)
    assert len(load_images(tmp_path / "data", 8)) == 1


# --- endings and formats ------------------------------------------------------------------


def test_every_ending_that_pillow_opens_is_a_picture_and_the_others_are_counted(tmp_path, capsys):
    used = {
        ".jfif": "JPEG", ".jpe": "JPEG", ".pgm": "PPM", ".ppm": "PPM", ".tga": "TGA",
        ".JP2": "JPEG2000", ".avif": "AVIF"
    }
    Image.init()
    used = {ending: kind for ending, kind in used.items() if kind in Image.SAVE}
    for ending, kind in used.items():
        picture(side=16).save(tmp_path / f"x{ending}", kind)
    for name in ("y.heic", "z.heic", "raw.CR2", "labels.txt", "meta.json", ".hidden.heic"):
        (tmp_path / name).write_text("?")
    save(tmp_path / "@eaDir" / "thumb.jpg")
    assert len(load_images(tmp_path, 8)) == len(used) >= 5
    assert capsys.readouterr().err.splitlines() == [
        f"note: {tmp_path}: 3 files with another ending are not used (.heic 2, .cr2 1)"
    ]


def test_no_images_among_other_files_says_what_there_is(tmp_path):
    (tmp_path / "a.heic").write_text("?")
    with pytest.raises(UserError, match=r"holds no images.*\.heic 1"):
        load_images(tmp_path, 8)


EPS = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
newpath 0 0 8 8 rectfill
%%EOF
"""


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_no_other_program_is_started_for_an_eps_that_is_named_as_a_picture(
        tmp_path, monkeypatch, name):
    """A `gs` on the path would leave a file behind."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    save(tmp_path / "data" / "b.png")
    (tmp_path / "data" / name).write_text(EPS)
    assert load_images(tmp_path / "data", 8).skipped == [name]
    assert not (tmp_path / "started").exists()


def test_pictures_are_opened_in_one_place_only():
    """Everything else would have to know which formats are safe."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        if "tests" not in path.parts and path.name != "pictures.py":
            assert not re.search(r"Image\.open\(", path.read_text()), path


# --- damage beside the pixels -------------------------------------------------------------


@pytest.mark.parametrize("exif", [
    b"Exif\0\0garbage of some length", b"Exif\0\0MM\0*\0\0\0\x08\0\xff",
    b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\xff\xff\xff\x7f"
])
@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_a_picture_whose_exif_cannot_be_read_is_used_as_it_lies(tmp_path, exif, ending):
    plain = np.asarray(Image.open(save(tmp_path / "plain" / f"a{ending}")))
    save(tmp_path / "data" / f"a{ending}", exif=exif)
    x, _ = load_images(tmp_path / "data", 8).take([0])
    assert (x[0].numpy() == plain.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_each_way_to_lie_is_turned_as_pillow_does(tmp_path, turn):
    from plumbing.pictures import crop_square, turn_upright, upright_size
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x0112] = turn
    picture(3, 8).crop((0, 0, 8, 5)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as lying:
        upright = ImageOps.exif_transpose(lying)
        assert upright_size(lying) == upright.size
        turned = turn_upright(lying)
    assert (np.asarray(turned) == np.asarray(upright)).all()
    assert (np.asarray(turn_upright(turned)) == np.asarray(upright)).all()  # once is enough
    assert (crop_square(turned, 5) == crop_square(upright, 5)).all()


def test_the_long_texts_of_image_generators_are_no_damage(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 2_000_000, zip=True)
    save(tmp_path / "a.png", pnginfo=texts)
    assert load_images(tmp_path, 8).skipped == []


@pytest.mark.parametrize("kind", ["text", "exif"])
def test_a_users_picture_with_damage_beside_its_pixels_is_read(tmp_path, kind):
    from plumbing.inputs import UserPictures
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 2_000_000, zip=True)
    damage = dict(pnginfo=texts) if kind == "text" else dict(exif=b"Exif\0\0garbage of some length")
    save(tmp_path / "a.png", **damage), save(tmp_path / "b.png")
    assert [each.name for each in UserPictures(tmp_path)] == ["a", "b"]


# --- values of any range ------------------------------------------------------------------


def as_8_bit(values):
    from plumbing.pictures import to_8_bit
    return np.asarray(to_8_bit(Image.fromarray(values)))


@pytest.mark.parametrize("stray", [np.inf, 1.5, 40.0])
def test_a_float_picture_keeps_its_greys_when_some_values_leave_the_range(stray):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    expected = as_8_bit(values)
    values[0, :3] = stray, -np.inf if stray == np.inf else -stray, np.nan
    result = as_8_bit(values)
    assert (result[1:] == expected[1:]).all() and result[0, :3].tolist() == [255, 0, 0]


def test_a_float_picture_of_bytes_stays_one_of_bytes():
    values = np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8)
    assert (as_8_bit(values) == values.round()).all()
    values[0, 0] = np.inf
    assert (as_8_bit(values)[1:] == values[1:].round()).all()
    assert as_8_bit(np.full((4, 4), -np.inf, np.float32)).max() == 0


def test_a_large_picture_of_16_bits_needs_little_more_than_itself(tmp_path):
    """In a process of its own: 40 million pixels have 80 MB, as float64 320 MB, twice."""
    code = f"""
import resource, numpy as np
from PIL import Image
from plumbing.pictures import crop_square
picture = Image.fromarray(np.full((5000, 8000), 257, np.uint16))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert (crop_square(picture, 8) == 1).all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400


def test_a_large_photograph_is_decoded_smaller_and_looks_the_same(tmp_path, monkeypatch):
    from plumbing import pictures
    smooth = picture(1, 6).resize((768, 512), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    sizes, load = [], Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop",
                        lambda self, box: sizes.append(self.size) or load(self, box))
    with Image.open(tmp_path / "a.jpg") as whole:
        exact = pictures.crop_square(whole, 16)
    monkeypatch.setattr(pictures, "LARGE", 10_000)
    with Image.open(tmp_path / "a.jpg") as large:
        fast = pictures.crop_square(large, 16)
    assert sizes == [(768, 512), (96, 64)]
    assert np.abs(fast.astype(int) - exact).max() <= 6


@pytest.mark.parametrize("cache_gb", [1, 0])
def test_little_memory_is_one_line_and_no_broken_picture(tmp_path, monkeypatch, cache_gb):
    save(tmp_path / "a.png")
    images = load_images(tmp_path, 8, cache_gb=0)
    monkeypatch.setattr(data, "read_picture", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(UserError, match="a.png.*memory"):
        load_images(tmp_path, 8, cache_gb=1) if cache_gb else images.take([0])


# --- maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_gb", [1, 0])
@pytest.mark.parametrize("largest", [0, 1, 21, 128])
@pytest.mark.parametrize("kind", ["L", "P", "I;16"])
def test_maps_that_all_look_black_are_refused_by_their_largest_value(tmp_path, kind, largest,
                                                               cache_gb):
    for k in range(3):
        save(tmp_path / "pictures" / f"{k}.png", k)
        values = np.zeros((8, 8), np.uint16 if kind == "I;16" else np.uint8)
        values[2:4] = largest * (257 if kind == "I;16" and largest == 128 else 1)
        values *= k == 1  # the others are black, and may be
        mask = Image.fromarray(values)
        if kind == "P":
            mask = Image.fromarray(values, "L").convert("P")
            mask.putpalette([v for i in range(256) for v in (i, i, i)])
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / f"{k}.png")
    args = tmp_path / "pictures", 8
    options = dict(targets=tmp_path / "masks", cache_gb=cache_gb)
    if largest == 128:
        assert len(load_images(*args, **options)) == 3
    else:
        with pytest.raises(UserError, match=f"--targets .*largest value is {largest}, .*0/1"):
            load_images(*args, **options)


def test_what_is_wrong_with_single_maps_is_said_before_what_is_wrong_with_all(tmp_path):
    save(tmp_path / "pictures" / "a.png"), save(tmp_path / "masks" / "b.png")
    with pytest.raises(UserError, match="no target a"):
        load_images(tmp_path / "pictures", 8, targets=tmp_path / "masks")


# --- classes ------------------------------------------------------------------------------


def test_classes_that_are_numbers_are_ordered_as_numbers(tmp_path):
    for name in ("10", "9", "007"):
        save(tmp_path / "n" / name / "0.png")
        save(tmp_path / "m" / name / "0.png")
    save(tmp_path / "m" / "ant" / "0.png")
    assert load_images(tmp_path / "n", 8, labels=True).classes == ["007", "9", "10"]
    assert load_images(tmp_path / "m", 8, labels=True).classes == ["007", "10", "9", "ant"]


def split_root(path, packed=False, top=""):
    """A root with train/ (4 images of ant and bee) and val/ (2). -> the folder or .zip"""
    for k, name in enumerate(("train/ant/0", "train/ant/1", "train/bee/0", "train/bee/1",
                              "val/ant/0", "val/bee/0")):
        save(path / top / f"{name}.png", seed=k)
    (path / top / "LICENSE.txt").write_text("no picture")
    if not packed:
        return path
    with zipfile.ZipFile(path / "root.zip", "w") as archive:
        for file in path.rglob("*.png"):
            archive.write(file, file.relative_to(path).as_posix())
    return path / "root.zip"


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("top", ["", "wrapped/twice"])
@pytest.mark.parametrize("cache_gb", [1, 0])
def test_a_root_of_train_and_val_is_classes_and_a_held_out_set(tmp_path, capsys, packed, top,
                                                               cache_gb):
    root = split_root(tmp_path, packed, top)
    images = load_images(root, 8, labels=True, cache_gb=cache_gb)
    assert "train/ and val/: train/ is read" in capsys.readouterr().err
    assert images.classes == ["ant", "bee"] and len(images) == 4
    rest, held = holdout(images, "auto", cache_gb=cache_gb)
    assert "val/ is read" in capsys.readouterr().err
    assert rest is images and len(held) == 2 and held.classes == images.classes
    for part, seeds in ((images, (0, 1, 2, 3)), (held, (4, 5))):
        expected = np.stack([np.asarray(picture(seed)).transpose(2, 0, 1) for seed in seeds])
        assert (part.take(range(len(part)))[0].numpy() == expected).all()
    copied = pickle.loads(pickle.dumps(held.source))           # as a worker gets it
    assert (copied.names, copied.part) == (held.source.names, "val")
    rest, held = holdout(images, "0.25")                       # what is given wins
    assert (len(rest), len(held)) == (3, 1) and held.source is images.source
    assert len(holdout(images, str(root))[1]) == 2                # the root names its held-out part


def test_only_exactly_train_and_val_are_parts_of_a_root(tmp_path):
    root = split_root(tmp_path / "root")
    assert open_images(root).part == "" and len(open_images(root).names) == 6
    save(root / "test" / "ant" / "0.png")
    images = load_images(root, 8, labels=True)
    assert len(images) == 7 and images.classes == ["test", "train", "val"]
    assert len(holdout(images, "auto")[1]) == 1                   # a fraction
    save(tmp_path / "flat" / "train" / "0.png"), save(tmp_path / "flat" / "val" / "0.png")
    assert load_images(tmp_path / "flat", 8).source.names == ["0.png"]
    save(tmp_path / "flat" / "0.png")
    assert len(load_images(tmp_path / "flat", 8)) == 3
    with pytest.raises(UserError, match="classes"):
        (tmp_path / "root" / "test" / "ant" / "0.png").unlink()
        save(root / "val" / "cow" / "0.png")
        holdout(load_images(root, 8, labels=True), "auto")


def test_the_training_part_of_a_split_root_is_measured_and_a_warning_says_so(tmp_path):
    with pytest.warns(UserWarning, match="train/ is measured"):
        measured = fid.open_measured(split_root(tmp_path))
    assert len(measured) == 4


def test_the_maps_of_a_split_root_are_split_with_it(tmp_path):
    root, maps = split_root(tmp_path / "root"), split_root(tmp_path / "maps")
    images = load_images(root, 8, targets=maps)
    rest, held = holdout(images, "auto", targets=maps)
    assert (len(rest), len(held), held.maps) == (4, 2, 1)
    grey = np.asarray(picture(5).convert("L"))
    assert (held.take([1])[0][0, 3].numpy() == grey).all()


def labelled(counts, names=None):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    names = names or [f"c{k}" for k in range(len(counts))]
    return Images(1, 3, labels, names, torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8))


def test_classes_are_described_by_names_and_numbers():
    assert labelled([6, 6, 6], ["ant", "bee", "cow"]).describe_classes() == \
        "18 images of 3 classes (ant, bee, cow)"
    assert labelled([4, 8]).describe_classes() == "12 images of 2 classes (c0 4, c1 8)"
    many = labelled([1] * 12).describe_classes()
    assert "12 classes" in many and many.count(", c") == 9 and many.endswith(", ...)")
    assert "note" in labelled([2, 2], ["Train", "val"]).describe_classes()
    assert "note" in labelled([2], ["photos"]).describe_classes()
    assert "note" not in labelled([2, 2], ["train", "car"]).describe_classes()
    assert Images(1, 3, torch.zeros(5, dtype=torch.int64)).describe_classes() == "5 images"


@pytest.mark.parametrize("seed", range(5))
def test_each_class_keeps_an_image_to_train_on(seed, capsys):
    images = labelled([1, 2, 30, 1])
    rest, held = holdout(images, 0.5, seed)
    assert min(rest.count_classes()) == 1 and len(held) == 17
    assert sorted([*rest.rows.tolist(), *held.rows.tolist()]) == list(range(34))
    rest, held = holdout(labelled([1, 1, 1]), 0.3, seed)  # it cannot: it says so
    assert len(held) == 1 and "1 of 3 classes have no image" in capsys.readouterr().err


# --- processes that decode ----------------------------------------------------------------


def test_too_little_shared_memory_is_told_before_the_workers_start(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    images = load_images(tmp_path, 64, cache_gb=0)
    usage = data.shutil.disk_usage("/")
    monkeypatch.setattr(data, "DataLoader", None)
    monkeypatch.setattr(data, "SHARED", str(tmp_path))
    for free in (2 * 10**6, 3 * 10**6):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda _: usage._replace(free=free))
        with pytest.raises(UserError, match="--workers 2: .*3 MB left.*--workers 0.*--shm-size") \
                if free > 2 * 10**6 else pytest.raises(UserError, match="2 MB left"):
            images.batches(iter([torch.zeros(64, dtype=torch.int64)] * 3), workers=2)


KILLED = """
import os, signal, sys, time
import torch
from data import load_images
from plumbing.console import run_command
def main():
    images = load_images(sys.argv[1], 8, cache_gb=0)
    batches = images.batches([torch.tensor([0])] * 1000, workers=1)
    next(batches)
    for child in open(f"/proc/self/task/{os.getpid()}/children").read().split():
        os.kill(int(child), signal.SIGKILL)
    if sys.argv[2] == "busy":
        time.sleep(2)
    for _ in batches:
        pass
run_command(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
@pytest.mark.parametrize("when", ["busy", "waiting"])
def test_a_killed_worker_is_one_line(tmp_path, when):
    save(tmp_path / "a.png")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), when],
        timeout=60,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "fewer --workers" in done.stderr


HELD = """
import sys, torch
from data import load_images
batches = load_images(sys.argv[1], 8, cache_gb=0).batches([torch.tensor([0])] * 1000, workers=1)
next(batches)
sys.held = [batches]
"""


def test_a_program_that_still_holds_its_workers_ends(tmp_path):
    """A notebook, or a test that failed: something refers to the batches until the end."""
    save(tmp_path / "a.png")
    subprocess.run([sys.executable, "-c", HELD, str(tmp_path)], timeout=60, check=True,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_what_a_worker_cannot_read_any_more_is_one_line(tmp_path):
    images = load_images(save(tmp_path / "a.png").parent, 8, cache_gb=0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError) as error:
        next(images.batches([torch.tensor([0])], workers=1))
    assert str(error.value).startswith(f"{tmp_path}: not one") and "\n" not in str(error.value)
    assert not multiprocessing.active_children()        # ended at once, without a collector's help


def test_workers_leave_all_signals_to_the_parent(monkeypatch):
    ignored = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: ignored.append(number))
    data.leave_signals_to_parent(0)
    assert set(ignored) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}


# --- vae.py -------------------------------------------------------------------------------


def train_command(tmp_path, *more):
    for k in range(6):
        save(tmp_path / "data" / f"{k}.png", k, 16)
    return [
        "--data",
        str(tmp_path / "data"), "--size", "16", "--batch", "4", "--device", "cpu", "--threads", "1",
        "--out",
        str(tmp_path / "v.pt"), *more
    ]


NOTED = """
import sys, torch, vae
from pathlib import Path
from plumbing.console import run_command
step = torch.optim.AdamW.step
def note(self, *args):
    Path(sys.argv[1], "begun").touch()
    return step(self, *args)
torch.optim.AdamW.step = note
run_command(lambda: vae.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_writes_and_measures_the_autoencoder_as_it_is(tmp_path, number):
    command = [str(tmp_path), *train_command(tmp_path, "--minutes", "5")]
    run = subprocess.Popen(
        [sys.executable, "-c", NOTED, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    until = time.monotonic() + 100
    while not (tmp_path / "begun").exists() and time.monotonic() < until:
        time.sleep(0.1)
    run.send_signal(number)
    said, _ = run.communicate(timeout=100)
    assert run.returncode == 128 + number and "held-out PSNR" in said and "after" in said
    assert sorted(os.listdir(tmp_path)) == ["begun", "data", "v.png", "v.pt"]
    assert vae.load_vae(tmp_path / "v.pt").vae.latent == 4


@pytest.mark.parametrize("count", [1, 2])
def test_a_second_signal_ends_it_at_once_and_leaves_nothing(tmp_path, monkeypatch, count):
    steps, step = [], torch.optim.AdamW.step

    def raise_signals(self, *args):
        steps.append(1)
        for _ in range(count):
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", raise_signals)
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert status(vae, train_command(tmp_path, "--steps", "50")) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    left = ["data"] if count == 2 else ["data", "v.png", "v.pt"]
    assert len(steps) == 1 and sorted(os.listdir(tmp_path)) == left


def test_the_autoencoder_never_writes_over_what_it_reads(tmp_path, capsys):
    command = train_command(tmp_path, "--steps", "1")
    before = (tmp_path / "data" / "0.png").read_bytes()
    assert status(vae, [*command, "--picture", str(tmp_path / "data" / "0.png")]) == 2
    assert "--picture" in capsys.readouterr().err
    assert (tmp_path / "data" / "0.png").read_bytes() == before
    (tmp_path / "link.png").symlink_to(tmp_path / "data" / "0.png")
    assert status(vae, [*command, "--picture", str(tmp_path / "link.png")]) in (0, 2)
    assert (tmp_path / "data" / "0.png").read_bytes() == before


def test_the_latents_are_measured_on_a_random_part_of_a_sorted_set(monkeypatch):
    seen = []
    images = Images(4, 3, torch.arange(9000), pixels=torch.zeros(9000, 3, 4, 4, dtype=torch.uint8))
    monkeypatch.setattr(
        Images, "take", lambda self, i: seen.append(torch.as_tensor(i)) or
        (self.pixels[self.rows[torch.as_tensor(i)]], None))
    monkeypatch.setattr(vae, "latent_statistics", lambda model, batches: list(batches) and (0, 1))
    vae.measure_latents(None, images, "cpu")
    rows = torch.cat(seen)
    assert len(rows) == len(rows.unique()) == 4096
    assert abs(rows.double().mean() - 4500) < 150
    assert vae.take_some(images).shape == (1024, 3, 4, 4) and seen[-1].max() > 8000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_homes_of_nobody_are_no_sources(tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    for path in (tmp_path / "pipe.zip", "~nosuchuser/photos"):
        with pytest.raises(UserError, match="there is no such file or folder"):
            open_images(path)
        with pytest.raises(UserError, match="there is no such file"):
            vae.load_vae(path)


def test_a_home_folder_is_expanded_in_every_path_of_vae(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = vae.parser().parse_args(["--data=~/a", "--out", "~/v.pt", "--picture", "~/v.png"])
    assert (args.data, args.out, args.picture) == ("/home/me/a", "/home/me/v.pt", "/home/me/v.png")


def test_what_a_source_leaves_out_is_known_to_every_caller(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_text("?")
    assert open_images(tmp_path).notes == ["1 file with another ending is not used (.heic 1)"]


def test_an_archive_that_is_not_cifars_is_to_be_unpacked(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.txt", "photos/a.txt")
    with pytest.raises(UserError, match="unpack it into a folder"):
        open_images(tmp_path / "photos.tar.gz")
