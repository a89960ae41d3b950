"""What a checkpoint must hold, in one table, checked whenever one is read.

A file comes from anywhere: cut short, stripped of what its owner did not need, made by
another version, or changed by hand. Whatever is wrong with it is one line, before anything
is built from it. Types and ranges are here; names of schedules, tasks and so on belong to
their registries, and sizes of the network to the shapes of the weights (sample.py).
"""
import math

import torch

from plumbing.console import UserError


# --- questions ----------------------------------------------------------------------------

def is_count(value):
    """a whole number that is not negative"""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_side(value):
    """a whole number from 1 to 16384"""
    return is_count(value) and 1 <= value <= 16384


def is_name(value):
    """a text"""
    return isinstance(value, str) and len(value) < 4096 and "\0" not in value


def is_flag(value):
    """true or false"""
    return isinstance(value, bool)


def is_share(value):
    """a number from 0 to 1"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def is_size(value):
    """a positive number"""
    return isinstance(value, float) and 0 < value < math.inf


def is_time(value):
    """a number that is not negative"""
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def is_plan(value):
    """a whole number or nothing"""
    return value is None or (is_count(value) and value > 0)


def is_name_or_none(value):
    """a text or nothing"""
    return value is None or is_name(value)


def is_names(value):
    """a list of texts that differ"""
    return isinstance(value, list) and all(map(is_name, value)) and len(set(value)) == len(value)


def is_weights(value):
    """a dict of tensors"""
    return isinstance(value, dict) and all(
        is_name(name) and torch.is_tensor(tensor) and tensor.is_floating_point()
        and tensor.layout == torch.strided for name, tensor in value.items())


def is_dict(value):
    """a dict"""
    return isinstance(value, dict) and all(map(is_name, value))


def is_states(value):
    """the state of an optimizer, or a list of them"""
    states = value if isinstance(value, list) else [value]
    return bool(states) and all(isinstance(state, dict) and isinstance(state.get("state"), dict)
                                and isinstance(state.get("param_groups"), list) for state in states)


def is_few(value):
    """a whole number from 1 to 64"""
    return is_count(value) and 1 <= value <= 64


def is_widths(value):
    """a list of 1 to 8 whole numbers from 1 to 16384"""
    return isinstance(value, (list, tuple)) and 1 <= len(value) <= 8 and all(map(is_side, value))


def is_positive_number(value):
    """a positive number"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def is_finite_row(value):
    """a row of finite numbers"""
    return (torch.is_tensor(value) and value.ndim == 1 and value.is_floating_point()
            and value.layout == torch.strided and bool(value.isfinite().all()))


def is_positive_row(value):
    """a row of finite, positive numbers"""
    return is_finite_row(value) and bool((value > 0).all())


def is_data(value):
    """what the run's images and its held-out ones are: count, classes and digests"""
    return isinstance(value, dict) and set(value) == {"images", "held_out"} and all(
        isinstance(part, dict) and set(part) | {"used"} == {"count", "classes", "names", "used"}
        and is_count(part["count"]) and is_names(part["classes"]) and is_name(part["names"])
        and is_name(part.get("used", "none"))
        for part in value.values())


def is_random_state(value):
    """a random state of torch"""
    now = torch.get_rng_state()
    return (torch.is_tensor(value) and value.layout == now.layout
            and value.dtype == now.dtype and value.shape == now.shape)


# --- the tables ---------------------------------------------------------------------------
# A "?" after a name: older files, or those that are only sampled from, may lack it.

CHECKPOINT = {
    "version": is_count, "config?": is_dict, "meta": is_dict, "step": is_count,
    "images?": is_count, "seconds?": is_time, "model?": is_weights, "ema?": is_weights,
    "optimizer?": is_states, "scaler?": is_dict, "rng?": is_random_state}

META = {
    "stage": is_name, "objective?": is_name, "recon_target?": is_name, "ratio?": is_share,
    "schedule": is_name, "predict": is_name, "space": is_name, "task?": is_name,
    "channels": is_side, "size": is_side, "classes": is_names, "vae": is_name_or_none,
    "vae_sha": is_name, "data_std": is_size, "model": is_dict, "plan": is_plan,
    "progress?": is_share, "skipped": is_count, "shards?": is_count, "data?": is_data}

NETWORK = {
    "channels": is_side, "heads_out": is_side, "patch": is_side, "width": is_side,
    "depth": is_side, "heads": is_side, "skips": is_flag, "decoder": is_count,
    "decoder_width": is_side, "classes": is_count, "cond_channels?": is_count,
    "economy?": is_name, "block?": is_name, "clock?": is_name, "guess?": is_name_or_none}


AUTOENCODER = {
    "widths": is_widths, "layers": is_few, "groups": is_side, "latent?": is_side,
    "channels?": is_few, "scaling?": is_positive_number}

AUTOENCODER_FILE = {
    "config": is_dict, "model": is_weights, "mean": is_finite_row, "std": is_positive_row}


def require_autoencoder(held, path):
    """UserError unless `held` is laid out like a file of python vae.py. path: for the
    message."""
    require_layout(held, AUTOENCODER_FILE, path)
    require_layout(held["config"], AUTOENCODER, f"{path}: config", strict=True)
    latent = held["config"].get("latent", 4)
    if {len(held["mean"]), len(held["std"])} != {latent}:
        raise UserError(f"{path}: mean and std must have {latent} numbers each")


def require_layout(values, table, where, strict=False):
    """UserError that names the first field of a dict which is missing, of another kind or,
    if strict, unknown. where: words for what the dict is."""
    names = {key.rstrip("?") for key in table}
    unknown = sorted(set(values) - names)
    if strict and unknown:
        raise UserError(f"{where} holds an unknown field: {unknown[0]}")
    for key, is_right in table.items():
        name = key.rstrip("?")
        if name not in values:
            if key.endswith("?"):
                continue
            raise UserError(f"{where} lacks {name}")
        if not is_right(values[name]):
            kind = " ".join(repr(values[name]).split())[:40]
            raise UserError(f"{where}: {name} must be {is_right.__doc__}, it is {kind}")


def require_checkpoint(ckpt, path):
    """UserError unless `ckpt` is laid out like a checkpoint. path: for the message."""
    require_layout(ckpt, CHECKPOINT, path)
    require_layout(ckpt["meta"], META, f"{path}: meta")
    require_layout(ckpt["meta"]["model"], NETWORK, f"{path}: meta: model", strict=True)


NEEDED = {                                      # what a use of a checkpoint wants, and why
    "model": "has no raw weights: use --weights ema",
    "ema": "has no averaged weights: use --weights model",
    "config": "has no options: it can be sampled from, not continued or tuned",
    "optimizer": "has no optimizer: it can be sampled from and tuned, not continued",
    "scaler": "has no scaler: it can be sampled from and tuned, not continued",
    "rng": "has no random state: it can be sampled from and tuned, not continued",
    "seconds": "does not say how long it ran: it can be sampled from and tuned, not continued"}


def require_parts(ckpt, path, *names):
    """UserError that says what can still be done with a checkpoint that lacks one of
    these."""
    for name in names:
        if name not in ckpt:
            raise UserError(f"{path} {NEEDED[name]}")
