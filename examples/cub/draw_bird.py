"""Draws one bird: a posed body of smooth curves, plumage with the species' marks, light, and a natural scene.

Geometry is complex numbers (x + iy). In the bird's own world the body is about one unit long, the beak points to +x
and y points UP; `View` maps that world to pixels, where y points down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scenery import Colour, develop, mix, paint_backdrop, paint_perch, paint_twig, pixels, smooth_noise, spline

PARTS = ("beak", "crown", "eye", "wing", "bar", "belly", "tail")
MARKED_PARTS = ("beak", "crown", "eye", "bar", "belly", "tail")  # those in which species of one family can differ
TWIG_SHARE = 0.35  # of the images have a twig in front of the bird
LONG_BILL = 1.75
BAR_WIDTH = 0.07
EYE = 0.36 + 0.16j  # in the head's frame
WING_A = np.array([0, 0.06, 0.15, 0.3, 0.45, 0.6, 0.75, 0.88, 1])
WING_UPPER = np.array([0, -0.28, -0.4, -0.45, -0.42, -0.36, -0.28, -0.2, -0.1])
WING_LOWER = np.array([0.05, 0.3, 0.5, 0.62, 0.6, 0.48, 0.3, 0.14, 0.0])
TEXTURE_PIXELS = 160  # plumage is computed at most this large and scaled up: soft edges look like feathers

COLOURS: dict[str, Colour] = {
    "white": (240, 239, 234), "cream": (232, 220, 190), "buff": (206, 172, 124), "yellow": (236, 200, 48),
    "orange": (230, 126, 34), "red": (200, 40, 36), "rufous": (158, 82, 42), "brown": (112, 82, 58),
    "umber": (70, 52, 42), "black": (34, 33, 38), "slate": (78, 86, 98), "grey": (146, 150, 154),
    "silver": (196, 200, 204), "blue": (58, 104, 184), "navy": (38, 52, 104), "teal": (38, 124, 130),
    "green": (84, 128, 56), "olive": (116, 112, 62), "pink": (222, 146, 150), "violet": (106, 66, 130),
}  # fmt: skip


@dataclass(frozen=True)
class Build:
    """The proportions of a kind of bird, in units of body length unless said otherwise.

    Attributes:
        posture: angle of the body above the horizontal, degrees.
        plump: radius of the body at its thickest.
        head: radius of the head.
        neck: length of the neck.
        bill: length of the bill in head radii; `depth` is half its height at the base, `curve` how far the tip bends
            down (negative: up), both in head radii, and `blunt` is higher for a rounder tip.
        tail: length; `fork` makes the outer feathers longer (negative: shorter) by that share; `cock` is the angle
            of the tail above the line of the back, degrees.
        wing: length of the folded wing.
        leg: length of the visible leg.
        crest: length of the crest in head radii.
        waterside: lives by water (perches on rocks, not on branches).
    """

    posture: float
    plump: float
    head: float
    neck: float
    bill: float
    depth: float
    curve: float
    blunt: float
    tail: float
    fork: float
    cock: float
    wing: float
    leg: float
    crest: float = 0
    waterside: bool = False


BUILDS = {
    "songbird": Build(24, 0.25, 0.18, 0.03, 0.75, 0.40, 0.05, 1.1, 0.50, 0.15, 0, 0.72, 0.20),
    "finch": Build(28, 0.27, 0.20, 0.02, 0.80, 0.62, 0.15, 1.3, 0.42, 0.35, 0, 0.68, 0.16),
    "warbler": Build(18, 0.22, 0.17, 0.02, 0.85, 0.24, 0.00, 1.2, 0.45, 0.00, 5, 0.68, 0.24),
    "crested": Build(34, 0.24, 0.18, 0.03, 0.85, 0.40, 0.10, 1.3, 0.62, -0.10, 0, 0.68, 0.20, crest=1.5),
    "wren": Build(16, 0.27, 0.19, 0.00, 1.10, 0.22, 0.28, 1.2, 0.34, -0.20, 62, 0.56, 0.24),
    "tern": Build(6, 0.19, 0.16, 0.04, 1.55, 0.28, 0.12, 1.2, 0.62, 0.75, 0, 1.02, 0.10, waterside=True),
    "gull": Build(10, 0.24, 0.16, 0.08, 1.20, 0.32, 0.20, 2.4, 0.34, 0.00, 0, 0.98, 0.24, waterside=True),
    "swallow": Build(30, 0.19, 0.17, 0.00, 0.45, 0.28, 0.05, 1.1, 0.62, 1.00, 0, 0.98, 0.07),
    "heron": Build(28, 0.20, 0.12, 0.62, 3.00, 0.34, 0.00, 1.2, 0.22, 0.00, 0, 0.76, 0.75, waterside=True),
    "duck": Build(4, 0.29, 0.18, 0.16, 1.30, 0.36, 0.22, 4.5, 0.24, -0.40, 18, 0.66, 0.12, waterside=True),
    "plover": Build(12, 0.25, 0.19, 0.02, 0.80, 0.26, 0.05, 1.4, 0.28, -0.20, 0, 0.74, 0.46, waterside=True),
    "curlew": Build(14, 0.23, 0.14, 0.20, 3.20, 0.24, 1.10, 1.6, 0.26, -0.20, 0, 0.72, 0.58, waterside=True),
    "hawk": Build(54, 0.24, 0.18, 0.02, 0.80, 0.46, 0.55, 2.2, 0.60, 0.05, -6, 0.84, 0.18),
    "woodpecker": Build(58, 0.20, 0.18, 0.06, 1.50, 0.34, 0.00, 1.2, 0.46, -0.60, -6, 0.70, 0.12),
    "kingfisher": Build(44, 0.26, 0.25, 0.00, 2.00, 0.32, 0.00, 1.2, 0.24, -0.10, 0, 0.62, 0.07, crest=0.6),
    "crow": Build(26, 0.25, 0.18, 0.06, 1.35, 0.46, 0.28, 1.9, 0.52, -0.20, 0, 0.82, 0.24),
    "dove": Build(18, 0.27, 0.14, 0.08, 0.80, 0.24, 0.15, 1.8, 0.66, -0.35, 0, 0.72, 0.12),
    "parrot": Build(56, 0.23, 0.20, 0.02, 0.75, 0.58, 0.75, 2.6, 0.88, -0.65, -6, 0.74, 0.10),
    "quail": Build(12, 0.31, 0.17, 0.04, 0.65, 0.38, 0.20, 1.6, 0.16, -0.20, -16, 0.58, 0.22, crest=0.8),
}


class Mark(NamedTuple):
    """What one part of a species looks like, such as ("double", "white") for the bar; "plain" is without a mark."""

    kind: str = "plain"
    colour: str = ""


@dataclass(frozen=True)
class Family:
    """What all species of a family share: build, colours (keys of COLOURS), and the parts in which they vary."""

    name: str
    build: Build
    back: str
    wing: str
    belly: str
    breast: str
    head: str
    bill: str
    legs: str
    varies: str
    also: str


@dataclass(frozen=True)
class Species:
    """A species: its family's looks plus one mark for each of MARKED_PARTS."""

    name: str
    family: Family
    beak: Mark
    crown: Mark = Mark()
    eye: Mark = Mark()
    bar: Mark = Mark()
    belly: Mark = Mark()
    tail: Mark = Mark()


