"""Which target token follows which source token (Prompt-to-Prompt, arXiv 2208.01626, section 3)."""

from dataclasses import dataclass

import numpy as np
import torch

from .encoders import CLIP
from .words import END, PAD, START, TEMPLATE, WORD

MAPPINGS = ("auto", "replace", "refine")
# English words without a place of their own; other languages' count as words that have one.
SILENT = frozenset(
    "a an the this that these those some and or but of on in at to by for from with without into onto over under near is are was "
    "were be as its his her their very".split()
)
MOST = 64_000_000  # pairs of tokens: 8000 a prompt, aligned in a second, are a matrix of 256 MB


@dataclass(frozen=True)
class Alignment:
    """Target maps from source maps: `f(P_s, P_t) = P_s @ matrix + P_t * own`.

    Attributes:
        kind: "replace" or "refine".
        matrix: float32 [source tokens, target tokens].
        own: float32 [target tokens], 1 where the target's own attention stays.
    """

    kind: str
    matrix: torch.Tensor
    own: torch.Tensor


def align(source, target, mapping="auto"):
    """Alignment of two prompts' `Tokens`, each encoder's part on its own.

    Args:
        mapping: "replace" (word by word), "refine" (what both prompts have in common), or "auto": replace where both
            have the same number of words.

    Raises:
        ValueError: "replace" for prompts of different numbers of words; prompts of other encoders, or too long ones.
    """
    kind = kind_of(source, target, mapping)
    if [part.name for part in source.parts] != [part.name for part in target.parts]:
        raise ValueError("The two prompts are not encoded with the same text encoders: encode both with one CLIP.")
    if len(source) * len(target) > MOST:
        raise ValueError(
            f"The prompts have {len(source)} and {len(target)} tokens: too many to match them. Write shorter prompts."
        )
    matrix, own = torch.zeros(len(source), len(target)), torch.zeros(len(target))
    for parts in zip(source.parts, target.parts):
        (_replace if kind == "replace" else _refine)(source, target, *parts, matrix, own)
    return Alignment(kind, matrix, own)


def kind_of(source, target, mapping="auto"):
    """"replace" or "refine", for two prompts' `Tokens` or `encoders.Draft`s.

    Raises:
        ValueError: as `align`, for the number of words.
    """
    if mapping not in MAPPINGS:
        raise ValueError(f"Unknown mapping '{mapping}': choose one of {', '.join(MAPPINGS)}.")
    same = len(source.words) == len(target.words)
    if mapping == "replace" and not same:
        raise ValueError(
            f"'replace' swaps word for word, but the source prompt has {len(source.words)} words and the target prompt "
            f"{len(target.words)} (punctuation counts). Use 'refine' or 'auto', or write prompts of the same length: "
            f"'{source.text}' / '{target.text}'."
        )
    return "replace" if mapping == "replace" or (mapping == "auto" and same) else "refine"


def _replace(source, target, a, b, matrix, own):
    """Word by word: the n-th word's tokens share the attention of the n-th source word's.

    Start and end tokens map to each other, the k-th padding token to the k-th, a template to itself. (The released code's
    mapper shifts everything behind a word whose number of tokens changes.) Surplus tokens: CLIP's to the same position, as
    ever; padding to the padding at the same position of a part of the same length; others keep their own attention.
    """
    for before, after in _units(source, target, a, b):
        if len(before) == len(after):
            matrix[before, after] = 1
        elif before and after:
            matrix[torch.tensor(before)[:, None], torch.tensor(after)] = 1 / len(after)
    source_chunks, target_chunks = _specials(source, a), _specials(target, b)
    for c, chunk in enumerate(source_chunks):
        like = target_chunks[min(c, len(target_chunks) - 1)]
        for kind in (START, END, PAD):
            pairs = list(zip(chunk[kind], like[kind]))
            matrix[[i for i, _ in pairs], [j for _, j in pairs]] = 1
    for i, j in _templates(source, target, a, b):
        matrix[i, j] = 1
    size = a.end - a.first
    free = (~matrix[a.first : a.end, b.first : b.end].any(0)).nonzero().flatten().tolist()
    for place in free:
        i, j = a.first + place, b.first + place
        alike = size == b.end - b.first and source.kinds[i] == target.kinds[j] == PAD
        if place < size and (a.name == CLIP or alike):
            matrix[i, j] = 1
        else:
            own[j] = 1


def _units(source, target, a, b):
    """(source positions, target positions) in one part, of the n-th word of both prompts.

    Words that share a token ("-cat" may be one) are one unit with all their tokens.
    """
    units = []
    for before, after in zip(source.words, target.words):
        before = {p for p in before.positions if a.first <= p < a.end}
        after = {p for p in after.positions if b.first <= p < b.end}
        if units and (units[-1][0] & before or units[-1][1] & after):
            units[-1][0].update(before)
            units[-1][1].update(after)
        else:
            units.append((before, after))
    return [(sorted(before), sorted(after)) for before, after in units]


def _specials(tokens, part):
    """Positions of start, end and padding in one part, by chunk."""
    edges = [edge for edge in tokens.chunks if part.first <= edge <= part.end]
    return [
        {kind: [i for i in range(first, last) if tokens.kinds[i] == kind] for kind in (START, END, PAD)}
        for first, last in zip(edges, edges[1:])
    ]


def _templates(source, target, a, b):
    """Pairs of the template's tokens: those before the prompt in order, those behind it in order from the end."""
    before, behind = zip(_template(source, a), _template(target, b))
    return [*zip(*before), *zip(*(rows[::-1] for rows in behind))]


