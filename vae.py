"""Spaces: where diffusion happens. `space.encode(x)` takes images to what the network sees, `space.decode(z)` takes them back.

In pixel space both are the identity. In the latent space of an autoencoder f x f pixels become one place of z, so a transformer sees f^2
times fewer places: LMD (arXiv 2312.07971) and MaskDiT (2306.09305) work there. No other file needs to know which space it is given.
`AutoencoderKL` is Stable Diffusion's, tensor for tensor in the layout of `diffusers`; its tiny preset trains in minutes.

    posterior   q(z|x) = N(mean, exp(logvar)),  (mean, logvar) = quant_conv(encoder(x))                     AutoencoderKL [LDM, 2112.10752]
    latent      z = (mean - m_c) / s_c,  the mode and not a sample; m_c, s_c: statistics of latent channel c          LatentSpace [LMD]
    training    |x' - x|^2 + 0.1 |x' - x| + 1e-6 KL(q || N(0, I)),  KL = 1/2 sum(mean^2 + exp(logvar) - 1 - logvar)

    python vae.py --minutes 10 --out vae.pt                                 # the built-in faces -> vae.pt and vae.png
    space = load_vae("vae.pt"); z = space.encode(x); x = space.decode(z)    # or Stable Diffusion's own .safetensors, .bin or .ckpt

Shapes: B batch, C channels of the image, L of the latent (4), f = 2^(stages - 1); x (B, C, H, W) in [-1, 1]; z (B, L, H / f, W / f).
"""
import hashlib
import math
import re
import sys
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from plumbing.console import UserError, build_parser, describe_error, replacing, run_command
from data import holdout, load_images
from plumbing.machine import pick_device
from plumbing.images import grid, to_float, to_uint8


# --- the autoencoder: names as in diffusers, so that its files load --------------------------------------------------------------

class Resnet(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, beside a shortcut: (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, c_in, eps=1e-6), nn.GroupNorm(groups, c_out, eps=1e-6)    # torch's default is 1e-5
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()   # an identity has no name in the file

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Every place looks at every other, with one head as wide as the map: (B, c, H, W) -> the same."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])                          # a list: the file calls it to_out.0

    def forward(self, x):
        u = rearrange(self.group_norm(x.flatten(2)), "b c n -> b 1 n c")        # flat: another layout would round otherwise than diffusers
        u = F.scaled_dot_product_attention(self.to_q(u), self.to_k(u), self.to_v(u))           # (B, 1 head, HW, c)
        return rearrange(self.to_out[0](u), "b 1 (h w) c -> b c h w", h=x.shape[2]) + x


class Stage(nn.Module):
    """`layers` resnets, after the first an attention if `attend`, then a way to half the sides, twice, or none: (B, c_in, H, W) -> (B, c_out, ...)."""

    def __init__(self, c_in, c_out, layers, groups, way="", attend=False):
        super().__init__()
        self.way, self.resnets = way, nn.ModuleList([Resnet(c_out if j else c_in, c_out, groups) for j in range(layers)])
        self.attentions = nn.ModuleList([Attention(c_out, groups)] * attend)    # an empty list has no names in the file
        if way:
            conv = nn.Conv2d(c_out, c_out, 3, **dict(stride=2) if way == "downsamplers" else dict(padding=1))
            setattr(self, way, nn.ModuleList([nn.ModuleDict(dict(conv=conv))]))

    def forward(self, x):
        for block in [self.resnets[0], *self.attentions, *self.resnets[1:]]:
            x = block(x)
        if self.way == "downsamplers":
            return self.downsamplers[0]["conv"](F.pad(x, (0, 1, 0, 1)))         # pads on the right and below only, as LDM's does
        return self.upsamplers[0]["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest")) if self.way else x


