"""Text as cards and sheets draw it."""

import bisect

from PIL import ImageFont


def font(size):
    return ImageFont.load_default(size)


def width_of(text, size):
    """The width of a line in pixels, not rounded."""
    return font(size).getlength(text)


def cut(text, room, width, ends=None):
    """The text, cut to the room with dots.

    Args:
        room: pixels.
        width: `(text) -> pixels`.
        ends: characters that are not left before the dots; None for spaces.
    """
    if width(text) <= room:
        return text
    # the longest beginning that fits; widths grow with it
    fits = bisect.bisect_right(range(len(text) + 1), room, key=lambda n: width(text[:n] + "...")) - 1
    return text[: max(fits, 0)].rstrip(ends) + "..."
