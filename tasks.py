"""Tasks: what is predicted, and what the network may look at while it predicts.

The idea (DDM, arXiv 2306.13720, section on conditional generation). Super-resolution,
inpainting, edges and saliency are one thing. A *condition* is made from the picture and is
shown to the network at every time, without noise. The diffusion runs on the *target*.

    target, cond = make_condition(task, x, g=g)  target (B, C, S, S), cond (B, C', S, S)
    z            = space.encode(target)          only the target is noised
    out          = model(zt, t, y, m, cond)      vit.py: the patches of cond are embedded
                                                 and added; a dropped patch drops its own

    task         target            condition
    generate     x                 none
    superres     x                 x shrunk by 4 and enlarged again, both bicubic
    inpaint      x                 x with holes cut out, and a channel that shows the holes
    edges        a map of edges    x
    saliency     a map of objects  x

The maps of the built-in faces are exact. Other pictures need maps of your own (--targets);
for edges the size of the picture's gradient can stand in.

The released DDM reads the condition with a pretrained Swin-B and cross-attention. Here its
patches are embedded and added. It fills holes with -1 and does not show where they are;
here they are grey, and a channel shows them.

A map has one channel. It is predicted as a gray picture of C channels, and the C guesses
are averaged. So a task changes neither the network's width nor the autoencoder. Any masked,
unconditional model is the first stage of any task. The embedding of the condition starts
at zero, so fine-tuning starts from exactly that model. In a latent space the condition is
not encoded but folded: the f x f pixels of one place become its channels. Nothing is lost,
and no second autoencoder is needed.

Shapes: B batch, C channels, C' of the condition, S the side in pixels (H x W where a
picture need not be square), f pixels per place of z; pictures and maps in [-1, 1].

Run `python tasks.py` to see all tasks.
"""
import torch
import torch.nn.functional as F

from plumbing.images import to_float, to_uint8

ZOOM = 4                                         # of super-resolution: [DDM] DIV2K x4


# --- super-resolution ---------------------------------------------------------------------

def shrink(x, zoom=ZOOM):
    """Shrink pictures as Pillow does: bicubic, with antialiasing.

    x (B, C, H, W).  zoom: how many times smaller.
    -> (B, C, H / zoom, W / zoom) in [-1, 1]"""
    small = F.interpolate(x.float(), scale_factor=1 / zoom, mode="bicubic", antialias=True)
    return small.clamp(-1, 1)


def enlarge(x, zoom=ZOOM):
    """Enlarge pictures as Pillow does, bicubic: what super-resolution has to beat.

    x (B, C, h, w).  -> (B, C, zoom h, zoom w) in [-1, 1]"""
    # torch's bicubic has a = -.75. With antialias it has Pillow's a = -.5, here and in
    # `shrink`; that is all it changes when a picture grows.
    large = F.interpolate(x.float(), scale_factor=zoom, mode="bicubic", antialias=True)
    return large.clamp(-1, 1)


def recover_small(cond, zoom=ZOOM, rounds=8):
    """Find the small picture that `enlarge` made cond of, by repeated correction.

    cond (B, C, H, W).  -> (B, C, H / zoom, W / zoom)"""
    small = shrink(cond, zoom)
    for _ in range(rounds):
        small = small + shrink(cond - enlarge(small, zoom), zoom)
    return small


def back_project(result, cond, rounds=3):
    """Correct a large picture until it shrinks to the small one, which is known.

    Each round enlarges what is missing and adds it (back-projection, Irani & Peleg 1991).
    On photographs of 64 pixels this alone raises bicubic's 25.5 dB to 26.1. That gain is
    not the network's.
    result (B, C, H, W).  cond (B, C, H, W): the condition of superres.  -> like result"""
    small = recover_small(cond)
    for _ in range(rounds):
        result = result + enlarge(small - shrink(result))
    return result.clamp(-1, 1)


