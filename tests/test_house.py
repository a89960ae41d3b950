"""Laws of the house: which file may import which, and how a file is written.

The house is known by the names below. A script of your own in the root is no part of it and
breaks no law.
"""
import ast
import ctypes
import os
import re
import subprocess
import sys
import textwrap
import tokenize

import pytest

from conftest import ROOT

IDEAS = ["mask", "schedules", "losses", "vit", "vae", "spaces", "tasks", "data", "sample",
         "restore", "fid"]
COMMANDS = ["train", "finetune", "probe"]
# A file imports from its left or from its own group.
GROUPS = ["plumbing", "ideas", "running", "commands", "claims", "reproduce"]
# The last one is optional and is imported where it is needed.
PACKAGES = {"torch", "numpy", "einops", "tqdm", "PIL", "scipy", "safetensors"}
LIBRARY = ["mask", "schedules", "losses", "vit", "spaces", "tasks", "plumbing.faces",
           "plumbing.sheets"]


def house():
    """Every module of the house: {dotted name: its group}."""
    known = {name: "ideas" for name in IDEAS} | {name: "commands" for name in COMMANDS}
    known["reproduce"] = "reproduce"
    for folder in ("plumbing", "running", "claims"):
        for path in sorted((ROOT / folder).glob("*.py")):
            known[folder if path.stem == "__init__" else f"{folder}.{path.stem}"] = folder
    return known


HOUSE = house()


def path_of(name):
    """The file of a module of the house."""
    file = ROOT / f"{name.replace('.', '/')}.py"
    return file if file.exists() else ROOT / name.replace(".", "/") / "__init__.py"


FILES = [name for name in HOUSE if path_of(name).name != "__init__.py"]
TREES = {name: ast.parse(path_of(name).read_text()) for name in FILES}


def imported_modules(tree):
    """Every module that a file imports, at its top or inside of a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:                                            # a module, perhaps
                name = f"{node.module}.{alias.name}"
                yield name if name in HOUSE else node.module


# --- the arrows ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["sample", "restore", "fid", "vae", *COMMANDS, "reproduce"])
def test_a_command_imports_plumbing_before_torch(name):
    """It says how OpenMP's threads wait, and torch reads that when it is imported."""
    while name != "plumbing":
        imports = [n for n in TREES[name].body if isinstance(n, (ast.Import, ast.ImportFrom))]
        modules = [n.names[0].name if isinstance(n, ast.Import) else n.module for n in imports]
        name = next(m for m in modules if m.split(".")[0] not in sys.stdlib_module_names)
        assert name in TREES or name == "plumbing", f"{name} comes first"



def test_at_most_fifteen_modules_stand_in_the_root():
    names = [name for name in HOUSE if "." not in name and (ROOT / f"{name}.py").exists()]
    assert len(names) <= 15 and set(IDEAS + COMMANDS + ["reproduce"]) == set(names)


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_from_its_left_or_its_own_group_and_allowed_packages(name):
    for other in imported_modules(TREES[name]):
        if other in HOUSE:
            here, there = GROUPS.index(HOUSE[name]), GROUPS.index(HOUSE[other])
            assert there <= here, f"{name} imports {other}"
        else:
            top = other.split(".")[0]
            allowed = top in PACKAGES or top in sys.stdlib_module_names
            assert allowed, f"{name} imports {other}, which is no part of the house"


def test_no_modules_import_each_other_in_a_circle():
    arrows = {name: set(imported_modules(TREES[name])) & set(FILES) - {name} for name in FILES}
    while leaves := [name for name, others in arrows.items() if not others]:
        arrows = {name: others - set(leaves) for name, others in arrows.items()
                  if name not in leaves}
    assert not arrows, f"a circle among {sorted(arrows)}"


@pytest.mark.parametrize("name", LIBRARY)
def test_library_code_reads_no_arguments_chooses_no_device_and_owns_no_global_randomness(name):
    """ViT's first weights aside: they are drawn as torch's own layers draw theirs."""
    source = path_of(name).read_text().split('if __name__ == "__main__"')[0]
    for forbidden in ("sys.argv", "argparse", "manual_seed(0)", "torch.cuda", "np.random.seed",
                      "torch.seed"):
        assert forbidden not in source, forbidden


# --- what stands at the top ---------------------------------------------------------------

@pytest.mark.parametrize("name", FILES)
def test_every_file_opens_with_its_idea(name):
    docstring = ast.get_docstring(TREES[name])
    assert docstring and len(docstring.splitlines()) >= 5


@pytest.mark.parametrize("name", [name for name in IDEAS if name != "data"])
def test_every_idea_names_its_paper_and_its_shapes(name):
    docstring = ast.get_docstring(TREES[name])
    assert re.search(r"\b\d{4}\.\d{5}\b", docstring), "no arXiv number"
    assert "Shapes:" in docstring or "(B, " in docstring, "no legend of shapes"


