"""Evaluation while a model trains: one number that compares runs, and one picture.

The idea. A training loss depends on the mask ratio, the prediction and the drawn times, so
it compares nothing. `validate` asks every model the same question, at eight noise levels
with the same noise: how far is your guess of the clean image? The unit is the error of the
best multiple of x_t: one factor for each noise level, the same for all pixels.

    val_loss = mean over levels of |x0_hat - x0|^2 / (b^2 data_std^2 / V)

All tokens are visible. 1 is as good as that multiple. `evaluate_model` adds what no number
replaces: samples of fixed noise, or condition | result | target of a task, or a
reconstruction beside its original.

Shapes: B batch; x (B, C, H, W) in [-1, 1], z what the space makes of it, t in [0, 1].
"""
import dataclasses
import math

import torch
from tqdm import tqdm

from plumbing.console import count_nouns
from plumbing.images import choose_subset, grid, seeded, to_float, to_uint8
from plumbing.sheets import save_picture
from restore import reconstruct, reconstruction_errors, restore_pictures, stack_reconstruction
from sample import sample
from tasks import TASKS, make_condition, place_side_by_side


@torch.no_grad()
def validate(
    model,          # sample.DiffusionModel
    images,         # data.Images or spaces.Latents
    dtype=None,     # the type for autocast, or None
    count=256,      # how many images at most
    levels=8,       # how many noise levels
    batch=64,       # images at once
):
    """Denoising error on held-out images at fixed times and noise, all tokens visible.

    It is |x0_hat - x0|^2 in units of what the best multiple of x_t leaves unknown there,
    b^2 data_std^2 / V, averaged over `levels` equal steps of angle. An untrained `unit`
    model has 1, other predictions start above; with a PatchGuess (vit.py) all start below.
    It compares mask ratios, and predictions too, for x0_hat comes after `split`. Of few
    images each is used at several levels, so that every level has some. -> float"""
    schedule, space, task = model.schedule, model.space, model.meta.get("task", "generate")
    top = schedule.angle(schedule.start_time(model.predict))
    ts = schedule.time_at((torch.arange(levels, dtype=torch.float64) + 0.5) / levels * top)
    chosen = choose_subset(len(images), count)
    repeats = min(levels, math.ceil(8 * levels / len(chosen)))      # each level: 8, or all images
    level = (torch.arange(repeats)[:, None] + torch.arange(len(chosen))).flatten() % levels
    errors = []
    for some in torch.arange(repeats * len(chosen)).split(batch):
        first = int(some[0])
        x, y = images.take(chosen[some % len(chosen)])
        x = to_float(x).to(model.device)
        y = y.to(model.device) if model.net.embed_class is not None else None
        x, cond = make_condition(task, x, images.maps, space.factor, seeded(2, first))
        z = space.encode(x)
        n = schedule.noise(z.cpu(), seeded(1, first)).to(model.device)
        t = ts[level[some]]
        zt = schedule.corrupt(z, n, t)
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            out = model.net(zt, t, y, None, cond)
        x0, _ = schedule.split(out, zt, t, model.predict)
        unknown = (schedule.b(t) * schedule.data_std * schedule.input_scale(t)) ** 2
        errors.append(((x0 - z) ** 2).mean((1, 2, 3)).cpu().double() / unknown)
    return torch.stack([torch.cat(errors)[level == k].mean() for k in range(levels)]).mean().item()


def evaluate_model(
    model,          # sample.DiffusionModel, of the averaged weights
    held_out,       # data.Images, or spaces.Latents
    shown,          # a few held-out images uint8 (k, C, S, S), for a reconstruction's picture
    encoding_space,    # a space with an encoder, for the same: held_out may be latents
    o,              # the run's Options
    path,           # of the picture
    dtype=None,     # the type for autocast, or None
):
    """Look at a model in training: a picture at `path`, a task's scores on the screen.

    -> val_loss; of a reconstruction, its mean error over four mask ratios"""
    if o.objective == "reconstruct":
        if o.recon_target == "clean":           # of whitened patches there is no picture
            whole = dataclasses.replace(model, space=encoding_space)
            done = reconstruct(whole, to_float(shown), o.mask)
            save_picture(stack_reconstruction(done), path)
        errors = reconstruction_errors(model, held_out)
        return sum(errors.values()) / len(errors)
    if o.task == "generate":
        classes = len(model.meta["classes"])
        labels = torch.arange(16) % classes if classes else None
        save_picture(grid(to_uint8(sample(model, 16, 10, labels=labels, amp=dtype))), path)
    else:
        evaluate_task(model, held_out, o.task, path, dtype)
    return validate(model, held_out, dtype)


def evaluate_task(
    model,          # sample.DiffusionModel, of the averaged weights
    held_out,       # data.Images
    name,           # of the task
    path,           # of the picture
    dtype=None,     # the type for autocast, or None
    count=64,       # how many images at most
):
    """condition | result | target of held-out images at `path`, and how good they are,
    printed."""
    task, chosen = TASKS[name], choose_subset(len(held_out), count)
    x, y = held_out.take(chosen)
    truth, cond = make_condition(name, to_float(x), held_out.maps, g=seeded(3))
    labels = y if model.meta["classes"] else None
    result = restore_pictures(model, cond, labels=labels, amp=dtype)
    save_picture(grid(place_side_by_side(cond[:12], result[:12], truth[:12]), 9), path)
    parts = []
    for key, score in task.scores.items():
        text = f"{key} {score(result, truth, cond):.3f}"
        if task.plain:
            text += f" (without a network {score(task.plain(cond), truth, cond):.3f})"
        parts.append(text)
    calls = count_nouns(task.calls, "call")
    tqdm.write("  ".join([*parts, f"{len(chosen)} held-out images, {calls}"]))
