"""The autoencoder and its latent space: f x f pixels become one place of z, and back again.

The idea (LMD, arXiv 2312.07971; MaskDiT, arXiv 2306.09305). Diffusion runs on the latents z
of an autoencoder that was trained before. A transformer then sees f^2 times fewer places.
The autoencoder is Stable Diffusion's (LDM, arXiv 2112.10752), tensor for tensor in the
layout of `diffusers`, so its published files load. This file's command trains a tiny one in
minutes.

    posterior  q(z|x) = N(mean, exp(logvar)),  (mean, logvar) = quant_conv(encoder(x)) [LDM]
    latent     z = (mean - latent_mean) / latent_std: the mode, not a sample; mean and
               standard deviation of each latent channel, over the data                [LMD]
    training   |x' - x|^2 + 0.1 |x' - x| + 1e-6 KL,  x' = decoder(mean + exp(logvar/2) eps)
               KL(q || N(0, I)) = 1/2 sum(mean^2 + exp(logvar) - 1 - logvar)           [LDM]

    python vae.py --minutes 10 --out vae.pt    # the built-in faces -> vae.pt and vae.png
    space = load_vae("vae.pt")                 # or Stable Diffusion's own file of weights
    z = space.encode(x)
    x = space.decode(z)

Shapes: B batch, C channels of the image, H x W pixels, L channels of the latent (4),
f = 2^(stages - 1) pixels per place along a side; x (B, C, H, W) in [-1, 1];
z (B, L, H / f, W / f).
"""
import hashlib
import math
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import plumbing  # before torch: how its threads wait

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from data import holdout, load_images
from plumbing.console import (
    UserError, build_parser, describe_error, hearing_signals, parse_path, replacing, run_command)
from plumbing.downloads import fetch_published, is_published, list_published
from plumbing.images import choose_subset, grid, to_float, to_uint8
from plumbing.layout import require_autoencoder
from plumbing.machine import pick_device, require_one_process, set_threads
from plumbing.sheets import save_picture
from plumbing.writer import refuse_among
from tasks import psnr


# --- the autoencoder: names as in diffusers, so that its files load -----------------------

