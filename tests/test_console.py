"""Laws of the console: one line, status 2, nothing that a terminal would obey, nothing lost
when a screen takes no more."""

import io
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from plumbing.console import (
    Screen, UserError, build_parser, escape, find_status, parse_path, replacing)


def run_code(code, **how):
    """Run Python code below the project's root, in the folder `how` names."""
    return subprocess.run([sys.executable, "-c", code],
                          capture_output="stdout" not in how,
                          **how,
                          env=os.environ | {"PYTHONPATH": str(ROOT)},
                          )


@pytest.mark.parametrize("text, shown", [("plain\n", "plain\n"),
                                         ("caf\u00e9 \u732b \t|", "caf\u00e9 \u732b \t|"),
                                         ("\x1b[31mred", "\\x1b[31mred"), ("a\udcffb", "a\\udcffb"),
                                         ("\u202egnp.exe", "\\u202egnp.exe"), ("\x9b2J", "\\x9b2J"),
                                         ("\x07", "\\x07"), ],
                         )
def test_no_text_moves_or_colours_a_terminal(text, shown):
    assert escape(text) == shown
    stream = io.StringIO()
    Screen(stream).write(text)
    assert stream.getvalue() == shown


def test_numbers_are_whole_numbers_as_people_write_them(capsys):
    parser = build_parser("x")
    parser.add_argument("--size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--out", type=parse_path)
    given = parser.parse_args(["--size", "12", "--lr", "1e-3", "--out=~/runs"])
    assert (given.size, given.lr, given.out) == (12, 1e-3, os.path.expanduser("~/runs"))
    for bad in (["--size=1_000"], ["--size", "\uff11\uff12"], ["--size",
                                                               " 5"], ["--lr",
                                                                       "1_0.5"], ["--size", "5.0"],
                ["--size", "9" * 20], ["--size", str(2 ** 63)], ["--size", str(-2 ** 63)]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(bad)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_ctrl_c_ends_a_picture_command_without_a_traceback(tmp_path):
    code = ("from plumbing.console import run_picture_command\n"
            "def draw(seed): raise KeyboardInterrupt\n"
            "run_picture_command('x', draw, 'x.png', seed=(0, 'x'))")
    done = run_code(code, cwd=tmp_path)
    assert done.returncode == 130 and not done.stderr and not list(tmp_path.iterdir())


COMMAND = "from plumbing.console import run_command\ndef main():\n    {}\nrun_command(main)"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_screen_lets_the_work_end_and_is_told(tmp_path):
    code = COMMAND.format("[print(i) for i in range(10000)]; open('made', 'w').close()")
    with open("/dev/full", "w") as full:
        done = run_code(code, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path)
    assert done.returncode == 2 and (tmp_path / "made").exists()
    assert (done.stderr.decode().splitlines() == [done.stderr.decode().strip()]
            and b"No space left" in done.stderr)


def test_a_reader_that_leaves_is_no_error(tmp_path):
    code = COMMAND.format(
        "[print(i, flush=True) for i in range(100000)]; open('made', 'w').close()")
    command = f"{sys.executable} -c \"{code}\" | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command],
                          capture_output=True,
                          cwd=tmp_path,
                          text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)},
                          )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n",
                                                           "") and (tmp_path / "made").exists()


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&- <&-"])
def test_a_closed_screen_is_no_file_of_the_work(tmp_path, closed):
    """A closed descriptor would be given to the next file, and a message would be written
    into it."""
    code = COMMAND.format(
        "f = open('made', 'w'); print('x'); import os; os.write(2, b'noise'); f.close()")
    done = subprocess.run(["bash", "-c", f"{sys.executable} -c \"{code}\" {closed}"],
                          cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)},
                          )
    assert done.returncode == 0 and (tmp_path / "made").read_text() == ""


def test_a_screen_without_the_letters_shows_a_question_mark(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format("print('caf\\u00e9 \\u732b')")],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout) == (0, b"caf? ?\n")


def test_a_link_in_the_place_of_a_new_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in ("a.png", "a.png.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with replacing(tmp_path / "a.png", shared=False) as file:
        file.write(b"new")
    assert (tmp_path / "a.png").read_bytes() == b"new" and (tmp_path /
                                                            "precious").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named_without_the_temporary_file(tmp_path):
    path = tmp_path / "absent" / "x.png"
    with pytest.raises(UserError) as told:
        with replacing(path):
            raise AssertionError("the place was not opened first")
    assert f"{path} cannot be written (No such file or directory)" in str(told.value)


def test_a_compilers_error_is_one_line(capsys):
    error = torch._dynamo.exc.TorchDynamoException("file too short\nand a trace")
    assert find_status(lambda: (_ for _ in ()).throw(error)) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "--compile" in told and "file too short" in told


@pytest.mark.slow
def test_what_torch_cannot_compile_is_one_line(tmp_path):
    """Here a compiled kernel in torch's cache that was cut short by a crash."""
    code = ("import torch\nfrom plumbing.console import run_command\n"
            "def main(): print(torch.compile(lambda x: 2 * x.sin())(torch.zeros(8)).sum().item())\n"
            "run_command(main)")
    env = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def run():
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    if run().returncode:
        pytest.skip("torch.compile does not work here")
    for kernel in tmp_path.rglob("*.so"):
        kernel.write_bytes(kernel.read_bytes()[:100])
    done = run()
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --compile: torch cannot compile this")


def test_a_message_of_many_lines_is_one_line(capsys):
    from conftest import status

    class Module:
        @staticmethod
        def main(argv):
            raise UserError("a\nb\x1b[1m")

    assert status(Module, []) == 2 and capsys.readouterr().err == "error: a b\\x1b[1m\n"
