"""One edit with attention control: the source pass ahead of the target, and the patches of the target's calls."""

import math

import comfy.samplers
import torch

from . import attend, patches
from .edits import COND, SOURCE, UNCOND
from .source_pass import SourcePass


class AttentionRun(SourcePass):
    """Serves one run of a sampler: `prepare` before a step, `after_step` behind it. Nothing of it outlives the run.

    Args:
        kept: a store from Capture Attention, which replaces the source pass; else as for `SourcePass`.

    Raises:
        ValueError: the kept store is another picture's or lacks something, or the positive is not the target prompt.
    """

    def __init__(self, *args, kept=None, **kwargs):
        super().__init__(*args, store=kept, **kwargs)
        self.kept, self._step = kept, None
        self.targets = self._target_entries()
        if kept is not None:
            self._check(kept)

    def _target_branches(self):
        """Branches that the guider evaluates."""
        without = math.isclose(self.guider.cfg, 1.0) and not self.options.get("disable_cfg1_optimization", False)
        return (COND,) if without and not getattr(self.guider, "concepts", ()) else (COND, UNCOND)

    def _target_entries(self):
        """uuids of the positive's entries whose cross-attention is edited by words."""
        prompts = next((c.prompts for c in self.controls if c.prompts is not None), None)
        if prompts is None:
            return set()
        positive = [c for c in self.guider.conds.get("positive") or [] if "area" not in c]
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

    def prepare(self, i):
        """Make ready for path step i.

        Returns:
            `model_options` for the model's calls at this step.
        """
        self._step = i - self.start
        if self.kept is None and any(not self.store.has(i, slot) for slot in self.needs(self._step)):
            self.fill(self.ahead(self._step))
        return self._target_options()

    def _target_options(self):
        step, layout = self._step, self.layout
        edited = [x for x in layout.layers if any(b.self_edit(step, x, br) for b in self.bound for br in self.branches)]
        words = [x for x in layout.layers
                 if any(b.cross_edit(step, x) or b.word_maps(step, x) is not None for b in self.bound)]  # fmt: skip
        blocks = [x for x in layout.resblocks
                  if any(b.feature_edit(step, x, br) for b in self.bound for br in self.branches)]  # fmt: skip
        if not (edited or words or blocks):
            return self.options
        options = patches.install(self.options, (edited, self._self_attention), (words, self._cross_attention),
                                  (blocks, self._feature))  # fmt: skip
        options["ledits_branches_differ"] = True  # an equal positive and negative are no longer the same
        if any(b.reads_words for b in self.bound):
            name = "sampler_calc_cond_batch_function"
            options[name] = patches.CondFirst(options.get(name), _evaluate)
        return options

    def _untouched(self, rows, extra):
        """Entries with an area have another token grid, and no place in the source: they stay as they are."""
        return tuple(extra["original_shape"][-2:]) != self.size or rows != self.batch * len(extra["cond_or_uncond"])

    def _fetch(self, site, layer, like):
        i = self.start + self._step
        return lambda branch, name: self.store.get(i, self.slot(branch, site, layer, name), like)

    def _self_attention(self, layer, q, k, v, extra, previous):
        def attention(q, k, v, chunks):
            own = extra if len(chunks) == len(extra["cond_or_uncond"]) else patches.of_chunks(extra, chunks, len(q))
            return (previous or patches.attention)(q, k, v, own)

        edits = [
            [e for b in self.bound if (e := b.self_edit(self._step, layer, UNCOND if part else COND)) is not None]
            for part in extra["cond_or_uncond"]
        ]
        if self._untouched(len(q), extra) or not any(edits):
            return (previous or patches.attention)(q, k, v, extra)
        grid = tuple(extra["activations_shape"][-2:])
        return attend.self_attention(q, k, v, edits, grid, self._fetch("attn1", layer, q), attention)

    def _cross_attention(self, layer, q, k, v, extra, previous):
        chunks = extra["cond_or_uncond"]
        edited = [
            (c, slice(c * self.batch, (c + 1) * self.batch))
            for c, part in enumerate(chunks)
            if part == 0 and extra["uuids"][c] in self.targets
        ]
        if self._untouched(len(q), extra) or not edited:
            return (previous or patches.attention)(q, k, v, extra)

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
                bound.see_maps(self._step, layer, grid, *maps)
        if edit is None:
            return (previous or patches.attention)(q, k, v, extra)
        patched = None if previous is None else lambda q, k, v, chunks: previous(q, k, v, extra)
        return attend.cross_attention(q, k, v, edited, edit, source, attention, patched)

    def _feature(self, block, h, extra):
        if self._untouched(len(h), extra):
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


def _evaluate(args):
    return comfy.samplers.calc_cond_batch(
        args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
    )