def _template(tokens, part):
    rows = range(part.first, part.end)
    first = next((i for i in rows if tokens.kinds[i] == WORD), None)
    found = [i for i in rows if tokens.kinds[i] == TEMPLATE]
    return [i for i in found if first is None or i < first], [i for i in found if first is not None and i > first]


def _refine(source, target, a, b, matrix, own):
    """Tokens that both prompts have keep the source's attention, new tokens their own.

    Global alignment (Needleman and Wunsch) of the tokens, gap 0, match 1, mismatch -1, ties as in the released code;
    padding follows the padding at the same position.
    """
    own[b.first : b.end] = 1
    x = [i for i in range(a.first, a.end) if source.kinds[i] != PAD]
    y = [j for j in range(b.first, b.end) if target.kinds[j] != PAD]
    pairs = [(x[i], y[j]) for i, j in _global_align([source.ids[i] for i in x], [target.ids[j] for j in y])]
    both = zip(range(a.first, a.end), range(b.first, b.end))
    pairs += [(i, j) for i, j in both if source.kinds[i] == target.kinds[j] == PAD]
    for i, j in pairs:
        matrix[i, j], own[j] = 1, 0


def _global_align(x, y):
    """Pairs (i, j) of equal places of two sequences, in order.

    With gaps that cost nothing a row of scores is the running maximum of the ways from the row above.
    """
    numbers = {}
    x, y = ([numbers.setdefault(one, len(numbers)) for one in sequence] for sequence in (x, y))
    y = np.array(y, dtype=np.int64)
    above = np.zeros(len(y) + 1, dtype=np.int32)
    back = np.empty((len(x), len(y)), dtype=np.int8)
    for i, one in enumerate(x):
        across = above[:-1] + np.where(y == one, 1, -1).astype(np.int32)
        row = np.zeros_like(above)
        np.maximum.accumulate(np.maximum(above[1:], across), out=row[1:])
        np.maximum(row, 0, out=row)
        best = row[1:]
        back[i] = np.where(row[:-1] == best, 0, np.where(above[1:] == best, 1, 2))
        above = row
    pairs, i, j = [], len(x), len(y)
    while i and j:
        way = back[i - 1, j - 1]
        if way == 2:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif way == 0:
            j -= 1
        else:
            i -= 1
    return pairs[::-1]


def word_schedule(tokens, steps, window, words=()):
    """When each target token's cross-attention comes from the source: boolean [steps + 1, tokens].

    As in the released code a window (start, end) of T steps covers `floor(start * (T + 1))` to
    `floor(end * (T + 1)) - 1`: 0.4 of 50 are 20 steps, 1.0 are all.

    Args:
        tokens: the target prompt's.
        window: (start, end) of all tokens, fractions.
        words: (phrase, (start, end)) pairs that overrule it for their tokens.

    Raises:
        ValueError: a phrase that is not in the prompt.
    """
    alpha = torch.zeros(steps + 1, len(tokens), dtype=torch.bool)

    def rows(start, end):
        return slice(int(start * (steps + 1) + 1e-9), int(end * (steps + 1) + 1e-9))

    alpha[rows(*window)] = True
    for phrase, window_of_phrase in words:
        columns = list(tokens.find(phrase))
        alpha[:, columns] = False
        for column in columns:
            alpha[rows(*window_of_phrase), column] = True
    return alpha


def equalizer(tokens, words=()):
    """Factors of the target tokens' attention, float32 [tokens], from (phrase, factor) pairs.

    Raises:
        ValueError: a phrase that is not in the prompt.
    """
    factors = torch.ones(len(tokens))
    for phrase, factor in words:
        factors[list(tokens.find(phrase))] = float(factor)
    return factors


def columns(tokens, phrases):
    """1 at the tokens of the phrases, float32 [tokens]; phrases that are not there are left out."""
    out = torch.zeros(len(tokens))
    for phrase in phrases:
        out[list(tokens.search(phrase))] = 1
    return out


def places(source, target):
    """Positions of the words that say where two prompts' pictures differ: (source's, target's), in order.

    They are the words that the prompts do not share, as they are written; a word that has moved has changed. An adjective's
    attention lies all over the picture, so that the word after changed ones counts too ("star", where "a red star" becomes
    "a green star"), but for a participle ("sitting"). Articles, prepositions and punctuation count where nothing else has
    changed.
    """
    pairs = _global_align([w.text for w in source.words], [w.text for w in target.words])
    kept = {i for i, _ in pairs}, {j for _, j in pairs}
    words = source.words, target.words
    chosen = [{n for n in range(len(own)) if n not in same} for own, same in zip(words, kept)]
    if any(_tells(own[n]) for own, numbers in zip(words, chosen) for n in numbers):
        chosen = [_telling(*of_one) for of_one in zip(words, chosen)]
    for i, j in pairs:  # a noun that both prompts have says it in both
        if i in chosen[0] or j in chosen[1]:
            chosen[0].add(i)
            chosen[1].add(j)
    return tuple(tuple(p for n in sorted(numbers) for p in own[n].positions) for own, numbers in zip(words, chosen))


def _telling(words, changed):
    """Numbers of the changed words that tell a place, and of the one after each, as a set."""
    chosen = {n for n in changed if _tells(words[n])}
    behind = {n + 1 for n in chosen if n + 1 < len(words)}
    return chosen | {n for n in behind if _tells(words[n]) and not words[n].text.casefold().endswith("ing")}


def _tells(word):
    return word.text.casefold() not in SILENT and any(c.isalnum() for c in word.text)
