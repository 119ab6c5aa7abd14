"""Which text encoders a CLIP has, and which rows of its CONDITIONING each of them gives."""

from dataclasses import dataclass

import torch

from .spelled import Spelled, spelled
from .words import PAD, Part, Tokens, Word

CLIP = "clip"
# What a CLIP tokenizes for: the encoders whose rows the CONDITIONING has, in order. A single one is not listed.
LAYOUTS = {
    ("g", "l", "t5xxl"): (CLIP, "t5xxl"),  # Stable Diffusion 3
    ("g", "l", "llama", "t5xxl"): ("t5xxl", "llama"),  # HiDream
    ("l", "t5xxl"): ("t5xxl",),  # Flux
    ("l", "llama"): ("llama",),  # Hunyuan Video
}
BESIDE = "conditioning_llama3"  # HiDream's Llama rows [batch, layers, rows, width] lie beside the CONDITIONING
ZEROS_STAY = ("g", "l", "llama", "t5xxl")  # HiDream has rows of zeros for encoders that are not loaded, SD3 has none
PROMPT_START = {"gemma2_2b": "<Prompt Start>"}  # Lumina 2: a system prompt stands before it


def network(clip, key):
    """The network behind a tokenizer's key, or None where it is not loaded."""
    model = clip.cond_stage_model
    names = (key, f"clip_{key}", getattr(model, "clip", None))
    return next((found for name in names if name and (found := getattr(model, name, None)) is not None), None)


def tokenizer(clip, key):
    """The tokenizer behind a key.

    Raises:
        ValueError: it is not where ComfyUI keeps them.
    """
    for name in (key, f"clip_{key}", getattr(clip.tokenizer, "clip", None)):
        found = getattr(clip.tokenizer, name, None) if name else None
        if all(hasattr(found, part) for part in ("inv_vocab", "untokenize", "tokenize_with_weights")):
            return found
    raise ValueError(f"The tokenizer of the text encoder '{key}' is not known: its words cannot be told apart.")


def check_embeddings(clip, encoders):
    """Raises a ValueError where an embedding does not fit: ComfyUI leaves it out, and all that follows moves."""
    for key, chunks in encoders.items():
        vectors = [entry[0] for chunk in chunks for entry in chunk if not isinstance(entry[0], int)]
        if not all(torch.is_tensor(vector) for vector in vectors):
            raise ValueError("The prompt holds pictures: Edit Prompts reads words only.")
        if not vectors or (its := network(clip, key)) is None:
            continue
        width = its.transformer.get_input_embeddings().weight.shape[-1]
        for vector in vectors:
            if vector.shape[-1] != width:
                raise ValueError(
                    f"An embedding in the prompt is made for another text encoder: its vectors have {vector.shape[-1]} "
                    f"numbers, those of '{key}' {width}. Leave it out of the edited prompts."
                )


def spelled_parts(clip, encoders, text):
    """`Spelled` of every encoder whose rows the CONDITIONING has, in order.

    Args:
        clip: CLIP.
        encoders: what `clip.tokenize` makes of the text, with word ids.
        text: the prompt.

    Raises:
        ValueError: an unknown encoder or template, or none that is loaded.
    """
    keys = tuple(sorted(encoders))
    names = LAYOUTS.get(keys) or (keys if len(keys) == 1 else ())
    if not names:
        raise ValueError(
            f"Edit Prompts does not know this CLIP: how its text encoders ({', '.join(keys) or 'none'}) share the "
            "CONDITIONING is not known, so their words cannot be told apart."
        )
    parts = []
    for name in names:
        its = [key for key in (("l", "g") if name == CLIP else (name,)) if network(clip, key) is not None]
        if its:
            own = tokenizer(clip, its[0])
            template = ("", "") if CLIP in names or len(names) > 1 else _template(clip, text)
            part = spelled(name, own, encoders[its[0]], text, template, PROMPT_START.get(name))
            if len(its) > 1:
                other = spelled(name, tokenizer(clip, its[1]), encoders[its[1]], text)
                same_kinds(text, part.kinds, other.kinds)
            parts.append(part)
        elif keys == ZEROS_STAY:
            parts.append(Spelled(name, (), (), (), {}, loaded=False))
    if not any(part.loaded for part in parts):
        raise ValueError(f"None of the text encoders whose words this model sees is loaded (it tokenizes for {', '.join(keys)}).")
    return parts


