"""The target pass: a plan's edits carried out in the model's calls, with what the source pass captured."""

import functools
import uuid

import comfy.samplers
import torch
from comfy.samplers import CFGGuider
from einops import rearrange

from . import attend, foreign, joint_attend
from .backbones import Backbone
from .backbones.calls import AttentionCall, JointCall, NetworkCall
from .blocks import Layer
from .conditioning import everywhere
from .edits import BRANCHES_DIFFER, COND, SOURCE, UNCOND, Comparison, Slot
from .plan import Plan
from .source_pass import SourcePass, usable


class TargetPass:
    """Carries out a plan.

    Args:
        plan: of the run.
        backbone: of the model.
        source: where captured tensors are fetched from.
        guider: the running CFGGuider, whose `conds` are set.
        options: the run's `model_options`.

    Raises:
        ValueError: the positive is limited to an area, or is not the target prompt.
    """

    def __init__(self, *, plan: Plan, backbone: Backbone, source: SourcePass, guider: CFGGuider, options: dict):
        self.plan, self.backbone, self.source, self.guider, self.options = plan, backbone, source, guider, options
        self.size, self.batch = plan.setting.size, plan.setting.batch
        self.positive = {c["uuid"] for c in guider.conds.get("positive") or []}
        self._tell_apart()
        self.targets, self.compared = self._target_entries(), self._compared_entries()
        self._step, self._seen, self._conds = None, set(), {}
        self._again = self._evaluated_again if foreign.of_rows(guider.model_options) else None

    def _target_entries(self):
        """{uuid: number of encoded words} of the positive's entries whose attention is edited by words."""
        given = self.guider.conds.get("positive") or []
        positive = [c for c in given if everywhere(c, self.size)]
        if given and not positive:
            raise ValueError(
                "The positive conditioning is limited to an area, and attention control acts on the whole picture. Use "
                "Conditioning (Set Mask) in place of Set Area, or combine it with a prompt for the whole picture."
            )
        prompts = self.plan.prompts
        if prompts is None:
            return {}

        def same(entry, embedding):
            words = entry.get("cross_attn")
            return words is not None and words.shape == embedding.shape and torch.equal(words.to(embedding), embedding)

        exact = [c for c in positive if same(c, prompts.target[0][0])]
        tokens = prompts.target[0][0].shape[1]
        fitting = exact or [c for c in positive if "cross_attn" in c and c["cross_attn"].shape[1] == tokens]
        if not exact and any(same(c, prompts.source[0][0]) for c in positive) or not fitting:
            raise ValueError(
                "The positive conditioning of the sampler is not the target prompt of Edit Prompts: connect its 'target' "
                "output (LoRA hooks, ControlNet and areas may be added on the way)."
            )
        return {c["uuid"]: c["model_conds"]["c_crossattn"].cond.shape[1] for c in fitting}

    def _compared_entries(self):
        """{uuid: the positive's encoded entry} whose maps are compared with the source's."""
        compared = {}
        for bound in self.plan.bound:
            comparisons = (bound.comparison(step) for step in range(self.plan.setting.steps))
            comparison = next((c for c in comparisons if c is not None), None)
            if comparison is None:
                continue
            tokens = self.source.words(comparison.source).shape[1]
            whole = [c for c in self.guider.conds.get("positive") or [] if everywhere(c, self.size) and "default" not in c]
            lengths = {c["uuid"]: c["model_conds"]["c_crossattn"].cond.shape[1] for c in whole}
            bound.check_lengths(tokens, set(lengths.values()))
            compared |= {own: length for own, length in lengths.items() if length == tokens}
        return set(compared)

    def begin(self, step: int) -> dict:
        """`model_options` for the model's calls at an executed step."""
        self._step, plan, layout = step, self.plan.at(step), self.plan.setting.layout
        self._seen = set()
        # of this step, as an inversion may prescribe others for every step
        self._conds = {c["uuid"]: c["model_conds"] for entries in self.guider.conds.values() for c in entries or ()}
        edited = {key for key, _ in plan.self_edits}
        words = plan.cross_edits.keys() | plan.word_maps.keys()
        blocks = {key for key, _ in plan.features}
        if not (edited or words or blocks):
            return self.options
        options = self.backbone.install(
            self.options,
            self_attention=([x for x in layout.layers if x.key in edited and not x.joint], self._self_attention),
            cross_attention=([x for x in layout.layers if x.key in words and not x.joint], self._cross_attention),
            joint_attention=([x for x in layout.layers if x.key in edited | words and x.joint], self._joint_attention),
            features=([x for x in layout.resblocks if x.key in blocks], self._feature),
        )
        options[BRANCHES_DIFFER] = True
        if self.plan.reads_words:
            name = "sampler_calc_cond_batch_function"
            options[name] = CondFirst(options.get(name), self.positive, self._again)
        return options

    def end(self):
        """The step is over.

        Raises:
            ValueError: a layer that was to be edited did not run.
        """
        plan = self.plan.at(self._step)
        wanted = {key for key, _ in plan.self_edits} | plan.cross_edits.keys()
        if self._seen and not wanted <= self._seen:
            name = ".".join(map(str, min(wanted - self._seen)))
            raise ValueError(
                f"The attention of block {name} did not run, so it could not be edited: a patch on the model replaces or "
                "skips it. Bypass it while attention control is connected."
            )

    def gradient(self, y: torch.Tensor, sigma: float, options: dict, differentiate, comparison: Comparison, loss):
        """`dL/dx` of a control's loss on the compared maps, see `Bound.before_step`.

        Args:
            options: of the step.
            differentiate: see `samplers.latent_gradient`.
            loss: `begin()`, `add(q, k, source_q, source_k, heads, entries)` for every compared layer, `end() -> scalar`.
        """
        entries = [c for c in self.guider.conds["positive"] if c["uuid"] in self.compared]

        def look(layer: Layer, q, k, v, call: AttentionCall):
            call.check_rows(q, self.batch * len(call.parts))
            source = (self._fetch("attn2", layer, q, comparison.source, name) for name in "qk")
            loss.add(q, k, *source, heads=call.heads, entries=len(entries))
            return call(q, k, v)

        layers = [x for x in self.plan.setting.layout.layers if x.key in comparison.layers]
        watched = self.backbone.install(options, cross_attention=(layers, look))
        slope = differentiate(self.guider, entries, y, sigma, watched, loss)
        for bound in self.plan.bound:
            bound.forget_maps()
        return slope

    def _evaluated_again(self, rows: int):
        """Count rows that were predicted once more than the guider asked for."""
        if hasattr(self.guider, "rows"):
            self.guider.rows += rows

    def _tell_apart(self):
        """Core gives the negative an entry like the positive's for each of its areas, which keeps the positive's uuid."""
        for name, entries in self.guider.conds.items():
            if name != "positive" and entries and any(c["uuid"] in self.positive for c in entries):
                self.guider.conds[name] = [
                    {**c, "uuid": uuid.uuid4()} if c["uuid"] in self.positive else c for c in entries
                ]

    def _branches(self, call: NetworkCall) -> list[str]:
        """COND or UNCOND of every chunk, by its conditioning: what number a guider gives it says nothing (Dual CFG)."""
        if not call.uuids:
            return [UNCOND if part else COND for part in call.parts]
        return [COND if own in self.positive else UNCOND for own in call.uuids]

    def _untouched(self, call: NetworkCall):
        """Entries with an area have another token grid, and no place in the source: they stay as they are."""
        return call.size != self.size

    def _fetch(self, site, layer: Layer, like, branch, name):
        return self.source.fetch(self._step, Slot(branch, site, layer.key, name), like)

    def _self_attention(self, layer: Layer, q, k, v, call: AttentionCall):
        self._seen.add(layer.key)
        edits = self.plan.at(self._step).self_edits
        edits = [edits.get((layer.key, branch), []) for branch in self._branches(call)]
        if self._untouched(call) or not any(edits):
            return call(q, k, v)
        call.check_rows(q, self.batch * len(call.parts))
        fetch = functools.partial(self._fetch, "attn1", layer, q)
        patched = call if call.patched else None
        return attend.self_attention(q, k, v, edits, call.grid, fetch, call.plain, patched)

    def _cross_attention(self, layer: Layer, q, k, v, call: AttentionCall):
        self._seen.add(layer.key)
        edited = [attend.rows_of([c], self.batch) for c, own in enumerate(call.uuids or ()) if own in self.targets]
        if self._untouched(call) or not edited:
            return call(q, k, v)
        call.check_rows(q, self.batch * len(call.parts))
        plan, source = self.plan.at(self._step), functools.partial(self._fetch, "attn2", layer, q, SOURCE)
        edit = plan.cross_edits.get(layer.key)
        edit = None if edit is None else edit.of(usable).folded()
        for bound, columns in plan.word_maps.get(layer.key, ()):
            rows = edited[0]
            alone = functools.partial(call.plain, rows=rows)
            maps = attend.word_maps(q[rows], k[rows], call.heads, *columns, edit, source, alone)
            bound.see_maps(self._step, layer, call.grid, *(m.detach() for m in maps))
        if edit is None:
            return call(q, k, v)
        return attend.cross_attention(q, k, v, edited, edit, source, call.plain, call if call.patched else None)

    def _joint_attention(self, layer: Layer, q, k, v, call: JointCall):
        self._seen.add(layer.key)
        plan = self.plan.at(self._step)
        edits = [plan.self_edits.get((layer.key, branch), []) for branch in self._branches(call)]
        edit, maps = plan.cross_edits.get(layer.key), plan.word_maps.get(layer.key, ())
        edited = [c for c, own in enumerate(call.uuids or ()) if own in self.targets] if edit is not None or maps else []
        if self._untouched(call) or not (any(edits) or edited):
            return call(q, k, v)
        call.check_rows(q, self.batch * len(call.parts))
        for own in call.uuids or ():
            if own in self._conds:
                self.backbone.check(call, self._conds[own])
        if edited:
            call.check_words()
        heads = {"h": call.heads}

        def fetch(branch, name, turned=True):
            """The picture's rows of the source, where the target has them."""
            tensor = rearrange(self._fetch("joint", layer, q[:, call.image].flatten(2), branch, name), "b n (h d) -> b n h d", **heads)
            there = self.source.beside(branch)
            return self.backbone.turn(tensor, call.image.start - there) if turned and name in "qk" else tensor

        words = {}
        positions = self._positions(layer, call, self.targets[call.uuids[edited[0]]]) if edited else None
        as_it_was = functools.partial(fetch, SOURCE, turned=False)
        for c in edited if edit is not None else ():
            words[c] = joint_attend.Words(edit=edit.of(usable), source=positions[0], target=positions[1], fetch=as_it_was)
        for bound, columns in maps if edited else ():
            rows = attend.rows_of(edited[:1], self.batch)
            mine = (t[:, call.image][rows] for t in (q, k, v))
            seen = joint_attend.word_maps(*mine, columns, words.get(edited[0]), positions, as_it_was, call, rows)
            bound.see_maps(self._step, layer, call.grid, *(m.detach() for m in seen))
        return joint_attend.joint_attention(q, k, v, edits, words, fetch, call)

    def _positions(self, layer: Layer, call: JointCall, encoded: int):
        """Where the words of the two prompts are among a layer's other tokens: (source or None, target) of
        `Joint.positions`.

        Args:
            encoded: words of the target's conditioning.
        """
        prompts, slot = self.plan.prompts, Slot(SOURCE, "joint", layer.key, "t")
        target = self.backbone.positions(len(prompts.target_tokens), encoded, call.others)
        source = None
        if slot in self.plan.at(self._step).reads:
            there = self.source.shape_of(self._step, slot)[1]
            source = self.backbone.positions(len(prompts.source_tokens), self.source.words(SOURCE).shape[1], there)
        return source, target

    def _feature(self, block: Layer, h, call: NetworkCall):
        if self._untouched(call):
            return h
        features, out = self.plan.at(self._step).features, h
        for c, own in enumerate(self._branches(call)):
            for branch in features.get((block.key, own), ()):
                out = h.clone() if out is h else out
                out[c * self.batch : (c + 1) * self.batch] = self._fetch("feature", block, h, branch, "h")
        return out


