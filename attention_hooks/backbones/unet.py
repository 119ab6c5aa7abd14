"""The U-Nets of Stable Diffusion: their layout, and how its attention and features are reached during one call.

Patches are objects in the `model_options` of one call, never on the user's model.
"""

import math

import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_patcher
import comfy.patcher_extension
from comfy.ldm.modules.attention import optimized_attention

from ..blocks import Layer, Layout


class UNet:
    """A ComfyUI U-Net as attention control sees it.

    Args:
        diffusion_model: a MODEL's `get_model_object("diffusion_model")`.
        name: of the model, for the message.

    Attributes:
        layout: its transformer blocks and residual blocks.

    Raises:
        ValueError: not a U-Net of the Stable Diffusion kind.
    """

    def __init__(self, diffusion_model, name="This model"):
        if not isinstance(diffusion_model, openaimodel.UNetModel):
            raise ValueError(
                f"{name} has no U-Net with self- and cross-attention ({type(diffusion_model).__name__}; SD3 and Flux, for "
                "example, are built otherwise). Attention control works with SD 1.x, SD 2.x, SDXL and checkpoints made "
                "from them. On other models edit with a target prompt alone (LEDITS KSampler or FlowEdit), with concepts "
                "and with a mask."
            )
        self.layout = _layout(diffusion_model)

    def install(self, options: dict, self_attention=((), None), cross_attention=((), None), features=((), None)) -> dict:
        """A copy of `model_options` with patches on transformer blocks, and a wrapper for residual blocks.

        Args:
            self_attention, cross_attention: (layers, work), `work(layer, q, k, v, call: AttentionCall) -> out` on
                projected [rows, tokens, width].
            features: (blocks, work), `work(block, h, call: NetworkCall) -> h or None` on a residual block's output
                [rows, C, h, w] before its shortcut is added; None leaves it.
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


def _layout(diffusion_model) -> Layout:
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


class NetworkCall:
    """The batch that a call of the network works on: chunks of the pictures, one for each conditioning.

    Attributes:
        parts: of every chunk, 0 for the positive (ComfyUI's `cond_or_uncond`).
        uuids: of every chunk, the conditioning's uuid; None where ComfyUI does not tell.
        size: height and width of the latent that is evaluated, an area's where the conditioning has one.
    """

    def __init__(self, options: dict):
        self.options = options
        self.parts, self.uuids = list(options["cond_or_uncond"]), options.get("uuids")
        self.size = tuple(options["original_shape"][-2:])


class AttentionCall(NetworkCall):
    """One call of a layer's attention, on projected [rows, tokens, width].

    Attributes:
        heads: of the layer.
        grid: height and width of its picture tokens.
        patched: whether another pack has a patch on the layer.
    """

    def __init__(self, options: dict, previous):
        super().__init__(options)
        self._previous, self.patched = previous, previous is not None
        self.heads, self.grid = options["n_heads"], tuple(options["activations_shape"][-2:])

    def __call__(self, q, k, v, chunks=None):
        """The model's attention, or another pack's patch around it, for rows of the given chunks (of all)."""
        return (self._previous or attention)(q, k, v, self._of(chunks, len(q)))

    def plain(self, q, k, v, chunks=None):
        """The model's own attention, without another pack's patch."""
        return attention(q, k, v, self._of(chunks, len(q)))

    def check_rows(self, q, rows: int):
        """Refuse queries that are not the picture's places, `rows` of them.

        Raises:
            ValueError: what to do.
        """
        if len(q) != rows and q.shape[1] == math.prod(self.grid):
            raise ValueError(
                "A patch on the model changes the number of rows of attention (regional prompts, such as attention couple), "
                "so that the source's cannot be told from the target's. Bypass it while attention control is connected."
            )
        if len(q) != rows or q.shape[1] != math.prod(self.grid):
            raise ValueError(
                "A patch on the model (HyperTile or Token Merging, for instance) changes the tokens of self-attention, so "
                "the source's cannot be put in their places. Bypass it while attention control is connected."
            )

    def _of(self, chunks, rows):
        """ComfyUI's `extra_options` as they would be for a call of these chunks alone."""
        extra = self.options
        if chunks is None or len(chunks) == len(self.parts):
            return extra
        shape = extra.get("activations_shape")
        return extra | {
            "cond_or_uncond": [self.parts[c] for c in chunks],
            "uuids": [self.uuids[c] for c in chunks] if self.uuids else self.uuids,
            "activations_shape": shape and [rows, *shape[1:]],
        }


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
        return self.work(layer, q, k, v, AttentionCall(extra, self.previous))


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
                    return self.work(block, output, NetworkCall(options))

                handles.append(module.register_forward_hook(hook))
            return executor(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
