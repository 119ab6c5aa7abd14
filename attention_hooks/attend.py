"""The arithmetic of edited attention, on projected q, k, v of [rows, tokens, width].

Rows come in chunks of B pictures. `attention(q, k, v, chunks)` is the model's own attention (or another pack's patch around
it) for rows of the given chunks; `fetch(branch, name)` gives the source's captured rows [B, tokens, width].
"""

import torch


def self_attention(q, k, v, edits, grid, fetch, attention):
    """Self-attention with `SelfEdit`s. q, k and v are overwritten.

    Args:
        edits: list of `SelfEdit`s for every chunk, applied in order.
        grid: height and width of the token grid.
    """
    batch, special = len(q) // len(edits), {}
    for c, own in enumerate(edits):
        rows = slice(c * batch, (c + 1) * batch)
        for edit in own:
            masks = edit.masks(grid) if edit.masks else None
            if edit.q:
                q[rows] = fetch(edit.q, "q").to(q)
            if edit.own_keys or masks is not None:
                special[c] = edit, masks
                continue
            special.pop(c, None)
            for name, tensor, branch in (("k", k, edit.k), ("v", v, edit.v)):
                if branch:
                    tensor[rows] = fetch(branch, name).to(tensor)
    everything = list(range(len(edits)))
    if not special:
        return attention(q, k, v, everything)
    out = torch.empty_like(q)
    plain = [c for c in everything if c not in special]
    if plain:
        rows = torch.cat([torch.arange(c * batch, (c + 1) * batch) for c in plain]).to(q.device)
        out[rows] = attention(q[rows], k[rows], v[rows], plain)
    for c, (edit, masks) in special.items():
        rows = slice(c * batch, (c + 1) * batch)
        keys, values = fetch(edit.k, "k").to(k), fetch(edit.v, "v").to(v)
        if masks is None:
            out[rows] = attention(q[rows], torch.cat([keys, k[rows]], 1), torch.cat([values, v[rows]], 1), [c])
            continue
        source, target = masks
        for b in range(batch):
            place, sides = slice(c * batch + b, c * batch + b + 1), []
            for inside in (True, False):
                seen = source[b].bool() == inside
                if not seen.any():  # no such region in the source: look everywhere
                    seen = torch.ones_like(seen)
                its = [(keys[b : b + 1, seen], values[b : b + 1, seen])]
                if edit.own_keys:
                    mine = target[b].bool() == inside
                    its.append((k[place][:, mine], v[place][:, mine]))
                sides.append(attention(q[place], torch.cat([x for x, _ in its], 1), torch.cat([x for _, x in its], 1), [c]))
            m = target[b].to(out)[:, None]
            out[place] = sides[0] * m + sides[1] * (1 - m)
    return out


def cross_attention(q, k, v, edited, edit, fetch, attention, patched=None):
    """Cross-attention of which some chunks follow a `CrossEdit`. q, k and v are overwritten.

    Args:
        edited: pairs (chunk number, its rows as a slice) to edit.
        patched: another pack's patch on this layer. What it adds to plain attention is kept.
    """
    everything = list(range(len(q) // (edited[0][1].stop - edited[0][1].start)))
    tokens = edit.matrix.shape[1] if edit.own is None else len(edit.own)

    def from_source(rows):
        return fetch("q").to(q), fetch("k").to(k), edit.matrix.to(v) @ v[rows, :tokens]

    if patched is None and edit.own is None and k.shape[1] == tokens == len(edit.matrix):
        for _, rows in edited:
            q[rows], k[rows], v[rows] = from_source(rows)
        return attention(q, k, v, everything)

    own = torch.zeros(tokens, device=v.device, dtype=v.dtype) if edit.own is None else edit.own.to(v)
    # A shorter prompt is repeated to the length of a longer one in the same call; tokens that others add stay.
    factors = torch.ones(k.shape[1], device=v.device, dtype=v.dtype)
    repeats = k.shape[1] // tokens if k.shape[1] % tokens == 0 else 1
    factors[: repeats * tokens] = own.repeat(repeats)

    if patched is not None:
        out = patched(q, k, v, everything)
        for c, rows in edited:
            mixed = attention(q[rows], k[rows], v[rows] * (factors[:, None] - 1), [c])
            out[rows] += mixed if edit.matrix is None else mixed + attention(*from_source(rows), [c])
        return out
    added = [(rows, attention(*from_source(rows), [c])) for c, rows in edited] if edit.matrix is not None else []
    for _, rows in edited:
        v[rows] *= factors[:, None]
    out = attention(q, k, v, everything)
    for rows, more in added:
        out[rows] += more
    return out


def maps(q, k, heads):
    """Explicit attention maps `softmax(q k^T / sqrt(d))`, float32 [B, heads, queries, keys]: for losses on cross-attention."""
    q, k = (t.float().unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


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
        parts = columns.split(q.shape[-1] // heads, 1)  # as many as a head is wide go into one attention
        return torch.cat([some(q, k, part) for part in parts], -1)

    def some(q, k, columns):
        wide = torch.zeros(len(q), len(columns), heads, q.shape[-1] // heads, device=q.device, dtype=q.dtype)
        wide[..., : columns.shape[1]] = columns.to(q)[:, None]
        out = attention(q, k[:, : len(columns)], wide.flatten(2))
        return out.unflatten(-1, (heads, -1))[..., : columns.shape[1]].mean(2)

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
