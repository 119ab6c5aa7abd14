"""Embeddings that an inversion prescribes, put in place step by step while its path is edited.

Where they go is the guider's conditioning of one run, which ComfyUI copies for every run: nothing outlives it, and any
guider with a "positive" and a "negative" takes part.
"""

import math
import uuid

import comfy.conds
import comfy.model_patcher
import comfy.samplers

from ..attention_hooks.edits import VALUE_PRESCRIBED
from .attention_taps import ValuePatch
from .methods.negative_prompt import BESIDE_WORDS
from .methods.record import Inversion
from .phased import Run

NAMES = ("negative", "negative_pooled", "value", *(f"negative.{key}" for key in BESIDE_WORDS))


class Overrides:
    """`Inversion.overrides` for one run: make it when the run starts, call `apply(i)` before step i.

    Args:
        run: of the SAMPLER.
        inversion: the path. "negative" replaces the words of every entry of the negative, "negative_pooled" their
            pooled text, "negative.<key>" what else belongs to them; "value" changes what `to_v` sees in the positive's
            cross-attention, in the share of the path's steps that `settings["tau_v"]` names (all without it).

    Attributes:
        extra_args: to evaluate with, in place of the run's.

    Raises:
        ValueError: an override of a name that this version does not know, or that the prompt has no place for.
    """

    def __init__(self, run: Run, inversion: Inversion):
        guider = run.guider
        self._guider, self._method, self._prescribed = guider, inversion.method, inversion.overrides
        self.extra_args = run.extra_args
        unknown = [name for name in self._prescribed if name not in NAMES]
        if unknown:
            raise ValueError(
                f"This inversion ({inversion.method}) prescribes '{unknown[0]}', which this version cannot apply. "
                "Update the pack, or invert the picture again."
            )
        self._words, self._value = self._prescribed.get("negative"), self._prescribed.get("value")
        self._value_steps = inversion.settings.get("tau_v", 1.0) * inversion.steps
        self._device, self._encoded, self._placed = run.device, {}, None
        if self._value is not None and len(self._value) < min(self._value_steps, inversion.steps):
            raise ValueError(
                f"This inversion ({inversion.method}) prescribes values for {len(self._value)} steps, and acts in "
                f"{math.ceil(self._value_steps)}: it is damaged. Invert the picture again."
            )
        if "negative" not in guider.conds:  # a guider without one: nothing is subtracted
            self._words = None
        elif "negative_pooled" in self._prescribed or self._words is not None:
            self._encode(run.noise, {"seed": run.extra_args.get("seed"), **run.encoding})
        if self._value is not None:
            self._watch_values()

    def apply(self, i: int):
        """Put the embeddings of step i (of the whole path) in place."""
        step = i if self._words is not None and len(self._words) > 1 else 0
        if step != self._placed and (self._words is not None or self._encoded):
            words = None if self._words is None else self._words[step]
            entries = self._guider.conds["negative"]
            self._guider.conds["negative"] = [self._replaced(k, entry, words) for k, entry in enumerate(entries)]
            self._placed = step
        if self._value is not None:
            self._values.value = self._value[i].to(self._device) if i < self._value_steps else None

    def _replaced(self, k, entry, words):
        encoded = {**entry["model_conds"], **self._encoded.get(k, {})}
        there = encoded.get("c_crossattn")
        if words is not None and type(there) is comfy.conds.CONDCrossAttn:
            encoded["c_crossattn"] = type(there)(words.to(there.cond))
        return {**entry, "model_conds": encoded}

    def _encode(self, noise, encoding):
        """What the model makes of the prescribed prompt, for each entry of the negative, beside plain words.

        Of a U-Net that is the pooled text (SDXL's "y"). A network whose words are not plain cross-attention reads more
        from the prompt (its length, a mask, states of other encoders): there the whole entry is encoded anew.
        """
        negative, whole = self._guider.conds["negative"], {}
        self._check_widths(negative)
        if self._words is not None:
            plain = {k for k, e in enumerate(negative)
                     if type(e["model_conds"].get("c_crossattn")) is comfy.conds.CONDCrossAttn}
            if len(plain) < len(negative) and len(self._words) > 1:
                raise ValueError(
                    f"This inversion ({self._method}) prescribes other words at every step, which only U-Nets take. "
                    "Use an inversion without learning (Direct Inversion, for example)."
                )
            beside = {key: self._prescribed[f"negative.{key}"].to(noise.device) for key in BESIDE_WORDS
                      if f"negative.{key}" in self._prescribed}
            if "attention_mask" in beside:
                beside["attention_mask"] = beside["attention_mask"].long()
            none = dict.fromkeys(key for e in negative for key in BESIDE_WORDS if key in e)
            words = {"model_conds": {}, "cross_attn": self._words[0].to(noise), **none, **beside}
            whole = {k: words for k in range(len(negative)) if k not in plain}
        pooled = {}
        if "negative_pooled" in self._prescribed:
            pooled = {"pooled_output": self._prescribed["negative_pooled"].to(noise)}
        if not (whole or pooled):
            return
        entries = [{**entry, **whole.get(k, {}), **pooled} for k, entry in enumerate(negative)]
        model = self._guider.inner_model
        encoded = comfy.samplers.encode_model_conds(
            model.extra_conds, entries, noise, noise.device, "negative", **encoding
        )
        for k, entry in enumerate(encoded):
            made = entry["model_conds"]
            self._encoded[k] = made if k in whole else {"y": made["y"]} if "y" in made else {}

    def _check_widths(self, negative):
        """Refuse embeddings that cannot stand in the place of the negative's.

        Raises:
            ValueError: they are of another text encoder, or do not fit each other.
        """
        llama = "conditioning_llama3"
        for entry in negative:
            there = entry["model_conds"].get("c_crossattn")
            pairs = {
                "words of width": (self._words, None if there is None else there.cond, (-1,)),
                "pooled words of width": (self._prescribed.get("negative_pooled"), entry.get("pooled_output"), (-1,)),
                "layers x width of words": (self._prescribed.get(f"negative.{llama}"), entry.get(llama), (1, -1)),
            }
            for what, (own, here, axes) in pairs.items():
                if own is None or here is None:
                    continue
                own, here = (" x ".join(str(tensor.shape[axis]) for axis in axes) for tensor in (own, here))
                if own != here:
                    raise ValueError(
                        f"This inversion ({self._method}) prescribes {what} {own}, this model's have {here}: it was made "
                        "with another text encoder. Invert the picture again."
                    )
        mask = self._prescribed.get("negative.attention_mask")
        if mask is not None and self._words is not None and mask.shape[-1] != self._words.shape[-2]:
            raise ValueError(
                f"This inversion ({self._method}) prescribes {self._words.shape[-2]} words and a mask of {mask.shape[-1]}: it is "
                "damaged. Invert the picture again."
            )

    def _watch_values(self):
        """Mark the positive's rows, and add the patch that tells them by the mark."""
        positive = [{**entry, "uuid": uuid.uuid4(), VALUE_PRESCRIBED: True} for entry in self._guider.conds["positive"]]
        tokens, width = self._value.shape[-2:]
        for entry in positive:
            cross = entry["model_conds"].get("c_crossattn")
            if type(cross) is not comfy.conds.CONDCrossAttn:
                raise ValueError(
                    f"This inversion ({self._method}) prescribes what cross-attention sees, which only U-Nets have: it is "
                    "damaged. Invert the picture again."
                )
            if cross.cond.shape[2] != width:
                raise ValueError(
                    f"This inversion ({self._method}) prescribes values of width {width}, this model's words have "
                    f"{cross.cond.shape[2]}: it was made with another text encoder. Invert the picture again."
                )
            if cross.cond.shape[1] % tokens:
                raise ValueError(
                    f"The inversion learned {tokens} tokens, the positive prompt has {cross.cond.shape[1]}: invert "
                    "again with a source prompt of about the same length."
                )
        self._guider.conds["positive"] = positive
        self._values = ValuePatch(entry["uuid"] for entry in positive)
        options = comfy.model_patcher.create_model_options_clone(self.extra_args["model_options"])
        self._values.install(options)
        self.extra_args = {**self.extra_args, "model_options": options}
