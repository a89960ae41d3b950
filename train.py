"""Training: one loop for every method, on a laptop or on many GPUs.

    python train.py                                        # built-in faces, a CPU
    python train.py --data photos/ --size 64 --mask 0.9    # your own folder or .zip
    torchrun --nproc_per_node=8 train.py --mask 0.9        # 8 GPUs (or 8 CPU processes)

Read it from top to bottom: what never changes in a run (`Setup`), what a step changes
(`Learner`), the step itself (`train_step`, with the seven lines), the loop (`train`).

    draws      noise, times, masks, flips and dropped labels are a function of (seed, step,
               shard). A shard is a slice of the global batch. So k processes with one shard
               take the same step as one process with k shards (--micro-batch). And a
               resumed run draws what it would have drawn: no random state has to be saved
    progress   goes from 0 to 1, drives learning rate and mask ratio (plumbing/plan.py)
    around     options and refusals (running/options.py), images and weights
               (running/setup.py), log, pictures, checkpoints, signals (running/journal.py)

Shapes: B images in a shard, C channels, S x S pixels, h x h tokens, t in [0, 1];
x uint8 -> [-1, 1], z what the space makes of it.
"""
import copy
import dataclasses
import itertools
import math
import sys
from contextlib import nullcontext

import plumbing  # before torch: how its threads wait

import torch
from torch.nn.parallel import DistributedDataParallel

from losses import OBJECTIVES
from mask import draw, patchify
from plumbing.console import UserError, run_command
from plumbing.images import choose_subset, seeded, to_float
from plumbing.machine import amp_type, require_compiler, start_machine
from plumbing.muon import Muon
from plumbing.plan import Plan
from running.cost import describe_cost
from running.journal import Journal
from running.options import Options, check, options_parser, resolve_options
from running.setup import (
    STAGES, absolute_path, compile_blocks, describe_data, describe_model, keeps_unit,
    load_first_stage, load_optimizers, load_run_images, mask_ratio, open_space,
    read_state, require_hidden_tokens, require_output_outside, require_same_data,
    require_same_view, shard_indices, split_batch, step_cost, take_measured)
from sample import build_schedule, load_weights
from schedules import times
from spaces import encode_once
from tasks import make_condition
from vit import ECONOMIES, ViT

TOO_MANY = 20                       # steps in a row that are not finite: they end a run
MUON_RATE = 14                      # Muon's learning rate, in units of --lr


# --- what never changes in a run ----------------------------------------------------------

