"""SAMPLER objects that name their phase, beside the progress and previews of ComfyUI's callback."""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a SAMPLER, as ComfyUI's guider hands it over.

    Attributes:
        guider: the running CFGGuider, whose `inner_model` and `conds` are set; called as
            `guider(y, sigma, **extra_args)`.
        sigmas: [N + 1], descending.
        extra_args: of every call: `model_options`, `seed`.
        callback: `(step, D, y, steps)`, or None.
        noise: of the shape and on the device of the latents; its numbers are not used here.
        latent_image: the encoded picture, in the model's own latent space.
        denoise_mask: or None.
        quiet: whether no bar is to be printed.
    """

    guider: CFGGuider
    sigmas: torch.Tensor
    extra_args: dict
    callback: Callable | None
    noise: torch.Tensor
    latent_image: torch.Tensor | None
    denoise_mask: torch.Tensor | None
    quiet: bool

    @property
    def model(self) -> ModelPatcher:
        return self.guider.model_patcher

    @property
    def options(self) -> dict:
        return self.extra_args["model_options"]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def device(self) -> torch.device:
        return self.noise.device

    @property
    def encoding(self) -> dict:
        """For models whose conditioning takes the picture or the mask."""
        return {"latent_image": self.latent_image, "denoise_mask": self.denoise_mask}

    def show(self, step: int, d, y, steps: int):
        """Progress and preview, where somebody looks."""
        if self.callback is not None:
            self.callback(step, d, y, steps)


class PhasedSampler(comfy.samplers.Sampler):
    """A SAMPLER that names what it is doing: "inverting 12/50". Subclasses implement `run`.

    Attributes:
        phase: what it does, in a word or two.
        on_phase: a function that displays a line of text; set it before the run.
    """

    phase = ""
    on_phase: Callable[[str], None] | None = None

    @property
    def extra_options(self) -> dict:
        """As of core's KSAMPLER, whose fields other packs read."""
        return {}

    @property
    def inpaint_options(self) -> dict:
        """As of core's KSAMPLER."""
        return {}

    def sampler_function(self, *_, **__):
        """As of core's KSAMPLER, for nodes that run a sampler's function inside one of their own.

        Raises:
            ValueError: always. Such a node changes the model or the levels on the way, which a path does not allow.
        """
        raise ValueError(
            f"{type(self).__name__} edits along a path that was made beforehand, so it cannot run inside another sampler "
            "(a node that takes a SAMPLER and gives one, such as Detail Daemon). Connect it to SamplerCustomAdvanced directly."
        )

    def tell(self, text: str):
        """Say what is being done, where somebody asked for it by `on_phase`."""
        if self.on_phase is not None:
            self.on_phase(text)

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        """ComfyUI's own interface; the latent that the run ends at."""
        return self.run(Run(
            guider=model_wrap, sigmas=sigmas, extra_args=extra_args, callback=callback, noise=noise,
            latent_image=latent_image, denoise_mask=denoise_mask, quiet=disable_pbar,
        ))

    def run(self, run: Run) -> torch.Tensor:
        raise NotImplementedError
