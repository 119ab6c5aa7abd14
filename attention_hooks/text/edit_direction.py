"""Edit directions in the space of prompts: from many sentences about one thing to many about another (arXiv 2302.03027, 3.1)."""

import comfy.model_management
import torch


def sentences(text):
    """The sentences of a text, one per line; empty lines do not count."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def edit_direction(clip, source, target, done=lambda: None):
    """Mean embedding of the target's sentences minus that of the source's.

    With CLIP a sentence has a multiple of 77 tokens, and the means are over the tokens that all sentences have: as a rule the
    first 77, to which longer sentences are cut. Of other text encoders all sentences must have as many.

    Args:
        clip: CLIP.
        source, target: lists of sentences.
        done: called after every sentence.

    Returns:
        float32 [1, tokens, width]; the same of the pooled output, [1, width], or None where the CLIP has none.

    Raises:
        ValueError: a list is empty, or what the sentences become cannot be compared.
    """
    if not source or not target:
        raise ValueError(
            "An edit direction needs sentences about what is there and about what shall be: write at least one, or better "
            "many, in both fields, one per line."
        )
    (a, pooled_a), (b, pooled_b) = (_mean(clip, texts, done) for texts in (source, target))
    tokens = _common(a, b, may_be_cut(clip))
    pooled = None if pooled_a is None or pooled_b is None else pooled_b - pooled_a
    return b[:, :tokens] - a[:, :tokens], pooled


def may_be_cut(clip):
    """Whether a CLIP pads all texts to a multiple of 77 tokens, so that the first ones of two texts can be compared."""
    return set(clip.tokenize("")) <= {"l", "g", "h"}


def _common(a, b, cut):
    """Number of tokens that two embeddings [1, tokens, width] have.

    Raises:
        ValueError: they have different numbers, and none may be left out.
    """
    if a.shape[1] != b.shape[1] and not cut:
        raise ValueError(
            f"This text encoder makes {a.shape[1]} and {b.shape[1]} vectors of two texts, which do not stand for the same "
            "places: there is no direction between them. Write sentences of equal length in its tokens, or use a CLIP of "
            "SD 1.x, SD 2.x or SDXL."
        )
    return min(a.shape[1], b.shape[1])


def _mean(clip, texts, done):
    total = pooled = None
    cut = may_be_cut(clip)
    for text in texts:
        comfy.model_management.throw_exception_if_processing_interrupted()
        words, more = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
        if "conditioning_llama3" in more:
            raise ValueError("Edit Direction moves one sequence of vectors; HiDream's text has two. It needs another model.")
        words, pooled_here = words.float().cpu(), more.get("pooled_output")
        pooled_here = None if pooled_here is None else pooled_here.float().cpu()
        if total is None:
            total, pooled = words, pooled_here
        else:
            tokens = _common(total, words, cut)
            total = total[:, :tokens] + words[:, :tokens]
            pooled = None if pooled_here is None or pooled is None else pooled + pooled_here
        done()
    return total / len(texts), None if pooled is None else pooled / len(texts)


def add_direction(conditioning, direction, pooled, strength=1.0, cut=True):
    """A CONDITIONING moved along a direction, every entry of it.

    Tokens that the direction does not have stay as they are; of a longer direction the first ones are used. The pooled
    output moves too, where there is one.

    Args:
        direction, pooled: see `edit_direction`.
        cut: whether the numbers of tokens may differ, see `may_be_cut`.

    Raises:
        ValueError: the CONDITIONING is another text encoder's, or has another number of tokens.
    """
    moved = []
    for words, more in conditioning:
        pooled_before = more.get("pooled_output")
        alike = pooled_before is None or pooled is None or pooled_before.shape[-1] == pooled.shape[-1]
        if words.shape[-1] != direction.shape[-1] or not alike:
            raise ValueError(
                f"The conditioning is another text encoder's: its vectors have {words.shape[-1]} numbers, this CLIP's "
                f"{direction.shape[-1]}. Encode it with the CLIP that is connected here."
            )
        tokens = _common(words, direction, cut)
        step = strength * direction[:, :tokens].to(words)
        words = torch.cat([words[:, :tokens] + step, words[:, tokens:]], 1)
        if pooled_before is not None and pooled is not None:
            more = {**more, "pooled_output": pooled_before + strength * pooled.to(pooled_before)}
        moved.append([words, dict(more)])
    return moved
