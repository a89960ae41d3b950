"""Draw one training step: image, tokens, mask, blocks, loss, with the file of each arrow.

    python assets/draw_overview.py --out assets/overview.png

Faces, noise, mask and error are made by the program's own functions. There is no trained
network here, so the output is a rough guess: each visible token in the mean colour of its
clean patch.
Shapes: B = 1 image, N = 8 x 8 tokens, P = p p C values per patch.
"""
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mask import draw, patchify, unpatchify  # noqa: E402  (found from the line above)
from plumbing.console import run_picture_command  # noqa: E402
from plumbing.faces import draw_faces  # noqa: E402
from plumbing.images import grid, to_float, to_uint8  # noqa: E402
from plumbing.sheets import to_picture  # noqa: E402
from schedules import SCHEDULES  # noqa: E402

SIZE, SIDE = 64, 8                              # pixels, tokens
TILE, GAP, TOP, ROW = 176, 150, 92, 300         # pixels of the sheet
PATCH = SIZE // SIDE
INK, BLUE, PAPER = (20, 20, 20), (20, 70, 160), (255, 255, 255)
GREY = 0.86                                                                     # a hidden token


TITLES = [
    ["images x (data.py)", "z: pixels or latents", "z_t = a z + b eps", "N = 64 tokens"],
    ["K = 26 visible tokens", "transformer", "output", "error of each token"],
]
ARROWS = [
    [("spaces.py\nvae.py", "encode"), ("schedules.py", "corrupt"), ("vit.py", "patchify")],
    [("vit.py", "embed"), ("vit.py", "back to\ntheir places"), ("losses.py", "objective")],
]
NOTES = [
    "the grey ones do not\nenter the network",
    "26 tokens go in, with time t,\nlabel y and condition",
    "a rough guess here: the mean\ncolour of each clean token",
    "loss = {:.3f}\nmean over the visible tokens",
]


def write_text(pen, place, text, colour=INK, size=16, anchor="ma"):
    """One or more lines of text, centred at a place unless `anchor` says otherwise."""
    font = ImageFont.load_default(size)
    pen.multiline_text(place, text, colour, font, anchor, align="center", spacing=3)


def draw_arrow(pen, points, colour=BLUE):
    """A line through these points with a head at the last one."""
    pen.line(points, fill=colour, width=3)
    (x0, y0), (x, y) = points[-2:]
    turn = math.atan2(y - y0, x - x0)
    head = [(x, y)]
    for side in (2.6, -2.6):
        head.append((x + 13 * math.cos(turn + side), y + 13 * math.sin(turn + side)))
    pen.polygon(head, fill=colour)


