"""The record on the LEDITS_PROMPTS wire."""

from dataclasses import dataclass
from typing import Any

from . import tokens
from .align import Alignment, align, kind_of
from .tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class EditPrompts:
    """Two prompts, encoded and aligned.

    Attributes:
        source, target: CONDITIONING.
        source_tokens, target_tokens: `tokens.Tokens`, whose positions are the rows of the CONDITIONING (HiDream: and,
            behind them, those of its `conditioning_llama3`).
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
        ValueError: prompts that cannot be aligned, or a text encoder that is not known.
    """
    drafts = tokens.draft(clip, source), tokens.draft(clip, target)
    kind_of(*drafts, mapping)
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (source, target)]
    before, after = (draft.fit(conditioning) for draft, conditioning in zip(drafts, encoded))
    return EditPrompts(source=encoded[0], target=encoded[1], source_tokens=before, target_tokens=after,
                       alignment=align(before, after, mapping))
