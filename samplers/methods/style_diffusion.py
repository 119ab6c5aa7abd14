"""StyleDiffusion (arXiv 2303.15649): learn what `to_v` of the positive's cross-attention sees; keys keep the prompt.

What is learned for a step is a scale and a shift of the prompt's embedding c, the form of the paper's code:
`c~ = c * scale + shift` goes to `to_v` and c to `to_k`. A VALUE is both, [B, 2, tokens, width].
"""

import math
from collections.abc import Callable, Iterator

import torch
from einops import repeat

from .families import Family
from .fit import learn_path


def modulate(context: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`c * scale + shift` for every token.

    Args:
        context: [B, k * tokens, width]; a longer one is several chunks of a prompt, or a prompt that ComfyUI repeated
            to batch it with another, and each chunk gets the same.
        value: [B or 1, 2, tokens, width].
    """
    tokens = value.shape[2]
    if context.shape[1] % tokens or context.shape[2] != value.shape[3]:
        raise ValueError(
            f"The inversion learned {tokens} tokens of width {value.shape[3]}; this prompt has {context.shape[1]} of "
            f"width {context.shape[2]}. Invert again with a prompt of about the same length."
        )
    chunks = context.shape[1] // tokens
    scale, shift = repeat(value.to(context), "b two tokens width -> two b (chunks tokens) width", chunks=chunks)
    return context * scale + shift


class Direct:
    """Scale and shift as the parameters themselves; begins as the plain prompt."""

    def __init__(self, pictures, tokens, width, device=None):
        def leaf(number):
            return torch.full((1, tokens, width), number, device=device, requires_grad=True)

        self.parameters = [[leaf(1.0), leaf(0.0)] for _ in range(pictures)]

    def __call__(self):
        return torch.cat([torch.stack(leaves, 1) for leaves in self.parameters])


class Mapping:
    """The paper's network M_t over the tokens of an image encoder, one for each picture (arXiv 2303.15649, 3.2).

    Convolutions of size 1 along the token axis, batch norm over the features as in training:
    T -> 2 * tokens -> [2 * tokens, norm, leaky ReLU] -> 2 * tokens. Features of another width than the prompt's are
    brought to it by a learned linear map. Unlike the paper's, the network begins as the plain prompt (its last layer
    is 0, and the scale is 1 plus its output).

    Args:
        features: [B, T, F], from the image encoder.
        tokens, width: of the prompt.
        seed: of the initial weights; the same for every picture.
    """

    def __init__(self, features, tokens, width, seed=0):
        features = features.float()
        self.features = torch.nn.functional.layer_norm(features, features.shape[-1:])  # encoders end with one
        self.tokens = tokens
        self.same_width = features.shape[2] == width
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape):
            bound = shape[-1] ** -0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        t, f, c = features.shape[1], features.shape[2], 2 * tokens
        start = [uniform(c, t), torch.zeros(c, 1), uniform(c, c), torch.zeros(c, 1)]
        start += [torch.ones(c, 1), torch.zeros(c, 1), torch.zeros(c, c), torch.zeros(c, 1)]
        start += [] if self.same_width else [uniform(width, f)]
        self.parameters = [[p.to(features.device, copy=True).requires_grad_() for p in start] for _ in features]

    def __call__(self):
        out = torch.stack([self._one(x, *weights) for x, weights in zip(self.features, self.parameters)])
        scale, shift = out.split(self.tokens, 1)
        return torch.stack([1 + scale, shift], 1)

    def _one(self, x, w1, b1, w2, b2, gain, bias, w3, b3, to_width=None):
        h = w2 @ (w1 @ x + b1) + b2
        h = torch.nn.functional.layer_norm(h, h.shape[-1:]) * gain + bias  # batch norm of a batch of one
        out = w3 @ torch.nn.functional.leaky_relu(h) + b3
        return out if to_width is None else out @ to_width.T


def inner_steps(i: int, most=100) -> int:
    """Adam steps for step i of the path, `ceil(100 * exp(-0.1 * i))` (code of arXiv 2303.15649)."""
    return math.ceil(most * math.exp(-0.1 * i))


def learn(latents: torch.Tensor, sigmas: torch.Tensor, predict: Callable, look: Callable, value: Direct | Mapping, *,
          family: Family, attention=1.0, most=100, rate=1e-2, enough=1e-5) -> Iterator:
    """Learn the VALUE of every step (arXiv 2303.15649, eq. 5 to 7), see `fit.learn_path`.

        D    = guidance(D(source prompt, VALUE), D(negative))
        loss = MSE(x_{i+1}, x*_{i+1}) + attention * sum over layers of MSE(A, A*)

    A are the cross-attention maps at this step, A* those of the inversion at the same latent (the first step, which the
    inversion never evaluated, takes those of the second). Where a patch on the model changes the grid of the maps between
    the two levels (Deep Shrink), A* are those of the latent at this step's own level.

    Args:
        latents, sigmas: the path, [N + 1, B, C, H, W] and [N + 1].
        predict: `(name, y, sigma) -> D` and `predict.combine(y, sigma, D_p, D_u) -> D`, guidance.
        look: `(y, sigma, VALUE or None) -> D of the positive, maps`, differentiable in VALUE; maps are a list of
            [B, ...].
        value: `() -> VALUE`, with `parameters` for each picture; see `Direct` and `Mapping`. Goes on from step to step.
        attention: weight of the attention loss.
        most: Adam steps of the first step, see `inner_steps`.
        rate, enough: see `fit.learn_path`.

    Yields:
        see `fit.learn_path`.
    """

    def source_maps(i):
        """Of the inversion's own evaluation that led from latent i to the noisier one before it (`ddim.invert`)."""
        rescale = (family.power(sigmas[i - 1]) / family.power(sigmas[i])) ** 0.5
        return look(latents[i] * rescale, sigmas[i - 1], None)[1]

    def predictions(y, i):
        negative = predict("negative", y, sigmas[i])
        wanted = source_maps(max(i, 1)) if attention else []

        def at(learned):
            positive, maps = look(y, sigmas[i], learned)
            if any(a.shape != b.shape for a, b in zip(maps, wanted)):
                with torch.no_grad():
                    wanted[:] = look(latents[i], sigmas[i], None)[1]
                positive, maps = look(y, sigmas[i], learned)
            apart = sum((a - b).square().flatten(1).mean(1) for a, b in zip(maps, wanted))
            return predict.combine(y, sigmas[i], positive, negative), attention * apart

        return at

    return learn_path(
        latents, sigmas, family=family, parameters=value.parameters, value=value, predictions=predictions,
        steps=lambda i: inner_steps(i, most), rate=rate, enough=enough,
    )