class Resnet(nn.Module):
    """Two times norm, SiLU, 3x3 convolution, beside a shortcut.

    x (B, c_in, H, W).  -> (B, c_out, H, W)"""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)                 # torch's default is 1e-5
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Identity()                    # an identity has no name in the file
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Every place looks at every other, with one head as wide as the map.

    x (B, c, H, W).  -> the same shape"""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])          # a list: the file calls it to_out.0

    def forward(self, x):
        flat = self.group_norm(x.flatten(2))          # or it would round otherwise than diffusers
        places = rearrange(flat, "b c n -> b 1 n c")                            # (B, 1 head, HW, c)
        q, k, v = self.to_q(places), self.to_k(places), self.to_v(places)
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v))
        return rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]) + x


class Stage(nn.Module):
    """Some resnets, after the first an attention if wanted; then half the sides, or twice.

    x (B, c_in, H, W).
    -> (B, c_out, H / 2, W / 2), (B, c_out, 2 H, 2 W) or (B, c_out, H, W)"""

    def __init__(
        self,
        c_in,            # channels that come in
        c_out,           # channels that go out
        layers,          # how many resnets
        groups,          # of every GroupNorm
        resample="",     # "downsamplers", "upsamplers" (their names in the file) or "" for neither
        attend=False,    # whether there is an attention
    ):
        super().__init__()
        self.resample = resample
        self.resnets = nn.ModuleList([Resnet(c_out if j else c_in, c_out, groups)
                                      for j in range(layers)])
        # An empty list has no names in the file.
        self.attentions = nn.ModuleList([Attention(c_out, groups)] * attend)
        if resample:
            how = dict(stride=2) if resample == "downsamplers" else dict(padding=1)
            block = nn.ModuleDict(dict(conv=nn.Conv2d(c_out, c_out, 3, **how)))
            setattr(self, resample, nn.ModuleList([block]))

    def forward(self, x):
        for block in [self.resnets[0], *self.attentions, *self.resnets[1:]]:
            x = block(x)
        if self.resample == "downsamplers":
            # Pads on the right and below only, as LDM does.
            return self.downsamplers[0]["conv"](F.pad(x, (0, 1, 0, 1)))
        if self.resample == "upsamplers":
            return self.upsamplers[0]["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Coder(nn.Module):
    """Encoder or decoder: convolution, stages, a middle at their small end, convolution.

    x (B, c_in, H, W).
    -> (B, c_out, H / f, W / f) going down, (B, c_out, f H, f W) going up"""

    def __init__(
        self,
        c_in,            # channels that come in
        c_out,           # channels that go out
        widths,          # channels of the stages in the order in which they are passed
        layers,          # resnets of a stage
        groups,          # of every GroupNorm
        down,            # True: encoder, False: decoder
    ):
        super().__init__()
        self.down = down
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)
        resamplers = ["downsamplers" if down else "upsamplers"] * (len(widths) - 1) + [""]
        stages = [Stage(before, width, layers, groups, resample)
                  for before, width, resample in zip([widths[0], *widths], widths, resamplers)]
        setattr(self, "down_blocks" if down else "up_blocks", nn.ModuleList(stages))
        middle = widths[-1] if down else widths[0]
        self.mid_block = Stage(middle, middle, 2, groups, attend=True)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)

    def forward(self, x):
        blocks = self.down_blocks if self.down else self.up_blocks
        x = self.conv_in(x)
        for block in [*blocks, self.mid_block] if self.down else [self.mid_block, *blocks]:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder, with the names and the arithmetic of diffusers.

    .factor: f.  .latent: L.  .channels: C.  .config: the arguments it was built with.
    Source: LDM, arXiv 2112.10752, model kl-f8; AutoencoderKL in diffusers."""

    def __init__(
        self,
        widths,          # of the stages from the pixels inwards; all but the last halve the sides
        layers,          # resnets of a stage of the encoder; the decoder's stages have one more
        groups,          # of every GroupNorm
        latent=4,        # channels of z
        channels=3,      # channels of the image
        # 1 / standard deviation of z. Published files do not hold it. This class does not
        # apply it; LatentSpace does, where it has no statistics.
        scaling=1.0,
    ):
        super().__init__()
        self.config = dict(widths=list(widths), layers=layers, groups=groups, latent=latent,
                           channels=channels, scaling=scaling)
        self.latent, self.channels, self.scaling = latent, channels, scaling
        self.factor = 2 ** (len(widths) - 1)
        self.encoder = Coder(channels, 2 * latent, widths, layers, groups, down=True)
        self.decoder = Coder(latent, channels, widths[::-1], layers + 1, groups, down=False)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, x):
        """Encode images to the posterior of their latents.

        x (B, C, H, W) in [-1, 1].
        -> mean, logvar in [-30, 20], each (B, L, H / f, W / f)
        UserError for other channels, or for sides that are not multiples of f."""
        channels, height, width = x.shape[1:]
        if channels != self.channels or height % self.factor or width % self.factor:
            raise UserError(f"the autoencoder takes {self.channels} channels and sides that are "
                            f"multiples of {self.factor}, not {channels} x {height} x {width}")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)            # [LDM] posterior
        return mean, logvar.clamp(-30, 20)                                    # exp stays finite

    def decode(self, z):
        """Decode latents.

        z (B, L, h, w), on the scale of `encode`.
        -> (B, C, f h, f w), in [-1, 1] up to the network's errors"""
        return self.decoder(self.post_quant_conv(z))


PRESETS = {
    # f = 8, 83,653,863 parameters
    "sd": dict(widths=[128, 256, 512, 512], layers=2, groups=32, scaling=0.18215),
    # f = 4, 0.24 million parameters
    "tiny": dict(widths=[16, 32, 32], layers=1, groups=8),
}


# --- the latent space ---------------------------------------------------------------------

