"""Claims run from nothing to a table, and what was done is not done again."""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import claims.ablate
import claims.bench
import claims.ddm
import claims.lmd
import claims.maskdit
import claims.maskdm
import claims.tasks
import claims.transfer
import data
import finetune
import reproduce
import running.setup
import train
import vae
import vit
from plumbing.console import UserError
from running.options import check, options_parser

TINY = dict(width=32, depth=2, heads=2, decoder_width=32)
TRAIN = ["--batch", 2]
SCALES = {
    claims.ddm: dict(steps=2, short=1, rates=[1e-3, 2e-3], model="tiny", train=TRAIN, batch=12,
                     n=8, few=8, calls=[1, 2], ddpm=[2], long=[3]),
    claims.tasks: dict(steps=2, minutes=(1, 1), model="tiny", train=TRAIN, n=4, calls=[1, 2],
                       batch=4),
    claims.maskdm: dict(steps=4, lengths=[0.5, 1], fine=[1], sweep=0.5, rates=[1e-3, 2e-3],
                        model="tiny", train=TRAIN, small=["--patch", 2], n=4, batch=10),
    claims.transfer: dict(steps=2, pre=1, tune=1, model="tiny", train=TRAIN, n=4, batch=10),
    claims.lmd: dict(steps=5, minutes=1, vae=["--steps", 1, *TRAIN], model="tiny", train=TRAIN,
                     fifths=[5]),
    claims.ablate: dict(steps=4, minutes=1, model="tiny", train=TRAIN, n=4, batch=10),
    claims.maskdit: dict(steps=4, minutes=1, short=0.5, model="tiny", train=TRAIN, rates=[1e-3],
                         recon=[0.01, 0.1], n=6, batch=12),
}


def load_few(source, *args, **how):
    """As data.load_images, but of the built-in faces only forty."""
    few = dict(count=40) if source == "faces" else {}
    return data.load_images(source, *args, **how | few)


def difference_of_means(a, b):
    """A distance that costs nothing."""
    value = abs(float(a.float().mean() - b.float().mean()))
    return {name: (value, 0.0) for name in ("pixel", "random-conv", "swd")}


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    """Forty faces, networks of two narrow blocks, trained for four steps. -> the claims'
    folder"""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for module in (running.setup, claims.bench, vae):
            patch.setattr(module, "load_images", load_few)
        patch.setattr(claims.bench, "proxy_distances", difference_of_means)
        patch.setitem(vit.MODELS, "tiny", TINY)
        patch.setitem(vit.MODELS, "tiny-dit", TINY)
        for module, scale in SCALES.items():
            patch.setitem(module.SCALES, "smoke", scale)
        few = ("recipe", "all-tokens", "before")                    # of the ablation's arms
        patch.setattr(claims.ablate, "ARMS", {name: claims.ablate.ARMS[name] for name in few})
        patch.chdir(home)
        yield home / "runs" / "reproduce-smoke"


def run_claim(claim, *flags):
    reproduce.main([claim, "--scale", "smoke", "--size", "16", "--threads", "1", *flags])


@pytest.fixture
def finished(tiny_world):
    """A claim's name -> its folder, after a smoke run that all tests share."""
    def finish(claim):
        if not (tiny_world / claim / "table.md").exists():
            run_claim(claim)
        return tiny_world / claim
    return finish


@pytest.mark.parametrize("claim", reproduce.CLAIMS)
def test_a_claim_makes_a_table_and_pictures_and_a_second_call_trains_and_measures_nothing(
        claim, finished, monkeypatch):
    folder = finished(claim)
    cells = json.loads((folder / "cells.json").read_text())
    table = (folder / "table.md").read_text()
    assert len(cells) >= 3 and table.count("|") > 20 and "nan" not in table
    for picture in folder.glob("*.png"):
        assert Image.open(picture).size[0] > 100
    assert list(folder.glob("*.png"))
    (folder / "table.md").unlink()
    # Now a step of training would fail, and a measurement, too.
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(claims.bench, "proxy_distances", None)
    run_claim(claim)
    assert (folder / "table.md").read_text() == table
    assert json.loads((folder / "cells.json").read_text()) == cells


def test_one_arm_is_trained_by_itself(tiny_world, tmp_path):
    run_claim("ddm", "--arm", "ddm-unit", "--out", str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "ddm").iterdir()) == [
        "ddm-unit", "ddm-unit-rate-0.001", "ddm-unit-rate-0.002"]
    with pytest.raises(UserError, match="--arm no-such: the arms of ddm are .*ddm-unit"):
        run_claim("ddm", "--arm", "no-such", "--out", str(tmp_path))