class CondFirst:
    """A `sampler_calc_cond_batch_function` that evaluates the positive before the rest, whose edits read its maps.

    Args:
        previous: another pack's function, or None.
        positive: uuids of the positive's entries.
        again: None, or `(rows) -> None` where patches of other packs compare rows (Normalized Attention Guidance): then the
            positive is evaluated once more, together with the rest, and its rows are told.
    """

    def __init__(self, previous, positive: set, again=None):
        self.previous, self.positive, self.again = previous, positive, again

    def __call__(self, args):
        conds, call = args["conds"], self.previous or _evaluate
        mine = [c is not None and any(entry["uuid"] in self.positive for entry in c) for c in conds]
        if not any(mine) or all(own or c is None for own, c in zip(mine, conds)):
            return call(args)
        if self.again is not None:
            call(args | {"conds": [c if own else None for own, c in zip(mine, conds)]})
            self.again(len(args["input"]) * sum(len(c) for own, c in zip(mine, conds) if own))
            return call(args)
        first, rest = (call(args | {"conds": [c if own == wanted else None for own, c in zip(mine, conds)]})
                       for wanted in (True, False))
        return [a if own else b for own, a, b in zip(mine, first, rest)]


def _evaluate(args):
    return comfy.samplers.calc_cond_batch(
        args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
    )
