"""Draws one bird: a posed body of smooth curves, the plumage and marks of its species, light, and a natural scene.

Geometry is complex numbers (x + iy). In the bird's own world the body is about one unit long, the beak points to +x
and y points UP; `Skeleton.to_pixels` maps that world to an image, in which y points down.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from birds import scenery
from birds.scenery import Colour, mix, pixels, smooth_noise, smooth_step, spline, swell, vane

PARTS = ("beak", "crown", "eye", "wing", "bar", "belly", "tail")
MARKED_PARTS = ("beak", "crown", "eye", "bar", "belly", "tail")  # those in which species of one family can differ
TEXTURE_PIXELS = 160  # plumage is computed at most this large and scaled up: soft edges look like feathers
LONG_BILL = 1.75
BAR_WIDTH = 0.075  # of the body's length: three pixels on a bird that fills a 96-pixel image
EYE = 0.36 + 0.16j  # in the head's frame
TWIG_SHARE = 0.35  # of the images have a twig in front of the bird
# The folded wing's upper and lower edge (in body radii) by the share of its length from shoulder to tip.
WING_A = np.array([0, 0.06, 0.15, 0.3, 0.45, 0.6, 0.75, 0.88, 1])
WING_UPPER = np.array([0, -0.28, -0.4, -0.45, -0.42, -0.36, -0.28, -0.2, -0.1])
WING_LOWER = np.array([0.05, 0.3, 0.5, 0.62, 0.6, 0.48, 0.3, 0.14, 0.0])
COVERTS = np.linspace(0, 1, 25)  # places across the wing, upper to lower edge, of the covert feathers' edges
COVERT_EDGE = 0.05 * np.sin(np.pi * COVERTS) + 0.022 * np.abs(np.sin(5 * np.pi * COVERTS))


class Mark(NamedTuple):
    """What one part of a species looks like, such as ("double", "white") for the bar; "plain" is without a mark."""

    kind: str = "plain"
    colour: str = ""


@dataclass(frozen=True)
class Build:
    """The proportions of a kind of bird, in units of body length unless said otherwise."""

    posture: float  # angle of the body above the horizontal, degrees
    plump: float  # radius of the body at its thickest
    head: float  # radius of the head
    neck: float
    bill: float  # length, in head radii, as are depth and curve
    depth: float  # half the bill's height at its base
    curve: float  # how far the tip of the bill bends down
    blunt: float  # higher for a rounder tip of the bill
    tail: float
    fork: float  # share by which the outer tail feathers are longer (negative: shorter)
    cock: float  # angle of the tail above the line of the back, degrees
    wing: float  # length of the folded wing
    leg: float
    crest: float = 0  # length, in head radii
    waterside: bool = False  # stands on rocks, not on branches


@dataclass(frozen=True)
class Family:
    """What the species of a family share: build, colours (keys of COLOURS), and the two parts in which they vary."""

    name: str
    build: Build
    back: str
    wing: str
    belly: str
    breast: str
    head: str
    bill: str
    legs: str
    varies: tuple[str, str]


@dataclass(frozen=True)
class Species:
    """A species: the looks of its family plus one mark for each of MARKED_PARTS."""

    name: str
    family: Family
    beak: Mark
    crown: Mark
    eye: Mark
    bar: Mark
    belly: Mark
    tail: Mark


class BirdImage(NamedTuple):
    """A picture, the tight box (x, y, width, height) round its bird, and each part's (x, y, visible), in pixels."""

    picture: Image.Image
    box: tuple[float, float, float, float]
    parts: dict[str, tuple[float, float, bool]]


