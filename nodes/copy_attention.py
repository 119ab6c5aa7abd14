"""Copy Attention: rows of the source's attention, one kind at a time."""

from comfy_api.latest import io

from ..attention_hooks.controls.copy_attention import CopyAttention
from .attention_inputs import (
    CATEGORY,
    attention_output,
    blocks_input,
    chain_input,
    chained,
    fraction_input,
    prompts_input,
    source_input,
    window,
)
from .choices import known
from .edit_inputs import finite

ROWS = {"structure (q, k)": "qk", "look (k, v)": "kv", "values (v)": "v"}
REGIONS = ("outside the mask", "inside the mask")


class CopyAttentionNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_CopyAttention",
            display_name="Copy Attention",
            category=CATEGORY,
            description="Takes rows of the picture's own attention for the edit: its structure, its look or its values, for "
            "some of the steps, in some blocks, everywhere or beside a mask. For flow models above all; chain several.",
            search_aliases=["consistedit", "kv edit", "kv sharing", "qk injection", "value injection", "keep structure",
                            "background preservation"],
            inputs=[
                io.Combo.Input("rows", options=list(ROWS), tooltip="structure: which place looks at which; shape and layout "
                               "stay, colour and material follow the prompt. look: what the places find; the look stays, "
                               "shapes follow the prompt. values: a softer look."),
                fraction_input("end_step", 0.2, "Share of the steps after which it stops. Structure needs little (0.1 to "
                               "0.3); more freezes the shape."),
                io.Combo.Input("region", options=list(REGIONS), tooltip="Where a mask is connected: whether the rows are "
                               "taken outside or inside of it."),
                prompts_input(optional=True),
                source_input(),
                io.Mask.Input("mask", optional=True, tooltip="What is to change (or, inside, to stay). Without a mask the "
                              "whole picture's rows are taken."),
                fraction_input("start_step", 0.0, "Share of the steps before it starts.", advanced=True),
                blocks_input("blocks", "all", "Where it acts."),
                chain_input(),
            ],
            outputs=attention_output(),
        )

    @classmethod
    def execute(cls, rows, end_step, region, prompts=None, source=None, mask=None, start_step=0.0, blocks="all",
                attention=None):
        known(cls, rows=rows, region=region)
        finite("The mask of Copy Attention", mask)
        if mask is not None and ((mask >= 0.5) == (region == REGIONS[0])).all():
            raise ValueError(
                f"There is nothing {region}, so no rows would be taken: look at the mask, or choose the other region."
            )
        control = CopyAttention(
            prompts=prompts,
            source=source,
            rows=ROWS[rows],
            window=window(start_step, end_step, ("start_step", "end_step")),
            blocks=blocks,
            mask=mask,
            outside=region == REGIONS[0],
        )
        return chained(attention, control)


NODES = [CopyAttentionNode]
