"""Settings of papers, by kind of model, where they were published."""

from dataclasses import dataclass

import comfy.model_base
import comfy.supported_models
from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True, kw_only=True)
class FlowEditSettings:
    """FlowEdit (arXiv 2412.08629, appendix B, and the released code's SD3_edit.yaml and FLUX_edit.yaml).

    Attributes:
        model: what they were published for.
        steps: of the whole path.
        run: steps that the edit runs, the paper's n_max; the others at the noisy end are skipped.
        source, target: guidance of the two prompts.
        embedded: whether guidance is a number in the CONDITIONING (FluxGuidance), so that cfg stays 1.
    """

    model: str
    steps: int
    run: int
    source: float
    target: float
    embedded: bool

    def skip(self, steps: int) -> int:
        """Steps to leave out of a path of `steps`, in the published proportion."""
        return min(round(steps * (self.steps - self.run) / self.steps), steps - 1)


SD3 = FlowEditSettings(model="SD3", steps=50, run=33, source=3.5, target=13.5, embedded=False)
FLUX = FlowEditSettings(model="Flux.1-dev", steps=28, run=24, source=1.5, target=5.5, embedded=True)


def flowedit(model: ModelPatcher) -> tuple[FlowEditSettings, bool]:
    """The settings for a MODEL, and whether they were published for its kind; where not, the nearest of the two."""
    distilled = bool(model.model.model_config.unet_config.get("guidance_embed"))
    exact = type(model.model) is (comfy.model_base.Flux if distilled else comfy.model_base.SD3)  # Flux.2 is a subclass
    return (FLUX if distilled else SD3), exact


def guidance_missing(model: ModelPatcher, conditioning: list) -> bool:
    """Whether a guidance-distilled MODEL is given a prompt that carries no guidance (FluxGuidance): ComfyUI takes its own."""
    distilled = model.model.model_config.unet_config.get("guidance_embed")
    return bool(distilled) and any("guidance" not in entry[1] for entry in conditioning)


# LEDITS (arXiv 2307.00522) skips 36 % of the steps and guides with 7 to 15. On flow models, whose noise stays high for
# longer, FlowEdit's proportion for Flux.1-dev, and the guidance that core's workflows have.
_MIDDLE = {"flow": (1 - FLUX.run / FLUX.steps, 3.5)}
_LEDITS = (0.36, 7.5)


def strength(model: ModelPatcher, family: str, steps: int, value: float) -> tuple[int, float]:
    """Steps to skip and cfg for one strength of an edit, on the diagonal of figure 5 of LEDITS (arXiv 2307.00522).

        skip = 2 (1 - value) middle,  cfg = middle * 2 ** (2 value - 1)

    Args:
        family: of the path, a key of `families.FAMILIES`.
        steps: of the path.
        value: 0 (close to the picture) to 1 (close to the prompt).

    Returns:
        (skip, cfg); cfg is 1 for guidance-distilled models.
    """
    share, cfg = _MIDDLE.get(family, _LEDITS)
    skip = min(round(2 * (1 - value) * share * steps), steps - 1)
    config = model.model.model_config
    distilled = config.unet_config.get("guidance_embed") or isinstance(config, comfy.supported_models.FluxSchnell)
    return skip, 1.0 if distilled else round(cfg * 2 ** (2 * value - 1), 2)
