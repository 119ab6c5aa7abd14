"""Null-text inversion (arXiv 2211.09794): learn what the negative's cross-attention must see to keep the path."""

from collections.abc import Callable, Iterator

import torch

from .families import Family
from .fit import learn_path


def learn(latents: torch.Tensor, sigmas: torch.Tensor, predict: Callable, null: torch.Tensor, *, family: Family,
          inner_steps=10, rate=1e-2, enough=1e-5) -> Iterator:
    """Learn the unconditional embedding of every step (arXiv 2211.09794, algorithm 1), see `fit.learn_path`.

        D = guidance(D(source prompt), D(embedding))

    Args:
        latents, sigmas: the path, [N + 1, B, C, H, W] and [N + 1].
        predict: `(name, y, sigma, words=None) -> D` of the "positive" and the "negative", differentiable in `words`
            [B, tokens, width]; `predict.combine(y, sigma, D_p, D_u) -> D` is guidance.
        null: the embedding to start from, [B, tokens, width].
        inner_steps: largest number of Adam steps for a step of the path.
        rate, enough: see `fit.learn_path`.

    Yields:
        see `fit.learn_path`; the value is the embedding.
    """
    embeddings = [null[b : b + 1].clone().requires_grad_() for b in range(len(null))]

    def predictions(y, i):
        positive = predict("positive", y, sigmas[i])
        return lambda embedding: (
            predict.combine(y, sigmas[i], positive, predict("negative", y, sigmas[i], embedding)),
            0.0,
        )

    return learn_path(
        latents, sigmas, family=family, parameters=[[e] for e in embeddings], value=lambda: torch.cat(embeddings),
        predictions=predictions, steps=lambda i: inner_steps, rate=rate, enough=enough,
    )