class Skeleton:
    """A posed bird in its own world, whatever its marks, and its place in an image of 1 x 1.

    The body is the union of circles (`spine`, `radius`; `normal` points to the back) from rump to face, of which
    those from index `nape` are the head. `head`, `wing` and `tail` are frames (origin, axis): a point p of the frame
    is at origin + axis * p in the world.
    """

    def __init__(self, build: Build, rng: np.random.Generator) -> None:
        tilt, nod, fan, lift = np.radians(rng.uniform((-9, -16, -9, -4), (9, 20, 9, 16)))
        fill, x, y, self.foreshorten = rng.uniform((0.55, -0.08, 0.1, 0.88), (0.88, 1.08, 0.9, 1.0))
        self.sun = np.exp(1j * np.radians(rng.uniform(50, 130)))
        self.flip = int(rng.choice((-1, 1)))
        p, h, posture = build.plump, build.head, np.radians(build.posture)
        turn, face = np.exp(1j * (posture + tilt)), np.exp(1j * nod)
        trunk = np.array([-0.5 + 0.05j, -0.3 + 0.02j, -0.05, 0.17 + 0.01j, 0.34 + 0.07j]) * turn
        neck = (0.75 * h + build.neck) * np.exp(1j * min(1.08 + 0.4 * nod + 0.15 * posture, 1.48))
        head, thin = trunk[-1] + neck, h * max(0.55, 0.95 - 1.1 * build.neck)
        line = np.array([*trunk, trunk[-1] + neck * (0.5 + 0.28j * build.neck), head, head + 0.32 * h * face])
        girth = np.array([0.07, 0.62 * p, p, 0.95 * p, max(0.68 * p, thin), thin, h, 0.8 * h])
        stations = spline(np.stack([line.real, line.imag, girth], axis=1), 7)
        self.spine, self.radius = stations[:, 0] + 1j * stations[:, 1], stations[:, 2]
        along = np.gradient(self.spine)
        self.normal, self.nape = 1j * along / np.abs(along), 5 * 7 + 4
        self.head = (head, h * face)
        self.wing = ((0.28 + 0.1j) * turn, -build.wing * turn * np.exp(1j * (0.035 - lift)))
        self.tail = ((-0.42 + 0.05j) * turn, -build.tail * turn * np.exp(-1j * (np.radians(build.cock) + fan)))
        self.hip = (-0.02 - 0.75j * p) * turn
        self.feet = self.hip.real + 0.03 + 1j * (self.hip.imag - 0.25 * p - build.leg)
        ends = [head + h * face * (1 + build.bill), sum(self.wing), sum(self.tail), self.feet - 0.03j]
        outline = np.concatenate([self.spine - self.radius * (1 + 1j), self.spine + self.radius * (1 + 1j), ends])
        wide, tall = np.ptp(outline.real), np.ptp(outline.imag)
        self.scale = min(fill / wide, 0.84 / tall)
        # x is a little beyond 0 and 1 now and then: not every photograph has the whole bird.
        middle = x + self.scale * wide * (0.5 - x) + 1j * (y + self.scale * tall * (0.5 - y))
        centre = outline.real.min() + wide / 2 + 1j * (outline.imag.min() + tall / 2)
        self.shift = middle - self.scale * (self.flip * centre.real - 1j * centre.imag)

    def to_pixels(self, world: np.ndarray | complex, size: int) -> np.ndarray:
        """The places in an image of `size` x `size` pixels (x + iy, y down) of points of the bird's world."""
        return size * (self.shift + self.scale * (self.flip * np.real(world) - 1j * np.imag(world)))

    def to_world(self, pixel: np.ndarray, size: int) -> np.ndarray:
        flat = (pixel / size - self.shift) / self.scale
        return self.flip * flat.real - 1j * flat.imag


