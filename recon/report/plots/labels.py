"""Put text in a plot so that it overlaps nothing: other text, markers, lines, the frame.

The placement is greedy and deterministic: candidate positions from near to far around what is labelled,
the first free one is taken. A label that has moved away is tied to its marker by a thin leader line.
All geometry is in pixels of the figure's own dpi, text is measured with the renderer.
"""

import math

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform
from numpy import ndarray

from recon.report.plots.geometry import boxes_overlap, segments_cross, segments_enter

DIRECTIONS = (0, 180, 90, 270, 45, 135, 315, 225, *range(15, 360, 15))
"""Where a label may stand, in degrees from its marker: beside it first, then above, below, askew."""

GAP = 2.0
"""Points between a text and anything else."""

RING = 5.0
"""Points by which each round of candidates is farther away than the one before."""

CROWD = 50.0
"""Width and height in points of the surroundings in which a third marker makes a crowd."""


class LabelPlacer:
    """Labels one axes whose limits, size and contents are final.

    Args:
        axes: What to label.
        renderer: Measures the text.
        spread: Least distance in points between a label and its marker where markers crowd: near labels
            wall the spot in, at a distance more of them fan out around it.
        font_size: Of the labels, in points.
    """

    def __init__(self, axes: Axes, renderer: RendererBase, spread: float = GAP, font_size: float = 9.0) -> None:
        self.axes = axes
        self.renderer = renderer
        self.spread = spread
        self.font_size = font_size
        self.pixels = axes.figure.dpi / 72  # per point
        self.frame = axes.bbox.padded(-GAP * self.pixels).extents
        # what no label may touch, as boxes and segments of `geometry`
        self.texts = np.empty((0, 4))
        self.markers = np.empty((0, 4))
        self.lines = np.empty((0, 4))
        self.leaders = np.empty((0, 4))

    def avoid_marker(self, x: float, y: float, extent: float) -> None:
        """Keep text off a marker, `extent` points wide and high, at the data coordinates `x`, `y`."""
        center = np.array([self._pixel(x, y)])
        self.markers = np.vstack([self.markers, _boxes(center, extent * self.pixels, extent * self.pixels)])

    def avoid_line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Keep text off the straight line between two points in data coordinates."""
        self.lines = np.vstack([self.lines, [*self._pixel(x0, y0), *self._pixel(x1, y1)]])

    def label_line(self, text: str, y: float, color: str) -> bool:
        """Write `text` above or below the horizontal line at `y`; False if there is no room."""
        width, height = self._size(text)
        _, py = self._pixel(self.axes.get_xlim()[0], y)
        side = height / 2 + GAP * self.pixels
        centers = [(x, py + dy) for x in self._along_frame(width) for dy in (side, -side)]
        return self._write_first_free(text, np.array(centers), width, height, color)

    def label_top(self, text: str, color: str) -> bool:
        """Write `text` along the upper edge of the frame; False if there is no room."""
        width, height = self._size(text)
        centers = [(x, self.frame[3] - height / 2) for x in self._along_frame(width)]
        return self._write_first_free(text, np.array(centers), width, height, color)

    def label_marker(self, text: str, x: float, y: float, extent: float, color: str) -> bool:
        """Write `text` as near as possible to a marker of `extent` points; False if there is no room.

        A leader line that would cross another one, or a marker, is taken only if there is no other way: in
        a cluster of markers there often is none. It never crosses text.
        """
        width, height = self._size(text)
        anchor = np.array(self._pixel(x, y))
        radius = extent / 2 * self.pixels
        boxes = _boxes(self._around(anchor, radius, width, height), width, height)
        boxes = boxes[self._is_free(boxes)]
        leaders = _leaders(anchor, radius, boxes)
        is_near = np.hypot(*(leaders[:, 2:] - anchor).T) < radius + RING * self.pixels
        foreign = self.markers[~boxes_overlap(self.markers, _boxes(anchor[None], 1.0, 1.0))[:, 0]]
        possible = is_near | ~segments_enter(leaders, self.texts).any(1)
        crossing = segments_enter(leaders, foreign).any(1) | segments_cross(leaders, self.leaders).any(1)
        for choice in (possible & (is_near | ~crossing), possible):
            if choice.any():
                best = int(choice.argmax())
                self._write(text, boxes[best], color)
                if not is_near[best]:
                    self._draw(leaders[best], color)
                return True
        return False

    def _along_frame(self, width: float) -> Float[ndarray, " n"]:
        """Horizontal centres for a text of `width` pixels, from the right end of the frame to the left."""
        return np.linspace(self.frame[2] - width / 2, self.frame[0] + width / 2, 26)

    def _around(self, anchor: Float[ndarray, "2"], radius: float, width: float, height: float) -> Float[ndarray, "n 2"]:
        """Centres for a text at rising distance from the rim of a marker, all directions in each round."""
        farthest = math.hypot(self.frame[2] - self.frame[0], self.frame[3] - self.frame[1])
        surroundings = _boxes(anchor[None], CROWD * self.pixels, CROWD * self.pixels)
        is_crowded = boxes_overlap(surroundings, self.markers).sum() > 2
        nearest = radius + (self.spread if is_crowded else GAP) * self.pixels
        distances = np.arange(nearest, farthest, RING * self.pixels)
        angles = np.radians(DIRECTIONS)
        units = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return (anchor + units * (distances[:, None, None] + np.array([width, height]) / 2)).reshape(-1, 2)

    def _is_free(self, boxes: Float[ndarray, "n 4"]) -> ndarray:
        """Whether text may stand in each box: inside the frame, and touching nothing placed so far."""
        gap = GAP * 0.75 * self.pixels
        padded = boxes + np.array([-gap, -gap, gap, gap])
        outside = (boxes[:, :2] < self.frame[:2]) | (boxes[:, 2:] > self.frame[2:])
        solid = boxes_overlap(padded, np.vstack([self.texts, self.markers])).any(1)
        thin = segments_enter(np.vstack([self.lines, self.leaders]), padded).any(0)
        return np.logical_not(outside.any(1) | solid | thin)

    def _write_first_free(
        self, text: str, centers: Float[ndarray, "n 2"], width: float, height: float, color: str
    ) -> bool:
        boxes = _boxes(centers, width, height)
        free = self._is_free(boxes)
        if not free.any():
            return False
        self._write(text, boxes[free.argmax()], color)
        return True

    def _write(self, text: str, box: Float[ndarray, "4"], color: str) -> None:
        x, y = self._data((box[:2] + box[2:]) / 2)
        self.axes.text(x, y, text, color=color, ha="center", va="center", size=self.font_size, zorder=5)
        self.texts = np.vstack([self.texts, box])

    def _draw(self, leader: Float[ndarray, "4"], color: str) -> None:
        (x0, y0), (x1, y1) = self._data(leader[:2]), self._data(leader[2:])
        self.axes.plot([x0, x1], [y0, y1], color=color, linewidth=0.7, zorder=4, gid="leader")
        self.leaders = np.vstack([self.leaders, leader])

    def _size(self, text: str) -> tuple[float, float]:
        probe = Text(0, 0, text, size=self.font_size, transform=IdentityTransform(), figure=self.axes.figure)
        box = probe.get_window_extent(self.renderer)
        return float(box.width), float(box.height)

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        px, py = self.axes.transData.transform((x, y))
        return float(px), float(py)

    def _data(self, pixel: Float[ndarray, "2"]) -> tuple[float, float]:
        x, y = self.axes.transData.inverted().transform(pixel)
        return float(x), float(y)


def _boxes(centers: Float[ndarray, "n 2"], width: float, height: float) -> Float[ndarray, "n 4"]:
    half = np.array([width, height]) / 2
    return np.hstack([centers - half, centers + half])


def _leaders(anchor: Float[ndarray, "2"], radius: float, boxes: Float[ndarray, "n 4"]) -> Float[ndarray, "n 4"]:
    """From the rim of a marker to the nearest point of each box, none of which holds the marker's centre."""
    ends = np.clip(anchor, boxes[:, :2], boxes[:, 2:])
    steps = ends - anchor
    starts = anchor + radius * steps / np.hypot(*steps.T)[:, None]
    return np.hstack([starts, ends])
