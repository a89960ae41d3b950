"""Trace: a picture of the sampler at work. At every network call the noisy image, and what the network takes it for.

    --trace way.png    x_t (scaled to the images' contrast), and below it the guess of x0

Shapes: B images, C channels (1 or 3), H x W pixels.
"""
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from plumbing.images import grid, to_uint8


class Trace:
    """Counts network calls and, for a picture of the way (--trace), keeps x_t and the network's guess of x0, of the first `keep`
    images. path: the picture, or None."""

    def __init__(self, loaded, path=None, keep=2):
        self.loaded, self.keep, self.calls, self.frames, self.result = loaded, keep if path else 0, 0, [], None
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            new = not Path(path).exists()
            open(path, "ab").close()                                            # what cannot be written is told now, not after the work
            if new:
                Path(path).unlink()

    def __call__(self, t, zt, x0):
        self.calls += 1
        if self.keep and self.result is None:
            scale = float(self.loaded.schedule.input_scale(t)) * self.loaded.schedule.data_std      # an image keeps its contrast, and edm's 80 is not all white
            self.frames.append([float(t)] + [to_uint8(self.loaded.space.decode(u[:self.keep]).cpu()) for u in (zt * scale, x0)])

    def done(self, images):
        """Tell that the images (B, C, H, W) in [-1, 1] of the calls so far are finished: the trace is of the first ones."""
        self.result = images[:self.keep] if self.result is None else self.result

    def save(self, path):
        """A picture: two rows an image, x_t and below it the guess, a column per call, then the result."""
        H, W = self.result.shape[2:]                                            # a small picture was padded on its way
        frames = [[t, *(u[:, :, :H, :W] for u in pair)] for t, *pair in self.frames]
        frames.append([0.0] + [to_uint8(self.result).expand_as(frames[0][1])] * 2)
        rows = torch.stack([torch.stack([frame[1 + k] for frame in frames]) for k in (0, 1)], 2)                # (frames, keep, 2, C, H, W)
        sheet = grid(rows.permute(1, 2, 0, 3, 4, 5).flatten(0, 2), len(frames))
        canvas = Image.new("RGB", (sheet.width, sheet.height + 14), "white")
        canvas.paste(sheet, (0, 14))
        for i, (t, *_) in enumerate(frames):
            ImageDraw.Draw(canvas).text((4 + i * sheet.width / len(frames), 1), f"{t:.2g}", fill="black")
        canvas.save(path)
