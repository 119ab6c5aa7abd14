"""Which target token follows which source token (Prompt-to-Prompt, arXiv 2208.01626, section 3)."""

from dataclasses import dataclass

import torch

from .tokens import END, PAD, START

MAPPINGS = ("auto", "replace", "refine")


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
    """Alignment of two prompts' `Tokens`.

    Args:
        mapping: "replace" (word by word), "refine" (what both prompts have in common), or "auto": replace where both
            have the same number of words.

    Raises:
        ValueError: "replace" for prompts of different numbers of words.
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
    return _replace(source, target) if mapping == "replace" or (mapping == "auto" and same) else _refine(source, target)


def _replace(source, target):
    """Word by word: the n-th word's tokens share the attention of the n-th source word's.

    Start and end tokens map to each other, the k-th padding token to the k-th, surplus target tokens to the same
    position. (The released code's mapper shifts everything behind a word whose number of tokens changes.)
    """
    matrix = torch.zeros(len(source), len(target))
    for a, b in zip(source.words, target.words):
        if len(a.positions) == len(b.positions):
            matrix[list(a.positions), list(b.positions)] = 1
        else:
            matrix[torch.tensor(a.positions)[:, None], torch.tensor(b.positions)] = 1 / len(b.positions)
    source_chunks, target_chunks = _specials(source), _specials(target)
    for c, chunk in enumerate(source_chunks):
        like = target_chunks[min(c, len(target_chunks) - 1)]
        for kind in (START, END):
            for i, j in zip(chunk[kind], like[kind]):
                matrix[i, j] = 1
        for i, j in zip(chunk[PAD], like[PAD]):
            matrix[i, j] = 1
    for j in range(min(len(target), len(source))):
        if not matrix[:, j].any():
            matrix[j, j] = 1
    return Alignment("replace", matrix, torch.zeros(len(target)))


def _refine(source, target):
    """Tokens that both prompts have keep the source's attention, new tokens their own.

    Global alignment (Needleman and Wunsch) of the tokens, gap 0, match 1, mismatch -1, ties as in the released code;
    padding follows the padding at the same position.
    """
    matrix, own = torch.zeros(len(source), len(target)), torch.ones(len(target))
    a = [i for i, kind in enumerate(source.kinds) if kind != PAD]
    b = [j for j, kind in enumerate(target.kinds) if kind != PAD]
    pairs = [(a[i], b[j]) for i, j in _global_align([source.ids[i] for i in a], [target.ids[j] for j in b])]
    pads = [j for j, kind in enumerate(target.kinds) if kind == PAD and j < len(source) and source.kinds[j] == PAD]
    for i, j in pairs + [(j, j) for j in pads]:
        matrix[i, j], own[j] = 1, 0
    return Alignment("refine", matrix, own)


def _global_align(x, y):
    """Pairs (i, j) of equal places of two sequences, in order."""
    score = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    back = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            ways = score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + (1 if x[i - 1] == y[j - 1] else -1)
            score[i][j] = max(ways)
            back[i][j] = ways.index(score[i][j])
    pairs, i, j = [], len(x), len(y)
    while i and j:
        if back[i][j] == 2:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif back[i][j] == 0:
            j -= 1
        else:
            i -= 1
    return pairs[::-1]


def _specials(tokens):
    """Positions of start, end and padding, by chunk."""
    return [
        {kind: [i for i in range(first, last) if tokens.kinds[i] == kind] for kind in (START, END, PAD)}
        for first, last in zip(tokens.chunks, tokens.chunks[1:])
    ]


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
