"""Into and out of a U-Net's cross-attention, through ComfyUI's patches: what `to_v` sees, and the attention maps."""

from collections.abc import Iterable

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import optimized_attention

from ..attention_hooks.attend import maps as attention_maps
from .methods.style_diffusion import modulate


class ValuePatch:
    """attn2 patch: `to_v` sees the positive's words by scale and shift; keys and other prompts keep theirs.

    Args:
        uuids: of the conditionings (ComfyUI's `cond["uuid"]`) whose rows are meant.

    Attributes:
        value: [B or 1, 2, tokens, width] of `style_diffusion`; None changes nothing.
    """

    def __init__(self, uuids: Iterable):
        self.uuids, self.value = set(uuids), None

    def install(self, options: dict):
        """Put it first in a run's own `model_options`: patches of other packs may change the result further."""
        patches = options.setdefault("transformer_options", {}).setdefault("patches", {})
        patches["attn2_patch"] = [self, *patches.get("attn2_patch", [])]

    def __call__(self, n, context, value, extra_options):
        parts = extra_options["uuids"]
        if self.value is None or not self.uuids.intersection(parts):
            return n, context, value
        rows = value.chunk(len(parts))
        return n, context, torch.cat([modulate(v, self.value) if p in self.uuids else v for p, v in zip(parts, rows)])


class MapTap:
    """Cross-attention maps of chosen layers while `maps` is a list: [B, heads, height * width, tokens] are appended.

    Meant for predictions of one prompt alone. Under gradient checkpointing a layer runs twice: take `maps` away before
    the backward pass, but leave `on` as it was, so that the second run does what the first did.

    Args:
        options: a run's own `model_options`; the layers' attention is replaced there, or what replaces it already is
            called.
        layers: `Layer.key`s, see `attention_hooks.blocks.at_quarter_resolution`.
    """

    def __init__(self, options: dict, layers: list[tuple]):
        self.on, self.maps = False, None
        present = options.get("transformer_options", {}).get("patches_replace", {}).get("attn2", {})
        for key in layers:
            attend = self._tapped(present.get(key, present.get(key[:2])))
            comfy.model_patcher.set_model_options_patch_replace(options, attend, "attn2", *key)

    def _tapped(self, before):
        def attend(q, k, v, extra_options):
            if self.on:
                maps = attention_maps(q, k, extra_options["n_heads"])
                if self.maps is not None:
                    self.maps.append(maps)
            if before is not None:
                return before(q, k, v, extra_options)
            return optimized_attention(
                q, k, v, extra_options["n_heads"], attn_precision=extra_options.get("attn_precision"),
                transformer_options=extra_options,
            )

        return attend
