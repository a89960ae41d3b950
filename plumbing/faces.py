"""Faces that need no download: drawn by formula, varied, with exact labels and maps.

The idea. A face is a stack of shapes. Each shape is a signed distance d: negative inside,
zero on the outline. Painted in turn, a shape covers a pixel of side p by

    coverage = clip(1/2 - d / p, 0, 1)         one pixel of soft edge, whatever the size

Everything about a face (skin, hair, eyes, mouth, glasses, hat, beard, pose, light,
background) is read from forty numbers in [0, 1). So face i is a function of (seed, i). A
map of the top-most part at each pixel gives outlines and silhouettes at no cost.

Shapes: n faces, B faces drawn at once, S the side in pixels.

Run `python data.py` to see them.
"""
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

# --- what there is to choose from ---------------------------------------------------------

EXPRESSIONS = ["neutral", "happy", "sad", "surprised", "angry"]
# A row per expression. Mouth: half-width, how far its middle hangs down (y points down),
# half its opening. Eyes: openness. Brows: how far the inner ends lie below the outer ones,
# how far all of it is raised.
MOODS = np.array([[0.16,  0.03, 0.00, 1.00,  0.01,  0.02],
                  [0.25,  0.15, 0.08, 0.90, -0.02,  0.02],
                  [0.16, -0.09, 0.00, 0.85, -0.10,  0.02],
                  [0.11,  0.00, 0.14, 1.25, -0.01,  0.10],
                  [0.15, -0.03, 0.05, 0.75,  0.11, -0.05]], np.float32)
STYLES = ["bald", "short", "long", "bun", "bob", "curly", "parted", "spiky", "pigtails", "wavy"]
# A row per hair style. On the head: thickness, height of the hairline, its fall towards the
# sides, its slant, then size (below zero: pointed) and number of the bumps. Behind the
# head: half-width, lower end. Radius of a bun, radius of pigtails.
HAIR = np.array([[0.00, -9.00, 0.0,  0.00,  0.00,  0, 0.00, 0.00, 0.00, 0.00],
                 [0.07, -0.42, 1.1,  0.00,  0.00,  0, 0.00, 0.00, 0.00, 0.00],
                 [0.10, -0.46, 2.0,  0.15,  0.00,  0, 0.66, 0.95, 0.00, 0.00],
                 [0.06, -0.46, 1.3,  0.00,  0.00,  0, 0.00, 0.00, 0.20, 0.00],
                 [0.09, -0.27, 0.5,  0.00,  0.00,  0, 0.63, 0.50, 0.00, 0.00],
                 [0.15, -0.38, 1.3,  0.00,  0.07, 15, 0.00, 0.00, 0.00, 0.00],
                 [0.09, -0.42, 1.0,  0.45,  0.00,  0, 0.00, 0.00, 0.00, 0.00],
                 [0.20, -0.40, 0.9,  0.00, -0.16, 13, 0.00, 0.00, 0.00, 0.00],
                 [0.07, -0.44, 1.3, -0.20,  0.00,  0, 0.00, 0.00, 0.00, 0.22],
                 [0.11, -0.45, 1.8, -0.30,  0.03, 11, 0.64, 0.68, 0.00, 0.00]], np.float32)
# The parts of the map, back to front. From the third on they belong to the person.
PARTS = ("backdrop wall tresses clothes neck ears head beard nose lips mouth teeth lid eye iris "
         "brow hair hat band glasses").split()


def rgb(codes):
    """Colours "rrggbb rrggbb ..." -> float32 (k, 3) in [0, 1]."""
    return np.array([list(bytes.fromhex(code)) for code in codes.split()], np.float32) / 255


SKINS = rgb("ffe0cc f8cfae eebb90 dba06f c08457 a56d47 87553a 6b4430")
HAIRS = rgb("1d1715 37251b 5d3a22 8a5a30 c08a45 e6c878 a8432b a9a6a6 e4e0dc c9548f")
IRISES = rgb("4a2f1d 2e4f86 3f7a4f 6f8797 7b5a24")
CLOTHES = rgb("c8413b 2f5d9b 2f8f6b f0b93a 6b4a94 3b3f4a e9e6de e07b39 3aa0a8 b44e7c")
WALLS = rgb("8ec5e8 f6d98b a8d8b4 f2b6a8 c9b6e4 e8e4da 5b7fa6 4f7d6c d98f6c 7a6a9a 39424e")


# --- shapes and how they are put together -------------------------------------------------

