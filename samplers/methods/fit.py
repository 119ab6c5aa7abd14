"""The inner loop of inversions that learn: a few steps of Adam on the embeddings of one noise level."""

import torch

# Gradients of a mean over a latent are too small for a float16 network; powers of two change nothing in float32.
_LOSS_SCALE = 2.0**14


def learning_rate(i, rate=1e-2):
    """Learning rate of step i of the path, `rate * (1 - i / 100)` (code of arXiv 2211.09794), a tenth at the least.

    The papers run 30 or 50 steps; without its floor, the formula ends at 0 and below from 100 steps on.
    """
    return rate * max(1 - i / 100, 0.1)


def good_enough(i, first=1e-5, rise=2e-5):
    """Loss below which step i of the path is left, `1e-5 + i * 2e-5` (code of arXiv 2211.09794)."""
    return first + i * rise


def fit(parameters, losses, rate, steps, enough):
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
    optimisers = [torch.optim.Adam(own, lr=rate) for own in parameters]
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


def _differentiate(parameters, losses):
    """Fill the gradients of all parameters; returns the losses [B] on the CPU."""
    leaves = [p for own in parameters for p in own]
    scale = _LOSS_SCALE
    while scale >= 1:
        with torch.enable_grad():
            loss = losses()
            if not torch.isfinite(loss).all():
                raise ValueError(
                    "The model's prediction is NaN or infinite, so nothing can be learned from it. A float16 model that "
                    "overflows is the usual cause: start ComfyUI with --force-fp32 or --bf16-unet."
                )
            gradients = torch.autograd.grad(loss.sum() * scale, leaves)
        if all(torch.isfinite(g).all() for g in gradients):
            for p, g in zip(leaves, gradients):
                p.grad = g / scale
            return loss.detach().cpu()
        scale /= 2**7
    raise ValueError(
        "The gradient through the model is NaN or infinite. A float16 model that overflows is the usual cause: start "
        "ComfyUI with --force-fp32 or --bf16-unet."
    )
