"""Laws of the house: layers, flags that are read, a README whose commands parse, nothing imported that is not allowed."""
import argparse
import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fid
import finetune
import reproduce
import sample
import train
import vae
from conftest import ROOT

LAYERS = [["console"], ["mask", "schedules", "faces", "sources", "machine"], ["data"], ["checkpoint", "pictures", "recipes", "vae", "fid", "tasks", "vit", "losses", "latents"], ["inputs", "reconstruct"],
          ["cost", "options", "sample"], ["evaluate"], ["train", "probe"], ["finetune", "bench"], ["reproduce"]]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
OURS = [p for p in sorted(ROOT.glob("*.py"))]
PACKAGES = {"torch", "numpy", "einops", "tqdm", "PIL", "scipy", "safetensors"}       # the last one is optional, imported where it is needed
LIBRARY = ["mask", "schedules", "faces", "vit", "losses"]


def tree(path):
    return ast.parse(path.read_text())


def imports(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.stem)
def test_a_module_imports_only_from_lower_layers_and_allowed_packages(path):
    for name in imports(path):
        if name in LAYER:
            assert LAYER[name] < LAYER[path.stem], f"{path.name} imports {name}"
        else:
            assert name in PACKAGES or name in sys.stdlib_module_names, f"{path.name} imports {name}"


@pytest.mark.parametrize("name", LIBRARY)
def test_library_code_reads_no_arguments_chooses_no_device_and_owns_no_global_randomness(name):
    """Outside of `if __name__ == "__main__"`, and of ViT.initialise, which draws initial weights as torch's own layers do."""
    source = (ROOT / f"{name}.py").read_text().split('if __name__ == "__main__"')[0]
    for forbidden in ("sys.argv", "argparse", "manual_seed(0)", "torch.cuda", "np.random.seed", "torch.seed"):
        assert forbidden not in source, forbidden


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.stem)
def test_every_file_opens_with_its_idea(path):
    docstring = ast.get_docstring(tree(path))
    assert docstring and len(docstring.splitlines()) >= 5


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.stem)
def test_public_functions_and_classes_say_what_they_do(path):
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name not in ("main", "parser") and len(node.body) > 1:
            assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_requirements_name_the_allowed_packages_and_no_others():
    names = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    assert names == {"torch", "numpy", "einops", "tqdm", "pillow", "scipy", "pytest", "hypothesis"}


def attributes(path):
    return {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}


def test_every_option_of_train_and_finetune_is_read():
    read = {node.attr for name in ("train", "evaluate") for node in ast.walk(tree(ROOT / f"{name}.py")) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "o"}
    names = {f.name for f in dataclasses.fields(train.Options)}
    assert names - read == {"recipe", "resume"}, names - read                   # those are read by options.merge, before there are options
    own = {f.name for f in dataclasses.fields(finetune.TuneOptions)} - names
    assert own <= attributes(ROOT / "finetune.py"), own


def flags(parser):
    return {a.dest for a in parser._actions} - {"help"}


@pytest.mark.parametrize("module", [sample, fid, vae, reproduce], ids=lambda module: module.__name__)
def test_every_flag_of_the_other_commands_is_read(module):
    unread = flags(module.parser()) - attributes(Path(module.__file__))
    assert not unread


PARSERS = {"train.py": lambda: train.options_parser(train.Options, ""), "finetune.py": lambda: train.options_parser(finetune.TuneOptions, ""),
           "sample.py": sample.parser, "fid.py": fid.parser, "vae.py": vae.parser, "reproduce.py": reproduce.parser}


@pytest.mark.parametrize("command", PARSERS)
def test_parsers_take_no_abbreviations_and_show_every_default(command):
    parser = PARSERS[command]()
    assert not parser.allow_abbrev
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            assert action.help, action.dest
    assert text.count("default:") >= len([a for a in parser._actions if a.option_strings]) - 1


def readme_commands():
    """Every `python X.py ...` and `torchrun ... X.py ...` in the README's code."""
    text = (ROOT / "README.md").read_text()
    code = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.S)) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", text))
    for line in code.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;|\|", line.split("  #")[0]):
            words = shlex.split(part, comments=True) if part.split()[:1] in (["python"], ["torchrun"]) else []
            if words:
                script = next((i for i, w in enumerate(words) if w.endswith(".py")), None)
                if script is not None:
                    yield words[script], words[script + 1:], words[:script]


def test_every_command_in_the_readme_is_understood_by_its_parser():
    seen = set()
    for script, arguments, launcher in readme_commands():
        seen.add(script)
        assert (ROOT / script).exists(), script
        if script in PARSERS and "..." not in arguments:
            try:
                PARSERS[script]().parse_args(arguments)
            except SystemExit as error:
                assert error.code == 0, f"{script} {' '.join(arguments)}"
        if launcher[0] == "torchrun":
            from torch.distributed.run import get_args_parser
            get_args_parser().parse_args([*launcher[1:], script, *arguments])
    assert {"train.py", "finetune.py", "sample.py", "fid.py", "mask.py", "schedules.py", "data.py"} <= seen


@pytest.mark.parametrize("script", ["mask.py", "schedules.py", "data.py", "tasks.py"])
def test_each_concept_draws_its_picture(script, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / script), "--out", str(tmp_path / "picture.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from PIL import Image
    assert Image.open(tmp_path / "picture.png").size[0] > 400


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "sample.py", "fid.py", "mask.py", "schedules.py", "data.py", "tasks.py", "reproduce.py"])
def test_an_unknown_flag_is_exit_2_without_a_traceback(script, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / script), "ddm", "B", "--no-such-flag"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--no-such-flag" in done.stderr


def test_the_command_line_keeps_false_and_none_apart_from_absent():
    given = vars(train.options_parser(train.Options, "").parse_args(["--no-flip", "--mask", "0"]))
    assert given == {"flip": False, "mask": 0.0}
    assert isinstance(train.options_parser(train.Options, ""), argparse.ArgumentParser)
