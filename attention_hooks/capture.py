"""One call of the network on the source: what is wanted of it goes into the store."""

from collections.abc import Callable

from einops import rearrange

from .backbones import Backbone
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
        conds: `branch -> model_conds` of its conditioning.
        backbone: of the model.
    """

    def __init__(self, wanted: list[tuple[int, set[Slot]]], *, store: AttentionStore, batch: int, conds: Callable, backbone: Backbone):
        self.wanted, self.store, self._conds, self._backbone = wanted, store, conds, backbone
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
        call.check_rows(q, len(call.parts) * self.rows)
        for part in call.parts:
            self._backbone.check(call, self._conds(self.branches[part]))
        wanted = {slot.name for slot in self.slots if slot.key == layer.key}
        if "t" in wanted:
            call.check_words()
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
                tensor = tensor[:, : self._conds(slot.branch)["c_crossattn"].cond.shape[1]]
            steps = rearrange(tensor, "(chunk step b) ... -> chunk step b ...", chunk=len(call.parts), step=len(self.wanted))
            for (step, slots), rows in zip(self.wanted, steps[call.parts.index(self.branches.index(slot.branch))]):
                if slot in slots:
                    self.store.put(step, slot, rows)
