"""Patches of other packs in calls that are differentiated: they were made for inference, and change tensors in place."""

import contextlib
import copy
from collections.abc import Callable

import torch

from ..attention_hooks.backbones.unet import AttentionPatch

_NO_GRADIENT = "no derivative"
# How torch names what it cannot differentiate.
_WITHOUT_DERIVATIVE = (_NO_GRADIENT, "Inference tensors cannot be saved", "Inplace update to inference tensor",
                       "inplace operation", "in-place operation", "does not require grad", "derivative for",
                       "have been used in the graph", "outside InferenceMode", "through the graph a second time")


def copies_saved():
    """A context in which what is saved for a backward pass is a copy, so that it may be changed in place later."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor)


class OutOfPlace:
    """Another pack's patch in a call that is differentiated.

    Patches change in place what they are given and what they made of it (FreeU, Normalized Attention Guidance), which
    autograd refuses; within a block under checkpointing it does not notice, and the gradient is wrong. So a patch is
    given copies, and what is saved of its own work is copied too.

    Args:
        patch: of core's `transformer_options`.
    """

    def __init__(self, patch: Callable):
        self._patch = patch

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self._patch(*args, **kwargs)
        copies = {id(a): a.clone() for a in args if isinstance(a, torch.Tensor)}  # core gives one tensor as several
        given = [copies.get(id(a), a) for a in args]
        with copies_saved():
            out = self._patch(*given, **kwargs)
        made = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, torch.Tensor)]
        if any(isinstance(a, torch.Tensor) and a.requires_grad for a in args) and not any(t.requires_grad for t in made):
            raise RuntimeError(f"{_NO_GRADIENT}: its result does not depend on what it was given.")
        return out


def out_of_place(transformer_options: dict) -> dict:
    """The "patches" and "patches_replace" of `transformer_options`, those of other packs wrapped; new dictionaries."""
    patches, replaced = (transformer_options.get(name, {}) for name in ("patches", "patches_replace"))
    return {
        "patches": {name: [_wrapped(patch) for patch in own] for name, own in patches.items()},
        "patches_replace": {name: {key: _wrapped(patch) for key, patch in own.items()} for name, own in replaced.items()},
    }


def _wrapped(patch):
    if not isinstance(patch, AttentionPatch):
        return OutOfPlace(patch)
    if patch.previous is None:
        return patch
    own = copy.copy(patch)
    own.previous = _wrapped(patch.previous)
    return own


@contextlib.contextmanager
def told_in_words(what: str, instead: str):
    """What autograd and patches say where a patch has no derivative, as a sentence for the user.

    Args:
        what: needs the derivative.
        instead: what to use in its place.

    Raises:
        ValueError: in place of such an error.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in _WITHOUT_DERIVATIVE):
            raise
        raise ValueError(
            f"A patch on the model, of another pack or GLIGEN, cannot be differentiated, which {what} needs. Remove it, or "
            f"use {instead}."
        ) from error
