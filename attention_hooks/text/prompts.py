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
    (encoded, before), (encoded_after, after) = (_encode(clip, text) for text in (source, target))
    encoded, alignment = (encoded, encoded_after), align(before, after, mapping)
    return EditPrompts(source=encoded[0], target=encoded[1], source_tokens=before, target_tokens=after, alignment=alignment)


def _encode(clip, text):
    """CONDITIONING of a prompt, and its `Tokens`; some encoders leave out padding at the end.

    Raises:
        ValueError: as `edit_prompts`.
    """
    its, conditioning = tokens.read(clip, text), clip.encode_from_tokens_scheduled(clip.tokenize(text))
    rows = conditioning[0][0].shape[1]
    its = its.without_padding(rows)
    if rows != len(its):
        raise ValueError(
            f"The text encoder gives {rows} vectors for the {len(its)} tokens of '{text}': its words cannot be told apart."
        )
    return conditioning, its
