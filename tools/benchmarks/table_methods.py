"""The methods that a benchmark compares: every inversion by every editor, each as a workflow in ComfyUI's API format.

A method is a name such as "direct+p2p". `build` makes the workflow of one picture from the pack's own nodes, with the
settings of the papers' released code; methods that share an inversion give it equal inputs, so that ComfyUI computes it
once when they follow each other in the order of METHODS.
"""

import fnmatch
import re
from dataclasses import dataclass

from ...attention_hooks.text.words import split
from . import flow_methods
from .piebench import Problem

INVERSIONS = ("ddim", "null-text", "negative-prompt", "stylediffusion", "direct", "edit-friendly")
EDITORS = ("p2p", "p2plus", "ledits", "pnp", "masactrl", "pix2pix-zero")
METHODS = tuple(f"{inversion}+{editor}" for inversion in INVERSIONS for editor in EDITORS)
PAPER = tuple(f"{inversion}+{editor}" for inversion, editor in (
    ("ddim", "p2p"), ("null-text", "p2p"), ("negative-prompt", "p2p"), ("stylediffusion", "p2p"), ("direct", "p2p"),
    ("ddim", "masactrl"), ("direct", "masactrl"), ("ddim", "pix2pix-zero"), ("direct", "pix2pix-zero"), ("ddim", "pnp"),
    ("direct", "pnp")))
"""Rows of the Direct Inversion paper's table, in its order."""
LEARNING = ("null-text", "stylediffusion")
SHOWN, EDIT = "shown", "edit"  # ids of the nodes that show the edited picture and make the edit

PNP_NEGATIVE = "ugly, blurry, black, low res, unrealistic"
CONCEPTS = {"style": (8.0, 2, 0.92), "object": (15.0, 5, 0.95), "custom": (7.0, 2, 0.95)}  # scale, warmup, threshold
CONCEPT_OF = {1: "object", 2: "object", 3: "object", 9: "style"}  # by type of edit


@dataclass(frozen=True)
class Settings:
    """What all methods of a run have in common.

    Attributes:
        checkpoint: a checkpoint's name on the server; "" for the pack's demo model.
        steps: of every path.
        cfg: guidance of every edit; None for each method's own.
        concept_scale: of LEDITS' concepts; None for the presets of its authors.
        xa_guidance: of pix2pix-zero; None for its authors' 0.1.
        seed: of noise maps.
        network: of the demo model, "U-Net" or "flow", which has methods of its own (`flow_methods`).
    """

    checkpoint: str = ""
    steps: int = 50
    cfg: float | None = None
    concept_scale: float | None = None
    xa_guidance: float | None = None
    seed: int = 1234
    network: str = "U-Net"

    def guidance(self, method):
        if self.cfg is not None:
            return self.cfg
        return 15.0 if method == "edit-friendly+ledits" else 7.5

    def skip(self, method):
        """Steps left out at the noisy end: 36 of 100 for LEDITS, 12 of 50 for other edit-friendly edits."""
        inversion, editor = method.split("+")
        share = 0.36 if editor == "ledits" else 0.24 if inversion == "edit-friendly" else 0.0
        return min(round(share * self.steps), self.steps - 1)


def parse(text, network="U-Net"):
    """The methods that a text names, in the order of METHODS: "all", "paper", "direct+p2p, *+masactrl".

    Raises:
        Problem: a name that fits none.
    """
    if network == "flow":
        return flow_methods.parse(text)
    chosen = set()
    for name in filter(None, re.split(r"[\s,]+", text.strip().lower())):
        found = set(METHODS) if name == "all" else set(PAPER) if name == "paper" else set(fnmatch.filter(METHODS, name))
        if not found:
            raise Problem(f"There is no method '{name}': choose all, paper, or inversion+editor, such as direct+p2p, "
                          f"of {', '.join(INVERSIONS)} and {', '.join(EDITORS)}; * stands for any.")
        chosen |= found
    if not chosen:
        raise Problem("No method is named: choose all, paper, or names such as direct+p2p.")
    return tuple(name for name in METHODS if name in chosen)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def build(method, item, image, settings):
    """The workflow of one picture and method; its node SHOWN gives the edited picture.

    Args:
        method: of METHODS.
        item: `piebench.Item`.
        image: the picture's name for Load Image.
        settings: `Settings`.
    """
    if settings.network == "flow":
        return flow_methods.build(method, item, image, settings, concept(item))
    inversion, editor = method.split("+")
    return {
        "loader": node("CheckpointLoaderSimple", ckpt_name=settings.checkpoint)
        if settings.checkpoint else node("LEDITS_LoadDemoModel"),
        "picture": node("LoadImage", image=image),
        "encoded": node("VAEEncode", pixels=["picture", 0], vae=["loader", 2]),
        "empty": _text(""),
        "source": _text(item.source),
        "target": _text(item.target),
        "inversion": _inversion(inversion, editor, settings),
        **_EDITORS[editor](item, inversion, settings),
        "decoded": node("VAEDecode", samples=[EDIT, 0], vae=["loader", 2]),
        SHOWN: node("PreviewImage", images=["decoded", 0]),
    }


