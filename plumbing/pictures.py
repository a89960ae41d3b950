"""One picture: opened, turned upright, brought to 8 bits, cut to a square.

Files come from anywhere, so nothing here trusts them. Only formats of FORMATS are opened,
whatever a file's ending says: for an .eps Pillow would start another program. A
decompression bomb is not opened. Damage of what is said about the pixels (EXIF, texts) is
no damage of the pixels: they are used as they lie.

    open_picture(file)             PIL picture, its pixels not read yet
    crop_square(picture, size)     uint8 (C, size, size): its largest centred square,
                                   resized with LANCZOS

Shapes: C channels (3, or 1 for gray), size the side in pixels.
"""
import os

import numpy as np
from PIL import Image, PngImagePlugin
from PIL.Image import Transpose

# Kinds of pictures, by Pillow's names; those that the installed Pillow opens are used.
KINDS = ("AVIF BMP DDS DIB GIF ICO IM JPEG JPEG2000 MPO MSP PCX PNG PPM PSD QOI SGI SUN TGA TIFF "
         "WEBP XBM XPM").split()
Image.init()                                                # registers all that Pillow knows
FORMATS = [kind for kind in KINDS if kind in Image.OPEN]
ENDINGS = tuple(sorted(ending for ending, kind in Image.registered_extensions().items()
                       if kind in KINDS and kind in [*FORMATS, "MPO"]))    # an .mpo is a JPEG

# Texts of image generators are longer than Pillow's 1 MB. All of a file's may have 64 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

LARGE = 2**24                                               # pixels: decoded smaller where possible
ORIENTATION = 0x0112                                        # an EXIF tag, and what its values mean
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
         5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
         8: Transpose.ROTATE_90}


def open_picture(file):
    """Open a path or a file object with Pillow; its header is read and its pixels are not.

    -> PIL picture.  Image.DecompressionBombError for too many pixels, OSError for a pipe or
    a device, which would never end."""
    is_path = isinstance(file, (str, os.PathLike))
    if is_path and os.path.exists(file) and not os.path.isfile(file):
        raise OSError("a pipe, a device or a folder, not a file")
    picture = Image.open(file, formats=FORMATS)
    limit = Image.MAX_IMAGE_PIXELS             # above it Pillow warns; it raises above twice of it
    if limit and picture.width * picture.height > limit:
        raise Image.DecompressionBombError(
            f"{picture.width} x {picture.height} pixels, the limit is {limit}")
    return picture


def find_turn(picture):
    """How a PIL picture must be turned to stand upright, or None: EXIF is silent, or
    damaged."""
    try:
        return TURNS.get(picture.getexif().get(ORIENTATION))
    except Exception:                          # on damaged tags Pillow raises nearly everything
        return None


def upright_size(picture):
    """Width and height of a PIL picture once it stands upright."""
    lies = find_turn(picture) in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
    return (picture.height, picture.width) if lies else picture.size


def turn_upright(picture):
    """Turn a PIL picture as its EXIF tag says; where EXIF cannot be read it stays.

    -> PIL picture that will not be turned again"""
    picture.load()                             # an error of the pixels is no error of EXIF
    turn = find_turn(picture)
    if turn is None:
        return picture
    turned = picture.transpose(turn)
    turned.info = {key: value for key, value in turned.info.items() if key == "transparency"}
    return turned


def find_white(values):
    """Which value of a 16 or 32 bit or float array (H, W) is white.

    Whole numbers go to 65535 at least. Floats go to 1 when their typical value does (what
    lies above is overexposed), else to 255 at least."""
    if values.dtype.kind != "f":
        return max(65535, int(values.max()))
    some = values[::max(1, len(values) // 1024), ::max(1, values.shape[1] // 1024)]
    lit = some[np.isfinite(some) & (some > 0)]
    if not len(lit) or np.median(lit) <= 1:
        return 1
    return max(255, float(np.max(values, where=np.isfinite(values), initial=0)))


def scale_to_8_bit(values):
    """An array (H, W) of 16 or 32 bits or of floats -> uint8 (H, W).

    A few rows at a time: a large picture would need gigabytes as float64."""
    out, white = np.empty(values.shape, np.uint8), find_white(values)
    rows = max(1, 2**20 // max(1, values.shape[1]))
    for top in range(0, len(values), rows):
        part = values[top:top + rows].astype(np.float64)
        part = np.nan_to_num(part, posinf=white).clip(0, white)
        out[top:top + rows] = (part * (255 / white)).round()
    return out


def to_8_bit(picture):
    """Bring a PIL picture of any mode to mode L or RGB.

    16 bits are scaled to 8, and transparency is laid over white.  -> PIL picture"""
    if picture.mode[0] in "IF":        # 16 and 32 bits, float: convert() would clip them at 255
        return Image.fromarray(scale_to_8_bit(np.asarray(picture)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "L" else picture.convert("RGB")


def cut_centre(picture):
    """The largest centred square of a PIL picture."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def crop_square(picture, size, gray=False):
    """Cut out the largest centred square of a PIL picture and resize it with LANCZOS.

    A JPEG of more than LARGE pixels is decoded at a half, a quarter or an eighth of its
    sides, as long as they stay four times as long as the square's.
    -> uint8 array (C, size, size)"""
    if picture.width * picture.height > LARGE:
        picture.draft(None, (4 * size, 4 * size))
    picture = turn_upright(picture)
    # Cropped first: resize(box=...) would look across the border. What white is, though,
    # the whole picture says.
    square = cut_centre(to_8_bit(picture) if picture.mode[0] in "IF" else picture)
    square = to_8_bit(square).convert("L" if gray else "RGB")
    small = square.resize((size, size), Image.Resampling.LANCZOS)
    return np.array(small).reshape(size, size, -1).transpose(2, 0, 1)


def largest_value(picture):
    """The largest value of a map, as its file has it, and whether that is middle grey or
    more once it has 8 bits.  -> number, bool"""
    values = np.asarray(picture if len(picture.getbands()) == 1 else to_8_bit(picture).convert("L"))
    return values.max().item(), np.asarray(to_8_bit(picture).convert("L")).max() >= 128