def same_kinds(text, *kinds):
    """Raises a ValueError where two of CLIP's encoders, which share positions, do not have the same ones."""
    if any(other != kinds[0] for other in kinds[1:]):
        raise ValueError(
            "The two text encoders of this model split the prompt differently: an embedding in it has another number "
            f"of vectors for each, or belongs to one only. Leave it out of the edited prompts: '{text}'."
        )


def _template(clip, text):
    """What the tokenizer writes before and behind the prompt."""
    template = getattr(clip.tokenizer, "llama_template", None)
    if template is None:
        return "", ""
    opening = next((mark for mark in ("<|im_start|>", "<|start_header_id|>") if text.startswith(mark)), None)
    if opening:
        raise ValueError(f"The prompt begins with a chat template of its own ('{opening}'): write the prompt only.")
    around = template.split("{}")
    if len(around) != 2:
        raise ValueError("The text encoder's template is not known: the prompt's words cannot be told apart.")
    return tuple(part.format() for part in around)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt before it is encoded.

    Attributes:
        text: the prompt.
        parts: `Spelled`s in the order of the CONDITIONING.
    """

    text: str
    parts: tuple

    @property
    def words(self):
        """`words.Word`s, whose positions count each encoder's tokens from 0."""
        places = sorted({place for part in self.parts for place in part.words})
        return tuple(
            Word(its[0][0], tuple(row for _, rows in its for row in rows))
            for place in places
            if (its := [part.words[place] for part in self.parts if place in part.words])
        )

    def fit(self, conditioning):
        """The `words.Tokens` whose positions are the rows of a CONDITIONING.

        Args:
            conditioning: of the text; None where the encoders are CLIP's, which give a row for every token.

        Raises:
            ValueError: its rows are not the tokens, or what is left of them without the beginning of a template.
        """
        ids, kinds, chunks, parts, words = [], [], [0], [], {}
        for part, rows in zip(self.parts, self._rows(conditioning)):
            part = _without_padding(part, rows) if part.name == CLIP else part
            cut = self._cut(part, rows) if part.loaded else 0
            first = len(ids)
            ids += part.ids[cut:] if part.loaded else (0,) * rows
            kinds += part.kinds[cut:] if part.loaded else (PAD,) * rows
            chunks += [first + edge - cut for edge in part.chunks[1:]] if part.loaded else [first + rows]
            parts.append(Part(part.name, first, len(ids)))
            for place, (word, its) in part.words.items():
                words.setdefault(place, (word, []))[1].extend(first + row - cut for row in its)
        words = tuple(Word(words[place][0], tuple(words[place][1])) for place in sorted(words))
        return Tokens(
            text=self.text, ids=tuple(ids), kinds=tuple(kinds), chunks=tuple(chunks), parts=tuple(parts), words=words
        )

    def _rows(self, conditioning):
        """Number of rows of every part."""
        tokens = [len(part.ids) for part in self.parts]
        if conditioning is None:
            return tokens
        rows, more = conditioning[0][0].shape[1], conditioning[0][1]
        if BESIDE in more:
            if len(self.parts) != 2:
                raise self._unfit(rows, sum(tokens))
            return [rows, more[BESIDE].shape[-2]]
        if len(tokens) > 1 and rows != sum(tokens):
            raise self._unfit(rows, sum(tokens))
        return tokens if len(tokens) > 1 else [rows]

    def _cut(self, part, rows):
        """How many tokens of the template the encoder has cut off."""
        cut = len(part.ids) - rows
        if cut not in (0, part.opening) and not (0 < cut < part.opening and cut in part.turns):
            raise self._unfit(rows, len(part.ids))
        return cut

    def _unfit(self, rows, tokens):
        return ValueError(
            f"The text encoder gives {rows} vectors for the {tokens} tokens of '{self.text[:200]}': its words cannot be told "
            "apart."
        )


def _without_padding(part, rows):
    """A `Spelled` without the padding behind its first `rows` tokens, which an encoder may leave out (the demo flow model's)."""
    if len(part.chunks) > 2 or any(kind != PAD for kind in part.kinds[rows:]):
        return part
    return part._replace(ids=part.ids[:rows], kinds=part.kinds[:rows], chunks=(0, min(rows, len(part.ids))))