class Setup:
    """What never changes in a run: options, machine, images, space, schedule, objective.

    It is made in two parts. The first reads and refuses, and writes nothing. The second,
    `prepare`, may take long (it encodes all images in latent space): by then the run has
    its folder, and a signal is heard.

    o: Options. ckpt: a checkpoint that is continued exactly, or None. first: the FirstStage
    to start from, or None. UserError for whatever the options, the machine and the images
    do not allow together."""

    def __init__(self, o, ckpt=None, first=None):
        self.o, self.ckpt, self.first = o, ckpt, first
        self.machine = start_machine(o.device, o.threads)
        self.micro, self.shards = split_batch(o, self.machine.world)
        self.dtype = amp_type(o.amp, self.machine.device)

        require_output_outside(o)
        self.images, self.held_out = load_run_images(o, self.machine)
        self.data = describe_data(self.images, self.held_out)
        self.described = self.images.describe_classes()     # "18 images of 3 classes (...)"
        if ckpt:
            require_same_data(ckpt["meta"], self.data, o.out)
        self.space = open_space(o, self.images.channels, ckpt, first)
        self.side = o.size // self.space.factor // o.patch          # h = w, in tokens
        require_hidden_tokens(o, self.side ** 2)
        require_same_view(self.machine, len(self.images), ckpt["step"] if ckpt else 0)
        if o.compile:
            require_compiler(self.machine.device)

        self.classes = list(self.images.classes) if o.labels else []
        self.encoding_space = self.space        # self.space may become one of kept latents
        self.shown, _ = self.held_out.take(choose_subset(len(self.held_out), 8))

    def prepare(self):
        """What may take long. In latent space: run the encoder once, now, and train on what
        it said (a task's condition is made of pixels: there it runs at every step). Then
        measure the data, which gives the schedule its unit.

        -> what was measured (n, C, H, W), or None where a checkpoint or a first stage
        tells. It may be large, so it is handed on and not kept."""
        o, measured = self.o, None
        if o.space == "latent" and o.cache_latents and o.task == "generate":
            (self.images, self.held_out), self.space = encode_once(
                [self.images, self.held_out], self.space, o.latents, o.flip,
                self.machine.device, o.workers)
        if self.ckpt:
            self.meta = self.ckpt["meta"] | dict(vae=absolute_path(o.vae))
        else:
            if not keeps_unit(o, self.first):
                measured = take_measured(o, self.images, self.space, self.machine.device)
            self.meta = describe_model(o, self.images, self.space, self.first, measured)
            self.meta |= dict(shards=self.machine.world * self.shards, data=self.data)
        self.schedule = build_schedule(self.meta)
        # A reconstruction has no time: t = 0, where x_t is the image.
        self.when = o.time_sampling if o.objective == "denoise" else "zero"
        self.objective = OBJECTIVES[o.objective](
            self.schedule, o.predict, o.patch, weighting=o.weighting, recon=o.recon,
            recon_target=o.recon_target, all_scored=ECONOMIES[o.economy].all_scored)
        return measured

    def ratio(self, progress):
        """The share of hidden tokens at a progress in [0, 1]."""
        return mask_ratio(self.o, progress)

    def generator(self, step, shard):
        """A generator on the device for the draws of one shard of one step."""
        shard = self.machine.rank * self.shards + shard                 # over all processes
        seed = seeded(self.o.seed, STAGES.index(self.o.stage), step, shard).initial_seed()
        return torch.Generator(self.machine.device).manual_seed(seed)

    def batches(self, step):
        """An endless iterator of this process's (x, y), `shards` of them a step, from
        `step` on."""
        o, rank = self.o, self.machine.rank
        seed = (o.seed, STAGES.index(o.stage))
        order = (shard_indices(len(self.images), seed,
                               k * o.batch + (rank * self.shards + j) * self.micro, self.micro)
                 for k in itertools.count(step) for j in range(self.shards))
        return self.images.batches(order, o.workers)


# --- what a step changes ------------------------------------------------------------------

def build_optimizer(net, o):
    """The optimizers of a network, a list: change it here to train with another one. A
    group whose `lr` is twice --lr keeps twice the learning rate for the whole run."""
    device = next(net.parameters()).device
    matrices = net.block_matrices() if o.optimizer == "muon" else []
    chosen = {id(q) for q in matrices}
    rest = [q for q in net.parameters() if id(q) not in chosen]
    fused = device.type in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW(rest, lr=o.lr, betas=(float(o.beta1), float(o.beta2)),
                                    weight_decay=o.wd, fused=fused)]
    if matrices:
        half = amp_type(o.amp, device) == torch.bfloat16    # else Muon in float32 too
        optimizers.append(Muon(matrices, lr=MUON_RATE * o.lr, weight_decay=o.wd,
                               dtype=torch.bfloat16 if half else torch.float32))
    return optimizers


