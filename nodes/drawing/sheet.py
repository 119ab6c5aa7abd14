"""A contact sheet as a tensor: pictures in rows and columns with words over, beside and under them."""

import torch
from einops import rearrange
from PIL import Image, ImageDraw

from . import text
from .pixels import to_tensor

PAPER, INK, SOFT = (255, 255, 255), (20, 20, 20), (90, 90, 90)
LINES = 3  # of words under a picture


def draw(pictures, columns, *, labels=(), tops=(), lefts=()) -> torch.Tensor:
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

    def write(lines, x, y, colour):
        for k, words in enumerate(lines):
            pen.text((x, y + k * line), words, colour, text.font(size))

    corners = [(left + (k % columns) * (width + gap), top + sum(heights[: k // columns])) for k in range(len(pictures))]
    for words, (x, _) in zip(over, corners):
        write(words, x, gap, INK)
    for words, (_, y) in zip(lefts, corners[::columns]):
        pen.text((gap, y + height / 2), words, fill=INK, font=text.font(size), anchor="lm")
    for words, (x, y) in zip(under, corners):
        write(words, x, y + height + gap // 2, SOFT)
    sheet = to_tensor(page)
    for picture, (x, y) in zip(pictures, corners):
        enlarged = fitted(picture, place)
        h, w = enlarged.shape[:2]
        y, x = y + (height - h) // 2, x + (width - w) // 2
        sheet[y : y + h, x : x + w] = enlarged
    return sheet


def fitted(picture, place):
    """A picture [H, W, 3 or more] made as large as fits into `place` (height, width), [h, w, 3]."""
    picture = picture[..., :3].float().cpu().expand(-1, -1, 3)
    scale = min(place[0] / picture.shape[0], place[1] / picture.shape[1])
    size = [max(round(side * scale), 1) for side in picture.shape[:2]]
    if size == list(picture.shape[:2]):
        return picture
    batch = rearrange(picture, "h w c -> 1 c h w")
    out = torch.nn.functional.interpolate(batch, size, mode="bicubic", antialias=True)
    return rearrange(out, "1 c h w -> h w c").clamp(0, 1)


def _width(words, size):
    return round(text.width_of(words, size))


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
    return [text.cut(line, width, lambda part: _width(part, size), ends=" .") for line in lines if line]