def differing_parts(a: Species, b: Species) -> frozenset[str]:
    """The names of the parts in which two species of one family differ.

    Raises:
        ValueError: if the two are of different families, which differ all over.
    """
    if a.family.name != b.family.name:
        raise ValueError(f"{a.name} and {b.name} are of different families: they differ in build and colours as well")
    return frozenset(part for part in MARKED_PARTS if getattr(a, part) != getattr(b, part))


class PartLocation(NamedTuple):
    """Where a part is in the image, in pixels; (0, 0, False) if it is covered or outside."""

    x: float
    y: float
    visible: bool


@dataclass(frozen=True)
class BirdImage:
    """A drawn picture with what CUB says of one: the tight box (x, y, width, height) and each part's place."""

    picture: Image.Image
    box: tuple[float, float, float, float]
    parts: dict[str, PartLocation]


class Pose(NamedTuple):
    """What varies from one image of a bird to the next; angles in degrees."""

    tilt: float
    nod: float
    tail: float
    wing: float
    bill: float  # apparent share of the bill's length: less as the head turns to or from the viewer
    fill: float  # share of the image's width
    x: float
    y: float
    light: float
    mirror: bool

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Pose:
        low = (-9, -16, -9, -4, 0.88, 0.5, 0, 0, 50)
        high = (9, 20, 9, 16, 1.0, 0.86, 1, 1, 130)
        return cls(*rng.uniform(low, high).tolist(), mirror=bool(rng.integers(2)))


