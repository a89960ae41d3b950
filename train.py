"""Training: one loop for every method, on a laptop or on many GPUs.

    python train.py                                          # built-in faces, tiny model, minutes on a CPU
    python train.py --data photos/ --size 64 --mask 0.9      # your own folder or zip, a tenth of the tokens per step
    torchrun --nproc_per_node=8 train.py --mask 0.9          # the same file on 8 GPUs (or 8 CPU processes)

The loop below is the whole program; every other file exists to make one of its six lines readable. What happens around it:

    draws       noise, times, masks, flips and label drops are a function of (seed, step, shard), where a shard is a slice of the global
                batch; k processes x one shard and one process x k shards (--micro-batch) therefore take the same step, and nothing
                about randomness has to be saved for an exact resume
    progress    step / plan in [0, 1] drives learning rate and mask ratio. `--minutes` is turned into a plan after 20 timed steps
    options     options.py, one table of what is refused; a look at the model every --sample-every steps: evaluate.py
    files       runs/NAME/: config.json, log.csv, loss.png, samples/000500.png, last.pt and 000500.pt (checkpoint.py)

Shapes: B images per shard, C channels, h x w tokens, t in [0, 1]; x uint8 -> [-1, 1], z what the space makes of it.
"""
import copy
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from plumbing.checkpoint import VERSION, open_run_folder, keep_copy, name_newest, save_atomic
from plumbing.console import UserError, run_command
from running.cost import describe_cost
from data import holdout, load_images
from running.evaluate import evaluate_model
from spaces import encode_once, SPACES
from losses import OBJECTIVES
from plumbing.machine import amp_type, start_machine
from mask import draw, ratio_at, visible_count
from running.options import Options, check, options_parser, resolve_options
from sample import DiffusionModel, build_model, load_weights
from schedules import SCHEDULES, times
from tasks import TASKS, make_condition
from vit import ECONOMIES, MODELS
from plumbing.images import seeded, to_float
from running.journal import draw_loss, open_log


# --- the order of the images ---------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The order of all n images in one epoch. seed: a tuple of whole numbers. -> (n,)"""
    return torch.randperm(n, generator=seeded(*seed, epoch))


