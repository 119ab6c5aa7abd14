"""One edit with attention control: the source pass ahead of the target, and the patches of the target's calls."""

import math

import comfy.samplers
import torch

from . import attend, patches
from .controls.pix2pix_zero import MapDistance
from .edits import COND, SOURCE, UNCOND, CrossEdit
from .observed import Seen
from .source_pass import SourcePass


class AttentionRun(SourcePass):
    """Serves one run of a sampler: `prepare`, `before_step`, then the step, then `after_step`. Nothing of it outlives the run.

    Args:
        kept: a store from Capture Attention, which replaces the source pass; else as for `SourcePass`.

    Raises:
        ValueError: the kept store is another picture's or lacks something, or the positive is not the target prompt.
    """

    def __init__(self, *args, kept=None, **kwargs):
        super().__init__(*args, store=kept, **kwargs)
        self.kept, self._step = kept, None
        self.targets, self.guided = self._target_entries(), self._guided_entries()
        if kept is not None:
            self._check(kept)

    def _target_branches(self):
        """Branches that the guider evaluates."""
        without = math.isclose(self.guider.cfg, 1.0) and not self.options.get("disable_cfg1_optimization", False)
        return (COND,) if without and not getattr(self.guider, "concepts", ()) else (COND, UNCOND)

    def _target_entries(self):
        """uuids of the positive's entries whose cross-attention is edited by words."""
        given = self.guider.conds.get("positive") or []
        positive = [c for c in given if self._everywhere(c)]
        if given and not positive:
            raise ValueError(
                "The positive conditioning is limited to an area, and attention control acts on the whole picture. Use "
                "Conditioning (Set Mask) in place of Set Area, or combine it with a prompt for the whole picture."
            )
        prompts = next((c.prompts for c in self.controls if c.prompts is not None), None)
        if prompts is None:
            return set()
        wanted = prompts.target[0][0]

        def same(c, other):
            own = c.get("cross_attn")
            return own is not None and own.shape == other.shape and torch.equal(own.to(other), other)

        exact = [c for c in positive if same(c, wanted)]
        tokens = len(prompts.target_tokens)
        fitting = exact or [c for c in positive if "cross_attn" in c and c["cross_attn"].shape[1] == tokens]
        if not exact and any(same(c, prompts.source[0][0]) for c in positive) or not fitting:
            raise ValueError(
                "The positive conditioning of the sampler is not the target prompt of Edit Prompts: connect its 'target' "
                "output (LoRA hooks, ControlNet and areas may be added on the way)."
            )
        return {c["uuid"] for c in fitting}

    def _guided_entries(self):
        """uuids of the positive's entries whose maps are compared with the source's."""
        found = {(k, g.source) for step in range(self.steps) for k, b in enumerate(self.bound) if (g := b.guidance(step))}
        if not found:
            return set()
        if len(found) > 1:
            raise ValueError("Two pix2pix-zero controls are chained; both would guide the same latent. Keep one.")
        tokens = self._words(found.pop()[1]).shape[1]
        whole = [c for c in self.guider.conds.get("positive") or [] if self._everywhere(c) and "default" not in c]
        lengths = {c["uuid"]: c["model_conds"]["c_crossattn"].cond.shape[1] for c in whole}
        if tokens not in lengths.values():
            has = " and ".join(map(str, sorted(set(lengths.values())))) or "none over the whole picture"
            raise ValueError(
                f"pix2pix-zero compares target and source token by token. The source prompt has {tokens} tokens, the "
                f"positive of the sampler {has}: make it from the source prompt with Edit Direction."
            )
        return {uuid for uuid, length in lengths.items() if length == tokens}

    def _everywhere(self, entry):
        """Whether an encoded conditioning entry is for the whole picture; areas are (height, width, y, x)."""
        area = entry.get("area")
        return area is None or (not any(area[2:]) and area[0] >= self.size[0] and area[1] >= self.size[1])

    def _check(self, store):
        """Refuse a kept store that does not hold what the edit will read."""
        if store.origin is not None:
            own = self.origin(range(self.steps))
            store.origin.check(own.path, own.model, own.prompts)
        for step in range(self.steps):
            missing = [slot for slot in self.needs(step) if not store.has(self.start + step, slot)]
            if missing:
                slot = sorted(missing)[0]
                raise ValueError(
                    f"The attention store does not hold what this edit reads at step {step + 1} of {self.steps} "
                    f"({'.'.join(map(str, slot.key))} {slot.site}, {slot.branch}). Capture it with the same controls, "
                    "windows and skip, or with all_steps."
                )
            for slot in sorted(self.needs(step)):
                has, own = store.shape(self.start + step, slot), self.shape(slot)
                if not _fits(has, own, slot):
                    raise ValueError(
                        f"The attention store holds a tensor of {list(has)} for {'.'.join(map(str, slot.key))} {slot.site} "
                        f"{slot.name}, where this model has {list(own)}: it is damaged. Capture it again."
                    )

    def source_steps(self):
        """How many steps the source pass has to capture in all."""
        return 0 if self.kept is not None else sum(bool(self.needs(step)) for step in range(self.steps))

    def pending(self, i):
        """What the source pass has still to capture before path step i, for `fill`; empty for nothing."""
        step = i - self.start
        captured = self.kept is not None or all(self.store.has(i, slot) for slot in self.needs(step))
        return [] if captured else self.ahead(step)

    def prepare(self, i):
        """Make ready for path step i.

        Returns:
            `model_options` for the model's calls at this step.
        """
        self._step = i - self.start
        self.fill(self.pending(i))
        return self._target_options()

    def before_step(self, i, y, options, gradient):
        """The target latent with which path step i is to be evaluated: moved where a control guides it.

        Args:
            y: [B, C, H, W].
            options: what `prepare` gave.
            gradient: see `samplers.latent_gradient`.
        """
        sigma = float(self.path.sigmas[i])
        for guidance in filter(None, (b.guidance(self._step) for b in self.bound)):
            entries = [c for c in self.guider.conds["positive"] if c["uuid"] in self.guided]

            def source(layer, like, branch=guidance.source):
                fetch = self._fetch("attn2", layer, like)
                return fetch(branch, "q"), fetch(branch, "k")

            distance = MapDistance(self.batch, len(entries), source)
            layers = [x for x in self.layout.layers if x.key in guidance.layers]
            watched = patches.install(options, ((), None), (layers, distance))
            slope = gradient(self.guider, entries, y, sigma, watched, distance)
            for bound in self.bound:
                bound.forget_maps()
            y = y - guidance.amount * (1 + sigma**2) ** 0.5 * slope
        return y

    def _target_options(self):
        step, layout = self._step, self.layout
        edited = [x for x in layout.layers if any(b.self_edit(step, x, br) for b in self.bound for br in self.branches)]
        words = [x for x in layout.layers
                 if any(b.cross_edit(step, x) or b.word_maps(step, x) is not None for b in self.bound)]
        blocks = [x for x in layout.resblocks
                  if any(b.feature_edit(step, x, br) for b in self.bound for br in self.branches)]
        if not (edited or words or blocks):
            return self.options
        options = patches.install(self.options, (edited, self._self_attention), (words, self._cross_attention),
                                  (blocks, self._feature))
        options["ledits_branches_differ"] = True  # an equal positive and negative are no longer the same
        if any(b.reads_words for b in self.bound):
            name = "sampler_calc_cond_batch_function"
            options[name] = patches.CondFirst(options.get(name), _evaluate)
        return options

    def _untouched(self, extra):
        """Entries with an area have another token grid, and no place in the source: they stay as they are."""
        return tuple(extra["original_shape"][-2:]) != self.size

    def _check_tokens(self, q, extra):
        patches.check_tokens(q, self.batch * len(extra["cond_or_uncond"]), extra)

    def _fetch(self, site, layer, like):
        """`(branch, name) -> tensor` of the source at this step; `like` is the target's q of the layer, or its feature."""
        i = self.start + self._step

        def fetch(branch, name):
            tensor = _usable(self.store.get(i, self.slot(branch, site, layer, name), like))
            if name in "qh" and tensor.shape[1:] != like.shape[1:]:
                raise ValueError(
                    f"The source's {layer.name} {site} {name} is {list(tensor.shape[1:])}, the target's {list(like.shape[1:])}: "
                    "the model's patches are not those that the attention store was captured with. Capture it again."
                )
            return tensor

        return fetch

    def _self_attention(self, layer, q, k, v, extra, previous):
        def attention(q, k, v, chunks):
            own = extra if len(chunks) == len(extra["cond_or_uncond"]) else patches.of_chunks(extra, chunks, len(q))
            return (previous or patches.attention)(q, k, v, own)

        edits = [
            [e for b in self.bound if (e := b.self_edit(self._step, layer, UNCOND if part else COND)) is not None]
            for part in extra["cond_or_uncond"]
        ]
        if self._untouched(extra) or not any(edits):
            return (previous or patches.attention)(q, k, v, extra)
        self._check_tokens(q, extra)
        grid = tuple(extra["activations_shape"][-2:])
        return attend.self_attention(q, k, v, edits, grid, self._fetch("attn1", layer, q), attention)

    def _cross_attention(self, layer, q, k, v, extra, previous):
        chunks = extra["cond_or_uncond"]
        edited = [
            (c, slice(c * self.batch, (c + 1) * self.batch))
            for c, part in enumerate(chunks)
            if part == 0 and extra["uuids"][c] in self.targets
        ]
        if self._untouched(extra) or not edited:
            return (previous or patches.attention)(q, k, v, extra)
        self._check_tokens(q, extra)

        def attention(q, k, v, chunks=(0,)):
            own = extra if len(q) == self.batch * len(extra["cond_or_uncond"]) else patches.of_chunks(extra, chunks, len(q))
            return patches.attention(q, k, v, own)

        def source(name):
            return self._fetch("attn2", layer, q)(SOURCE, name)

        edit = next((e for b in self.bound if (e := b.cross_edit(self._step, layer)) is not None), None)
        grid = tuple(extra["activations_shape"][-2:])
        for bound in self.bound:
            groups = bound.word_maps(self._step, layer)
            if groups is not None:
                rows = edited[0][1]
                maps = attend.word_maps(q[rows], k[rows], extra["n_heads"], *groups, edit, source, attention)
                bound.see_maps(self._step, layer, grid, *(m.detach() for m in maps))
        if edit is None:
            return (previous or patches.attention)(q, k, v, extra)
        edit = CrossEdit(*(None if part is None else _usable(part) for part in (edit.matrix, edit.own)))
        patched = None if previous is None else lambda q, k, v, chunks: previous(q, k, v, extra)
        return attend.cross_attention(q, k, v, edited, edit, source, attention, patched)

    def _feature(self, block, h, extra):
        if self._untouched(extra):
            return h
        parts, out = extra["cond_or_uncond"], h
        for c, part in enumerate(parts):
            for bound in self.bound:
                branch = bound.feature_edit(self._step, block, UNCOND if part else COND)
                if branch:
                    out = h.clone() if out is h else out
                    out[c * self.batch : (c + 1) * self.batch] = self._fetch("feature", block, h)(branch, "h")
        return out

    def after_step(self, i, y):
        """The target latent at the level after path step i, with what the controls make of it. Drops the step."""
        source = self.path.latents[i + 1].to(y)
        for bound in self.bound:
            y = bound.after_step(i - self.start, y, source)
        if self.kept is None:
            self.store.drop(i)
        return y

    def seen(self, y):
        """What the controls have to show of the run that ended at the latent y: `Seen`, or None."""
        parts = {name: value for bound in self.bound for name, value in bound.seen().items()}
        scale = getattr(self.path.latent_format, "spacial_downscale_ratio", 8)
        return Seen(self.steps, tuple(side * scale for side in self.size), y.cpu(), **parts) if parts else None


def _fits(has, own, slot):
    """Whether a tensor's shape can be a slot's; patches that scale features within the U-Net change height and width."""
    if slot.site == "feature":
        return len(has) == 4 and has[:2] == own[:2]
    return len(has) == 3 and (has[0], has[2]) == (own[0], own[2]) and (slot.name != "k" or slot.site == "attn1" or has == own)


def _usable(tensor):
    """The tensor, or where autograd runs a copy that it may keep."""
    return tensor.clone() if torch.is_grad_enabled() and tensor.is_inference() else tensor


def _evaluate(args):
    return comfy.samplers.calc_cond_batch(
        args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
    )
