"""Released weights: the files of DiT and MaskDiT, read as checkpoints of this program.

The idea. The network here is the papers' (DiT 2212.09748, MaskDiT 2306.09305), so their own
weights run in it. Only names and orders differ. `import_released` takes what torch.load
gives and returns a checkpoint: weights, config and meta. It is strict. Every tensor is used
or stands in the list `unused`. A missing, unknown or misshapen one is one line.

    residual stream   their positions have sines before cosines, ours the reverse. The
                      stream's channels change places in every matrix that writes to it
                      (rows) or reads from it (columns). A norm without weights and a sum
                      do not mind. The condition c is not on the stream
    patches           a convolution (D, C, p, p) is a matrix (D, p p C)
    no label          DiT has a row for it, here it is zero: the row goes to a bias of the
                      time's embedding, all others lose it
    variance          the second half of DiT's output channels: not used here
    time              DiT: the index of 1,000; MaskDiT: ln(sigma) / 4 (CLOCKS in vit.py)
    latents           .18215 times those of Stable Diffusion's autoencoder, 8 pixels a place

DiT's weights are CC BY-NC 4.0. MaskDiT's repository is MIT, with parts of DiT, EDM and MAE.
Shapes: D width of the encoder, w of the light decoder, C channels, p side of a patch.
"""
from dataclasses import dataclass

import torch

from plumbing.console import UserError
from plumbing.layout import is_weights

CLASSES = 1000                  # ImageNet's, named by their numbers
FACTOR = 8                      # pixels along a side of a place in the latents
# The shapes of the weights do not tell the heads. Width -> (our name of the size, heads).
SIZES = {384: ("small-dit", 6), 768: ("base", 12), 1024: ("large", 16), 1152: ("xl", 16)}
NOISE = {                       # name -> (schedule, predict, times of training, unit, clock)
    "DiT": ("vp-linear", "eps", "uniform", 1.0, "index"),
    "MaskDiT": ("edm", "unit", "lognormal", 0.5, "log_sigma")}


@dataclass(frozen=True)
class Sizes:
    """What the shapes of the tensors tell. light: blocks of the decoder, w: its width."""
    D: int
    C: int
    p: int
    tokens: int
    depth: int
    light: int
    w: int

    @property
    def paper(self):
        """Whose network it is: only MaskDiT has a decoder."""
        return "MaskDiT" if self.light else "DiT"


@dataclass(frozen=True)
class Layer:
    """A linear layer. writes, reads: width of the residual stream there, 0 for another
    place."""
    theirs: str
    ours: str
    rows: int
    columns: int
    writes: int = 0
    reads: int = 0


# --- the published layout -----------------------------------------------------------------

def block_layers(theirs, ours, width, D):
    """The layers of one block, whose shifts, scales and gates come from c (D)."""
    return [Layer(f"{theirs}.attn.qkv", f"{ours}.qkv", 3 * width, width, reads=width),
            Layer(f"{theirs}.attn.proj", f"{ours}.out", width, width, writes=width),
            Layer(f"{theirs}.mlp.fc1", f"{ours}.mlp.0", 4 * width, width, reads=width),
            Layer(f"{theirs}.mlp.fc2", f"{ours}.mlp.2", width, 4 * width, writes=width),
            Layer(f"{theirs}.adaLN_modulation.1", f"{ours}.ada", 6 * width, D, writes=width)]


def network_layers(s):
    """All linear layers of a network of Sizes `s` that keep their shape. -> [Layer, ...]"""
    layers = [Layer("t_embedder.mlp.0", "embed_time.0", s.D, 256),
              Layer("t_embedder.mlp.2", "embed_time.2", s.D, s.D)]
    for i in range(s.depth):
        layers += block_layers(f"blocks.{i}", f"blocks.{i}", s.D, s.D)
    if s.light:
        name = "decoder_layer.adaLN_modulation.1"
        layers += [Layer(name, "connect_ada", 2 * s.D, s.D, writes=s.D),
                   Layer("decoder_layer.linear", "connect", s.w, s.D, writes=s.w, reads=s.D)]
    for i in range(s.light):
        layers += block_layers(f"decoder_blocks.{i}", f"decoder.{i}", s.w, s.D)
    last, fields = (s.w, 1) if s.light else (s.D, 2)        # DiT: noise, then learned variance
    name, rows = "final_layer.adaLN_modulation.1", s.p * s.p * fields * s.C
    return [*layers, Layer(name, "head_ada", 2 * last, s.D, writes=last),
            Layer("final_layer.linear", "head", rows, last, reads=last)]


