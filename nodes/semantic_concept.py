"""Semantic guidance: what to push towards or away from."""

import torch
from comfy_api.latest import io

from ..attention_hooks.text import tokens
from ..files.letters import whole_letters
from ..samplers.methods.sega import MASKS, Concept
from . import sockets
from .choices import known
from .edit_inputs import finite

CATEGORY = "LEDITS/guidance"


class SemanticConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_SemanticConcept",
            display_name="Semantic Concept (SEGA)",
            category=CATEGORY,
            description="A concept that an edit pushes towards or away from, without touching the prompt "
            "(arXiv 2301.12247). Chain as many as you like.",
            search_aliases=["sega", "semantic guidance", "ledits concept", "edit prompt", "remove object", "add object"],
            inputs=[
                io.String.Input("prompt", multiline=True, default="", dynamic_prompts=True,
                                placeholder="what to add or to take away: glasses",
                                tooltip="The concept in words, such as 'smiling' or 'a red car'. Needs CLIP."),
                io.Combo.Input("direction", options=["towards", "away"],
                               tooltip="Towards adds the concept, away removes it."),
                io.Float.Input("scale", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Guidance scale: more gives more of the concept. Usual: 3 to 15."),
                io.Float.Input("threshold", default=0.95, min=0.0, max=0.999, step=0.01, round=0.001,
                               tooltip="Share of the picture left alone at each step: 0.95 changes the 5 % where the "
                               "concept is strongest. Lower it for changes of style or of the whole picture (0.5)."),
                io.Int.Input("warmup", default=2, min=0, max=1000,
                             tooltip="First step of the edit at which the concept acts. Later keeps more layout."),
                io.Int.Input("cooldown", default=0, min=0, max=1000,
                             tooltip="Step at which the concept stops acting; 0 for never."),
                io.Float.Input("momentum_scale", default=0.3, min=0.0, max=1.0, step=0.01, advanced=True,
                               tooltip="How much of the guidance of earlier steps is added. 0 is none, and cheaper "
                               "while warming up."),
                io.Float.Input("momentum_beta", default=0.6, min=0.0, max=1.0, step=0.01, advanced=True,
                               tooltip="How slowly the momentum changes."),
                io.Float.Input("weight", default=1.0, min=0.0, max=10.0, step=0.01, advanced=True,
                               tooltip="Share of this concept beside others; 0 switches it off."),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompt. Not needed with a conditioning."),
                io.Conditioning.Input("conditioning", optional=True,
                                      tooltip="The concept already encoded; replaces the prompt."),
                sockets.Concepts.Input("concepts", optional=True, tooltip="Concepts before this one."),
                io.Combo.Input("masking", options=list(MASKS), default=MASKS[0], optional=True,
                               tooltip="Where the concept acts. SEGA: the largest values of each channel. noise: the places "
                               "that it moves most (M2 of LEDITS++). attention: the places that look at its words most "
                               "(M1). attention and noise: both, as LEDITS++ does. 'threshold' says how much is left alone."),
                io.Mask.Input("mask", optional=True, tooltip="Where the concept may act at all."),
                io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                               tooltip="As warmup, as a share of the steps of the edit; the later of the two counts."),
            ],
            outputs=[sockets.Concepts.Output(display_name="concepts", tooltip="All concepts of the chain so far.")],
        )

    @classmethod
    def execute(cls, prompt, direction, scale, threshold, warmup, cooldown, momentum_scale, momentum_beta, weight,
                clip=None, conditioning=None, concepts=None, masking=MASKS[0], mask=None, start=0.0):
        known(cls, direction=direction, masking=masking)
        prompt = whole_letters(prompt)
        given = conditioning is not None
        if not given:
            if not prompt.strip():
                raise ValueError(
                    "The concept is empty: write what to push towards or away from, or connect a conditioning."
                )
            if clip is None:
                raise ValueError(
                    "The concept's words need a CLIP: connect the one your prompts use, or a conditioning."
                )
            conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        reads_attention = Concept(conditioning=None, mask=masking).reads_attention
        words = _words(None if given else clip, prompt) if reads_attention else None
        finite("The concept's mask", mask)
        concept = Concept(
            conditioning=conditioning,
            direction=1 if direction == "towards" else -1,
            scale=scale,
            threshold=threshold,
            warmup=warmup,
            cooldown=cooldown or None,
            momentum_scale=momentum_scale,
            momentum_beta=momentum_beta,
            weight=weight,
            mask=masking,
            words=words,
            area=mask,
            start=start,
        )
        return io.NodeOutput((*(concepts or ()), concept))


def _words(clip, prompt):
    """1 at the tokens of the words, float32 [tokens].

    Raises:
        ValueError: there is no CLIP or no word, or a text encoder that is not known.
    """
    its = None if clip is None else tokens.read(clip, prompt)
    if its is None or not its.words:
        raise ValueError(
            "A mask from attention needs the concept's words: write the prompt, connect the CLIP and no conditioning, or "
            "choose 'noise' or 'SEGA'."
        )
    out = torch.zeros(len(its))
    out[[position for word in its.words for position in word.positions]] = 1
    return out


NODES = [SemanticConcept]