class Coder(nn.Module):
    """Encoder (down) or decoder: a convolution, stages with the middle at their small end, a normed convolution."""

    def __init__(self, c_in, c_out, widths, layers, groups, down):
        super().__init__()
        self.down, ways = down, ["downsamplers" if down else "upsamplers"] * (len(widths) - 1) + [""]
        self.conv_in, self.conv_out = nn.Conv2d(c_in, widths[0], 3, padding=1), nn.Conv2d(widths[-1], c_out, 3, padding=1)
        stages = [Stage(before, width, layers, groups, way) for before, width, way in zip([widths[0], *widths], widths, ways)]
        setattr(self, "down_blocks" if down else "up_blocks", nn.ModuleList(stages))
        self.mid_block = Stage(widths[-1 if down else 0], widths[-1 if down else 0], 2, groups, attend=True)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)

    def forward(self, x):
        for block in [self.conv_in, *self.down_blocks, self.mid_block] if self.down else [self.conv_in, self.mid_block, *self.up_blocks]:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder (LDM, arXiv 2112.10752, kl-f8), with the names and the arithmetic of diffusers' AutoencoderKL.

    widths: of the stages from the pixels inwards; all but the last halve the sides: .factor = 2^(stages - 1).  layers: resnets of a stage
    of the encoder, the decoder's have one more.  groups: of every GroupNorm.  latent: channels of z.  channels: of the image.
    scaling: 1 / standard deviation of z, a default for LatentSpace: files of weights do not hold it and nothing here applies it."""

    def __init__(self, widths, layers, groups, latent=4, channels=3, scaling=1.0):
        super().__init__()
        self.config = dict(widths=list(widths), layers=layers, groups=groups, latent=latent, channels=channels, scaling=scaling)
        self.latent, self.channels, self.scaling, self.factor = latent, channels, scaling, 2 ** (len(widths) - 1)
        self.encoder = Coder(channels, 2 * latent, widths, layers, groups, down=True)
        self.decoder = Coder(latent, channels, widths[::-1], layers + 1, groups, down=False)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1), nn.Conv2d(latent, latent, 1)

    def encode(self, x):
        """x (B, C, H, W) in [-1, 1] -> mean, logvar in [-30, 20], each (B, L, H / f, W / f). UserError for another C, or sides not k f."""
        c, h, w = x.shape[1:]
        if c != self.channels or h % self.factor or w % self.factor:
            raise UserError(f"the autoencoder takes {self.channels} channels and sides that are multiples of {self.factor}, not {c} x {h} x {w}")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)                                      # exp(logvar) stays finite

    def decode(self, z):
        """z (B, L, h, w), as `encode` scales it -> (B, C, f h, f w), in [-1, 1] up to the network's errors."""
        return self.decoder(self.post_quant_conv(z))


PRESETS = {"sd": dict(widths=[128, 256, 512, 512], layers=2, groups=32, scaling=0.18215),      # 83,653,863 parameters, f = 8
           "tiny": dict(widths=[16, 32, 32], layers=1, groups=8)}                              # 0.24 million, f = 4


# --- spaces ------------------------------------------------------------------------------------------------------------------------

class LatentSpace(nn.Module):
    """The standardised latents of an autoencoder. Follows the device of what it is given and computes in float32.
    vae: an AutoencoderKL, frozen from here on.  mean, std (L,): of its latents, kept here because vae's tensors are Stable Diffusion's;
    without them 0 and 1 / vae.scaling.  sha: 8 hex digits that name the weights, "" for none.  batch: images in one pass."""
    name = "latent"

    def __init__(self, vae, mean=None, std=None, sha="", batch=16):
        super().__init__()
        self.vae, self.factor, self.channels, self.sha, self.batch = vae.eval().requires_grad_(False), vae.factor, vae.latent, sha, batch
        for name, value, default in (("mean", mean, 0.0), ("std", std, 1 / vae.scaling)):
            value = torch.full((vae.latent,), default) if value is None else value      # LMD's code feeds the raw mean, of std 5.5
            self.register_buffer(name, value.float().reshape(vae.latent, 1, 1))

    @torch.no_grad()
    def passing(self, network, x):
        """network over x (B, ...), a few rows at a time, outside autocast: Stable Diffusion's overflows in float16."""
        self.to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([network(part) for part in x.float().split(self.batch)])

    def encode(self, x):
        """x (B, C, H, W) in [-1, 1] -> z (B, L, H / f, W / f) of about mean 0 and standard deviation 1 in each channel, the same at
        every call, without gradient. UserError as AutoencoderKL.encode."""
        return (self.passing(lambda part: self.vae.encode(part)[0], x) - self.mean) / self.std

    def decode(self, z):
        """z (B, L, h, w) -> x (B, C, f h, f w), in [-1, 1] up to the network's errors, without gradient."""
        return self.passing(lambda part: self.vae.decode(part * self.std + self.mean), z)


