"""Journal: the log of a run, without gap or repeat, and its picture.

What ran after the last checkpoint runs again, so the log is cut back to the checkpoint first.

    runs/NAME/log.csv    a line every ten steps        runs/NAME/loss.png    its curves
"""
import csv
import math
import os

from PIL import Image, ImageDraw

COLUMNS = ["step", "seconds", "images", "loss", "val_loss", "lr", "ratio", "visible", "images_per_second"]


def open_log(path, step):
    """log.csv for appending, cut back to `step`: what ran after the checkpoint will run again."""
    rows = []
    if path.exists():
        with open(path, newline="") as f:
            rows = [r for r in csv.DictReader(f) if r["images_per_second"] and int(r["step"]) <= step]     # a torn last line has no last field
    with open(path.with_suffix(".tmp"), "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path.with_suffix(".tmp"), path)
    return open(path, "a", newline="", buffering=1)


def draw_loss(log, path, width=640, height=360):
    """log.csv -> a picture: training loss (grey), validation loss (red), logarithmic, over steps."""
    with open(log, newline="") as f:
        rows = list(csv.DictReader(f))
    curves = {name: [(int(r["step"]), float(r[name])) for r in rows if r[name] and 0 < float(r[name]) < math.inf] for name in ("loss", "val_loss")}
    points = [p for curve in curves.values() for p in curve]
    if not points:
        return
    left, right, top, bottom = 60, width - 12, 24, height - 30
    last, lo, hi = max(1, *(p[0] for p in points)), math.log(min(p[1] for p in points)), math.log(max(p[1] for p in points))
    place = lambda s, v: (left + (right - left) * s / last, bottom - (bottom - top) * (math.log(v) - lo) / max(hi - lo, 1e-9))
    picture = Image.new("RGB", (width, height), "white")
    ink = ImageDraw.Draw(picture)
    for i in range(5):
        v = math.exp(lo + (hi - lo) * i / 4)
        ink.line([place(0, v), place(last, v)], fill=(230, 230, 230))
        ink.text((6, place(0, v)[1] - 6), f"{v:.3g}", fill="black")
        ink.text((place(last * i / 4, v)[0] - 10, bottom + 8), f"{last * i // 4}", fill="black")
    for name, colour in (("loss", (150, 150, 150)), ("val_loss", (200, 30, 30))):
        if len(curves[name]) > 1:
            ink.line([place(*p) for p in curves[name]], fill=colour, width=2 if name == "val_loss" else 1)
    ink.text((left, 6), "training loss", fill=(120, 120, 120))
    ink.text((left + 110, 6), "validation loss", fill=(200, 30, 30))
    picture.save(path)
