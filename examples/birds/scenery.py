"""Drawing tools, and what surrounds a bird: backdrop, perch, twigs in front of it, the light of the picture."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "white": (240, 239, 234), "cream": (232, 220, 190), "buff": (206, 172, 124), "yellow": (236, 200, 48),
    "orange": (230, 126, 34), "red": (200, 40, 36), "rufous": (158, 82, 42), "brown": (112, 82, 58),
    "umber": (70, 52, 42), "black": (34, 33, 38), "slate": (78, 86, 98), "grey": (146, 150, 154),
    "silver": (196, 200, 204), "blue": (58, 104, 184), "navy": (38, 52, 104), "teal": (38, 124, 130),
    "green": (84, 128, 56), "olive": (116, 112, 62), "pink": (222, 146, 150), "violet": (106, 66, 130),
}  # fmt: skip
BACKDROP_PIXELS = 72  # a backdrop is painted this small and scaled up, out of focus: the bird is to stand out


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """The colour `share` of the way from `a` to `b`."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def pixels(points: np.ndarray) -> list[tuple[float, float]]:
    """Complex points (x + iy, in pixels) in the form that ImageDraw takes."""
    return list(zip(points.real.tolist(), points.imag.tolist(), strict=True))


def spline(knots: np.ndarray, steps: int = 6) -> np.ndarray:
    """A smooth (Catmull-Rom) curve through the rows of `knots`, `steps` points per stretch."""
    padded = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    p0, p1, p2, p3 = (padded[i : len(padded) - 3 + i, None] for i in range(4))
    t = np.arange(steps).reshape(1, steps, *[1] * (knots.ndim - 1)) / steps
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return np.concatenate([curve.reshape(-1, *knots.shape[1:]), knots[-1:]])


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Noise of unit variance on a coarse `shape` (rows, columns), scaled up smoothly to `size` (rows, columns)."""
    coarse = Image.fromarray(rng.standard_normal(shape, dtype=np.float32))
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC))


def smooth_step(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, smooth between; with a last axis for colours."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t))[..., None]


def vane(start: float, end: float, width: float) -> np.ndarray:
    """The outline of a feather of length 1 between the shares `start` and `end` of its length."""
    s = np.linspace(start, end, 9)
    half = 1j * width * (0.6 + 0.4 * np.minimum(s / 0.4, 1)) * np.sqrt(1 - np.clip((s - 0.86) / 0.14, 0, 1) ** 2)
    return np.concatenate([s + half, (s - half)[::-1]])


def swell(
    world: np.ndarray, spine: np.ndarray, radius: np.ndarray, sun: complex
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Takes circles (`spine`, `radius`) for the outline of balls and lights the solid that these make up.

    Returns, for every point of `world`: the index of the ball that is foremost there (of the nearest, outside),
    the point's offset from its centre in radii, and the light on it from the direction `sun`.
    """
    x, y = np.ascontiguousarray(world.real, np.float32), np.ascontiguousarray(world.imag, np.float32)
    best, nearest = np.full(world.shape, -np.inf, np.float32), np.zeros(world.shape, np.intp)
    for k, (centre, r) in enumerate(zip(spine.tolist(), radius.tolist(), strict=True)):
        height = r * r - (x[0] - centre.real) ** 2 - (y[:, :1] - centre.imag) ** 2  # squared
        nearest[height > best] = k
        np.maximum(best, height, out=best)
    offset = (world - spine[nearest]) / radius[nearest]
    away = np.abs(offset)
    facing = 0.75 * (offset * np.conj(sun)).real / np.maximum(away, 1) + 0.66 * np.sqrt(np.clip(1 - away**2, 0, 1))
    light = 0.6 + 0.5 * np.clip(facing, -0.3, 1)
    # The edge's light goes on a little outside, so that no bright seam shows where the picture is scaled up.
    light += np.clip((away - 1.1) / 0.3, 0, 1) * (0.92 - light)
    return nearest, offset, light.astype(np.float32)


def _gradient(top: Colour, bottom: Colour, n: int) -> np.ndarray:
    share = np.linspace(0, 1, n, dtype=np.float32)[:, None, None]
    return np.array(top, np.float32) * (1 - share) + np.array(bottom, np.float32) * share + np.zeros((1, n, 1))


def _sky(rng: np.random.Generator, n: int) -> np.ndarray:
    grey = rng.uniform(0, 0.6)
    sky = _gradient(mix((96, 150, 208), (176, 184, 194), grey), mix((188, 214, 234), (214, 216, 218), grey), n)
    clouds = np.clip(smooth_noise(rng, (5, 3), (n, n)), 0, 1)[..., None]
    return sky + clouds * rng.uniform(0, 0.6) * (244 - sky)


