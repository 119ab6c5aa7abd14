"""The source pass: what a plan reads of the source is captured ahead of the target, several steps in one call."""

import logging
import math

import comfy.model_management
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.samplers import CFGGuider

from .backbones import Backbone
from .capture import Capture
from .conditioning import equal_but, everywhere, plain, repeats_by_picture, same_words
from .edits import NEGATIVE, SOURCE, VALUE_PRESCRIBED, Slot, SourcePath
from .plan import Plan
from .store import AttentionStore, Origin, fingerprint

# Dropped from the source conditioning, so that it applies to the whole picture at every step.
_LIMITS = ("control", "hooks", "gligen", "area", "mask", "strength", "default", "timestep_start", "timestep_end",
           "start_percent", "end_percent", "clip_start_percent", "clip_end_percent", "control_apply_to_uncond")
_OF_BOTH = ("guidance", "reference_latents", "reference_latents_method")
# A call of the source may take as much memory as the target's own call, or this much where that is little (a small
# model's call costs more in overhead than in memory), at most a third of what is free, and not more than 16 steps.
_FREE_BYTES, _MOST_STEPS = 256 * 2**20, 16


def source_conditioning(controls):
    """The one source CONDITIONING of a chain, plain; None where the negative serves.

    Raises:
        ValueError: two controls disagree, or it has several entries.
    """
    given = [c.source_conditioning for c in controls if c.source_conditioning is not None]
    if not given:
        return None
    if any(not same_words(given[0], other) for other in given[1:]):
        raise ValueError(
            "The chained attention controls were given different source prompts. Connect the same one to all of them."
        )
    if len(given[0]) != 1:
        raise ValueError(
            f"The source prompt has {len(given[0])} parts (combined or scheduled conditionings). Attention is captured "
            "for one plain prompt: connect the source of Edit Prompts, or one CLIP Text Encode."
        )
    embedding, more = given[0][0]
    return [[embedding, {k: v for k, v in more.items() if k not in _LIMITS}]]


def check_caches(options: dict):
    """Refuse caches that skip evaluations of the network (EasyCache): nothing could be captured in those.

    (LazyCache leaves out whole predictions of the sampler, which the source pass does not go through.)

    Raises:
        ValueError: what to do.
    """
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    if "easycache" in options.get("transformer_options", {}).get("wrappers", {}).get(kind, {}):
        raise ValueError(
            "EasyCache on the model leaves out evaluations, also of the source, whose attention is needed in every step. "
            "Bypass it while attention control is connected, or use LazyCache."
        )


