"""Attention stores made by hand, without a model."""
import torch
from comfyui_ledits.attention_hooks.store import AttentionStore, Origin


def by_hand(pictures=1, side=4, steps=(1, 2, 3, 7), dtype=torch.float32):
    """A store of random numbers, without a model."""
    g = torch.Generator().manual_seed(5)
    store = AttentionStore(origin=Origin("0123456789abcdef" * 4, "BaseModel, SD15", {
        "source": torch.randn(pictures, 7, 5, generator=g), "negative": torch.randn(1, 77, 5, generator=g)}))
    slots = {"source/attn1/input.1.0/q": (side * side, 6), "negative/attn1/output.10.0/v": (side * side, 6),
             "source/attn2/middle.0.0/k": (7, 6), "source/feature/output.4.1/h": (3, side, side)}
    for slot, shape in slots.items():
        for step in steps:
            store.add_named(f"{step}/{slot}", torch.randn(pictures, *shape, generator=g).to(dtype))
    return store


def same(a, b):
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
