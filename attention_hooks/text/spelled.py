"""The tokens that one text encoder makes of a prompt, and the words they spell."""

from itertools import product
from typing import NamedTuple

from .pieces import EMBEDDING, follow, letters, sentencepiece_style, spell
from .spelling import read_text
from .words import END, PAD, START, TEMPLATE, WORD, spans


class Spelled(NamedTuple):
    """One encoder's tokens of a prompt.

    Attributes:
        name: of the `words.Part`.
        ids, kinds: of every token, as in `words.Tokens`.
        chunks: first token of every chunk, and the number of tokens.
        words: {place in the prompt: (word, its tokens)}.
        opening: number of tokens before the prompt's.
        turns: tokens that open a turn of a chat: where an encoder too may cut off the beginning.
        loaded: False where the encoder is missing and zeros stand for its rows.
    """

    name: str
    ids: tuple
    kinds: tuple
    chunks: tuple
    words: dict
    opening: int = 0
    turns: tuple = ()
    loaded: bool = True


def spelled(name, own, chunks, text, template=("", ""), prompt_start=None):
    """What an encoder's tokens spell.

    Args:
        name: of the part.
        own: the encoder's tokenizer (`comfy.sd1_clip.SDTokenizer`).
        chunks: what it makes of the prompt, with word ids.
        text: the prompt.
        template: what is written before and behind the prompt.
        prompt_start: what ends a system prompt at the beginning of the text, where there is one.

    Raises:
        ValueError: the tokens do not spell the prompt.
    """
    tokens = [entry for chunk in chunks for entry in chunk]
    kinds = [kind for chunk in chunks for kind in _kinds(chunk, own)]
    reading, rows = _read(name, own, tokens, kinds, text, template)
    first, end = len(template[0]), len(reading.plain) - len(template[1])
    if prompt_start and prompt_start in reading.plain:
        first = reading.plain.index(prompt_start) + len(prompt_start)
    opening = _mark_template(kinds, rows, reading.plain, first, end)
    words = _words(reading, rows, kinds, first, end)
    ids = [token if isinstance(token, int) else None for token, *_ in tokens]
    for word, its in words.values():
        for n, row in enumerate(row for row in its if ids[row] is None):
            ids[row] = (word, n)
    turns = [row for row, kind in enumerate(kinds) if kind == TEMPLATE and (_piece(own, ids[row]) or "").startswith("<|")]
    return Spelled(name, tuple(ids), tuple(kinds), edges(chunks), words, opening, tuple(turns))


def edges(chunks):
    """First token of every chunk, and the number of tokens."""
    out = [0]
    for chunk in chunks:
        out.append(out[-1] + len(chunk))
    return tuple(out)


def _kinds(chunk, own):
    """Kinds of one chunk's tokens; a template counts as words."""
    kinds = [WORD if group else PAD for _, _, group in chunk]
    words = [i for i, kind in enumerate(kinds) if kind == WORD] or [len(kinds)]
    start = next((i for i in range(min(words[0], len(kinds))) if chunk[i][0] == own.start_token), None)
    if start is not None:
        kinds[start] = START
    behind = words[-1] + 1 if words[-1] < len(kinds) else (0 if start is None else start + 1)
    if behind < len(kinds) and chunk[behind][0] == own.end_token:
        kinds[behind] = END
    return kinds


def _piece(own, token):
    try:
        return own.untokenize([(token, 1.0)])[0][1]
    except KeyError:  # of the encoder's, not in the tokenizer's vocabulary
        return None