def _foliage(rng: np.random.Generator, n: int) -> np.ndarray:
    dark = mix((40, 66, 34), (84, 78, 44), rng.uniform())
    light = mix((122, 158, 78), (166, 160, 96), rng.uniform())
    share = np.clip(0.45 + 0.3 * smooth_noise(rng, (6, 6), (n, n)), 0, 1)[..., None]
    leaves = np.array(dark) * (1 - share) + np.array(light) * share
    picture = Image.fromarray(leaves.astype(np.uint8))
    discs = picture.copy()
    draw = ImageDraw.Draw(discs)
    for x, y, r, lit in rng.uniform((0, 0, 0.03, 0.2), (1, 1, 0.09, 0.9), (int(rng.integers(4, 16)), 4)) * (n, n, n, 1):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=mix(light, (232, 238, 196), lit))
    return np.asarray(Image.blend(picture, discs, rng.uniform(0.25, 0.6)), np.float32)


def _water(rng: np.random.Generator, n: int) -> np.ndarray:
    tone = rng.uniform()
    water = _gradient(mix((126, 158, 176), (150, 160, 150), tone), mix((56, 92, 118), (70, 92, 84), tone), n)
    ripples = smooth_noise(rng, (n // 3, 5), (n, n))[..., None]
    return water + 11 * ripples


def _meadow(rng: np.random.Generator, n: int) -> np.ndarray:
    horizon = int(n * rng.uniform(0.1, 0.45))
    tone = rng.uniform()
    land = _gradient(mix((132, 158, 88), (176, 164, 104), tone), mix((84, 118, 48), (128, 118, 62), tone), n)
    land += 10 * smooth_noise(rng, (8, 20), (n, n))[..., None]
    land[:horizon] = _sky(rng, n)[n - horizon :]
    return land


BACKDROPS = {"sky": _sky, "foliage": _foliage, "water": _water, "meadow": _meadow}


def paint_backdrop(rng: np.random.Generator, habitat: str, size: int) -> Image.Image:
    small = np.clip(BACKDROPS[habitat](rng, BACKDROP_PIXELS), 0, 255).astype(np.uint8)
    blurred = Image.fromarray(small).filter(ImageFilter.GaussianBlur(1.2))
    return blurred.resize((size, size), Image.Resampling.BICUBIC)


def _limb(draw: ImageDraw.ImageDraw, knots: np.ndarray, widths: np.ndarray, bark: Colour) -> None:
    """A tapering branch along complex `knots`, lit from above."""
    curve = spline(knots, 8)
    half = np.interp(np.linspace(0, 1, len(curve)), np.linspace(0, 1, len(widths)), widths) / 2
    across = 1j * np.gradient(curve) / np.maximum(np.abs(np.gradient(curve)), 1e-6)
    across *= np.sign(across.imag + 1e-9)  # towards the lower side, whichever way the branch runs
    for low, high, tone in ((1, -1, 0.35), (0.55, -1, 0.1), (-0.2, -0.8, -0.3)):
        fill = mix(bark, (0, 0, 0), tone) if tone > 0 else mix(bark, (255, 250, 235), -tone)
        draw.polygon(pixels(np.concatenate([curve + low * half * across, (curve + high * half * across)[::-1]])), fill)


def _leaf(draw: ImageDraw.ImageDraw, base: complex, along: complex, green: Colour) -> None:
    outline = spline(np.array([0, 0.3 + 0.24j, 0.65 + 0.2j, 1, 0.65 - 0.2j, 0.3 - 0.24j, 0]), 4) * along + base
    draw.polygon(pixels(outline), green)
    draw.polygon(pixels(outline[: len(outline) // 2 + 1]), mix(green, (236, 244, 180), 0.22))
    vein, thick = np.array([base, base + 0.92 * along]), max(1, round(abs(along) / 22))
    draw.line(pixels(vein), mix(green, (20, 36, 10), 0.45), thick)


def paint_perch(canvas: Image.Image, rng: np.random.Generator, kind: str, feet: complex, unit: float) -> None:
    """Paints a "branch", "rock" or "ground" whose top is at `feet`, for a bird `unit` pixels long."""
    draw, side = ImageDraw.Draw(canvas), canvas.width
    slope, bend, thick, tone = rng.uniform((-0.25, -0.1, 0.09, 0), (0.25, 0.1, 0.15, 1))
    if kind == "branch":
        thick *= unit
        x = np.array([-0.1 * side, feet.real, 1.1 * side])
        y = feet.imag + thick * 0.42 + slope * (x - feet.real) + np.array([bend, 0, -bend]) * side * 0.6
        _limb(draw, x + 1j * y, thick * np.array([1.25, 1, 0.7]), mix((92, 70, 52), (120, 112, 104), tone))
    elif kind == "rock":
        wide = unit * rng.uniform(0.5, 0.9)
        knots = np.array([-1.5 + 1.3j, -0.95 + 0.3j, -0.4, 0.1 - 0.02j, 0.5, 1 + 0.35j, 1.6 + 1.3j]) * wide
        knots[[0, -1]] = knots[[0, -1]].real + 1.2j * side
        stone = mix((112, 108, 102), (134, 118, 98), tone)
        draw.polygon(pixels(spline(knots) + feet), mix(stone, (30, 30, 34), 0.25))
        draw.polygon(pixels(spline(np.append(knots[1:-1], (0.1 + 0.5j) * wide)) + feet), stone)
    else:
        x = np.linspace(-0.05, 1.05, 5) * side
        y = feet.imag + np.append(rng.uniform(-0.015, 0.03, 4), 0.01) * side
        soil = mix((96, 118, 52), (140, 122, 78), tone)
        edge = spline(x + 1j * y)
        draw.polygon([*pixels(edge), (1.05 * side, side), (-0.05 * side, side)], soil)
        tall = unit * 0.16  # grass
        for place, height, lean, lit in rng.uniform((0, 0.4, -0.5, -0.25), (1, 1, 0.5, 0.35), (36, 4)):
            foot = edge[int(place * (len(edge) - 1))] + 1j * tall * 0.4 + place * 3
            blade = mix(soil, (20, 40, 10), -lit) if lit < 0 else mix(soil, (210, 220, 130), lit)
            tip = foot + tall * height * (lean - 1j)
            draw.polygon(pixels(np.array([foot - tall * 0.06, tip, foot + tall * 0.06])), blade)


def paint_twig(layer: Image.Image, rng: np.random.Generator) -> None:
    """Paints a leafy twig across the transparent `layer` that goes in FRONT of the bird."""
    draw, side = ImageDraw.Draw(layer), layer.width
    angle = rng.uniform(0, 2 * np.pi)
    middle = side * (0.5 + 0.5j + rng.uniform(0.05, 0.3) * np.exp(1j * angle))
    across = np.exp(1j * (angle + np.pi / 2 + rng.uniform(-0.5, 0.5)))
    reach = np.array([-0.95, -0.3, 0.15, rng.uniform(0.3, 0.9)]) * side
    knots = middle + reach * across + 1j * side * rng.uniform(-0.04, 0.04, 4)
    _limb(draw, knots, side * np.array([0.035, 0.028, 0.022, 0.012]), mix((84, 64, 46), (112, 98, 84), rng.uniform()))
    green = mix((66, 108, 44), (136, 142, 58), rng.uniform())
    curve = spline(knots)
    for place, length, turn, lit in rng.uniform((0.3, 0.07, 0.4, 0), (1, 0.13, 1.1, 0.3), (int(rng.integers(3, 8)), 4)):
        turn *= rng.choice((-1, 1))
        along = side * length * across * np.exp(1j * turn)
        _leaf(draw, curve[int(place * (len(curve) - 1))], along, mix(green, (200, 204, 110), lit))


def develop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Applies exposure, contrast, a colour cast, a falloff of light across the frame, and sensor noise."""
    side = picture.width
    gain, contrast, warm, tint = rng.uniform((0.8, 0.85, -0.07, -0.025), (1.18, 1.12, 0.07, 0.025))
    falloff, angle, grain = rng.uniform((0, 0, 0.5), (0.14, 2 * np.pi, 4))
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    light = 1 + falloff * (np.cos(angle).astype(np.float32) * ramp + np.sin(angle).astype(np.float32) * ramp[:, None])
    cast = np.array((1 + warm, 1 + tint, 1 - warm), np.float32) * np.float32(gain * contrast)
    values = np.asarray(picture, np.float32) * cast
    values *= light[..., None]
    # Contrast turns about a fixed grey, not the picture's mean, so that it is the same whatever the bird's markings.
    values += (grain * rng.standard_normal((side, side, 1), dtype=np.float32)) + np.float32(112 * (1 - contrast))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
