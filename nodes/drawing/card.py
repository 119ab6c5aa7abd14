"""A picture made of titles, rows of thumbnails, numbers and small charts, drawn from top to bottom with PIL."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

from . import text
from .text import width_of

WIDTH, MARGIN, GAP = 1120, 36, 12
INNER = WIDTH - 2 * MARGIN
GROUND, PANEL, LINE = "#15161b", "#1e2027", "#343742"
TEXT, SOFT = "#f2f2f4", "#a2a6b3"
MEASURED, THEORY = "#ffb057", "#6cb6ff"
_FINE = 3  # charts are drawn this much larger and scaled down: PIL's lines have hard edges


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart: a value for each x, a name for the legend; broken where a value is None."""

    values: list
    name: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart over steps.

    Attributes:
        title: above it.
        steps: x of the values, ascending.
        series: list of Series.
        log: logarithmic y.
    """

    title: str
    steps: list
    series: list[Series]
    log: bool = False


class Card:
    """Draw by calling the methods in the order of the blocks; then take `image()`."""

    def __init__(self, height=4000):
        self._image = Image.new("RGB", (WIDTH, height), GROUND)
        self._draw = ImageDraw.Draw(self._image)
        self._y = MARGIN

    def image(self) -> Image.Image:
        """The picture drawn so far."""
        return self._image.crop((0, 0, WIDTH, self._y + MARGIN - GAP))

    def title(self, title, line, beside=""):
        """A heading, softer words beside it and a softer line below."""
        self._words((MARGIN, self._y), title, 38, TEXT)
        self._words((MARGIN + width_of(title, 38) + 20, self._y + 14), beside, 24, SOFT)
        self._words((MARGIN, self._y + 52), _fitted(line, 21, INNER), 21, SOFT)
        self._y += 96

    def numbers(self, items):
        """Boxes side by side, each a large value over a small name: list of (value, name)."""
        width = (INNER - GAP * (len(items) - 1)) / len(items)
        for k, (value, name) in enumerate(items):
            x = MARGIN + k * (width + GAP)
            self._panel(x, width, 94)
            self._words((x + 18, self._y + 12), value, 32, TEXT)
            self._words((x + 18, self._y + 58), _fitted(name, 20, width - 30), 20, SOFT)
        self._y += 94 + 24

    def strip(self, title, pictures, captions=None, line="", columns=8):
        """A row of up to `columns` thumbnails with words under each, a heading, and a softer line beside it."""
        self._words((MARGIN, self._y), title, 24, TEXT)
        self._words((MARGIN + width_of(title, 24) + 16, self._y + 4), line, 19, SOFT)
        self._y += 38
        side = (INNER - GAP * (columns - 1)) / columns
        height = min(pictures[0].height / pictures[0].width, 2.0) * side
        for k, picture in enumerate(pictures):
            x = round(MARGIN + k * (side + GAP))
            enlarged = picture.width < side
            kind = Image.Resampling.BICUBIC if enlarged else Image.Resampling.LANCZOS
            small = picture.convert("RGB").resize((round(side), max(round(height), 1)), kind)
            self._image.paste(small, (x, round(self._y)), _rounded(small.size, 6))
            if captions:
                self._words((x + side / 2, self._y + height + 6), captions[k], 19, SOFT, anchor="ma")
        self._y = round(self._y + height + (38 if captions else 0) + 18)

    def lines(self, lines):
        """Softer lines of text."""
        for line in lines:
            self._words((MARGIN, self._y), _fitted(line, 21, INNER), 21, SOFT)
            self._y += 32
        self._y += GAP

    def table(self, heads, rows, largest=300):
        """Pictures in rows and columns.

        Args:
            heads: words over the columns.
            rows: (words, softer words below them, cells); a cell is a picture, words in its place, or None.
            largest: side of a picture at most.
        """
        left = 190
        side = min((INNER - left - GAP * (len(heads) - 1)) / len(heads), largest)
        xs = [round(MARGIN + left + k * (side + GAP)) for k in range(len(heads))]
        for x, head in zip(xs, heads):
            self._words((x + side / 2, self._y), head, 20, SOFT, anchor="ma")
        self._y += 34
        shape = next(c for _, _, cells in rows for c in cells if isinstance(c, Image.Image))
        height = round(min(shape.height / shape.width, 2.0) * side)
        for words, below, cells in rows:
            self._words((MARGIN, self._y + 4), _fitted(words, 24, left - 12), 24, TEXT)
            self._words((MARGIN, self._y + 38), _fitted(below, 18, left - 12), 18, SOFT)
            for x, cell in zip(xs, cells):
                size = round(side), height
                if isinstance(cell, Image.Image):
                    kind = Image.Resampling.NEAREST if cell.mode == "1" else Image.Resampling.BICUBIC
                    self._image.paste(cell.resize(size, kind).convert("RGB"), (x, self._y), _rounded(size, 6))
                elif cell is not None:
                    self._panel(x, side, height)
                    middle = x + side / 2, self._y + height / 2
                    self._words(middle, _fitted(cell, 17, side - 8), 17, SOFT, anchor="mm")
            self._y += max(height, 62) + GAP

    def charts(self, charts):
        """Charts side by side."""
        width, height = (INNER - GAP * (len(charts) - 1)) / len(charts), 268
        for k, chart in enumerate(charts):
            x = MARGIN + k * (width + GAP)
            self._panel(x, width, height)
            self._chart(chart, (round(x), self._y, round(width), height))
        self._y += height + GAP

    def _chart(self, chart: Chart, box):
        x0, y0, width, height = box
        self._words((x0 + 16, y0 + 12), _fitted(chart.title, 21, width - 26), 21, TEXT)
        legend = x0 + 16
        for series in chart.series:
            sample = [(legend, y0 + 54), (legend + 22, y0 + 54)]
            _line(self._draw, sample, series.colour, 3, dash=6 if series.dashed else 0)
            self._words((legend + 30, y0 + 43), series.name, 18, SOFT)
            legend += 30 + width_of(series.name, 18) + 20
        scale = Scale([v for s in chart.series for v in s.values if v is not None], chart.log)
        left = max(width_of(label, 17) for _, label in scale.ticks) + 26
        area = (x0 + left, y0 + 82, x0 + width - 18, y0 + height - 38)
        first, last = chart.steps[0], max(chart.steps[-1], chart.steps[0] + 1)

        def place(step, value):
            share = (step - first) / (last - first)
            return area[0] + share * (area[2] - area[0]), area[3] - scale.share(value) * (area[3] - area[1])

        for value, label in scale.ticks:
            y = place(first, value)[1]
            self._draw.line([(area[0], y), (area[2], y)], LINE)
            self._words((area[0] - 10, y), label, 17, SOFT, anchor="rm")
        for step, anchor in ((first, "la"), (last, "ra")):
            self._words((place(step, scale.low)[0], area[3] + 9), f"step {step + 1}", 17, SOFT, anchor=anchor)
        layer = self._image.crop((x0, y0, x0 + width, y0 + height))
        layer = layer.resize((width * _FINE, height * _FINE), Image.Resampling.NEAREST)
        fine = ImageDraw.Draw(layer)
        for series in chart.series:
            points = [None if v is None else place(s, v) for s, v in zip(chart.steps, series.values)]
            for run in _runs(points):
                run = [((x - x0) * _FINE, (y - y0) * _FINE) for x, y in run]
                _line(fine, run, series.colour, 3 * _FINE, dash=7 * _FINE if series.dashed else 0)
        self._image.paste(layer.resize((width, height), Image.Resampling.BOX), (x0, y0))

    def _panel(self, x, width, height):
        size = (round(width), height)
        self._image.paste(Image.new("RGB", size, PANEL), (round(x), self._y), _rounded(size, 10))

    def _words(self, at, words, size, colour, anchor="la"):
        self._draw.text(at, words, fill=colour, font=text.font(size), anchor=anchor)


class Scale:
    """The y axis of a chart: where values lie between 0 and 1, and at which values to draw lines.

    Attributes:
        low, high: ends of the axis.
        ticks: list of (value, label).
    """

    def __init__(self, values, log=False):
        self.log = log and min(values) > 0
        low, high = min(values), max(values)
        if self.log:
            self.low, self.high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
            if self.high == self.low:
                self.high *= 10
            decades = round(math.log10(self.high / self.low))
            every = math.ceil(decades / 4)
            at = [self.low * 10.0**k for k in range(0, decades + 1, every)]
        else:
            low = min(low, 0.0)
            high = high if high > low else low + 1
            unit = 10.0 ** math.floor(math.log10((high - low) / 2))
            step = next(unit * m for m in (1, 2, 5, 10) if (high - low) / (unit * m) <= 4)
            self.low, self.high = math.floor(low / step) * step, math.ceil(high / step + 0.1) * step  # with headroom
            at = [self.low + step * k for k in range(round((self.high - self.low) / step) + 1)]
        self.ticks = [(value, f"{value:.4g}") for value in at]

    def share(self, value):
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _fitted(words, size, room):
    return text.cut(words, room, lambda part: width_of(part, size))


def _rounded(size, radius):
    mask = Image.new("L", (size[0] * _FINE, size[1] * _FINE), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), radius * _FINE, 255)
    return mask.resize(size, Image.Resampling.BOX)


def _runs(points):
    """Parts of a line between its gaps."""
    run = []
    for point in [*points, None]:
        if point is not None:
            run.append(point)
        elif run:
            yield run
            run = []


def _line(draw, points, colour, width, dash=0):
    """A line through the points, dashed with dashes and gaps of `dash` where it is not 0."""
    if len(points) == 1:
        (x, y), r = points[0], width
        draw.ellipse((x - r, y - r, x + r, y + r), colour)
    elif not dash:
        draw.line(points, colour, width, joint="curve")
    else:
        at = 0.0  # length so far
        for (ax, ay), (bx, by) in zip(points, points[1:]):
            length, done = math.hypot(bx - ax, by - ay), 0.0
            while length - done > 1e-6:
                part = min(max(dash - at % dash, 0.5), length - done)
                if int(at // dash) % 2 == 0:
                    a, b = done / length, (done + part) / length
                    ends = [(ax + (bx - ax) * share, ay + (by - ay) * share) for share in (a, b)]
                    draw.line(ends, colour, width)
                at, done = at + part, done + part