class Skeleton:
    """Where everything of a posed bird is in its own world, whatever the species' marks.

    Attributes:
        spine, radius, normal: the body is the union of circles along a line from rump to face; `normal` points dorsally.
        nape: index along the spine from which it is the head.
        head, wing, tail: (origin, axis) of each part's own frame, a point p of which is at origin + axis * p.
        hip, feet: both ends of the legs.
    """

    def __init__(self, build: Build, pose: Pose) -> None:
        turn = np.exp(1j * np.radians(build.posture + pose.tilt))
        p, h = build.plump, build.head
        face = np.exp(1j * np.radians(pose.nod))
        trunk = np.array([-0.5 + 0.05j, -0.3 + 0.02j, -0.05, 0.17 + 0.01j, 0.34 + 0.07j]) * turn
        neck = (0.75 * h + build.neck) * np.exp(1j * np.radians(min(62 + 0.4 * pose.nod + 0.15 * build.posture, 85)))
        crook = neck * (0.5 + 0.28j * build.neck)
        head = trunk[-1] + neck
        line = np.array([*trunk, trunk[-1] + crook, head, head + 0.32 * h * face])
        thin = h * max(0.55, 0.95 - 1.1 * build.neck)
        girth = np.array([0.07, 0.62 * p, p, 0.95 * p, max(0.68 * p, thin), thin, h, 0.8 * h])
        stations = spline(np.stack([line.real, line.imag, girth], axis=1), 7)
        self.spine = stations[:, 0] + 1j * stations[:, 1]
        self.radius = stations[:, 2]
        along = np.gradient(self.spine)
        self.normal = 1j * along / np.abs(along)
        self.nape = 5 * 7 + 4
        self.head = (head, h * face)
        self.wing = ((0.28 + 0.1j) * turn, -build.wing * turn * np.exp(1j * np.radians(2 - pose.wing)))
        self.tail = ((-0.42 + 0.05j) * turn, -build.tail * turn * np.exp(-1j * np.radians(build.cock + pose.tail)))
        self.hip = (-0.02 - 0.75j * p) * turn
        self.feet = self.hip.real + 0.03 + 1j * (self.hip.imag - 0.25 * p - build.leg)
        ends = [self.head[0] + self.head[1] * (1 + build.bill), sum(self.wing), sum(self.tail), self.feet - 0.03j]
        low, high = self.spine - self.radius * (1 + 1j), self.spine + self.radius * (1 + 1j)
        outline = np.concatenate([low, high, ends])
        self.corner = outline.real.min() + 1j * outline.imag.min()
        self.extent = outline.real.max() + 1j * outline.imag.max() - self.corner


class View:
    """Maps the bird's world to the pixels of a picture of `size` x `size`."""

    def __init__(self, bones: Skeleton, pose: Pose, size: float) -> None:
        wide, tall = bones.extent.real, bones.extent.imag
        self.scale = size * min(pose.fill / wide, 0.84 / tall)
        free = size * (1 + 1j) - self.scale * bones.extent
        # A little over the edge now and then: not every photograph has the whole bird.
        corner = free.real * (1.16 * pose.x - 0.08) + 1j * free.imag * (0.1 + 0.8 * pose.y)
        self.flip = -1 if pose.mirror else 1
        left = bones.corner.real if self.flip == 1 else -bones.corner.real - wide
        self.shift = corner + self.scale * (-left + 1j * (bones.corner.imag + tall))

    def __call__(self, world: np.ndarray | complex) -> np.ndarray:
        return self.shift + self.scale * (self.flip * np.real(world) - 1j * np.imag(world))

    def inverse(self, pixel: np.ndarray) -> np.ndarray:
        flat = (pixel - self.shift) / self.scale
        return self.flip * flat.real - 1j * flat.imag


