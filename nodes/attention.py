"""Attention controls: Prompt-to-Prompt, P2Plus, MasaCtrl, Plug-and-Play."""

from comfy_api.latest import io

from ..attention_hooks.controls.local_blend import LocalBlend
from ..attention_hooks.controls.masactrl import MasaCtrl
from ..attention_hooks.controls.p2p import PromptToPrompt
from ..attention_hooks.controls.pnp import PlugAndPlay
from ..attention_hooks.text import widget_text
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

BLENDS = ["blend_words", "auto"]


class _PromptToPrompt:
    """Shared by Prompt-to-Prompt and P2Plus: the inputs, and the control that is made of them."""

    @staticmethod
    def inputs(cross, self_, uncond=None):
        """The inputs, with these defaults of the three windows; None for no window of the negative's branch."""
        return [
            prompts_input(),
            fraction_input("cross_replace_steps", cross, "Share of the steps, from the first, in which words keep the "
                           "place of the source's. More keeps more. The paper uses 0.8, Direct Inversion's benchmark "
                           "0.4."),
            fraction_input("self_replace_steps", self_, "Share of the steps, from the first, in which the layout "
                           "(self-attention) is the source's. More keeps more. The paper uses 0.4, Direct Inversion's "
                           "benchmark 0.6."),
            *([] if uncond is None else [
                fraction_input("uncond_self_replace_steps", uncond, "The same for the negative's branch (tau_u). 0 is "
                               "plain Prompt-to-Prompt; the authors favour 0.5.")
            ]),
            io.String.Input("equalizer", multiline=True, default="", optional=True,
                            tooltip="Words of the target with a factor for their attention, such as 'smiling: 2, hat: "
                            "-1'. Above 1 is more, negative pushes away. Acts while cross_replace_steps do."),
            io.String.Input("blend_words", multiline=False, default="", optional=True,
                            tooltip="Local blend: words whose place may change, of either prompt, such as 'cat, dog'. "
                            "The rest of the picture stays. Empty for no blend."),
            io.String.Input("substruct_words", default="", optional=True, advanced=True,
                            tooltip="Local blend: words whose place may not change."),
            fraction_input("threshold", 0.3, "Local blend: share of a word's maximum above which a place belongs to "
                           "it.", advanced=True),
            fraction_input("start_blend", 0.2, "Local blend: share of the steps before it starts.", advanced=True),
            io.String.Input("word_steps", multiline=True, default="", optional=True, advanced=True,
                            tooltip="Words of the target with a window of their own instead of cross_replace_steps, "
                            "such as 'dog: 0.2, sofa: 0.1-0.6'."),
            fraction_input("cross_replace_start", 0.0, "Share of the steps before cross_replace_steps begins.",
                           advanced=True),
            fraction_input("self_replace_start", 0.0, "Share of the steps before self_replace_steps begins.",
                           advanced=True),
            blocks_input("self_blocks", "p2p", "Where self-attention is replaced:"),
            blocks_input("cross_blocks", "all", "Where cross-attention is edited."),
            blocks_input("blend_blocks", "words", "Which layers' maps make the local blend's mask:"),
            chain_input(),
            io.Combo.Input("local_blend", options=BLENDS, default=BLENDS[0], optional=True,
                           tooltip="blend_words: the words written there say where the picture may change, none for no "
                           "blend. auto: where none are written, the words that source and target do not share, "
                           "and the one after them."),
        ]

    @classmethod
    def execute(cls, prompts, cross_replace_steps, self_replace_steps, uncond_self_replace_steps=0.0, equalizer="",
                blend_words="", substruct_words="", threshold=0.3, start_blend=0.2, word_steps="",
                cross_replace_start=0.0, self_replace_start=0.0, self_blocks="p2p", cross_blocks="all",
                blend_blocks="words", attention=None, local_blend=BLENDS[0]):
        known(cls, local_blend=local_blend)
        blend = None
        if local_blend == BLENDS[1] or widget_text.phrases(blend_words):
            blend = LocalBlend(
                words=widget_text.phrases(blend_words),
                substruct_words=widget_text.phrases(substruct_words),
                threshold=threshold,
                substruct_threshold=threshold,
                start=start_blend,
                blocks=blend_blocks,
            )
        elif widget_text.phrases(substruct_words):
            raise ValueError("substruct_words take away from the place of blend_words: write those too.")
        control = PromptToPrompt(
            prompts=prompts,
            cross=window(cross_replace_start, cross_replace_steps, ("cross_replace_start", "cross_replace_steps")),
            words=widget_text.windows(word_steps),
            equalizer=widget_text.factors(equalizer),
            self_=window(self_replace_start, self_replace_steps, ("self_replace_start", "self_replace_steps")),
            uncond_self=(0.0, uncond_self_replace_steps),
            cross_blocks=cross_blocks,
            self_blocks=self_blocks,
            blend=blend,
        )
        control.check()
        return chained(attention, control)