# --- inpainting ---------------------------------------------------------------------------

def draw_uniform(shape, g):
    """Draw numbers in [0, 1) that are the same for all pixels.

    shape: (B,) or (B, k).  g: a generator.  -> (B, 1, 1) or (B, k, 1, 1)"""
    return torch.rand(*shape, 1, 1, generator=g, device=g.device)


def cover_rectangle(rows, columns, B, g):
    """Draw one rectangle for each image, from a tenth to 0.45 of a side long.

    rows (H, 1), columns (1, W): where the pixels lie, in [0, 1].  g: a generator.
    -> (B, H, W) bool, True inside"""
    # At least one pixel.
    height = (0.1 + 0.35 * draw_uniform((B,), g)).clamp(min=1.001 / len(rows))
    width = (0.1 + 0.35 * draw_uniform((B,), g)).clamp(min=1.001 / columns.shape[1])
    top = (1 - height) * draw_uniform((B,), g)
    left = (1 - width) * draw_uniform((B,), g)
    within_rows = (rows >= top) & (rows < top + height)                                  # (B, H, 1)
    return within_rows & (columns >= left) & (columns < left + width)                    # (B, H, W)


def cover_stroke(rows, columns, B, g, pieces):
    """Draw one brush stroke of a few straight pieces for each image.

    rows (H, 1), columns (1, W): where the pixels lie, in [0, 1].  g: a generator.
    -> (B, H, W) bool, True under the brush"""
    corner_y, corner_x = draw_uniform((B, pieces + 1), g), draw_uniform((B, pieces + 1), g)
    radius = 0.03 + 0.05 * draw_uniform((B,), g)
    dy, dx = corner_y.diff(dim=1), corner_x.diff(dim=1)                          # (B, pieces, 1, 1)
    from_y, from_x = rows - corner_y[:, :-1], columns - corner_x[:, :-1]
    # Of each piece, the point nearest to a pixel: 0 at its start, 1 at its end.
    along = ((from_y * dy + from_x * dx) / (dy ** 2 + dx ** 2 + 1e-9)).clamp(0, 1)
    distance = torch.hypot(from_y - along * dy, from_x - along * dx)             # (B, pieces, H, W)
    return distance.amin(1) < radius                                                     # (B, H, W)


def draw_holes(B, H, W, g, strokes=4):
    """Draw free-form holes: one rectangle and one brush stroke in each picture.

    A hole covers about 7 to 55 per cent of a picture, a quarter on average, never nothing.
    B, H, W: how many, and their size.  g: the generator of all draws.  strokes: how many
    straight pieces a brush stroke has.  -> (B, 1, H, W) bool, True in the hole"""
    rows = ((torch.arange(H, device=g.device) + 0.5) / H)[:, None]
    columns = ((torch.arange(W, device=g.device) + 0.5) / W)[None, :]
    rectangle = cover_rectangle(rows, columns, B, g)
    return (rectangle | cover_stroke(rows, columns, B, g, strokes))[:, None]


def cut_hole(x, hole):
    """Make the condition of inpainting: no pixel of the hole is left in it.

    x (B, C, H, W) in [-1, 1].  hole (B, 1, H, W) bool.
    -> (B, C + 1, H, W): the picture, gray in the hole; then 1 in the hole and -1 outside"""
    return torch.cat([x.masked_fill(hole, 0.0), torch.where(hole, 1.0, -1.0).to(x)], 1)


def read_hole(cond):
    """Read the hole out of a condition of inpainting.

    cond (B, C + 1, H, W).  -> (B, 1, H, W) bool, True in the hole"""
    return cond[:, -1:] > 0


def paste_known(result, cond):
    """Keep the known pixels bit for bit, so that only the hole is the network's.

    result (B, C, H, W).  cond (B, C + 1, H, W): the condition of inpainting.
    -> like result"""
    return torch.where(read_hole(cond), result, cond[:, :-1].to(result))


