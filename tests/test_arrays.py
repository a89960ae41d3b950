"""Laws of .npz files of strangers: whatever one holds, fid.py measures it or says one line;
never a traceback, a hang, a crash or a memory that fills."""
import io
import random
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import fid
from conftest import ROOT, status
from plumbing.arrays import read_arrays
from plumbing.console import UserError

GOOD = dict(mu=np.zeros(4), sigma=np.eye(4), n=np.array(9), protocol=np.array("pytorch-fid"),
            weights=np.array("6726825d"))


def write_npy(array, **claims):
    """The bytes of a .npy. claims: what its header says instead of the truth."""
    buffer = io.BytesIO()
    header = dict(shape=array.shape, fortran_order=False,
                  descr=np.lib.format.dtype_to_descr(array.dtype)) | claims
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + np.ascontiguousarray(array).tobytes()


def write_zip(path, members, packed=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def good_members():
    return {name: write_npy(np.asarray(value)) for name, value in GOOD.items()}


@pytest.mark.parametrize("claims", [
    dict(shape=(10**7, 10**7)), dict(shape=(2**40,)), dict(shape=(-1, 4)), dict(shape=(3,)),
    dict(descr="|O"), dict(descr="<f16"), dict(descr="nonsense"), dict(shape="four"),
    dict(shape=(True,)), dict(fortran_order=7)])
def test_what_a_header_claims_is_not_believed(tmp_path, claims):
    write_zip(tmp_path / "a.npz", good_members() | dict(mu=write_npy(np.zeros(4), **claims)))
    with pytest.raises(UserError, match="a.npz: is no folder, .zip or .npz that can be read") as e:
        read_arrays(tmp_path / "a.npz", GOOD)
    assert len(str(e.value).splitlines()) == 1


def test_a_bomb_is_not_unpacked_and_what_nobody_wants_is_not_read(tmp_path, monkeypatch):
    zeros = write_npy(np.zeros(2**24, np.uint8))
    write_zip(tmp_path / "a.npz", good_members() | dict(images=zeros, more=b"what"),
              zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.npz").stat().st_size < 30_000
    monkeypatch.setattr("plumbing.arrays.count_free_memory", lambda: 2**20)
    assert set(read_arrays(tmp_path / "a.npz", GOOD)) == set(GOOD)
    with pytest.raises(UserError, match="its arrays take 0.0 GB, 0.0 are free"):
        read_arrays(tmp_path / "a.npz", [*GOOD, "images"])


BAD = [("mu", [np.full(4, np.nan), np.full(4, np.inf), np.float64(1), np.zeros((4, 1)), np.zeros(0),
               np.zeros(3), np.zeros(4, complex), np.array(["a"] * 4), np.full(4, 1e200),
               np.zeros(4, bool), np.zeros(4, "M8[s]")]),
       ("sigma", [np.full((4, 4), np.nan), np.full((4, 4), np.inf), np.float64(1), np.eye(3),
                  -np.eye(4), np.triu(np.ones((4, 4))), np.zeros((0, 0)), np.array("text"),
                  np.eye(4) + 0j,
                  np.eye(4) * 1e300]),
       ("n", [np.array(0), np.array(1), np.array(-5), np.array(2.5), np.array("9"),
              np.array([9, 9]), np.array(np.nan), np.array(True), np.zeros(0, int)]),
       ("protocol", [np.array("xx"), np.array(3), np.array(["tf1"]), np.array(""), np.array(np.nan),
                     np.array(b"tf1")]),
       ("weights", [np.array(3), np.array("\x1b[31m"), np.array("x" * 5000), np.array(["a", "b"])]),
       ("size", [np.array(-1), np.array("a"), np.array(2.0), np.array([1])])]


@pytest.mark.parametrize("key, value", [(key, value) for key, values in BAD for value in values])
def test_moments_that_are_none_are_one_line(tmp_path, monkeypatch, capsys, key, value):
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", **GOOD)
    np.savez("bad.npz", **GOOD | {key: value})
    for argv in (["bad.npz", "good.npz"], ["good.npz", "bad.npz"]):
        assert status(fid, argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and "bad.npz" in err and "\x1b" not in err


def test_big_endian_and_half_precision_moments_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", **GOOD)
    np.savez("other.npz", **GOOD | dict(mu=GOOD["mu"].astype(">f8"), n=np.array(9, ">i2"),
                                        sigma=GOOD["sigma"].astype(np.float16)))
    assert status(fid, ["good.npz", "other.npz"]) == 0
    assert capsys.readouterr().out.startswith("FID 0.0000")


@pytest.mark.parametrize("pixels", [
    np.zeros((0, 8, 8, 3), np.uint8), np.zeros((4, 0, 0, 3), np.uint8),
    np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 2), np.uint8), np.zeros((4, 8, 8, 3)),
    np.array("text"), np.uint8(3)])
def test_images_that_are_none_are_one_line(tmp_path, monkeypatch, capsys, pixels):
    monkeypatch.chdir(tmp_path)
    np.savez("bad.npz", arr_0=pixels)
    for argv in (["bad.npz", "bad.npz", "--proxy"], ["bad.npz", "bad.npz"]):
        assert status(fid, argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


# --- whatever else ------------------------------------------------------------------------

def spoil(rng, path):
    """A .npz in which something is wrong, of a kind drawn by rng."""
    members = good_members() | {"images": write_npy(np.zeros((4, 8, 8, 3), np.uint8))}
    if rng.random() < 0.5:
        del members["images"]
    key = rng.choice(list(members))
    every = [value for _, values in BAD for value in values]
    kind = rng.choice(["value", "claim", "bytes", "drop", "text", "cut", "flip", "rename"])
    if kind == "value":
        members[key] = write_npy(np.asarray(rng.choice(every)))
    elif kind == "claim":
        claims = rng.choice([dict(shape=(rng.choice([0, 1, 5, 10**9, 2**62]),) * rng.randint(0, 5)),
                             dict(descr=rng.choice(["|O", "<f8", ">i4", "<U9", "|V7", "<c16"])),
                             dict(fortran_order=True)])
        members[key] = write_npy(np.zeros((4, 4)), **claims)
    elif kind == "bytes":
        content = bytearray(members[key])
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(min(len(content), 128))] = rng.randrange(256)
        members[key] = bytes(content)
    elif kind == "drop":
        del members[key]
    elif kind == "text":
        members[key] = b"\x93NUMPY\x01\x00" + b"(" * rng.randint(0, 9999)
    elif kind == "rename":
        members[rng.choice(list(members))] = members.pop(key)
    write_zip(path, members, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[:rng.randrange(len(content))]
    elif kind == "flip":
        for _ in range(rng.randint(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def attack(count, seed, folder):
    """Run in a process of its own, for it may crash: prints one line for each bad
    outcome."""
    import contextlib
    import traceback
    from pathlib import Path

    import torch
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    rng, folder = random.Random(seed), Path(folder)
    np.savez(folder / "good.npz", **GOOD)
    fid.load_inception = lambda path: (torch.nn.Flatten(), "6726825d")
    fid.PROXIES = {"pixel": fid.PROXIES["pixel"]}
    fid.PROTOCOLS = {"pytorch-fid": lambda x: torch.zeros(len(x), 4)}
    for k in range(count):
        spoil(rng, folder / "bad.npz")
        bad, good = str(folder / "bad.npz"), str(folder / "good.npz")
        argv = rng.choice([[bad, good], [good, bad], [bad, bad], [bad, bad, "--proxy"],
                           [bad, "--save", str(folder / "new.npz")]])
        print(f"TRY {k} {argv}", flush=True)
        try:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                fid.main(argv)
        except UserError as error:
            if len(str(error).splitlines()) != 1 or len(str(error)) > 600:
                print(f"BAD {k} {error}")
        except Exception:
            print(f"BAD {k} {traceback.format_exc()}", flush=True)


@pytest.mark.parametrize("count, seed", [(20, 0), pytest.param(200, 1, marks=pytest.mark.slow),
                                         pytest.param(200, 2, marks=pytest.mark.slow)])
def test_a_spoilt_file_is_measured_or_is_one_line(tmp_path, count, seed):
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; "
            f"import test_arrays; test_arrays.attack({count}, {seed}, {str(tmp_path)!r})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "BAD" not in done.stdout, done.stdout[-3000:]
    assert done.returncode == 0 and done.stdout.count("TRY") == count, done.stderr[-800:]
