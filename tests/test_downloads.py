"""Laws of downloads: what has the right hash is kept, all else is one line.

The tests bring their own files and hashes, and a server on this machine."""
import dataclasses
import gzip
import hashlib
import io
import multiprocessing
import re
import socket
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import vae
from conftest import status
from data import load_images
from plumbing import downloads, sources
from plumbing.console import UserError
from plumbing.downloads import (
    DOWNLOADS, PublishedFile, PublishedSet, fetch_published, is_published)
from running.options import Options, options_parser
from running.setup import absolute_path

DATA = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()


class Server(ThreadingHTTPServer):
    """Serves .files {path: bytes}; .cuts: after how many bytes answers end; .asked:
    (path, header Range) of all requests."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.cuts, self.asked = {}, [], []
        self.has_ranges, self.tells_length = True, True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.asked.append((self.path, wanted))
        data = server.files.get(self.path)
        if data is None:
            return self.send_error(404)
        begins = 0
        if wanted and server.has_ranges:
            begins = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if begins >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begins}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if server.tells_length:
            self.send_header("Content-Length", str(len(data) - begins))
        self.end_headers()
        self.wfile.write(data[begins:][:server.cuts.pop(0) if server.cuts else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIMPSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("GLIMPSE_MIRROR", raising=False)
    monkeypatch.setattr(downloads, "PAUSE", 0)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


def publish(server, data=DATA, algorithm="sha256", name="a.bin", **others):
    """A row of the table whose file the server has."""
    server.files[f"/{name}"] = data
    digest = hashlib.new(algorithm, data).hexdigest()
    return PublishedFile(name, f"{server.url}/{name}", len(data), algorithm, digest,
                         "https://page.example", **others)


def fetch(*files, **others):
    return fetch_published("thing", PublishedSet("data", "not stated", files, **others))


def one_line(*files):
    with pytest.raises(UserError) as caught:
        fetch(*files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- one file -----------------------------------------------------------------------------

@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
@pytest.mark.parametrize("tells_length", [True, False])
def test_a_file_of_the_right_hash_is_fetched_once_and_kept(server, tmp_path, capsys, algorithm,
                                                           tells_length):
    server.tells_length = tells_length
    file = publish(server, algorithm=algorithm)
    path, = fetch(file)
    assert path == tmp_path / "cache" / "thing" / "a.bin" and path.read_bytes() == DATA
    told = capsys.readouterr().err
    assert "licence: not stated" in told and "a.bin: 100%" in told
    assert fetch(file) == [path] and server.asked == [("/a.bin", None)]
    assert {p.name for p in path.parent.iterdir()} <= {"a.bin", "a.bin.lock"}
    assert capsys.readouterr().err == ""


def test_a_file_of_another_hash_is_one_line_and_not_kept(server, tmp_path):
    file = publish(server)
    server.files["/a.bin"] = DATA[:-1] + b"x"
    told = one_line(file)
    assert hashlib.sha256(server.files["/a.bin"]).hexdigest() in told and file.digest in told
    assert [p.name for p in (tmp_path / "cache" / "thing").iterdir()] == ["a.bin.lock"]
    server.files["/a.bin"] = DATA + b"x"                       # of another length: before it comes
    assert "300001 bytes" in one_line(file)
    server.tells_length = False
    server.files["/a.bin"] = DATA[:7]
    assert "cannot be read" in one_line(file)


def test_a_file_that_was_put_there_is_used_or_refused_by_its_hash(server, tmp_path):
    file = publish(server)
    place = tmp_path / "cache" / "thing" / "a.bin"
    place.parent.mkdir(parents=True)
    place.write_bytes(DATA)
    assert fetch(file) == [place] and server.asked == []
    place.write_bytes(DATA[1:])
    told = one_line(file)
    assert str(place) in told and file.page in told and "Remove" in told and server.asked == []


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_connection_that_is_cut_goes_on_or_begins_anew(server, has_ranges):
    server.has_ranges, server.cuts = has_ranges, [100_000, 50_000]
    assert fetch(publish(server))[0].read_bytes() == DATA
    ranges = [wanted for _, wanted in server.asked]
    second = "bytes=150000-" if has_ranges else "bytes=50000-"
    assert ranges == [None, "bytes=100000-", second]


def test_the_next_start_goes_on_where_the_last_one_stopped(server, monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    server.cuts = [123_456]
    file = publish(server)
    told = one_line(file)
    assert "0.123 MB, which are kept" in told
    assert [p.name for p in (tmp_path / "cache/thing").glob("a.bin*")] != ["a.bin"]
    assert fetch(file)[0].read_bytes() == DATA
    assert server.asked[1:] == [("/a.bin", "bytes=123456-")]


@pytest.mark.parametrize("rest", [b"rubbish", DATA + b"x", DATA[:-1] + b"x"],
                         ids=["other", "longer", "complete"])
def test_a_part_of_another_file_is_fetched_anew(server, tmp_path, rest):
    file = publish(server)
    (tmp_path / "cache/thing").mkdir(parents=True)
    (tmp_path / "cache/thing/a.bin.part").write_bytes(rest)
    assert fetch(file)[0].read_bytes() == DATA
    ranges = [wanted for _, wanted in server.asked]            # no more than is missing
    assert ranges == (["bytes=7-", None] if rest == b"rubbish" else [None])


# --- no answer ----------------------------------------------------------------------------

def says_what_to_put_where(told, file, tmp_path):
    return all(words in told for words in (
        file.name, file.digest, file.address, str(tmp_path / "cache" / "thing"), "put "))


def test_a_missing_file_is_one_line_that_says_what_to_put_where(server, tmp_path):
    file = publish(server)
    server.files.clear()
    told = one_line(file)
    assert "404" in told and says_what_to_put_where(told, file, tmp_path)


@pytest.mark.parametrize("host", ["127.0.0.1:PORT", "nowhere.invalid"])
def test_without_a_network_one_line_says_what_to_put_where(server, tmp_path, host):
    with socket.socket() as free:                              # nobody listens here
        free.bind(("127.0.0.1", 0))
        host = host.replace("PORT", str(free.getsockname()[1]))
        file = dataclasses.replace(publish(server), address=f"http://{host}/a.bin")
        told = one_line(file)
        assert says_what_to_put_where(told, file, tmp_path) and "urlopen" not in told
    assert not (tmp_path / "cache/thing/a.bin.part").exists()


def test_a_cache_that_cannot_be_written_is_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLIMPSE_CACHE", str(tmp_path / "file"))
    assert "GLIMPSE_CACHE" in one_line(publish(server))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_a_full_disk_is_one_line(tmp_path):
    part = downloads.PartialFile(tmp_path / "a.part", "md5")
    part.file.close()
    part.file = open("/dev/full", "wb", buffering=0)
    with pytest.raises(UserError, match="GLIMPSE_CACHE"):
        part.append(b"x")


# --- a mirror -----------------------------------------------------------------------------

def test_a_mirror_changes_the_address_and_never_the_hash(server, monkeypatch):
    file = publish(server)
    monkeypatch.setenv("GLIMPSE_MIRROR", f"{server.url}/mirror/")
    server.files["/mirror/thing/a.bin"] = DATA[::-1]
    told = one_line(file)
    assert "/mirror/thing/a.bin is another file" in told and file.address in told
    server.files["/mirror/thing/a.bin"] = DATA
    assert fetch(file)[0].read_bytes() == DATA
    assert {path for path, _ in server.asked} == {"/mirror/thing/a.bin"}
    monkeypatch.setenv("GLIMPSE_MIRROR", "file:///etc")
    assert "GLIMPSE_MIRROR" in one_line(dataclasses.replace(file, name="b.bin"))


# --- several processes --------------------------------------------------------------------

def fetch_at_once(entry, barrier, queue):
    barrier.wait()
    queue.put(hashlib.sha256(fetch_published("thing", entry)[0].read_bytes()).hexdigest())


@pytest.mark.skipif(downloads.fcntl is None, reason="no locks")
def test_of_several_processes_one_downloads(server):
    entry = PublishedSet("data", "not stated", (publish(server),))
    server.cuts = [1000]
    processes = multiprocessing.get_context("fork")
    barrier, queue = processes.Barrier(3), processes.Queue()
    workers = [processes.Process(target=fetch_at_once, args=(entry, barrier, queue))
               for _ in range(3)]
    [worker.start() for worker in workers]
    digests = [queue.get(timeout=30) for _ in workers]
    [worker.join() for worker in workers]
    assert digests == [hashlib.sha256(DATA).hexdigest()] * 3
    assert server.asked == [("/a.bin", None), ("/a.bin", "bytes=1000-")]


# --- what the names are -------------------------------------------------------------------

def idx(array):
    sizes = struct.pack(f">{1 + array.ndim}i", 0x800 + array.ndim, *array.shape)
    return gzip.compress(sizes + array.tobytes())


def pets():
    """-> an archive like that of the pets, and its picture of Abyssinian_2."""
    blob, pictures = io.BytesIO(), {}
    with tarfile.open(fileobj=blob, mode="w:gz") as tar:
        for k, name in enumerate(("Abyssinian_2.jpg", "Abyssinian_2.mat", "basset_hound_10.jpg",
                                  "._Abyssinian_2.jpg")):
            pixels = np.random.default_rng(k).integers(0, 256, (9, 7, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            pictures[name] = file.getvalue()
            member = tarfile.TarInfo(f"images/{name}")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    return blob.getvalue(), pictures


def serve_instead(server, monkeypatch, name, *contents):
    """Let a name of the table stand for these contents, with their hashes and names."""
    files = tuple(publish(server, data, name=file.name)
                  for file, data in zip(DOWNLOADS[name].files, contents, strict=True))
    monkeypatch.setitem(DOWNLOADS, name, dataclasses.replace(DOWNLOADS[name], files=files))


def test_fashion_mnist_is_its_grey_pictures_with_their_labels(server, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    numbers = np.array([9, 0, 0, 3], np.uint8)
    serve_instead(server, monkeypatch, "fashion-mnist", idx(pixels), idx(numbers))
    images = load_images("fashion-mnist", 28, gray=True, labels=True)
    assert images.classes == ["Ankle boot", "Dress", "T-shirt or top"]
    x, y = images.take(range(4))
    assert (x[:, 0].numpy() == pixels).all() and y.tolist() == [0, 2, 2, 1]
    assert load_images("fashion-mnist", 32).take([0])[0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("damage", ["cut", "kind", "count", "label", "text"])
def test_damaged_files_of_fashion_mnist_are_one_line(tmp_path, damage):
    pixels, numbers = np.zeros((2, 28, 28), np.uint8), np.array([1, 2], np.uint8)
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.write_bytes({"cut": idx(pixels)[:-30], "text": b"text"}.get(damage, idx(pixels)))
    labels.write_bytes(idx({"kind": numbers[None], "count": numbers[:1],
                            "label": numbers + 9}.get(damage, numbers)))
    with pytest.raises(UserError, match="images|labels"):
        sources.FashionMnist(images, labels)


def test_pets_are_packed_once_with_a_class_for_each_breed(server, monkeypatch, tmp_path):
    blob, pictures = pets()
    serve_instead(server, monkeypatch, "pets", blob)
    images = load_images("pets", 7, labels=True)
    assert images.classes == ["Abyssinian", "basset_hound"] and len(images) == 2
    with zipfile.ZipFile(tmp_path / "cache/pets/pets.zip") as archive:
        assert archive.namelist() == ["Abyssinian/Abyssinian_2.jpg",
                                      "basset_hound/basset_hound_10.jpg"]
        assert archive.read("Abyssinian/Abyssinian_2.jpg") == pictures["Abyssinian_2.jpg"]
    (tmp_path / "cache/pets/images.tar.gz").unlink()           # it is needed no more
    assert len(load_images("pets", 7)) == 2 and len(server.asked) == 1


def test_sd_is_an_autoencoder_that_a_checkpoint_knows_by_this_name(server, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    small = dict(widths=[8, 8], layers=1, groups=4)
    monkeypatch.setitem(vae.PRESETS, "sd", small)
    weights = vae.AutoencoderKL(**small).state_dict()
    blob = io.BytesIO()
    torch.save(weights, blob)                                  # safetensors may be missing here
    file = publish(server, blob.getvalue(), name="weights.pt")
    monkeypatch.setitem(DOWNLOADS, "sd", dataclasses.replace(DOWNLOADS["sd"], files=(file,)))
    space = vae.load_vae("sd")
    assert torch.equal(space.vae.state_dict()["encoder.conv_in.weight"],
                       weights["encoder.conv_in.weight"])
    assert absolute_path("sd") == "sd" and absolute_path("x") == str(tmp_path / "x")
    meta = dict(vae="sd", vae_sha="other", schedule="ddm", space="latent", channels=3, data_std=1,
                task="generate", model=dict(channels=4))
    with pytest.raises(UserError, match="sd is not the autoencoder"):        # it was found and read
        monkeypatch.setattr(sample, "check_names", lambda meta: None)
        sample.build_model(meta)


def test_a_path_of_this_name_wins_and_a_line_says_so(server, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert is_published("cifar10", "data") and not is_published("cifar10", "vae")
    (tmp_path / "cifar10" / "ant").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("cifar10/ant/0.png")
    assert not is_published("cifar10", "data")
    assert len(load_images("cifar10", 8)) == 1
    assert "the path of this name is read" in capsys.readouterr().err and server.asked == []


# --- the table ----------------------------------------------------------------------------

def test_every_row_of_the_table_has_a_page_a_hash_a_size_and_a_licence():
    data = [name for name, entry in DOWNLOADS.items() if entry.kind == "data"]
    assert list(sources.PUBLISHED) == data
    for entry in DOWNLOADS.values():
        assert entry.kind in ("data", "vae") and entry.licence
        assert entry.kind == "vae" or entry.classes > 1
        for file in entry.files:
            assert file.page.startswith("https://") and file.address.startswith("http")
            assert re.fullmatch("[0-9a-f]+", file.digest) and file.size > 0
            assert len(file.digest) == 2 * hashlib.new(file.algorithm).digest_size


def test_the_names_stand_in_the_help_and_in_the_error_of_a_missing_path():
    told = " ".join(options_parser(Options, "").format_help().split())
    with pytest.raises(UserError) as caught:
        load_images("nowhere", 8)
    for name in sources.PUBLISHED:
        assert name in told and name in str(caught.value)
    assert "downloaded: sd" in told


def test_a_dry_run_downloads_nothing(server, monkeypatch, tmp_path, capsys):
    import train
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLIMPSE_MIRROR", server.url)
    assert status(train, ["--data", "pets", "--labels", "--space", "latent", "--vae", "sd",
                          "--size", "32", "--patch", "1", "--dry-run"]) == 0
    assert server.asked == [] and "parameters" in capsys.readouterr().out


def test_offline_a_command_ends_with_one_line(server, monkeypatch, tmp_path, capsys):
    import train
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLIMPSE_MIRROR", server.url)
    for flags in (["--data", "cifar10"], ["--space", "latent", "--vae", "sd"]):
        assert status(train, [*flags, "--steps", "1"]) == 2
        told = capsys.readouterr().err.splitlines()
        assert [line for line in told if line.startswith("error:")] == told[-1:]
        assert "or put " in told[-1] and str(tmp_path / "cache") in told[-1]
