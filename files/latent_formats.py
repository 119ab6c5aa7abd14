"""A latent format as plain values for a file, and back. Only ComfyUI's classes and registered ones are ever made."""

import comfy.latent_formats
import torch

# Attributes in which instances of one class differ; everything else belongs to the class.
_STATE = ("scale_factor", "latent_rgb_factors", "latent_rgb_factors_bias")
_registered = {}  # classes of this pack by name, see `register`


def register(cls):
    """Let files hold latents of a class of this pack, under its name; it is made without arguments."""
    _registered[cls.__name__] = cls


def describe(latent_format):
    """Plain values from which `make` gives an equal one; None stays None.

    Raises:
        ValueError: a class of another pack, or one changed in ways that cannot be stored.
    """
    if latent_format is None:
        return None
    name = type(latent_format).__name__
    known = _classes().get(name)
    if known is not type(latent_format):
        raise ValueError(f"The latents of this model ({name}) are of a kind that cannot be stored yet.")
    fresh = known()
    changed = {k: getattr(latent_format, k) for k in _STATE if getattr(latent_format, k) != getattr(fresh, k)}
    description = {"name": name, **changed}
    if not equal(make(description), latent_format):
        raise ValueError(f"The latent format of this model ({name}) was changed in a way that cannot be stored.")
    return description


def make(description):
    """The latent format that `describe` was given.

    Raises:
        ValueError: not a description of a known class.
    """
    if description is None:
        return None
    if not isinstance(description, dict) or not isinstance(description.get("name"), str):
        raise ValueError("its latent format cannot be read")
    name = description["name"]
    if name not in _classes() or description.keys() - {"name", *_STATE}:
        raise ValueError(f"this version does not know its latent format {name[:40]!r}")
    out = _classes()[name]()
    if "scale_factor" in description:
        if not _numbers([description["scale_factor"]]) or abs(description["scale_factor"]) < 1e-6:
            raise ValueError("its latent format has an impossible scale")
        out.scale_factor = description["scale_factor"]
    if "latent_rgb_factors" in description:
        rows = description["latent_rgb_factors"]
        if not isinstance(rows, list) or len(rows) != out.latent_channels or not all(map(_colour, rows)):
            raise ValueError("its latent format has impossible preview colours")
        out.latent_rgb_factors = rows
    if "latent_rgb_factors_bias" in description:
        bias = description["latent_rgb_factors_bias"]
        if bias is not None and not _colour(bias):
            raise ValueError("its latent format has impossible preview colours")
        out.latent_rgb_factors_bias = bias
    return out


def equal(a, b):
    """Whether two latent formats do the same: one class, and equal values."""

    def same(x, y):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return torch.equal(x, y)
        return x == y or (callable(x) and callable(y))  # functions are made anew for every instance

    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    return all(same(value, vars(b)[name]) for name, value in vars(a).items())


def _classes():
    base = comfy.latent_formats.LatentFormat
    stock = {n: c for n, c in vars(comfy.latent_formats).items() if isinstance(c, type) and issubclass(c, base)}
    return stock | _registered


def _colour(value):
    return isinstance(value, list) and len(value) == 3 and _numbers(value)


def _numbers(values):
    return all(type(v) in (int, float) and -1e6 < v < 1e6 for v in values)