def _text(text):
    return node("CLIPTextEncode", text=text, clip=["loader", 1])


# --- inversions -----------------------------------------------------------------------------------------------------


def _is_empty(inversion, editor):
    """Whether the source prompt is the empty one: MasaCtrl's, where nothing is learned for the prompt."""
    return editor == "masactrl" and inversion in ("ddim", "direct", "edit-friendly")


def _inversion(inversion, editor, settings):
    cfg, plain = settings.guidance(f"{inversion}+{editor}"), {"refinements": 0, "tolerance": 1e-5, "convention": "A"}
    common = {
        "model": ["loader", 0],
        "positive": ["empty" if _is_empty(inversion, editor) else "source", 0],
        "negative": ["empty", 0],
        "latent": ["encoded", 0],
        "steps": settings.steps,
        "scheduler": "ddim_uniform",
    }
    learned = {"cfg": cfg, "learning_rate": 0.01, "early_stop": 1e-5, "on_interrupt": "discard"}
    if editor == "pix2pix-zero" and inversion in ("ddim", "direct"):
        path = _again(1.0) if inversion == "ddim" else {"path": "inverted"}
        return node("LEDITS_DDIMInversion", cfg=1.0, **common, **plain | {"convention": "B"}, **path,
                    **_regularised(settings.seed))
    if inversion == "ddim":
        # the released Plug-and-Play rebuilds the source without guidance, the others with the edit's
        again = 1.0 if editor == "pnp" or _is_empty(inversion, editor) else cfg
        return node("LEDITS_DDIMInversion", cfg=1.0, **common, **plain, **_again(again))
    if inversion == "negative-prompt":  # source and negative are one prompt: guidance changes nothing
        return node("LEDITS_NegativePromptInversion", cfg=1.0, interpolation=0.0, **common, **plain, **_again(1.0))
    if inversion == "direct":
        return node("LEDITS_DirectInversion", cfg=1.0, ablation="none", **common, **plain)
    if inversion == "null-text":
        return node("LEDITS_NullTextInversion", inner_steps=10, path="re-simulated", **common, **learned)
    if inversion == "stylediffusion":
        return node("LEDITS_StyleDiffusionInversion", first_steps=100, attention_loss=1.0, tau_v=0.5, path="re-simulated",
                    **common, **learned)
    source_cfg = 3.5 if editor == "ledits" else 1.0
    return node("LEDITS_EditFriendlyInversion", cfg=source_cfg, eta=1.0, seed=settings.seed, **common)


def _again(cfg):
    return {"path": "re-simulated", "path.edit_cfg": cfg}


def _regularised(seed):
    """The noise regularisation of the released pix2pix-zero."""
    chosen = {"lambda_ac": 20.0, "lambda_kl": 20.0, "reg_steps": 5, "ac_rolls": 5, "reg_seed": seed}
    name = "noise_regularisation"
    return {name: "pix2pix-zero", **{f"{name}.{key}": value for key, value in chosen.items()}}


# --- editors --------------------------------------------------------------------------------------------------------


def _edit(method, settings, negative="empty", **more):
    """What was learned against the empty negative goes with no other: StyleDiffusion's values lose the colours."""
    if method.split("+")[0] in LEARNING:
        negative = "empty"
    return {EDIT: node("LEDITS_KSampler", model=["loader", 0], positive=["target", 0], negative=[negative, 0],
                       inversion=["inversion", 0], cfg=settings.guidance(method), skip=settings.skip(method),
                       **more)}


def _said(word, prompt):
    """Whether a word is in a prompt, as the attention nodes look for it."""
    word, words = _bare(word), _bare(prompt)
    return bool(word) and any(words[i : i + len(word)] == word for i in range(len(words)))


