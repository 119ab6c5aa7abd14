"""The prompts of an attention edit."""

from comfy_api.latest import io

from ..attention_hooks.text.align import MAPPINGS
from ..attention_hooks.text.prompts import edit_prompts
from ..files.letters import whole_letters
from . import sockets
from .attention_inputs import CATEGORY
from .choices import known


class EditPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_EditPrompts",
            display_name="Edit Prompts",
            category=CATEGORY,
            description="What the picture shows and what it shall show, encoded, and their words matched to each other "
            "for attention control.",
            search_aliases=["prompt to prompt", "source prompt", "target prompt", "align prompts", "replace word"],
            inputs=[
                io.Clip.Input("clip", tooltip="The model's text encoder: CLIP of SD 1.x, SD 2.x or SDXL, or that of a flow "
                              "model."),
                io.String.Input("source", multiline=True, default="", dynamic_prompts=True,
                                placeholder="what the picture shows: a cat on a sofa",
                                tooltip="What the picture shows, such as 'a cat on a sofa'. The prompt to invert with. "
                                "Weights (word:1.2) and embeddings work as ever."),
                io.String.Input("target", multiline=True, default="", dynamic_prompts=True,
                                placeholder="what it is to show: a dog on a sofa",
                                tooltip="What it shall show, in the same words as far as possible, such as 'a dog on a "
                                "sofa'."),
                io.Combo.Input("mapping", options=list(MAPPINGS), default="auto", optional=True, advanced=True,
                               tooltip="How words are matched. replace: one by one, for prompts of as many words. "
                               "refine: what both have in common; new words are free. auto: replace where the numbers "
                               "of words are equal, else refine."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="source", tooltip="The source prompt, for the inversion."),
                io.Conditioning.Output(display_name="target", tooltip="The target prompt: positive of the sampler."),
                sockets.Prompts.Output(display_name="prompts", tooltip="Both, matched, for an attention control."),
            ],
        )

    @classmethod
    def execute(cls, clip, source, target, mapping="auto"):
        known(cls, mapping=mapping)
        prompts = edit_prompts(clip, whole_letters(source), whole_letters(target), mapping)
        return io.NodeOutput(prompts.source, prompts.target, prompts)


NODES = [EditPrompts]