def fill_with_mean(cond):
    """Fill every hole with the mean colour of the known pixels of its picture.

    cond (B, C + 1, H, W): the condition of inpainting.  -> (B, C, H, W)"""
    known = (~read_hole(cond)).to(cond)
    total = (cond[:, :-1] * known).sum((2, 3), keepdim=True)
    mean = total / known.sum((2, 3), keepdim=True).clamp(min=1)                       # (B, C, 1, 1)
    return torch.where(read_hole(cond), mean, cond[:, :-1])


# --- maps ---------------------------------------------------------------------------------

def sobel_edges(x, gain=3.0):
    """Find edges without a network: the size of the gradient of the mean channel (Sobel).

    x (B, C, H, W) in [-1, 1].  gain: with 3, a step of a third of the whole range is an
    edge at full strength.  -> (B, 1, H, W) in [-1, 1]"""
    gray = F.pad((x.float().mean(1, keepdim=True) + 1) / 2, (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=x.device) / 4
    slope = F.conv2d(gray, torch.stack([sobel, sobel.T])[:, None])                    # (B, 2, H, W)
    return (gain * slope.norm(dim=1, keepdim=True)).clamp(max=1) * 2 - 1


# --- measures, in float64 -----------------------------------------------------------------

def psnr_per_image(a, b, where=None):
    """Peak signal-to-noise ratio in dB, for each image by itself.

    a, b (B, C, H, W) in [-1, 1]: the peak is 2.  where (B, 1, H, W) bool: the pixels that
    count, all if None.  -> (B,) on the CPU"""
    a, b = a.cpu(), b.cpu()
    square = (a.double() - b.double()) ** 2
    weight = torch.ones_like(square) if where is None else where.double().expand_as(square)
    error = (square * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def psnr(a, b, where=None):
    """The mean of `psnr_per_image` over the images, a number."""
    return psnr_per_image(a, b, where).mean().item()


def mae(a, b):
    """Mean absolute error of two maps in [-1, 1], on the scale of 0 to 1, a number."""
    return ((a.double() - b.double()).abs().mean() / 2).item()


def count_above_thresholds(level, where):
    """How many values of each image reach each threshold, among those that count.

    level uint8, where bool (B, 1, H, W).  -> (B, 255) float64"""
    counts = []
    for image, chosen in zip(level, where):
        histogram = torch.bincount(image[chosen].long(), minlength=256)
        counts.append(histogram.flip(0).cumsum(0).flip(0)[1:].double())
    return torch.stack(counts)


def best_f(hits, said, true, beta2):
    """The best F over 255 thresholds, a number: the protocol of the saliency benchmarks.

    Precision and recall of each image are averaged over the images at each threshold, and F
    is made of the averages. An image that says nothing there has precision 0; one without a
    true pixel has recall 0.
    hits, said (B, 255): pixels that are right, and all that reach the threshold.
    true (B,): pixels that should be found.  beta2: the weight of the recall."""
    precision = (hits / said.clamp(min=1)).mean(0)                                         # (255,)
    recall = (hits / true.clamp(min=1)[:, None]).mean(0)                                   # (255,)
    weighted = (beta2 * precision + recall).clamp(min=1e-12)
    return ((1 + beta2) * precision * recall / weighted).max().item()


def max_f(guess, truth, beta2=0.3):
    """max-F of saliency, as its benchmarks have it, a number.

    guess, truth (B, 1, H, W) in [-1, 1]: true is what is above 0.  beta2: the weight of the
    recall; with 0.3 precision weighs more."""
    level, true = to_uint8(guess), truth > 0
    said = count_above_thresholds(level, torch.ones_like(true))
    hits = count_above_thresholds(level, true)
    return best_f(hits, said, true.sum((1, 2, 3)).double(), beta2)


def edge_f(guess, truth, tolerance=1):
    """The best F of edges that may lie some pixels off, a number. This is not BSDS's F.

    A true pixel may be paired with a said one within `tolerance` in all directions. BSDS
    thins the guess and matches one to one. Here an image has as many pairs as the smaller
    of two counts: said pixels near a true one, and true pixels near a said one. No matching
    has more, and an edge that is 3 pixels thick has a precision of 1 / 3.
    guess, truth (B, 1, H, W) in [-1, 1]: true is what is above 0."""
    grow = lambda found: F.max_pool2d(found.float(), 2 * tolerance + 1, 1, tolerance)
    level, true = to_uint8(guess), truth > 0
    said = count_above_thresholds(level, torch.ones_like(true))
    found = count_above_thresholds(level, grow(true) > 0)
    recalled = count_above_thresholds(grow(level).byte(), true)
    return best_f(found.minimum(recalled), said, true.sum((1, 2, 3)).double(), 1.0)


# --- scores of the tasks: (result, truth, cond) -> a number -------------------------------

def score_psnr(result, truth, cond):
    """PSNR of all pixels."""
    return psnr(result, truth)


def score_psnr_in_hole(result, truth, cond):
    """PSNR of the pixels in the hole alone."""
    return psnr(result, truth, read_hole(cond))


def score_mae(result, truth, cond):
    """Mean absolute error of a map's first channel."""
    return mae(result[:, :1], truth[:, :1])


def score_edges(result, truth, cond):
    """The F of `edge_f`: one pixel of tolerance, recall and precision weigh the same."""
    return edge_f(result[:, :1], truth[:, :1])


def score_saliency(result, truth, cond):
    """max-F of objects: no tolerance, precision weighs more."""
    return max_f(result[:, :1], truth[:, :1])


# --- the tasks: the first line of each docstring is its help text -------------------------

class Task:
    """What a task must know; what is not overridden is that of a picture without condition.

    x (B, C, S, S) in [-1, 1]: pictures.  given (B, 1, S, S) or None: their maps.  g: the
    generator of what a task draws.  cond (B, C', S, S): a condition."""
    zoom = 1             # side of the result over the side of the picture that a user gives
    calls = 1            # network calls where --steps is left out: one gives the mean of all
                         # that is possible, more give detail that may be wrong
    exact = None         # name of the built-in faces' map, for tasks that predict a map
    needs_map = False    # whether a picture without a map is of no use for training
    plain = None         # a method: cond -> a result without any network, to compare with
    scores = {}          # name -> function (result, truth, cond) -> a number

    def make(self, x, given, g):
        """-> target (B, C, S, S): what is predicted; cond: what is shown, or None."""
        return x, None

    def channels(self, C):
        """How many channels the condition of a picture of C channels has."""
        return 0

    def ask(self, x, hole):
        """The condition for a user's picture, of which there is no target.

        x (B, C, H, W).  hole (B, 1, H, W) bool, or None.  -> (B, C', zoom H, zoom W)"""
        return x

    def finish(self, result, cond):
        """The last correction of the network's result, by what is known for certain."""
        return result


class Generate(Task):
    """pictures from noise alone"""


class SuperResolution(Task):
    """a picture from one that is 4 times smaller"""
    zoom = ZOOM
    scores = {"PSNR": score_psnr}

    def make(self, x, given, g):
        return x, enlarge(shrink(x))

    def channels(self, C):
        return C

    def ask(self, x, hole):
        return enlarge(x)

    def finish(self, result, cond):
        return back_project(result, cond)

    def plain(self, cond):
        return cond


class Inpainting(Task):
    """a picture from one with holes"""
    scores = {"PSNR in the hole": score_psnr_in_hole}

    def make(self, x, given, g):
        return x, self.ask(x, draw_holes(len(x), *x.shape[2:], g).to(x.device))

    def channels(self, C):
        return C + 1

    def ask(self, x, hole):
        return cut_hole(x, hole)

    def finish(self, result, cond):
        return paste_known(result, cond)

    def plain(self, cond):
        return fill_with_mean(cond)


class Edges(Task):
    """a map of the edges in a picture"""
    calls = 2                                                  # the smallest errors of a map
    exact = "edges"
    scores = {"edge F within 1 px": score_edges, "MAE": score_mae}

    def make(self, x, given, g):
        return (sobel_edges(x) if given is None else given).expand_as(x), x

    def channels(self, C):
        return C

    def finish(self, result, cond):
        return result.mean(1, keepdim=True)                             # C guesses of one map

    def plain(self, cond):
        return sobel_edges(cond)


class Saliency(Edges):
    """a map of the main object in a picture"""
    exact, needs_map = "saliency", True
    scores = {"max-F": score_saliency, "MAE": score_mae}

    def make(self, x, given, g):
        return given.expand_as(x), x

    def plain(self, cond):
        return torch.ones_like(cond[:, :1])                                   # all of it is object


# --- conditions for the network -----------------------------------------------------------

def make_condition(task, x, maps=0, factor=1, g=None):
    """Make what is predicted and what is shown from pictures.

    task: a name in TASKS.  x (B, C + maps, S, S) in [-1, 1].  maps: 1 if the last channel
    of x is a map.  factor: f, pixels per place of z along a side.  g: the generator of what
    a task draws (holes).
    -> target (B, C, S, S), cond (B, C' f f, S / f, S / f) or None"""
    C = x.shape[1] - maps
    target, cond = TASKS[task].make(x[:, :C], x[:, C:] if maps else None, g)
    return target, fold_condition(cond, factor)


def fold_condition(cond, factor):
    """Bring a condition to the size of z: every f x f pixels become channels of one place.

    cond (B, C', H, W) or None.  -> (B, C' f f, H / f, W / f); None stays None"""
    return cond if cond is None or factor == 1 else F.pixel_unshuffle(cond, factor)


def place_side_by_side(*columns):
    """Order pictures for plumbing.images.grid, so that each row shows one of every column.

    columns: conditions, results, truths (B, 1 or more, H, W) in [-1, 1]. Of three or more
    channels the first three are shown, otherwise the first.
    -> uint8 (B len(columns), 3, H, W)"""
    shown = []
    for images in columns:
        colour = images.shape[1] >= 3
        shown.append(to_uint8(images[:, :3] if colour else images[:, :1].expand(-1, 3, -1, -1)))
    return torch.stack(shown, 1).flatten(0, 1)


TASKS = {"generate": Generate(), "superres": SuperResolution(), "inpaint": Inpainting(),
         "edges": Edges(), "saliency": Saliency()}


# --- the picture --------------------------------------------------------------------------

def draw_tasks(side=96, count=2, seed=0):
    """Draw every task on built-in faces: what is shown, what is predicted, what is easy.

    side: of a face in pixels.  count: how many faces.  -> PIL image"""
    from textwrap import fill

    from data import load_images
    from plumbing.sheets import draw_sheet
    g = torch.Generator().manual_seed(seed)
    rows = []
    for name, task in TASKS.items():
        faces = load_images("faces", side, count=count, seed=seed, targets=task.exact)
        x = to_float(faces.take(range(count))[0])
        target, cond = make_condition(name, x, maps=int(bool(task.exact)), g=g)
        if cond is not None:
            images = place_side_by_side(cond, target, task.plain(cond))
            images = F.pad(images, (1, 1, 1, 1), value=160)     # a frame, for white maps
            rows.append((f"{name}:\n{fill(task.__doc__.splitlines()[0], 18)}", list(images)))
    return draw_sheet(rows, ["condition", "target", "no network"] * count)


if __name__ == "__main__":
    from plumbing.console import run_picture_command
    run_picture_command("Draw condition and target of every task.", draw_tasks, "tasks.png",
                        seed=(0, "which faces and which holes"))
