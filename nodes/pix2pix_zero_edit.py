"""pix2pix-zero: its attention control and edit directions."""

import comfy.utils
from comfy_api.latest import io

from ..attention_hooks.controls.pix2pix_zero import Pix2PixZero
from ..attention_hooks.text.edit_direction import add_direction, edit_direction, may_be_cut, sentences
from ..files.letters import whole_letters
from .attention_inputs import (
    CATEGORY,
    attention_output,
    blocks_input,
    chain_input,
    chained,
    fraction_input,
    prompts_input,
    source_input,
)


class Pix2PixZeroNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_Pix2PixZero",
            display_name="pix2pix-zero",
            category=CATEGORY,
            description="Keeps the picture's structure by moving the latent, before every step, to where the words "
            "look at the same places as in the source (arXiv 2302.03027). For a target made with Edit Direction.",
            search_aliases=["pix2pix zero", "cross-attention guidance", "zero-shot image to image"],
            inputs=[
                io.Float.Input("xa_guidance", default=0.1, min=0.0, max=100.0, step=0.01, round=0.001,
                               tooltip="How far the latent moves (lambda). More keeps more of the structure, too much "
                               "spoils the picture. 0.1 is the paper's for real pictures, 0.15 for generated ones."),
                source_input(),
                fraction_input("end_step", 1.0, "Share of the steps after which it stops. Every step with it costs as "
                               "much as two without.", advanced=True),
                blocks_input("blocks", "all", "Which layers' maps are compared."),
                prompts_input(optional=True),
                chain_input(),
            ],
            outputs=attention_output(),
        )

    @classmethod
    def execute(cls, xa_guidance, source=None, end_step=1.0, blocks="all", prompts=None, attention=None):
        control = Pix2PixZero(
            prompts=prompts, source=source, xa_guidance=xa_guidance, window=(0.0, end_step), blocks=blocks
        )
        return chained(attention, control)


class EditDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_EditDirection",
            display_name="Edit Direction",
            category=CATEGORY,
            description="Turns a prompt in the direction from one thing to another, found from sentences about both: "
            "the target of pix2pix-zero (arXiv 2302.03027). No target prompt has to be written.",
            search_aliases=["pix2pix zero", "embedding arithmetic", "prompt direction"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP that encoded the conditioning."),
                io.Conditioning.Input("conditioning", tooltip="What the picture shows: the source prompt."),
                io.String.Input("source_sentences", multiline=True, default="",
                                tooltip="Sentences about what is there, one per line: 'a photo of a cat', 'a cat is "
                                "asleep'. The paper takes a thousand; 20 do for most things."),
                io.String.Input("target_sentences", multiline=True, default="",
                                tooltip="Sentences about what shall be there, one per line; best the same ones with "
                                "the other word."),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05, round=0.001,
                               tooltip="How far to go. 1 is the whole way, more exaggerates, negative goes the other "
                               "way."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning",
                                            tooltip="The target prompt: positive of the sampler.")],
        )

    @classmethod
    def execute(cls, clip, conditioning, source_sentences, target_sentences, strength):
        before, after = (sentences(whole_letters(text)) for text in (source_sentences, target_sentences))
        bar = comfy.utils.ProgressBar(len(before) + len(after))
        direction, pooled = edit_direction(clip, before, after, lambda: bar.update(1))
        return io.NodeOutput(add_direction(conditioning, direction, pooled, strength, may_be_cut(clip)))


NODES = [Pix2PixZeroNode, EditDirection]
