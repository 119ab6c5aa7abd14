"""Which tokens spell which letters of a text.

A tokenizer's pieces, put together, are the text in the tokenizer's own spelling: spaces are marked or lost, forms of letters
unified, what is not in the vocabulary is one unknown piece. `follow` walks through both.
"""

import re
import unicodedata
from typing import NamedTuple

UNKNOWN, EMBEDDING = None, "embedding"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Letter(NamedTuple):
    """A character in a form that both spellings share.

    UNKNOWN stands for any number of them, EMBEDDING for a name and the vectors that take its place.
    """

    char: str | None
    places: tuple[int, ...]
    optional: bool = False


def byte_letters():
    """Byte-level BPE spells bytes with printable letters (OpenAI's rule); this maps them back."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(others)}


BYTES = byte_letters()


def sentencepiece_style(vocabulary):
    """Whether pieces mark spaces with U+2581, as SentencePiece does, and are not bytes spelled with letters."""
    return "\u2581" in vocabulary


def spell(pieces, sentencepiece):
    """The text of (place, piece) pairs that follow each other, as `Letter`s with the places as their origin.

    Args:
        pieces: of one stretch of text; the piece None is unknown too.
        sentencepiece: see `sentencepiece_style`; other pieces are byte-level BPE, or CLIP's with </w> at words' ends.
    """
    out, spelled, origin = [], bytearray(), []
    for place, piece in pieces:
        if piece is None or (sentencepiece and piece == "<unk>"):
            out += _decode(spelled, origin) + [(UNKNOWN, (place,))]
            spelled, origin = bytearray(), []
            continue
        its = _bytes(piece, sentencepiece)
        spelled += its
        origin += [place] * len(its)
    return out + _decode(spelled, origin)


def _bytes(piece, sentencepiece):
    if sentencepiece:
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode("utf-8", "replace")
    piece = piece[:-4] + "\u0120" if piece.endswith("</w>") else piece
    return b"".join(bytes([BYTES[c]]) if c in BYTES else c.encode("utf-8", "replace") for c in piece)


def _decode(spelled, origin):
    out, at = [], 0
    for char in bytes(spelled).decode("utf-8", "surrogateescape"):
        size = len(char.encode("utf-8", "surrogateescape"))
        out.append((char, tuple(dict.fromkeys(origin[at : at + size]))))
        at += size
    return out


def letters(characters, fold=False, joiners=False):
    """(character, places) pairs in the form in which spellings are compared, as `Letter`s.

    The form is NFKD, where an accent is a letter of its own; spaces of all kinds are one.

    Args:
        fold: make upper case lower, as CLIP does.
        joiners: whether characters such as those within an emoji of a family are spaces, as for T5.
    """
    out = []
    for char, places, *optional in characters:
        if char in (UNKNOWN, EMBEDDING):
            out.append(Letter(char, places))
            continue
        char = char.casefold() if fold else char
        forms = char if char.isascii() else unicodedata.normalize("NFKD", char)
        out += [Letter(" " if _space(c, joiners) else c, places, *optional) for c in forms]
    return out


def _space(char, joiners):
    if char.isspace() or char == "\u2581":
        return True
    return joiners and not char.isascii() and unicodedata.category(char) == "Cf"


class Followed(NamedTuple):
    """What `follow` finds.

    Attributes:
        rows: of every letter of the text, the places of the pieces that spell it.
        spare: how many letters up to the last piece had no like on the other side.
        left: how many letters of the text come after the last piece.
    """

    rows: list
    spare: int
    left: int


def follow(text, pieces):
    """Walk through a text's `Letter`s and its pieces'; None where the pieces spell another text.

    Letters and digits must agree. Spaces, punctuation and marks may be missing on either side, or be another sign. A piece
    that is unknown stands for the characters up to the next known one (which is in the vocabulary, so not among them).
    """
    rows, spare, i, j = [[] for _ in text], 0, 0, 0
    while j < len(pieces):
        char, its, _ = pieces[j]
        following = _char(pieces, j + 1)
        if char is UNKNOWN:
            while i < len(text) and text[i].char == " ":
                i += 1
            first = i
            while i < len(text) and text[i].char != " ":
                if i > first and (following is UNKNOWN or _alike(text, i, pieces, j + 1)):
                    break
                rows[i] += its
                i += 1
            if i == first:
                return None
            j += 1
            continue
        here = _char(text, i)
        if i < len(text) and here == char:
            rows[i] += its
            i, j = i + 1, j + 1
        elif char == " " or _unwritten(char):
            j += 1
        elif i < len(text) and (here == " " or text[i].optional or _unwritten(here)):
            i += 1
        elif i < len(text) and not here.isalnum():
            after = _char(text, i + 1)
            spare += 1
            if char.isalnum() or after == char:  # a sign that is not written
                i += 1
            elif following == here:
                j += 1
            else:  # another sign in its place
                rows[i] += its
                i, j = i + 1, j + 1
        elif not char.isalnum():
            j, spare = j + 1, spare + 1
        else:
            return None
    left = sum(letter.char.isalnum() and not letter.optional for letter in text[i:])
    return Followed(rows, spare, left)


def _char(spelling, at):
    return spelling[at].char if at < len(spelling) else " "


def _alike(text, i, pieces, j):
    """Whether a letter is the same on both sides, with its accent."""
    accents = [c if c and _mark(c) else "" for c in (_char(text, i + 1), _char(pieces, j + 1))]
    return text[i].char == _char(pieces, j) and accents[0] == accents[1]


def _mark(char):
    return char != EMBEDDING and not char.isascii() and unicodedata.category(char)[0] == "M"


def _unwritten(char):
    """Controls, joiners and marks, which a tokenizer may leave out."""
    return char < " " or (not char.isascii() and unicodedata.category(char)[0] in "CM")

