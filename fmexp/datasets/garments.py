"""Drawn garments in the manner of Fashion-MNIST, for runs and tests that need no network and no disk.

The ten classes are Fashion-MNIST's, in its order, but every image is a drawing, not a photograph: a silhouette
of a few simple parts with random proportions, cloth, position and grain. Accuracy on these images tells that a
training run works; it tells nothing about photographs of clothing.

All images of a batch are drawn at once. Coordinates run from -1 (left, top) to 1 (right, bottom). A part is an
array of depths: how far inside the part a pixel lies, negative outside. What several parts share is therefore
the minimum of their depths, and painting turns a depth into an edge that is one pixel soft.

Pixels come from + - * /, floor, sqrt and integer-based random numbers only: every processor rounds those alike,
which does not hold for sin, exp or a sum over many pixels.
"""

from functools import reduce
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Floats: TypeAlias = NDArray[np.floating[Any]]  # float32, [images, rows, columns] or one an image, [images, 1, 1]
_Number: TypeAlias = float | _Floats
_Point: TypeAlias = tuple[_Number, _Number]

_PIXELS_AT_ONCE = 65536  # so that the arrays of a batch stay in the processor's cache


def draw(count: int, seed: int, size: int = 28) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw `count` random garments; the same arguments give the same arrays in every process.

    Args:
        count: number of images, at least 1.
        seed: seed of the only generator used, at least 0; NumPy's global one is left alone.
        size: height and width of an image in pixels, at least 8.

    Returns:
        images, uint8 [count, 1, size, size], from 0 (black, the background) to 255 (white), and
        labels, int64 [count], 0 to 9 as in Fashion-MNIST, in random order, each as often as any other or once more.

    Raises:
        ValueError: count below 1, seed below 0 or size below 8; the message names the value.
    """
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("size", size, 8)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(_GARMENTS))
    images = np.empty((count, 1, size, size), dtype=np.uint8)
    batch = max(1, _PIXELS_AT_ONCE // size**2)
    for label, garment in enumerate(_GARMENTS):
        places = np.flatnonzero(labels == label)
        for start in range(0, len(places), batch):
            chosen = places[start : start + batch]
            canvas = _Canvas(rng, len(chosen), size)
            garment(canvas)
            images[chosen, 0] = canvas.finish()
    return images, labels


class _Canvas:
    """A batch of images being painted: their coordinates, their random choices and their shades of grey."""

    def __init__(self, rng: np.random.Generator, images: int, size: int) -> None:
        self.rng, self.images = rng, images
        scale = self.between(0.88, 1.04)
        half = self.between(-0.045, 0.045)  # the tangent of half the tilt gives its sine and cosine by division
        cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
        grid = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1) / scale
        right, down = grid - self.between(-0.08, 0.08), grid.reshape(images, size, 1) - self.between(-0.08, 0.08)
        self.x: _Floats = cosine * right + sine * down
        self.y: _Floats = cosine * down - sine * right
        self.side: _Floats = np.abs(self.x)  # in place of x for what is the same on the left and the right
        self.pixels = size / 2 * scale  # in a unit of depth
        self.grey: _Floats = np.zeros((images, size, size), dtype=np.float32)

    def between(self, low: float, high: float) -> _Floats:
        """A random number for each image."""
        return low + (high - low) * self.rng.random((self.images, 1, 1), dtype=np.float32)

    def either(self, chance: float, first: _Number, second: _Number = 0.0) -> _Floats:
        """For each image `first` with this chance, else `second`."""
        return np.where(self.between(0, 1) < chance, np.float32(first), np.float32(second))

    def box(self, x: _Floats, middle: _Point, half_width: _Number, half_height: _Number) -> _Floats:
        """The depth in an upright rectangle; x is self.x or self.side."""
        return _shared(half_width - np.abs(x - middle[0]), half_height - np.abs(self.y - middle[1]))

    def bar(self, x: _Floats, start: _Point, end: _Point, width: _Number, end_width: _Number) -> _Floats:
        """The depth in a straight strip of changing width; x is self.x or self.side."""
        across, along = end[0] - start[0], end[1] - start[1]
        length = np.sqrt(np.float32(across * across + along * along))
        across, along, x, y = across / length, along / length, x - start[0], self.y - start[1]
        forward = across * x + along * y
        half_width = width / 2 + forward * ((end_width - width) / 2 / length)
        return _shared(half_width - np.abs(along * x - across * y), forward, length - forward)

    def paint(self, depth: _Floats, shade: _Number, strength: _Number = 1.0) -> None:
        """Give a part a shade, 0 black to 1 white; at a strength below 1 what was there shines through."""
        self.grey += np.clip(depth * self.pixels + 0.5, 0, strength) * (shade - self.grey)

    def cloth(self, patterned: float) -> _Floats:
        """Shades for a garment: plain, fading, in folds, and with the given chance striped or checked."""
        base = self.between(0.4, 0.95)
        folds = _wave(self.x * self.between(1, 3) + self.y * self.between(-0.5, 0.5) + base)
        contrast, kind = self.either(patterned, self.between(0.08, 0.25)), self.between(0, 1)
        stripes = (kind < 0.55) * _wave(self.y * self.between(2, 5)) + (kind > 0.4) * _wave(self.x * self.between(2, 5))
        return base + self.y * self.between(-0.12, 0.12) + folds * self.between(0, 0.1) + contrast * stripes

    def finish(self) -> NDArray[np.uint8]:
        """The images as bytes, with grain on the garment and none on the background."""
        grain = 0.93 + 0.14 * self.rng.random(self.grey.shape, dtype=np.float32)
        return (np.clip(self.grey * grain, 0, 1) * 255 + 0.5).astype(np.uint8)


def _shared(*depths: _Floats) -> _Floats:
    """The depth in what all the parts have in common."""
    least: _Floats = reduce(np.minimum, depths)
    return least


def _wave(value: _Floats) -> _Floats:
    """A zigzag from -1 to 1 of period 1."""
    zigzag: _Floats = 4 * np.abs(value - np.floor(value) - 0.5) - 1
    return zigzag


def _top(
    c: _Canvas, shade: _Floats, hem: _Number, waist: _Number, flare: _Number, sleeve: _Floats, neck: _Point, v: _Number
) -> None:
    """Paint sleeves and a body down to `hem`, `waist` half wide and widening below it by `flare`.

    sleeve: 0 (none) to 1 (to the wrist); neck: half width and depth of its opening, which is round at v = 0, a V at 1.
    """
    armpit = waist - 0.08
    hand = armpit + np.minimum(1, 4 * sleeve) * c.between(0.26, 0.4), -0.66 + sleeve * c.between(1.25, 1.45)
    c.paint(c.bar(c.side, (armpit, -0.74), hand, 0.34, c.between(0.18, 0.26)), shade * c.between(0.75, 1.1))
    below = c.y + c.between(-0.1, 0.2)
    half_width = waist + np.maximum(-0.1 * below, flare * below)
    out = c.side / neck[0]
    edge = np.maximum(0.35 * c.side - 1, neck[1] * (1 - out * (v + (1 - v) * out)) - 0.95)  # shoulders and neck
    c.paint(_shared(half_width - c.side, c.y - edge, hem - c.y), shade)


def _front(c: _Canvas, shade: _Floats, hem: _Number, width: _Number, strength: _Floats, buttons: float) -> None:
    """Paint a collar and an opening down to the hem, beside it with the chance `buttons` a row of buttons."""
    tip = 0.06, c.between(-0.75, -0.5)
    c.paint(c.bar(c.side, (0.2, -0.97), tip, 0.16, 0.1), shade + c.between(-0.25, 0.3), strength)
    c.paint(_shared(width - c.side, c.y + 0.7, hem - c.y), 0.08, strength)
    row = _shared(0.07 - np.abs(c.x - 0.12), 0.06 * _wave(c.y * 3), c.y + 0.6, hem - 0.1 - c.y)
    c.paint(row, 0.95, c.either(buttons, 0.8) * (strength > 0))  # strength 0 is a garment with a plain front


def _tshirt(c: _Canvas) -> None:
    shade, sleeve = c.cloth(0.25), c.either(0.15, 0.03, c.between(0.3, 0.55))
    neck = c.between(0.2, 0.32), c.between(0.1, 0.3)
    _top(c, shade, c.between(0.75, 0.95), c.between(0.42, 0.54), c.between(0, 0.08), sleeve, neck, 0)
    printed = c.box(c.x, (0, -0.15), c.between(0.12, 0.32), c.between(0.08, 0.25))
    c.paint(printed, c.between(0.1, 1), c.either(0.4, 0.8))


def _trouser(c: _Canvas) -> None:
    shade, hip, top, hem = c.cloth(0.08), c.between(0.3, 0.4), c.between(-0.98, -0.88), c.between(0.8, 0.98)
    down = (c.y - top) / (hem - top)
    outer = hip + np.minimum(down, 0.25) * 0.3 + (down - 0.25) * c.between(-0.15, 0.1)
    inner = (c.y - c.between(-0.5, -0.3)) * c.between(0.04, 0.16)  # below 0, so nowhere, above the crotch
    c.paint(_shared(outer - c.side, c.side - inner, c.y - top, hem - c.y), shade)
    c.paint(c.box(c.x, (0, top + 0.05), hip + 0.03, 0.06), shade * c.between(0.7, 1.2))


def _pullover(c: _Canvas) -> None:
    shade, hem, waist = c.cloth(0.2), c.between(0.7, 0.95), c.between(0.42, 0.56)
    neck = c.between(0.22, 0.36), c.between(0.02, 0.22)
    _top(c, shade, hem, waist, c.between(-0.03, 0.05), c.between(0.85, 1.05), neck, 0)
    c.paint(c.box(c.x, (0, hem - 0.07), waist - 0.04, 0.07), shade * c.between(0.6, 1.15))
    c.paint(c.box(c.x, (0, -0.2), waist - 0.04, c.between(0.05, 0.2)), c.between(0.2, 1), c.either(0.25, 0.8))


def _dress(c: _Canvas) -> None:
    shade, waist = c.cloth(0.25), c.between(0.22, 0.4)
    sleeve = c.either(0.45, 0.03, c.either(0.6, c.between(0.2, 0.45), c.between(0.6, 1)))
    neck = c.between(0.14, 0.26), c.between(0.1, 0.4)
    _top(c, shade, c.between(0.85, 1), waist, c.between(0.05, 0.4), sleeve, neck, c.between(0, 1))
    c.paint(c.box(c.x, (0, c.between(-0.2, 0)), waist + 0.05, 0.05), c.between(0.1, 1), c.either(0.35, 0.8))


def _coat(c: _Canvas) -> None:
    shade, hem, neck = c.cloth(0.2), c.between(0.85, 1), (c.between(0.16, 0.28), c.between(0.1, 0.5))
    _top(c, shade, hem, c.between(0.48, 0.64), c.between(0.02, 0.12), c.between(0.9, 1.08), neck, c.between(0.3, 1))
    _front(c, shade, hem, c.between(0.08, 0.13), c.either(0.9, c.between(0.7, 1)), 0.3)
    c.paint(c.box(c.side, (0.28, c.between(0.3, 0.5)), 0.12, 0.035), 0.1, c.either(0.6, 0.8))


def _sandal(c: _Canvas) -> None:
    shade, heel, strap = c.cloth(0), c.either(0.5, c.between(0, 0.15), c.between(0.3, 0.9)), c.between(0.1, 0.2)
    floor = 0.4 + 0.5 * heel
    sole, back = _sole(c, floor, heel), floor - heel
    c.paint(_shared(c.y - sole + c.between(0.08, 0.16), sole - c.y, c.x + 0.93, 0.9 - c.x), shade)
    _heel(c, sole, floor, c.either(0.2, 0.9, c.between(0.08, 0.25)), shade * c.between(0.7, 1))
    knot = c.between(-0.5, -0.25), floor - c.between(0.25, 0.4)
    ankle = c.between(0.4, 0.6), back - c.between(0.35, 0.65)
    tied = c.either(0.8, 1)  # around the ankle; the others are slippers
    for start, end, worn in (
        ((-0.75, floor - 0.05), knot, 1),
        (knot, (0, floor - 0.5 * heel), 1),
        (knot, ankle, tied * c.either(0.3, 1)),
        (ankle, (0.1, floor - 0.6 * heel), tied * c.either(0.5, 1)),
        (ankle, (0.88, ankle[1] + 0.08), tied),
        ((0.78, ankle[1]), (0.84, back), tied),
    ):
        c.paint(c.bar(c.x, start, end, strap, strap), shade * c.between(0.8, 1.1), worn)


def _shirt(c: _Canvas) -> None:
    # As in Fashion-MNIST the hardest class: sleeves as a T-shirt's or a coat's, and one front in four is plain.
    shade, hem, sleeve = c.cloth(0.5), c.between(0.75, 0.95), c.either(0.3, c.between(0.3, 0.55), c.between(0.8, 1.05))
    neck = c.between(0.16, 0.3), c.between(0.08, 0.35)
    _top(c, shade, hem, c.between(0.4, 0.5), c.between(0, 0.1), sleeve, neck, c.between(0.2, 1))
    _front(c, shade, hem, c.between(0.04, 0.07), c.either(0.75, c.between(0.6, 1)), 0.7)


def _sneaker(c: _Canvas) -> None:
    floor, ankle = c.between(0.42, 0.56), c.either(0.2, c.between(-0.55, -0.3), c.between(-0.25, 0))
    sole, tongue = _sole(c, floor, c.between(0, 0.05)), c.between(0.05, 0.3)
    _shoe(c, sole, c.between(0.2, 0.32), c.between(0.3, 0.5), tongue, ankle, 0.7)
    stripe = c.bar(c.x, (-0.25, floor - 0.1), (0.6, ankle + 0.2), c.between(0.08, 0.22), 0.08)
    c.paint(stripe, c.between(0, 1), c.either(0.5, 0.8))
    c.paint(_shared(0.95 - c.side, c.between(0.05, 0.1) - np.abs(c.y - sole)), c.between(0.15, 1))


def _bag(c: _Canvas) -> None:
    shade, wide, top, bottom = c.cloth(0.2), c.between(0.55, 0.92), c.between(-0.4, 0), c.between(0.55, 0.9)
    up, reach, high, thick = top - c.y, wide * c.between(0.35, 0.95), c.between(0.25, 0.6), c.between(0.08, 0.16)
    outer, inner = c.side / reach, c.side / (reach - thick)
    handle = _shared(high * (1 - outer * outer) - up, up - (high - thick) * (1 - inner * inner), up + 0.1)
    c.paint(handle, shade * c.between(0.6, 1.1), c.either(0.8, 1))
    half_width = wide + (c.y - bottom) * c.between(-0.15, 0.25)
    corners = wide + _shared(c.between(-0.3, 0.1) - up, bottom - c.y - c.between(0, 0.15)) - c.side
    c.paint(_shared(half_width - c.side, corners, -up, bottom - c.y), shade)
    flap = top + (bottom - top) * c.between(0.2, 0.6) - c.side * c.between(0, 0.3)
    c.paint(_shared(0.04 - np.abs(c.y - flap), half_width - c.side), 0.1, c.either(0.6, 0.6))
    c.paint(_shared(0.09 - c.side, 0.09 - np.abs(c.y - flap)), c.between(0.1, 1), c.either(0.6, 0.9))


def _boot(c: _Canvas) -> None:
    floor, top = c.between(0.7, 0.9), c.between(-0.9, -0.3)
    sole = _sole(c, floor, c.either(0.6, c.between(0.03, 0.2), c.between(0.3, 0.6)))
    shade, edge = _shoe(c, sole, c.between(0.24, 0.36), c.between(0.2, 0.5), c.between(-0.2, 0.15), top, 0.3)
    _heel(c, sole, floor, c.between(0.12, 0.45), shade * 0.8)
    c.paint(_shared(c.x + 0.93, 0.88 - c.x, 0.04 - np.abs(c.y - sole)), c.between(0.1, 0.9))
    elastic = _shared(c.between(0.06, 0.2) - np.abs(c.x - 0.45), c.between(-0.1, 0.2) - c.y, c.y - edge)
    c.paint(elastic, c.between(0.05, 0.6), c.either(0.35, 0.8))


def _sole(c: _Canvas, floor: _Number, heel: _Number) -> _Floats:
    """How far down the sole of a shoe is: flat under the toes, which point left, and `heel` higher at the back."""
    sole: _Floats = floor - heel * np.clip((c.x + 0.45) / 0.9, 0, 1)
    return sole


def _heel(c: _Canvas, sole: _Floats, floor: _Number, width: _Number, shade: _Number) -> None:
    """Paint what stands between the back of the sole and the floor."""
    c.paint(_shared(c.y - sole + 0.03, floor - c.y, c.x - 0.88 + width, 0.88 - c.x), shade)


def _shoe(
    c: _Canvas, sole: _Floats, toe: _Number, rise: _Number, shaft: _Number, top: _Number, laces: float
) -> tuple[_Floats, _Floats]:
    """Paint a closed shoe: `toe` high in front, rising by `rise` up to x = shaft and then steeply to y = top.

    Returns its shade and its upper edge.
    """
    shade = c.cloth(0.08)
    height = _shared(toe + rise * (c.x + 0.9) + 6 * np.maximum(0, c.x - shaft), 3 * (c.x + 0.97))
    edge = np.maximum(sole - height, top - 0.4 * (c.x - 0.55) * (c.x - 0.55))
    c.paint(_shared(c.y - edge, sole - c.y, 0.88 - c.between(0, 0.12) * (sole - c.y) - c.x), shade)
    laced = _shared(0.1 - np.abs(c.y - edge - 0.13), 0.25 - np.abs(c.x - shaft + 0.15))
    c.paint(laced, 0.5 + 0.5 * _wave(c.x * 6), c.either(laces, c.between(0.3, 0.8)))
    return shade, edge


# In the order of Fashion-MNIST's labels: T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, ...
_GARMENTS = (_tshirt, _trouser, _pullover, _dress, _coat, _sandal, _shirt, _sneaker, _bag, _boot)
