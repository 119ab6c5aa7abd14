"""What ComfyUI's tokenizers read of a prompt: weighted parts, embeddings, and the text in between."""

import re
from typing import NamedTuple

from comfy.sd1_clip import escape_important, token_weights, unescape_important

EMBEDDING = "embedding:"
_MENTION = re.compile(rf"(?:^|(?<=\s)){EMBEDDING}(?=\S)")


class Stretch(NamedTuple):
    """Text that is tokenized on its own, `plain[first:end]`, or an embedding that is written there.

    Attributes:
        name: of the embedding, else None.
        sure: first character that every version of ComfyUI reads.
    """

    first: int
    end: int
    name: str | None
    sure: int


class Reading(NamedTuple):
    """A text as a tokenizer reads it.

    Attributes:
        plain: the text without the signs of weights.
        segments: (first, end) in it of the parts of one weight each.
        stretches: `Stretch`es, in order.
    """

    plain: str
    segments: tuple
    stretches: tuple


def read_text(text, weights, loads):
    """The `Reading` of a text.

    Args:
        weights: whether (word:1.2) is a weight; else it is read as letters.
        loads: what becomes of a word that begins with "embedding:": "embedding", "text", or None where it is left out.
    """
    escaped = escape_important(text)
    parts = [part for part, _ in token_weights(escaped, 1.0)] if weights else [escaped]
    plain, segments, stretches = "", [], []
    for part in map(unescape_important, parts):
        first = len(plain)
        plain += part
        segments.append((first, len(plain)))
        starts = [first + m.start() for m in _MENTION.finditer(part)]
        starts = [start for start in starts if loads(_word(plain, start)) != "text"]
        edges = [first, *(s for s in starts if s != first), len(plain)]
        for start, end in zip(edges, edges[1:]):
            if start in starts:
                stretches += _mention(plain, start, end, loads)
            elif end > start:
                stretches.append(Stretch(start, end, None, start))
    return Reading(plain, tuple(segments), tuple(stretches))


def _word(plain, start):
    return plain[start:].split(maxsplit=1)[0]


def _mention(plain, start, end, loads):
    """An embedding, where there is one, and the text behind it."""
    word = _word(plain, start)
    name = re.split(r"[<\[]", word)[0]
    cut = start + len(name if name != word else name.rstrip(","))
    if found := loads(word) == "embedding":
        yield Stretch(start, cut, plain[start + len(EMBEDDING) : cut], start)
    if plain[cut:end].strip():
        yield Stretch(cut, end, None, cut if found or name == word else start + len(word))
