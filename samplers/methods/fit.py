"""Inversions that learn: along a path, a few steps of Adam on the embeddings of every noise level."""

from collections.abc import Callable, Iterator

import torch

from .families import Family

# Gradients of a mean over a latent are too small for a float16 network; powers of two change nothing in float32.
_LOSS_SCALE = 2.0**14


def learning_rate(i: int, rate=1e-2) -> float:
    """Learning rate of step i of the path, `rate * (1 - i / 100)` (code of arXiv 2211.09794), a tenth at the least.

    The papers run 30 or 50 steps; without its floor, the formula ends at 0 and below from 100 steps on.
    """
    return rate * max(1 - i / 100, 0.1)


def loss_to_leave_at(i: int, first=1e-5, rise=2e-5) -> float:
    """Loss below which step i of the path is left, `1e-5 + i * 2e-5` (code of arXiv 2211.09794)."""
    return first + i * rise


def mse_vp(y: torch.Tensor, target: torch.Tensor, sigma, family: Family) -> torch.Tensor:
    """Mean squared error of each picture in variance-preserving units (Stable Diffusion's own space), [B]."""
    return (y - target).square().flatten(1).mean(1) / family.power(float(sigma))


def learn_path(latents: torch.Tensor, sigmas: torch.Tensor, *, family: Family, parameters: list, value: Callable,
               predictions: Callable, steps: Callable, rate: float, enough: float) -> Iterator:
    """Learn a value for every step of a path, one step at each `next`.

    Step i starts from the value of the step before it and lowers, by Adam,

        MSE(x_{i+1}(value), x*_{i+1}) + what the method adds,   x = y / sqrt(power(sigma)),

    where x* is the stored path in variance-preserving units, the space of the papers, so that learning rate and early
    stop mean what they mean there. Then the picture moves on with the value learned.

    Args:
        latents, sigmas: the path, [N + 1, B, C, H, W] and [N + 1].
        family: of the model.
        parameters: see `fit`.
        value: `() -> [B, ...]`, made of the parameters.
        predictions: `(y, i) -> (value -> D, loss to add)`; what does not depend on the value is predicted once.
        steps: `i -> ` largest number of Adam steps for step i of the path.
        rate, enough: learning rate and early stop of the first step, see `learning_rate`, `loss_to_leave_at`.

    Yields:
        for each step of the path: the value [B, ...], losses [B], D and the latent it leads to.
    """
    y = latents[0]
    for i in range(len(latents) - 1):
        c = family.step(sigmas[i], sigmas[i + 1], 0.0)
        with torch.no_grad():
            predict = predictions(y, i)

        def losses(y=y, i=i, c=c, predict=predict):
            d, more = predict(value())
            return mse_vp(c.keep * y + c.take * d, latents[i + 1], sigmas[i + 1], family) + more

        loss = fit(parameters, losses, learning_rate(i, rate), steps(i), loss_to_leave_at(i, enough))
        with torch.no_grad():
            learned = value().detach()
            d, _ = predict(learned)
            y = c.keep * y + c.take * d
        yield learned, loss, d, y


def fit(parameters: list, losses: Callable, rate: float, steps: int, enough: float) -> torch.Tensor:
    """Lower a loss by Adam, each picture of a batch on its own.

    A picture whose loss is below `enough` takes that step and then rests; the loop ends when all do (the order of the
    papers' code). Pictures do not influence each other: Adam keeps a state for each.

    Args:
        parameters: for every picture the list of its leaf tensors, requiring gradients.
        losses: `() -> [B]`, the loss of every picture at the present parameters.
        rate: learning rate.
        steps: largest number of steps; 0 learns nothing.
        enough: loss at which a picture is done.

    Returns:
        [B], the loss of every picture before its last step (NaN where `steps` is 0).

    Raises:
        ValueError: the loss is not finite, or its gradient is not at any scale.
    """
    optimisers = [torch.optim.Adam(of_picture, lr=rate) for of_picture in parameters]
    last = torch.full((len(parameters),), torch.nan)
    active = torch.ones(len(parameters), dtype=torch.bool)
    for _ in range(steps):
        loss = _differentiate(parameters, losses)
        last = torch.where(active, loss, last)
        for b in active.nonzero().flatten().tolist():
            optimisers[b].step()
        active &= loss >= enough
        if not active.any():
            break
    return last


def _differentiate(parameters: list, losses: Callable) -> torch.Tensor:
    """Fill the gradients of all parameters; returns the losses [B] on the CPU."""
    leaves = [p for of_picture in parameters for p in of_picture]

    def evaluate(scale):
        with torch.enable_grad():
            loss = losses()
            if not torch.isfinite(loss).all():
                raise ValueError(
                    "The model's prediction is NaN or infinite, so nothing can be learned from it. A float16 model "
                    "that overflows is the usual cause: start ComfyUI with --force-fp32 or --bf16-unet."
                )
            return loss, torch.autograd.grad(loss.sum() * scale, leaves)

    loss, gradients = scaled_gradient(evaluate, _LOSS_SCALE)
    for p, g in zip(leaves, gradients):
        p.grad = g
    return loss.detach().cpu()


def scaled_gradient(evaluate: Callable, scale: float):
    """A gradient through a network that may be float16, whose small numbers vanish unless the loss is scaled up.

    Args:
        evaluate: `scale -> (result, gradients)` of the loss times `scale`, evaluated anew at every call.
        scale: to begin with, a power of two (which changes nothing in float32); where it overflows, smaller ones
            are tried.

    Returns:
        the result, and the gradients of the loss itself.

    Raises:
        ValueError: a gradient that is not finite at any scale.
    """
    while True:
        result, gradients = evaluate(scale)
        if all(torch.isfinite(g).all() for g in gradients):
            return result, [g / scale for g in gradients]
        if scale <= 1:
            raise ValueError(
                "The gradient through the model is NaN or infinite. A float16 model that overflows is the usual cause: "
                "start ComfyUI with --force-fp32 or --bf16-unet. Another is a patch on the model (Deep Shrink with bislerp, "
                "for instance): remove it."
            )
        scale = max(scale / 2**7, 1.0)
