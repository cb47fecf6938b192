"""The one opener of image files: training, testing and the check before them judge a file alike, for all use this one.

What is accepted, and what becomes of it:

- JPEG, PNG, GIF, BMP, TIFF, WebP and PPM, by their content, whatever they are called. No other format: for some, Pillow
  starts programs (Ghostscript, for EPS). Of several frames, the first.
- All comes out as 8-bit RGB, upright as its EXIF says. 16-bit values are scaled by 1/256. CMYK is converted as Pillow
  does, without colour profiles. Transparency is dropped: what shows is the colour stored under it, not a background.
- Refused are files that can't be read or decoded to the end, 32-bit and floating-point grey, which doesn't say what is
  white, sides of a single pixel, which are placeholders, and sizes beyond `MAX_SIDE` or `MAX_PIXELS`.

A JPEG whose damage its decoder bridges with grey or shifted blocks, without a word, is not noticed.
"""

import os
import stat
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
# Against decompression bombs, from the header, before anything is decoded: a few kB may unfold to gigabytes.
MIN_SIDE, MAX_SIDE, MAX_PIXELS = 2, 2**14, 2**26
ADVICE = "; replace the file"


class BadImageError(ValueError):
    """A file that is no image to train on; the message has its path and the reason."""


def load_image(path: str | Path) -> PIL.Image.Image:
    """Decode an image to RGB, upright as its EXIF says.

    What can't be decoded is a BadImageError. The published loader puts a white picture in its place, unnoticed.
    """
    try:
        return _decode(path)
    except MemoryError:
        raise  # says nothing of the file
    except Exception as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
        raise BadImageError(f"{path} {_reason(path, error)}{ADVICE}") from error


def _decode(path: str | Path) -> PIL.Image.Image:
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for ever
        raise BadImageError("is no regular file")
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # the limits here are lower
        opened = PIL.Image.open(file, formats=FORMATS)
        width, height = opened.size
        if min(width, height) < MIN_SIDE:
            raise BadImageError(f"is {width} x {height} pixels: a placeholder, no picture")
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
            limits = f"at most {MAX_SIDE} a side and {MAX_PIXELS} in all"
            raise BadImageError(f"is {width} x {height} pixels, {limits} are decoded: scale it down")
        image = PIL.ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
        # 16-bit grey, by its names in Pillow's versions: convert() would turn all above 255 white.
        image = PIL.Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    elif image.mode in ("I", "F"):
        grey = np.asarray(image)
        raise ValueError(f"mode {image.mode}, {grey.min()} to {grey.max()}, does not say what is white")
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of a transparent palette that goes straight to RGB
    return image.convert("RGB")


def _reason(path: str | Path, error: Exception) -> str:
    """What is wrong with the file, to be read after its path."""
    if isinstance(error, BadImageError):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {error.strerror}"
    size = f"({os.stat(path).st_size} bytes)"
    if isinstance(error, PIL.UnidentifiedImageError):  # names the open file, not the path
        return f"{size} is no image in a format that is read here ({', '.join(FORMATS)})"
    return f"{size} cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"
