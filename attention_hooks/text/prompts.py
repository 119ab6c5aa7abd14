"""The record on the LEDITS_PROMPTS wire."""

from dataclasses import dataclass
from typing import Any

from . import tokens
from .align import Alignment, align
from .tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class EditPrompts:
    """Two prompts, encoded and aligned.

    Attributes:
        source, target: CONDITIONING.
        source_tokens, target_tokens: `tokens.Tokens`, whose positions are those of the CONDITIONING.
        alignment: `align.Alignment`.
    """

    source: Any
    target: Any
    source_tokens: Tokens
    target_tokens: Tokens
    alignment: Alignment


def edit_prompts(clip, source, target, mapping="auto"):
    """Encode and align two prompts with a CLIP.

    Raises:
        ValueError: prompts that cannot be aligned, or another kind of text encoder.
    """
    before, after = tokens.read(clip, source), tokens.read(clip, target)
    alignment = align(before, after, mapping)
    encoded = []
    for text, its in ((source, before), (target, after)):
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        if conditioning[0][0].shape[1] != len(its):
            raise ValueError(
                f"The text encoder gives {conditioning[0][0].shape[1]} vectors for the {len(its)} tokens of '{text}': "
                "its words cannot be told apart."
            )
        encoded.append(conditioning)
    return EditPrompts(source=encoded[0], target=encoded[1], source_tokens=before, target_tokens=after, alignment=alignment)