class LatentSpace(nn.Module):
    """The standardised latents of an autoencoder, with `encode` and `decode`.

    It follows the device of what it is given, and computes in float32. The mean and the
    standard deviation are kept here, because the autoencoder's tensors are those of Stable
    Diffusion."""
    name = "latent"

    def __init__(
        self,
        vae,             # an AutoencoderKL, frozen from here on
        mean=None,       # (L,) mean of its latents; 0 if None
        std=None,        # (L,) standard deviation of its latents; 1 / vae.scaling if None
        sha="",          # 8 hex digits that name the weights, "" for none
        batch=16,        # images in one pass
    ):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.factor, self.channels = vae.factor, vae.latent
        self.sha, self.batch = sha, batch
        # The released LMD feeds the raw mean, whose standard deviation is 5.5.
        for name, value, default in (("mean", mean, 0.0), ("std", std, 1 / vae.scaling)):
            value = torch.full((vae.latent,), default) if value is None else value
            self.register_buffer(name, value.float().reshape(vae.latent, 1, 1))

    @torch.no_grad()
    def run_in_parts(self, network, x):
        """Run a network over x (B, ...), a few rows at a time, without gradient.

        It runs outside of autocast: Stable Diffusion's autoencoder overflows in float16."""
        self.to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([network(part) for part in x.float().split(self.batch)])

    def encode(self, x):
        """Encode images, the same way at every call, without gradient.

        x (B, C, H, W) in [-1, 1].
        -> z (B, L, H / f, W / f), of about mean 0 and standard deviation 1 in each channel
        UserError as for AutoencoderKL.encode."""
        mode = self.run_in_parts(lambda part: self.vae.encode(part)[0], x)
        return (mode - self.mean) / self.std                                          # [LMD] latent

    def decode(self, z):
        """Decode latents, without gradient.

        z (B, L, h, w).  -> x (B, C, f h, f w), in [-1, 1] up to the network's errors"""
        return self.run_in_parts(lambda part: self.vae.decode(part * self.std + self.mean), z)


# --- files of weights ---------------------------------------------------------------------

RENAMES = [                               # names of CompVis and of early diffusers -> today's names
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.\1sample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.(q|k|v)(?:uery|ey|alue)\.", r".to_\1."),
    (r"\.proj_attn\.", ".to_out.0."),
]


def rename_keys(state, stages):
    """Translate names of CompVis and of early diffusers to today's; those of today stay.

    The tensors stay, too. Only the 1x1 convolutions of CompVis' attention, (c, c, 1, 1),
    become matrices (c, c).
    state: {name: tensor}.  stages: how many the autoencoder has.  -> {name: tensor}"""
    # A whole Stable Diffusion also has a U-Net and a text encoder.
    prefix = "first_stage_model."
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items()
             if name.startswith(prefix)}
    renamed = {}
    for name, tensor in (inner or state).items():
        if name.startswith(("loss.", "model_ema.")):
            continue                      # LDM's discriminator and averages, in its training files
        # CompVis counts the decoder's stages from the pixels.
        name = re.sub(r"^(decoder\.up\.)(\d+)",
                      lambda found: f"{found[1]}{stages - 1 - int(found[2])}", name)
        for old, new in RENAMES:
            name = re.sub(old, new, name)
        is_convolution = tensor.ndim == 4 and re.search(r"attentions\.0\.to_.*weight$", name)
        renamed[name] = tensor[:, :, 0, 0] if is_convolution else tensor
    return renamed


def read_weights(path):
    """Read a file of weights. Neither kind of file can run code.

    path: a .safetensors file, or one that torch.save wrote.  -> what it holds, a dict"""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file             # optional: all else works without it
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def build_autoencoder(config, weights):
    """Build an AutoencoderKL and give it weights.

    config: a dict of AutoencoderKL's arguments.  weights: {name: tensor} under any names
    that `rename_keys` knows.  -> AutoencoderKL on the CPU
    UserError that names missing, unexpected and misshapen tensors."""
    with torch.device("meta"):          # no time and no random numbers for weights to be replaced
        vae = AutoencoderKL(**config)
    tensors = {name: value for name, value in weights.items() if torch.is_tensor(value)}
    state, wanted = rename_keys(tensors, len(config["widths"])), vae.state_dict()
    common = wanted.keys() & state
    faults = {"missing": wanted.keys() - state, "unexpected": state.keys() - wanted,
              "misshapen": {name for name in common if wanted[name].shape != state[name].shape}}
    told = [f"{len(names)} {what}: {', '.join(sorted(names)[:5])}{', ...' * (len(names) > 5)}"
            for what, names in faults.items() if names]
    if told:
        raise UserError(f"these are not the weights of the autoencoder {config}: {'; '.join(told)}")
    vae.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return vae


