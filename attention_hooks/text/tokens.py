"""A prompt's tokens as ComfyUI makes them, and the words they spell."""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

START, WORD, END, PAD = "start", "word", "end", "pad"


class Word(NamedTuple):
    """One word as the tokenizer splits them (punctuation is a word of its own)."""

    text: str
    positions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a prompt, in the order in which cross-attention sees them.

    Attributes:
        text: the prompt.
        ids: of every position; integers, or ("embedding:name", n) for the n-th vector of an embedding.
        kinds: START, WORD, END or PAD of every position.
        chunks: first position of every chunk of 77, and the total length at the end.
        words: in the order of the prompt.
    """

    text: str
    ids: tuple
    kinds: tuple[str, ...]
    chunks: tuple[int, ...]
    words: tuple[Word, ...]

    def __len__(self):
        return len(self.ids)

    def without_padding(self, rows):
        """Without the padding after the first `rows` tokens; as it is where there is more than padding, or nothing."""
        if rows >= len(self) or len(self.chunks) > 2 or any(kind != PAD for kind in self.kinds[rows:]):
            return self
        return replace(self, ids=self.ids[:rows], kinds=self.kinds[:rows], chunks=(0, rows))

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


def split(text):
    """A text's words as CLIP splits them, in lower case."""
    return _SPLIT.findall(text.lower())


def _bare(word):
    return word if word.startswith("embedding:") else re.sub(r"[\W_]+", "", word)


def read(clip, text):
    """The tokens that a CLIP makes of a prompt.

    Weights, embeddings and prompts of several chunks are what ComfyUI makes of them. Of SDXL's two encoders one stands
    for both: cross-attention sees their features side by side at the same positions.

    Args:
        clip: CLIP of SD 1.x, SD 2.x or SDXL.
        text: the prompt.

    Raises:
        ValueError: another kind of text encoder, or embeddings of which the two encoders have different lengths.
    """
    encoders = clip.tokenize(text, return_word_ids=True)
    if not encoders or not set(encoders) <= {"l", "g", "h"}:
        raise ValueError(
            "Edit Prompts needs the text encoder of an SD 1.x, SD 2.x or SDXL checkpoint; this CLIP has "
            f"{', '.join(encoders) or 'none'} (SD3 and Flux use others)."
        )
    first, *others = ([[_kind(chunk, i) for i in range(len(chunk))] for chunk in chunks] for chunks in encoders.values())
    if any(other != first for other in others):
        raise ValueError(
            "The two text encoders of this model split the prompt differently: an embedding in it has another number "
            f"of vectors for each, or belongs to one only. Leave it out of the edited prompts: '{text}'."
        )
    chunks = next(iter(encoders.values()))
    names = _embedding_names(clip, text)
    ids, kinds, starts, words = [], [], [0], []
    spelled, groups = ("", []), {}
    segment = None
    for chunk, its_kinds in zip(chunks, first):
        for (token, _, group), kind in zip(chunk, its_kinds):
            here = len(ids)
            kinds.append(kind)
            if kind != WORD:
                ids.append(int(token))
                continue
            if group != segment:  # a word never spans two weighted parts
                spelled, segment = _close(spelled, words), group
            if isinstance(token, int):
                ids.append(token)
                letters = clip.tokenizer.untokenize([(token, 1.0)])[0][1]
                spelled = spelled[0] + letters.removesuffix("</w>"), [*spelled[1], here]
                if letters.endswith("</w>"):
                    spelled = _close(spelled, words)
            else:
                name, members = groups.setdefault(group, (names[len(groups)] if len(groups) < len(names) else "", []))
                ids.append((f"embedding:{name}", len(members)))
                members.append(here)
                if len(members) > 1:
                    words.pop()
                words.append(Word(f"embedding:{name}", tuple(members)))
        starts.append(len(ids))
    _close(spelled, words)
    return Tokens(text=text, ids=tuple(ids), kinds=tuple(kinds), chunks=tuple(starts), words=tuple(words))


def _kind(chunk, i):
    if chunk[i][2]:
        return WORD
    if i == 0:
        return START
    return END if chunk[i - 1][2] or i == 1 else PAD


def _close(spelled, words):
    if spelled[1]:
        words.append(Word(_letters(spelled[0]), tuple(spelled[1])))
    return "", []


def _embedding_names(clip, text):
    """Names of the embeddings in a prompt that ComfyUI finds, in order."""
    names = re.findall(r"(?:^|(?<=[\s(]))embedding:([^\s,():<\[]+)", text)

    def loads(name):
        chunks = next(iter(clip.tokenize(f"embedding:{name}").values()))
        return any(not isinstance(token[0], int) for chunk in chunks for token in chunk)

    return [name.lower() for name in names if loads(name)]


def _byte_letters():
    """CLIP's BPE spells bytes with printable letters (OpenAI's byte-level BPE); this maps them back."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_letters()


def _letters(spelled):
    return bytes(_BYTES[c] for c in spelled if c in _BYTES).decode("utf-8", errors="replace").lower()
