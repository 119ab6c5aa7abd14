"""Joint attention edited the slow way: explicit matrices over words and picture, in every block, in float64.

Nothing of the pack is used. Where the tokens of a kind of `tiny_flow` lie is typed here anew, and calls of attention are
counted, so that no block has to say which it is.
"""
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Where:
    """Of a kind: attention calls before the first block, calls of each block ("joint", "self", "cross", "other"), where
    the picture is, and tokens of the network's own before the words.
    """

    before: int = 0
    calls: tuple = ("joint",)
    first: bool = False
    registers: int = 0
    left: int = 0  # words are padded on the left to so many
    multiple: int = 1  # words and picture are padded on the right to a multiple


KINDS = {
    "flux": Where(), "schnell": Where(), "chroma": Where(), "qwen": Where(), "lumina2": Where(before=2),
    "flux2": Where(left=512), "zimage": Where(before=2, multiple=32), "aura": Where(registers=8),
    "hunyuan": Where(before=2), "hidream": Where(first=True), "wan": Where(calls=("self", "cross")),
    "sd3": Where(),  # its first block looks at the picture alone once more
}


@dataclass
class Call:
    """One attention of a block, [rows, heads, tokens, width] in float64."""

    number: int
    site: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    image: slice
    words: torch.Tensor  # columns of the prompt's tokens, in their order, and for HiDream the second encoder's again

    def rows(self, tensor):
        return tensor[:, :, self.image]


class Explicit:
    """An `optimized_attention_override` that records the source and edits the target.

    Args:
        kind: of `tiny_flow`.
        picture: tokens of the picture.
        words: tokens of the prompt.
        edit: `(call, source call or None) -> out [rows, heads, tokens, width]`, or None to record.
        recorded: {number of the call: Call} of the source.
    """

    def __init__(self, kind, picture, words, edit=None, recorded=None):
        self.where, self.kind, self.picture, self.words, self.edit = KINDS[kind], kind, picture, words, edit
        self.calls, self.number = {} if recorded is None else recorded, 0

    def __call__(self, func, q, k, v, heads, mask=None, *args, **kwargs):
        number, self.number = self.number, self.number + 1
        by_head = kwargs.get("skip_reshape", False)
        d = q.shape[-1] if by_head else q.shape[-1] // heads
        q, k, v = (t if by_head else t.reshape(*t.shape[:2], -1, d).transpose(1, 2) for t in (q, k, v))
        dtype, (q, k, v) = q.dtype, (t.double() for t in (q, k, v))
        if self.kind == "sd3" and number == 1:
            site = "other"
        elif number < self.where.before:
            site = "other"
        else:
            site = self.where.calls[(number - self.where.before) % len(self.where.calls)]
        call = Call(number, site, q, k, v, *self._places(site, q.shape[2]))
        if site != "other" and self.edit is None:
            self.calls[number] = call
        if site == "other" or self.edit is None:
            out = softmax(q, k) @ v
        else:
            out = self.edit(call, self.calls.get(number))
        out = out.to(dtype)
        return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    def _places(self, site, tokens):
        w = self.where
        if site in ("self", "other"):
            return slice(0, self.picture), torch.arange(0)
        if site == "cross":
            return slice(0, tokens), torch.arange(self.words)
        if w.first:
            twice = torch.arange(self.words // 2, self.words)
            return slice(0, self.picture), self.picture + torch.cat([torch.arange(self.words), twice + len(twice)])
        behind = -self.picture % w.multiple
        start = tokens - self.picture - behind
        first = w.registers + (w.left - self.words if w.left else 0)
        return slice(start, start + self.picture), first + torch.arange(self.words)


def softmax(q, k):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
