"""A prompt's tokens as ComfyUI makes them, and the words they spell."""

import re

from .encoders import CLIP, Draft, check_embeddings, same_kinds, spelled_parts
from .pieces import BYTES
from .spelled import Spelled, edges
from .words import END, PAD, START, TEMPLATE, WORD, Part, Tokens, Word, split

__all__ = ["END", "PAD", "START", "TEMPLATE", "WORD", "Part", "Tokens", "Word", "draft", "read", "split"]


def read(clip, text):
    """The tokens that a CLIP makes of a prompt, as `words.Tokens`.

    Weights, embeddings and prompts of several chunks are what ComfyUI makes of them. Of SDXL's two encoders one stands
    for both: attention sees their features side by side at the same positions. Encoders other than CLIP are run, to see
    which rows they give.

    Args:
        clip: CLIP.
        text: the prompt.

    Raises:
        ValueError: an unknown text encoder or template, tokens that do not spell the prompt, rows that do not fit the
            tokens, or embeddings that do not fit the encoders.
    """
    its = draft(clip, text)
    alone = [part.name for part in its.parts] == [CLIP]
    return its.fit(None if alone else clip.encode_from_tokens_scheduled(clip.tokenize(text)))


def draft(clip, text):
    """A prompt's tokens and words before it is encoded, as `encoders.Draft`; see `read`."""
    encoders = clip.tokenize(text, return_word_ids=True)
    check_embeddings(clip, encoders)
    alone = encoders and set(encoders) <= {"l", "g", "h"}
    return Draft(text=text, parts=(_clip(clip, encoders, text),) if alone else tuple(spelled_parts(clip, encoders, text)))


def _clip(clip, encoders, text):
    """`Spelled` of the encoders of SD 1.x, SD 2.x and SDXL, whose tokens are at the same positions."""
    first, *others = ([[_kind(chunk, i) for i in range(len(chunk))] for chunk in chunks] for chunks in encoders.values())
    same_kinds(text, first, *others)
    chunks = next(iter(encoders.values()))
    names = _embedding_names(clip, text)
    ids, kinds, words = [], [], []
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
    _close(spelled, words)
    return Spelled(CLIP, tuple(ids), tuple(kinds), edges(chunks), dict(enumerate(words)))


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


def _letters(spelled):
    return bytes(BYTES[c] for c in spelled if c in BYTES).decode("utf-8", errors="replace").lower()
