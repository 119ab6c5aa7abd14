"""The metrics of PIE-Bench (arXiv 2310.01506, table 1) and of StyleDiffusion (arXiv 2303.15649), of one edited picture.

    metrics = Metrics("pie-bench", Networks([folder]))
    values = metrics.measure(source, edited, mask, "a cat", "a dog")
    values["psnr_unedit_part"], metrics.missing

Two modes. "pie-bench" follows the published evaluation with its quirks, to be compared with published numbers. "plain"
measures over the pixels that count. Where they differ is said in `pixels.py` and `features.py`, and in METRICS below.
"""

import math
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from einops import rearrange

from . import features, pixels
from .networks import LPIPS, Missing

MODES = ("pie-bench", "plain")
NO_TORCHMETRICS = "Install torchmetrics into ComfyUI's Python (pip install torchmetrics)."
NO_NETWORKS = "No networks were given, and this metric needs one."


@dataclass(frozen=True)
class About:
    """A metric as tables show it.

    Attributes:
        doc: one line.
        scale: papers print the value times this; `Metrics.measure` gives it unscaled.
        heading: name with the scale, as the papers' tables print it.
        better: +1 where more is better, -1 where less is.
    """

    doc: str
    scale: float
    heading: str
    better: int


def _pixel(doc, scale, heading, better):
    """A metric of the whole picture, and its two parts."""
    parts = (
        ("", "whole picture", ""),
        ("_unedit_part", "outside the mask", " unedited"),
        ("_edit_part", "inside it", " edited"),
    )
    return {part: About(f"{doc}, {where}", scale, heading + short, better) for part, where, short in parts}


_PIXEL = {
    "structure_distance": _pixel(
        "MSE of the self-similarities of DINO ViT-B/8's last keys", 1e3, "Structure x10^3", -1
    ),
    "psnr": _pixel("peak signal-to-noise ratio, dB", 1.0, "PSNR", 1),
    "lpips": _pixel("learned perceptual distance, SqueezeNet", 1e3, "LPIPS x10^3", -1),
    "mse": _pixel("mean squared error of values 0..1", 1e4, "MSE x10^4", -1),
    "ssim": _pixel("structural similarity, Gaussian window of 1.5 px", 1e2, "SSIM x10^2", 1),
}
METRICS = {
    **{name: parts[""] for name, parts in _PIXEL.items()},
    "clip_similarity_source_image": About("100 cos of source and source prompt, CLIP ViT-L/14", 1.0, "CLIP source", 1),
    "clip_similarity_target_image": About("100 cos of edit and target prompt", 1.0, "CLIP whole", 1),
    "clip_similarity_target_image_edit_part": About("the same of the edit inside the mask", 1.0, "CLIP edited", 1),
    **{name + "_unedit_part": parts["_unedit_part"] for name, parts in _PIXEL.items()},
    **{name + "_edit_part": parts["_edit_part"] for name, parts in _PIXEL.items()},
    "ns_lpips": About("StyleDiffusion: LPIPS (AlexNet) outside the mask", 1.0, "NS-LPIPS", -1),
    "clip_score": About(
        "StyleDiffusion: CLIPScore, 2.5 cos of edit and target prompt, CLIP ViT-B/32", 1e2, "CLIPScore %", 1
    ),
}
"""Every metric by its name in the published evaluation: About."""

PUBLISHED = ("structure_distance", "psnr_unedit_part", "lpips_unedit_part", "mse_unedit_part", "ssim_unedit_part",
             "clip_similarity_source_image", "clip_similarity_target_image", "clip_similarity_target_image_edit_part")
"""The columns of the published evaluation, in its order. Its table prints all but clip_similarity_source_image."""


NEEDS = {"lpips": "squeeze", "ns_lpips": "alex"}  # LPIPS' backbones
CLIPS = {"clip_score": "clip-vit-base-patch32", "clip_similarity": "clip-vit-large-patch14"}