class Learner:
    """What a step changes: network, average, optimizers and the scaler of float16.

    learner(zt, t, y, m, cond) is the network in mixed precision, with gradients that are
    averaged over all processes. measured: from `setup.prepare`. step: number of steps so
    far. skipped: how many were not finite."""

    def __init__(self, setup, measured):
        self.o, self.machine, self.dtype = setup.o, setup.machine, setup.dtype
        torch.manual_seed(self.o.seed)                      # of the first weights
        self.net = ViT(setup.schedule, **setup.meta["model"])
        if setup.first:
            load_first_stage(self.net, setup.first, setup.classes)
        if self.net.guess is not None and measured is not None:
            self.net.guess.fit(patchify(measured, self.o.patch).flatten(0, 1))
        self.net.checkpoint_blocks = self.o.checkpoint_blocks
        self.net.to(self.machine.device)
        # The average is a model of its own: it is what gets sampled.
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizers = build_optimizer(self.net, self.o)
        for group in self.groups():
            group["lr_share"] = group["lr"] / self.o.lr
        self.scaler = torch.amp.GradScaler(self.machine.device.type,
                                           enabled=self.dtype == torch.float16)
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.is_whole = True                                # not in the middle of an update
        if setup.ckpt:
            self.load(setup.ckpt)
        if self.o.compile:
            compile_blocks(self.net)
        self.model = self.net
        if self.machine.world > 1:
            on_cuda = self.machine.device.type == "cuda"
            self.model = DistributedDataParallel(           # the buffers never change
                self.net, device_ids=[self.machine.device.index] if on_cuda else None,
                broadcast_buffers=False)

    def __call__(self, zt, t, y, m, cond):
        mixed = self.dtype is not None
        with torch.autocast(self.machine.device.type, self.dtype, enabled=mixed):
            return self.model(zt, t, y, m, cond)

    def groups(self):
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def state(self):
        """What a checkpoint keeps of the learner. -> dict"""
        return dict(step=self.step, model=self.net.state_dict(), ema=self.average.state_dict(),
                    optimizer=[optimizer.state_dict() for optimizer in self.optimizers],
                    scaler=self.scaler.state_dict(), rng=torch.get_rng_state())

    def load(self, ckpt):
        """Go on from a checkpoint, exactly."""
        load_weights(self.net, ckpt["model"])
        load_weights(self.average, ckpt["ema"])
        states = ckpt["optimizer"]                          # older files hold one, not a list
        states = states if isinstance(states, list) else [states]
        load_optimizers(self.optimizers, states)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(ckpt["scaler"])
        torch.set_rng_state(ckpt["rng"])    # no draw here needs it; your own, on a CPU, would
        self.step, self.skipped = ckpt["step"], ckpt["meta"]["skipped"]

    def synchronise(self, is_last):
        """The block in which a shard goes forward and backward. Processes average their
        gradients once a step: in the backward pass of the last shard."""
        wait = self.machine.world > 1 and not is_last
        return self.model.no_sync() if wait else nullcontext()

    def update(self, lr):
        """One step of the optimizers at rate `lr`, and of the average. A step whose
        gradient is not finite is skipped: the norm is that of the averaged gradient, so all
        processes skip it or none does. UserError after too many of them in a row."""
        self.is_whole = False
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [q.grad for q in self.net.parameters() if q.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm().item()
        is_finite = math.isfinite(norm)
        if is_finite:
            if norm > self.o.clip:      # else no multiplication by 1: it costs 5 % of a step
                torch._foreach_mul_(gradients, self.o.clip / norm)
            for group in self.groups():
                group["lr"] = lr * group["lr_share"]
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            # The average forgets its first, random weights faster than its later ones.
            decay = min(self.o.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():       # else autograd would keep the history of every average
                torch._foreach_lerp_(list(self.average.parameters()),
                                     list(self.net.parameters()), 1 - decay)
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        self.skipped += not is_finite
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.is_whole = True
        if self.skipped_in_a_row >= TOO_MANY:       # not counted, so that the journal saves the run
            remedy = ", or leave out --compile" if self.o.compile else ""
            raise UserError(f"the last {TOO_MANY} gradients, up to step {self.step + 1}, were not "
                            f"finite: try a smaller --lr or --amp off{remedy}")
        self.step += 1


# --- a step -------------------------------------------------------------------------------

def augment(x, y, g, flip=True, label_dropout=0.0):
    """Mirror half of the images, drop a share of the labels.

    x (B, C, S, S). y (B,) int64, or None. g: generator of both draws. -> x, y (-1:
    dropped)"""
    def coin(share):
        return torch.rand(len(x), generator=g, device=x.device) < share              # (B,)

    if flip:
        x = torch.where(coin(0.5)[:, None, None, None], x.flip(3), x)
    if y is not None:
        y = torch.where(coin(label_dropout), -1, y)
    return x, y


def learning_rate(o, step, progress, total=None):
    """The learning rate of a step: a linear warm-up over --warmup steps (at most a tenth of
    the `total`), times a cosine decay over the progress in [0, 1] from --lr to --lr-end of
    it."""
    warmup = min(o.warmup, total // 10) if total else o.warmup
    decay = o.lr_end + (1 - o.lr_end) * (1 + math.cos(math.pi * progress)) / 2
    return o.lr * min(1.0, (step + 1) / (warmup + 1)) * decay


def train_step(setup, learner, batches, ratio, lr):
    """One step: the shards of one global batch, then an update.

    batches: from `setup.batches`. ratio: share of hidden tokens. lr: the learning rate.
    -> the mean training loss of this process, a number on the device"""
    o, device, h = setup.o, setup.machine.device, setup.side
    space, schedule, objective = setup.space, setup.schedule, setup.objective
    mean_loss = 0.0
    for shard in range(setup.shards):
        x, y = next(batches)
        g = setup.generator(learner.step, shard)
        x, y = to_float(x.to(device, non_blocking=True)), y.to(device) if setup.classes else None
        x, y = augment(x, y, g, o.flip, o.label_dropout)
        x, cond = make_condition(o.task, x, setup.images.maps, space.factor, g)
        with learner.synchronise(is_last=shard == setup.shards - 1):
            z = space.encode(x)                                  # spaces.py: pixels or latents
            m = draw(o.policy, len(z), h, h, ratio, g, o.block)  # mask.py: which tokens are seen
            n = schedule.noise(z, g)                             # schedules.py: eps (and slopes)
            t = times(setup.when, schedule, len(z), g)           # schedules.py: a time for each
            zt = schedule.corrupt(z, n, t)                       # schedules.py: a(t) z + b(t) eps
            out = learner(zt, t, y, m, cond)                     # vit.py: image and mask in
            loss = objective(out, z, n, t, m)                    # losses.py: seen, and hidden
            learner.scaler.scale(loss / setup.shards).backward()
        mean_loss = mean_loss + loss.detach() / setup.shards
    learner.update(lr)
    return mean_loss


# --- the loop -----------------------------------------------------------------------------

def train(o, ckpt=None, first=None, on_step=None):
    """Train with options `o`.

    ckpt      a checkpoint to continue exactly
    first     the FirstStage to start from
    on_step   on_step(step, numbers) is called after every step, for a logger of your own;
              numbers: a dict of loss, lr, ratio and progress
    -> the run's folder, None after --dry-run. UserError for what cannot be, in one line"""
    check(o)
    if o.objective == "reconstruct":                    # the output is the hidden image itself
        o = dataclasses.replace(o, predict="x0")
    if o.dry_run:
        print(describe_cost(o, f"{o.stage}.py", sys.argv[1:]))
        return None
    setup = Setup(o, ckpt, first)
    with Journal(setup) as journal:
        learner = Learner(setup, setup.prepare())
        plan = make_plan(setup)
        journal.begin(learner, plan, learning_rate)
        batches = setup.batches(learner.step)
        while not journal.ended:
            progress = plan.progress
            ratio, lr = setup.ratio(progress), learning_rate(o, plan.step, progress, plan.total)
            loss = train_step(setup, learner, batches, ratio, lr)
            plan.count_step()                           # one step more: progress goes on
            journal.record(loss, ratio, lr)             # log, evaluate, save; plan, and end
            if on_step:                                 # learner.step and plan.step are equal here
                on_step(plan.step, dict(loss=loss.item(), lr=lr, ratio=ratio, progress=progress))
    return journal.folder


def make_plan(setup):
    """The Plan of a run: --steps, or --minutes."""
    o, ckpt = setup.o, setup.ckpt
    minutes = None if o.steps else o.minutes or o.default_minutes
    return Plan(o.steps, minutes, lambda p: step_cost(o, setup.side ** 2, p), o.sample_every,
                read_state(ckpt) if ckpt else None, ckpt["seconds"] if ckpt else 0.0)


def continue_run(o, ckpt):
    """Continue a run, unless its plan is fulfilled: torchrun --max-restarts repeats
    commands."""
    if ckpt["step"] >= (o.steps or ckpt["meta"]["plan"] or math.inf):
        print(f"{o.out} is finished: {ckpt['step']} steps; a larger --steps continues it")
    else:
        train(o, ckpt)


def main(argv=None):
    given = vars(options_parser(Options, __doc__.split("\n")[0]).parse_args(argv))
    o, ckpt = resolve_options(Options, given)
    if ckpt:
        continue_run(o, ckpt)
    else:
        train(o)


if __name__ == "__main__":
    run_command(main)
