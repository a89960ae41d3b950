"""Laws of the pages: commands parse, links lead somewhere, the README prints train_step."""
import ast
import inspect
import re
import shlex
import textwrap
import tokenize

import pytest

import fid
import finetune
import probe
import reproduce
import restore
import sample
import train
import vae
from conftest import ROOT
from running.options import options_parser
from test_house import FILES, TREES, path_of

PAGES = ["README.md", "READING.md", "USAGE.md", "RESULTS.md", "EXERCISES.md"]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
PARSERS = {"train.py": lambda: options_parser(train.Options, ""),
           "finetune.py": lambda: options_parser(finetune.TuneOptions, "")}
PARSERS |= {f"{module.__name__}.py": module.parser
            for module in (sample, restore, probe, fid, vae, reproduce)}


# --- commands -----------------------------------------------------------------------------

def code_lines(text):
    """The lines of a page's bash blocks, then the code inside its sentences."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return "\n".join(blocks).replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", prose)


def commands(page):
    """Every `python X.py ...`, `torchrun ... X.py ...` and `pytest ...` of a page.

    -> (launcher's words, script, arguments)"""
    for line in code_lines(TEXTS[page]):
        for part in re.split(r"&&|;|\|", line):
            if not part.strip().startswith(("python ", "torchrun ", "pytest ")):
                continue
            words = shlex.split(part, comments=True)
            script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if script is not None and "..." not in words:
                yield words[:script], words[script], words[script + 1:]


def parse_command(parser, arguments, any_value):
    """Let a real parser read them. any_value: a name may be one that is to be added."""
    for action in parser._actions:
        action.choices = None if any_value and action.choices else action.choices
    try:
        parser.parse_args(arguments)
    except SystemExit as end:
        return end.code == 0                                                    # --help
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_understood_by_its_parser(page, capsys):
    for launcher, script, arguments in commands(page):
        file = script.split("::")[0]
        assert (ROOT / file).exists(), f"{page}: {script}"
        if script in PARSERS:
            understood = parse_command(PARSERS[script](), arguments, page == "EXERCISES.md")
            assert understood, f"{page}: {script} {' '.join(arguments)}: {capsys.readouterr().err}"
        if launcher[0] == "torchrun":
            from torch.distributed.run import get_args_parser
            get_args_parser().parse_args([*launcher[1:], script, *arguments])


def test_the_pages_show_every_command_at_least_once():
    seen = {script for page in PAGES for _, script, _ in commands(page)}
    pictures = {"mask.py", "schedules.py", "losses.py", "vit.py", "tasks.py", "data.py"}
    assert set(PARSERS) | pictures <= seen, (set(PARSERS) | pictures) - seen


# --- links --------------------------------------------------------------------------------

def anchors(text):
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ +(.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_to_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        assert (ROOT / file).exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors((ROOT / (file or page)).read_text()), f"{page}: {target}"


# --- the README and the code --------------------------------------------------------------

def seven_lines():
    """The lines of train_step from the one that makes `z` to the one that makes `loss`."""
    source = textwrap.dedent(inspect.getsource(train.train_step))
    made = {node.targets[0].id: node for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    lines = source.splitlines()[made["z"].lineno - 1:made["loss"].end_lineno]
    return textwrap.dedent("\n".join(lines))


def test_the_readme_prints_the_seven_lines_of_train_step_as_they_stand():
    block = re.search(r"```python\n(z +=.*?)```", TEXTS["README.md"], re.S).group(1).rstrip()
    assert block == seven_lines()
    names = re.findall(r"^(\w+) +=", block, re.M)
    assert names == ["z", "m", "n", "t", "zt", "out", "loss"]


def test_the_readme_has_at_most_150_lines_and_links_every_module_of_the_root():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 150
    linked = set(re.findall(r"\]\((\w+\.py)\)", text))
    assert {f"{name}.py" for name in FILES if "." not in name} <= linked


# --- the bibliography ---------------------------------------------------------------------

def tags_and_numbers(name):
    """What a file cites in comments and docstrings: tags as [EDM], arXiv numbers."""
    tags, numbers = set(), set()
    with open(path_of(name), "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                numbers.update(re.findall(r"\b\d{4}\.\d{5}\b", token.string))
                for inside in re.findall(r"\[([A-Z][\w-]*[A-Za-z][^\]\n']*)\]", token.string):
                    tags.update(re.findall(r"[A-Z][\w-]*[A-Za-z]", inside))
    nodes = [node for tree in TREES.values() for node in tree.body]
    ours = {node.name for node in nodes if isinstance(node, ast.ClassDef)}      # [Latents, ...]
    return {tag for tag in tags if "_" not in tag} - ours - {"False", "True", "None"}, numbers


@pytest.mark.parametrize("name", FILES)
def test_every_paper_that_the_code_cites_stands_in_the_bibliography(name):
    bibliography = TEXTS["READING.md"].split("## Bibliography")[1]
    tags, numbers = tags_and_numbers(name)
    for number in numbers:
        assert number in bibliography, f"{name} cites {number}"
    for tag in tags:
        assert tag.removesuffix("-XL") in bibliography, f"{name} cites [{tag}]"