def shard_indices(n, seed, first, count):
    """Images number first ... first + count of an endless sequence of epochs, each a permutation of all n by itself. -> (count,)"""
    i = torch.arange(first, first + count)
    return torch.cat([epoch_order(n, seed, epoch)[i[i // n == epoch] % n] for epoch in range(first // n, (first + count - 1) // n + 1)])


# --- the run -------------------------------------------------------------------------------------------------------------------------

STAGES = ("train", "finetune")                                                  # each draws from streams of its own
TIMED = 20                                                                      # steps that are timed before --minutes becomes a plan
LOG_EVERY = 10
TOO_MANY = 20                                                                   # non-finite steps in a row that end a run


def network_options(o, channels, space, classes):
    """The options of the ViT that options `o` ask for: images of `channels`, in a space (its .channels and .factor), with so many classes."""
    return dict(channels=space.channels, heads_out=SCHEDULES[o.schedule].head_count(o.predict), patch=o.patch, skips=o.skips, decoder=o.decoder,
                economy=o.economy, classes=classes, cond_channels=TASKS[o.task].channels(channels) * space.factor ** 2, **MODELS[o.model])


def train(o, ckpt=None, first=None, stage="train"):
    """Train with options `o`. ckpt: a checkpoint to continue exactly. first: (state dict, meta) of a first stage to start from."""
    check(o)
    if o.objective == "reconstruct":
        o = dataclasses.replace(o, predict="x0")
    if o.dry_run:
        return print(describe_cost(o, network_options, f"{stage}.py", sys.argv[1:]))
    machine = start_machine(o.device, o.threads)
    rank, world, device = machine.rank, machine.world, machine.device
    micro = o.micro_batch or max(1, o.batch // world)
    if o.batch % (micro * world):
        raise UserError(f"--batch {o.batch} cannot be cut into {world} process(es) x --micro-batch {micro}: it must be a multiple of {micro * world}")
    accumulate = o.batch // (micro * world)                                     # shards per process
    dtype = amp_type(o.amp, device)
    amp = lambda: torch.autocast(device.type, dtype) if dtype else nullcontext()

    # Data: every process knows the same images in the same order; held-out ones never enter training.
    loading = dict(seed=o.seed, cache_gb=o.cache_gb / machine.local_world, progress=rank == 0)
    maps = lambda source: TASKS[o.task].exact if source == "faces" else o.targets
    images = load_images(o.data, o.size, o.gray, o.labels, targets=maps(o.data), **loading)
    images, held_out = holdout(images, o.val, targets=maps(o.val), **loading)
    if held_out.maps != images.maps:
        raise UserError(f"--val {o.val}: its pictures and those of --data {o.data} do not both have maps for --task {o.task}; give a fraction of --data")
    if o.fraction < 1:
        images = images.subset(torch.randperm(len(images), generator=seeded(o.seed, 7))[:max(1, round(o.fraction * len(images)))])
    classes = list(images.classes) if o.labels else []

    # Model: all that a reader of the checkpoint needs to rebuild it is in meta.
    torch.manual_seed(o.seed)
    space = build_model(ckpt["meta"] | dict(vae=o.vae))[2] if ckpt else SPACES[o.space](images.channels, o.vae)
    if o.size % (space.factor * o.patch):
        raise UserError(f"--size {o.size}: must be a multiple of {space.factor * o.patch}, the autoencoder's factor {space.factor} times --patch {o.patch}")
    if first and space.sha != first[1]["vae_sha"]:
        raise UserError(f"--vae {o.vae}: is not the autoencoder of the first stage; its SHA-256 begins with {space.sha}, not {first[1]['vae_sha']}")
    h = w = o.size // space.factor // o.patch
    ratio_of = lambda progress: ratio_at(o.ramp, progress, o.mask if o.mask_from is None else o.mask_from, o.mask, share=o.ramp_share)
    if o.objective == "reconstruct" and visible_count(h * w, min(ratio_of(0), ratio_of(1))) == h * w:
        raise UserError(f"--mask, --mask-from: {min(ratio_of(0), ratio_of(1))} hides none of {h * w} tokens, and --objective reconstruct needs one")
    if not machine.all_equal(len(images), ckpt["step"] if ckpt else 0):
        raise UserError("the processes see different images, or checkpoints of different steps: --data must hold the same everywhere, --out must be one shared folder")
    out, config = machine.run_on_first(lambda: open_run_folder(o.out)) or (None, None)        # the run's folder: one process writes
    o = dataclasses.replace(o, out=str(out))
    shown, _ = held_out.take(torch.arange(min(len(held_out), 8)))               # as pictures, for the grid of a reconstruction
    if o.space == "latent" and o.cache_latents and o.task == "generate":   # (a condition is made of pixels)
        (images, held_out), space = encode_once([images, held_out], space, o.latents, o.flip, device, o.workers)
    vae = o.vae and os.path.abspath(os.path.expanduser(o.vae))                  # to be found from another working folder; links stay, for their names
    if ckpt:
        meta = ckpt["meta"] | dict(vae=vae)
    else:
        some, _ = images.take(torch.arange(min(len(images), 1024)))
        some, _ = make_condition(o.task, to_float(some), images.maps, g=seeded(o.seed, 8))                # what diffusion runs on: its size is measured
        same_kind = first and TASKS[first[1].get("task", "generate")].exact == TASKS[o.task].exact     # pictures then and now, or one kind of map
        meta = dict(stage=stage, objective=o.objective, recon_target=o.recon_target, ratio=o.mask,
                    schedule=o.schedule, predict=o.predict, space=o.space, task=o.task, channels=images.channels, size=o.size, classes=classes, vae=vae, vae_sha=space.sha,
                    data_std=first[1]["data_std"] if same_kind else space.encode(some.to(device)).cpu().double().square().mean().sqrt().item(),
                    model=network_options(o, images.channels, space, len(classes)), plan=None, skipped=0, shards=world * accumulate)
    net, schedule, whole_space = build_model(meta)                                    # with an encoder, whatever `space` has instead
    if first:
        load_first_stage(net, first[0], first[1]["classes"], classes)
    net.checkpoint_blocks = o.checkpoint_blocks
    net.to(device)
    averaged = copy.deepcopy(net).eval().requires_grad_(False)                  # the EMA is a model of its own: it is what gets sampled
    objective = OBJECTIVES[o.objective](schedule, o.predict, o.patch, o.weighting, o.recon, o.recon_target, ECONOMIES[o.economy].all_scored)
    optimizer = torch.optim.AdamW(net.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), weight_decay=o.wd, fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, seconds, skipped = 0, 0.0, meta["skipped"]
    if ckpt:
        load_weights(net, ckpt["model"])
        load_weights(averaged, ckpt["ema"])
        optimizer.load_state_dict(ckpt["optimizer"])
        scaler.load_state_dict(ckpt["scaler"])
        torch.set_rng_state(ckpt["rng"])                                        # ours need none: this is for your own dropout
        step, seconds = ckpt["step"], ckpt["seconds"]
    if o.compile:                                                               # a ramp has 8 numbers of tokens, and skips, routes and decoders
        torch._dynamo.config.cache_size_limit = 64                              # see them in different shapes: the default of 8 would leave
        torch._dynamo.config.accumulated_cache_size_limit = 512                 # the last ones, silently, uncompiled
        for block in net.all_blocks():
            block.compile(dynamic=False)
    model = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None) if world > 1 else net

    # The plan: how many steps the run has. --minutes becomes one after a few timed steps.
    plan = o.steps or meta["plan"]
    minutes = o.minutes or (None if o.steps else 4.0)
    when = o.time_sampling if o.objective == "denoise" else "zero"              # a reconstruction has no time: t = 0, where x_t is the image

    def save(numbered):
        save_atomic(dict(version=VERSION, config=dataclasses.asdict(o), meta=meta | dict(plan=plan, skipped=skipped), step=step, images=step * o.batch, seconds=seconds,
                         model=net.state_dict(), ema=averaged.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                         rng=torch.get_rng_state()), out / "last.pt")
        if numbered:
            keep_copy(out / "last.pt", out / f"{step:06d}.pt")
        name_newest(out)

    def evaluate():
        """Validation loss, and a grid of samples on fixed noise, both from the averaged weights."""
        loaded = DiffusionModel(averaged, schedule, space, o.predict, meta, device)
        return evaluate_model(loaded, held_out, shown, whole_space, o, out / "samples" / f"{step:06d}.png", dtype)

    looked = 0.0                                                                # seconds that one look at the model costs: for the plan
    if rank == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        config.truncate(0)
        config.write(json.dumps(dataclasses.asdict(o) | dict(stage=stage), indent=1))
        config.flush()
        log = open_log(out / "log.csv", step if ckpt else -1)
        counts = sorted({visible_count(h * w, ratio_of(i / 1000)) for i in range(1001)})
        print(f"{len(images)} images of {o.data} at {o.size} px ({len(held_out)} held out); {o.model} model, "
              f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters\n"
              f"{h * w} tokens, visible: {', '.join(map(str, counts))}; batch {o.batch} = {world} process(es) x {accumulate} x {micro}; "
              f"{device.type}, {str(dtype or torch.float32)[6:]}, {torch.get_num_threads()} threads\n"
              f"run folder {out}" + (f", continued at step {step}" if ckpt else ""), flush=True)
        if ckpt and meta["shards"] != world * accumulate:
            print(f"note: this run began with {meta['shards']} shards per step, now {world * accumulate}: the same law, not the same numbers")
        if step == 0:
            tick = time.monotonic()
            log.write(f"0,0,0,,{evaluate():.6g},0,{ratio_of(0):.6g},{visible_count(h * w, ratio_of(0))},0\n")
            looked = time.monotonic() - tick

    stop = []                                                                   # the signal that asked for the end, if any did

    def ask_to_stop(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)                                   # a second Ctrl-C ends the program at once

    handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    in_a_row, durations, ended = 0, [], False
    logged, counted, loss_sum = step, 0, torch.zeros((), device=device)         # since the last line of the log; summed on the device
    begun = time.monotonic() - seconds
    since = time.monotonic()
    stream = STAGES.index(stage)
    batches = images.batches((shard_indices(len(images), (o.seed, stream), k * o.batch + (rank * accumulate + j) * micro, micro)
                              for k in itertools.count(step) for j in range(accumulate)), o.workers)
    bar = tqdm(total=plan, initial=step, desc=stage, unit="step", disable=None if rank == 0 else True, dynamic_ncols=True)

    while not ended and (plan is None or step < plan):
        tick = time.monotonic()
        progress = step / plan if plan else 0.0
        ratio = ratio_of(progress)
        warm = min(o.warmup, plan // 10 if plan else o.warmup)
        lr = o.lr * min(1.0, (step + 1) / (warm + 1)) * (o.lr_end + (1 - o.lr_end) * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss_now = 0.0
        for j in range(accumulate):
            x, y = next(batches)
            g = torch.Generator(device).manual_seed(seeded(o.seed, stream, step, rank * accumulate + j).initial_seed())
            coin = lambda p: torch.rand(len(x), generator=g, device=device) < p                                      # (B,)
            x = to_float(x.to(device, non_blocking=True))
            x = torch.where(coin(0.5)[:, None, None, None], x.flip(3), x) if o.flip else x
            y = torch.where(coin(o.label_dropout), -1, y.to(device)) if classes else None
            x, cond = make_condition(o.task, x, images.maps, space.factor, g)         # tasks.py      what is predicted, and from what
            # Gradients are averaged over processes once per step: the last shard's forward and backward do it, the others must not.
            with model.no_sync() if world > 1 and j < accumulate - 1 else nullcontext():
                with amp():
                    z = space.encode(x)                                         # vae.py        pixels or latents
                    m = draw(o.policy, len(z), h, w, ratio, g, o.block)         # mask.py       which tokens are seen
                    n = schedule.noise(z, g)                                    # schedules.py  eps, and DDM's random slopes
                    t = times(when, schedule, len(z), g)                        #               when, in [0, 1]
                    zt = schedule.corrupt(z, n, t)                              # schedules.py  a(t) z + b(t) eps
                    guess = model(zt, t, y, m, cond)                            # vit.py        tokens in, image-shaped out
                loss = objective(guess, z, n, t, m)                             # losses.py     score matching on the visible
                scaler.scale(loss / accumulate).backward()
            loss_now = loss_now + loss.detach() / accumulate

        scaler.unscale_(optimizer)
        gradients = [q.grad for q in net.parameters() if q.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm().item()        # of the averaged gradient, so the same on every rank:
        if math.isfinite(norm):                                                 # all ranks skip a bad step, or none does
            if norm > o.clip:                                                   # (clip_grad_norm_ multiplies by 1 otherwise: 5 % of a masked step)
                torch._foreach_mul_(gradients, o.clip / norm)
            scaler.step(optimizer)
            with torch.no_grad():                                               # or every average would remember all the ones before it
                torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), 1 - min(o.ema, (1 + step) / (10 + step)))
            loss_sum, counted, in_a_row = loss_sum + loss_now, counted + 1, 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds = time.monotonic() - begun
        bar.update()
        if in_a_row >= TOO_MANY:
            raise UserError(f"the last {TOO_MANY} gradients, up to step {step}, were not finite: try a smaller --lr or --amp off")

        durations.append(time.monotonic() - tick)
        if plan is None and len(durations) == TIMED:
            # A ramp changes the cost of a step: count it as proportional to the visible tokens, plus all tokens of the light decoder, plus a little.
            size = MODELS[o.model]
            light = o.decoder * size["decoder_width"] ** 2 / (size["depth"] * size["width"] ** 2)
            cost = lambda p: visible_count(h * w, ratio_of(p)) + h * w * (light + 1 / 16)
            each = sorted(durations)[TIMED // 2] * sum(cost(i / 100) for i in range(101)) / 101 / cost(0)
            left = (60 * minutes - seconds - looked) / (each + looked / o.sample_every)
            plan = step + max(1, int(machine.broadcast_first(left)))
            bar.total = plan
        late = minutes is not None and rank == 0 and seconds > 66 * minutes
        asked = machine.reduce(2 if stop else int(late), dist.ReduceOp.MAX)     # 2: by a signal, and soon a harder one follows
        ended = asked > 0 or step == plan

        look, keep = step % o.sample_every == 0 or (ended and asked < 2), step % o.save_every == 0
        if step % LOG_EVERY == 0 or look or keep or ended:                      # a checkpoint falls on a line of the log: nothing is summed over it
            mean = machine.reduce(float(loss_sum)) / world / counted if counted else math.nan
            speed = (step - logged) * o.batch / (time.monotonic() - since)
            if rank == 0:
                value = evaluate() if look else None
                log.write(",".join([str(step), f"{seconds:.2f}", str(step * o.batch), f"{mean:.6g}", f"{value:.6g}" if look else "", f"{lr:.6g}",
                                    f"{ratio:.6g}", str(visible_count(h * w, ratio)), f"{speed:.4g}"]) + "\n")
                bar.set_postfix(loss=f"{mean:.4f}", img_s=f"{speed:.0f}")
                if look:
                    draw_loss(out / "log.csv", out / "loss.png")
                    tqdm.write(f"step {step}/{plan}: loss {mean:.4f}, val_loss {value:.4f}, {speed:.0f} images/s" + (f", {skipped} steps skipped" if skipped else ""))
            logged, counted, loss_sum, since = step, 0, torch.zeros((), device=device), time.monotonic()
        if rank == 0 and (keep or ended):
            save(numbered=keep)

    bar.close()
    for number, handler in handlers.items():                                    # reproduce.py has more to do
        signal.signal(number, handler)
    if rank == 0:
        log.close()
        config.close()                                                          # and with it the lock
        made = [str(p) for p in (out / "last.pt", out / "loss.png", out / "samples" / f"{step:06d}.png") if p.exists()]
        print(f"{'finished' if step == plan else 'stopped'} at step {step} of {plan or 'a plan not made yet'} after {seconds / 60:.1f} minutes: {', '.join(made)}")
    if world > 1:
        del model                                                               # or the group and its threads would live on in it
        dist.destroy_process_group()
    if stop:
        raise SystemExit(128 + stop[0])                                         # what a shell expects of a program ended by a signal
    return out


def load_first_stage(net, weights, classes_there, classes_here):
    """Load a first stage's weights. Classes keep their embedding by name; inputs that the first stage did not have (other classes, a
    condition of another shape) start fresh. UserError when anything else differs."""
    mine = net.state_dict()
    weights = {k: v for k, v in weights.items() if k in mine or not k.startswith(("embed_class", "embed_cond"))}
    if "embed_cond.weight" in weights and weights["embed_cond.weight"].shape != mine["embed_cond.weight"].shape:
        del weights["embed_cond.weight"]                                        # of another task
    if "embed_class.weight" in weights:
        rows = mine["embed_class.weight"].clone()
        for i, name in enumerate(classes_here):
            if name in classes_there:
                rows[i] = weights["embed_class.weight"][classes_there.index(name)]
        weights["embed_class.weight"] = rows
    shape = lambda tensors, k: tuple(tensors[k].shape) if k in tensors else "nothing"
    wrong = [f"{k} is {shape(weights, k)} there and {shape(mine, k)} here" for k in sorted(mine | weights)
             if shape(weights, k) != shape(mine, k) and not (k not in weights and k.startswith(("embed_class", "embed_cond")))]
    if wrong:
        raise UserError(f"the checkpoint's network does not fit the options: {wrong[0]}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
                        + "; channels (--gray) and random slopes (--schedule) must stay as they were")
    net.load_state_dict(mine | weights)


def continue_run(o, ckpt, stage):
    """Continue a run, unless its plan is fulfilled (so that torchrun --max-restarts may repeat the command)."""
    if ckpt["step"] >= (o.steps or ckpt["meta"]["plan"] or math.inf):
        print(f"{o.out} is finished: {ckpt['step']} steps; a larger --steps continues it")
    else:
        train(o, ckpt, stage=stage)


def main(argv=None):
    given = vars(options_parser(Options, __doc__.split("\n")[0]).parse_args(argv))
    o, ckpt = resolve_options(Options, given, "train")
    if ckpt:
        continue_run(o, ckpt, "train")
    else:
        train(o)


if __name__ == "__main__":
    run_command(main)