# --- files of weights --------------------------------------------------------------------------------------------------------------

RENAMES = [                                                                     # names of CompVis and of early diffusers -> today's
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."), (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."), (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."), (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.\1sample\.", r".\1_blocks.\2.\1samplers.0."), (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.(q|k|v)(?:uery|ey|alue)\.", r".to_\1."), (r"\.proj_attn\.", ".to_out.0.")]


def rename_keys(state, stages):
    """Weights {name: tensor} with names of CompVis, of early diffusers or of today's -> the same tensors with today's names. Only
    the 1x1 convolutions of CompVis' attention, (c, c, 1, 1), become matrices (c, c)."""
    prefix, done = "first_stage_model.", {}                                     # a whole Stable Diffusion also has a U-Net and a text encoder
    state = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)} or state
    for name, v in state.items():
        if not name.startswith(("loss.", "model_ema.")):                        # LDM's discriminator and averages, in its training files
            name = re.sub(r"^(decoder\.up\.)(\d+)", lambda m: f"{m[1]}{stages - 1 - int(m[2])}", name)    # CompVis counts from the pixels
            for old, new in RENAMES:
                name = re.sub(old, new, name)
            done[name] = v[:, :, 0, 0] if re.search(r"attentions\.0\.to_.*weight$", name) and v.ndim == 4 else v
    return done


