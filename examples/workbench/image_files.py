"""Opens image files. Training, testing and the check before training all use this, so that they accept the same files.

What is accepted, and how it is converted:

- JPEG, PNG, GIF, BMP, TIFF, WebP and PPM, by their content, whatever they are called. No other format: for some, Pillow
  starts programs (Ghostscript, for EPS). Of several frames, the first.
- All comes out as 8-bit RGB, upright as its EXIF says. 16-bit values are scaled by 1/256. CMYK is converted as Pillow
  does, without colour profiles. Transparency is dropped: what shows is the colour stored under it, not a background.
- Refused: files that can't be read or completely decoded; 32-bit and floating-point grey, whose white level is
  undefined; sides of a single pixel, which are placeholders; and sizes above `MAX_SIDE` or `MAX_PIXELS`.

A damaged JPEG that its decoder silently fills with grey or shifted blocks is not detected.
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
    """A file that can't be used as an image; the message has its path and the reason."""


def load_image(path: str | Path) -> PIL.Image.Image:
    """Decode an image to RGB, upright as its EXIF says.

    Raises BadImageError if it can't be decoded. (The published loader silently uses a white picture instead.)
    """
    try:
        return _decode(path)
    except MemoryError:
        raise  # not the file's fault
    except Exception as error:  # decoders raise many types: OSError, SyntaxError, struct.error, ...
        raise BadImageError(f"{path} {_reason(path, error)}{ADVICE}") from error


def _decode(path: str | Path) -> PIL.Image.Image:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
        raise BadImageError("is not a regular file")
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # the limits here are lower
        opened = PIL.Image.open(file, formats=FORMATS)
        width, height = opened.size
        if min(width, height) < MIN_SIDE:
            raise BadImageError(f"is {width} x {height} pixels: a placeholder, not a picture")
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
            limits = f"{MAX_SIDE} a side and {MAX_PIXELS} in total"
            raise BadImageError(f"is {width} x {height} pixels, the limits are {limits}: scale it down")
        image = PIL.ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
        # 16-bit grey, by its names in Pillow's versions: convert() would turn all above 255 white.
        image = PIL.Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    elif image.mode in ("I", "F"):
        grey = np.asarray(image)
        raise ValueError(f"mode {image.mode}, {grey.min()} to {grey.max()}, has no defined white level")
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of a transparent palette that goes straight to RGB
    return image.convert("RGB")


def _reason(path: str | Path, error: Exception) -> str:
    """What is wrong with the file, as a sentence whose subject is its path."""
    if isinstance(error, BadImageError):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {error.strerror}"
    size = f"({os.stat(path).st_size} bytes)"
    if isinstance(error, PIL.UnidentifiedImageError):  # names the open file, not the path
        return f"{size} is not an image in a supported format ({', '.join(FORMATS)})"
    return f"{size} cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"
