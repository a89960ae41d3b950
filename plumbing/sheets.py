"""Sheets: pictures in a table with titles, and plots with numbers at their axes. All
figures of the project are made here.

    rows = [("patch", [tile, tile]), ("block", [tile, tile])]
    draw_sheet(rows, ["ratio 0.5", "ratio 0.9"]).save("mask.png")
    draw_plot([("loss", "gray", [(0, 1.0), (100, 0.3)])], 300, 160, "step", "loss")

A picture is a PIL image or a tensor uint8 (C, H, W), C 1 or 3.
"""
import math

import torch
from PIL import Image, ImageDraw, ImageFont

from plumbing.console import replacing

FONT_SIZE = 12


def text_size(text):
    """Width and height in pixels of a text of one or more lines."""
    ink = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    box = ink.multiline_textbbox((0, 0), text, ImageFont.load_default(FONT_SIZE))
    return math.ceil(box[2]), math.ceil(box[3])


def draw_text(picture, place, text, colour="black", anchor="la"):
    """Write a text onto a PIL picture. anchor: of its first letter, as in Pillow (`la` left
    top)."""
    font = ImageFont.load_default(FONT_SIZE)
    ImageDraw.Draw(picture).multiline_text(place, text, colour, font, anchor, align="left")


def to_picture(image, zoom=1):
    """A PIL image or a tensor uint8 (C, H, W) -> a PIL image in RGB, `zoom` times as
    large."""
    if torch.is_tensor(image):
        array = image.cpu().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        image = Image.fromarray(array)
    size = (image.width * zoom, image.height * zoom)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def save_picture(picture, path):
    """Write a PIL image as PNG: the whole new file or the old one stands there, and a link
    to elsewhere is replaced."""
    with replacing(path) as file:
        picture.save(file, "PNG")


def draw_sheet(rows, columns=(), zoom=1, pad=4):
    """Pictures in a table, every row and every column with its title.

    rows: [(title, [picture, ...]), ...]; a title may have several lines. Rows may differ in
    length and pictures in size. columns: the titles above the columns, left to right.
    zoom: a whole number, how much the pictures are enlarged. -> PIL image"""
    table = [(title, [to_picture(image, zoom) for image in images]) for title, images in rows]
    count = max(len(images) for _, images in table)
    titles = [*columns, *[""] * (count - len(columns))]
    widths = [text_size(title)[0] if title else 0 for title in titles]
    for _, images in table:
        for j, image in enumerate(images):
            widths[j] = max(widths[j], image.width)
    heights = [max([text_size(title)[1], *(image.height for image in images)])
               for title, images in table]
    left = max(text_size(title)[0] if title else 0 for title, _ in table)
    left += 2 * pad if left else pad
    top = max([text_size(title)[1] for title in titles if title], default=0) + 2 * pad
    size = (left + sum(widths) + pad * count, top + sum(heights) + pad * len(table))
    canvas = Image.new("RGB", size, "white")
    for j, title in enumerate(titles):
        draw_text(canvas, (left + sum(widths[:j]) + pad * j, pad), title)
    for i, (title, images) in enumerate(table):
        y = top + sum(heights[:i]) + pad * i
        draw_text(canvas, (pad, y + (heights[i] - text_size(title)[1]) // 2), title)
        for j, image in enumerate(images):
            canvas.paste(image, (left + sum(widths[:j]) + pad * j, y))
    return canvas


def draw_plot(
    curves,             # [(name, colour, [(x, y), ...]), ...]; "" stays out of the legend
    width,              # of the picture, in pixels
    height,
    x_label="",
    y_label="",
    y_range=None,       # (low, high), or None for that of the curves
    log=False,          # a logarithmic y axis
    ticks=5,            # how many numbers stand at an axis
):
    """Curves over a common axis, numbers at both axes, a legend above. -> PIL image"""
    xs, ys = zip(*(point for _, _, curve in curves for point in curve))
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = y_range or (min(ys), max(ys))
    scale = math.log if log else float
    numbers = [tick_value(scale(y_low), scale(y_high), i / (ticks - 1), log) for i in range(ticks)]
    left = 8 + max(text_size(f"{number:.3g}")[0] for number in numbers)
    top, right, bottom = 22, width - 14, height - 36

    def place(x, y):
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (scale(y) - scale(y_low)) / ((scale(y_high) - scale(y_low)) or 1)
        return left + (right - left) * across, bottom - (bottom - top) * up

    canvas = Image.new("RGB", (width, height), "white")
    ink = ImageDraw.Draw(canvas)
    for i, number in enumerate(numbers):
        x = x_low + (x_high - x_low) * i / (ticks - 1)
        ink.line([place(x_low, number), place(x_high, number)], fill=(230, 230, 230))
        draw_text(canvas, (left - 4, place(x_low, number)[1]), f"{number:.3g}", anchor="rm")
        draw_text(canvas, (place(x, y_low)[0], bottom + 4), f"{x:.3g}", anchor="ma")
    for _, colour, curve in curves:
        ink.line([place(*point) for point in curve], fill=colour, width=2)
    draw_text(canvas, ((left + right) / 2, height - 16), x_label, anchor="ma")
    for name, colour, _ in curves:
        draw_text(canvas, (left, 4), name, colour)
        left += text_size(name)[0] + 14 if name else 0
    draw_text(canvas, (right, 4), y_label, anchor="ra")
    return canvas


def tick_value(low, high, share, log):
    """The number at a share in [0, 1] of an axis from low to high, which are logarithms if
    log."""
    value = low + (high - low) * share
    return math.exp(value) if log else value
