"""Shapes of tensors."""

import torch


def append_dims(values: torch.Tensor, ndim: int) -> torch.Tensor:
    """`values` with dimensions of size 1 at its end, up to `ndim`: one number for each picture, beside [B, C, H, W]."""
    return values.reshape(*values.shape, *[1] * (ndim - values.ndim))