def separate_tokens(x, visible=None):
    """Picture x (1, 3, H, W) with lines between its tokens, the hidden ones in grey."""
    u = patchify(x, PATCH)                                                      # (1, N, P)
    if visible is not None:
        u = torch.where(visible[:, :, None], u, 2 * GREY - 1)
    picture = to_picture(to_uint8(unpatchify(u, PATCH, SIDE, SIDE))[0])
    picture = picture.resize((TILE, TILE), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for i in range(1, SIDE):
        pen.line([(i * TILE // SIDE, 0), (i * TILE // SIDE, TILE)], fill=PAPER, width=3)
        pen.line([(0, i * TILE // SIDE), (TILE, i * TILE // SIDE)], fill=PAPER, width=3)
    return picture


def draw_blocks(visible):
    """The network: visible tokens go in from below, through a stack of blocks."""
    picture = Image.new("RGB", (TILE, TILE), PAPER)
    pen = ImageDraw.Draw(picture)
    for i in range(4):
        top = 4 + 32 * i
        pen.rounded_rectangle([8, top, TILE - 8, top + 26], 6, fill=(222, 232, 246), outline=BLUE)
        write_text(pen, (TILE // 2, top + 13), "block", size=14, anchor="mm")
    draw_arrow(pen, [(TILE // 2, 154), (TILE // 2, 132)])
    count = int(visible.sum())
    for i in range(count):
        left = 8 + i * (TILE - 16) / count
        pen.rectangle([left, 158, left + (TILE - 16) / count - 2, 170], fill=(150, 110, 60))
    return picture


def draw_errors(error, visible):
    """The error (1, N) of every visible token as a shade of red, hidden ones in grey."""
    shade = (error / error[visible].max()).sqrt()[0]
    level = torch.stack([torch.ones_like(shade), 1 - shade, 1 - shade])         # (3, N)
    level = torch.where(visible, level, GREY)
    pixels = (2 * level - 1).view(1, 3, SIDE, SIDE)
    return separate_tokens(pixels.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3))


def make_pictures(seed):
    """-> (pictures of the upper row, pictures of the lower row, loss)."""
    drawn = draw_faces(4, SIZE, seed)[0]                                        # (4, 3, H, W) uint8
    x = to_float(drawn)
    generator, schedule = torch.Generator().manual_seed(seed), SCHEDULES["ddm"]
    z = x[:1]
    m = draw("patch", 1, SIDE, SIDE, 0.6, generator)
    zt = schedule.corrupt(z, schedule.noise(z, generator), torch.tensor([0.25]))
    clean = patchify(z, PATCH).view(1, SIDE ** 2, -1, 3)                        # (1, N, p p, C)
    rough = clean.mean(2, keepdim=True).expand_as(clean)
    error = ((rough - clean) ** 2).mean((2, 3))                                 # (1, N)
    out = unpatchify(rough.flatten(2), PATCH, SIDE, SIDE)
    four = grid(drawn, columns=2).resize((TILE, TILE), Image.Resampling.LANCZOS)
    whole = [to_picture(to_uint8(v)[0]).resize((TILE, TILE)) for v in (z, zt)]
    upper = [four, *whole, separate_tokens(zt)]
    lower = [separate_tokens(zt, m.visible), draw_blocks(m.visible)]
    lower += [separate_tokens(out, m.visible), draw_errors(error, m.visible)]
    return upper, lower, error[m.visible].mean().item()


def draw_overview(seed=3):
    """One training step as a figure in two rows. -> PIL image"""
    upper, lower, loss = make_pictures(seed)
    canvas = Image.new("RGB", (4 * TILE + 3 * GAP + 40, TOP + ROW + TILE + 80), PAPER)
    pen = ImageDraw.Draw(canvas)
    for row, pictures in enumerate((upper, lower)):
        y = TOP + row * ROW
        for i, picture in enumerate(pictures):
            left = 20 + i * (TILE + GAP)
            canvas.paste(picture, (left, y))
            write_text(pen, (left + TILE // 2, y - 26), TITLES[row][i])
        for i, (file, function) in enumerate(ARROWS[row]):
            start, middle = 20 + i * (TILE + GAP) + TILE + 10, y + TILE // 2
            draw_arrow(pen, [(start, middle), (start + GAP - 20, middle)])
            write_text(pen, (start + GAP // 2 - 10, middle - 8), file, BLUE, anchor="md")
            write_text(pen, (start + GAP // 2 - 10, middle + 8), function)
    right, turn = 20 + 3 * (TILE + GAP) + TILE // 2, TOP + TILE + 40
    left = 20 + TILE // 2
    draw_arrow(pen, [(right, TOP + TILE + 8), (right, turn), (left, turn),
                     (left, TOP + ROW - 32)])
    write_text(pen, ((left + right) // 2, turn - 6), "mask.py", BLUE, anchor="md")
    write_text(pen, ((left + right) // 2, turn + 6), "draw, gather: which tokens are seen")
    write_text(pen, (canvas.width // 2, 14), "One training step: train_step in train.py", size=20)
    for i, note in enumerate(NOTES):
        place = 20 + i * (TILE + GAP) + TILE // 2, TOP + ROW + TILE + 10
        write_text(pen, place, note.format(loss))
    return canvas


if __name__ == "__main__":
    run_picture_command("Draw one training step as a figure.", draw_overview,
                        "assets/overview.png", seed=(3, "which faces, noise and mask"))