class SourcePass:
    """Captures what a plan reads of a path.

    Args:
        plan: of the run.
        backbone: of the model.
        guider: the running CFGGuider, whose `inner_model` and `conds` are set.
        path: the `Inversion` that is edited.
        start: first path step that runs.
        options: the run's `model_options`.
        latent_image, denoise_mask: as the sampler got them (for models that take them as input).
        store: where to capture; a kept one that is full replaces the pass.
        batch_levels: whether steps of different noise levels may share a call.
        steps_at_once: steps in one call; 0 chooses by memory.

    Raises:
        ValueError: source prompts that do not fit.
    """

    def __init__(self, *, plan: Plan, backbone: Backbone, guider: CFGGuider, path: SourcePath, start: int, options: dict,
                 latent_image=None, denoise_mask=None, store: AttentionStore | None = None, batch_levels=True,
                 steps_at_once=0):
        self.plan, self.backbone, self.guider, self.path, self.start = plan, backbone, guider, path, start
        self.options, self.batch_levels, self.steps_at_once = options, batch_levels, steps_at_once
        self.setting, self.model = plan.setting, guider.inner_model
        self.entries = self._source_entries(latent_image, denoise_mask)
        self.same = self._branches_equal()
        self.store = self._live_store() if store is None else store

    def _source_entries(self, latent_image, denoise_mask):
        """{SOURCE: the encoded entry}; the negative's is the guider's, read when it is used."""
        source = source_conditioning(self.plan.controls)
        if source is None:
            return {}
        conds = {"positive": comfy.sampler_helpers.convert_cond(self._as_the_positive(source))}
        noise = torch.zeros(self.path.latents.shape[1:], device=self.setting.device)
        conds = comfy.samplers.process_conds(self.model, noise, conds, self.setting.device, latent_image, denoise_mask)
        entry = plain(conds["positive"][0])
        marked = [c for c in self.guider.conds.get("positive") or [] if VALUE_PRESCRIBED in c]
        if marked:  # what the inversion prescribes for the positive's values is meant for the source as well
            entry["uuid"] = marked[0]["uuid"]
        return {SOURCE: entry}

    def _as_the_positive(self, source):
        """The source CONDITIONING with the positive's guidance and reference pictures, where it has none of its own: in
        one call of both, as the papers have it, they would be the same.
        """
        positive = [c for c in self.guider.conds.get("positive") or [] if everywhere(c, self.setting.size)]
        given = {name: positive[0][name] for name in _OF_BOTH if positive and name in positive[0]}
        return [[words, {**given, **more}] for words, more in source]

    def entry(self, branch: str) -> dict:
        """The encoded conditioning that is evaluated for a branch."""
        if branch in self.entries:
            return self.entries[branch]
        negative = self._negative()
        if negative is None and self.guider.conds.get("negative"):
            raise ValueError(
                "The negative conditioning is limited to an area, and this attention control reads its attention on the "
                "whole picture. Use Conditioning (Set Mask) in place of Set Area, or combine it with a negative for the "
                "whole picture."
            )
        if negative is None:
            raise ValueError(
                "This attention control reads the attention of a negative conditioning, and the guider has none: use the "
                "LEDITS Guider."
            )
        return plain(negative)

    def _negative(self) -> dict | None:
        """The negative's first entry over the whole picture."""
        given = self.guider.conds.get("negative") or []
        return next((c for c in given if everywhere(c, self.setting.size)), None)

    def _branches_equal(self):
        """Whether the source prompt is the negative: then one evaluation serves as both."""
        if SOURCE not in self.entries or self.path.overrides:
            return False
        if self._negative() is None:
            return False
        return equal_but(*(self.entry(branch)["model_conds"] for branch in (SOURCE, NEGATIVE)))

    def slot(self, slot: Slot) -> Slot:
        """Where a tensor is kept: of two equal branches one is evaluated for both."""
        return slot._replace(branch=SOURCE) if self.same else slot

    def needs(self, step: int) -> set[Slot]:
        """Slots that have to be in the store for an executed step."""
        return {self.slot(slot) for slot in self.plan.at(step).reads}

    def fetch(self, step: int, slot: Slot, like: torch.Tensor) -> torch.Tensor:
        """A captured tensor, on the device and in the dtype of `like`, the target's tensor at the same place.

        Raises:
            ValueError: it is of another shape than the target's.
        """
        tensor = usable(self.store.get(self.start + step, self.slot(slot), like))
        if slot.name in "qh" and tensor.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"The source's {'.'.join(map(str, slot.key))} {slot.site} {slot.name} is {list(tensor.shape[1:])}, the "
                f"target's {list(like.shape[1:])}: the model's patches are not those that the attention store was "
                "captured with. Capture it again."
            )
        return tensor

    def shape_of(self, step: int, slot: Slot) -> tuple:
        """Shape of a captured tensor."""
        return self.store.shape(self.start + step, self.slot(slot))

    def origin(self, steps) -> Origin:
        """The source of a store that serves the given executed steps."""
        branches = {slot.branch for step in steps for slot in self.plan.at(step).reads}
        prompts, beside = ({b: of(b) for b in sorted(branches)} for of in (self.words, self._beside_words))
        return Origin(fingerprint(self.path), self.path.model, prompts, beside)

    def _beside_words(self, branch: str) -> str:
        """What a branch's conditioning gives the model beside words, in words; "" for nothing."""
        conds = self.entry(branch)["model_conds"]
        guidance, pictures = (conds[name].cond if name in conds else None for name in ("guidance", "ref_latents"))
        said = [] if guidance is None else [f"guidance {float(guidance.flatten()[0]):g}"]
        return ", ".join(said + [f"a reference of {' x '.join(map(str, t.shape[1:]))}" for t in pictures or ()])

    def beside(self, branch: str) -> int:
        """Tokens beside the picture in joint attention, see `Joint.beside`."""
        return self.backbone.beside(self.entry(branch)["model_conds"])

    def words(self, branch: str) -> torch.Tensor:
        """The token embeddings of a branch, [1 or B, tokens, width]."""
        return self.entry(branch)["model_conds"]["c_crossattn"].cond

    def shape(self, slot: Slot) -> tuple:
        """Of a slot's tensor: [B, tokens, width], or [B, width, h, w] of a feature. A model's patches may change the grid."""
        feature = slot.site == "feature"
        layout = self.setting.layout
        layer = next(x for x in (layout.resblocks if feature else layout.layers) if x.key == slot.key)
        grid = layer.grid(self.setting.size)
        if feature:
            return self.setting.batch, layer.width, *grid
        words = slot.site == "attn2" and slot.name == "k" or slot.name == "t"
        places = math.prod(grid) * self.setting.frames
        return self.setting.batch, self.words(slot.branch).shape[1] if words else places, layer.width

    def nbytes(self, slots, itemsize: int) -> int:
        """Memory that the slots of one step take."""
        return sum(math.prod(self.shape(slot)) * itemsize for slot in slots)

    def check(self, store: AttentionStore):
        """Refuse a kept store that does not hold what the edit will read.

        Raises:
            ValueError: it is another picture's, lacks something, or is damaged.
        """
        steps = range(self.setting.steps)
        if store.origin is not None:
            store.origin.check(self.origin(steps))
        for step in steps:
            missing = [slot for slot in self.needs(step) if not store.has(self.start + step, slot)]
            if missing:
                slot = sorted(missing)[0]
                raise ValueError(
                    f"The attention store does not hold what this edit reads at step {step + 1} of {len(steps)} "
                    f"({'.'.join(map(str, slot.key))} {slot.site}, {slot.branch}). Capture it with the same controls, "
                    "windows and skip, or with all_steps."
                )
            for slot in sorted(self.needs(step)):
                has, wanted = store.shape(self.start + step, slot), self.shape(slot)
                if not _fits(has, wanted, slot):
                    raise ValueError(
                        f"The attention store holds a tensor of {list(has)} for {'.'.join(map(str, slot.key))} {slot.site} "
                        f"{slot.name}, where this model has {list(wanted)}: it is damaged. Capture it again."
                    )

    def ahead(self, first: int, needs=None) -> list[tuple[int, set[Slot]]]:
        """Pairs (step, slots) to evaluate in one call, from an executed step on.

        Args:
            needs: step -> slots, instead of `needs`.
        """
        needs = needs or self.needs
        ahead = [(first, needs(first))]
        branches = {s.branch for s in ahead[0][1]}
        if not branches:
            return ahead
        most = min(self._steps_in_one_call(len(branches)), self._steps_that_fit(ahead[0][1]))
        if not repeats_by_picture([self.entry(branch) for branch in branches], self.setting.batch):
            most = 1
        if "value" in self.path.overrides or (NEGATIVE in branches and "negative" in self.path.overrides):
            most = 1  # they may be others at every step
        for step in range(first + 1, min(first + most, self.setting.steps)):
            more = needs(step)
            if {s.branch for s in more} != branches:
                break
            ahead.append((step, more))
        return ahead

    def _steps_in_one_call(self, branches):
        if not self.batch_levels:
            return 1
        if self.steps_at_once:
            return self.steps_at_once
        shape = [self.setting.batch, *self.path.latents.shape[2:]]
        one = self.model.memory_required([branches * shape[0], *shape[1:]])
        target = self.model.memory_required([len(self.plan.branches) * shape[0], *shape[1:]])
        free = comfy.model_management.get_free_memory(self.setting.device)
        return int(min(max(min(max(target, _FREE_BYTES), free / 3) // one, 1), _MOST_STEPS))

    def _live_store(self):
        """In the host's memory where a step would take more than a third of what the device has left."""
        itemsize = self.model.get_dtype_inference().itemsize
        most = max((self.nbytes(self.needs(step), itemsize) for step in range(self.setting.steps)), default=0)
        free = comfy.model_management.get_free_memory(self.setting.device)
        if most > free / 3:
            logging.info("The source's attention takes %.2f GB a step: it is kept in the host's memory.", most / 2**30)
            return AttentionStore("cpu")
        return AttentionStore()

    def _steps_that_fit(self, slots):
        """Steps whose tensors are held at once: what they take is memory that the edit's own call lacks."""
        one = self.nbytes(slots, self.model.get_dtype_inference().itemsize)
        return max(_FREE_BYTES // max(one, 1), 1)

    def fill(self, wanted: list[tuple[int, set[Slot]]]):
        """Evaluate the source at some steps and capture.

        Args:
            wanted: pairs (step, slots).

        Raises:
            ValueError: something of it did not run.
        """
        capture = Capture([(self.start + step, slots) for step, slots in wanted], store=self.store, batch=self.setting.batch,
                          conds=lambda branch: self.entry(branch)["model_conds"], backbone=self.backbone)
        if not capture.branches:
            return
        layout = self.setting.layout
        options = self.backbone.install(
            self.options,
            self_attention=(capture.at(layout.layers, "attn1"), capture.self_attention),
            cross_attention=(capture.at(layout.layers, "attn2"), capture.cross_attention),
            joint_attention=(capture.at(layout.layers, "joint"), capture.joint_attention),
            features=(capture.at(layout.resblocks, "feature"), capture.feature),
        )
        steps = [self.start + step for step, _ in wanted]
        y = torch.cat([self.path.latents[i] for i in steps]).to(self.setting.device)
        sigma = self.path.sigmas[steps].repeat_interleave(self.setting.batch).to(self.setting.device)
        if hasattr(self.guider, "rows"):
            self.guider.rows += len(y) * len(capture.branches)
        conds = [[self.entry(branch)] for branch in capture.branches]
        comfy.samplers.calc_cond_batch(self.model, conds, y, sigma, options)
        missing = [slot for step, slots in wanted for slot in sorted(slots) if not self.store.has(self.start + step, slot)]
        if missing:
            raise ValueError(
                f"The source's attention could not be captured ({'.'.join(map(str, missing[0].key))} {missing[0].site}): a "
                "patch on the model skips or replaces parts of the network. Bypass it while attention control is connected."
            )


def usable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, cloned where autograd is on and it is an inference tensor (which autograd cannot save)."""
    return tensor.clone() if torch.is_grad_enabled() and tensor.is_inference() else tensor


def _fits(has, wanted, slot):
    """Whether a tensor's shape can be a slot's; patches that scale features within the U-Net change height and width."""
    if slot.site == "feature":
        return len(has) == 4 and has[:2] == wanted[:2]
    same = len(has) == 3 and (has[0], has[2]) == (wanted[0], wanted[2])
    return same and (slot.name != "k" or slot.site != "attn2" or has == wanted)
