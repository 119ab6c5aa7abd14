"""Negative-prompt inversion (arXiv 2305.16807): the source prompt stands where the empty one stood."""

from dataclasses import replace

import torch

from .record import Inversion

# What a CONDITIONING holds beside words and pooled words that belongs to the prompt, as text encoders give it.
BESIDE_WORDS = ("attention_mask", "conditioning_llama3", "conditioning_byt5small")
NOT_STORED = ("t5xxl_ids", "t5xxl_weights")


def with_source_as_negative(inversion: Inversion, positive, negative, share=0.0) -> Inversion:
    """The record, prescribing that an edit's negative is the source prompt: guidance then has nothing to push away from
    the picture but what the target prompt changes, and the source prompt itself gives the path back at any cfg.

    Args:
        inversion: a record without prescribed embeddings.
        positive, negative: CONDITIONING of the source prompt and of the empty one, plain prompts.
        share: 0 the source prompt, 1 the negative, between them a spherical interpolation.

    Raises:
        ValueError: a conditioning of several parts, or two of different length with `share` between 0 and 1.
    """
    if len(positive) != 1 or len(negative) != 1:
        raise ValueError(
            "Negative-Prompt Inversion needs one plain prompt as positive and one as negative: prompts combined of "
            "areas or ranges cannot stand in for each other."
        )
    (words, more), (empty, empty_more) = positive[0], negative[0]
    pairs = {"negative": (words, empty)}
    if more.get("pooled_output") is not None and empty_more.get("pooled_output") is not None:
        pairs["negative_pooled"] = (more["pooled_output"], empty_more["pooled_output"])
    chosen = {name: _between(*pair, share).detach().float().cpu() for name, pair in pairs.items()}
    chosen["negative"] = chosen["negative"][None]  # one for all steps
    chosen |= {f"negative.{key}": value.detach().float().cpu() for key, value in _beside(more, empty_more, share).items()}
    return replace(inversion, overrides={**inversion.overrides, **chosen})


def _beside(source: dict, negative: dict, share: float) -> dict:
    """What else belongs to the chosen prompt, {key: tensor} of BESIDE_WORDS."""
    there = {key for key in (*BESIDE_WORDS, *NOT_STORED) if source.get(key) is not None or negative.get(key) is not None}
    if there and share not in (0, 1):
        raise ValueError(
            "The prompts of this model are more than their words, so the source's cannot be mixed with the negative's: "
            "set interpolation to 0 or 1."
        )
    if there & set(NOT_STORED):
        raise ValueError(
            "The prompts of this model carry token numbers, which Negative-Prompt Inversion cannot put in place: use "
            "DDIM or Direct Inversion."
        )
    return {key: (source, negative)[int(share)][key] for key in there if (source, negative)[int(share)].get(key) is not None}


def _between(source, negative, share):
    if share == 0 or share == 1:
        return negative if share else source
    if source.shape[1:] != negative.shape[1:]:
        raise ValueError(
            f"The source prompt is {source.shape[1]} tokens and the negative {negative.shape[1]}: they cannot be "
            "mixed. Set interpolation to 0, or make both prompts of the same length."
        )
    return interpolate(*torch.broadcast_tensors(source, negative), share)


def interpolate(low: torch.Tensor, high: torch.Tensor, share: float) -> torch.Tensor:
    """Spherical interpolation between two embeddings, each taken as one vector: `low` at 0, `high` at 1.

    Args:
        low, high: [B, ...] of one shape.
    """
    a, b = low.flatten(1), high.flatten(1)
    cosine = (a * b).sum(1, keepdim=True) / (a.norm(dim=1, keepdim=True) * b.norm(dim=1, keepdim=True)).clamp(min=1e-12)
    angle = torch.acos(cosine.clamp(-1, 1))
    if (angle.sin() < 1e-4).any():  # (anti)parallel, where the weights below divide by zero
        return low + share * (high - low)
    one, other = torch.sin((1 - share) * angle) / angle.sin(), torch.sin(share * angle) / angle.sin()
    return (one * a + other * b).view_as(low)
