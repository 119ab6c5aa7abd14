"""The methods that Demo-Bench compares on the demo flow model, each as a workflow in ComfyUI's API format.

A method is a name such as "edit-friendly+target"; "@8" behind it turns its one main knob: the steps that are skipped at the
noisy end, or for RF-Inversion the steps during which the picture is held.
"""

import fnmatch
import re

from .piebench import Problem

# inversion: (node, its own inputs, eta of the edit or None, the main knob in 28 steps)
INVERSIONS = {
    "edit-friendly": ("LEDITS_EditFriendlyInversion", {"eta": 1.0}, 1.0, 8),
    "flowedit": ("LEDITS_EditFriendlyInversion", {"eta": 0.0}, 0.0, 8),
    "brownian": ("LEDITS_EditFriendlyInversion", {"eta": 1.0, "noise": "Brownian"}, 1.0, 8),
    "brownian-0": ("LEDITS_EditFriendlyInversion", {"eta": 0.0, "noise": "Brownian"}, 0.0, 8),
    "rf-inversion": ("LEDITS_RFInversion", {"gamma": 0.5}, None, 7),
    "direct": ("LEDITS_DirectInversion", {"refinements": 0, "tolerance": 1e-5, "convention": "A", "ablation": "none"}, None, 0),
    "sdedit": ("LEDITS_SDEditPath", {}, None, 8),
}
EDITORS = ("target", "concept", "ledits")
METHODS = (*(f"{inversion}+target" for inversion in INVERSIONS), "edit-friendly+concept", "edit-friendly+ledits",
           "flowedit+concept")
STEPS, SOURCE_CFG = 28, 1.0
# Concepts alone have no prompt, as in LEDITS' first way to edit.
CONCEPT = {"scale": 5.0, "threshold": 0.9, "warmup": 0, "momentum_scale": 0.3, "momentum_beta": 0.6}


def parse(text):
    """The methods that a text names: "all", "edit-friendly+target@4 flowedit+*@8".

    Raises:
        Problem: a name that fits none.
    """
    chosen = []
    for name in filter(None, re.split(r"[\s,]+", text.strip().lower())):
        base, _, knob = name.partition("@")
        found = METHODS if base in ("all", "paper") else fnmatch.filter(METHODS, base)
        if not found or (knob and not knob.isdigit()):
            raise Problem(f"There is no method '{name}' on the flow model: choose all, or of {', '.join(METHODS)}, with @ and "
                          "a number of steps behind it for its knob; * stands for any.")
        chosen += [f"{method}@{knob}" if knob else method for method in found]
    if not chosen:
        raise Problem("No method is named: choose all, or names such as flowedit+target.")
    return tuple(dict.fromkeys(chosen))


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def build(method, item, image, settings, concept):
    """As `table_methods.build`.

    Args:
        concept: (words, direction) of the edit.
    """
    base, _, knob = method.partition("@")
    inversion, editor = base.split("+")
    kind, own, eta, usual = INVERSIONS[inversion]
    knob = int(knob) if knob else round(usual * settings.steps / STEPS)
    held = inversion == "rf-inversion"
    guidance = settings.guidance(method)
    nodes = {
        "loader": node("LEDITS_LoadDemoModel", network="flow"),
        "picture": node("LoadImage", image=image),
        "encoded": node("VAEEncode", pixels=["picture", 0], vae=["loader", 2]),
        "empty": _text(""), "source": _text(item.source), "target": _text(item.target),
        "inversion": _inversion(kind, own, settings, "empty" if editor == "concept" else "source"),
    }
    model = ["loader", 0]
    if held:
        model = ["held", 0]
        nodes["held"] = node("LEDITS_HoldPicture", model=["loader", 0], inversion=["inversion", 0], strength=0.9, start=0.0,
                             stop=max(knob, 1) / settings.steps)
    more = {} if eta is None else {"eta": eta}
    if editor != "target":
        words, direction = concept
        scale = CONCEPT["scale"] if settings.concept_scale is None else settings.concept_scale
        nodes["concept"] = node("LEDITS_SemanticConcept", clip=["loader", 1], prompt=words, direction=direction, cooldown=0,
                                weight=1.0, **{**CONCEPT, "scale": scale})
        more["concepts"] = ["concept", 0]
    alone = editor == "concept"
    nodes["edit"] = node("LEDITS_KSampler", model=model, positive=["empty" if alone else "target", 0], negative=["empty", 0],
                         inversion=["inversion", 0], cfg=SOURCE_CFG if alone else guidance, skip=0 if held else knob, **more)
    nodes["decoded"] = node("VAEDecode", samples=["edit", 0], vae=["loader", 2])
    nodes["shown"] = node("PreviewImage", images=["decoded", 0])
    return nodes


def _text(text):
    return node("CLIPTextEncode", text=text, clip=["loader", 1])


def _inversion(kind, own, settings, prompt):
    inputs = {"model": ["loader", 0], "latent": ["encoded", 0], "steps": settings.steps, "scheduler": "simple", **own}
    if kind != "LEDITS_SDEditPath":
        inputs |= {"positive": [prompt, 0], "negative": ["empty", 0], "cfg": SOURCE_CFG}
    if kind != "LEDITS_DirectInversion":
        inputs["seed"] = settings.seed
    return node(kind, **inputs)