def public_definitions(tree):
    """The functions and classes at the top of a file that others may use."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if node.name not in ("main", "parser"):
                yield node


@pytest.mark.parametrize("name", FILES)
def test_public_functions_and_classes_say_what_they_do(name):
    for node in public_definitions(TREES[name]):
        assert ast.get_docstring(node) or len(node.body) == 1, f"{name}: {node.name}"


def test_no_two_public_functions_share_a_name():
    where = {}
    for name in FILES:
        for node in public_definitions(TREES[name]):
            where.setdefault(node.name, []).append(name)
    twice = {word: places for word, places in where.items() if len(places) > 1}
    assert not twice


# --- how it is written --------------------------------------------------------------------

CODE, PROSE = 100, 92                                           # columns
LINES, NAMES, LOOP = 45, 25, 20
EXEMPT = {"parser", "draw_chunk"}                               # lists of flags, faces


def prose_lines(path):
    """The numbers of all lines that hold nothing but a comment or a part of a docstring."""
    numbers = set()
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT and not token.line[:token.start[1]].strip():
                numbers.add(token.start[0])
    for node in ast.walk(ast.parse(path.read_text())):
        has_docstring = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if has_docstring and ast.get_docstring(node):
            numbers.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return numbers


WRITTEN = [*map(path_of, FILES), *(ROOT / "assets").glob("*.py"), *(ROOT / "tests").glob("*.py")]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_has_at_most_100_columns_and_prose_at_most_92(path):
    prose, lines = prose_lines(path), enumerate(path.read_text().splitlines(), 1)
    long = [i for i, line in lines if len(line) > (PROSE if i in prose else CODE)]
    assert not long, f"lines {long}"


def body_after_docstring(function):
    """The statements of a function that are not its docstring."""
    return function.body[bool(ast.get_docstring(function)):]


def count_lines(path, statements):
    """How many lines statements have, with comments and without empty lines."""
    source = path.read_text().splitlines()
    block = source[statements[0].lineno - 1:statements[-1].end_lineno]
    return sum(bool(line.strip()) for line in block)


def own_nodes(statements):
    """All nodes below these statements, without nested functions and comprehensions."""
    for node in statements:
        yield node
        inner = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp,
                 ast.DictComp, ast.GeneratorExp)
        if not isinstance(node, inner):
            yield from own_nodes(ast.iter_child_nodes(node))


def local_names(function):
    """The names that a function binds itself. Its arguments are not among them."""
    names = set()
    for node in own_nodes(function.body):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    arguments = ast.walk(function.args)
    return names - {node.arg for node in arguments if isinstance(node, ast.arg)}


def functions_of(name):
    """All functions of a file, also methods and nested ones; not the exempt."""
    return [node for node in ast.walk(TREES[name])
            if isinstance(node, ast.FunctionDef) and node.name not in EXEMPT]


@pytest.mark.parametrize("name", FILES)
def test_a_function_has_at_most_45_lines_and_25_local_names(name):
    for function in functions_of(name):
        count = count_lines(path_of(name), body_after_docstring(function) or function.body)
        assert count <= LINES, f"{name}.{function.name} has {count} lines"
        names = local_names(function)
        assert len(names) <= NAMES, f"{name}.{function.name} has {len(names)}: {sorted(names)}"


@pytest.mark.parametrize("name", FILES)
def test_the_body_of_a_loop_has_at_most_20_lines(name):
    for function in functions_of(name):
        for node in own_nodes(function.body):
            if isinstance(node, (ast.For, ast.While)):
                count = count_lines(path_of(name), node.body)
                assert count <= LOOP, f"{name}.{function.name}, line {node.lineno}: {count} lines"


@pytest.mark.parametrize("name", FILES)
def test_more_than_five_arguments_stand_one_a_line(name):
    for function in (node for node in TREES[name].body if isinstance(node, ast.FunctionDef)):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        if len(arguments) > 5 and not function.name.startswith("_"):
            lines = {argument.lineno for argument in arguments}
            assert len(lines) == len(arguments), f"{name}.{function.name}"


def test_requirements_name_the_allowed_packages_and_no_others():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {re.split(r"[<>=]", line)[0] for line in lines}
    assert names == {"torch", "numpy", "einops", "tqdm", "pillow", "scipy", "pytest", "hypothesis"}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not GNU's malloc")
def test_memory_that_a_step_gives_back_stays_in_the_process():
    """Sixty-four megabytes are 16,384 pages. Taken and given back again and again, they are
    asked of the system a few times, not always: that is when a page is touched first."""
    code = """
        import plumbing, resource, torch
        def touch():
            torch.ones(2 ** 24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        first = [touch() for _ in range(40)][-1]
        print([touch() for _ in range(20)][-1] - first)
    """
    clean = {k: v for k, v in os.environ.items()
             if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=clean,
                          capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 * 16384 / 4