def published_shapes(s):
    """Every tensor of a released file. -> {name: shape}"""
    shapes = {"pos_embed": (1, s.tokens, s.D), "x_embedder.proj.bias": (s.D,),
              "x_embedder.proj.weight": (s.D, s.C, s.p, s.p)}
    labels = (s.D, CLASSES) if s.light else (CLASSES + 1, s.D)
    shapes["y_embedder.embedding_table.weight"] = labels
    if s.light:
        shapes |= {"decoder_pos_embed": (1, s.tokens, s.w), "mask_token": (1, 1, s.w)}
    for layer in network_layers(s):
        shapes[f"{layer.theirs}.weight"] = (layer.rows, layer.columns)
        shapes[f"{layer.theirs}.bias"] = (layer.rows,)
    return shapes


def published_positions(side, width):
    """[DiT] Column, then row; of each the sines, then the cosines -> (side^2, width)."""
    frequency = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], -1)                           # (side, width / 2)
    return torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], -1)


# --- what is refused ----------------------------------------------------------------------

def measure_network(tensors, where):
    """Read the Sizes from the shapes of {name: tensor}. where: for the messages."""
    def shape(name, dims):
        if name not in tensors:
            raise UserError(f"{where} lacks {name}")
        found = tuple(tensors[name].shape)
        if len(found) != dims or 0 in found:
            raise UserError(f"{where}: {name} must have {dims} dimensions, it is {found}")
        return found

    def count(part):
        return len({name.split(".")[1] for name in tensors if name.startswith(f"{part}.")})

    (D, C, p, _), (_, tokens, _) = shape("x_embedder.proj.weight", 4), shape("pos_embed", 3)
    light = count("decoder_blocks")
    w = shape("mask_token", 3)[2] if light else 512
    if D not in SIZES or w % 32:
        known = ", ".join(map(str, SIZES))
        raise UserError(f"{where}: its width {D} (decoder: {w}) is none of the published ones: "
                        f"{known} (512)")
    return Sizes(D, C, p, tokens, count("blocks"), light, w)


