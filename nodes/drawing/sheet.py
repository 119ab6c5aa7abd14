"""A contact sheet as a tensor: pictures in rows and columns with words over, beside and under them."""

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, SOFT = (255, 255, 255), (20, 20, 20), (90, 90, 90)
LINES = 3  # of words under a picture


def draw(pictures, columns, labels=(), tops=(), lefts=()):
    """The sheet, float32 [height, width, 3] in 0..1.

    A picture as large as the largest is copied as it is; smaller ones are enlarged to fit into its place.

    Args:
        pictures: list of float32 [H, W, 3 or more] in 0..1, row by row.
        columns: pictures in a row.
        labels: words under each picture, or none.
        tops: words over each column, or none.
        lefts: words beside each row, or none.
    """
    place = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
    height, width = place
    gap, size = max(width // 32, 4), max(width // 14, 13)
    rows = -(-len(pictures) // columns)
    under = [_wrapped(words, size, width) for words in labels]
    lines = [max((len(words) for words in under[r * columns : (r + 1) * columns]), default=0) for r in range(rows)]
    line = round(1.25 * size)
    left = max((_width(words, size) for words in lefts), default=-gap) + 2 * gap
    over = [_wrapped(words, size, width) for words in tops]
    top = gap + max((len(words) for words in over), default=0) * line + (gap if over else 0)
    heights = [height + (gap // 2 + n * line if n else 0) + gap for n in lines]
    page = Image.new("RGB", (left + columns * (width + gap), top + sum(heights)), PAPER)
    pen = ImageDraw.Draw(page)

    def write(words, x, y, colour):
        for k, text in enumerate(words):
            pen.text((x, y + k * line), text, colour, _font(size))

    corners = [(left + (k % columns) * (width + gap), top + sum(heights[: k // columns])) for k in range(len(pictures))]
    for words, (x, _) in zip(over, corners):
        write(words, x, gap, INK)
    for words, (_, y) in zip(lefts, corners[::columns]):
        pen.text((gap, y + height / 2), words, INK, _font(size), "lm")
    for words, (x, y) in zip(under, corners):
        write(words, x, y + height + gap // 2, SOFT)
    sheet = torch.from_numpy(numpy.asarray(page, numpy.float32) / 255)
    for picture, (x, y) in zip(pictures, corners):
        own = fitted(picture, place)
        y, x = y + (height - own.shape[0]) // 2, x + (width - own.shape[1]) // 2
        sheet[y : y + own.shape[0], x : x + own.shape[1]] = own
    return sheet


def fitted(picture, place):
    """A picture [H, W, 3 or more] made as large as fits into `place` (height, width), [h, w, 3]."""
    picture = picture[..., :3].float().cpu().expand(-1, -1, 3)
    scale = min(place[0] / picture.shape[0], place[1] / picture.shape[1])
    size = [max(round(side * scale), 1) for side in picture.shape[:2]]
    if size == list(picture.shape[:2]):
        return picture
    out = torch.nn.functional.interpolate(picture.movedim(-1, 0)[None], size, mode="bicubic", antialias=True)
    return out[0].movedim(0, -1).clamp(0, 1)


def _font(size):
    return ImageFont.load_default(size)


def _width(words, size):
    return round(_font(size).getlength(words))


def _wrapped(words, size, width):
    """The words in at most LINES lines of a width; what is left over is replaced by dots."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if _width(longer, size) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines[LINES - 1 :] = [lines[LINES - 1] + "..."]
    return [_cut(line, size, width) for line in lines if line]


def _cut(line, size, width):
    if _width(line, size) <= width:
        return line
    while line and _width(line + "...", size) > width:
        line = line[:-1]
    return line.rstrip(" .") + "..."
