"""The arithmetic of edited attention, on projected q, k, v of [rows, tokens, width].

Rows come in chunks of B pictures. `attention(q, k, v, rows)` is the model's own attention (or another pack's patch around
it) for the rows of the call with these numbers; `fetch(branch, name)` gives the source's captured rows [B, tokens, width].
"""

import functools

import torch
from einops import rearrange, repeat


def rows_of(chunks, batch):
    """Numbers of the rows of some chunks."""
    return [c * batch + b for c in chunks for b in range(batch)]


def copy_rows(q, k, v, edits, grid, fetch):
    """Put the source's rows into q, k and v, which are overwritten.

    Args:
        edits: list of `SelfEdit`s for every chunk, applied in order.
        grid: height and width of the token grid.

    Returns:
        {chunk: (edit, masks)} of the chunks whose keys cannot be replaced in place: `look_up` serves them.
    """
    batch, special = len(q) // len(edits), {}
    for c, edits_of_chunk in enumerate(edits):
        rows = slice(c * batch, (c + 1) * batch)
        for edit in edits_of_chunk:
            masks = edit.masks(grid) if edit.masks else None
            where = None if edit.where is None else _over_frames(edit.where(grid), q)
            apart = edit.own_keys or masks is not None
            if apart:
                special[c] = edit, masks and [_over_frames(mask, q) for mask in masks]
            elif edit.k or edit.v:
                special.pop(c, None)
            for name, tensor, branch in (("q", q, edit.q), *(() if apart else (("k", k, edit.k), ("v", v, edit.v)))):
                if branch:
                    source = fetch(branch, name).to(tensor)
                    tensor[rows] = source if where is None else torch.where(_beside(where, tensor), source, tensor[rows])
    return special


def self_attention(q, k, v, edits, grid, fetch, attention, patched=None):
    """Self-attention with `SelfEdit`s. q, k and v are overwritten.

    Args:
        edits, grid: as in `copy_rows`.
        patched: another pack's patch on this layer. It is given as many keys as queries; what it adds to plain attention
            over the source's keys is kept.
    """
    whole, special = patched or attention, copy_rows(q, k, v, edits, grid, fetch)
    everything, batch = range(len(edits)), len(q) // len(edits)
    if not special:
        return whole(q, k, v, rows_of(everything, batch))
    out = torch.empty_like(q)
    plain = rows_of([c for c in everything if c not in special], batch)
    if plain:
        out[plain] = whole(q[plain], k[plain], v[plain], plain)
    for c, (edit, masks) in special.items():
        rows = rows_of([c], batch)
        out[rows] = look_up(q[rows], k[rows], v[rows], edit, masks, fetch, attention, rows)
        if patched is not None:
            source = fetch(edit.k, "k").to(k), fetch(edit.v, "v").to(v)
            out[rows] += patched(q[rows], *source, rows) - attention(q[rows], *source, rows)
    return out


def look_up(q, k, v, edit, masks, fetch, attention, rows):
    """Attention of one chunk to the source's keys beside its own, or within masks.

    Args:
        q, k, v: of the chunk.
        edit, masks: as `copy_rows` gave them.
        rows: the chunk's.
    """
    keys, values = fetch(edit.k, "k").to(k), fetch(edit.v, "v").to(v)
    if masks is None:
        return attention(q, torch.cat([keys, k], 1), torch.cat([values, v], 1), rows)
    out = torch.empty_like(q)
    for b, row in enumerate(rows):  # pictures look up different numbers of keys
        one = slice(b, b + 1)
        source, target = (keys[one], values[one]), (k[one], v[one]) if edit.own_keys else None
        of_row = functools.partial(attention, rows=[row])
        out[one] = _inside_and_outside(q[one], source, target, [m[b] for m in masks], of_row)
    return out


def _over_frames(mask, like):
    """A mask [B, h * w] for the tokens of all frames."""
    return repeat(mask, "b n -> b (t n)", t=like.shape[1] // mask.shape[1])


def _beside(mask, like):
    """A mask [..., tokens] with the axes that follow tokens in `like`."""
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - 2)).to(like.device)


