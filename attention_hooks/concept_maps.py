"""Where concepts look: the attention of the picture to a concept's words, in the call that predicts it."""

import torch
from comfy.samplers import CFGGuider
from einops import rearrange

from . import attend, backbones, joint_attend
from .backbones.calls import AttentionCall, JointCall, NetworkCall
from .blocks import Layer, at_quarter_resolution, select


class ConceptMaps:
    """Watches predictions of concepts; nothing is changed.

    U-Nets are looked at in all layers of a quarter of the latent's resolution, down and up, as LEDITS++ does
    (arXiv 2311.16711), other networks in the blocks in which words are seen best (`blocks.PRESETS`).

    Args:
        guider: the running CFGGuider.
        words: {index: float32 [tokens]}, 1 at the concept's words.
        conds: {index: its encoded entries}.
        x: the latent, for its size.

    Raises:
        ValueError: a network that is not known, video of several frames, or words that are not the conditioning's.
    """

    def __init__(self, guider: CFGGuider, words: dict, conds: dict, x: torch.Tensor):
        self.backbone = backbones.of(guider.inner_model)
        self.size, self.batch = tuple(x.shape[-2:]), len(x)
        if x.ndim == 5 and self.backbone.frames(x.shape[2]) > 1:
            raise ValueError("Masks from attention are made for pictures, not for video of several frames: choose another mask.")
        layout = self.backbone.layout
        if layout.joint:
            self._keys = select("words", layout.layers, layout, self.size)
        else:
            quarter = tuple(-(-side // 4) for side in self.size)
            there = {x.key for x in layout.layers if x.part != "middle" and x.grid(self.size) == quarter}
            self._keys = there or set(at_quarter_resolution(layout, self.size))
        self._words, self._seen = {}, {}
        for index, columns in words.items():
            for entry in conds[index]:
                encoded = entry["model_conds"]["c_crossattn"].cond.shape[1]
                if not layout.joint and encoded != len(columns):
                    raise ValueError(
                        f"The concept has {encoded} tokens, its words {len(columns)}: connect the CLIP that encodes its prompt, "
                        "and no conditioning, or choose a mask without attention."
                    )
                self._words[entry["uuid"]] = index, columns.to(x), encoded, entry["model_conds"]

    def install(self, options: dict) -> dict:
        """`model_options` for a call in which concepts are predicted."""
        self._seen = {}
        layers = [x for x in self.backbone.layout.layers if x.key in self._keys]
        joint, apart = ([x for x in layers if x.joint is is_joint] for is_joint in (True, False))
        return self.backbone.install(options, cross_attention=(apart, self._cross), joint_attention=(joint, self._joint))

    def maps(self, wanted: list[int]) -> dict[int, torch.Tensor]:
        """{index: [B, h, w]} of the last call, mean over heads and layers, of the concepts that were predicted.

        Raises:
            ValueError: the attention of one of them was not seen.
        """
        watched = {index for index, *_ in self._words.values()} & set(wanted)
        if not watched <= self._seen.keys():
            raise ValueError(
                "The attention of a concept could not be seen: a patch on the model replaces it. Bypass it, or choose a mask "
                "without attention."
            )
        return {index: torch.stack(self._seen[index]).mean(0) for index in watched}

    def _mine(self, call: NetworkCall):
        """(index, columns, encoded, model_conds, rows) of every chunk that is a concept's."""
        for c, own in enumerate(call.uuids or ()):
            if own in self._words and call.size == self.size:
                yield *self._words[own], attend.rows_of([c], self.batch)

    def _keep(self, index, call, share):
        self._seen.setdefault(index, []).append(rearrange(share, "b (h w) -> b h w", h=call.grid[0]))

    def _cross(self, layer: Layer, q, k, v, call: AttentionCall):
        for index, columns, _, _, rows in self._mine(call):
            alone = lambda *qkv, rows=rows: call.plain(*qkv, rows=rows)  # noqa: E731
            self._keep(index, call, attend.shares(q[rows], k[rows], call.heads, columns[:, None], alone)[..., 0])
        return call(q, k, v)

    def _joint(self, layer: Layer, q, k, v, call: JointCall):
        for index, columns, encoded, conds, rows in self._mine(call):
            self.backbone.check(call, conds)
            call.check_words()
            places = self.backbone.positions(len(columns), encoded, call.others)
            keys = torch.cat([call.words(rows)[0], k[rows][:, call.image]], 1)
            share = joint_attend.shares(q[rows][:, call.image], keys, columns[:, None], places, call, rows)
            self._keep(index, call, share[..., 0])
        return call(q, k, v)
