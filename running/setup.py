"""Setting up a run: images, space, what the checkpoint remembers, and refusals that need
the data.

train.py calls each of these once, before the first step. Here stands what a reader of the
seven lines may skip: which images are held out, what is written into a checkpoint's `meta`,
how the weights of a first stage are fitted to a network with other classes.

Shapes: n images, B batch, h x w tokens.
"""
import hashlib
import math
import os
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import torch

from data import holdout, keep_fraction, load_images
from mask import ratio_at, visible_count
from plumbing.console import UserError
from plumbing.downloads import is_published
from plumbing.images import choose_subset, seeded, to_float
from plumbing.names import normal_name
from plumbing.writer import refuse_among
from sample import build_space, check_weights
from schedules import SCHEDULES
from spaces import SPACES
from tasks import TASKS, make_condition
from vit import MODELS

STAGES = ("train", "finetune")                  # each draws from random streams of its own


# --- the order of the images --------------------------------------------------------------

@lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    """The order of all images in one epoch. seed: a tuple of whole numbers. -> (count,)"""
    return torch.randperm(count, generator=seeded(*seed, epoch))


def shard_indices(count, seed, first, size):
    """Images number first ... first + size - 1 of an endless sequence of epochs, each of
    which is a permutation of all `count` images. -> (size,)"""
    i = torch.arange(first, first + size)
    epochs = range(first // count, (first + size - 1) // count + 1)
    return torch.cat([epoch_order(count, seed, epoch)[i[i // count == epoch] % count]
                      for epoch in epochs])


def split_batch(o, world):
    """The global batch in shards. -> (images in a shard, shards a process has in one
    step)"""
    micro = o.micro_batch or max(1, o.batch // world)
    if o.batch % (micro * world):
        raise UserError(
            f"--batch {o.batch} cannot be cut into {world} process(es) x --micro-batch {micro}: "
            f"it must be a multiple of {micro * world}")
    return micro, o.batch // (micro * world)


# --- images and space ---------------------------------------------------------------------

def load_run_images(o, machine):
    """Every process knows the same images in the same order; held-out ones never enter
    training.
    -> (training Images, held-out Images). UserError as in data.py."""
    loading = dict(seed=o.seed, cache_gb=o.cache_gb / machine.local_world,
                   progress=machine.rank == 0)

    def maps_of(source):
        return TASKS[o.task].exact if source == "faces" else o.targets

    images = load_images(o.data, o.size, o.gray, o.labels, targets=maps_of(o.data), **loading)
    images, held_out = holdout(images, o.val, targets=maps_of(o.val), **loading)
    if held_out.maps != images.maps:
        raise UserError(f"--val {o.val}: its pictures and those of --data {o.data} do not both "
                        f"have maps for --task {o.task}; give a fraction of --data")
    return keep_fraction(images, o.fraction, o.seed), held_out


def open_space(o, channels, ckpt=None, first=None):
    """The space of a run. ckpt, first: a run to continue or a FirstStage, whose autoencoder
    it must be. UserError for another one, and for a size that does not fit."""
    if ckpt:
        space = build_space(ckpt["meta"] | dict(vae=o.vae))
        check_weights(ckpt, "model")
    else:
        space = SPACES[o.space](channels, o.vae)
    is_released = first and not first.meta["vae_sha"] and o.space == "latent"     # it names none
    require_whole_tokens(o, space)
    if first and space.sha != first.meta["vae_sha"] and not is_released:
        raise UserError(f"--vae {o.vae}: is not the autoencoder of the first stage; its SHA-256 "
                        f"begins with {space.sha}, not {first.meta['vae_sha']}")
    return space


def require_whole_tokens(o, space):
    """UserError for images that are no whole number of tokens in their space."""
    square = space.factor * o.patch
    if o.size % square:
        raise UserError(f"--size {o.size}: must be a multiple of {square}, the autoencoder's "
                        f"factor {space.factor} times --patch {o.patch}")


def mask_ratio(o, progress):
    """The share of hidden tokens at a progress in [0, 1]."""
    low = o.mask if o.mask_from is None else o.mask_from
    return ratio_at(o.ramp, progress, low, o.mask)


def visible_shares(o, tokens):
    """How often a run sees each number of tokens: {K: times out of 1001}."""
    return Counter(visible_count(tokens, mask_ratio(o, i / 1000)) for i in range(1001))


def step_cost(o, tokens, progress):
    """What a step costs at a progress, in a unit of its own: the visible tokens, plus all
    tokens in the light decoder, plus a little for everything that does not depend on the
    mask. It is exact for dropped tokens only: routed and deferred ones also cost elsewhere.
    Later plans correct it."""
    size = MODELS[o.model]
    light = size["decoder_width"] ** 2 / (size["depth"] * size["width"] ** 2)
    return visible_count(tokens, mask_ratio(o, progress)) + tokens * (o.decoder * light + 1 / 16)


def require_hidden_tokens(o, tokens):
    """UserError for a mask that hides nothing, and for a reconstruction in which some
    moment hides nothing."""
    if (o.mask or o.mask_from) and list(visible_shares(o, tokens)) == [tokens]:
        raise UserError(f"--mask {o.mask}: hides none of {tokens} tokens; give a larger share, or "
                        "leave it out")
    ratio = min(mask_ratio(o, 0), mask_ratio(o, 1))
    if o.objective == "reconstruct" and visible_count(tokens, ratio) == tokens:
        raise UserError(f"--mask, --mask-from: {ratio} hides none of {tokens} tokens, and "
                        f"--objective reconstruct needs one")


def require_same_view(machine, count, step):
    """UserError unless all processes see the same number of images and the same
    checkpoint."""
    if not machine.all_equal(count, step):
        raise UserError("the processes see different images, or checkpoints of different steps: "
                        "--data must hold the same everywhere, --out must be one shared folder")


def describe_data(images, held_out):
    """What identifies the data of a run. -> dict: of both parts the number of images, the
    class names, a digest of the names of all files, read or not, and one of those that are
    used; the faces have no names."""
    def digest(names):
        text = "\n".join(sorted(names))
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]

    def describe(part):
        names = [normal_name(name) for name in part.source.names] if part.source else []
        used = [names[row] for row in part.rows.tolist()] if names else []
        return dict(count=len(names) or len(part.labels), classes=list(part.classes),
                    names=digest(names), used=digest(used))

    return dict(images=describe(images), held_out=describe(held_out))


def require_same_data(meta, data, out):
    """UserError unless a run goes on with the data that it began with: another number of
    images would move the held-out ones, other classes would be trained under the old
    numbers."""
    began = meta.get("data")                    # older checkpoints know their classes alone
    if began is None:
        was, now = meta["classes"], data["images"]["classes"]
        began = data if was == now else {**data, "images": data["images"] | dict(classes=was)}
    for part, flag in (("images", "--data"), ("held_out", "--val")):
        was, now = began[part], data[part]
        where = f"the run in {out} began with"
        if list(map(normal_name, was["classes"])) != list(map(normal_name, now["classes"])):
            raise UserError(f"{flag}: {where} the classes {', '.join(was['classes'])}, now there "
                            f"are {', '.join(now['classes'])}; start another run")
        if was["count"] != now["count"]:
            raise UserError(f"{flag}: {where} {was['count']} images, now there are "
                            f"{now['count']}; others would be held out. Start another run")
        if was["names"] != now["names"]:
            raise UserError(f"{flag}: {where} files of other names; start another run")
        if was.get("used", now["used"]) != now["used"]:
            raise UserError(f"{flag}: {where} other ones of these files: since then a file broke "
                            "or was repaired, or another --cache-gb does not notice a broken one; "
                            "others would be held out. Start another run")


def require_output_outside(o):
    """UserError when the run's folder lies among its images: its pictures would become
    some."""
    refuse_among({"--out": o.out or "runs"},
                 {"--data": o.data, "--val": o.val, "--targets": o.targets})


# --- what a checkpoint remembers ----------------------------------------------------------

class FirstStage(NamedTuple):
    """What a second stage starts from."""
    weights: dict           # raw or averaged, name -> tensor
    meta: dict              # the checkpoint's


def network_options(o, channels, space, classes):
    """The arguments of the ViT that options `o` ask for.

    channels: of the images. space: with .channels and .factor. classes: how many.
    -> dict"""
    is_guessed = o.precondition == "patch" and o.objective == "denoise"
    return dict(channels=space.channels, heads_out=SCHEDULES[o.schedule].head_count(o.predict),
                patch=o.patch, skips=o.skips, decoder=o.decoder, economy=o.economy,
                classes=classes, guess=o.predict if is_guessed else None, **MODELS[o.model],
                cond_channels=TASKS[o.task].channels(channels) * space.factor ** 2)


def take_measured(o, images, space, device):
    """Some of what diffusion runs on, to be measured: images, or their latents or maps.
    -> (n, C, H, W), on the CPU"""
    some, _ = images.take(choose_subset(len(images), 1024, o.seed))
    some, _ = make_condition(o.task, to_float(some), images.maps, g=seeded(o.seed, 8))
    return space.encode(some.to(device)).cpu()


def measure_std(z):
    """The root mean square of all values."""
    return z.double().square().mean().sqrt().item()


def keeps_unit(o, first):
    """Whether a second stage keeps what its first one measured of the data: unless it goes
    from pictures to maps or back. first: a FirstStage, or None."""
    return bool(first) and (
        TASKS[first.meta.get("task", "generate")].exact == TASKS[o.task].exact)


def describe_model(
    o,              # Options
    images,         # the training images, or their latents
    space,          # the space of the diffusion
    first,          # a FirstStage, or None
    measured,       # from `take_measured`; None: the first stage's unit is kept
):
    """All that a reader of the checkpoint needs to build its model again. -> dict, the
    `meta`"""
    data_std = first.meta["data_std"] if measured is None else measure_std(measured)
    classes = list(images.classes) if o.labels else []
    network = network_options(o, images.channels, space, len(classes))
    if first:
        for name, before in (("block", "dit"), ("clock", "angle")):     # of an older first stage
            network[name] = first.meta["model"].get(name, before)
        require_same_network(first.meta["model"], network)
    return dict(
        stage=o.stage, objective=o.objective, recon_target=o.recon_target, ratio=o.mask,
        schedule=o.schedule, predict=o.predict, space=o.space, task=o.task,
        channels=images.channels, size=o.size, classes=classes, vae=absolute_path(o.vae),
        vae_sha=space.sha, data_std=data_std, plan=None, progress=0.0, skipped=0,
        model=network)


def require_same_network(there, here):
    """UserError, before memory is taken, when options ask for another network than that of
    a first stage. What may differ: classes, conditions, heads."""
    for name in ("patch", "width", "depth", "heads", "skips", "decoder", "economy"):
        was = there.get(name, here[name])
        if was != here[name]:
            raise UserError(f"the checkpoint's network does not fit the options: its {name} is "
                            f"{was}, the options say {here[name]}")


def absolute_path(path):
    """A path that is found from another working folder, too. Links stay, for their names.
    So does a name that is downloaded."""
    if is_published(path, "vae"):
        return path
    return path and os.path.abspath(os.path.expanduser(path))


def read_state(ckpt):
    """Where the plan of a checkpoint stands. -> dict(step, plan, progress)"""
    step, plan = ckpt["step"], ckpt["meta"]["plan"]
    progress = ckpt["meta"].get("progress")
    if progress is None:                                    # an older file
        progress = step / plan if plan else 0.0
    return dict(step=step, plan=plan, progress=progress)


# --- weights ------------------------------------------------------------------------------

def load_first_stage(net, first, classes):
    """Load a first stage's weights. Classes keep their embedding by name. Inputs that the
    first stage did not have (other classes, a condition of another shape) start fresh.

    UserError when anything else differs."""
    mine, may_differ = net.state_dict(), ("embed_class", "embed_cond")
    weights = {k: v for k, v in first.weights.items() if k in mine or not k.startswith(may_differ)}
    cond = "embed_cond.weight"
    if cond in weights and weights[cond].shape != mine[cond].shape:
        del weights[cond]                       # of another task
    if "embed_class.weight" in weights:
        rows = mine["embed_class.weight"].clone()
        there = [normal_name(name) for name in first.meta["classes"]]
        for i, name in enumerate(map(normal_name, classes)):
            if name in there:
                rows[i] = weights["embed_class.weight"][there.index(name)]
        weights["embed_class.weight"] = rows
    require_same_shapes(weights, mine, may_differ)
    net.load_state_dict(mine | weights)


def require_same_shapes(weights, mine, may_be_missing):
    """UserError that names the first tensor which differs between two state dicts."""
    def shape(tensors, name):
        return tuple(tensors[name].shape) if name in tensors else "nothing"

    wrong = [f"{k} is {shape(weights, k)} there and {shape(mine, k)} here"
             for k in sorted(mine | weights) if shape(weights, k) != shape(mine, k)
             and not (k not in weights and k.startswith(may_be_missing))]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"the checkpoint's network does not fit the options: {wrong[0]}{more}; "
                        "channels (--gray) and random slopes (--schedule) must stay as they were")


def load_optimizers(optimizers, states):
    """Load the states of optimizers from a checkpoint. UserError unless they are of these
    optimizers and parameters: torch itself would notice in the middle of a step, or
    crash."""
    if len(states) != len(optimizers):
        raise UserError(f"the checkpoint holds {len(states)} optimizer(s), this run has "
                        f"{len(optimizers)}")
    for optimizer, state in zip(optimizers, states):
        groups = optimizer.param_groups
        try:
            same = [len(group["params"]) == len(other["params"])
                    for group, other in zip(groups, state["param_groups"], strict=True)]
            parameters = [q for group in groups for q in group["params"]]
            numbers = [k for group in state["param_groups"] for k in group["params"]]
            fits = (all(same) and numbers == list(range(len(parameters)))
                    and has_state_of(state["state"], parameters))
            if fits:
                hyper = [{k: v for k, v in group.items() if k != "params"} for group in groups]
                optimizer.load_state_dict(state)
                for group, own in zip(optimizer.param_groups, hyper):
                    group.update(own)                   # of this run's options, not of the file
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
            fits = False
        if not fits:
            raise UserError("the checkpoint's optimizer is not that of this network: it can be "
                            "sampled from and tuned, not continued")


def has_state_of(state, parameters):
    """Whether an optimizer's state (number of a parameter -> dict) is one of these
    parameters: tensors of their shapes, or finite numbers that count steps."""
    if state.keys() - set(range(len(parameters))):
        return False
    for number, parts in state.items():
        for name, value in parts.items():
            is_count = name == "step" and torch.as_tensor(value).numel() == 1
            if value is None or (is_count and 0 <= float(value) < math.inf):
                continue
            if not torch.is_tensor(value) or not value.is_floating_point():
                return False
            if value.layout != torch.strided or value.shape != parameters[number].shape:
                return False
    # All parameters have the same parts; None for one of them would be None for all.
    return len({frozenset((name, value is None) for name, value in parts.items())
                for parts in state.values()}) <= 1


def compile_blocks(net):
    """torch.compile for every block of a network.

    Under DistributedDataParallel a block would be cut where a bucket of gradients ends,
    unless it is told not to: blocks are small enough to leave that to backward. A ramp has
    8 numbers of tokens, and skips, routes and decoders see them in different shapes.
    torch's default limit of 8 would leave the last ones, silently, uncompiled."""
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.accumulated_cache_size_limit = 512
    for block in net.all_blocks():
        block.compile(dynamic=False)