def find_weights(path):
    """A file of weights, or the one in a folder as diffusers saves it. -> Path

    UserError for a folder with none or with several."""
    if not path.is_dir():
        return path
    found = [*sorted(path.glob("*.safetensors")), *sorted(path.glob("*.bin"))]
    if len(found) > 1:                                  # the same weights twice: the safe format
        found = [file for file in found if file.suffix == ".safetensors"] or found
    if len(found) != 1:
        raise UserError(f"{path}: is a folder with {len(found)} files of weights (.safetensors, "
                        ".bin); give the file itself")
    return found[0]


def load_vae(path, config="sd"):
    """Load a file of weights as a LatentSpace.

    path: what `python vae.py` wrote, which holds its own configuration and statistics. Or
    Stable Diffusion's autoencoder as .safetensors, .bin, .pt or .ckpt, under the names of
    diffusers (new or old) or of CompVis (alone or inside the whole model). Or "sd", which
    is downloaded once (plumbing/downloads.py), unless a path has this name.
    config: for the second kind, a name in PRESETS or a dict of AutoencoderKL's arguments.
    -> LatentSpace on the CPU; its .sha is the first 8 hex digits of the file's SHA-256
    UserError when the file is missing, damaged or needs a package, and, by name, for
    missing, unexpected and misshapen tensors."""
    if is_published(path, "vae"):
        path, = fetch_published(str(path))
    path = find_weights(Path(os.path.expanduser(path)))
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; train an autoencoder (python vae.py) "
                        "or give sd, which downloads Stable Diffusion's")
    mean = std = None
    try:
        state = read_weights(path)
        if {"config", "model", "mean", "std"} <= state.keys():
            require_autoencoder(state, path)
            config, mean, std, state = state["config"], state["mean"], state["std"], state["model"]
        vae = build_autoencoder(PRESETS[config] if isinstance(config, str) else config, state)
        return LatentSpace(vae, mean, std, hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    except UserError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: {why}") from None
    except ImportError:
        raise UserError(f"{path}: reading .safetensors needs one more package: "
                        "pip install safetensors; or give the .bin file") from None
    except Exception as error:        # damage: pickle, zipfile and safetensors raise each their own
        why = f"{type(error).__name__}: {describe_error(error)[:90]}"
        raise UserError(f"{path}: holds no autoencoder that can be read ({why})") from None


# --- training -----------------------------------------------------------------------------

@contextmanager
def stop_signals():
    """Note Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 in a block; a second one ends it at once.

    -> a list, of the numbers that came so far"""
    came = []

    def note(number, frame):
        if came:
            raise SystemExit(128 + number)                # files that are open here are removed
        came.append(number)

    with hearing_signals(note):
        yield came


def draw_training_images(images, batch, generator):
    """Draw a batch of images with replacement, each mirrored with probability 1/2.

    images: data.Images.  generator: on the CPU, for the same draws on every device.
    -> x (batch, C, H, W) in [-1, 1] on the CPU"""
    x = to_float(images.take(torch.randint(len(images), (batch,), generator=generator))[0])
    mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5       # train.py mirrors, too
    return torch.where(mirrored, x.flip(3), x)


def autoencoder_loss(vae, x, generator):
    """The loss of one batch: reconstruction, and a weak pull of the posterior to N(0, I).

    vae: AutoencoderKL.  x (B, C, H, W).  generator: of the posterior's sample, on the CPU.
    -> a scalar tensor.  Source: LDM, without its discriminator and LPIPS"""
    mean, logvar = vae.encode(x)
    eps = torch.randn(mean.shape, generator=generator).to(x.device)
    out = vae.decode(mean + (0.5 * logvar).exp() * eps)                             # [LDM] training
    # So weak that it only bounds the scale of the latents.
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    return F.mse_loss(out, x) + 0.1 * F.l1_loss(out, x) + 1e-6 * kl


def autoencoder_rate(lr, step, steps):
    """The learning rate of a step: 50 steps of warm-up, then a cosine to 0.

    steps: of the whole training; None while they are not known yet."""
    decay = 0.5 + 0.5 * math.cos(math.pi * step / steps) if steps else 1
    return lr * min(1, (step + 1) / 50) * decay


def train_vae(vae, images, o, device, came=()):
    """Train an autoencoder in place.

    --minutes becomes a number of steps after ten timed ones, because the learning rate must
    know where it ends. The clock stops a training that runs 10 % over that plan.
    vae: AutoencoderKL on device.  images: data.Images.  o: the command's options.
    came: from `stop_signals`; the training ends when it is not empty.
    -> how many steps were taken
    UserError when the gradient stops being finite."""
    generator = torch.Generator().manual_seed(o.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=o.lr, betas=(0.9, 0.99))
    steps, step = o.steps, 0
    minutes = o.minutes or (math.inf if o.steps else 10)
    started = timed = perf_counter()
    with tqdm(desc="training", total=steps, unit="step",
              mininterval=0.5 if sys.stderr.isatty() else 20) as bar:
        while step != steps and perf_counter() - started < 66 * minutes and not came:
            optimizer.param_groups[0]["lr"] = autoencoder_rate(o.lr, step, steps)
            x = draw_training_images(images, o.batch, generator).to(device)
            loss = autoencoder_loss(vae, x, generator)
            optimizer.zero_grad()
            loss.backward()
            if not nn.utils.clip_grad_norm_(vae.parameters(), 1.0).isfinite():
                raise UserError(f"--lr {o.lr}: the gradient is not finite any more at step {step}; "
                                "try a smaller one")
            optimizer.step()
            step += 1
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
            bar.update()
            if step == 1:                         # the first step also pays for torch's start
                timed = perf_counter()
            if step == 11 and steps is None:
                seconds_per_step = (perf_counter() - timed) / 10
                steps = bar.total = max(step, int(60 * minutes / seconds_per_step))
    return step


def latent_statistics(vae, batches):
    """Measure the mean and standard deviation of an autoencoder's latents by channel.

    The standard deviations differ by a factor of up to 5.
    batches: an iterable of x (b, C, H, W) on vae's device.
    -> mean, std (L,) of each latent channel"""
    raw = LatentSpace(vae, std=torch.ones(vae.latent))
    z = torch.cat([raw.encode(x).cpu() for x in batches]).double()
    std = z.std((0, 2, 3), correction=0).clamp(min=1e-6)             # a dead channel stays finite
    return z.mean((0, 2, 3)).float(), std.float()


def patch_pca(fit, x, f, latent):
    """Reconstruct x linearly, by the principal components of the patches of `fit`.

    fit, x (n, C, H, W).  f: pixels along a side of a patch.  latent: how many components.
    -> like x"""
    patches = lambda images: rearrange(images, "n c (h p) (w q) -> (n h w) (c p q)", p=f, q=f)
    mean = patches(fit).mean(0)
    ascending = torch.linalg.eigh((patches(fit) - mean).T.cov()).eigenvectors
    axes = ascending[:, -latent:]
    projected = mean + (patches(x) - mean) @ axes @ axes.T
    return rearrange(projected, "(n h w) (c p q) -> n c (h p) (w q)",
                     p=f, q=f, n=len(x), h=x.shape[2] // f)


# --- the command: train the tiny one ------------------------------------------------------

def parser():
    p = build_parser("Train a tiny autoencoder.")
    p.add_argument("--data", default="faces", type=parse_path,
                   help="a folder, a .zip, cifar-10-python.tar.gz, faces for the built-in ones, or "
                        f"a name that is downloaded: {list_published('data')}")
    p.add_argument("--size", type=int, default=32, help="pixels along a side, a multiple of 4")
    p.add_argument("--gray", action="store_true", help="one channel instead of three")
    p.add_argument("--steps", type=int, help="number of steps; --minutes decides when left out")
    p.add_argument("--minutes", type=float,
                   help="length of the training; 10 when neither this nor --steps is given")
    p.add_argument("--out", default="vae.pt", type=parse_path, help="the weights to write")
    p.add_argument("--picture", type=parse_path,
                   help="the .png of held-out originals | reconstructions; "
                        "beside --out when left out")
    p.add_argument("--batch", type=int, default=32, help="images in a step")
    p.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    p.add_argument("--seed", type=int, default=0,
                   help="seed of the split, the first weights and all draws")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    return p


def check_vae_options(o, out, picture, factor):
    """Refuse what cannot work before anything is done.

    o: the command's options.  out, picture: the paths to write.  factor: f.
    UserError for the first option that is wrong."""
    for name in ("size", "steps", "minutes", "batch", "lr"):
        value = getattr(o, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: must be positive")
    if not 0 <= o.seed < 2**32:
        raise UserError(f"--seed {o.seed}: must lie between 0 and 2^32")
    if o.steps is not None and o.minutes is not None:
        raise UserError("--steps and --minutes: give one of them")
    if o.size % factor:
        raise UserError(f"--size {o.size}: must be a multiple of {factor}, the pixels along a side "
                        "of one place of the latents")
    for name, path, ending in (("out", out, ".pt"), ("picture", picture, ".png")):
        writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
        if path.suffix != ending or not writable or path.is_dir():
            raise UserError(f"--{name} {path}: wants a name that ends with {ending}, "
                            "in a folder that exists and can be written")
    if out.exists():                    # runs of latents can do nothing without theirs
        raise UserError(f"--out {out}: exists already, and runs may need it; give another name, "
                        "or delete it first")
    refuse_among({"--picture": picture}, {"--data": o.data})


def load_split(o):
    """Load the images of the command. -> training Images, held-out Images (a tenth)"""
    images = load_images(o.data, o.size, o.gray, seed=o.seed)
    if len(images) < 2:
        raise UserError(f"--data {o.data}: one image is too few, for some are held out to measure")
    return holdout(images, 0.1, o.seed)


def measure_latents(vae, images, device, seed=0):
    """`latent_statistics` of at most 4,096 images, a random part. -> mean, std (L,)"""
    order = choose_subset(len(images), 4096, seed).split(256)
    return latent_statistics(vae, (to_float(images.take(some)[0]).to(device) for some in order))


def take_some(images):
    """At most 1,024 images of a data set, a random part. -> x (n, C, H, W) in [-1, 1]"""
    return to_float(images.take(choose_subset(len(images), 1024))[0])


def draw_reconstructions(x, reconstructed, columns=8):
    """Draw at most 32 originals on the left, their reconstructions on the right.

    They are a random part. Only full rows are drawn.
    x, reconstructed (n, C, H, W) in [-1, 1].  -> PIL image"""
    columns, chosen = min(columns, len(x)), choose_subset(len(x), 32)
    rows = []
    for originals, results in zip(x[chosen].split(columns), reconstructed[chosen].split(columns)):
        if len(originals) == columns:
            rows += [originals, results]
    return grid(to_uint8(torch.cat(rows)), columns=2 * columns)


def write_vae(vae, mean, std, file):
    """Write an autoencoder and its statistics, for `load_vae`."""
    weights = {name: tensor.cpu() for name, tensor in vae.state_dict().items()}
    torch.save(dict(config=vae.config, model=weights, mean=mean, std=std), file)


def run_training(o):
    """Do the command's work: check, train, write, measure, draw.

    A signal ends the training; the autoencoder as it is then is written and measured.
    o: the parsed arguments.  -> exit status
    UserError as of check_vae_options, load_images and train_vae."""
    factor = 2 ** (len(PRESETS["tiny"]["widths"]) - 1)
    out, picture = Path(o.out), Path(o.picture or o.out.removesuffix(".pt") + ".png")
    require_one_process("vae.py")
    device = pick_device(o.device)
    check_vae_options(o, out, picture, factor)
    set_threads(o.threads)
    images, held_out = load_split(o)
    torch.manual_seed(o.seed)                                                # of the first weights
    vae = AutoencoderKL(**PRESETS["tiny"], channels=images.channels).to(device)
    with stop_signals() as came:
        with replacing(out) as file:
            steps = train_vae(vae, images, o, device, came)
            if came and not steps:
                raise SystemExit(128 + came[0])                              # nothing was learnt
            mean, std = measure_latents(vae, images, device, o.seed)
            write_vae(vae, mean, std, file)
        space, x = LatentSpace(vae, mean, std), take_some(held_out)
        reconstructed = space.decode(space.encode(x.to(device))).cpu()
        save_picture(draw_reconstructions(x, reconstructed), picture)
    rival = patch_pca(take_some(images), x, factor, vae.latent)
    print(f"held-out PSNR {psnr(reconstructed.clamp(-1, 1), x):.2f} dB, patch-PCA of the same "
          f"latent size {psnr(rival.clamp(-1, 1), x):.2f} dB ({len(x)} images)")
    side, shown_std = o.size // factor, " ".join(f"{value:.2f}" for value in std.tolist())
    print(f"wrote {out} after {steps} steps: {o.size} x {o.size} x {vae.channels} -> "
          f"{side} x {side} x {vae.latent}, latent std {shown_std}; "
          f"{picture}: originals | reconstructions")
    return 128 + came[0] if came else 0


def main(argv=None):
    return run_training(parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
