"""Every kind of odd image file: those that are to be refused, with the reason, and those that are to be taken."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)


def save(path: Path, image: PIL.Image.Image, kind: str = "JPEG", **settings: object) -> None:
    """Of any format under any name: the content decides."""
    path.unlink(missing_ok=True)
    image.save(path, kind, **settings)


def photo() -> PIL.Image.Image:
    return PIL.Image.fromarray(PIXELS)


def cut(path: Path, kind: str, share: float = 0.5) -> None:
    save(path, photo(), kind)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def bomb(path: Path, width: int, height: int) -> None:
    """A whole black PNG, far smaller as a file than in memory, written row by row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    rows = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def become(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


def exif(orientation: int) -> PIL.Image.Exif:
    tags = PIL.Image.Exif()
    tags[0x0112] = orientation
    return tags


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
GREY = PIXELS[..., 0].astype(np.int32)

# {kind: (what makes a file of it in an image's place, a part of the reason)}
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated JPEG": (lambda path: cut(path, "JPEG"), "truncated"),
    "JPEG without its last bytes": (lambda path: cut(path, "JPEG", 0.98), "truncated"),
    "truncated PNG": (lambda path: cut(path, "PNG"), "truncated"),
    "truncated GIF": (lambda path: cut(path, "GIF"), "cannot be decoded"),
    "truncated WebP": (lambda path: cut(path, "WEBP"), "cannot be decoded"),
    "truncated TIFF": (lambda path: cut(path, "TIFF"), "cannot be decoded"),
    "truncated BMP": (lambda path: cut(path, "BMP"), "truncated"),
    "header alone": (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"), "is not an image"),
    "zero bytes": (lambda path: path.write_bytes(b""), "(0 bytes) is not an image"),
    "nothing but zeros": (lambda path: path.write_bytes(bytes(2000)), "(2000 bytes) is not an image"),
    "text": (lambda path: path.write_text("404 Not found\n"), "(14 bytes) is not an image"),
    "a program for Ghostscript": (lambda path: path.write_bytes(EPS), "is not an image in a supported format"),
    "1x1": (lambda path: save(path, PIL.Image.new("RGB", (1, 1))), "is 1 x 1 pixels: a placeholder"),
    "1 pixel wide": (lambda path: save(path, PIL.Image.new("RGB", (1, 50))), "is 1 x 50 pixels: a placeholder"),
    "20,000 px wide": (lambda path: bomb(path, 20_000, 10), "is 20000 x 10 pixels, the limits are 16384 a side"),
    "12,000 px square, of which Pillow warns": (lambda path: bomb(path, 12_000, 12_000), "is 12000 x 12000 pixels"),
    "20,000 px square, which Pillow refuses": (lambda path: bomb(path, 20_000, 20_000), "decompression bomb"),
    "32-bit grey": (lambda path: save(path, PIL.Image.fromarray(GREY), "TIFF"), "has no defined white level"),
    "floating point": (
        lambda path: save(path, PIL.Image.fromarray(GREY / np.float32(255)), "TIFF"),
        "has no defined white level",
    ),
    "missing": (Path.unlink, "cannot be read: No such file"),
    "link to nothing": (lambda path: link(path, "nothing.jpg"), "cannot be read: No such file"),
    "link to itself": (lambda path: link(path, path.name), "cannot be read: Too many levels of symbolic links"),
    "folder": (lambda path: become(path, Path.mkdir), "is not a regular file"),
    "pipe": (lambda path: become(path, os.mkfifo), "is not a regular file"),
    "unreadable": (lambda path: path.chmod(0), "cannot be read: Permission denied"),
}
GREY8 = PIL.Image.fromarray(PIXELS[..., 0])
GREY16 = (PIXELS[..., 0].astype(np.uint16)) * 257
PALETTE = photo().convert("P", palette=PIL.Image.Palette.ADAPTIVE)
# {kind: (what makes a file of it, the picture that is to come out)}
GOOD: dict[str, tuple[Callable[[Path], None], np.ndarray]] = {
    "PNG named .jpg": (lambda path: save(path, photo(), "PNG"), PIXELS),
    "8-bit grey": (lambda path: save(path, GREY8, "PNG"), PIXELS[..., [0, 0, 0]]),
    "grey and transparent": (lambda path: save(path, GREY8.convert("LA"), "PNG"), PIXELS[..., [0, 0, 0]]),
    "black and white": (
        lambda path: save(path, GREY8.point(lambda grey: 255 * (grey > 99), "1"), "PNG"),
        np.uint8(255) * (PIXELS[..., [0, 0, 0]] > 99),
    ),
    "16-bit grey PNG": (lambda path: save(path, PIL.Image.fromarray(GREY16), "PNG"), PIXELS[..., [0, 0, 0]]),
    "16-bit grey TIFF": (lambda path: save(path, PIL.Image.fromarray(GREY16), "TIFF"), PIXELS[..., [0, 0, 0]]),
    "palette with a transparent colour": (
        lambda path: save(path, PALETTE, "PNG", transparency=7),
        np.asarray(PALETTE.convert("RGB")),
    ),
    "palette with half-transparent colours": (
        lambda path: save(path, PALETTE, "PNG", transparency=bytes(range(256))),
        np.asarray(PALETTE.convert("RGB")),
    ),
    "transparent": (
        lambda path: save(path, PIL.Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]])), "PNG"),
        PIXELS,
    ),
    "CMYK": (
        lambda path: save(path, PIL.Image.new("CMYK", (48, 40), (255, 0, 0, 51)), quality=100),
        np.full((40, 48, 3), [0, 204, 204], np.uint8),  # by formula: 255 less the ink, times the share not black
    ),
    # Turned and mirrored as the EXIF standard words it, by where row 0 and column 0 are to be shown.
    "EXIF 2": (lambda path: save(path, photo(), "PNG", exif=exif(2)), PIXELS[:, ::-1]),
    "EXIF 3": (lambda path: save(path, photo(), "PNG", exif=exif(3)), PIXELS[::-1, ::-1]),
    "EXIF 4": (lambda path: save(path, photo(), "PNG", exif=exif(4)), PIXELS[::-1]),
    "EXIF 5": (lambda path: save(path, photo(), "PNG", exif=exif(5)), PIXELS.transpose(1, 0, 2)),
    "EXIF 6": (lambda path: save(path, photo(), "PNG", exif=exif(6)), PIXELS.transpose(1, 0, 2)[:, ::-1]),
    "EXIF 7": (lambda path: save(path, photo(), "PNG", exif=exif(7)), PIXELS.transpose(1, 0, 2)[::-1, ::-1]),
    "EXIF 8": (lambda path: save(path, photo(), "PNG", exif=exif(8)), PIXELS.transpose(1, 0, 2)[::-1]),
}