@pytest.mark.parametrize("claim", reproduce.CLAIMS)
def test_a_wrong_arm_costs_nothing(claim, tiny_world, tmp_path, monkeypatch):
    # Neither a step of training, nor one that is only timed, nor an autoencoder.
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(vae, "main", None)
    for scale in ("smoke", "cpu"):
        with pytest.raises(UserError, match="--arm no-such"):
            reproduce.main([claim, "--scale", scale, "--arm", "no-such", "--out", str(tmp_path),
                            *(["--target", "faces"] if claim == "transfer" else [])])


def test_every_seed_has_arms_of_its_own_and_all_share_what_a_step_costs(tmp_path):
    done = []

    def command(flags):
        done.append(dict(zip(flags[::2], flags[1::2])))

    def run(*flags):
        args = reproduce.parser().parse_args(["ddm", "--seed", "3", "--out", str(tmp_path), *flags])
        first = claims.bench.Bench("ddm", args, {})
        first.time_network = lambda name, flags: 0.25
        for bench in first.benches:
            bench.train_arm("arm", command, "--x", bench.seconds_per_step({"net": []})["net"])
        return first

    assert run("--seeds", "2").all_trained()
    wanted = [("3", tmp_path / "ddm" / "arm"), ("4", tmp_path / "ddm" / "seed-4" / "arm")]
    assert [(flags["--seed"], Path(flags["--out"])) for flags in done] == wanted
    assert {flags["--x"] for flags in done} == {"0.25"}
    assert not run("--seeds", "2", "--arm", "seed-4/arm").all_trained()
    assert len(done) == 3 and done[2] == done[1]
    with pytest.raises(UserError, match="--arm seed-4/arm: the arms of ddm are arm"):
        run("--arm", "seed-4/arm").all_trained()


def test_several_seeds_are_a_mean_and_half_of_the_range():
    cells = [dict.fromkeys(("pixel", "random-conv", "swd"), [value, 0.5]) for value in (1.0, 1.5)]
    assert claims.bench.format_distances(cells) == " / ".join(["1.25 ± 0.25"] * 3)
    assert claims.bench.format_distances(cells[0]) == "1 / 1 / 1"