def require_published(tensors, s, where):
    """UserError that names the first tensor which is missing, unknown or misshapen, and for
    positions that are not the fixed ones."""
    wanted = published_shapes(s)
    for faults, text in ((wanted.keys() - tensors, "lacks"),
                         (tensors.keys() - wanted, f"is no file of {s.paper}: unknown")):
        if faults:
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            raise UserError(f"{where} {text} {min(faults)[:80]}{more}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise UserError(f"{where}: {name} must be {shape}, it is {tuple(tensors[name].shape)}")
    side = round(s.tokens ** 0.5)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name not in wanted:
            continue
        stored = tensors[name][0]
        far = 1e-4 + torch.finfo(stored.dtype).eps                      # float16 holds less of them
        if side * side != s.tokens or not torch.allclose(
                stored.double(), published_positions(side, stored.shape[1]), rtol=0, atol=far):
            raise UserError(f"{where}: {name} is not the fixed sines and cosines of a square")


# --- from their weights to ours -----------------------------------------------------------

def reorder(tensor, dim, width):
    """Sines and cosines change places, in each part of `width` along a dimension."""
    parts = tensor.unflatten(dim, (-1, 2, 2, width // 4))           # column or row, sine or cosine
    return parts.flip(dim + 2).flatten(dim, dim + 3)


def convert_weights(tensors, s):
    """A released state dict without its prefix -> one of our ViT, float32."""
    got = {name: tensor.float() for name, tensor in tensors.items()}
    patches = got["x_embedder.proj.weight"].permute(0, 2, 3, 1).flatten(1)              # (D, p p C)
    weights = {"embed.weight": reorder(patches, 0, s.D),
               "embed.bias": reorder(got["x_embedder.proj.bias"], 0, s.D)}
    for layer in network_layers(s):
        for part in ("weight", "bias"):
            tensor = got[f"{layer.theirs}.{part}"]
            if layer.writes:
                tensor = reorder(tensor, 0, layer.writes)
            if layer.reads and part == "weight":
                tensor = reorder(tensor, 1, layer.reads)
            weights[f"{layer.ours}.{part}"] = tensor
    labels = got["y_embedder.embedding_table.weight"]
    if s.light:
        weights["embed_class.weight"] = labels.T.contiguous()   # [MaskDiT] one-hot, no bias
        weights["mask_token"] = reorder(got["mask_token"].flatten(), 0, s.w)
        return weights
    weights["embed_class.weight"] = labels[:-1] - labels[-1]    # [DiT] the last is "no label"
    weights["embed_time.2.bias"] = weights["embed_time.2.bias"] + labels[-1]
    for name in ("head.weight", "head.bias"):                   # the first C of 2 C channels
        weights[name] = weights[name].unflatten(0, (-1, 2, s.C))[:, 0].flatten(0, 1)
    return weights


def import_weights(state, where):
    """Convert one state dict of a released file. -> our weights, Sizes. UserError as
    above."""
    if not is_weights(state):
        raise UserError(f"{where} holds something else than weights")
    prefix = "model." if any(name.startswith("model.") for name in state) else ""
    # A name without the prefix gets a mark, so that it is not taken for another.
    tensors = {name.removeprefix(prefix) if name.startswith(prefix) else f"({name})": tensor
               for name, tensor in state.items()}
    s = measure_network(tensors, where)
    require_published(tensors, s, where)
    return convert_weights(tensors, s), s


# --- the file -----------------------------------------------------------------------------

def find_released(held):
    """The state dicts of a released file, {"model" or "ema": state}; {} for another file.

    DiT's published files hold the average alone, which then has both names."""
    def is_one(state):
        starts = ("x_embedder.", "model.x_embedder.")
        return isinstance(state, dict) and any(str(name).startswith(starts) for name in state)

    if is_one(held):
        return dict(model=held, ema=held)
    return {name: held[name] for name in ("model", "ema") if is_one(held.get(name))}


def describe_released(s):
    """A checkpoint's config and meta for a network of Sizes `s`."""
    name, heads = SIZES[s.D]
    schedule, predict, times, unit, clock = NOISE[s.paper]
    network = dict(channels=s.C, heads_out=1, patch=s.p, width=s.D, depth=s.depth, heads=heads,
                   skips=False, decoder=s.light, decoder_width=s.w, classes=CLASSES,
                   cond_channels=0, economy="drop", block="dit", clock=clock)
    size = round(s.tokens ** 0.5) * s.p * FACTOR
    same = dict(size=size, schedule=schedule, predict=predict, space="latent")
    config = dict(same, data=None, model=name, patch=s.p, decoder=s.light, labels=True,
                  time_sampling=times)
    meta = dict(same, stage="train", objective="denoise", task="generate", channels=3,
                classes=[str(k) for k in range(CLASSES)], vae=None, vae_sha="",
                data_std=unit, plan=None, skipped=0, model=network)
    return dict(config=config, meta=meta)


def import_released(held, path, *parts):
    """A released file as a checkpoint of this program, without its version.

    held: what torch.load gave. path: for messages. parts: "model", "ema": the weights that
    are wanted; all where none is named or there. -> dict; its `unused` lists what of the
    file has no use here. UserError, one line, for what is not as published."""
    states = find_released(held)
    asked = {name: states[name] for name in parts if name in states} or states
    done = {id(state): import_weights(state, str(path)) for state in asked.values()}
    weights = {name: done[id(state)][0] for name, state in asked.items()}
    s = done[id(next(iter(asked.values())))][1]
    unused = ["pos_embed", "decoder_pos_embed" if s.light else "final_layer.linear: variance"]
    if states.get("ema") is not held:
        unused += sorted(str(name) for name in held if name not in asked)
    return describe_released(s) | dict(step=0, unused=unused) | weights
