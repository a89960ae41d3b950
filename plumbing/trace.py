"""Trace: a picture of the sampler at work, with one column for each network call.

    --trace way.png    the noisy image x_t, and below it what the network takes it for

It knows nothing of models: how x_t is scaled and how it becomes pictures are handed in.

Shapes: B images, C channels (1 or 3), H x W pixels.
"""
from pathlib import Path
from tempfile import TemporaryFile

from plumbing.console import UserError, describe_error
from plumbing.images import to_uint8
from plumbing.sheets import draw_sheet, save_picture


class Trace:
    """Counts network calls and, if there is a path, keeps what they saw and guessed.

    path: the picture, or None. contrast(t) -> the number that x_t is multiplied by.
    decode(z) -> pictures (B, C, H, W) in [-1, 1]. keep: so many images at most."""

    def __init__(self, path, contrast, decode, keep=2):
        self.path, self.contrast, self.decode = path, contrast, decode
        self.keep = keep if path else 0
        self.calls, self.frames, self.result = 0, [], None
        if path:
            require_place(path)                                       # told now, not after the work

    def __call__(self, t, zt, x0):
        self.calls += 1
        if self.keep and self.result is None:
            scaled = zt * self.contrast(t)
            pictures = [to_uint8(self.decode(z[:self.keep]).cpu()) for z in (scaled, x0)]
            self.frames.append((float(t), *pictures))

    def finish(self, images):
        """Say that the images (B, C, H, W) in [-1, 1] of the calls so far are finished."""
        if self.result is None:                                     # the trace is of the first ones
            self.result = images[:self.keep]

    def save(self):
        """Write the picture: two rows an image, a column per call, then the result."""
        H, W = self.result.shape[2:]                                    # a small picture was padded
        rows = []
        for i, image in enumerate(to_uint8(self.result)):
            noisy = [frame[1][i, :, :H, :W] for frame in self.frames]
            guesses = [frame[2][i, :, :H, :W] for frame in self.frames]
            rows += [(f"image {i}: x_t", [*noisy, image]), ("guess of x0", [*guesses, image])]
        columns = [f"t = {t:.2g}" for t, *_ in self.frames] + ["result"]
        save_picture(draw_sheet(rows, columns, zoom=max(1, 96 // W)), self.path)


def require_place(path):
    """UserError unless a file can be written at `path`. Its folder is made."""
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({describe_error(error)}); "
                        "give another place") from None
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
