"""The U-Nets of Stable Diffusion: their layout, and how its attention and features are reached during one call.

Patches are objects in the `model_options` of one call, never on the user's model.
"""

import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_patcher
import comfy.patcher_extension
from comfy.ldm.modules.attention import optimized_attention

from ..blocks import Layer, Layout
from .calls import AttentionCall, NetworkCall


class UNet:
    """A ComfyUI U-Net as attention control sees it.

    Args:
        model: a `BaseModel` that is `known`.

    Attributes:
        layout: its transformer blocks and residual blocks.
    """

    def __init__(self, model):
        self.layout = layout_of(model.diffusion_model)

    def frames(self, latent_frames: int) -> int:
        return latent_frames

    def install(self, options: dict, self_attention=((), None), cross_attention=((), None), features=((), None),
                joint_attention=((), None)) -> dict:
        """A copy of `model_options` with patches on transformer blocks, and a wrapper for residual blocks.

        Args:
            self_attention, cross_attention: (layers, work), `work(layer, q, k, v, call: AttentionCall) -> out` on
                projected [rows, tokens, width].
            features: (blocks, work), `work(block, h, call: NetworkCall) -> h or None` on a residual block's output
                [rows, C, h, w] before its shortcut is added; None leaves it.
            joint_attention: nothing; these networks have none.
        """
        options = comfy.model_patcher.create_model_options_clone(options)
        inner = options.setdefault("transformer_options", {})
        for name, (layers, work) in (("attn1", self_attention), ("attn2", cross_attention)):
            _replace(inner.setdefault("patches_replace", {}).setdefault(name, {}), layers, work)
        blocks, work = features
        if blocks:
            kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
            wrapper = FeatureWrapper(work, blocks)
            comfy.patcher_extension.add_wrapper_with_key(kind, "ledits", wrapper, options, is_model_options=True)
        return options


def known(model) -> bool:
    """Whether a `BaseModel`'s network is a U-Net of the Stable Diffusion kind."""
    return isinstance(model.diffusion_model, openaimodel.UNetModel)


def layout_of(diffusion_model) -> Layout:
    """The blocks of a U-Net."""
    layers, resblocks, level, order = [], [], 0, 0
    for part, blocks in _parts(diffusion_model).items():
        for number, block in enumerate(blocks):
            counts = {"layer": 0, "res": 0}
            for module in block:
                down = isinstance(module, openaimodel.Downsample) or getattr(module, "updown", False) and part == "input"
                up = isinstance(module, openaimodel.Upsample) or getattr(module, "updown", False) and part == "output"
                level += int(down) - int(up)
                if isinstance(module, openaimodel.ResBlock):
                    resblocks.append(Layer(part=part, number=number, index=counts["res"], level=level, width=module.out_channels,
                                           order=order))
                    counts["res"] += 1
                    order += 1
                elif isinstance(module, comfy.ldm.modules.attention.SpatialTransformer):
                    for inner in module.transformer_blocks:
                        width = inner.n_heads * inner.d_head
                        layers.append(Layer(part=part, number=number, index=counts["layer"], level=level, width=width,
                                            order=order))
                        counts["layer"] += 1
                        order += 1
    return Layout(tuple(layers), tuple(resblocks))


def _parts(diffusion_model):
    middle = diffusion_model.middle_block
    return {
        "input": diffusion_model.input_blocks,
        "middle": [] if middle is None else [middle],
        "output": diffusion_model.output_blocks,
    }


def _resblock(diffusion_model, key):
    """The module of a `Layer.key` of `Layout.resblocks`."""
    part, number, index = key
    return [m for m in _parts(diffusion_model)[part][number] if isinstance(m, openaimodel.ResBlock)][index]


def attention(q, k, v, extra):
    """ComfyUI's own attention, as a transformer block without patches calls it."""
    return optimized_attention(q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"], transformer_options=extra)


class AttentionPatch:
    """An `attn1_replace` or `attn2_replace` patch.

    Args:
        work: see `UNet.install`.
        layers: {index in the block: layer} to work on; the block's other layers are left as they are.
        previous: another pack's patch on the same block or layer, or None.
    """

    def __init__(self, work, layers, previous):
        self.work, self.layers, self.previous = work, layers, previous

    def __call__(self, q, k, v, extra):
        layer = self.layers.get(extra["block_index"])
        if layer is None:
            return (self.previous or attention)(q, k, v, extra)
        grid, size = (tuple(extra[name][-2:]) for name in ("activations_shape", "original_shape"))
        call = AttentionCall(extra, size, heads=extra["n_heads"], grid=grid, rows=len(q), model=attention, previous=self.previous)
        return self.work(layer, q, k, v, call)


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
    for key, by_index in blocks.items():
        replaced[key] = AttentionPatch(work, by_index, replaced.get(key))


class FeatureWrapper:
    """A DIFFUSION_MODEL wrapper that sees residual-branch outputs, see `UNet.install`.

    ComfyUI has no patch there (`output_block_patch` comes before the block, where the shortcut is part of the input), so
    a forward hook of the module's output layers serves, for the duration of one call of the network.
    """

    def __init__(self, work, blocks):
        self.work, self.blocks = work, blocks

    def __call__(self, executor, *args, **kwargs):
        # the sixth of UNetModel.forward's arguments (x, timesteps, context, y, control, transformer_options)
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[5]
        handles = []
        try:
            for block in self.blocks:
                module = _resblock(executor.class_obj, block.key).out_layers

                def hook(module, inputs, output, block=block):
                    return self.work(block, output, NetworkCall(options, tuple(options["original_shape"][-2:])))

                handles.append(module.register_forward_hook(hook))
            return executor(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