def load_vae(path, config="sd"):
    """A file of weights -> LatentSpace on the CPU, its .sha the first 8 hex digits of the file's SHA-256.

    path     what `python vae.py` wrote, which brings its own configuration and statistics; or Stable Diffusion's autoencoder as
             .safetensors, .bin, .pt or .ckpt, under diffusers' names (new or old) or CompVis' (alone or inside the whole model)
    config   for the second kind: a name in PRESETS or a dict of AutoencoderKL's arguments, the scaling among them
    UserError when the file is missing, damaged or needs a package, and, by name, for missing, unexpected and misshapen tensors."""
    path, mean, std = Path(path).expanduser(), None, None
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; train an autoencoder (python vae.py) or download Stable Diffusion's")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file                             # optional: everything else works without it
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)     # neither kind of file can run code
            state = state.get("state_dict", state)
        if {"config", "model", "mean", "std"} <= state.keys():
            config, state, mean, std = (state[key] for key in ("config", "model", "mean", "std"))
        config = PRESETS[config] if isinstance(config, str) else config
        with torch.device("meta"):                                              # no time and no random numbers for weights to be replaced
            vae = AutoencoderKL(**config)
        state, wanted = rename_keys({k: v for k, v in state.items() if torch.is_tensor(v)}, len(config["widths"])), vae.state_dict()
        faults = {"missing": wanted.keys() - state, "unexpected": state.keys() - wanted,
                  "misshapen": {k for k in wanted.keys() & state if wanted[k].shape != state[k].shape}}
        if any(faults.values()):
            told = (f"{len(names)} {what}: {', '.join(sorted(names)[:5])}{', ...' * (len(names) > 5)}" for what, names in faults.items() if names)
            raise UserError(f"{path}: these are not the weights of the autoencoder {config}: {'; '.join(told)}")
        vae.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
        return LatentSpace(vae, mean, std, hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    except ImportError:
        raise UserError(f"{path}: reading .safetensors needs one more package: pip install safetensors; or give the .bin file") from None
    except Exception as error:                                                  # damage: pickle, zipfile and safetensors each have their own
        raise error if isinstance(error, UserError) else UserError(
            f"{path}: holds no autoencoder that can be read ({type(error).__name__}: {describe_error(error)[:90]})") from None


# --- the command: train the tiny one -------------------------------------------------------------------------------------------------

def train_vae(vae, images, o, device):
    """Train vae in place on data.Images with the command's options o -> steps taken. --minutes becomes a number of steps after ten timed
    ones, for the learning rate must know its end. UserError when the loss stops being finite."""
    generator = torch.Generator().manual_seed(o.seed)                           # on the CPU: the same draws for every device
    optimizer = torch.optim.AdamW(vae.parameters(), lr=o.lr, betas=(0.9, 0.99))
    steps, step, minutes = o.steps, 0, o.minutes or (math.inf if o.steps else 10)
    started = timed = perf_counter()
    with tqdm(desc="training", total=steps, unit="step", mininterval=0.5 if sys.stderr.isatty() else 20) as bar:
        while step != steps and perf_counter() - started < 66 * minutes:        # the clock is a hard stop, 10 % above the plan
            optimizer.param_groups[0]["lr"] = o.lr * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps) if steps else 1)
            x = to_float(images.take(torch.randint(len(images), (o.batch,), generator=generator))[0])
            x = torch.where(torch.rand(o.batch, 1, 1, 1, generator=generator) < 0.5, x.flip(3), x).to(device)     # train.py mirrors, too
            mean, logvar = vae.encode(x)
            out = vae.decode(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator).to(device))
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()      # so weak that it only bounds the scale
            loss = F.mse_loss(out, x) + 0.1 * F.l1_loss(out, x) + 1e-6 * kl
            optimizer.zero_grad()
            loss.backward()
            if not nn.utils.clip_grad_norm_(vae.parameters(), 1.0).isfinite():
                raise UserError(f"--lr {o.lr}: the gradient is not finite any more at step {step}; try a smaller one")
            optimizer.step()
            step += 1
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
            bar.update()
            timed = perf_counter() if step == 1 else timed                      # the first step also pays for torch's warming up
            if step == 11 and steps is None:
                steps = bar.total = max(step, int(60 * minutes / (perf_counter() - timed) * 10))
    return step


def latent_statistics(vae, batches):
    """An iterable of x (b, C, H, W) on vae's device -> mean, std (L,) of its latents, by channel: std differs by up to 5 between them."""
    raw = LatentSpace(vae, std=torch.ones(vae.latent))
    z = torch.cat([raw.encode(x).cpu() for x in batches]).double()
    return z.mean((0, 2, 3)).float(), z.std((0, 2, 3), correction=0).clamp(min=1e-6).float()           # a dead channel stays finite


