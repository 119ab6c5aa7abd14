"""Reads the layout of a ComfyUI U-Net."""

import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel

from ..blocks import Layer, Layout


def layout(diffusion_model, name="This model"):
    """The attention layers and residual blocks of a U-Net.

    Args:
        diffusion_model: a MODEL's `get_model_object("diffusion_model")`.
        name: of the model, for the message.

    Raises:
        ValueError: not a U-Net of the Stable Diffusion kind.
    """
    if not isinstance(diffusion_model, openaimodel.UNetModel):
        raise ValueError(
            f"{name} has no U-Net with self- and cross-attention ({type(diffusion_model).__name__}; SD3 and Flux, for "
            "example, are built otherwise). Attention control works with SD 1.x, SD 2.x, SDXL and checkpoints made "
            "from them."
        )
    layers, resblocks, level, order = [], [], 0, 0
    middle = diffusion_model.middle_block
    parts = {"input": diffusion_model.input_blocks, "middle": [] if middle is None else [middle],
             "output": diffusion_model.output_blocks}
    for part, blocks in parts.items():
        for number, block in enumerate(blocks):
            counts = {"layer": 0, "res": 0}
            for module in block:
                down = isinstance(module, openaimodel.Downsample) or getattr(module, "updown", False) and part == "input"
                up = isinstance(module, openaimodel.Upsample) or getattr(module, "updown", False) and part == "output"
                level += int(down) - int(up)
                if isinstance(module, openaimodel.ResBlock):
                    resblocks.append(Layer(part, number, counts["res"], level, module.out_channels, order))
                    counts["res"] += 1
                    order += 1
                elif isinstance(module, comfy.ldm.modules.attention.SpatialTransformer):
                    for inner in module.transformer_blocks:
                        width = inner.n_heads * inner.d_head
                        layers.append(Layer(part, number, counts["layer"], level, width, order))
                        counts["layer"] += 1
                        order += 1
    return Layout(tuple(layers), tuple(resblocks))


def resblock(diffusion_model, key):
    """The module of a `Layer.key` of `Layout.resblocks`."""
    part, number, index = key
    blocks = {"input": diffusion_model.input_blocks, "middle": [diffusion_model.middle_block],
              "output": diffusion_model.output_blocks}
    return [m for m in blocks[part][number] if isinstance(m, openaimodel.ResBlock)][index]