def step(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, smooth between; with a last axis for colours."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t))[..., None]


class Painter:
    """Paints one bird's albedo on a transparent, supersampled layer."""

    def __init__(self, species: Species, bones: Skeleton, pose: Pose, rng: np.random.Generator, size: int) -> None:
        self.species, self.bones, self.pose, self.rng, self.size = species, bones, pose, rng, size
        self.build = species.family.build
        zoom = 2 if size > 128 else 3
        self.view = View(bones, pose, size * zoom)
        self.layer = Image.new("RGBA", (size * zoom,) * 2)
        self.draw = ImageDraw.Draw(self.layer)
        self.jitter = rng.uniform(-7, 7, 3)

    def colour(self, name: str) -> Colour:
        return tuple(int(np.clip(v + j, 0, 255)) for v, j in zip(COLOURS[name], self.jitter, strict=True))

    def paint(self) -> np.ndarray:
        """Paints the whole bird from back to front; returns the light on it, to be multiplied in."""
        self.tail()
        self.legs()
        self.bill()
        if self.build.crest:
            self.crest()
        light = self.body()
        self.belly_marks()
        self.eye()
        self.wing()
        return light

    def polygon(self, frame: tuple[complex, complex], points: np.ndarray, fill: Colour) -> None:
        origin, axis = frame
        self.draw.polygon(pixels(self.view(origin + axis * points)), fill)

    def line(self, frame: tuple[complex, complex], points: np.ndarray, fill: Colour, width: float) -> None:
        origin, axis = frame
        self.draw.line(pixels(self.view(origin + axis * points)), fill, max(1, round(width * self.view.scale)), "curve")

    def disc(self, centre: complex, radius: float, fill: Colour) -> None:
        (x, y), r = (centre.real, centre.imag), radius * self.view.scale
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill)

    def tail(self) -> None:
        """A fan of five feathers, the middle one on top, with the tip or band of the species."""
        mark, root = self.species.tail, self.bones.tail[0]
        for side in (-1, 1, -0.5, 0.5, 0):
            axis = self.bones.tail[1] * (1 + self.build.fork * (side * side - 0.3)) * np.exp(0.14j * side)
            tone = mix(self.colour(self.species.family.wing), (20, 18, 18), 0.1 + 0.15 * abs(side))
            self.polygon((root, axis), vane(0, 1, 0.06 / abs(axis)), tone)
            if mark.kind != "plain":
                start, end = (0.78, 1) if mark.kind == "tip" else (0.52, 0.78)
                self.polygon((root, axis), vane(start, end, 0.062 / abs(axis)), self.colour(mark.colour))
            self.line((root, axis), np.array([0.2, 0.9]), mix(tone, (0, 0, 0), 0.3), 0.006)

    def legs(self) -> None:
        skin = self.colour(self.species.family.legs)
        hip, feet = self.bones.hip, self.bones.feet
        for step_aside, tone in ((0.12, 0.35), (0, 0)):
            fill = mix(skin, (20, 20, 20), tone)
            foot = feet + step_aside - 0.06
            knee = 0.5 * (hip + foot) - 0.05 * self.build.leg + step_aside / 2
            self.line((0, 1), np.array([hip + step_aside, knee, foot]), fill, 0.035)
            for toe in (0.1 - 0.015j, 0.07 - 0.035j, -0.06 - 0.02j):
                self.line((0, 1), np.array([foot, foot + toe]), fill, 0.03)

    def bill(self) -> None:
        build, mark = self.build, self.species.beak
        length = build.bill * self.pose.bill * (LONG_BILL if mark.kind == "long" else 1)
        s = np.linspace(0, 1, 12)
        line = 0.8 + s * (length + 0.2) - 1j * build.curve * s**2 - 0.08j
        half = 1j * build.depth * (1 - s**build.blunt) ** (1 if build.blunt < 1.5 else 0.7)
        horn = self.colour(mark.colour)
        self.polygon(self.bones.head, np.concatenate([line + half, (line - 0.8 * half)[::-1]]), horn)
        self.polygon(self.bones.head, np.concatenate([line, (line - 0.8 * half)[::-1]]), mix(horn, (0, 0, 0), 0.22))

    def crest(self) -> None:
        mark, c = self.species.crown, self.build.crest
        name = self.species.family.head if mark.kind == "plain" else mark.colour
        knots = np.array([0.6 + 0.7j, 0.1 + 1.1j + 0.12j * c, -0.7 - 0.35 * c + (0.9 + 0.4 * c) * 1j, -0.75 + 0.5j, -0.8])
        self.polygon(self.bones.head, spline(knots), mix(self.colour(name), (20, 18, 18), 0.1))

    def eye(self) -> None:
        mark, (origin, axis) = self.species.eye, self.bones.head
        centre, radius = self.view(origin + axis * EYE), abs(axis)
        dull = mix(self.colour(self.species.family.head), (128, 120, 110), 0.35)
        ring = dull if mark.kind == "plain" else self.colour(mark.colour)
        self.disc(centre, radius * (0.27 if mark.kind == "plain" else 0.42), ring)
        self.disc(centre, 0.22 * radius, (22, 17, 15))
        self.disc(centre + (0.07 - 0.08j) * radius * self.view.scale, 0.06 * radius, (235, 238, 240))

    def belly_marks(self) -> None:
        mark = self.species.belly
        if mark.kind not in ("spots", "streaks"):
            return
        shape = np.exp(2j * np.pi * np.arange(10) / 10)
        shape = 0.034 * shape if mark.kind == "spots" else 0.062 * shape.real + 0.02j * shape.imag
        for row, low in enumerate((-0.82, -0.58, -0.34, -0.12)):
            for k in range(9 + 2 * (row % 2), 36, 5):
                k_, u = k + self.rng.integers(-1, 2), low + self.rng.uniform(-0.06, 0.06)
                normal = self.bones.normal[k_]
                centre = self.bones.spine[k_] + u * self.bones.radius[k_] * normal
                self.polygon((centre, -1j * normal), shape, self.colour(mark.colour))

    def wing(self) -> None:
        """The folded wing: flight feathers, two rows of coverts over them, and the wing bars."""
        mark, frame = self.species.bar, self.bones.wing
        base = self.colour(self.species.family.wing)
        dark, light = mix(base, (14, 13, 15), 0.3), mix(base, (250, 245, 235), 0.22)
        self.polygon(frame, self.wing_outline(), dark)
        for v in np.linspace(0.1, 0.95, 7):  # flight feathers: a pale edge each, fanning towards the tip
            a = np.linspace(0.4, 0.99 - 0.35 * v**2, 6)
            self.line(frame, self.wing_point(a, v + (1 - v) * 0.15 * a), mix(dark, light, 0.55), 0.008)
        for reach, tone in ((0.6, mix(base, dark, 0.35)), (0.42, base), (0.24, mix(base, light, 0.35))):
            v = np.linspace(0, 1, 25)
            edge = self.wing_point(reach + 0.05 * np.sin(np.pi * v) + 0.022 * np.abs(np.sin(5 * np.pi * v)), v)
            front = self.wing_point(np.linspace(0, reach, 8), 0.0)
            under = self.wing_point(np.linspace(reach, 0, 8), 1.0)
            self.polygon(frame, np.concatenate([front, edge, under]), tone)
            self.line(frame, edge, mix(tone, light, 0.5), 0.008)
        for place in {"plain": (), "single": (0.42,), "double": (0.3, 0.54)}[mark.kind]:
            v = np.linspace(0.02, 0.98, 25)
            edge = place + 0.05 * np.sin(np.pi * v) + 0.022 * np.abs(np.sin(5 * np.pi * v))
            width = BAR_WIDTH / self.build.wing
            bar = np.concatenate([self.wing_point(edge, v), self.wing_point(edge - width, v)[::-1]])
            self.polygon(frame, bar, self.colour(mark.colour))

    def wing_point(self, a: np.ndarray | float, v: np.ndarray | float) -> np.ndarray:
        """The point `a` of the way from shoulder to tip and `v` of the way from upper to lower edge, in wing's frame."""
        thick = self.build.plump / self.build.wing
        upper = np.interp(a, WING_A, WING_UPPER) * thick
        lower = np.interp(a, WING_A, WING_LOWER) * thick
        return a + 1j * (upper + (lower - upper) * v)

    def wing_outline(self) -> np.ndarray:
        return np.concatenate([self.wing_point(WING_A, 0.0), self.wing_point(WING_A[::-1], 1.0)])

    def body(self) -> np.ndarray:
        """Pastes the feathered trunk and head; returns the light on them, smaller than the picture."""
        bones, family, n = self.bones, self.species.family, min(self.size, TEXTURE_PIXELS)
        grid = (np.arange(n) + 0.5) * (self.layer.width / n)
        world = self.view.inverse(grid + 1j * grid[:, None])
        x, y = np.ascontiguousarray(world.real, np.float32), np.ascontiguousarray(world.imag, np.float32)
        best, nearest = np.full((n, n), -np.inf, np.float32), np.zeros((n, n), np.intp)
        for k, (c, r) in enumerate(zip(bones.spine.tolist(), bones.radius.tolist(), strict=True)):
            # Height over the picture plane, squared, of a ball round this point; outside, how near the ball is.
            height = r * r - (x[0] - c.real) ** 2 - ((y[:, :1] - c.imag) ** 2)
            nearest[height > best] = k
            np.maximum(best, height, out=best)
        offset = (world - bones.spine[nearest]) / bones.radius[nearest]
        up = (offset / bones.normal[nearest]).real  # -1 at the belly's edge, 1 at the back's
        albedo = self.plumage(nearest.astype(np.float32), up, (world - bones.head[0]) / bones.head[1])
        shadow = Image.new("L", (n, n))
        drop = self.view(bones.wing[0] + bones.wing[1] * self.wing_outline() - 0.05j) * (n / self.layer.width)
        ImageDraw.Draw(shadow).polygon(pixels(drop), 110)
        albedo *= 1 - np.asarray(shadow.filter(ImageFilter.GaussianBlur(n * 0.012)), np.float32)[..., None] / 255
        texture = Image.fromarray(np.clip(albedo, 0, 255).astype(np.uint8))
        mask = Image.new("L", self.layer.size)
        stencil = ImageDraw.Draw(mask)
        for c, r in zip(self.view(bones.spine).tolist(), (bones.radius * self.view.scale).tolist(), strict=True):
            stencil.ellipse((c.real - r, c.imag - r, c.real + r, c.imag + r), 255)
        self.layer.paste(texture.resize(self.layer.size, Image.Resampling.BICUBIC), mask=mask)
        sun = np.exp(1j * np.radians(self.pose.light))
        facing = 0.75 * (offset * np.conj(sun)).real + 0.66 * np.sqrt(np.clip(1 - np.abs(offset) ** 2, 0, 1))
        return np.where(best > 0, 0.6 + 0.5 * np.clip(facing, -0.3, 1), 0.92).astype(np.float32)

    def plumage(self, along: np.ndarray, up: np.ndarray, head: np.ndarray) -> np.ndarray:
        """Feather colours by place: `along` the spine, `up` from belly to back, and in the `head`'s own frame."""
        family, nape = self.species.family, self.bones.nape

        def blend(under: np.ndarray, name: str, share: np.ndarray) -> np.ndarray:
            return under + share * (np.array(self.colour(name), np.float32) - under)

        belly, crown = self.species.belly, self.species.crown
        albedo = blend(np.zeros((*up.shape, 3), np.float32), family.belly, 1)
        if belly.kind == "patch":
            albedo = blend(albedo, belly.colour, step(-up, 0.2, 0.45) * step(along, 3, 7) * (1 - step(along, 19, 23)))
        albedo = blend(albedo, family.breast, step(along, 19, 25))
        albedo = blend(albedo, family.back, step(up, 0.05, 0.4))
        on_head = step(along, nape - 5, nape + 1)
        albedo = blend(albedo, family.head, on_head)
        if crown.kind == "cap":
            albedo = blend(albedo, crown.colour, on_head * step(head.imag, 0.3, 0.45))
        elif crown.kind == "stripe":
            albedo = blend(albedo, crown.colour, on_head * step(head.imag, 0.36, 0.46) * step(-head.imag, -0.8, -0.7))
        down = smooth_noise(self.rng, (30, 14), (240, 64))  # feathers are longer than wide: coarser along than across
        rows = np.clip(along * 4.6, 0, 239).astype(np.intp)
        columns = np.clip(32 + 30 * up, 0, 63).astype(np.intp)
        return albedo * (1 + 0.055 * down[rows, columns][..., None])

    def locations(self) -> dict[str, complex]:
        """Every part's place in the bird's world."""
        head, axis = self.bones.head
        root, feather = self.bones.tail
        shoulder, wing = self.bones.wing
        k = 13
        points = {
            "beak": head + axis * (1 + 0.5 * self.build.bill - 0.1j),
            "crown": head + axis * (-0.05 + 0.7j),
            "eye": head + axis * EYE,
            "wing": shoulder + wing * self.wing_point(0.66, 0.45),
            "bar": shoulder + wing * self.wing_point(0.42, 0.5),
            "belly": self.bones.spine[k] - 0.68 * self.bones.radius[k] * self.bones.normal[k],
            "tail": root + 0.7 * feather,
        }
        return {part: complex(points[part]) for part in PARTS}


