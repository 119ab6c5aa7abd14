"""Prompts, paths and edits on the tiny flow models, with words that a test makes up."""
import comfy.samplers
import torch
from comfyui_ledits.attention_hooks.text.align import Alignment
from comfyui_ledits.attention_hooks.text.prompts import EditPrompts
from comfyui_ledits.attention_hooks.text.words import WORD, Part, Tokens, Word
from comfyui_ledits.samplers import models
from comfyui_ledits.samplers.methods.record import Inversion

from support import editing, tiny_flow

SOURCE, TARGET, NEGATIVE = 1, 2, 3  # seeds of the prompts
LEVELS = (0.8, 0.55, 0.3, 0.1)


def tokens(kind, count):
    """`Tokens` of a prompt with a word at every place."""
    count = 2 * count if kind == "hidream" else count
    words = tuple(Word(word(n), (n,)) for n in range(count))
    return Tokens(text=" ".join(w.text for w in words), ids=tuple(range(count)), kinds=(WORD,) * count, chunks=(0, count),
                  parts=(Part("all", 0, count),), words=words)


def word(n):
    """The n-th word of a made-up prompt."""
    return "w" + "abcdefghij"[n // 10] * (n >= 10) + "abcdefghij"[n % 10]


def prompts(kind, source=9, target=12, share=0.5):
    """`EditPrompts` of that many tokens, whose alignment is a made-up mix: a share of the columns the source's, the rest own."""
    a, b = tokens(kind, source), tokens(kind, target)
    g = torch.Generator().manual_seed(5)
    matrix = torch.rand(len(a), len(b), generator=g).softmax(1)
    taken = torch.arange(len(b)) < share * len(b)
    alignment = Alignment("made up", matrix * taken, (~taken).float())
    return EditPrompts(source=tiny_flow.conditioning(kind, SOURCE, source), target=tiny_flow.conditioning(kind, TARGET, target),
                       source_tokens=a, target_tokens=b, alignment=alignment)


def path(kind, batch=1, steps=2, seed=7, **size):
    """A path by hand, without residuals: the picture with noise of its own at every level."""
    model = tiny_flow.model(kind)
    picture = model.model.process_latent_in(tiny_flow.latent(kind, batch, **size)["samples"])
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    sigmas = torch.tensor(LEVELS[: steps + 1])
    latents = torch.stack([(1 - s) * picture + s * noise for s in sigmas])
    return Inversion(sigmas=sigmas, latents=latents, etas=torch.zeros(steps), family="flow", model=models.describe(model),
                     method="by hand", latent_format=model.model.latent_format)


def edit(kind, path, words, attention, cfg=1.0, tokens=12, **kwargs):
    """What the LEDITS sampler makes of it with prompts of `words`, in the model's own space."""
    negative = tiny_flow.conditioning(kind, NEGATIVE, tokens)
    return editing.run(tiny_flow.model(kind), path, words.target, negative, cfg, attention, **kwargs)[0]


def slow_edit(kind, path, conds, override, edits=()):
    """The same by a plain loop, where `override(step, name)` gives the attention of the source and of the target.

    Args:
        conds: {"source": CONDITIONING, "target": CONDITIONING}.
        edits: nothing; a place for what is done to y after a step, `(step, y) -> y`.
    """
    model, y = tiny_flow.model(kind), path.latents[0]
    encoded = {name: comfy.sampler_helpers.convert_cond(c) for name, c in conds.items()}
    with torch.inference_mode():
        inner, encoded, _ = comfy.sampler_helpers.prepare_sampling(model, y.shape, encoded, model.model_options)
        model.pre_run()
        encoded = comfy.samplers.process_conds(inner, torch.zeros_like(y), encoded, torch.device("cpu"))
        for i, (s, p) in enumerate(zip(path.sigmas, path.sigmas[1:])):
            for name, x in (("source", path.latents[i]), ("target", y)):
                options = {**model.model_options, "transformer_options": {"optimized_attention_override": override(i, name)}}
                d = comfy.samplers.calc_cond_batch(inner, [encoded[name]], x, s.repeat(len(x)), options)[0]
            y = y + (p - s) * (y - d) / s
            for change in edits:
                y = change(i, y)
    return y