class Painter:
    """Paints one bird, without light, on a transparent and supersampled layer; places are those of the bird's world."""

    def __init__(self, species: Species, bones: Skeleton, rng: np.random.Generator, size: int) -> None:
        self.species, self.family, self.build = species, species.family, species.family.build
        self.bones, self.rng, self.size, self.individual = bones, rng, size, rng.uniform(-7, 7, 3)
        self.layer = Image.new("RGBA", [size * (2 if size > 128 else 3)] * 2)
        self.draw = ImageDraw.Draw(self.layer)

    def colour(self, name: str) -> Colour:
        """A colour of COLOURS as this individual has it."""
        return tuple(np.clip(np.add(scenery.COLOURS[name], self.individual), 0, 255).astype(int).tolist())

    def _place(self, frame: tuple[complex, complex], points: np.ndarray) -> list[tuple[float, float]]:
        return pixels(self.bones.to_pixels(frame[0] + frame[1] * points, self.layer.width))

    def polygon(self, frame: tuple[complex, complex], points: np.ndarray, fill: Colour) -> None:
        self.draw.polygon(self._place(frame, points), fill)

    def line(self, frame: tuple[complex, complex], points: np.ndarray, fill: Colour, width: float) -> None:
        thick = max(1, round(width * self.bones.scale * self.layer.width))
        self.draw.line(self._place(frame, points), fill, thick, "curve")

    def disc(self, centre: complex, radius: float, fill: Colour | int, draw: ImageDraw.ImageDraw | None = None) -> None:
        spot = complex(self.bones.to_pixels(centre, self.layer.width))
        r = radius * self.bones.scale * self.layer.width
        (draw or self.draw).ellipse((spot.real - r, spot.imag - r, spot.real + r, spot.imag + r), fill)

    def paint(self) -> np.ndarray:
        """Paints from back to front; returns the light on the bird, to be multiplied in."""
        self.tail(), self.legs(), self.beak()
        light = self.body()
        self.spots(), self.eye(), self.wing()
        return light

    def tail(self) -> None:
        mark, root = self.species.tail, self.bones.tail[0]
        for side in (-1, 1, -0.5, 0.5, 0):  # a fan of five feathers, the middle one on top
            axis = self.bones.tail[1] * (1 + self.build.fork * (side * side - 0.3)) * np.exp(0.14j * side)
            tone = mix(self.colour(self.family.wing), (20, 18, 18), 0.1 + 0.15 * abs(side))
            self.polygon((root, axis), vane(0, 1, 0.06 / abs(axis)), tone)
            if mark.kind != "plain":
                start, end = (0.78, 1) if mark.kind == "tip" else (0.52, 0.78)
                self.polygon((root, axis), vane(start, end, 0.062 / abs(axis)), self.colour(mark.colour))
            self.line((root, axis), np.array([0.2, 0.9]), mix(tone, (0, 0, 0), 0.3), 0.006)

    def legs(self) -> None:
        skin, hip = self.colour(self.family.legs), self.bones.hip
        for aside, tone in ((0.12, 0.35), (0, 0)):
            fill, foot = mix(skin, (20, 20, 20), tone), self.bones.feet + aside - 0.06
            knee = 0.5 * (hip + foot) - 0.05 * self.build.leg + aside / 2
            self.line((0, 1), np.array([hip + aside, knee, foot]), fill, 0.035)
            for toe in (0.1 - 0.015j, 0.07 - 0.035j, -0.06 - 0.02j):
                self.line((0, 1), np.array([foot, foot + toe]), fill, 0.03)

    def beak(self) -> None:
        """The bill and the crest: the head that is painted next covers the bases of both."""
        build, mark = self.build, self.species.beak
        s = np.linspace(0, 1, 12)
        length = build.bill * self.bones.foreshorten * (LONG_BILL if mark.kind == "long" else 1)
        middle = 0.8 + s * (length + 0.2) - 1j * build.curve * s**2 - 0.08j
        half = 1j * build.depth * (1 - s**build.blunt) ** (1 if build.blunt < 1.5 else 0.7)
        horn, lower = self.colour(mark.colour), (middle - 0.8 * half)[::-1]
        self.polygon(self.bones.head, np.concatenate([middle + half, lower]), horn)
        self.polygon(self.bones.head, np.concatenate([middle, lower]), mix(horn, (0, 0, 0), 0.22))
        if c := build.crest:
            tuft = np.array([0.6 + 0.7j, 0.1 + 1.1j + 0.12j * c, -0.7 + 0.9j + (0.4j - 0.35) * c, -0.75 + 0.5j, -0.8])
            name = self.species.crown.colour if self.species.crown.kind == "cap" else self.family.head
            self.polygon(self.bones.head, spline(tuft), mix(self.colour(name), (20, 18, 18), 0.1))

    def eye(self) -> None:
        ring, (origin, axis) = self.species.eye, self.bones.head
        centre, radius = origin + axis * EYE, abs(axis)
        dull = mix(self.colour(self.family.head), (128, 120, 110), 0.35)
        plain = ring.kind == "plain"
        self.disc(centre, radius * (0.27 if plain else 0.42), dull if plain else self.colour(ring.colour))
        self.disc(centre, radius * 0.22, (22, 17, 15))
        self.disc(centre + radius * (0.07 + 0.08j), radius * 0.06, (235, 238, 240))

    def spots(self) -> None:
        if self.species.belly.kind != "spots":
            return
        circle = 0.027 * np.exp(2j * np.pi * np.arange(10) / 10)
        for row, low in enumerate((-0.82, -0.58, -0.34, -0.12)):
            for station in range(7 + 2 * (row % 2), 27, 4):
                k, up = station + self.rng.integers(-1, 2), low + self.rng.uniform(-0.06, 0.06)
                place = self.bones.spine[k] + up * self.bones.radius[k] * self.bones.normal[k]
                self.polygon((place, 1), circle, self.colour(self.species.belly.colour))

    def wing_point(self, a: np.ndarray | float, v: np.ndarray | float) -> np.ndarray:
        """The point `a` of the way from shoulder to tip, `v` of the way from upper to lower edge."""
        upper, lower = np.interp(a, WING_A, WING_UPPER), np.interp(a, WING_A, WING_LOWER)
        return a + 1j * (upper + (lower - upper) * v) * self.build.plump / self.build.wing

    def wing_outline(self, end: float = 1.0) -> np.ndarray:
        a = WING_A * end
        return np.concatenate([self.wing_point(a[::-1], 1.0), self.wing_point(a, 0.0)])

    def wing(self) -> None:
        """The folded wing: flight feathers, three rows of coverts over them, and the wing bars."""
        mark, frame, base = self.species.bar, self.bones.wing, self.colour(self.family.wing)
        dark, light = mix(base, (14, 13, 15), 0.3), mix(base, (250, 245, 235), 0.22)
        self.polygon(frame, self.wing_outline(), dark)
        for v in np.linspace(0.1, 0.95, 7):  # a pale edge of each flight feather, fanning towards the tip
            a = np.linspace(0.4, 0.99 - 0.35 * v**2, 6)
            self.line(frame, self.wing_point(a, v + (1 - v) * 0.15 * a), mix(dark, light, 0.55), 0.008)
        for reach, tone in ((0.6, mix(base, dark, 0.35)), (0.42, base), (0.24, mix(base, light, 0.35))):
            edge = self.wing_point(reach + COVERT_EDGE, COVERTS)
            self.polygon(frame, np.concatenate([self.wing_outline(reach), edge]), tone)
            self.line(frame, edge, mix(tone, light, 0.5), 0.008)
        for place in {"plain": (), "single": (0.42,), "double": (0.3, 0.54)}[mark.kind]:
            front = place + COVERT_EDGE - BAR_WIDTH / self.build.wing
            bar = [self.wing_point(place + COVERT_EDGE, COVERTS), self.wing_point(front, COVERTS)[::-1]]
            self.polygon(frame, np.concatenate(bar), self.colour(mark.colour))

    def body(self) -> np.ndarray:
        """Pastes the feathered trunk and head; returns the light on them, smaller than the picture."""
        bones, n = self.bones, min(self.size, TEXTURE_PIXELS)
        grid = np.arange(n) + 0.5
        world = bones.to_world(grid + 1j * grid[:, None], n)
        nearest, offset, light = swell(world, bones.spine, bones.radius, bones.sun)
        up = (offset / bones.normal[nearest]).real  # -1 at the belly's edge, 1 at the back's
        albedo = self.plumage(nearest.astype(np.float32), up, (world - bones.head[0]) / bones.head[1])
        shadow = Image.new("L", (n, n))  # of the wing on the flank
        drop = bones.to_pixels(bones.wing[0] + bones.wing[1] * self.wing_outline() - 0.05j, n)
        ImageDraw.Draw(shadow).polygon(pixels(drop), 110)
        albedo *= 1 - np.asarray(shadow.filter(ImageFilter.GaussianBlur(n * 0.012)), np.float32)[..., None] / 255
        texture = Image.fromarray(np.clip(albedo, 0, 255).astype(np.uint8))
        stencil = Image.new("L", self.layer.size)
        for centre, radius in zip(bones.spine.tolist(), bones.radius.tolist(), strict=True):
            self.disc(centre, radius, 255, ImageDraw.Draw(stencil))
        self.layer.paste(texture.resize(self.layer.size, Image.Resampling.BILINEAR), mask=stencil)
        return light

    def plumage(self, along: np.ndarray, up: np.ndarray, head: np.ndarray) -> np.ndarray:
        """Feather colours by place: `along` the spine, `up` from belly to back, and in the head's own frame."""
        family, nape, belly, crown = self.family, self.bones.nape, self.species.belly, self.species.crown
        albedo = np.zeros((*up.shape, 3), np.float32) + np.array(self.colour(family.belly), np.float32)

        def tint(name: str, share: np.ndarray) -> None:
            albedo[:] += share * (np.array(self.colour(name), np.float32) - albedo)

        if belly.kind == "patch":
            share = smooth_step(-up, 0.2, 0.45) * smooth_step(along, 3, 7) * (1 - smooth_step(along, 19, 23))
            tint(belly.colour, share)
        tint(family.breast, smooth_step(along, 19, 25))
        tint(family.back, smooth_step(up, 0.05, 0.4))
        on_head = smooth_step(along, nape - 5, nape + 1)
        tint(family.head, on_head)
        if crown.kind != "plain":
            top = 1 if crown.kind == "cap" else 1 - smooth_step(head.imag, 0.7, 0.8)
            tint(crown.colour, on_head * smooth_step(head.imag, 0.3, 0.45) * top)
        down = smooth_noise(self.rng, (30, 14), (240, 64))  # feathers: coarser along the body than across it
        rows, columns = np.clip(along * 4.6, 0, 239).astype(np.intp), np.clip(32 + 30 * up, 0, 63).astype(np.intp)
        return albedo * (1 + 0.055 * down[rows, columns][..., None])

    def locations(self) -> dict[str, complex]:
        """Every part's place in the bird's world."""
        bones, (head, axis), (shoulder, wing), belly = self.bones, self.bones.head, self.bones.wing, 13
        return {
            "beak": head + axis * (1 + 0.5 * self.build.bill - 0.1j),
            "crown": head + axis * (-0.05 + 0.7j),
            "eye": head + axis * EYE,
            "wing": shoulder + wing * self.wing_point(0.66, 0.45),
            "bar": shoulder + wing * self.wing_point(0.42, 0.5),
            "belly": bones.spine[belly] - 0.68 * bones.radius[belly] * bones.normal[belly],
            "tail": bones.tail[0] + 0.7 * bones.tail[1],
        }


