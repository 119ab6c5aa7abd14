"""One call of the network on the source: what is wanted of it goes into the store."""

from collections.abc import Callable

from einops import rearrange

from .backbones.calls import AttentionCall, JointCall, NetworkCall
from .blocks import Layer
from .edits import Slot
from .store import AttentionStore


class Capture:
    """Work functions that keep what is wanted of a call at several steps.

    Rows come as [chunks, steps, B]: a chunk is a branch, by its place in `branches`.

    Args:
        wanted: pairs (path step, slots).
        store: where it is kept.
        batch: pictures.
        words: `branch -> how many words` its conditioning has.
        before: `branch -> how many tokens` come before the picture, where its positions depend on them; else None.
    """

    def __init__(self, wanted: list[tuple[int, set[Slot]]], *, store: AttentionStore, batch: int, words: Callable, before: Callable):
        self.wanted, self.store, self._words, self._before = wanted, store, words, before
        self.slots = set().union(*(slots for _, slots in wanted))
        self.branches = sorted({slot.branch for slot in self.slots}, reverse=True)
        self.rows = len(wanted) * batch  # of one branch

    def at(self, layers, site):
        """The layers at which something is wanted."""
        keys = {slot.key for slot in self.slots if slot.site == site}
        return [layer for layer in layers if layer.key in keys]

    def self_attention(self, layer: Layer, q, k, v, call: AttentionCall):
        call.check_rows(q, len(call.parts) * self.rows)
        self._keep("attn1", layer, {"q": q, "k": k, "v": v}, call)
        return call(q, k, v)

    def cross_attention(self, layer: Layer, q, k, v, call: AttentionCall):
        call.check_rows(q, len(call.parts) * self.rows)
        self._keep("attn2", layer, {"q": q, "k": k, "v": v}, call)
        return call(q, k, v)

    def joint_attention(self, layer: Layer, q, k, v, call: JointCall):
        if len(q) != len(call.parts) * self.rows or call.image.start < 0:
            raise ValueError(
                "A patch on the model changes the rows or tokens of its attention, so the source's cannot be captured. "
                "Bypass it while attention control is connected."
            )
        wanted = {slot.name for slot in self.slots if slot.key == layer.key}
        if "t" in wanted and call.masked():
            raise ValueError(
                "Parts of the source prompt are hidden from the picture by a mask of the text encoder, so its words cannot "
                "be followed. Set cross_replace_steps to 0, or use prompts that are encoded without padding."
            )
        for branch in {slot.branch for slot in self.slots}:
            there = self._before(branch)
            if there is not None and there != call.image.start:
                raise ValueError(
                    f"The model has {call.image.start} tokens before the picture where its prompt makes {there}: reference "
                    "pictures or patches change the positions. Remove them while attention control is connected."
                )
        tensors = {name: t[:, call.image].flatten(2) for name, t in (("q", q), ("k", k), ("v", v)) if name in wanted}
        if "t" in wanted:
            tensors["t"] = call.split(k)[0].flatten(2)
        self._keep("joint", layer, tensors, call)
        return call(q, k, v)

    def feature(self, block: Layer, h, call: NetworkCall):
        self._keep("feature", block, {"h": h}, call)

    def _keep(self, site, layer, tensors, call):
        for slot in self.slots:
            if slot.site != site or slot.key != layer.key or self.branches.index(slot.branch) not in call.parts:
                continue
            tensor = tensors[slot.name]
            if site == "attn2" and slot.name == "k":  # a shorter prompt is repeated to a longer one's length
                tensor = tensor[:, : self._words(slot.branch)]
            steps = rearrange(tensor, "(chunk step b) ... -> chunk step b ...", chunk=len(call.parts), step=len(self.wanted))
            for (step, slots), rows in zip(self.wanted, steps[call.parts.index(self.branches.index(slot.branch))]):
                if slot in slots:
                    self.store.put(step, slot, rows)
