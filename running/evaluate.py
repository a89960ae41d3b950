"""Evaluation while a model trains: one number that compares runs, and one picture.

The idea. A training loss depends on the mask ratio, the prediction and the draw of times, so it compares nothing. `validate` asks every model
the same question, at eight noise levels with the same noise: how far is your guess of the clean image, in units of what the best linear guess
leaves open?

    val_loss = mean over levels of |x0_hat - x0|^2 / (b^2 s^2 / V)         all tokens visible; 1 is as good as linear

`look_at` adds what no number replaces: samples of fixed noise, or condition | result | target of a task, or a reconstruction beside its original.

Shapes: n images, B batch; x (B, C, H, W) in [-1, 1], z what the space makes of it, t in [0, 1].
"""
import dataclasses

import torch
from tqdm import tqdm

from restore import reconstruction_errors, draw_reconstruction, reconstruct, restore_pictures
from sample import sample
from tasks import TASKS, make_condition, place_side_by_side
from plumbing.images import grid, seeded, to_float, to_uint8


@torch.no_grad()
def validate(loaded, images, dtype=None, n=256, levels=8):
    """Denoising error on held-out images at fixed times and noise, all tokens visible: |x0_hat - x0|^2 in units of what a linear
    guess leaves unknown at that time (b^2 s^2 / V), averaged over `levels` equal steps of angle: 1 is as good as linear (an untrained
    `unit` model; other predictions start above). The only loss that compares mask ratios, and predictions, since x0_hat comes after `split`.

    loaded: sample.Loaded. images: data.Images or latents.Latents. dtype: the type for autocast, or None."""
    model, schedule, space, task = loaded.net, loaded.schedule, loaded.space, loaded.meta.get("task", "generate")
    top = schedule.angle(schedule.start_time(loaded.predict))
    ts = schedule.time_at((torch.arange(levels, dtype=torch.float64) + 0.5) / levels * top)
    errors = []
    for lo in range(0, min(n, len(images)), 64):
        x, y = images.take(torch.arange(lo, min(lo + 64, n, len(images))))
        x, cond = make_condition(task, to_float(x).to(loaded.device), images.maps, space.factor, seeded(2, lo))
        z = space.encode(x)
        noise = schedule.noise(z.cpu(), seeded(1, lo)).to(loaded.device)
        t = ts[(lo + torch.arange(len(z))) % levels]
        zt = schedule.corrupt(z, noise, t)
        with torch.autocast(loaded.device.type, dtype, enabled=dtype is not None):
            out = model(zt, t, y.to(loaded.device) if model.embed_class is not None else None, None, cond)
        x0, _ = schedule.split(out, zt, t, loaded.predict)
        known = (schedule.b(t) * schedule.data_std * schedule.input_scale(t)) ** 2
        errors.append(((x0 - z) ** 2).mean((1, 2, 3)).cpu().double() / known)
    return torch.cat(errors).mean().item()


def evaluate_model(loaded, held_out, shown, whole_space, o, path, dtype=None):
    """A look at a model in training with options o: a picture at `path`, a task's scores on the screen. -> val_loss.

    shown: a few held-out images as uint8, and whole_space: a space with an encoder, for pictures of a reconstruction, since held_out may be latents."""
    classes = loaded.meta["classes"]
    if o.objective == "reconstruct":
        if o.recon_target == "clean":                                           # of whitened patches there is no picture
            draw_reconstruction(reconstruct(dataclasses.replace(loaded, space=whole_space), to_float(shown), o.mask)).save(path)
        errors = reconstruction_errors(loaded, held_out)
        return sum(errors.values()) / len(errors)
    if o.task == "generate":
        grid(to_uint8(sample(loaded, 16, 10, labels=torch.arange(16) % len(classes) if classes else None, amp=dtype))).save(path)
    else:                                                                       # condition | result | target of held-out images, and how good
        task, few = TASKS[o.task], min(64, len(held_out))
        x, y = held_out.take(torch.arange(few))
        truth, cond = make_condition(o.task, to_float(x), held_out.maps, g=seeded(3))
        result = restore_pictures(loaded, cond, steps=10, labels=y if classes else None, amp=dtype)
        grid(place_side_by_side(cond[:12], result[:12], truth[:12]), 9).save(path)
        without = lambda score: f" (without a network {score(task.plain(cond), truth, cond):.3f})" if task.plain else ""
        tqdm.write("  ".join(f"{name} {score(result, truth, cond):.3f}{without(score)}" for name, score in task.scores.items())
                   + f"{', ' if task.scores else ''}{few} held-out images, 10 calls")
    return validate(loaded, held_out, dtype)