class PromptToPromptNode(_PromptToPrompt, io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_PromptToPrompt",
            display_name="Prompt-to-Prompt",
            category=CATEGORY,
            description="Changes words of the prompt and keeps the picture's structure: word swap, refinement, "
            "reweighting, local blend (arXiv 2208.01626).",
            search_aliases=["p2p", "word swap", "replace word", "attention replace", "attention refine", "attention reweight"],
            inputs=cls.inputs(cross=0.8, self_=0.4),
            outputs=attention_output(),
        )


class P2PlusNode(_PromptToPrompt, io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_P2Plus",
            display_name="P2Plus",
            category=CATEGORY,
            description="Prompt-to-Prompt that also keeps the layout in the negative's branch (arXiv 2303.15649): for "
            "larger changes of structure.",
            search_aliases=["p2p plus", "stylediffusion", "prompt to prompt"],
            inputs=cls.inputs(cross=0.8, self_=0.4, uncond=0.5),
            outputs=attention_output(),
        )


class MasaCtrlNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_MasaCtrl",
            display_name="MasaCtrl",
            category=CATEGORY,
            description="Keeps the look of the picture's objects while pose, place or view follow the target prompt "
            "(arXiv 2304.08465).",
            search_aliases=["mutual self-attention", "pose change", "consistent editing"],
            inputs=[
                fraction_input("start_step", 0.08, "Share of the steps before it starts: 0.08 is the paper's 4 of 50. "
                               "Later gives the target prompt more say over the layout."),
                blocks_input("start_layer", "masactrl", "Where it acts:"),
                io.Boolean.Input("target_keys", default=False, optional=True, advanced=True,
                                 tooltip="Look up the target's own keys and values too: freer, less like the source."),
                prompts_input(optional=True, more=" Needed for source_words and target_words."),
                source_input(),
                io.Mask.Input("source_mask", optional=True, tooltip="The object in the source picture."),
                io.Mask.Input("target_mask", optional=True, tooltip="Where the object shall be."),
                io.String.Input("source_words", default="", optional=True,
                                tooltip="Words of the source prompt that name the object: masks from attention, so "
                                "that object and ground are not mixed up. Empty for no masks."),
                io.String.Input("target_words", default="", optional=True,
                                tooltip="The same of the target prompt."),
                fraction_input("threshold", 0.1, "Of the words' attention (stretched to 0..1) above which a place "
                               "belongs to the object.", advanced=True),
                fraction_input("end_step", 1.0, "Share of the steps after which it stops.", advanced=True),
                blocks_input("word_blocks", "words", "Which layers' maps make the masks:"),
                chain_input(),
            ],
            outputs=attention_output(),
        )

    @classmethod
    def execute(cls, start_step, start_layer="masactrl", target_keys=False, prompts=None, source=None, source_mask=None,
                target_mask=None, source_words="", target_words="", threshold=0.1, end_step=1.0, word_blocks="words",
                attention=None):
        finite("A mask of MasaCtrl", source_mask, target_mask)
        control = MasaCtrl(
            prompts=prompts,
            source=source,
            window=window(start_step, end_step, ("start_step", "end_step")),
            blocks=start_layer,
            own_keys=target_keys,
            source_mask=source_mask,
            target_mask=target_mask,
            source_words=widget_text.phrases(source_words),
            target_words=widget_text.phrases(target_words),
            threshold=threshold,
            map_blocks=word_blocks,
        )
        control.check()
        return chained(attention, control)


class PlugAndPlayNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_PlugAndPlay",
            display_name="Plug-and-Play",
            category=CATEGORY,
            description="Keeps the layout of the picture while everything else follows the target prompt: material, "
            "style, scenery (arXiv 2211.12572).",
            search_aliases=["pnp", "plug and play features", "style", "image to image translation"],
            inputs=[
                fraction_input("pnp_f_t", 0.8, "Share of the steps, from the first, with the source's features. More "
                               "keeps more of the layout."),
                fraction_input("pnp_attn_t", 0.5, "Share of the steps, from the first, with the source's "
                               "self-attention."),
                prompts_input(optional=True),
                source_input(),
                blocks_input("feature_blocks", "pnp_features", "Where features are injected (residual blocks):"),
                blocks_input("attention_blocks", "pnp", "Where self-attention is injected:"),
                chain_input(),
            ],
            outputs=attention_output(),
        )

    @classmethod
    def execute(cls, pnp_f_t, pnp_attn_t, prompts=None, source=None, feature_blocks="pnp_features",
                attention_blocks="pnp", attention=None):
        control = PlugAndPlay(
            prompts=prompts,
            source=source,
            features=(0.0, pnp_f_t),
            attention=(0.0, pnp_attn_t),
            feature_blocks=feature_blocks,
            attention_blocks=attention_blocks,
        )
        return chained(attention, control)


NODES = [PromptToPromptNode, P2PlusNode, MasaCtrlNode, PlugAndPlayNode]