def patch_pca(fit, x, f, latent):
    """The linear rival: f x f patches of x (n, C, H, W) through the `latent` principal components of the patches of fit -> like x."""
    patches = lambda images: rearrange(images, "n c (h p) (w q) -> (n h w) (c p q)", p=f, q=f)
    mean = patches(fit).mean(0)
    axes = torch.linalg.eigh((patches(fit) - mean).T.cov()).eigenvectors[:, -latent:]            # eigenvalues ascend
    return rearrange(mean + (patches(x) - mean) @ axes @ axes.T, "(n h w) (c p q) -> n c (h p) (w q)", p=f, q=f, n=len(x), h=x.shape[2] // f)


def parser():
    p = build_parser("Train a tiny autoencoder.")
    p.add_argument("--data", default="faces", help="a folder, a .zip, cifar-10-python.tar.gz, or faces for the built-in ones")
    p.add_argument("--size", type=int, default=32, help="pixels along a side, a multiple of 4")
    p.add_argument("--gray", action="store_true", help="one channel instead of three")
    p.add_argument("--steps", type=int, help="number of steps; --minutes decides when left out")
    p.add_argument("--minutes", type=float, help="length of the training; 10 when neither this nor --steps is given")
    p.add_argument("--out", default="vae.pt", help="the weights to write")
    p.add_argument("--picture", help="the .png of held-out originals | reconstructions; beside --out when left out")
    p.add_argument("--batch", type=int, default=32, help="images in a step")
    p.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    p.add_argument("--seed", type=int, default=0, help="of the split, the first weights and all draws")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to train")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    return p


def run_training(o):
    """The command's work, from parsed arguments: check, train, write, measure, draw."""
    out, f = Path(o.out), 2 ** (len(PRESETS["tiny"]["widths"]) - 1)
    picture = Path(o.picture or o.out.removesuffix(".pt") + ".png")
    device = pick_device(o.device)
    checks = {f"--{name} {v}: must be positive": 0 < v < math.inf for name, v in vars(o).items()
              if name in ("size", "steps", "minutes", "batch", "lr") and v is not None} | {
        f"--seed {o.seed}: must lie between 0 and 2^32": 0 <= o.seed < 2**32, f"--threads {o.threads}: must be 0 to 1024": 0 <= o.threads <= 1024,
        "--steps and --minutes: give one of them": o.steps is None or o.minutes is None,
        f"--size {o.size}: must be a multiple of {f}, the pixels along a side of one place of the latents": o.size % f == 0,
        f"--out {out}: wants a name that ends with .pt, in a folder that exists": out.suffix == ".pt" and out.parent.is_dir() and not out.is_dir(),
        f"--picture {picture}: wants a name that ends with .png, in a folder that exists": picture.suffix == ".png" and picture.parent.is_dir() and not picture.is_dir()}
    if not all(checks.values()):
        raise UserError(next(message for message, good in checks.items() if not good))
    torch.set_num_threads(o.threads or torch.get_num_threads())
    images = load_images(o.data, o.size, o.gray, seed=o.seed)
    if len(images) < 2:
        raise UserError(f"--data {o.data}: one image is too few, for some are held out to measure")
    images, held_out = holdout(images, 0.1, o.seed)
    torch.manual_seed(o.seed)                                                   # of the first weights
    vae = AutoencoderKL(**PRESETS["tiny"], channels=images.channels).to(device)
    with replacing(out) as file:
        steps = train_vae(vae, images, o, device)
        mean, std = latent_statistics(vae, (to_float(images.take(some)[0]).to(device) for some in torch.arange(min(len(images), 4096)).split(256)))
        torch.save(dict(config=vae.config, model={k: v.cpu() for k, v in vae.state_dict().items()}, mean=mean, std=std), file)
    space = LatentSpace(vae, mean, std)
    fit, x = (to_float(some.take(range(min(len(some), 1024)))[0]) for some in (images, held_out))
    again, k = space.decode(space.encode(x.to(device))).cpu(), min(8, len(x))
    rows = [row for pair in zip(x[:32].split(k), again[:32].split(k)) for row in pair if len(row) == k]
    grid(to_uint8(torch.cat(rows)), columns=2 * k).save(picture)
    psnr = lambda a: (10 * (4 / (a.clamp(-1, 1) - x).square().mean((1, 2, 3)).clamp(min=1e-10)).log10()).mean()     # 4: the range, 2, squared
    print(f"held-out PSNR {psnr(again):.2f} dB, patch-PCA of the same latent size {psnr(patch_pca(fit, x, f, vae.latent)):.2f} dB ({len(x)} images)\n"
          f"wrote {out} after {steps} steps: {o.size} x {o.size} x {vae.channels} -> {o.size // f} x {o.size // f} x {vae.latent}, "
          f"latent std {' '.join(f'{s:.2f}' for s in std.tolist())}; {picture}: originals | reconstructions")


def main(argv=None):
    run_training(parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
