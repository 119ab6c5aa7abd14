"""Null-text inversion (arXiv 2211.09794): learn what the negative's cross-attention must see for the path to be kept."""

import torch

from .families import ve_step
from .fit import fit, good_enough, learning_rate


def guide(positive, negative, cfg):
    """Classifier-free guidance, `D_u + cfg * (D_p - D_u)` (arXiv 2207.12598)."""
    return negative + cfg * (positive - negative)


def optimise(latents, sigmas, positive, negative, null, combine, inner_steps=10, rate=1e-2, enough=1e-5, step=ve_step):
    """Learn the unconditional embedding of every step (arXiv 2211.09794, algorithm 1), one step at each `next`.

    Step i starts from the embedding of the step before it and lowers, by Adam,

        MSE(x_{i+1}(embedding), x*_{i+1}),   x = y / sqrt(1 + sigma^2),

    where x* is the stored path in variance-preserving units, the space of the paper, so that learning rate and early
    stop mean what they mean there. Then the picture moves on with the embedding learned.

    Args:
        latents, sigmas: the path, [N + 1, B, C, H, W] and [N + 1].
        positive: `(y [B, C, H, W], i) -> D`, prediction with the source prompt.
        negative: `(y, i, embedding [B, tokens, width]) -> D`, differentiable in `embedding`.
        null: the embedding to start from, [B, tokens, width].
        combine: `(y, i, D_p, D_u) -> D` guidance, differentiable in D_u; see `guide`.
        inner_steps: largest number of Adam steps for a step of the path.
        rate, enough: learning rate and early stop of the first step, see `fit.learning_rate`, `fit.good_enough`.
        step: step function of the model family.

    Yields:
        for each step of the path: the embedding [B, tokens, width], losses [B], D and the latent it leads to.
    """
    y = latents[0]
    words = [null[b : b + 1].clone().requires_grad_() for b in range(len(null))]
    for i in range(len(latents) - 1):
        c = step(sigmas[i], sigmas[i + 1], 0.0)
        with torch.no_grad():
            d_p = positive(y, i)

        def losses(y=y, i=i, c=c, d_p=d_p):
            d = combine(y, i, d_p, negative(y, i, torch.cat(words)))
            return mse_vp(c.keep * y + c.take * d, latents[i + 1], sigmas[i + 1])

        loss = fit([[w] for w in words], losses, learning_rate(i, rate), inner_steps, good_enough(i, enough))
        learned = torch.cat(words).detach()
        with torch.no_grad():
            d = combine(y, i, d_p, negative(y, i, learned))
            y = c.keep * y + c.take * d
        yield learned, loss, d, y


def mse_vp(y, target, sigma):
    """Mean squared error of each picture in variance-preserving units (the space of Stable Diffusion's latents), [B]."""
    return (y - target).square().flatten(1).mean(1) / (1 + float(sigma) ** 2)
