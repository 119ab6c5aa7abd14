"""A contact sheet: lines of pictures with words under them. Needs numpy and Pillow."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, TEXT, HEAD = 224, 16, 15, 20  # pixels: side of a cell, space between, sizes of the letters
LINES = 12  # of words under a picture
PAPER, INK, GREY = (255, 255, 255), (20, 20, 20), (90, 90, 90)


def _font(size):
    return ImageFont.load_default(size=size)


def _image(picture):
    image = Image.fromarray(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8))
    scale = CELL / max(image.size)
    return image.resize([max(round(side * scale), 1) for side in image.size], Image.Resampling.LANCZOS)


def _wrapped(text):
    return textwrap.wrap(text, int(CELL / (TEXT * 0.52)), max_lines=LINES, placeholder=" ...") or [""]


def draw(heads, lines):
    """The sheet as a Pillow image.

    Args:
        heads: words over the columns.
        lines: for every line its cells (words, picture float32 [H, W, 3] in 0..1).
    """
    made = [[(_wrapped(words), _image(picture)) for words, picture in cells] for cells in lines]
    heights = [max(i.height + TEXT * 1.35 * len(w) for w, i in cells) + 1.5 * GAP for cells in made]
    columns = max(len(cells) for cells in made)
    width = columns * (CELL + GAP) + GAP
    page = Image.new("RGB", (width, round(sum(heights)) + HEAD + 3 * GAP), PAPER)
    pen = ImageDraw.Draw(page)
    for column, text in enumerate(heads):
        pen.text((GAP + column * (CELL + GAP), GAP), text, INK, _font(HEAD))
    top = HEAD + 2 * GAP
    for cells, height in zip(made, heights):
        for column, (words, image) in enumerate(cells):
            left = GAP + column * (CELL + GAP)
            page.paste(image, (left, round(top)))
            for number, text in enumerate(words):
                pen.text((left, round(top + image.height + 4 + number * TEXT * 1.3)), text, GREY, _font(TEXT))
        top += height
    return page
