"""The arithmetic of edited joint attention: one softmax over words and picture, on [rows, tokens, heads, width of a head].

Row copies act on the picture's tokens of q, k, v, and every query sees them. Edits of words, and of keys within masks, are
of the picture's queries alone; the words' queries keep the target's own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import repeat

from .attend import copy_rows, look_up, rows_of
from .backbones.calls import JointCall
from .edits import CrossEdit


@dataclass(frozen=True, kw_only=True)
class Words:
    """What is known of the words of an edited chunk.

    Attributes:
        edit: the `CrossEdit`.
        source, target: `Joint.positions` of the source's (None where nothing of it is used) and the target's other tokens;
            on the CPU, so that a GPU need not be waited for to count them.
        fetch: `name -> the source's` [B, tokens, heads, width].
    """

    edit: CrossEdit
    source: tuple[torch.Tensor, torch.Tensor] | None
    target: tuple[torch.Tensor, torch.Tensor]
    fetch: Callable


def joint_attention(q, k, v, edits, words: dict[int, Words], fetch, call: JointCall):
    """Joint attention with edits; q, k and v are overwritten.

    Args:
        edits: list of `SelfEdit`s for every chunk.
        words: {chunk: its `Words`}.
        fetch: `(branch, name) -> the source's` picture rows [B, tokens, heads, width].
    """
    image, batch = call.image, len(q) // len(edits)
    special = copy_rows(q[:, image], k[:, image], v[:, image], edits, call.grid, fetch)
    apart = special.keys() | words.keys()
    if not apart:
        return call(q, k, v)
    out = torch.empty_like(q)
    plain = rows_of([c for c in range(len(edits)) if c not in apart], batch)
    if plain:
        out[plain] = call(q[plain], k[plain], v[plain], plain)
    for c in apart:
        rows = rows_of([c], batch)
        attention = call.picture if c not in words else EditedWords(words[c], call, rows)
        mine = (t[:, image][rows] for t in (q, k, v))
        if c in special:
            picture = look_up(*mine, *special[c], fetch, attention, rows)
        else:
            picture = attention(*mine, rows)
        out[rows] = call.joined(call.beside(q[rows], rows), picture)
    return out


class EditedWords:
    """Attention of the picture's queries whose attention to words follows a `CrossEdit`.

        out = (w_T * sum_j f_j P_j V_j + sum_i P_i V_i) / (w_T * sum_j f_j P_j + 1 - w_T),
        P_j = (P_source M + P_target own)_j, scaled to sum 1

    j are words, i all other keys (the picture, references, tokens of the network's own), w_T is the target's own share of
    words. Each sum over keys is one attention of the model's own, with values that pick what is summed; no map is made.
    (arXiv 2208.01626 has the mix; the scale is what keeps rows of one softmax at 1, arXiv 2508.07519.)

    Args:
        words: of the chunk.
        rows: the chunk's, in the call.
    """

    def __init__(self, words: Words, call: JointCall, rows: list[int]):
        self._call, self._rows = call, rows
        keys, values = call.words(rows)
        self._at, copy = words.target
        self._mine = self._at >= 0
        edit = words.edit.of(lambda part: part.to(values))
        at = self._at[self._mine]
        self._factors = None if edit.factors is None else edit.factors[at]
        self._own = None if edit.own is None else edit.own[at]
        self._matrix, self._whole = None, False
        self._keys, self._values, self._zero = keys[:, self._mine], values[:, self._mine], torch.zeros_like(values)
        if edit.matrix is not None:
            source_at, source_copy = words.source
            theirs = source_at >= 0
            alike = source_copy[theirs][:, None] == copy[self._mine]
            self._matrix = edit.matrix[source_at[theirs]][:, at] * alike.to(values)
            # every word of the target is seen, once, and by every word of the source
            self._whole = edit.whole and len(at) == edit.matrix.shape[1] and bool(alike.all())
            self._source_q, self._source_keys = words.fetch("q").to(keys), words.fetch("t").to(keys)[:, theirs]

    def __call__(self, q, k, v, rows):
        mixed, share = self._mixed(q, k, v, rows, self._values)
        others = self._call.picture(q, k, v, rows, values=self._with_words(rows, 0))
        out = share * mixed + others
        if self._factors is not None:
            out = out / (share * self._mixed(q, k, v, rows, torch.ones_like(self._values))[0] + 1 - share)
        return out

    def maps(self, q, k, v, rows, columns):
        """Shares of the row that fall on groups of words, [rows, queries, heads, G], as edited."""

        def some(part):
            values = _as_values(part.to(self._values)[self._at[self._mine]], self._values)
            mixed, share = self._mixed(q, k, v, rows, values)
            total = 1
            if self._factors is not None:
                total = share * self._mixed(q, k, v, rows, torch.ones_like(values))[0][..., :1] + 1 - share
            return (share * mixed / total)[..., : part.shape[1]]

        return torch.cat([some(part) for part in columns.split(q.shape[-1], 1)], -1)

    def _mixed(self, q, k, v, rows, values):
        """`sum_j f_j P_j values_j` and w_T [rows, queries, heads, 1]."""
        its = [self._rows.index(row) for row in rows]
        values = values[its]
        if self._factors is not None:
            values = values * self._factors[:, None, None]
        share = self._call.picture(q, k, torch.zeros_like(v), rows, values=self._with_words(rows, 1), plain=True)[..., :1]
        mix = self._mix(q, its, values)
        if self._whole:
            return mix, share
        total = self._mix(q, its, torch.ones_like(values))[..., :1]
        return mix / total.clamp(min=torch.finfo(total.dtype).tiny), share

    def _mix(self, q, its, values):
        """`sum_j (P_source M + P_target own)_j values_j`, with shares among the words."""
        parts = []
        if self._matrix is not None:
            moved = torch.einsum("st,bthd->bshd", self._matrix, values)
            parts.append(self._among_words(self._source_q[its], self._source_keys[its], moved))
        if self._own is not None:
            parts.append(self._among_words(q, self._keys[its], self._own[:, None, None] * values))
        elif self._matrix is None:
            parts.append(self._among_words(q, self._keys[its], values))
        return sum(parts)

    def _among_words(self, q, keys, values):
        return self._call.alone(q, keys, values, self._rows[:1] * len(q))

    def _with_words(self, rows, value):
        """Values of the other tokens: `value` at the words, and the rest the call's where it is 0, nothing where it is 1."""
        its = [self._rows.index(row) for row in rows]
        out = self._zero[its].clone() if value else self._call.words(rows)[1].clone()
        out[:, self._mine] = value
        return out


def _as_values(columns, like):
    """Values [rows, tokens, heads, width] that pick groups of tokens, of [tokens, G]."""
    wide = torch.nn.functional.pad(columns, (0, like.shape[-1] - columns.shape[1]))
    return repeat(wide, "n d -> b n h d", b=len(like), h=like.shape[2])


def word_maps(q, k, v, columns, words: Words | None, positions, fetch, call: JointCall, rows):
    """Joint attention to groups of words, mean over heads, of source and target (the latter as edited).

    Args:
        q, k, v: the picture's, of the chunk.
        columns: (source [prompt tokens, G], target).
        words: of the chunk, or None where nothing of them is edited.
        positions: (source, target), see `Joint.positions`.
        fetch: `name -> the source's`.

    Returns:
        two of [B, tokens, G].
    """
    source_q, source_k, beside = (fetch(name).to(q) for name in "qkt")
    first = shares(source_q, torch.cat([beside, source_k], 1), columns[0], positions[0], call, rows)
    if words is not None:
        return first, EditedWords(words, call, rows).maps(q, k, v, rows, columns[1].to(q)).mean(2)
    return first, shares(q, torch.cat([call.words(rows)[0], k], 1), columns[1], positions[1], call, rows)


def shares(q, keys, columns, positions, call, rows):
    """Shares of the row that fall on groups of words, [B, queries, G]."""
    at, mine = positions[0], positions[0] >= 0
    spread = torch.zeros(keys.shape[1], columns.shape[1], device=q.device, dtype=q.dtype)
    spread[: len(at)][mine] = columns.to(q)[at[mine]]
    maps = [call.alone(q, keys, _as_values(part, q), rows)[..., : part.shape[1]] for part in spread.split(q.shape[-1], 1)]
    return torch.cat(maps, -1).mean(2)
