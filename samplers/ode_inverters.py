"""SAMPLER objects that invert along the model's ODE, and what is made of such a path."""

from dataclasses import replace

import torch
from tqdm.auto import trange

from . import models
from .inverters import AlongPath, levels_at_once
from .methods import ddim, edit_friendly, rf_inversion
from .methods.record import Inversion, check_latent, check_sigmas
from .overrides import Overrides
from .phased import Run


class DDIMInverter(AlongPath):
    """DDIM inversion, see `ddim.invert`; the path is the record's source branch, without noise maps.

    Args:
        convention, refinements, tolerance, regularise, solver: see `ddim.invert`; solver "auto" is the family's.
        shift: keep what each step was evaluated at and predicted, so that an edit with the same prompts comes back to
            the picture exactly (DirectEdit, arXiv 2605.02417): `Inversion.shifts`. For Euler in convention A and
            Uni-Inv, whose slopes belong to the level that sampling starts from.
        method, settings: go into the record.
    """

    def __init__(self, convention="A", refinements=0, tolerance=0.0, method="DDIM", settings=None, regularise=None,
                 solver="Euler", shift=False):
        if convention not in ddim.CONVENTIONS:
            raise ValueError(f"Unknown convention '{convention}': choose one of {', '.join(ddim.CONVENTIONS)}.")
        if solver not in ("auto", *ddim.SOLVERS):
            raise ValueError(f"Unknown solver '{solver}': choose one of {', '.join(ddim.SOLVERS)}.")
        self.convention, self.refinements, self.tolerance = convention, refinements, tolerance
        self.method, self.settings, self.regularise = method, settings or {}, regularise
        self.solver, self.shift = solver, shift

    def run(self, run: Run) -> torch.Tensor:
        family, picture = models.family(run.model), run.latent_image
        check_sigmas(run.sigmas, family)
        check_latent(picture)
        lowest = float(run.model.get_model_object("model_sampling").sigma_min)
        solver = family.solver if self.solver == "auto" else self.solver
        if self.shift and (solver not in ("Euler", "Uni-Inv") or (solver, self.convention) == ("Euler", "B")):
            raise ValueError(
                "An input shift needs predictions at the level that a sampling step starts from: choose the solver "
                "Uni-Inv, or Euler with convention A; or make the replay exact by noise maps."
            )
        seen = {}  # step: what the last evaluation saw and predicted

        with trange(run.steps, disable=run.quiet) as bar:
            evaluate = self.denoiser(run, bar, len(picture), upwards=True)

            def denoise(y, sigma, i):
                d = evaluate(y, sigma, i)
                if self.shift:
                    seen[i] = y, d
                return d

            latents = ddim.invert(
                picture, run.sigmas, denoise, family=family, scaling=models.scaling(run.model), solver=solver,
                convention=self.convention, refinements=self.refinements, tolerance=self.tolerance, lowest=lowest,
                regularise=self.regularise,
            )
        if not torch.isfinite(latents[0]).all():
            raise ValueError(
                "The inversion did not converge: invert at cfg 1, or with fewer refinements. With both already low, "
                "the model itself gave NaN or infinite numbers (--force-fp32 helps where float16 is the cause)."
            )
        x_T = self.record(run, latents, None, torch.zeros(run.steps), self.method)
        if self.shift:
            self.inversion = _with_shifts(self.inversion, seen)
            self.check_repeats(run)
        return x_T


def _with_shifts(path: Inversion, seen: dict) -> Inversion:
    """A path with the input shift and the residual of every step, from {step: (what the model saw, D)}."""
    latents, shifts, rest = path.latents, torch.empty_like(path.latents[:-1]), torch.empty_like(path.latents[:-1])
    for i, (y, d) in seen.items():
        c = path.step(i)
        shifts[i] = y.cpu() - latents[i]
        rest[i] = latents[i + 1] - c.keep * latents[i] - c.take * d.cpu()
    return replace(path, shifts=shifts, residuals=rest)


class RFInverter(AlongPath):
    """The inversion of RF-Inversion, see `rf_inversion.invert`; the path is the record's source branch.

    Args:
        seed: of the noise that the path is drawn to.
        gamma: how strongly.
        settings: goes into the record.
    """

    def __init__(self, seed: int, gamma: float, settings: dict | None = None):
        self.seed, self.gamma, self.settings = seed, gamma, settings or {}

    def run(self, run: Run) -> torch.Tensor:
        family, picture = models.family(run.model), run.latent_image
        check_sigmas(run.sigmas, family)
        check_latent(picture)
        noise = edit_friendly.draw_noise(picture.shape, 1, self.seed)[0].to(picture) * models.noise_scale(run.model)
        lowest = float(run.model.get_model_object("model_sampling").sigma_min)
        with trange(run.steps, disable=run.quiet) as bar:
            denoise = self.denoiser(run, bar, len(picture), upwards=True)
            latents = rf_inversion.invert(
                picture, run.sigmas, denoise, noise, self.gamma, scaling=models.scaling(run.model), lowest=lowest
            )
        return self.record(run, latents, None, torch.zeros(run.steps), "RF-Inversion")


class SourceBranch(AlongPath):
    """Replaces a record's path by one that is sampled at the guider's guidance, see `ddim.simulate`.

    Args:
        inversion: a record without noise maps; embeddings it prescribes are used.
        scale, every: see `ddim.simulate`.
        method: goes into the record.
    """

    phase = "sampling the source"

    def __init__(self, inversion: Inversion, scale=0.0, every=1, method: str | None = None):
        self.inversion, self.scale, self.every = inversion, scale, every
        self.method = method or inversion.method

    def run(self, run: Run) -> torch.Tensor:
        path = self.inversion
        prescribed = Overrides(run, path)
        with trange(path.steps, disable=run.quiet) as bar:
            evaluate = self.denoiser(run, bar, path.batch, extra_args=prescribed.extra_args)

            def denoise(y, sigma, i):
                prescribed.apply(i)
                return evaluate(y, sigma, i)

            latents = path.latents.to(run.device)
            branch = ddim.simulate(latents, path.sigmas, denoise, self.scale, self.every, family=path.kind)
        self.inversion = replace(path, latents=branch.cpu(), method=self.method)
        return branch[0]


class TargetOffset(AlongPath):
    """Gives a record without noise maps what each of its DDIM steps lacks of the path at the guider's guidance.

    An edit then adds the source's offset to its own branch ("add-source" in the ablations of arXiv 2310.01506).

    Args:
        inversion: a record without noise maps or prescribed embeddings.
        steps_at_once: see `EditFriendlyInverter`.
        method: goes into the record.
    """

    phase = "measuring the offset"

    def __init__(self, inversion: Inversion, steps_at_once=0, method: str | None = None):
        self.inversion, self.steps_at_once = inversion, steps_at_once
        self.method = method or inversion.method

    def run(self, run: Run) -> torch.Tensor:
        path = self.inversion
        latents, levels = path.latents.to(run.device), path.sigmas.to(run.device)
        chunk = levels_at_once(run.guider, run.noise.shape, run.options, self.steps_at_once)
        with trange(path.steps, disable=run.quiet) as bar:
            denoise = self.denoiser(run, bar, path.batch)
            rest = edit_friendly.residuals(latents, levels, path.etas, denoise, chunk, family=path.kind)
        self.inversion = replace(path, residuals=rest.cpu(), method=self.method)
        self.check_repeats(run)
        return latents[0]
