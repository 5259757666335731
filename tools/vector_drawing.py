"""Curves, and a canvas to draw them on: the little that tools/draw_subject.py needs above Pillow.

A canvas is a square frame of 256 units, x to the right and y downwards, and within it any number of frames that are moved,
turned and bent. Nothing here has randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

SIZE = 256  # pixels of a finished image, and units of the frame
LARGER = 4  # drawn so many times as large, for smooth edges
COLOURS = 256  # of a finished image

Point = tuple[float, float]
Points = Sequence[Point]


def oval(x: float, y: float, width: float, height: float) -> list[Point]:
    """An ellipse about (x, y) with these half axes."""
    turns = [math.tau * i / 72 for i in range(72)]
    return [(x + width * math.cos(t), y + height * math.sin(t)) for t in turns]


def arc(x: float, y: float, width: float, depth: float) -> list[Point]:
    """Half an ellipse hanging from (x ± width, y); it stands for a negative depth."""
    return [(x - width * math.cos(math.pi * i / 24), y + depth * math.sin(math.pi * i / 24)) for i in range(25)]


def curve(points: Points, *, closed: bool = False) -> list[Point]:
    """A smooth curve through the points (Catmull-Rom)."""
    around = [points[-1], *points, points[0], points[1]] if closed else [points[0], *points, points[-1]]
    result: list[Point] = []
    for before, start, end, after in zip(around, around[1:], around[2:], around[3:], strict=False):
        for t in (i / 12 for i in range(12)):
            x, y = (s + t * ((e - b) + t * ((2 * b - 5 * s + 4 * e - a) + t * (3 * (s - e) + a - b))) / 2
                    for b, s, e, a in zip(before, start, end, after, strict=True))
            result.append((x, y))
    return result if closed else [*result, points[-1]]


def mirrored(half: Points) -> list[Point]:
    """A closed smooth outline from its right half, given from top to bottom with both ends on the axis."""
    return curve([*half, *((-x, y) for x, y in reversed(half[1:-1]))], closed=True)


def moved(points: Points, x: float, y: float) -> list[Point]:
    """The same points elsewhere."""
    return [(px + x, py + y) for px, py in points]


class Canvas:
    """An image and the place in it where the next shapes go."""

    def __init__(self, image: Image.Image, *, transform: Callable[[Point], Point], scale: float) -> None:
        self.image, self.transform, self.scale = image, transform, scale
        self.pen = ImageDraw.Draw(image)

    @classmethod
    def blank(cls, colour: str) -> Canvas:
        """An empty frame of 256 × 256 units."""
        side = SIZE * LARGER
        return cls(Image.new("RGB", (side, side), colour), transform=lambda p: (p[0] * LARGER, p[1] * LARGER), scale=LARGER)

    def at(self, x: float, y: float, *, scale: float = 1, turned: float = 0, slim: float = 1, bend: float = 0) -> Canvas:
        """The same image with its origin at (x, y).

        `turned`: degrees clockwise; `slim` above 1 stretches upwards and narrows; `bend` moves what is 150 units up by
        so many units to the right, and what is lower by less.
        """
        cos, sin = scale * math.cos(math.radians(turned)), scale * math.sin(math.radians(turned))

        def transform(position: Point) -> Point:
            px = (position[0] + bend * max(0.0, -position[1] / 150) ** 2) / slim
            py = position[1] * slim
            return self.transform((x + cos * px - sin * py, y + sin * px + cos * py))

        return Canvas(self.image, transform=transform, scale=self.scale * scale)

    def fill(self, points: Points, colour: str, *, line: str = "", width: float = 3.6,
             inside: Sequence[tuple[Points, str]] = ()) -> None:
        """A filled outline, with what lies `inside` it cut off at its edge, and a line around it."""
        pixels = [self.transform(position) for position in points]
        self.pen.polygon(pixels, fill=colour)
        if inside:
            mask = Image.new("1", self.image.size)
            ImageDraw.Draw(mask).polygon(pixels, fill=1)
            layer = self.image.copy()
            for shape, shape_colour in inside:
                ImageDraw.Draw(layer).polygon([self.transform(position) for position in shape], fill=shape_colour)
            self.image.paste(layer, mask=mask)
        if line:
            self.stroke([*points, points[0]], line, width)

    def stroke(self, points: Points, colour: str, width: float, *, round_ends: bool = True) -> None:
        """A line along the points; one that ends where it begins is closed."""
        radius = width * self.scale / 2
        pixels = [self.transform(position) for position in points]
        pixels = [pixels[0], *(b for a, b in zip(pixels, pixels[1:], strict=False) if math.dist(a, b) > 0.01)]
        closed = math.dist(pixels[0], pixels[-1]) < 0.01
        steps = [((x1 - x0) / math.dist((x0, y0), (x1, y1)), (y1 - y0) / math.dist((x0, y0), (x1, y1)))
                 for (x0, y0), (x1, y1) in zip(pixels, pixels[1:], strict=False)]
        before, after = [steps[-1] if closed else steps[0], *steps], [*steps, steps[0] if closed else steps[-1]]
        edges = []  # the two edge points beside each point of the line
        for (x, y), (ax, ay), (bx, by) in zip(pixels, before, after, strict=True):
            cos = ax * bx + ay * by  # of the turn made here
            end = not closed and (x, y) in (pixels[0], pixels[-1])
            if cos < 0.9 or (round_ends and end):
                self.pen.polygon(oval(x, y, radius, radius), fill=colour)
            directions = [(ax, ay), (bx, by)] if cos < 0.9 else [((ax + bx) / (1 + cos), (ay + by) / (1 + cos))]
            edges += [((x - dy * radius, y + dx * radius), (x + dy * radius, y - dx * radius)) for dx, dy in directions]
        for (left, right), (next_left, next_right) in zip(edges, edges[1:], strict=False):
            self.pen.polygon([left, right, next_right, next_left], fill=colour)

    def finished(self) -> Image.Image:
        """The image in its final size, with a palette, which makes its file a third as large."""
        small = self.image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        return small.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
