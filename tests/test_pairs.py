"""Any policy x ramp x schedule x prediction x network x task composes: a set of small runs
that contains every pair of choices.

A run is the six lines of train.py on a network of a few thousand weights, two steps long,
then two steps of sampling.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from losses import OBJECTIVES, RECON_TARGETS, WEIGHTS
from mask import POLICIES, RATIOS, draw, ratio_at
from sample import GRIDS, SOLVERS, DiffusionModel, sample
from schedules import PREDICTIONS, SCHEDULES, TIMES, times
from tasks import TASKS, make_condition
from vae import AutoencoderKL, LatentSpace
from vit import ECONOMIES, ViT
import spaces
import restore

AXES = {
    "policy": list(POLICIES), "ramp": list(RATIOS), "ratio": [
        (0.9, 0.9), (0.25, 0.75), (0.5, 0.0)
    ], "schedule": list(SCHEDULES), "predict": list(PREDICTIONS), "weighting": list(WEIGHTS),
    "time": list(TIMES), "space": list(spaces.SPACES), "skips": [False, True],
    "guess": [False, True],
    "objective": list(OBJECTIVES), "decoder": [0, 2], "economy": list(ECONOMIES),
    "recon": [None, *RECON_TARGETS], "classes": [0, 3], "task": list(TASKS), "grid": list(GRIDS),
    "churn": [0.0, 0.5, 1.0], "solver": list(SOLVERS),
}


def allowed(run):
    """What means something: two-headed weights need two heads, reconstruction a decoder and
    tokens that were dropped, the objective of reconstruction also something hidden, a
    target without noise, no task beside it and no guess about noisy patches, churn the
    analytic step; long skips join blocks that see the same tokens."""
    alone = run["objective"] == "reconstruct"
    return ((run["weighting"] == "plain" or run["predict"] == "both")
            and (run["recon"] is None or run["decoder"] > 0)
            and ((run["recon"] is None and not alone) or run["economy"] == "drop")
            and not (run["skips"] and not ECONOMIES[run["economy"]].skips)
            and (not alone or (run["decoder"] > 0 and run["recon"] != "noisy"
                               and run["ratio"][1] > 0 and run["task"] == "generate"
                               and not run["guess"]))
            and (run["churn"] == 0 or run["solver"] == "analytic"))


def covering_set():
    """Greedy: complete the run that contains the most pairs not seen yet, until every
    allowed pair has been seen."""
    names = list(AXES)
    pairs = {((a, i), (b, j))
             for a, b in itertools.combinations(names, 2)
             for i in range(len(AXES[a]))
             for j in range(len(AXES[b]))}
    generator, runs = torch.Generator().manual_seed(0), []

    def pairs_of(run):
        return {((a, run[a]), (b, run[b])) for a, b in itertools.combinations(names, 2)}

    def value(run):
        return {name: AXES[name][i] for name, i in run.items()}

    while pairs:
        (a, i), (b, j) = min(pairs)
        best = None
        for _ in range(60):
            run = {
                name: int(torch.randint(len(AXES[name]), (), generator=generator))
                for name in names
            } | {a: i, b: j}
            if allowed(value(run)) and (best is None or len(pairs_of(run) & pairs)
                                        > len(pairs_of(best) & pairs)):
                best = run
        if best is None:  # no allowed run holds this pair
            pairs.discard(((a, i), (b, j)))
            continue
        runs.append(value(best))
        pairs -= pairs_of(best)
    return runs


RUNS = covering_set()


def one_run(run):
    torch.manual_seed(0)
    schedule = replace(SCHEDULES[run["schedule"]], data_std=0.5)
    task = TASKS[run["task"]]
    space = (spaces.PixelSpace(2) if run["space"] == "pixel" else LatentSpace(
        AutoencoderKL((8, 8), layers=1, groups=4, latent=2, channels=2)))
    net = ViT(schedule,
              channels=space.channels,
              heads_out=schedule.head_count(run["predict"]),
              patch=2,
              width=32,
              depth=2,
              heads=1,
              skips=run["skips"],
              decoder=run["decoder"],
              decoder_width=32,
              classes=run["classes"],
              cond_channels=task.channels(2) * space.factor**2,
              economy=run["economy"],
              guess=run["predict"] if run["guess"] else None,
              )
    objective = OBJECTIVES[run["objective"]](schedule, run["predict"], 2, run["weighting"],
                                             0.1 if run["recon"] else 0.0, run["recon"] or "clean",
                                             ECONOMIES[run["economy"]].all_scored,
                                             )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    g = torch.Generator().manual_seed(0)
    pictures = (
        torch.rand(3, 2 + bool(task.exact), 8 * space.factor, 8 * space.factor, generator=g) * 2 -
        1)
    y = torch.tensor([-1, 0, 2]) if run["classes"] else None
    for progress in (0.0, 1.0):
        x, cond = make_condition(run["task"], pictures, int(bool(task.exact)), space.factor, g)
        z = space.encode(x)
        m = draw(run["policy"], 3, 4, 4, ratio_at(run["ramp"], progress, *run["ratio"]), g, 2)
        n = schedule.noise(z, g)
        t = times(run["time"] if run["objective"] == "denoise" else "zero", schedule, 3, g)
        zt = schedule.corrupt(z, n, t)
        out = net(zt, t, y, m, cond)
        loss = objective(out, z, n, t, m)
        loss.backward()
        assert torch.isfinite(loss) and out.shape == (3, 2 * schedule.head_count(run["predict"]), 8,
                                                      8,
                                                      )
        assert all(q.grad is not None and torch.isfinite(q.grad).all()
                   for q in net.parameters()), "every parameter takes part"
        optimizer.step()
        optimizer.zero_grad()
    loaded = DiffusionModel(
        net, schedule, space, run["predict"],
        dict(size=8 * space.factor, task=run["task"], classes=["a", "b", "c"][:run["classes"]]),
        torch.device("cpu"),
    )
    how = dict(steps=2,
               churn=run["churn"],
               time_grid=run["grid"],
               solver=run["solver"],
               labels=torch.tensor([0, 2]) if run["classes"] else None,
               )
    if cond is None:
        images = sample(loaded, 2, **how)
    else:
        images = restore.restore_pictures(
            loaded,
            make_condition(run["task"], pictures[:2], int(bool(task.exact)), 1, g)[1], **how)
    assert torch.isfinite(images).all() and images.shape == (2, 1 if task.exact else 2,
                                                             8 * space.factor, 8 * space.factor,
                                                             )


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(str(v) for v in run.values()))
def test_every_pair_of_choices_trains_and_samples(run):
    one_run(run)


def test_the_set_is_small():
    """No set of this kind is smaller than the product of the two longest axes."""
    longest, second = sorted((len(values) for values in AXES.values()), reverse=True)[:2]
    assert longest * second <= len(RUNS) <= 2 * longest * second


@pytest.mark.slow
def test_the_full_grid_of_masks_schedules_predictions_and_networks():
    base = {name: values[0] for name, values in AXES.items()}
    names = ("policy", "schedule", "predict", "weighting", "decoder", "recon", "skips")
    for values in itertools.product(*(AXES[name] for name in names)):
        run = base | dict(zip(names, values))
        if allowed(run):
            one_run(run)
