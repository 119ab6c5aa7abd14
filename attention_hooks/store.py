"""The attention store: what the source pass captured, by step."""

import hashlib
from dataclasses import dataclass, field

import torch

from .edits import Slot, SourcePath


@dataclass(frozen=True)
class Origin:
    """The source of a kept store, which serves no other.

    Attributes:
        path: fingerprint of the path's latents and sigmas.
        model: description of the model.
        prompts: {branch: token embeddings [1 or B, tokens, width]} of the source branches.
        beside: {branch: what its conditioning gives the model beside words, in words}, for models that take guidance or
            reference pictures so.
    """

    path: str
    model: str
    prompts: dict
    beside: dict = field(default_factory=dict)

    def check(self, other: "Origin"):
        """Refuse another path, model, source prompt, guidance or reference pictures.

        Raises:
            ValueError: says which.
        """
        if self.path != other.path:
            raise ValueError(
                "This attention store was captured from another picture, or from another inversion of it. Connect the "
                "same inversion to Capture Attention and to the sampler (saved as float16 it is no longer the same)."
            )
        if self.model != other.model:
            raise ValueError(f"This attention store was captured with another model ({self.model}; here: {other.model}).")
        for branch, captured in self.prompts.items():
            if branch in other.prompts and self.beside.get(branch, "") != other.beside.get(branch, ""):
                raise ValueError(
                    f"This attention store was captured with {self.beside.get(branch) or 'no guidance'}, the edit has "
                    f"{other.beside.get(branch) or 'none'}: connect the edit's positive to Capture Attention, and capture again."
                )
            if branch in other.prompts and not _close(captured, other.prompts[branch]):
                raise ValueError(
                    f"This attention store was captured with another {'source' if branch == 'source' else 'negative'} "
                    "prompt. Capture again, or connect the same prompt."
                )


def _close(a, b):
    a, b = a.float().cpu(), b.float().cpu()
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-2 * float(a.abs().max()) + 1e-6)


def fingerprint(path: SourcePath) -> str:
    """A text that is equal for equal paths (`Inversion.latents` and `.sigmas`)."""
    digest = hashlib.sha256()
    for tensor in (path.sigmas, path.latents):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class AttentionStore:
    """Captured tensors by path step and `Slot`.

    Args:
        device, dtype: where and how tensors are kept; None keeps them as captured (the live store).
        origin: what it was captured from, for a kept store.
    """

    def __init__(self, device=None, dtype=None, origin=None):
        self.device, self.dtype, self.origin = device, dtype, origin
        self._steps = {}

    def put(self, step: int, slot: Slot, tensor: torch.Tensor):
        """Keep a copy of a tensor (never a view: a view would hold the whole batch it lies in)."""
        kept = torch.empty(tensor.shape, dtype=self.dtype or tensor.dtype, device=self.device or tensor.device)
        self._steps.setdefault(step, {})[slot] = kept.copy_(tensor)

    def get(self, step: int, slot: Slot, like: torch.Tensor) -> torch.Tensor:
        """The tensor, on the device and in the dtype of `like`."""
        return self._steps[step][slot].to(device=like.device, dtype=like.dtype)

    def has(self, step: int, slot: Slot) -> bool:
        return slot in self._steps.get(step, ())

    def shape(self, step: int, slot: Slot) -> tuple:
        """Shape of a tensor that is held."""
        return tuple(self._steps[step][slot].shape)

    def drop(self, step):
        """Forget a step."""
        self._steps.pop(step, None)

    @property
    def steps(self):
        """The path steps of which something is held, ascending."""
        return sorted(self._steps)

    @property
    def nbytes(self):
        return sum(t.nbytes for slots in self._steps.values() for t in slots.values())

    def tensors(self):
        """{name: tensor} of everything held, for a file; `add_named` reads it back."""
        return {
            "/".join([str(step), s.branch, s.site, ".".join(map(str, s.key)), s.name]): t
            for step, slots in self._steps.items()
            for s, t in slots.items()
        }

    def add_named(self, name, tensor):
        """Take in a tensor under a name made by `tensors`.

        Raises:
            ValueError: a name that no store gives.
        """
        try:
            step, branch, site, key, kind = name.split("/")
            part, number, index = key.split(".")
            self._steps.setdefault(int(step), {})[Slot(branch, site, (part, int(number), int(index)), kind)] = tensor
        except ValueError:
            raise ValueError(f"'{name}' is no tensor of an attention store.") from None
