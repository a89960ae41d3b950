"""Spaces: where diffusion happens. `space.encode(x)` takes images to what the network sees, `space.decode(z)` takes them back.

In pixel space both are the identity. (LMD, arXiv 2312.07971, and MaskDiT work in the latent space of an autoencoder; such a space has
the same two functions, so no other file needs to know which one it is given.)

Shapes: x (B, C, H, W) in [-1, 1]; z (B, channels, H / factor, W / factor).
"""


class PixelSpace:
    """Images as they are. `factor` pixels of the image make one place of z."""
    name, factor = "pixel", 1

    def __init__(self, channels):
        self.channels = channels

    def encode(self, x):
        """(B, C, H, W) in [-1, 1] -> the same."""
        return x

    def decode(self, z):
        """(B, C, H, W) -> the same, in [-1, 1] up to the network's errors."""
        return z


SPACES = {"pixel": PixelSpace}
