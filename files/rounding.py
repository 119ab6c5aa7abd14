"""What it costs to store an inversion in float16."""

import torch

from ..samplers.methods.record import Inversion


def rounding(inversion: Inversion, stored: dict[str, torch.Tensor]):
    """The error of storing an inversion as `stored`, predictions of the model held fixed.

    The update is linear, so the error of a replay follows `e_{i+1} = keep * e_i + (R~_i - R_i)`, `e_0 = y~_0 - y_0`.

    Args:
        stored: {"latents", "residuals", "overrides.*"}, rounded.

    Returns:
        {"path", "noise_maps", "embeddings", "picture"}, those that there are: each {"abs": largest error, "rel":
        largest error relative to the RMS of the level it is in}. "picture" is the last latent of a replay; of a path
        without noise maps, the stored picture itself.
    """
    out = {"path": _worst(stored["latents"], inversion.latents)}
    error = stored["latents"][-1].double() - inversion.latents[-1]
    if inversion.residuals is not None:
        out["noise_maps"] = _worst(stored["residuals"], inversion.residuals)
        error = stored["latents"][0].double() - inversion.latents[0]
        for i in range(inversion.steps):
            error = inversion.step(i).keep * error + (stored["residuals"][i].double() - inversion.residuals[i])
    embeddings = [_worst(stored[f"overrides.{n}"], value) for n, value in inversion.overrides.items()]
    if embeddings:
        out["embeddings"] = {key: max(e[key] for e in embeddings) for key in ("abs", "rel")}
    out["picture"] = _size(error, inversion.latents[-1])
    return out


def _worst(stored, exact):
    each = [_size(a.double() - b, b) for a, b in zip(stored, exact)]
    return {key: max(e[key] for e in each) for key in ("abs", "rel")}


def _size(error, exact):
    largest, rms = float(error.abs().max()), float(exact.double().square().mean().sqrt())
    return {"abs": largest, "rel": largest / rms if rms else 0.0}
