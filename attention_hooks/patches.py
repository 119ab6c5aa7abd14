"""The patches of one model call: objects in its `model_options`, never on the user's model."""

import comfy.model_patcher
import comfy.patcher_extension
from comfy.ldm.modules.attention import optimized_attention

from . import unet


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
        previous: another pack's patch on the same layer, or None.
    """

    def __init__(self, work, layer, previous):
        self.work, self.layer, self.previous = work, layer, previous

    def __call__(self, q, k, v, extra):
        return self.work(self.layer, q, k, v, extra, self.previous)


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
        replaced = inner.setdefault("patches_replace", {}).setdefault(name, {})
        for layer in layers:
            previous = replaced.get(layer.key, replaced.get(layer.key[:2]))
            replaced[layer.key] = AttentionPatch(work, layer, previous)
    if features and features[0]:
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrapper = FeatureWrapper(features[1], features[0])
        comfy.patcher_extension.add_wrapper_with_key(kind, "ledits", wrapper, options, is_model_options=True)
    return options


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