def test_a_target_is_asked_for_and_refused_where_nothing_reads_it(tmp_path):
    with pytest.raises(UserError, match="--target: transfer needs a second set"):
        reproduce.main(["transfer", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--target: only transfer"):
        reproduce.main(["ddm", "--target", "faces", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--target nowhere: there is no such"):
        reproduce.main(["transfer", "--target", "nowhere", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@given(lengths=st.lists(st.floats(1, 100), min_size=2, max_size=5, unique=True).map(sorted),
       power=st.floats(0.1, 2), factor=st.floats(1.01, 4))
def test_a_method_that_is_k_times_faster_has_a_speed_up_of_k(lengths, power, factor):
    # Distances that fall with the logarithm of time are met exactly by the interpolation.
    curve = [10 - power * math.log(minutes) for minutes in lengths]
    faster = [10 - power * math.log(factor * minutes) for minutes in lengths]
    speed_up = claims.bench.measure_speed_up
    found = speed_up((lengths, curve), (lengths, faster))
    largest = lengths[-1] / lengths[0]              # more than that, the curve cannot show
    assert found == pytest.approx(min(factor, largest), rel=1e-6)
    assert speed_up((lengths, curve), (lengths, curve)) == pytest.approx(1)
    assert speed_up((lengths, faster), (lengths, curve)) == 0               # never as good


def test_a_speed_up_knows_floors_and_how_far_seeds_differ():
    def cells(all_tokens, masked):
        curves = {"all-tokens": all_tokens, "masked": masked}
        return {f"{arm}-{minutes:g}": [dict.fromkeys(("pixel", "random-conv", "swd"), [value, 2.0])]
                for arm, values in curves.items() for minutes, value in zip((1, 2, 4), values)}

    bench = argparse.Namespace(scale=dict(lengths=[1, 2, 4], fine=[]))

    def found(*curves):
        return list(claims.maskdm.list_speed_ups([bench], cells(*curves), False).values())

    assert found([4, 3, 1.0], [4, 3, 1.9]) == [[1.0]] * 3           # both are at the floor
    assert found([4, 3, 2.0], [4, 3, 2.04]) == [[pytest.approx(1.0, abs=0.1)]] * 3
    assert found([4, 3, 2.0], [4, 3, 2.4]) == [[0.0]] * 3           # seeds differ by less


def test_an_end_branches_off_a_run_that_has_warmed_up(finished):
    for claim, trunks in (("maskdm", ("masked", "all-tokens")), ("maskdit", claims.maskdit.ARMS)):
        for trunk in trunks:
            config = json.loads((finished(claim) / trunk / "config.json").read_text())
            assert config["warmup"] <= config["save_every"] / 10 and config["keep"] == 0


def test_a_curve_that_gets_worse_again_counts_by_its_best():
    reach = claims.bench.time_to_reach
    assert reach([1, 2, 4, 8], [9, 5, 6, 4], 5) == 2
    assert reach([1, 2, 4, 8], [9, 5, 6, 4], 4.5) == pytest.approx(4 * 2 ** 0.5)


def test_a_speed_up_that_nobody_can_know_is_none():
    measure, lengths = claims.bench.measure_speed_up, [1, 2, 4]
    assert np.isnan(measure((lengths, [5, 5, 5]), (lengths, [5, 5, 5])))
    assert np.isnan(measure((lengths, [5, 6, 6]), (lengths, [7, 5, 5])))
    assert measure((lengths, [5, 6, 6]), (lengths, [7, 7, 7])) == 0     # never, whenever it was
    assert measure((lengths, [7, 6, 5]), (lengths, [5, 5, 5])) == 4
    unknown = {"pixel": [np.nan], "swd": [np.nan]}
    assert "Cannot be told" in claims.maskdm.judge_speed_up(unknown)
    some = claims.maskdm.judge_speed_up(unknown | {"swd": [5.0]})
    assert "**Holds here**" in some and "in 1 of 2 it cannot be told" in some
    assert "Cannot be told" in claims.lmd.judge_ramp({"0.15": np.nan, "0.75": np.nan})
    some = claims.lmd.judge_ramp({"0.15": 3.0, "0.75": np.nan})
    assert "**Holds here**" in some and "? at 0.75" in some


def test_a_verdict_follows_its_numbers():
    one = {"pixel": [2.0, 2.5], "random-conv": [1.5], "swd": [1.2, 3.0]}
    assert "less than claimed" in claims.maskdm.judge_speed_up(one)
    assert "**Holds here**" in claims.maskdm.judge_speed_up(dict.fromkeys(one, [4.0, 9.0]))
    assert "Depends" in claims.maskdm.judge_speed_up(one | {"swd": [0.0, 3.0]})
    assert "Does not hold" in claims.maskdm.judge_speed_up(dict.fromkeys(one, [0.0, 1.0]))
    assert "never as good" in claims.maskdm.judge_speed_up(dict.fromkeys(one, [0.0]))
    near, far = ({name: [value, 0] for name in one} for value in (1.0, 2.0))
    ends = {end: [far] for end in claims.transfer.ENDS}
    assert "**Holds here**" in claims.transfer.judge_transfer(ends | {"masked-tenth": [near]})
    assert "mask's part does not" in claims.transfer.judge_transfer(
        ends | {"masked-tenth": [near], "unmasked-tenth": [near]})
    assert "Does not hold" in claims.transfer.judge_transfer(ends)
    floors = {name: {"pixel": [value, 1.5], "random-conv": [value, 0], "swd": [value, 0]}
              for name, value in (("near", 1.0), ("far", 1.4))}         # pixel: both at the floor
    ends = {end: [floors["far"]] for end in claims.transfer.ENDS}
    ends["masked-tenth"] = [floors["near"]]
    assert "**Holds here**" in claims.transfer.judge_transfer(ends)
    ends = {"half-last": [near, far], "half-early": [far, near], "all-tokens-last": [near, near]}
    assert "in 3 and better in 0 of 6" in claims.maskdit.judge_arm(ends, "half")
    ends["all-tokens-last"] = [far, near]
    verdict = claims.maskdit.judge_arm(ends, "half")
    assert "**holds here**" in verdict
    assert "In equal time it is better in 3 and worse in 3" in verdict
    assert "**Holds" in claims.lmd.judge_ramp({"0.15": 3.0, "0.75": 4.0})
    assert "less than" in claims.lmd.judge_ramp({"0.15": 3.0, "0.75": 1.5})
    assert "Does not" in claims.lmd.judge_ramp({"0.15": 3.0, "0.75": 0.0})
    ten = {0: far | {"PSNR": 25.0}, 1: far | {"PSNR": 27.0}, 10: near | {"PSNR": 24.5}}
    assert "**holds**" in claims.tasks.judge_task("superres", ten)[0]
    ten[10]["PSNR"] = 23.9                                      # more than 3 dB below one call
    assert "does not hold" in claims.tasks.judge_task("superres", ten)[0]


def test_distances_that_seeds_may_change_are_no_difference():
    def cell(value):
        return dict.fromkeys(("pixel", "random-conv", "swd"), [value, 0.0])

    count = claims.bench.count_better
    assert [count(cell(v), cell(1.0)) for v in (0.8, 0.9, 0.97, 1.03, 1.1, 1.2)] == [
        (3, 0), (2, 0), (0, 0), (0, 0), (0, 2), (0, 3)]        # random-conv differs by more


def test_a_distance_below_its_floor_is_as_good_as_its_floor():
    def cell(value):
        return dict.fromkeys(("pixel", "random-conv", "swd"), [value, 1.0])

    count = claims.bench.count_better
    assert [count(cell(v), cell(w)) for v, w in ((0.5, 0.9), (0.9, 0.5), (0.5, 2.0), (2.0, 0.5))
            ] == [(0, 0), (0, 0), (3, 0), (0, 3)]


class Measured(Exception):
    """A claim has trained all its arms and wants to measure."""


@pytest.fixture
def nothing_is_trained(monkeypatch):
    """Commands only check their flags and leave the files of a finished run.
    -> the folders of the runs, in their order"""
    done = []

    def leave_run(folder, steps, save_every):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [*range(save_every, steps + 1, save_every), steps]
        for name in ["last.pt", *(f"{step:06d}.pt" for step in kept)]:
            (folder / name).touch()
        (folder / "config.json").write_text(json.dumps(dict(steps=steps)))
        (folder / "log.csv").write_text(f"step,val_loss\n{steps},1.0\n")
        done.append(folder)

    def pretend_training(o, *rest, **how):
        check(o)
        leave_run(o.out, o.steps, o.save_every)

    def pretend_tuning(flags):
        given = vars(options_parser(finetune.TuneOptions, "", finetune.INHERITED).parse_args(flags))
        assert Path(given["from_"]).exists(), given["from_"]
        leave_run(given["out"], given["steps"], 10**9)

    def pretend_autoencoder(flags):
        vae.parser().parse_args(flags)
        Path(flags[flags.index("--out") + 1]).touch()

    def pretend_timing(bench, name, flags):
        train.main(claims.bench.call_flags([*flags, "--steps", 40,
                                            "--out", f"timing/{len(done)}"]))
        return 0.5

    def stop(*args, **how):
        raise Measured

    monkeypatch.setattr(train, "train", pretend_training)
    monkeypatch.setattr(finetune, "main", pretend_tuning)
    monkeypatch.setattr(vae, "main", pretend_autoencoder)
    monkeypatch.setattr(claims.bench.Bench, "time_network", pretend_timing)
    monkeypatch.setattr(claims.bench.Bench, "split_images", stop)
    return done


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize("claim", reproduce.CLAIMS)
def test_every_arm_of_the_real_scales_is_legal_and_trained_with_what_it_needs(
        claim, scale, tmp_path, monkeypatch, nothing_is_trained):
    monkeypatch.chdir(tmp_path)

    def run(*flags, out="all"):
        target = ["--target", "faces"] if claim == "transfer" else []
        try:
            reproduce.main([claim, "--scale", scale, "--seeds", "2", *target, *flags,
                            "--out", str(tmp_path / out)])
        except Measured:
            pass

    run()
    folder = tmp_path / "all" / claim
    arms = {str(path.relative_to(folder)) for path in nothing_is_trained if "timing" not in
            path.parts}
    assert len(arms) >= 8 and f"seed-1/{min(a for a in arms if '/' not in a)}" in arms
    for i, arm in enumerate(sorted(arms)[::3] if scale == "cpu" else []):
        run("--arm", arm, out=str(i))                           # from an empty folder
        assert tmp_path / str(i) / claim / arm in nothing_is_trained


def test_a_choice_waits_for_its_short_runs(tmp_path):
    args = reproduce.parser().parse_args(["ddm", "--out", str(tmp_path)])
    bench = claims.bench.Bench("ddm", args, {})
    for name, steps, loss in (("a", 5, 0.3), ("b", 4, 0.2)):
        (bench.folder / name).mkdir()
        (bench.folder / name / "last.pt").touch()
        (bench.folder / name / "config.json").write_text('{"steps": 5}')
        (bench.folder / name / "log.csv").write_text(f"step,val_loss\n{steps},{loss}\n")
    assert bench.choose_by_loss({1: "no such run"}) == 1    # no choice, no run
    with pytest.raises(UserError, match="b: this run is not finished.*--arm b continues it"):
        bench.choose_by_loss({1: "a", 2: "b"})
    (bench.folder / "b" / "log.csv").write_text("step,val_loss\n5,0.2\n")
    assert bench.choose_by_loss({1: "a", 2: "b"}) == 2


def test_a_run_that_goes_on_is_measured_anew(tiny_world, tmp_path, monkeypatch):
    run_claim("ddm", "--out", str(tmp_path))
    before = json.loads((tmp_path / "ddm" / "cells.json").read_text())
    monkeypatch.setitem(claims.ddm.SCALES["smoke"], "steps", 3)
    run_claim("ddm", "--out", str(tmp_path))
    after = json.loads((tmp_path / "ddm" / "cells.json").read_text())
    assert len(after) == 2 * len(before) and before.items() <= after.items()


def test_what_another_process_has_measured_meanwhile_is_not_measured_again(tmp_path):
    args = reproduce.parser().parse_args(["ddm", "--out", str(tmp_path)])
    one, other = (claims.bench.Bench("ddm", args, {}) for _ in range(2))
    assert one.measure_once("a", lambda: 1) == 1
    assert other.measure_once("a", lambda: 2) == 1


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_damaged_numbers_are_one_line(tmp_path, content):
    args = reproduce.parser().parse_args(["ddm", "--out", str(tmp_path)])
    (tmp_path / "ddm").mkdir()
    (tmp_path / "ddm" / "cells.json").write_text(content)
    with pytest.raises(UserError, match="cells.json is damaged: delete it"):
        claims.bench.Bench("ddm", args, {})


def test_a_stopped_autoencoder_is_no_autoencoder(tmp_path, monkeypatch):
    def stopped(flags):
        Path(flags[flags.index("--out") + 1]).touch()
        return 130

    monkeypatch.setattr(vae, "main", stopped)
    args = reproduce.parser().parse_args(["lmd", "--scale", "smoke", "--out", str(tmp_path)])
    bench = claims.bench.Bench("lmd", args, claims.lmd.SCALES["smoke"])
    with pytest.raises(SystemExit) as caught:
        claims.lmd.train_autoencoder(bench)
    assert caught.value.code == 130 and not list(bench.folder.iterdir())


def test_arms_differ_in_the_thing_under_test_and_in_nothing_else(finished):
    folder, arms = finished("ddm"), claims.ddm.ARMS
    configs = {name: json.loads((folder / name / "config.json").read_text()) for name in arms}
    ours = configs["ddm-both"]
    differ = {key for config in configs.values() for key in config if config[key] != ours[key]}
    assert differ - {"lr"} == {"schedule", "predict", "out"}
    args = reproduce.parser().parse_args(["ddm", "--out", str(folder.parent)])
    bench = claims.bench.Bench("ddm", args, SCALES[claims.ddm])
    for name in arms:                   # the rate is the one with the smallest held-out loss
        losses = {rate: bench.log(run, "val_loss") for rate, run in bench.rate_runs(name).items()}
        assert losses[configs[name]["lr"]] == min(losses.values())


@pytest.mark.parametrize("claim", ["ddm", "maskdit"])
def test_a_claim_in_colour_refuses_gray(claim, tmp_path):
    with pytest.raises(UserError, match=f"--gray: the claim {claim} is measured in colour"):
        run_claim(claim, "--gray", "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_help_names_every_claim_by_its_first_docstring_line():
    text = " ".join(reproduce.parser().format_help().split()).replace("- ", "-")  # broken words
    for name, run in reproduce.CLAIMS.items():
        assert f"{name}: {run.__doc__.splitlines()[0]}" in text


def test_a_claims_folder_is_not_its_data(tmp_path):
    (tmp_path / "ddm").mkdir()
    with pytest.raises(UserError, match="--out .*ddm would overwrite --data"):
        run_claim("ddm", "--data", str(tmp_path / "ddm"), "--out", str(tmp_path))
    assert not list((tmp_path / "ddm").iterdir())


def test_the_table_of_reconstruction_says_what_one_is(finished):
    table = (finished("lmd") / "table.md").read_text()
    assert "1: an all-zero guess" in table and "the mean of the training images" in table
    mean = json.loads((finished("lmd") / "cells.json").read_text())["the mean image"]
    assert 0 < mean < 2
