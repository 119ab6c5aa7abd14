"""One edit with attention control: the order of events. Nothing of it outlives the run."""

import functools
import math

import torch
from comfy.samplers import CFGGuider

from . import backbones
from .conditioning import everywhere
from .edits import COND, UNCOND, Control, Setting, SourcePath
from .observed import Observed, pixels
from .plan import Plan
from .source_pass import SourcePass, check_caches
from .store import AttentionStore
from .target_pass import TargetPass


def open_source(*, controls: tuple[Control, ...], guider: CFGGuider, path: SourcePath, start: int, steps: int, options: dict,
                branches=(COND, UNCOND), **how) -> SourcePass:
    """A plan for the model at hand, and its source pass.

    Args:
        controls: in chain order.
        guider: the running CFGGuider, whose `inner_model` and `conds` are set.
        path: the `Inversion` that is edited.
        start, steps: first path step that runs, and how many.
        options: the run's `model_options`.
        branches: of the target that may be edited.
        how: further arguments of `SourcePass`.

    Raises:
        ValueError: another kind of model, a patch that skips evaluations, unknown blocks or words, controls that exclude
            each other, or source prompts that do not fit.
    """
    check_caches(options)
    model = guider.inner_model
    backbone = backbones.of(model)
    space = path.latents.shape[3:]
    setting = Setting(layout=backbone.layout, size=tuple(space[-2:]), steps=steps, batch=path.batch,
                      device=guider.model_patcher.load_device, frames=backbone.frames(space[0] if len(space) == 3 else 1))
    plan = Plan(controls, setting, branches)
    return SourcePass(plan=plan, backbone=backbone, guider=guider, path=path, start=start, options=options, **how)


class AttentionRun:
    """Serves one run of a sampler: `prepare`, `before_step`, then the step, then `after_step`.

    Args:
        kept: a store from Capture Attention, which replaces the source pass.
        guider, path, options, more: as for `open_source`.

    Raises:
        ValueError: as `open_source`; also where the kept store is another picture's or lacks something, or the positive is
            not the target prompt.
    """

    def __init__(self, *, guider: CFGGuider, path: SourcePath, options: dict, kept: AttentionStore | None = None, **more):
        self.path, self.kept = path, kept
        self.source = open_source(guider=guider, path=path, options=options, store=kept,
                                  branches=_edited_branches(guider, options, tuple(path.latents.shape[-2:])), **more)
        self.plan, self.start = self.source.plan, self.source.start
        self.device = self.plan.setting.device
        self.target = TargetPass(plan=self.plan, backbone=self.source.backbone, source=self.source, guider=guider,
                                 options=options)
        if kept is not None:
            self.source.check(kept)

    def source_steps(self) -> int:
        """How many steps the source pass has to capture in all."""
        steps = range(self.plan.setting.steps)
        return 0 if self.kept is not None else sum(bool(self.plan.at(step).reads) for step in steps)

    def pending(self, i: int) -> list:
        """Pairs (step, slots) to `fill` before path step i; empty where all is captured."""
        step, store = i - self.start, self.source.store
        captured = self.kept is not None or all(store.has(i, slot) for slot in self.source.needs(step))
        return [] if captured else self.source.ahead(step)

    def fill(self, pending: list):
        """Capture what `pending` gave."""
        self.source.fill(pending)

    def prepare(self, i: int) -> dict:
        """`model_options` for the model's calls at path step i."""
        self.source.fill(self.pending(i))
        return self.target.begin(i - self.start)

    def before_step(self, i: int, y: torch.Tensor, options: dict, differentiate) -> torch.Tensor:
        """The target latent with which path step i is to be evaluated: moved where a control guides it.

        Args:
            y: [B, C, H, W].
            options: what `prepare` gave.
            differentiate: see `samplers.latent_gradient`.
        """
        sigma = float(self.path.sigmas[i])
        for bound in self.plan.bound:
            gradient = functools.partial(self.target.gradient, y, sigma, options, differentiate)
            y = bound.before_step(i - self.start, y, self.path.kind.input_scale(sigma), gradient)
        return y

    def after_step(self, i: int, y: torch.Tensor) -> torch.Tensor:
        """The target latent at the level after path step i, with what the controls make of it. Drops the step."""
        source = self.path.latents[i + 1].to(y)
        self.target.end()
        for bound in self.plan.bound:
            y = bound.after_step(i - self.start, y, source)
        if self.kept is None:
            self.source.store.drop(i)
        return y

    def observed(self, y: torch.Tensor) -> Observed | None:
        """The controls' maps and masks of the run that ended at the latent y; None where there are none."""
        words = next((w for bound in self.plan.bound if (w := bound.observed_words()) is not None), None)
        masks = {name: trace for bound in self.plan.bound for name, trace in bound.observed_masks().items()}
        if words is None and not masks:
            return None
        tokens, maps = words or (None, {})
        return Observed(steps=self.plan.setting.steps, size=pixels(self.path), latent=y.cpu(), tokens=tokens, maps=maps,
                        masks=masks)


def _edited_branches(guider: CFGGuider, options: dict, size: tuple[int, int]):
    """Branches of the target that the guider evaluates on the whole picture, of `size`."""
    known = type(guider).predict_noise is CFGGuider.predict_noise or hasattr(guider, "concepts")  # others have no one cfg
    without = known and math.isclose(guider.cfg, 1.0) and not options.get("disable_cfg1_optimization", False)
    negative = guider.conds.get("negative")
    in_areas = known and negative and not any(everywhere(entry, size) for entry in negative)
    return (COND,) if (without or in_areas) and not getattr(guider, "concepts", ()) else (COND, UNCOND)