def draw_bird(species: Species, rng: np.random.Generator, size: int) -> BirdImage:
    """Draws one image of `size` x `size` pixels of a species.

    Pose, individual, scene and light all come from `rng`, each from a stream of its own: two species of a family
    drawn with equal generators differ in their marks and in nothing else.
    """
    bones = Skeleton(species.family.build, rng)
    individual, scene, twig = (np.random.default_rng(seed) for seed in rng.integers(2**63, size=3))
    painter = Painter(species, bones, individual, size)
    light, side = Image.fromarray(painter.paint()), painter.layer.width

    # Backdrop, perch, the bird in its light, and a twig.
    habitat = str(scene.choice(list(scenery.BACKDROPS)))
    picture = scenery.paint_backdrop(scene, habitat, size)
    perch = "ground" if habitat == "meadow" else "rock" if species.family.build.waterside else "branch"
    behind, front = (Image.new("RGBA", (side, side)) for _ in range(2))
    scenery.paint_perch(behind, scene, perch, complex(bones.to_pixels(bones.feet, side)), bones.scale * side)
    if twig.uniform() < TWIG_SHARE:
        scenery.paint_twig(front, twig)
    behind, bird, front = (layer.reduce(side // size) for layer in (behind, painter.layer, front))
    lit = np.array(bird, np.float32)
    lit[..., :3] *= np.asarray(light.resize((size, size), Image.Resampling.BILINEAR))[..., None]
    bird = Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))
    for layer in (behind, bird, front):
        picture.paste(layer, mask=layer.getchannel("A"))

    alpha, covered = np.asarray(bird.getchannel("A")) > 90, np.asarray(front.getchannel("A")) > 127
    columns, rows = np.flatnonzero(alpha.any(0)), np.flatnonzero(alpha.any(1))
    box = (float(columns[0]), float(rows[0]), float(np.ptp(columns) + 1), float(np.ptp(rows) + 1))
    parts = {}
    for part, place in painter.locations().items():
        spot = complex(bones.to_pixels(place, size))
        visible = 0 <= spot.real < size and 0 <= spot.imag < size and not covered[int(spot.imag), int(spot.real)]
        parts[part] = (spot.real, spot.imag, True) if visible else (0.0, 0.0, False)
    return BirdImage(scenery.develop(picture, scene), box, parts)
