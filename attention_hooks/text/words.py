"""A prompt's tokens, and the words they spell."""

import re
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

START, WORD, END, PAD, TEMPLATE = "start", "word", "end", "pad", "template"


class Word(NamedTuple):
    """One word (punctuation is a word of its own), with its tokens in all encoders."""

    text: str
    positions: tuple[int, ...]


class Part(NamedTuple):
    """The positions first..end - 1, which one text encoder gives ("clip" are CLIP's, side by side at the same ones)."""

    name: str
    first: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a prompt, in the order in which attention sees them.

    Attributes:
        text: the prompt.
        ids: of every position; integers, or ("embedding:name", n) for the n-th vector of an embedding.
        kinds: START, WORD, END, PAD or TEMPLATE of every position. TEMPLATE is what the encoder or a system prompt puts
            around the prompt.
        chunks: first position of every chunk, and the total length at the end.
        parts: `Part`s, one an encoder, in order; together all positions.
        words: in the order of the prompt.
    """

    text: str
    ids: tuple
    kinds: tuple[str, ...]
    chunks: tuple[int, ...]
    parts: tuple[Part, ...]
    words: tuple[Word, ...]

    def __len__(self):
        return len(self.ids)

    def find(self, phrase):
        """Positions of all occurrences of a word or phrase, whatever the case and the punctuation.

        Raises:
            ValueError: it is not in the prompt.
        """
        found = self.search(phrase)
        if not found:
            raise ValueError(f"The word '{phrase.strip()}' is not in the prompt: '{self.text}'.")
        return found

    def search(self, phrase):
        """As `find`, with an empty tuple where there is none."""
        wanted = split(phrase)
        plain = [w for w in wanted if _bare(w)]
        words = [(w.text, w.positions) for w in self.words]
        if plain:  # punctuation alone can be looked for too
            wanted = [_bare(w) for w in plain]
            words = [(_bare(text), positions) for text, positions in words if _bare(text)]
        out = []
        for i in range(len(words) - len(wanted) + 1):
            if wanted and [text for text, _ in words[i : i + len(wanted)]] == wanted:
                out += [p for _, positions in words[i : i + len(wanted)] for p in positions]
        return tuple(dict.fromkeys(out))


# CLIP's own rule (letters; single digits; runs of other characters), with embeddings kept whole.
_SPLIT = re.compile(r"embedding:[^\s,]+|'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\w\s]|_)+")
_COMPOSED = re.compile(r".[\u0300-\u036f\u1ab0-\u1aff\u3099\u309a]*", re.DOTALL)  # a letter and its accents


def split(text):
    """A text's words as CLIP splits them, in lower case."""
    return _SPLIT.findall(unicodedata.normalize("NFC", text).lower())


def spans(text):
    """`split` with places: (word, first character, one past its last) of every word."""
    lower, places = "", []
    for found in _COMPOSED.finditer(text):
        letter = unicodedata.normalize("NFC", found.group()).lower()
        lower += letter
        places += [found.span()] * len(letter)
    return [(m.group(), places[m.start()][0], places[m.end() - 1][1]) for m in _SPLIT.finditer(lower)]


def _bare(word):
    return word if word.startswith("embedding:") else re.sub(r"[\W_]+", "", word)
