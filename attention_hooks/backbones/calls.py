"""One call of a network, as attention control sees it: which rows are whose, and the model's own attention.

Rows come in chunks, one for each conditioning, each of all pictures.
"""

import math
from collections.abc import Callable, Sequence

import torch


class NetworkCall:
    """The batch that a call of the network works on.

    Attributes:
        options: ComfyUI's `transformer_options` of the call.
        parts: of every chunk, 0 for the positive (ComfyUI's `cond_or_uncond`).
        uuids: of every chunk, the conditioning's uuid; None where ComfyUI does not tell.
        size: height and width of the latent that is evaluated, an area's where the conditioning has one.
    """

    def __init__(self, options: dict, size: tuple[int, int]):
        self.options, self.size = options, size
        self.parts, self.uuids = list(options["cond_or_uncond"]), options.get("uuids")

    def of_rows(self, rows: Sequence[int] | None, count: int) -> dict:
        """ComfyUI's options as they would be for a call of these rows alone.

        Args:
            rows: numbers of the rows, or None for all.
            count: rows of the whole call.
        """
        if rows is None:
            return self.options
        batch, shape = count // len(self.parts), self.options.get("activations_shape")
        chunks = sorted({row // batch for row in rows})
        if len(rows) == count:
            return self.options
        return self.options | {
            "cond_or_uncond": [self.parts[c] for c in chunks],
            "uuids": [self.uuids[c] for c in chunks] if self.uuids else self.uuids,
            "activations_shape": shape and [len(rows), *shape[1:]],
        }


class AttentionCall(NetworkCall):
    """One call of a layer's self- or cross-attention, on projected [rows, tokens, width].

    Args:
        model: the model's own attention, `(q, k, v, options) -> out`.
        previous: another pack's in its place, or None.

    Attributes:
        heads: of the layer.
        grid: height and width of the picture tokens of a frame.
        tokens: of the picture, of all frames.
        patched: whether another pack has a patch on the layer.
    """

    def __init__(self, options: dict, size: tuple[int, int], *, heads: int, grid: tuple[int, int], rows: int,
                 model: Callable, previous: Callable | None, frames=1):
        super().__init__(options, size)
        self._model, self._previous, self._rows = model, previous, rows
        self.patched, self.heads, self.grid, self.tokens = previous is not None, heads, grid, frames * math.prod(grid)

    def __call__(self, q, k, v, rows: Sequence[int] | None = None):
        """The model's attention, or another pack's patch around it, for some rows of the call (for all)."""
        return (self._previous or self._model)(q, k, v, self.of_rows(rows, self._rows))

    def plain(self, q, k, v, rows: Sequence[int] | None = None):
        """The model's own attention, without another pack's patch."""
        return self._model(q, k, v, self.of_rows(rows, self._rows))

    def check_rows(self, q: torch.Tensor, rows: int):
        """Refuse queries that are not the picture's places, `rows` of them.

        Raises:
            ValueError: what to do.
        """
        if len(q) != rows and q.shape[1] == self.tokens:
            raise ValueError(
                "A patch on the model changes the number of rows of attention (regional prompts, such as attention couple), "
                "so that the source's cannot be told from the target's. Bypass it while attention control is connected."
            )
        if len(q) != rows or q.shape[1] != self.tokens:
            raise ValueError(
                "A patch on the model (HyperTile or Token Merging, for instance) changes the tokens of self-attention, so "
                "the source's cannot be put in their places. Bypass it while attention control is connected."
            )


class JointCall(NetworkCall):
    """One call of a layer whose queries and keys are picture tokens and all others (words, references, padding) at once.

    Tensors are [rows, tokens, heads, width of a head].

    Args:
        k, v: of the call.
        mask: of the call, as the model gave it, or None.
        run: attention as the call would be made, `(q, k, v, mask, options, plain) -> out`.
        image: the picture's tokens.
        grid: height and width of the picture tokens of a frame.

    Attributes:
        image: the picture's tokens, a slice.
        others: how many other tokens there are.
    """

    def __init__(self, options: dict, size: tuple[int, int], *, k, v, mask, run: Callable, image: slice, grid: tuple[int, int]):
        super().__init__(options, size)
        self._k, self._v, self._mask, self._run, self.image, self.grid = k, v, mask, run, image, grid
        self.heads, self.tokens, self.others = k.shape[2], image.stop - image.start, k.shape[1] - (image.stop - image.start)

    def __call__(self, q, k, v, rows: Sequence[int] | None = None):
        """The whole call, for some rows (for all)."""
        mask = self._mask if rows is None else _of_rows(self._mask, rows)
        return self._run(q, k, v, mask, self.of_rows(rows, len(self._k)), False)

    def split(self, tensor):
        """(others, picture) of a tensor of all tokens."""
        first, last = self.image.start, self.image.stop
        return torch.cat([tensor[:, :first], tensor[:, last:]], 1), tensor[:, self.image]

    def joined(self, others, picture):
        """The tensor of all tokens."""
        first = self.image.start
        return torch.cat([others[:, :first], picture, others[:, first:]], 1)

    def picture(self, q, k, v, rows: Sequence[int], values=None, plain=False):
        """Attention of some queries to other tokens of their rows and to given tokens of a picture.

        Args:
            q: [rows, queries, heads, width]; the picture's places, or any of the others.
            k, v: of a picture, [rows, any number, heads, width].
            rows: their numbers in the call.
            values: in place of the other tokens' values.
            plain: without another pack's attention.
        """
        keys, others = self.split(self._k[rows])[0], self.split(self._v[rows])[0] if values is None else values
        mask = self._mask_of(rows, q.shape[1], k.shape[1])
        return self._run(q, torch.cat([keys, k], 1), torch.cat([others, v], 1), mask, self.of_rows(rows, len(self._k)), plain)

    def alone(self, q, k, v, rows: Sequence[int]):
        """The model's own attention of queries to keys of any kind, without mask and without another pack's attention."""
        return self._run(q, k, v, None, self.of_rows(rows, len(self._k)), True)

    def beside(self, q, rows: Sequence[int]):
        """Attention of the rows' other tokens, [rows, others, heads, width], to all of their row.

        Args:
            q: queries of all tokens of these rows.
        """
        mask = _of_rows(self._mask, rows)
        if mask is not None and mask.shape[-2] > 1:
            mask = torch.cat([mask[..., : self.image.start, :], mask[..., self.image.stop :, :]], -2)
        return self._run(self.split(q)[0], self._k[rows], self._v[rows], mask, self.of_rows(rows, len(self._k)), False)

    def check_rows(self, q: torch.Tensor, rows: int):
        """Refuse another number of rows, or fewer tokens than the picture has.

        Raises:
            ValueError: what to do.
        """
        if len(q) != rows or self.image.start < 0:
            raise ValueError(
                "A patch on the model changes the rows or tokens of its attention, so that the source's cannot be told from the "
                "target's. Bypass it while attention control is connected."
            )

    def check_words(self):
        """Refuse words that are hidden from the picture: what falls on each of them cannot be followed then.

        Raises:
            ValueError: what to do.
        """
        hidden = self._mask is not None and (~self._mask if self._mask.dtype == torch.bool else self._mask != 0).any()
        if hidden:
            raise ValueError(
                "Parts of a prompt are hidden from the picture by a mask of the text encoder, so its words cannot be followed. "
                "Leave edits and masks by words out (cross_replace_steps 0, no local blend, a concept's mask without "
                "attention), or use prompts that are encoded without padding."
            )

    def words(self, rows: Sequence[int]):
        """Keys and values of the rows' other tokens."""
        return tuple(self.split(t[rows])[0] for t in (self._k, self._v))

    def _mask_of(self, rows, queries, keys):
        """The mask for queries at the picture's places, and keys [others, a picture's].

        Raises:
            ValueError: it hides parts of the picture, and other keys than the picture's are looked up.
        """
        mask = _of_rows(self._mask, rows)
        if mask is None:
            return None
        if mask.shape[-2] > 1:
            mask = mask[..., self.image, :]
        first, last = self.image.start, self.image.stop
        others, mine = torch.cat([mask[..., :first], mask[..., last:]], -1), mask[..., self.image]
        if mine.shape[-1] != keys:
            if (mine != mine[..., :1]).any():
                raise ValueError(
                    "A mask on the model's attention (regional prompts) hides parts of the picture from others, so the "
                    "source's cannot be looked up in their places. Bypass it while attention control is connected."
                )
            mine = mine[..., :1].expand(*mine.shape[:-1], keys)
        return torch.cat([others, mine], -1)


def _of_rows(mask, rows):
    """A mask [queries, keys], or with rows (and heads) before them, for some rows."""
    return mask if mask is None or mask.ndim < 3 or len(mask) == 1 else mask[rows]
