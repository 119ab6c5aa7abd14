"""The source pass: what the controls read of the source is captured ahead of the target, several steps in one call."""

import math

import comfy.conds
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch

from . import patches
from .backbones import unet
from .controls.p2p import require_cross
from .edits import COND, NEGATIVE, SOURCE, UNCOND, Setting, Slot
from .store import AttentionStore, Origin, fingerprint

# What a source conditioning keeps of its entry: the words, nothing that limits where or when they act.
_LIMITS = ("control", "hooks", "gligen", "area", "mask", "strength", "default", "timestep_start", "timestep_end",
           "start_percent", "end_percent", "clip_start_percent", "clip_end_percent", "control_apply_to_uncond")
# A source batch may take as much memory as the target's call, or this much, and not more than 16 steps.
_FREE_BYTES, _MOST_STEPS = 256 * 2**20, 16


def source_conditioning(controls):
    """The one source CONDITIONING of a chain, plain; None where the negative serves.

    Raises:
        ValueError: two controls disagree, or it has several entries.
    """
    given = [c.source_conditioning for c in controls if c.source_conditioning is not None]
    if not given:
        return None
    if any(not _same_words(given[0], other) for other in given[1:]):
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


def _same_words(a, b):
    def equal(x, y):
        return x is y or (x is not None and y is not None and x.shape == y.shape and torch.equal(x, y))

    return a is b or len(a) == len(b) and all(
        equal(x[0], y[0]) and equal(x[1].get("pooled_output"), y[1].get("pooled_output")) for x, y in zip(a, b)
    )


