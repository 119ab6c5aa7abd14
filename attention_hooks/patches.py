"""The patches of one model call: objects in its `model_options`, never on the user's model."""

import math

import comfy.model_patcher
import comfy.patcher_extension
from comfy.ldm.modules.attention import optimized_attention

from .backbones import unet


def attention(q, k, v, extra):
    """ComfyUI's own attention, as a transformer block without patches calls it."""
    return optimized_attention(q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"], transformer_options=extra)


def of_chunks(extra, chunks, rows):
    """`extra_options` as they would be for a call of these chunks alone."""
    shape = extra.get("activations_shape")
    return extra | {
        "cond_or_uncond": [extra["cond_or_uncond"][c] for c in chunks],
        "uuids": [extra["uuids"][c] for c in chunks] if extra.get("uuids") else extra.get("uuids"),
        "activations_shape": shape and [rows, *shape[1:]],
    }


class AttentionPatch:
    """An `attn1_replace` or `attn2_replace` patch: `work(layer, q, k, v, extra, previous)`.

    Attributes:
        layers: {index in the block: layer} to work on; the block's other layers are left as they are.
        previous: another pack's patch on the same block or layer, or None.
    """

    def __init__(self, work, layers, previous):
        self.work, self.layers, self.previous = work, layers, previous

    def __call__(self, q, k, v, extra):
        layer = self.layers.get(extra["block_index"])
        if layer is None:
            return (self.previous or attention)(q, k, v, extra)
        return self.work(layer, q, k, v, extra, self.previous)


def check_tokens(q, rows, extra):
    """Refuse queries that are not the picture's places, one row for each picture and chunk.

    Raises:
        ValueError: what to do.
    """
    if len(q) != rows or q.shape[1] != math.prod(extra["activations_shape"][-2:]):
        raise ValueError(
            "A patch on the model (HyperTile or Token Merging, for instance) changes the tokens of self-attention, so "
            "the source's cannot be put in their places. Bypass it while attention control is connected."
        )


def check_caches(options):
    """Refuse what leaves out evaluations of the U-Net by itself: nothing could be captured in those.

    (LazyCache leaves out whole predictions of the sampler, which the source pass does not go through.)

    Raises:
        ValueError: what to do.
    """
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    if "easycache" in options.get("transformer_options", {}).get("wrappers", {}).get(kind, {}):
        raise ValueError(
            "EasyCache on the model leaves out evaluations, also of the source, whose attention is needed in every step. "
            "Bypass it while attention control is connected, or use LazyCache."
        )


class FeatureWrapper:
    """A DIFFUSION_MODEL wrapper that sees residual-branch outputs: `work(block, h, transformer_options)`.

    ComfyUI has no patch there (`output_block_patch` comes before the block, where the shortcut is part of the input), so
    a forward hook of the module's output layers serves, for the duration of one call of the network.
    """

    def __init__(self, work, blocks):
        self.work, self.blocks = work, blocks

    def __call__(self, executor, *args, **kwargs):
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[5]
        handles = []
        try:
            for block in self.blocks:
                module = unet.resblock(executor.class_obj, block.key).out_layers

                def hook(module, inputs, output, block=block):
                    return self.work(block, output, options)

                handles.append(module.register_forward_hook(hook))
            return executor(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def install(options, self_patches, cross_patches, features=None):
    """A copy of `model_options` with patches on transformer blocks, and a wrapper for residual blocks.

    Args:
        self_patches, cross_patches: (layers, work) for attn1 and attn2.
        features: (blocks, work), or None.
    """
    options = comfy.model_patcher.create_model_options_clone(options)
    inner = options.setdefault("transformer_options", {})
    for name, (layers, work) in (("attn1", self_patches), ("attn2", cross_patches)):
        _replace(inner.setdefault("patches_replace", {}).setdefault(name, {}), layers, work)
    if features and features[0]:
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrapper = FeatureWrapper(features[1], features[0])
        comfy.patcher_extension.add_wrapper_with_key(kind, "ledits", wrapper, options, is_model_options=True)
    return options


def _replace(replaced, layers, work):
    """Patch layers under their block's key, as most packs do.

    ComfyUI looks a layer's own key up before the block's, so a patch under it would hide those that another pack puts
    on the block for a prediction of its own (PerturbedAttentionGuidance). Only where a layer has one already, ours goes
    there.
    """
    blocks = {}
    for layer in layers:
        key = layer.key if layer.key in replaced else layer.key[:2]
        blocks.setdefault(key, {})[layer.index] = layer
    for key, own in blocks.items():
        replaced[key] = AttentionPatch(work, own, replaced.get(key))


class CondFirst:
    """A `sampler_calc_cond_batch_function` that evaluates the positive before the rest, whose edits read its maps."""

    def __init__(self, previous, evaluate):
        self.previous, self.evaluate = previous, evaluate

    def __call__(self, args):
        conds, call = args["conds"], self.previous or self.evaluate
        first = call(args | {"conds": [conds[0], *[None] * (len(conds) - 1)]})
        if all(c is None for c in conds[1:]):
            return first
        rest = call(args | {"conds": [None, *conds[1:]]})
        return [first[0], *rest[1:]]