class Metrics:
    """Measures edited pictures.

    Args:
        mode: "pie-bench" or "plain".
        networks: `networks.Networks`, or None for the metrics that need none.
        device: where the arithmetic runs.
        jpeg: the edited picture goes through a JPEG of quality 75 first, as in the published numbers.
        names: the METRICS to measure; all of them by default. PUBLISHED alone saves more than half of the time.
    """

    def __init__(self, mode="pie-bench", networks=None, device="cpu", jpeg=False, names=tuple(METRICS)):
        if mode not in MODES:
            raise ValueError(f"There is no mode '{mode}': choose {' or '.join(MODES)}.")
        unknown = [name for name in names if name not in METRICS]
        if unknown:
            raise ValueError(f"There is no metric '{unknown[0]}': choose from {', '.join(METRICS)}.")
        self.plain, self.networks, self.device, self.jpeg = mode == "plain", networks, torch.device(device), jpeg
        self.names = tuple(names)
        self._failed = {}

    @property
    def missing(self):
        """Metrics that cannot be measured: dict name -> sentence that says why and what to do."""
        reasons = {name: self._failed.get(name) or self._reason(name) for name in self.names}
        return {name: reason for name, reason in reasons.items() if reason}

    def _reason(self, name):
        network = network_of(name)
        if network is None:
            return None if find_spec("torchmetrics") else NO_TORCHMETRICS
        return NO_NETWORKS if self.networks is None else self.networks.reason(network)

    def measure(self, source, edited, mask, source_prompt="", target_prompt=""):
        """All metrics of one picture.

        Args:
            source, edited: float32 [H, W, 3] in 0..1, numpy or torch.
            mask: float32 [H, W], 1 where the edit may change the picture.
            source_prompt, target_prompt: str; where empty, the CLIP metrics of it are None.

        Returns:
            dict name -> float; None where it cannot be measured (see `missing`), nan where its part of the picture is
            empty (the published evaluation leaves those pictures out of the mean).

        Raises:
            ValueError: pictures and mask do not fit each other.
        """
        pair = _Pair(source, edited, mask, self)
        values = {}
        with torch.inference_mode():
            for name in self.names:
                try:
                    values[name] = self._value(name, pair, source_prompt.strip(), target_prompt.strip())
                    self._failed.pop(name, None)
                except Missing as missing:
                    self._failed[name], values[name] = str(missing), None
        return values

    def _value(self, name, pair, source_prompt, target_prompt):
        reason = self._reason(name)
        if reason:
            raise Missing(reason)
        if name.startswith("clip_"):
            return self._clip(name, pair, source_prompt, target_prompt)
        base, part = name, None
        for suffix in ("_unedit_part", "_edit_part"):
            if name.endswith(suffix):
                base, part = name.removesuffix(suffix), pair.mask if suffix == "_edit_part" else 1 - pair.mask
                break
        counted = 1 - pair.mask if name == "ns_lpips" else part
        if counted is not None and not self._any(counted):
            return math.nan
        smallest = pixels.SMALLEST.get(base, 1)
        if min(pair.mask.shape) < smallest:
            raise Missing(f"It needs pictures of at least {smallest} x {smallest} pixels.")
        if base in NEEDS:
            network, device = self.networks.lpips(NEEDS[base], self.device)
            a, b, part, mask = pair.on(device, part)
            if base == "ns_lpips":
                return pixels.ns_lpips(a, b, mask, self.plain, network=network)
            return pixels.lpips(a, b, part, self.plain, network=network)
        if base == "structure_distance":
            network, device = self.networks.dino(self.device)
            a, b, part, _ = pair.on(device, part)
            return features.structure_distance(a, b, part, self.plain, dino=network)
        a, b, part, _ = pair.on(self.device, part)
        return getattr(pixels, base)(a, b, part, self.plain)

    def _clip(self, name, pair, source_prompt, target_prompt):
        words = source_prompt if name == "clip_similarity_source_image" else target_prompt
        if not words:
            return None
        if name.endswith("_edit_part") and not self._any(pair.mask):
            return math.nan
        clip, device = self.networks.clip(network_of(name), self.device)
        picture = pair.bytes["source" if name == "clip_similarity_source_image" else "edited"].to(device)
        if name == "clip_score":
            return features.clip_score(picture, words, clip)
        if name.endswith("_edit_part"):
            picture = features.edited_part(picture, pair.mask.to(device), self.plain)
        return features.clip_similarity(picture, words, clip)

    def _any(self, part):
        """Whether there is something to measure: any weight at all, or in plain mode a pixel that counts."""
        return bool((part > 0.5).any() if self.plain else part.sum() > 0)


def network_of(name):
    """Which of `networks.NETWORKS` a metric needs, or None."""
    if name.startswith("structure_distance"):
        return "dino-vitb8"
    if "lpips" in name:
        return LPIPS[NEEDS["ns_lpips" if name == "ns_lpips" else "lpips"]]
    return next((clip for start, clip in CLIPS.items() if name.startswith(start)), None)


class _Pair:
    """Source and edit as they are measured.

    Attributes:
        bytes: dict "source", "edited" -> uint8 [3, H, W].
        mask: float [H, W].
    """

    def __init__(self, source, edited, mask, metrics):
        source, edited, self.mask = (torch.as_tensor(x).detach().float().cpu() for x in (source, edited, mask))
        fit = edited.shape == source.shape and self.mask.shape == source.shape[:2]
        if source.ndim != 3 or source.shape[2] != 3 or not fit:
            raise ValueError(f"The source is {list(source.shape)}, the edit {list(edited.shape)} and the mask "
                             f"{list(self.mask.shape)}: they have to be [H, W, 3], [H, W, 3] and [H, W] of one size.")
        self.mask = self.mask.clamp(0, 1)
        a, b = pixels.to_bytes(source), pixels.to_bytes(edited)
        b = pixels.through_jpeg(b) if metrics.jpeg else b
        self.bytes = {"source": _first(a), "edited": _first(b)}
        self._floats = _first(a) / 255, _first(b) / 255
        if metrics.plain:  # unrounded, unless a file rounds
            source, edited = (rearrange(x.clamp(0, 1), "h w c -> c h w") for x in (source, edited))
            self._floats = source, self._floats[1] if metrics.jpeg else edited

    def on(self, device, part):
        """Source, edit [3, H, W] in 0..1, part (or None) and mask [H, W], all on a device."""
        source, edited = self._floats
        source, edited = source.contiguous(), edited.contiguous()
        return source.to(device), edited.to(device), None if part is None else part.to(device), self.mask.to(device)


def _first(values):
    """numpy [H, W, 3] to torch [3, H, W]."""
    return rearrange(torch.from_numpy(values.copy()), "h w c -> c h w")