class SourcePass:
    """What a chain of controls reads of a path, step by step, and the pass that captures it.

    Args:
        controls: `edits.Control`s in chain order.
        guider: the running CFGGuider, whose `inner_model` and `conds` are set.
        path: the `Inversion` that is edited.
        start, steps: first path step that runs, and how many.
        options: the run's `model_options`.
        latent_image, denoise_mask: as the sampler got them (for models that take them as input).
        store: where to capture; a kept one that is full replaces the pass.
        batch_levels: whether steps of different noise levels may share a call.
        steps_at_once: steps in one call; 0 chooses by memory.

    Raises:
        ValueError: another kind of model, a patch that skips evaluations, unknown blocks or words, or source prompts that
            do not fit.
    """

    def __init__(self, controls, guider, path, start, steps, options, latent_image=None, denoise_mask=None, store=None,
                 batch_levels=True, steps_at_once=0):
        require_cross(controls)
        patches.check_caches(options)
        self.controls, self.guider, self.path, self.start, self.steps = tuple(controls), guider, path, start, steps
        self.options, self.batch_levels, self.steps_at_once = options, batch_levels, steps_at_once
        self.model, self.device = guider.inner_model, guider.model_patcher.load_device
        self.layout = unet.layout(self.model.diffusion_model, type(self.model).__name__)
        self.size, self.batch = tuple(path.latents.shape[-2:]), path.batch
        self.branches = self._target_branches()
        setting = Setting(self.layout, self.size, steps, self.batch, self.device)
        self.bound = [control.bind(setting) for control in self.controls]
        self.entries = self._source_entries(latent_image, denoise_mask)
        self.same = self._branches_equal()
        self.store = AttentionStore() if store is None else store

    def _target_branches(self):
        """Branches that the edit may touch."""
        return COND, UNCOND

    def _source_entries(self, latent_image, denoise_mask):
        """{SOURCE: the encoded entry}; the negative's is the guider's, read when it is used."""
        source = source_conditioning(self.controls)
        if source is None:
            return {}
        conds = {"positive": comfy.sampler_helpers.convert_cond(source)}
        noise = torch.zeros(self.path.latents.shape[1:], device=self.device)
        conds = comfy.samplers.process_conds(self.model, noise, conds, self.device, latent_image, denoise_mask)
        entry = _plain(conds["positive"][0])
        marked = [c for c in self.guider.conds.get("positive") or [] if "value_prescribed" in c]
        if marked:  # what the inversion prescribes for the positive's values is meant for the source as well
            entry["uuid"] = marked[0]["uuid"]
        return {SOURCE: entry}

    def entry(self, branch):
        """What the source pass evaluates for a branch."""
        if branch in self.entries:
            return self.entries[branch]
        negative = [c for c in self.guider.conds.get("negative") or [] if "area" not in c]
        if not negative:
            raise ValueError(
                "This attention control needs a negative conditioning over the whole picture: use the LEDITS Guider, "
                "or connect a source prompt to the control."
            )
        return _plain(negative[0])

    def _branches_equal(self):
        """Whether the source prompt is the negative: then one evaluation serves as both."""
        if SOURCE not in self.entries or self.path.overrides:
            return False
        if not self.guider.conds.get("negative"):
            return False
        a, b = (self.entry(branch)["model_conds"] for branch in (SOURCE, NEGATIVE))
        return a.keys() == b.keys() and all(comfy.conds.is_equal(a[k].cond, b[k].cond) for k in a)

    def reads(self, step):
        """Slots that an executed step reads, by the branches' own names."""
        out = set()
        for layer in self.layout.layers:
            for bound in self.bound:
                for branch in self.branches:
                    edit = bound.self_edit(step, layer, branch)
                    if edit is not None:
                        read = (("q", edit.q), ("k", edit.k), ("v", edit.v))
                        out |= {Slot(source, "attn1", layer.key, name) for name, source in read if source}
                cross = bound.cross_edit(step, layer)
                if (cross is not None and cross.matrix is not None) or bound.word_maps(step, layer) is not None:
                    out |= {Slot(SOURCE, "attn2", layer.key, name) for name in "qk"}
        for guidance in filter(None, (bound.guidance(step) for bound in self.bound)):
            out |= {Slot(guidance.source, "attn2", key, name) for key in guidance.layers for name in "qk"}
        for block in self.layout.resblocks:
            sources = {bound.feature_edit(step, block, branch) for bound in self.bound for branch in self.branches}
            out |= {Slot(source, "feature", block.key, "h") for source in sources - {None}}
        return out

    def slot(self, branch, site, layer, name):
        """Where a tensor is kept: of two equal branches one is evaluated for both."""
        return Slot(SOURCE if self.same and branch == NEGATIVE else branch, site, layer.key, name)

    def needs(self, step):
        """Slots that have to be in the store for an executed step."""
        return {slot._replace(branch=SOURCE) if self.same else slot for slot in self.reads(step)}

    def origin(self, steps):
        """What a store is captured from that serves the given executed steps."""
        branches = {slot.branch for step in steps for slot in self.reads(step)}
        return Origin(fingerprint(self.path), self.path.model, {b: self._words(b) for b in sorted(branches)})

    def _words(self, branch):
        return self.entry(branch)["model_conds"]["c_crossattn"].cond

    def shape(self, slot):
        """Of a slot's tensor: [B, tokens, width], or [B, width, h, w] of a feature. A model's patches may change the grid."""
        feature = slot.site == "feature"
        layer = next(x for x in (self.layout.resblocks if feature else self.layout.layers) if x.key == slot.key)
        grid = layer.grid(self.size)
        if feature:
            return self.batch, layer.width, *grid
        words = slot.site == "attn2" and slot.name == "k"
        return self.batch, self._words(slot.branch).shape[1] if words else math.prod(grid), layer.width

    def nbytes(self, slots, itemsize):
        """Memory that the slots of one step take."""
        return sum(math.prod(self.shape(slot)) * itemsize for slot in slots)

    def ahead(self, first, needs=None):
        """Pairs (step, slots) to evaluate in one call, from an executed step on.

        Args:
            needs: step -> slots, instead of `needs`.
        """
        needs = needs or self.needs
        ahead = [(first, needs(first))]
        branches = {s.branch for s in ahead[0][1]}
        if not branches:
            return ahead
        most = self._steps_in_one_call(len(branches))
        if "value" in self.path.overrides or (NEGATIVE in branches and "negative" in self.path.overrides):
            most = 1  # they may be others at every step
        for step in range(first + 1, min(first + most, self.steps)):
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
        shape = [self.batch, *self.path.latents.shape[2:]]
        one = self.model.memory_required([branches * shape[0], *shape[1:]])
        target = self.model.memory_required([len(self.branches) * shape[0], *shape[1:]])
        free = comfy.model_management.get_free_memory(self.device)
        return int(min(max(min(max(target, _FREE_BYTES), free / 3) // one, 1), _MOST_STEPS))

    def fill(self, wanted):
        """Evaluate the source at some steps and capture.

        Args:
            wanted: pairs (position, slots).

        Raises:
            ValueError: something of it did not run.
        """
        everything = set().union(*(slots for _, slots in wanted))
        branches = sorted({slot.branch for slot in everything}, reverse=True)
        if not branches:
            return
        steps = [self.start + step for step, _ in wanted]

        def keep(slot, tensor, parts):
            """Store rows [chunks, steps, B, ...] of the chunk that is the slot's branch."""
            part = tensor.unflatten(0, (len(parts), len(wanted), self.batch))
            for (step, slots), rows in zip(wanted, part[parts.index(branches.index(slot.branch))]):
                if slot in slots:
                    self.store.put(self.start + step, slot, rows)

        def take(site, layer, tensors, extra):
            parts = list(extra["cond_or_uncond"])
            for slot in everything:
                if slot.site == site and slot.key == layer.key and branches.index(slot.branch) in parts:
                    tensor = tensors[slot.name]
                    if site == "attn2" and slot.name == "k":  # a shorter prompt is repeated to a longer one's length
                        tensor = tensor[:, : self.entry(slot.branch)["model_conds"]["c_crossattn"].cond.shape[1]]
                    keep(slot, tensor, parts)

        def capture(site):
            def work(layer, q, k, v, extra, previous):
                patches.check_tokens(q, len(extra["cond_or_uncond"]) * len(wanted) * self.batch, extra)
                take(site, layer, {"q": q, "k": k, "v": v}, extra)
                return previous(q, k, v, extra) if previous else patches.attention(q, k, v, extra)

            return [x for x in self.layout.layers if any((s.site, s.key) == (site, x.key) for s in everything)], work

        blocks = [x for x in self.layout.resblocks if any((s.site, s.key) == ("feature", x.key) for s in everything)]
        features = blocks, lambda block, h, extra: take("feature", block, {"h": h}, extra)
        options = patches.install(self.options, capture("attn1"), capture("attn2"), features)
        y = torch.cat([self.path.latents[i] for i in steps]).to(self.device)
        sigma = self.path.sigmas[steps].repeat_interleave(self.batch).to(self.device)
        if hasattr(self.guider, "rows"):
            self.guider.rows += len(y) * len(branches)
        comfy.samplers.calc_cond_batch(self.model, [[self.entry(b)] for b in branches], y, sigma, options)
        missing = [slot for step, slots in wanted for slot in sorted(slots) if not self.store.has(self.start + step, slot)]
        if missing:
            raise ValueError(
                f"The source's attention could not be captured ({'.'.join(map(str, missing[0].key))} {missing[0].site}): a "
                "patch on the model skips or replaces parts of the U-Net. Bypass it while attention control is connected."
            )


def _plain(entry):
    return {"model_conds": entry["model_conds"], "uuid": entry["uuid"]}