def _inside_and_outside(q, source, target, masks, attention):
    """Attention of one picture: queries inside the target's mask look up keys inside the source's, the others outside.

    Args:
        q: [1, tokens, width].
        source: keys and values of the source, [1, tokens, width] each.
        target: those of the target, which are looked up too, or None.
        masks: (source, target), 0..1 [tokens].
    """
    source_mask, target_mask = masks
    sides = []
    for inside in (True, False):
        seen = source_mask.bool() == inside
        if not seen.any():  # no such region in the source: look everywhere
            seen = torch.ones_like(seen)
        parts = [[tensor[:, seen] for tensor in source]]
        if target is not None:
            mine = target_mask.bool() == inside
            parts.append([tensor[:, mine] for tensor in target])
        keys, values = (torch.cat(tensors, 1) for tensors in zip(*parts))
        sides.append(attention(q, keys, values))
    share = _beside(target_mask.to(q), q[0][None])
    return sides[0] * share + sides[1] * (1 - share)


def cross_attention(q, k, v, edited, edit, fetch, attention, patched=None):
    """Cross-attention of which some chunks follow a `CrossEdit`. q, k and v are overwritten.

    Args:
        edited: the edited rows of every chunk, lists.
        patched: another pack's patch on this layer. What it adds to plain attention is kept.
    """
    everything = list(range(len(q)))
    tokens = edit.matrix.shape[1] if edit.own is None else len(edit.own)

    def from_source(rows):
        return fetch("q").to(q), fetch("k").to(k), edit.matrix.to(v) @ v[rows, :tokens]

    if patched is None and edit.own is None and k.shape[1] == tokens == len(edit.matrix):
        for rows in edited:
            q[rows], k[rows], v[rows] = from_source(rows)
        return attention(q, k, v, everything)

    stays = torch.zeros(tokens, device=v.device, dtype=v.dtype) if edit.own is None else edit.own.to(v)
    # A shorter prompt is repeated to the length of a longer one in the same call; tokens that others add stay.
    factors = torch.ones(k.shape[1], device=v.device, dtype=v.dtype)
    repeats = k.shape[1] // tokens if k.shape[1] % tokens == 0 else 1
    factors[: repeats * tokens] = stays.repeat(repeats)

    if patched is not None:
        out = patched(q, k, v, everything)
        for rows in edited:
            mixed = attention(q[rows], k[rows], v[rows] * (factors[:, None] - 1), rows)
            out[rows] += mixed if edit.matrix is None else mixed + attention(*from_source(rows), rows)
        return out
    added = [(rows, attention(*from_source(rows), rows)) for rows in edited] if edit.matrix is not None else []
    for rows in edited:
        v[rows] *= factors[:, None]
    out = attention(q, k, v, everything)
    for rows, more in added:
        out[rows] += more
    return out


def maps(q, k, heads):
    """Explicit attention maps `softmax(q k^T / sqrt(d))`, float32 [B, heads, queries, keys]: for losses on cross-attention."""
    q, k = (rearrange(t.float(), "b n (h d) -> b h n d", h=heads) for t in (q, k))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def shares(q, k, heads, columns, attention):
    """Cross-attention summed over groups of tokens, mean over heads, [B, queries, G].

    Args:
        columns: [tokens, G].
        attention: the model's own, `(q, k, v) -> out`; its values pick what is summed, as many groups at once as a head
            is wide.
    """

    def some(columns):
        empty = q.shape[-1] // heads - columns.shape[1]  # the rest of a head's width
        values = torch.nn.functional.pad(columns.to(q), (0, empty))
        values = repeat(values, "tokens width -> b tokens (heads width)", b=len(q), heads=heads)
        out = rearrange(attention(q, k[:, : len(columns)], values), "b n (heads width) -> b n heads width", heads=heads)
        return out[..., : columns.shape[1]].mean(2)

    return torch.cat([some(part) for part in columns.split(q.shape[-1] // heads, 1)], -1)


def word_maps(q, k, heads, source_columns, target_columns, edit, fetch, attention):
    """Cross-attention summed over groups of tokens, mean over heads, of source and target (the latter as edited).

    Args:
        q, k: the target's, [B, tokens, width].
        source_columns, target_columns: [prompt tokens, G], each with a G of its own.
        edit: the layer's `CrossEdit` or None.

    Returns:
        two of [B, tokens, G].
    """

    def summed(q, k, columns):
        return shares(q, k, heads, columns, attention)

    source_q, source_k = fetch("q").to(q), fetch("k").to(k)
    source = summed(source_q, source_k, source_columns)
    if edit is None:
        return source, summed(q, k, target_columns)
    target_columns = target_columns.to(q)
    parts = []
    if edit.own is not None:
        parts.append(summed(q, k, edit.own.to(q)[:, None] * target_columns))
    if edit.matrix is not None:
        parts.append(summed(source_q, source_k, edit.matrix.to(q) @ target_columns))
    return source, sum(parts)
