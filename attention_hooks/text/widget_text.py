"""Parsers of text widgets: phrases, and phrases with numbers. All take time in proportion to the text."""

import math
import re

MOST = 10_000  # characters of a widget


def phrases(text):
    """'cat, red hat' as ("cat", "red hat").

    Raises:
        ValueError: it is longer than any list of words.
    """
    if len(text) > MOST:
        raise ValueError(f"A list of words has {len(text)} characters: {MOST} are the most that is read.")
    return tuple(part.strip() for part in re.split(r"[,;\n]", text) if part.strip())


def factors(text):
    """'smiling: 2, hat: -1' as (("smiling", 2.0), ("hat", -1.0)).

    Raises:
        ValueError: a part without a number.
    """
    return tuple((phrase, _number(value, phrase, value)) for phrase, value in _pairs(text, "smiling: 2, hat: -1"))


def windows(text):
    """'dog: 0.2, sofa: 0.1-0.6' as (("dog", (0.0, 0.2)), ("sofa", (0.1, 0.6))).

    Raises:
        ValueError: a part without a window, or one that is not within 0..1 and in order.
    """
    out = []
    for phrase, value in _pairs(text, "dog: 0.2, sofa: 0.1-0.6"):
        found = re.fullmatch(r"(?:([\d.]+)\s*-\s*)?([\d.]+)", value)
        window = [_number(number or "0", phrase, value) for number in found.groups()] if found else (2, 0)
        if not 0 <= window[0] <= window[1] <= 1:
            raise ValueError(f"'{value[:40]}' for '{phrase[:40]}' is no window: write fractions of the edit such as 0.1-0.6.")
        out.append((phrase, tuple(window)))
    return tuple(out)


def _pairs(text, example):
    for part in phrases(text):
        at = max(part.rfind(":"), part.rfind("="))
        phrase, value = part[: max(at, 0)], part[at + 1 :]
        if not phrase.strip():
            raise ValueError(f"'{part[:40]}' needs a word and a number, as in '{example}'.")
        yield phrase.strip(), value.strip()


def _number(text, phrase, value):
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"'{value[:40]}' for '{phrase[:40]}' is not a number.") from None
    if not math.isfinite(number):
        raise ValueError(f"'{value[:40]}' for '{phrase[:40]}' is not a number to multiply with: write one such as 2 or -1.")
    return number
