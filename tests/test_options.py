"""Laws of the options: what cannot be is refused in one line; a recipe and a first stage
hand on what fits; a resumed run stays the run it was."""
import ast
import dataclasses
import inspect
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import running.options
import train
from conftest import status
from plumbing.checkpoint import save_atomic
from plumbing.console import UserError
from running.options import (TOPICS, Options, check, describe_entry, flag_name, options_parser,
                             resolve_options)
from running.recipes import RECIPES, recipe_options

pytestmark = pytest.mark.usefixtures("narrow")

TINY = ["--size", "16", "--patch", "8", "--batch", "8", "--threads", "1", "--val", "0.2",
        "--workers", "0"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Forty small pictures in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / ("day" if i % 2 else "night") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return str(folder)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(s, handler)


def go(photos, *arguments):
    train.main(["--data", photos, *TINY, *map(str, arguments)])


def read(path):
    return torch.load(path, weights_only=True)


def config(run):
    return read(f"{run}/last.pt")["config"]


def parse(arguments):
    return vars(options_parser(Options, "").parse_args(arguments))


# --- refusals -----------------------------------------------------------------------------

RECONSTRUCT = ["--objective", "reconstruct", "--decoder", "1", "--mask", "0.5"]
REFUSED = [
    ["--data", ""], ["--data", "nowhere"], ["--val", ""], ["--val", "2"], ["--val", "nowhere"],
    ["--patch", "5"], ["--patch", "0"], ["--patch", "-8"], ["--fraction", "0"],
    ["--workers", "-1"], ["--labels", "--data", "FLAT"],
    ["--dry-run", "--labels", "--data", "FLAT"],
    ["--space", "latent"], ["--vae", "vae.pt"], ["--space", "latent", "--vae", "nowhere.pt"],
    ["--latents", "x"], ["--out", ""],
    ["--space", "latent", "--vae", "vae.pt", "--latents", "x", "--no-cache-latents"],
    ["--task", "superres", "--space", "latent", "--vae", "vae.pt", "--latents", "x"],
    ["--task", "superres", "--space", "latent", "--vae", "vae.pt", "--no-cache-latents"],
    ["--decoder", "-1"], ["--economy", "route", "--skips"],

    ["--mask", "1"], ["--mask", "-0.1"], ["--mask-from", "2", "--ramp", "linear"],
    ["--ramp", "linear"], ["--mask-from", "0.1"],
    ["--ramp", "linear", "--mask", "0.5", "--mask-from", "0.5"],
    ["--policy", "block"], ["--block", "0"], ["--block", "2"], ["--economy", "route"],

    ["--weighting", "ddm", "--predict", "unit"],

    ["--recon", "-1"], ["--recon", "0.1"], ["--recon", "0.1", "--decoder", "1"],
    ["--economy", "defer", "--decoder", "1", "--mask", "0.5", "--recon", "0.1"],
    ["--recon-target", "noisy"],
    [*RECONSTRUCT[:2], "--mask", "0.5"], [*RECONSTRUCT[:4]], [*RECONSTRUCT[:4], "--mask", "0.1"],
    [*RECONSTRUCT, "--mask-from", "0", "--ramp", "linear"], [*RECONSTRUCT, "--recon", "0.1"],
    [*RECONSTRUCT, "--recon-target", "noisy"], [*RECONSTRUCT, "--predict", "v"],
    [*RECONSTRUCT, "--schedule", "edm"], [*RECONSTRUCT, "--time-sampling", "lognormal"],
    [*RECONSTRUCT, "--weighting", "ddm"], [*RECONSTRUCT, "--economy", "defer"],
    [*RECONSTRUCT, "--task", "superres"],
    [*RECONSTRUCT, "--gray", "--patch", "1", "--recon-target", "whitened"],
    ["--task", "superres", "--size", "18", "--patch", "3"], ["--targets", "FLAT"],
    ["--task", "saliency", "--data", "FLAT"],
    ["--task", "edges", "--data", "faces", "--targets", "FLAT"],
    ["--label-dropout", "0.3"], ["--label-dropout", "2", "--labels"],

    ["--batch", "0"], ["--batch", "9", "--micro-batch", "4"], ["--steps", "0"],
    ["--cache-gb", "-1"], ["--keep", "-1"], ["--workers", "9999"],
    ["--steps", "9" * 17], ["--minutes", "1e15"], ["--minutes", "0"], ["--minutes", "nan"],
    ["--lr", "0"], ["--lr", "nan"], ["--clip", "inf"],
    ["--wd", "-1"], ["--ema", "1"], ["--lr-end", "2"], ["--amp", "fp16"],

    ["--steps", "2", "--minutes", "1"], ["--mask", "0.01"],
    ["--recipe", "maskdit"], ["--save-every", "0"], ["--seed", "-1"], ["--threads", "100000"],
    ["--device", "cuda:99"], ["--device", "foo"], ["--out", "FILE/x"], ["--out", "runs/latest"],
]


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_cannot_be_is_refused_in_one_line_before_any_work(photos, arguments, capsys):
    Path("file").write_text("x")
    places = {"FLAT": str(Path(photos) / "day"), "FILE/x": "file/x"}
    arguments = [places.get(a, a) for a in arguments]
    given = ["--data", photos, *TINY, "--steps", "1", "--out", "runs/a", *arguments]
    assert status(train, given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert not Path("runs").exists()


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=str)
@pytest.mark.parametrize("name, content", [
    ("000100.pt", "other weights"), ("config.json", '{"name": "other"}'), ("config.json", "3"),
    ("config.json", "no json")])
def test_a_folder_with_files_of_others_is_no_place_for_a_run(photos, name, content, resume,
                                                             capsys):
    Path("mine").mkdir()
    Path("mine", name).write_text(content)
    given = ["--data", photos, *TINY, "--steps", "1", "--out", "mine", *resume]
    assert status(train, given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "mine" in error
    assert [path.name for path in Path("mine").iterdir()] == [name]
    assert Path("mine", name).read_text() == content


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(photos):
    for text in ("", '{"stage": "train"}'):
        Path("begun").mkdir(exist_ok=True)
        Path("begun/config.json").write_text(text)
        assert resolve_options(Options, dict(data=photos, out="begun", resume=True))[1] is None


def refuse_lines():
    """How many lines of running/options.py's topics refuse something."""
    calls = 0
    for name, function in inspect.getmembers(running.options, inspect.isfunction):
        if name.startswith("check_") and name not in ("check_values", "check_same_run"):
            tree = ast.parse(inspect.getsource(function))
            calls += sum(isinstance(node, ast.Call) and getattr(node.func, "id", "") == "refuse"
                         for node in ast.walk(tree))
    return calls


def test_every_refusal_can_happen_and_says_so_in_one_line(monkeypatch):
    """Each line that refuses is reached by one of the cases above, and by no default."""
    reached = {}

    def watch(condition, why):
        reached[why] = reached.get(why, False) or bool(condition)

    monkeypatch.setattr(running.options, "refuse", watch)
    monkeypatch.setattr(running.options, "check_values", lambda o: None)      # has tests of its own
    for o in (Options(), finetune.TuneOptions()):
        check(o)
    assert reached and not any(reached.values())
    parsed = [arguments for arguments in REFUSED if "" not in arguments]    # argparse's own refusal
    for given in [parse(arguments) for arguments in [*parsed, ["--recipe", "ddm"]]]:
        check(Options(**recipe_options(given.get("recipe"), "train", given)))
    assert len(reached) == refuse_lines() > 40
    for why, happened in reached.items():
        assert happened and "\n" not in why and "--" in why, why


CHOSEN = [f for f in dataclasses.fields(finetune.TuneOptions) if f.metadata["choices"]]


@pytest.mark.parametrize("f", CHOSEN, ids=lambda f: f.name)
@pytest.mark.parametrize("value", ["dmd", 3, ["drop"]])
def test_a_name_that_no_registry_knows_is_refused_with_the_names_it_knows(f, value):
    with pytest.raises(UserError, match=f"^{flag_name(f)} ") as error:
        check(finetune.TuneOptions(**{f.name: value}))
    assert all(name in str(error.value) for name in f.metadata["choices"])
    for name in f.metadata["choices"]:
        running.options.check_values(finetune.TuneOptions(**{f.name: name}))


@pytest.mark.parametrize("given", [
    dict(steps="ten"), dict(steps=2.5), dict(batch=True), dict(size=None), dict(lr="0.1"),
    dict(lr=None), dict(mask=False), dict(mask_from=[0.5]), dict(gray="no"), dict(labels=1)],
    ids=str)
def test_a_number_that_is_none_is_refused_by_name(given):
    flag = "--" + next(iter(given)).replace("_", "-")
    with pytest.raises(UserError, match=f"^{flag} .*must be"):
        check(Options(**given))


def test_a_number_of_numpys_is_a_number():
    check(Options(steps=np.int64(3), lr=np.float32(0.1), minutes=None, warmup=0, wd=1))


def test_train_refuses_an_unknown_name_before_it_makes_a_folder(capsys):
    with pytest.raises(UserError, match="--policy stripes"):
        train.train(Options(policy="stripes", steps=1, out="runs/a"))
    assert not Path("runs").exists()


# --- help ---------------------------------------------------------------------------------

def test_help_says_what_the_second_stage_inherits(capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    said = said.replace("resized to this side", "the side")
    assert "the side (default: the first stage's)" in said and "(default: faces)" not in said


@pytest.mark.parametrize("options", [Options, finetune.TuneOptions])
def test_help_groups_every_option_under_its_topic_in_80_columns(options, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = options_parser(options, "")
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 80
    sections = [text.index(f"\n{topic}:\n  {about}") for topic, about in TOPICS.items()]
    assert sections == sorted(sections)
    for f in dataclasses.fields(options):
        topics = list(TOPICS)
        k = topics.index(f.metadata["topic"])
        end = sections[k + 1] if k + 1 < len(sections) else len(text)
        assert f"\n  {flag_name(f)}" in text[sections[k]:end]
        for name in f.metadata["choices"] or ():
            assert name in text[sections[k]:end]


def test_an_entry_is_described_by_its_own_words_and_never_by_its_class(monkeypatch):
    class Plain:
        """What all instances are."""

    class Told:
        """The same for both."""
        def __init__(self, doc):
            self.doc = doc

    def works():
        """Half of 50 % is gone. And more.

        And more."""

    registry = dict(a=works, b=Plain(), c=Plain(), d=Told("first\nsecond"), e=Told(""), f=lambda: 0)
    told = {name: describe_entry(entry, registry) for name, entry in registry.items()}
    assert told == dict(a="Half of 50 % is gone", b="", c="", d="first", e="", f="")
    monkeypatch.setitem(running.options.POLICIES, "half", works)            # and argparse prints it
    assert "half: Half of 50 % is gone\n" in options_parser(Options, "").format_help()


# --- recipes ------------------------------------------------------------------------------

STAGES = [(name, stage) for name, stages in RECIPES.items() for stage in stages]


@pytest.mark.parametrize("recipe, stage", STAGES)
def test_a_recipe_sets_known_options_that_fit_together_and_flags_beside_it_win(recipe, stage):
    kind = {"train": Options, "finetune": finetune.TuneOptions}[stage]
    o = kind(**recipe_options(recipe, stage, {"lr": 0.5}))
    assert o.lr == 0.5 and o.steps
    assert kind(**recipe_options(recipe, stage, {"minutes": 1.0})).steps is None
    vae = "x" if o.space == "latent" else None
    check(dataclasses.replace(o, data="faces", vae=vae))
    if stage == "train":
        with pytest.raises(UserError, match="--data"):
            check(o)


def test_maskdits_second_stage_is_at_half_the_rate_and_ddms_does_not_exist(photos):
    rates = [RECIPES["maskdit"][stage]["lr"] for stage in ("train", "finetune")]
    assert rates[1] == rates[0] / 2
    own = ["--recipe", "ddm", "--model", "tiny", "--out", "runs/a"]
    go(photos, *own, "--steps", 2)
    c = config("runs/a")
    assert (c["recipe"], c["weighting"], c["size"], c["lr"]) == ("ddm", "ddm", 16, 1e-4)
    go(photos, *own, "--steps", 3, "--resume")
    assert read("runs/a/last.pt")["step"] == 3
    with pytest.raises(UserError, match="--recipe maskdm"):
        go(photos, "--recipe", "maskdm", "--out", "runs/a", "--resume")
    with pytest.raises(UserError, match="no second stage"):
        finetune.main(["--recipe", "ddm"])
    finetune.main(["--recipe", "maskdit", "--steps", "1", "--batch", "8", "--out", "runs/b"])
    c = config("runs/b")
    assert (c["lr"], c["amp"], c["schedule"], c["data"]) == (5e-5, "off", "ddm", photos)


# --- resume -------------------------------------------------------------------------------

@pytest.mark.parametrize("change, word", [
    (["--batch", "16"], "--batch"), (["--mask", "0.3"], "--mask"), (["--steps", "2"], "--steps"),
    (["--minutes", "9"], "--minutes")])
def test_a_resume_that_would_be_another_run_is_refused_by_name(photos, change, word):
    train.main(["--data", photos, *TINY, "--steps", "3", "--out", "runs/a"])
    with pytest.raises(UserError, match=word):
        train.main(["--out", "runs/a", "--resume", *change])


def test_a_resumed_run_of_minutes_does_not_take_its_recipes_steps_for_the_users(photos):
    go(photos, "--steps", 2, "--out", "runs/a")
    ckpt = read("runs/a/last.pt")
    ckpt["config"] |= dict(recipe="ddm", steps=None, minutes=60.0)
    ckpt["meta"]["plan"] = 10**8                                 # more than the recipe's steps
    save_atomic(ckpt, Path("runs/a/last.pt"))
    o, _ = resolve_options(Options, dict(recipe="ddm", out="runs/a", resume=True))
    assert (o.minutes, o.steps) == (60.0, None)


def test_an_existing_run_is_not_overwritten(photos):
    go(photos, "--steps", 2, "--out", "runs/a")
    with pytest.raises(UserError, match="--resume"):
        go(photos, "--steps", 2, "--out", "runs/a")
    with pytest.raises(UserError, match="train.py"):
        finetune.main(["--out", "runs/a", "--resume"])


def test_a_checkpoint_from_before_an_option_existed_goes_on_with_its_default(photos):
    go(photos, "--steps", 2, "--out", "runs/a")
    ckpt = read("runs/a/last.pt")
    for name in ("economy", "recipe", "dry_run"):
        del ckpt["config"][name]
    del ckpt["meta"]["model"]["economy"]
    save_atomic(ckpt, Path("runs/a/last.pt"))
    finetune.main(["--steps", "1", "--out", "runs/b", "--economy", "drop"])
    with pytest.raises(UserError, match="--economy"):
        go(photos, "--steps", 3, "--out", "runs/a", "--resume", "--economy", "route")
    go(photos, "--steps", 3, "--out", "runs/a", "--resume", "--economy", "drop")


def test_a_checkpoint_with_an_option_that_is_gone_goes_on_without_it(photos):
    go(photos, "--steps", 1, "--out", "runs/a")
    finetune.main(["--steps", "1", "--out", "runs/b"])
    ckpt = read("runs/b/last.pt")
    ckpt["config"] |= dict(probe=False, probe_noise=None)               # as finetune.py had them
    save_atomic(ckpt, Path("runs/b/last.pt"))
    finetune.main(["--out", "runs/b", "--resume", "--steps", "2"])
    assert read("runs/b/last.pt")["step"] == 2 and "probe" not in config("runs/b")
    finetune.main(["--from", "runs/b", "--steps", "1", "--out", "runs/c"])


# --- what the second stage inherits -------------------------------------------------------

INHERITS = [
    (dict(size=64, seed=5), {}, dict(size=64, seed=5)),
    (dict(mask=0.9, lr=0.1, steps=7, ema=0.5, recon=0.1, decoder=1), {},
     dict(mask=0.0, lr=2e-3, steps=None, ema=0.999, recon=0.0, decoder=1)),
    (dict(data="d", val="v"), {}, dict(data="d", val="v")),
    (dict(data="d", val="v"), dict(data="e"), dict(data="e", val="auto")),
    (dict(task="edges", data="d", targets="m"), {}, dict(task="edges", targets="m")),
    (dict(task="edges", data="d", targets="m"), dict(data="e"), dict(task="edges", targets=None)),
    (dict(task="edges", data="d", targets="m"), dict(task="saliency"), dict(targets=None)),
    (dict(labels=True, label_dropout=0.3), {}, dict(labels=True, label_dropout=0.3)),
    (dict(labels=True, label_dropout=0.3), dict(labels=False), dict(label_dropout=0.1)),
    (dict(mask=0.5, policy="block", block=2), {}, dict(policy="patch", block=4)),
    (dict(mask=0.5, policy="block", block=2), dict(mask=0.5), dict(policy="block", block=2)),
    (dict(mask=0.5, policy="block", block=2), dict(mask_from=0.5), dict(policy="block", block=2)),
    (dict(mask=0.5, policy="block", block=2), dict(mask=0.5, policy="crop"),
     dict(policy="crop", block=4)),
    (dict(recon_target="noisy"), {}, dict(recon_target="clean")),
    (dict(recon_target="noisy"), dict(recon=0.1), dict(recon_target="noisy")),
    (dict(objective="reconstruct", recon_target="whitened"), {}, dict(recon_target="whitened")),
    (dict(latents="l"), {}, dict(latents="l", cache_latents=True)),
    (dict(latents="l"), dict(cache_latents=False), dict(latents="runs/latents")),
    (dict(data="d", fraction=0.1), {}, dict(fraction=0.1)),
    (dict(data="d", fraction=0.1), dict(data="e"), dict(fraction=1.0)),
    (dict(latents="l", cache_latents=False), dict(task="superres"),
     dict(latents="runs/latents", cache_latents=True)),
]


@pytest.mark.parametrize("was, chosen, expected", INHERITS)
def test_an_option_is_inherited_as_long_as_what_it_goes_with_stays(was, chosen, expected):
    o = finetune.TuneOptions(**(finetune.inherit_options(Options(**was), chosen) | chosen))
    assert {name: getattr(o, name) for name in expected} == expected


def test_the_second_stage_forgets_blocks_with_their_policy(photos):
    go(photos, "--steps", 1, "--mask", 0.5, "--policy", "block", "--block", 2, "--out", "runs/a")
    finetune.main(["--from", "runs/a", "--steps", "1", "--policy", "patch", "--mask", "0.5",
                   "--out", "runs/b"])
    assert config("runs/b")["policy"] == "patch"


def test_a_stage_without_hidden_tokens_forgets_the_policy_and_refuses_a_new_one(photos):
    go(photos, "--policy", "block", "--block", 2, "--mask", 0.5, "--steps", 1, "--out", "runs/a")
    finetune.main(["--steps", "1", "--mask", "0.5", "--out", "runs/b"])
    finetune.main(["--from", "runs/a", "--steps", "1", "--out", "runs/c"])
    kept = [(config(f"runs/{run}")["policy"], config(f"runs/{run}")["block"]) for run in "bc"]
    assert kept == [("block", 2), ("patch", 4)]
    with pytest.raises(UserError, match="--policy"):
        finetune.main(["--from", "runs/a", "--steps", "1", "--policy", "crop", "--out", "runs/d"])


def test_finetune_refuses_what_does_not_fit(photos):
    go(photos, "--steps", 2, "--out", "runs/a")
    for arguments, word in ((["--patch", "4"], "--patch"), (["--predict", "eps"], "--predict"),
                            (["--model", "small"], "--model"), (["--gray"], "does not fit"),
                            (["--from", "nowhere"], "does not exist")):
        with pytest.raises(UserError, match=word):
            finetune.main(["--steps", "2", *arguments])