def _bare(text):
    return [bare for word in split(text) if (bare := re.sub(r"[\W_]+", "", word))]


def _words(item):
    """The blended words that are in their prompts, as the released code looks them up: (source or "", target or "")."""
    words = (re.sub(r"[,;:=\s]+", "", word) for word in (*item.blended, "", ""))
    return [word if _said(word, prompt) else "" for word, prompt in zip(words, (item.source, item.target))]


def _p2p(item, inversion, settings, cross=0.4, own=0.6, kind="LEDITS_PromptToPrompt", editor="p2p", **more):
    """Prompt-to-Prompt as the benchmark ran it. Edit-friendly and StyleDiffusion had no local blend, no reweighting."""
    before, after = _words(item) if inversion not in ("edit-friendly", "stylediffusion") else ("", "")
    if inversion == "edit-friendly":
        more["self_blocks"] = "@<=16"
    if inversion == "stylediffusion":
        cross = 0.6
    control = node(kind, prompts=["prompts", 2], cross_replace_steps=cross, self_replace_steps=own,
                   equalizer=f"{after}: 2" if after else "",
                   blend_words=", ".join(dict.fromkeys(filter(None, (before, after)))), **more)
    mapping = "auto" if inversion == "edit-friendly" else "refine"
    return {
        "prompts": node("LEDITS_EditPrompts", clip=["loader", 1], source=item.source, target=item.target,
                        mapping=mapping),
        "control": control,
        **_edit(f"{inversion}+{editor}", settings, attention=["control", 0]),
    }


def _p2plus(item, inversion, settings):
    """As its authors run it for larger changes of structure."""
    return _p2p(item, inversion, settings, 0.6, 0.6, "LEDITS_P2Plus", "p2plus", uncond_self_replace_steps=0.5)


def _masactrl(item, inversion, settings):
    source = "empty" if _is_empty(inversion, "masactrl") else "source"
    return {
        "control": node("LEDITS_MasaCtrl", start_step=0.08, source=[source, 0]),
        **_edit(f"{inversion}+masactrl", settings, attention=["control", 0]),
    }


def _pnp(item, inversion, settings):
    """The source branch has the empty prompt. What the authors' negative names, the demo model has never seen."""
    return {
        "negative": _text(PNP_NEGATIVE if settings.checkpoint else ""),
        "control": node("LEDITS_PlugAndPlay", pnp_f_t=0.8, pnp_attn_t=0.5, source=["empty", 0]),
        **_edit(f"{inversion}+pnp", settings, "negative", attention=["control", 0]),
    }


def _pix2pix_zero(item, inversion, settings):
    """The target is source + (target - source), so the target prompt; the negative is the source prompt."""
    strength = 0.1 if settings.xa_guidance is None else settings.xa_guidance
    return {
        "control": node("LEDITS_Pix2PixZero", xa_guidance=strength, source=["source", 0]),
        **_edit(f"{inversion}+pix2pix-zero", settings, "source", attention=["control", 0]),
    }


def concept(item):
    """What LEDITS pushes towards or away from: (words, direction)."""
    phrases, direction = item.target_marked or item.source_marked, "towards" if item.target_marked else "away"
    if not phrases:
        return item.target, "towards"
    words = re.sub(r"^(and|with) ", "", " ".join(phrases))
    name = item.blended[-1] if item.blended else ""
    if not name or _said(name, words):
        return words, direction
    return (f"{name} {words}" if re.match(r"(in|on|at) ", words) else f"{words} {name}"), direction


def _ledits(item, inversion, settings):
    """Target prompt and one concept ("combined", arXiv 2307.00522), with the presets of its authors."""
    words, direction = concept(item)
    scale, warmup, threshold = CONCEPTS[CONCEPT_OF.get(item.type, "custom")]
    return {
        "concept": node("LEDITS_SemanticConcept", clip=["loader", 1], prompt=words, direction=direction,
                        scale=scale if settings.concept_scale is None else settings.concept_scale, threshold=threshold,
                        warmup=warmup, cooldown=0, momentum_scale=0.3, momentum_beta=0.6, weight=1.0),
        **_edit(f"{inversion}+ledits", settings, concepts=["concept", 0]),
    }


_EDITORS = {"p2p": _p2p, "p2plus": _p2plus, "pnp": _pnp, "masactrl": _masactrl, "ledits": _ledits,
            "pix2pix-zero": _pix2pix_zero}