def _read(name, own, tokens, kinds, text, template):
    """How the tokenizer read the text, and {character of it: tokens}: with weights or without, as its pieces have it."""
    pieces = _spelling(own, tokens, kinds)
    pieces = {form: letters(pieces, *form) for form in product((False, True), repeat=2)}
    full = len(tokens) >= own.max_length and PAD not in kinds  # what was too long for it may be cut off
    known, best = {}, None
    for weights in (True, False):
        reading = read_text(text.join(template), weights, lambda word: known.setdefault(word, _loads(own, word)))
        if not (reading.plain.startswith(template[0]) and reading.plain.endswith(template[1])):
            continue
        for form, its in pieces.items():
            wanted = letters(_text(reading), *form)
            found = follow(wanted, its)
            if found and (full or not found.left) and (best is None or found.spare < best[0]):
                best = found.spare, reading, wanted, found.rows
            if best and not best[0]:
                break
    if best is None:
        raise ValueError(
            f"The tokens of the text encoder '{name}' do not spell the prompt: its template is not known, or its tokenizer "
            f"writes letters in another way. The words of '{text[:200]}' cannot be told apart."
        )
    rows = {}
    for letter, its in zip(*best[2:]):
        for place in letter.places:
            rows.setdefault(place, []).extend(its)
    return best[1], rows


def _loads(own, word):
    """What becomes of a word that begins with "embedding:", see `spelling.read_text`."""
    if own.embedding_directory is None:
        return "text"
    alone = (entry for chunk in own.tokenize_with_weights(word, True, disable_weights=True) for entry in chunk)
    return "embedding" if any(group and not isinstance(token, int) for token, _, group in alone) else None


def _spelling(own, tokens, kinds):
    """The text that the tokens spell, as (character, tokens) pairs; a space between what was tokenized on its own."""
    style = sentencepiece_style(own.inv_vocab.values())
    groups, last = [], 0
    for row, (token, _, group) in enumerate(tokens):
        if kinds[row] == WORD:
            if group != last:
                groups.append([])
            groups[-1].append((row, token))
            last = group
    out = []
    for group in groups:
        if isinstance(group[0][1], int):
            out += spell([(row, _piece(own, token)) for row, token in group], style)
        else:
            out.append((EMBEDDING, tuple(row for row, _ in group)))
        out.append((" ", ()))
    return out


def _text(reading):
    """The text as `_spelling` has it, with places in it in place of tokens."""
    out = []
    for first, end, name, sure in reading.stretches:
        if name is None:
            out += [(reading.plain[at], (at,), at < sure) for at in range(first, end)]
        else:
            out.append((EMBEDDING, tuple(range(first, end))))
        out.append((" ", ()))
    return out


def _mark_template(kinds, rows, plain, first, end):
    """TEMPLATE for the tokens whose letters are not the prompt's, plain[first:end]; how many come before the prompt's."""
    places, opening = {}, 0
    for at, its in rows.items():
        for row in its:
            places.setdefault(row, []).append(at)
    before = WORD
    for row in reversed(range(len(kinds))):
        if kinds[row] != WORD:
            continue
        its = places.get(row)
        if its:  # a token that spells nothing goes with the one behind it
            prompt = any(first <= at < end and not plain[at].isspace() for at in its) or all(first <= at < end for at in its)
            before = WORD if prompt else TEMPLATE
            if not prompt and min(its) < first:
                opening = max(opening, row + 1)
        kinds[row] = before
    return opening


def _words(reading, rows, kinds, first, end):
    """{place in the prompt: (word, tokens)}.

    A token belongs to all words of which it spells a letter, and one without letters (a space on its own) to the word that
    follows it.
    """
    found = {}
    for start, stop, name, _ in reading.stretches:
        start, stop = max(start, first), min(stop, end)
        if name is not None:
            its = [(f"embedding:{name.lower()}", start, stop)]
        else:
            its = [(word, start + a, start + b) for word, a, b in spans(reading.plain[start:stop])]
        for word, a, b in its:
            tokens = {row for at in range(a, b) for row in rows.get(at, ()) if kinds[row] == WORD}
            if tokens:
                found[a - first] = (word, tokens)
    owners = {}
    for place, (_, tokens) in found.items():
        for row in tokens:
            owners.setdefault(row, place)
    loose = []
    for row, kind in enumerate(kinds):
        if row in owners:
            found[owners[row]][1].update(loose)
            loose = []
        elif kind == WORD:
            loose.append(row)
    if found:
        found[max(found)][1].update(loose)
    return {place: (word, tuple(sorted(tokens))) for place, (word, tokens) in found.items()}
