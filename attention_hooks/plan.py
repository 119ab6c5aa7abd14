"""The plan of a run: what a chain of controls reads of the source and edits in the target, step by step.

Pure: it asks controls and layout, never a model.
"""

from dataclasses import dataclass

from .edits import COND, SOURCE, UNCOND, Bound, Comparison, Control, CrossEdit, SelfEdit, Setting, Slot


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Every answer of the controls for one executed step. A layer without an edit has no entry.

    Attributes:
        self_edits: {(Layer.key, branch): edits in chain order}.
        cross_edits: {Layer.key: the edit}.
        word_maps: {Layer.key: ((control, its token columns), ...)}.
        features: {(Layer.key, branch): source branches in chain order}.
        comparisons: what is compared before the step.
        reads: slots that are read, by the branches' own names.
    """

    self_edits: dict[tuple, list[SelfEdit]]
    cross_edits: dict[tuple, CrossEdit]
    word_maps: dict[tuple, list[tuple[Bound, tuple]]]
    features: dict[tuple, list[str]]
    comparisons: list[Comparison]
    reads: frozenset[Slot]


class Plan:
    """A chain of controls, bound to one run. Each is asked once for a step, a layer and a branch.

    Args:
        controls: in chain order.
        setting: sizes of the run.
        branches: of the target that may be edited.

    Raises:
        ValueError: a block that the model does not have, or controls that exclude each other.
    """

    def __init__(self, controls: tuple[Control, ...], setting: Setting, branches=(COND, UNCOND)):
        self.controls, self.setting, self.branches = tuple(controls), setting, branches
        self.bound = [control.bind(setting) for control in self.controls]
        for k, bound in enumerate(self.bound):
            bound.check_chain(self.bound[:k])
        self._steps = {}

    @property
    def prompts(self):
        """The chain's `EditPrompts`, or None."""
        return next((c.prompts for c in self.controls if c.prompts is not None), None)

    @property
    def reads_words(self):
        return any(bound.reads_words for bound in self.bound)

    def at(self, step: int) -> StepPlan:
        """The plan of an executed step."""
        if step not in self._steps:
            self._steps[step] = self._ask(step)
        return self._steps[step]

    def _ask(self, step):
        self_edits, cross_edits, word_maps, features, reads = {}, {}, {}, {}, set()
        for layer in self.setting.layout.layers:
            for branch in self.branches:
                edits = [e for b in self.bound if (e := b.self_edit(step, layer, branch)) is not None]
                if edits:
                    self_edits[layer.key, branch] = edits
                for edit in edits:
                    read = (("q", edit.q), ("k", edit.k), ("v", edit.v))
                    reads |= {Slot(source, layer.site, layer.key, name) for name, source in read if source}
            cross = next((e for b in self.bound if (e := b.cross_edit(step, layer)) is not None), None)
            maps = [(b, columns) for b in self.bound if (columns := b.word_maps(step, layer)) is not None]
            if cross is not None:
                cross_edits[layer.key] = cross
            if maps:
                word_maps[layer.key] = maps
            if layer.joint:
                names = "qkt" if maps else "qt" if cross is not None and cross.matrix is not None else ""
            else:
                names = "qk" if maps or (cross is not None and cross.matrix is not None) else ""
            reads |= {Slot(SOURCE, layer.words_site, layer.key, name) for name in names}
        for block in self.setting.layout.resblocks:
            for branch in self.branches:
                sources = [s for b in self.bound if (s := b.feature_edit(step, block, branch))]
                if sources:
                    features[block.key, branch] = sources
                    reads |= {Slot(source, "feature", block.key, "h") for source in sources}
        comparisons = [c for b in self.bound if (c := b.comparison(step)) is not None]
        reads |= {Slot(c.source, "attn2", key, name) for c in comparisons for key in c.layers for name in "qk"}
        return StepPlan(self_edits=self_edits, cross_edits=cross_edits, word_maps=word_maps, features=features,
                        comparisons=comparisons, reads=frozenset(reads))