def vane(start: float, end: float, width: float) -> np.ndarray:
    """The outline of a feather of length 1 between the shares `start` and `end` of its length."""
    s = np.linspace(start, end, 9)
    half = 1j * width * (0.6 + 0.4 * np.minimum(s / 0.4, 1)) * np.sqrt(1 - np.clip((s - 0.86) / 0.14, 0, 1) ** 2)
    return np.concatenate([s + half, (s - half)[::-1]])


def draw_bird(species: Species, rng: np.random.Generator, size: int) -> BirdImage:
    """Draws one image of a species.

    Everything random is drawn in the same order for every species, so that two species of a family drawn with equal
    generators differ in their marks and in nothing else.

    Args:
        species: what to draw.
        rng: source of pose, individual, scene and light.
        size: width and height of the picture in pixels.

    Returns:
        The picture with the bird's box and parts in pixels.
    """
    pose = Pose.sample(rng)
    plumage_rng, scene_rng, twig_rng = (np.random.default_rng(seed) for seed in rng.integers(2**63, size=3))
    build = species.family.build
    bones = Skeleton(build, pose)
    painter = Painter(species, bones, pose, plumage_rng, size)
    shade = painter.paint()
    zoom = painter.layer.width // size
    bird = painter.layer.reduce(zoom)
    lit = np.asarray(bird, np.float32).copy()
    lit[..., :3] *= np.asarray(Image.fromarray(shade).resize((size, size), Image.Resampling.BILINEAR))[..., None]
    bird = Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))

    habitat = str(scene_rng.choice(("sky", "foliage", "water", "meadow")))
    picture = paint_backdrop(scene_rng, habitat, size)
    perch = "ground" if habitat == "meadow" else "rock" if build.waterside else "branch"
    view = View(bones, pose, size)
    paint_perch(picture, scene_rng, perch, complex(view(bones.feet)), view.scale)
    picture.paste(bird, mask=bird.getchannel("A"))
    cover = np.zeros((size, size), np.uint8)
    if twig_rng.uniform() < TWIG_SHARE:
        twig = Image.new("RGBA", painter.layer.size)
        paint_twig(twig, twig_rng)
        twig = twig.reduce(zoom)
        picture.paste(twig, mask=twig.getchannel("A"))
        cover = np.asarray(twig.getchannel("A"))
    left, top, right, bottom = bird.getchannel("A").point(lambda a: 255 * (a > 90)).getbbox()
    parts = {part: _locate(complex(view(z)), cover) for part, z in painter.locations().items()}
    return BirdImage(develop(picture, scene_rng), (left, top, right - left, bottom - top), parts)


def _locate(point: complex, cover: np.ndarray) -> PartLocation:
    side = len(cover)
    if not (0 <= point.real < side and 0 <= point.imag < side) or cover[int(point.imag), int(point.real)] > 127:
        return PartLocation(0.0, 0.0, False)
    return PartLocation(point.real, point.imag, True)
