"""Put text in a plot so that it overlaps nothing: other text, points, lines, the frame.

The placement is greedy and deterministic: candidate positions from near to far around what is labelled,
the first free one is taken. A label that has moved away is tied to its point by a thin leader line.
All geometry is in pixels of the figure's own dpi, measured with the renderer.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.path import Path as Line
from matplotlib.text import Text
from matplotlib.transforms import Bbox, IdentityTransform

DIRECTIONS = (0, 180, 90, 270, 45, 135, 315, 225, 22.5, 157.5, 337.5, 202.5, 67.5, 112.5, 292.5, 247.5)
"""Where a label may stand, in degrees from its point: beside it first, then above, below, askew."""


class LabelPlacer:
    """Labels one axes whose limits, size and contents are final.

    Args:
        axes: What to label.
        renderer: Measures the text.
        font_size: Of the labels, in points.
    """

    def __init__(self, axes: Axes, renderer: RendererBase, font_size: float = 9.0) -> None:
        self.axes = axes
        self.renderer = renderer
        self.font_size = font_size
        self.pixels = axes.figure.dpi / 72  # per point
        self.frame = axes.bbox.padded(-2 * self.pixels)
        self.boxes: list[Bbox] = []
        self.lines: list[Line] = []
        self.leaders: list[Line] = []

    def avoid_marker(self, x: float, y: float, size: float) -> None:
        """Keep text off a marker of `size` points at the data coordinates `x`, `y`."""
        px, py = self._pixel(x, y)
        half = size / 2 * self.pixels
        self.boxes.append(Bbox.from_extents(px - half, py - half, px + half, py + half))

    def avoid_line(self, points: list[tuple[float, float]]) -> None:
        """Keep text off the straight lines that join these data coordinates."""
        for start, end in pairwise(points):
            self.lines.append(Line([self._pixel(*start), self._pixel(*end)]))

    def label_line(self, text: str, y: float, color: str) -> bool:
        """Write `text` on either side of the horizontal line at `y`; False if there is no room."""
        width, height = self._size(text)
        _, py = self._pixel(self.axes.get_xlim()[0], y)
        gap = height / 2 + 2 * self.pixels
        left, right = self.frame.x0 + width / 2, self.frame.x1 - width / 2
        for share in range(0, 101, 4):
            x = right - (right - left) * share / 100
            for side in (gap, -gap):
                box = _box(x, py + side, width, height)
                if self._is_free(box):
                    self._write(text, box, anchor=(x, py), color=color)
                    return True
        return False

    def label_corner(self, text: str, color: str) -> bool:
        """Write `text` along the upper edge of the frame; False if there is no room."""
        width, height = self._size(text)
        y = self.frame.y1 - height / 2
        left, right = self.frame.x0 + width / 2, self.frame.x1 - width / 2
        for share in range(0, 101, 4):
            box = _box(right - (right - left) * share / 100, y, width, height)
            if self._is_free(box):
                self._write(text, box, anchor=(box.x0, box.y0), color=color)
                return True
        return False

    def label_point(self, text: str, x: float, y: float, size: float, color: str) -> bool:
        """Write `text` as near as possible to a marker of `size` points; False if there is no room."""
        anchor = self._pixel(x, y)
        width, height = self._size(text)
        radius = size / 2 * self.pixels
        for distance, (ux, uy) in self._around(radius + 2 * self.pixels):
            cx = anchor[0] + ux * (distance + width / 2)
            cy = anchor[1] + uy * (distance + height / 2)
            box = _box(cx, cy, width, height)
            if not self._is_free(box):
                continue
            leader = self._leader(anchor, radius, box)
            if leader is None:
                self._write(text, box, anchor, color)
                return True
            if self._is_clear(leader, anchor):
                self._write(text, box, anchor, color)
                self._draw(leader, anchor, color)
                return True
        return False

    def _around(self, nearest: float) -> Iterator[tuple[float, tuple[float, float]]]:
        distance = nearest
        while distance < math.hypot(self.frame.width, self.frame.height):
            for angle in DIRECTIONS:
                yield distance, (math.cos(math.radians(angle)), math.sin(math.radians(angle)))
            distance += 5 * self.pixels

    def _is_free(self, box: Bbox) -> bool:
        """Whether text may stand in `box`: inside the frame, and touching nothing placed so far."""
        inside_x = self.frame.x0 <= box.x0 and box.x1 <= self.frame.x1
        inside_y = self.frame.y0 <= box.y0 and box.y1 <= self.frame.y1
        margin = box.padded(1.5 * self.pixels)
        blocked = margin.count_overlaps(self.boxes) > 0 or any(
            line.intersects_bbox(margin, filled=False) for line in self.lines + self.leaders
        )
        return bool(inside_x and inside_y and not blocked)

    def _leader(self, anchor: tuple[float, float], radius: float, box: Bbox) -> Line | None:
        """From the rim of the marker to the nearest point of `box`; None if they all but touch."""
        x = min(max(anchor[0], box.x0), box.x1)
        y = min(max(anchor[1], box.y0), box.y1)
        length = math.hypot(x - anchor[0], y - anchor[1])
        if length < radius + 5 * self.pixels:
            return None
        start = radius / length
        return Line([(anchor[0] + start * (x - anchor[0]), anchor[1] + start * (y - anchor[1])), (x, y)])

    def _is_clear(self, leader: Line, anchor: tuple[float, float]) -> bool:
        """Whether a leader crosses no text, no other leader and no marker but those that cover its own."""
        foreign = [box for box in self.boxes if not box.contains(*anchor)]
        return not any(leader.intersects_bbox(box, filled=True) for box in foreign) and not any(
            leader.intersects_path(other, filled=False) for other in self.leaders
        )

    def _size(self, text: str) -> tuple[float, float]:
        probe = Text(0, 0, text, size=self.font_size, transform=IdentityTransform(), figure=self.axes.figure)
        box = probe.get_window_extent(self.renderer)
        return box.width, box.height

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        px, py = self.axes.transData.transform((x, y))
        return float(px), float(py)

    def _write(self, text: str, box: Bbox, anchor: tuple[float, float], color: str) -> None:
        offset = ((box.x0 + box.x1) / 2 - anchor[0], (box.y0 + box.y1) / 2 - anchor[1])
        self._annotate(text, anchor, offset, color=color, ha="center", va="center", size=self.font_size)
        self.boxes.append(box)

    def _draw(self, leader: Line, anchor: tuple[float, float], color: str) -> None:
        (x0, y0), (x1, y1) = leader.vertices.tolist()
        offset = (x1 - anchor[0], y1 - anchor[1])
        shrink = math.hypot(x0 - anchor[0], y0 - anchor[1]) / self.pixels
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 0, "shrinkB": shrink}
        self._annotate("", anchor, offset, arrowprops=arrow)
        self.leaders.append(leader)

    def _annotate(
        self, text: str, anchor: tuple[float, float], offset: tuple[float, float], **kwargs
    ) -> None:
        """Offsets are kept in points, so that the picture is the same at every dpi."""
        self.axes.annotate(
            text,
            xy=tuple(self.axes.transData.inverted().transform(anchor)),
            xytext=(offset[0] / self.pixels, offset[1] / self.pixels),
            textcoords="offset points",
            annotation_clip=False,
            zorder=5,
            **kwargs,
        )


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