class Faces(NamedTuple):
    """n drawn faces and what is known about them exactly."""
    pixels: torch.Tensor    # (n, 3, S, S) uint8
    labels: torch.Tensor    # (n,) int64, the number of an expression
    # (n, 1, S, S) uint8, 255 where the pixel to the right or below belongs to another part
    edges: torch.Tensor
    saliency: torch.Tensor  # (n, 1, S, S) uint8, 255 on the person, 0 on the background
    attributes: dict        # trait -> (n,) int64


def draw_faces(n, size, seed=0):
    """Draw n faces of size x size pixels -> Faces.

    Face i is a function of (seed, i, size), whatever n is. size: at least 8.
    ValueError for no face or a smaller size."""
    if n < 1 or size < 8:
        raise ValueError(f"cannot draw {n} faces of {size} x {size} pixels: at least one, "
                         "of at least 8 x 8")
    # Filled row by row: a face has a row of its own.
    table = np.random.default_rng(seed).random((n, 40), np.float32)
    chunk = max(1, 2**15 // size**2)                          # few enough to stay in a core's cache
    with ThreadPoolExecutor() as pool:                       # numpy releases the interpreter's lock
        drawn = list(pool.map(lambda i: draw_chunk(table[i:i + chunk], size), range(0, n, chunk)))
    pixels, part, traits = zip(*drawn)
    pixels = torch.from_numpy(np.concatenate(pixels))
    part = torch.from_numpy(np.concatenate(part))[:, None]
    attributes = {}
    for name in traits[0]:
        values = np.concatenate([some[name] for some in traits])
        attributes[name] = torch.from_numpy(values.astype(np.int64))
    edges = torch.zeros_like(part, dtype=torch.bool)
    edges[..., :-1] |= part[..., :-1] != part[..., 1:]
    edges[..., :-1, :] |= part[..., :-1, :] != part[..., 1:, :]
    person = part >= PARTS.index("tresses")
    return Faces(pixels, attributes["expression"], edges.byte() * 255, person.byte() * 255,
                 attributes)


def ellipse(x, y, rx, ry):
    """Distance to the ellipse of half-axes rx, ry around the origin, right to first order.

    It is (k - 1) / |grad k|, times k inside."""
    k = np.sqrt((x / rx) ** 2 + (y / ry) ** 2)
    return k * (k - 1) / np.maximum(np.sqrt((x / rx ** 2) ** 2 + (y / ry ** 2) ** 2), 1e-6)


def arc(x, y, half, sag):
    """Distance (not below 0) to an arc from -half to half whose middle hangs down by sag.

    -> the distance, and u: 1 in the middle, 0 at the ends"""
    u = 1 - np.clip(x / half, -1, 1) ** 2
    steepness = np.sqrt(1 + (2 * sag / half) ** 2 * (1 - u))
    return np.hypot(x - np.clip(x, -half, half), (y - sag * u) / steepness), u


def draw_chunk(table, size):
    """Draw faces from numbers.

    table (B, 40) in [0, 1): a row per face.  size: S.
    -> pixels uint8 (B, 3, S, S); numbers in PARTS uint8 (B, S, S); traits {name: (B,)}"""
    draws = iter(table.T)
    wide = lambda v: v[:, None, None]            # (B,) -> (B, 1, 1): one number for a whole face
    between = lambda low, high: wide(low + (high - low) * next(draws))
    pick = lambda k: (next(draws) * k).astype(int)
    chance = lambda p: next(draws) < p

    # Traits.
    mood, style, tone, dye = (pick(len(some)) for some in (EXPRESSIONS, STYLES, SKINS, HAIRS))
    glasses, hat, beard, moustache = chance(0.22), chance(0.12), chance(0.25), chance(0.25)
    bearded = ("bald", "short", "curly", "parted", "spiky")            # styles that go with a beard
    free = np.isin(style, [STYLES.index(name) for name in bearded])
    beard, moustache = beard & free, (moustache | beard) & free
    half, sag, gape, openness, inner, raised = MOODS[mood].T[:, :, None, None]
    closed = (mood == EXPRESSIONS.index("happy")) & chance(0.4)       # a smile rather than a laugh
    sag, gape = sag * between(0.8, 1.25), gape * between(0.8, 1.25) * ~wide(closed)
    numbers = HAIR[style].T[:, :, None, None]
    thick, hairline, fall, slant, bump, bumps, back, end, bun, tail = numbers
    skin, hair = SKINS[tone], HAIRS[dye]
    iris, shirt, cap = IRISES[pick(5)], CLOTHES[pick(10)], CLOTHES[pick(10)]
    wall, wall2, scenery = WALLS[pick(11)], WALLS[pick(11)], wide(pick(3))
    thick = np.where(wide(hat), np.minimum(thick, 0.09), thick)        # a hat presses the hair down
    bump = bump * ~wide(hat)

    # Three frames, x to the right and y down, the picture from -1 to 1: the picture's; the
    # body's, shifted and scaled; the head's, also rotated. A head that turns a little
    # carries its features along: they use f in place of x.
    axis = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1
    px, py = axis[None, None, :], axis[None, :, None]
    ranges = ((-0.16, 0.16), (0.96, 1.1), (-0.09, 0.09), (0.0, 0.09), (-0.09, 0.09))
    angle, scale, right, down, turn = (between(*ends) for ends in ranges)
    bx, by = (px - right) / scale, (py - down) / scale
    x, y = bx * np.cos(angle) + by * np.sin(angle), by * np.cos(angle) - bx * np.sin(angle)
    f = x - turn
    pixel = 2 / size / scale
    light = between(-0.22, 0.22) * x - between(0.02, 0.12) * y       # from one side, and from above
    canvas = np.empty((len(table), 3, size, size), np.float32)
    part = np.zeros((len(table), size, size), np.uint8)

    def paint(d, tint, name=None, where=None, shade=None, opacity=1.0):
        """Cover the shape d < 0 with tint (B, 3), brighter by the factor 1 + shade.

        name: its entry on the map of parts."""
        cover = np.clip(0.5 - d / pixel, 0, 1) * (1 if where is None else wide(where))
        if name:
            part[cover > 0.5] = PARTS.index(name)
        colour = np.broadcast_to(tint, (len(table), 3))[:, :, None, None]
        if shade is not None:
            colour = colour * (1 + shade)[:, None]
        canvas[:] += (cover * opacity)[:, None] * (colour - canvas)

    # Background: one colour; two that blend; or two that meet in a line.
    direction = between(0, 2 * np.pi)
    line = px * np.cos(direction) + py * np.sin(direction) + between(-0.2, 0.2)
    blend = np.clip(0.5 - line / 1.4, 0, 1) * (scenery == 1)
    canvas[:] = wall[:, :, None, None] + blend[:, None] * (wall2 - wall)[:, :, None, None]
    paint(line, wall2, "wall", scenery.ravel() == 2)
    canvas *= (1.04 - 0.12 * (px * px + py * py))[:, None]             # darker corners

    # The head is an egg, narrower towards the chin. Hair behind it, then shoulders, neck,
    # ears and the head itself.
    rx, ry, jaw = between(0.48, 0.57), between(0.60, 0.68), between(0.05, 0.28)
    head = ellipse(x / (1 - jaw * np.clip(y, 0, 1)), y, rx, ry)
    strands = light + 0.07 * np.sin(24 * x + 5 * np.sin(3 * y)) - 0.1 * y
    curtain = np.where(y < 0, ellipse(x, y, back + 0.01, ry + thick),
                       np.maximum(np.abs(x) - back - 0.04 * y, y - end))
    paint(curtain, hair * 0.8, "tresses", back.ravel() > 0, strands)
    paint(np.hypot(x, y + ry + 0.08) - bun, hair * 0.95, "tresses", (bun.ravel() > 0) & ~hat,
          strands)
    paint(np.hypot(np.abs(x) - rx - 0.14, y - 0.02) - tail, hair * 0.95, "tresses",
          tail.ravel() > 0, strands)
    paint(ellipse(bx, by - 1.22, between(0.74, 0.95), 0.52), shirt, "clothes", shade=light)
    collar = ellipse(bx, by - 0.74, 0.28, 0.17)
    paint(collar, shirt * 0.8, "clothes", chance(0.6), light)
    neck = ellipse(bx - x / 4, by - 0.62, 0.17, 0.28)                  # it leans with the head
    paint(neck, skin * 0.78, "neck", shade=light)
    ears = ellipse(np.abs(x + turn / 2) - rx, y - 0.02, 0.09, 0.14)
    paint(ears, skin * 0.92, "ears", shade=light)
    rim = np.exp(np.minimum(head, 0) / 0.09)                          # darker there: it looks round
    paint(head, skin, "head", shade=light - 0.16 * rim)
    blush = between(0, 0.45) * np.exp(((np.abs(f) - 0.3) ** 2 + (y - 0.2) ** 2) / -0.018)
    paint(head, [0.9, 0.35, 0.32], opacity=blush)

    # A beard is the head without an oval of free skin; the mouth and a moustache lie on it.
    free = ellipse(f, y + 0.06, 0.4, 0.36)
    paint(np.maximum(np.maximum(head - 0.02, -free), -0.1 - y), hair * 0.9, "beard", beard, strands)
    paint(arc(f, y - 0.26, 0.17, -0.05)[0] - 0.045, hair * 0.9, "beard", moustache, strands)
    nx, nostril = f - turn / 2, between(0.07, 0.1)     # a nose stands out: a turn moves it further
    paint(arc(nx, y - 0.05, 0.015, 0)[0] - 0.03, skin * 0.88, shade=light, opacity=0.6)
    paint(ellipse(nx, y - 0.15, nostril, 0.055), skin * 0.74, "nose", shade=light)
    paint(ellipse(nx, y - 0.13, nostril * 0.85, 0.05), skin * 1.04, shade=light)

    # A mouth is an arc, opened by gape in its middle (an oval for surprise), with lips
    # around, and teeth in laughter and anger.
    my = y - 0.4 + sag / 2
    d, u = arc(f, my, half, sag)
    is_oval = wide(mood) == EXPRESSIONS.index("surprised")
    d = np.where(is_oval, ellipse(f, my, half, gape + 1e-3), d - gape * u)
    paint(d - between(0.028, 0.045), skin * [0.85, 0.5, 0.5], "lips")
    paint(d, [0.32, 0.07, 0.1], "mouth", gape.ravel() > 0)
    paint(np.maximum(d + 0.01, my - (sag - gape) * u - 0.08), [0.98, 0.97, 0.95], "teeth",
          (gape.ravel() > 0) & (mood != EXPRESSIONS.index("surprised")))

    # Both eyes at once: |f| mirrors; e is measured from the middle of each eye without
    # mirroring, so that both look in the same direction.
    apart, width, tall = between(0.205, 0.235), between(0.13, 0.155), between(0.09, 0.11) * openness
    e, side, ey = f - np.sign(f) * apart, np.abs(f) - apart, y + 0.06
    gaze_x, gaze_y = e - between(-0.04, 0.04), ey - between(-0.015, 0.02)
    white, ball = ellipse(e, ey, width, tall), np.hypot(gaze_x, gaze_y)
    paint(white - 0.015, skin * 0.62, "lid")
    paint(white, [0.98, 0.98, 0.97], "eye")
    paint(np.maximum(ball - 0.08, white), iris, "iris")
    # The pupil and its highlight stay small: they have no outline.
    paint(np.maximum(ball - 0.042, white), [0.04, 0.03, 0.04])
    paint(np.hypot(gaze_x + 0.03, gaze_y + 0.03) - 0.024, [1, 1, 1])
    paint(arc(e, ey, width, -tall)[0] - 0.016, [0.12, 0.08, 0.08], "lid")
    brow = arc(side, ey + 0.2 + raised + 3 * inner * side, 0.13, -0.03)[0] - between(0.022, 0.035)
    paint(brow, np.minimum(hair * 0.7, skin * 0.6), "brow")

    # Hair in front is what lies around the head above the hairline; a hat sits on it,
    # glasses on everything.
    ripple = bump * np.abs(np.sin(np.arctan2(x, -y) * bumps / 2))   # bumps out; below zero, points
    front = np.maximum(head - thick - ripple, y - hairline - fall * x * x - slant * x)
    paint(front, hair, "hair", shade=strands)
    brim = y + 0.36 - 0.15 * x * x
    paint(np.maximum(head - 0.13, brim), cap, "hat", hat, light - 0.1 * y)
    paint(np.maximum(head - 0.15, np.abs(brim) - 0.07), cap * 0.75, "band", hat, light)
    frame = np.abs(ellipse(side, ey - 0.01, 0.19, 0.17))
    frame = np.minimum(frame, np.maximum(np.abs(f) - 0.05, np.abs(ey))) - 0.02    # with the bridge
    paint(frame, [0.13, 0.12, 0.14], "glasses", glasses)

    traits = {"expression": mood, "hair": style, "hair_colour": dye, "skin": tone,
              "glasses": glasses, "hat": hat, "beard": beard, "moustache": moustache,
              "background": scenery.ravel()}
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8), part, traits
