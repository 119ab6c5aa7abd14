"""SAMPLER objects of the inversions that learn; run them through a guider on a `gradients.differentiable` MODEL."""

import comfy.model_management
import torch
from tqdm.auto import tqdm

from ..attention_hooks.backbones.unet import layout_of
from ..attention_hooks.blocks import at_quarter_resolution
from . import attention_taps, models, other_packs
from .gradients import Predictor, as_given
from .inverters import check_caches
from .methods import ddim, null_text, style_diffusion
from .methods.families import Family
from .methods.record import Inversion, check_latent, check_sigmas
from .out_of_place import told_in_words
from .phased import PhasedSampler, Run


class _Learner(PhasedSampler):
    """Base class: a DDIM path at guidance 1, then one embedding learned after the other.

    `sample` returns `x_T`; the whole record is then in `inversion`.

    Args:
        keep: what an interruption while learning does: True gives the rest of the steps the embedding learned last
            and returns, False ends the run.
        settings: goes into the record.
    """

    method = override = None

    def __init__(self, keep=False, settings=None):
        self.keep, self.settings = keep, settings or {}
        self.inversion = None

    def run(self, run: Run) -> torch.Tensor:
        model, steps = run.model, run.steps
        family = models.family(model)
        check_sigmas(run.sigmas, family)
        check_latent(run.latent_image)
        check_caches(run.options)
        in_words = told_in_words("learning", "an inversion without learning (Direct Inversion, for example)")
        with torch.inference_mode(False), torch.no_grad(), in_words:
            predict = Predictor(run.guider, run.options)
            picture, levels = run.latent_image.clone(), run.sigmas.float().cpu().clone()
            self.prepare(predict, levels, picture)
            if other_packs.of_predictions(as_given(run.options), {}):
                _try(predict, picture, levels[[steps // 4, -2 if steps > 1 else 0]])
            progress = _Progress(run.callback, self.tell, self.method, [self.most(i) for i in range(steps)])
            latents = self._path(predict, picture, levels, family, models.scaling(model), progress)
            predict.tick = progress.tick
            learned, losses = self._learn(predict, latents, levels, family, progress, run.quiet)
        settings = self.settings | {"cfg": run.guider.cfg}
        if torch.isfinite(losses).any():
            settings["loss"] = float(losses.nanmean())
        self.inversion = Inversion(
            sigmas=levels,
            latents=latents.cpu(),
            etas=torch.zeros(steps),
            family=family.name,
            model=models.describe(model),
            method=self.method,
            settings=settings,
            overrides={self.override: learned},
            latent_format=model.model.latent_format,
        )
        return latents[0]

    def _path(self, predict: Predictor, picture, sigmas: torch.Tensor, family: Family, scaling, progress: "_Progress"):
        """The DDIM inversion at guidance 1, [N + 1, B, C, H, W]."""

        def denoise(y, sigma, i):
            d = predict("positive", y, sigma)
            progress.path(d, y)
            return d

        return ddim.invert(picture, sigmas, denoise, family=family, scaling=scaling)

    def _learn(self, predict: Predictor, latents, sigmas: torch.Tensor, family: Family, progress: "_Progress",
               disable: bool):
        """Embeddings [N, B, ...] and losses [N, B], on the CPU."""
        steps = len(sigmas) - 1
        learned, losses = [], []
        with tqdm(total=steps, disable=disable, desc=self.method) as bar:
            try:
                for value, loss, d, y in self.steps(predict, latents, sigmas, family):
                    learned.append(value.float().cpu())
                    losses.append(loss)
                    bar.set_postfix(loss=f"{loss.mean():.2e}", refresh=False)
                    bar.update()
                    progress.learned(float(loss.mean()), d, y)
            except comfy.model_management.InterruptProcessingException:
                if not self.keep:
                    raise
                self.settings = self.settings | {"learned_steps": len(learned)}
        if not learned:
            learned.append(self.start(predict, latents).float().cpu())
            losses.append(torch.full((latents.shape[1],), torch.nan))
        return torch.stack(learned + learned[-1:] * (steps - len(learned))), torch.stack(losses)


def _try(predict: Predictor, y: torch.Tensor, sigmas: torch.Tensor):
    """A prediction at the first of two levels, one at the second, and the first again, with its gradient: where other
    packs have something on the model.

    A backward pass evaluates blocks once more, so that a prediction which does not repeat has a wrong gradient.

    Raises:
        ValueError: what to remove.
    """
    words = predict.words("positive", len(y)).clone()

    def guided(sigma):
        return predict.combine(y, sigma, predict("positive", y, sigma, words), predict("negative", y, sigma))

    first, _, again = (guided(sigma) for sigma in (sigmas[0], sigmas[1], sigmas[0]))
    if not other_packs.repeats(y, predict.level(y, sigmas[0]), first, again):
        raise ValueError(f"{other_packs.NOT_REPEATED}. Nothing can be learned from that: remove it for the inversion.")
    with torch.enable_grad():
        words.requires_grad_()
        (gradient,) = torch.autograd.grad(guided(sigmas[0]).sum(), words)
    if not torch.isfinite(gradient).all():
        raise ValueError(
            "The derivative of a patch on the model is NaN or infinite (Deep Shrink with bislerp, for instance), or the model "
            "overflows in float16. Remove the patch for the inversion, or start ComfyUI with --force-fp32 or --bf16-unet."
        )


class _Progress:
    """Progress in Adam steps: one for a step of the path, and then as many as each may take.

    Args:
        callback: the run's, or None.
        tell: `(text) -> None`.
        method: goes into the text.
        most: Adam steps that each step of the path may take.
    """

    def __init__(self, callback, tell, method, most):
        self._callback, self._tell, self._method = callback, tell, method
        self._steps, self._cost = len(most), [1] * len(most) + [max(m, 1) for m in most]
        self._done = self._tries = 0  # steps finished, and evaluations of the present one
        self._shown, self._loss = (None, None), ""

    def _show(self, further=0):
        if self._callback is not None:
            self._callback(sum(self._cost[: self._done]) + further - 1, *self._shown, sum(self._cost))

    def path(self, d, y):
        """A step of the path was inverted."""
        self._done, self._shown = self._done + 1, (d, y)
        self._show()
        self._tell(f"inverting {self._done}/{self._steps}")

    def tick(self):
        """An Adam step begins."""
        self._tries, most = self._tries + 1, self._cost[self._done]
        if 1 < self._tries <= most:
            with torch.no_grad():  # a previewer has weights of its own
                self._show(self._tries - 1)
        step, tries = self._done - self._steps + 1, min(self._tries, most)
        self._tell(f"{self._method} step {step}/{self._steps}, try {tries}/{most}{self._loss}")

    def learned(self, loss, d, y):
        """A step's embedding is learned; `loss` is NaN where none was."""
        self._done, self._tries, self._shown = self._done + 1, 0, (d, y)
        self._loss = f", loss {loss:.1e}" if loss == loss else ""
        self._show()
        self._tell(f"{self._method} step {self._done - self._steps}/{self._steps}{self._loss}")


class NullTextInverter(_Learner):
    """Null-text inversion (arXiv 2211.09794): "negative" embeddings for every step.

    Args:
        inner_steps, rate, enough: see `null_text.learn`.
    """

    method, override = "null-text", "negative"

    def __init__(self, inner_steps=10, rate=1e-2, enough=1e-5, **rest):
        super().__init__(**rest)
        self.inner_steps, self.rate, self.enough = inner_steps, rate, enough

    def most(self, i):
        return self.inner_steps

    def prepare(self, predict: Predictor, sigmas: torch.Tensor, picture: torch.Tensor):
        pass

    def start(self, predict: Predictor, latents: torch.Tensor):
        return predict.words("negative", latents.shape[1])

    def steps(self, predict: Predictor, latents: torch.Tensor, sigmas: torch.Tensor, family: Family):
        return null_text.learn(
            latents, sigmas, predict, self.start(predict, latents), family=family, inner_steps=self.inner_steps,
            rate=self.rate, enough=self.enough,
        )


class StyleDiffusionInverter(_Learner):
    """StyleDiffusion (arXiv 2303.15649): a "value" of scale and shift for every step.

    Args:
        features: tokens of an image encoder for the mapping network, [B or 1, T, F]; None learns the scale and shift
            themselves.
        attention: weight of the attention loss.
        most_steps, rate, enough: see `style_diffusion.learn`.
    """

    method, override = "StyleDiffusion", "value"

    def __init__(self, features=None, attention=1.0, most_steps=100, rate=1e-2, enough=1e-5, **rest):
        super().__init__(**rest)
        self.features, self.attention = features, attention
        self.most_steps, self.rate, self.enough = most_steps, rate, enough

    def most(self, i):
        return style_diffusion.inner_steps(i, self.most_steps)

    def prepare(self, predict: Predictor, sigmas: torch.Tensor, picture: torch.Tensor):
        self._patch = attention_taps.ValuePatch(cond["uuid"] for cond in predict.conds["positive"])
        self._patch.install(predict.options)

    def start(self, predict: Predictor, latents: torch.Tensor):
        words = predict.words("positive", latents.shape[1])
        return torch.stack([torch.ones_like(words), torch.zeros_like(words)], 1)

    def steps(self, predict: Predictor, latents: torch.Tensor, sigmas: torch.Tensor, family: Family):
        words = predict.words("positive", latents.shape[1])
        if self.features is None:
            value = style_diffusion.Direct(*words.shape, words.device)
        else:
            features = self.features.clone().to(words).expand(len(words), -1, -1)
            value = style_diffusion.Mapping(features, *words.shape[1:])
        layers = at_quarter_resolution(layout_of(predict.network), tuple(latents.shape[-2:]))
        tap = attention_taps.MapTap(predict.options, layers if self.attention else ())

        def look(y, sigma, learned):
            self._patch.value = learned
            tap.on, tap.maps = True, []
            d, maps = predict("positive", y, sigma), tap.maps
            tap.maps = None
            if any(len(one) != len(y) for one in maps):
                raise ValueError(
                    "A patch on the model changes the number of rows of cross-attention (regional prompts, such as attention "
                    "couple), whose maps cannot be compared then. Remove it, or set attention_loss to 0."
                )
            return d, maps

        return style_diffusion.learn(
            latents, sigmas, predict, look, value, family=family, attention=self.attention, most=self.most_steps,
            rate=self.rate, enough=self.enough,
        )
