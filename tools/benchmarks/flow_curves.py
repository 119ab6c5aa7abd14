"""Curves of the flow methods on the demo flow model: how often the edit is made against how much of the rest is kept.

    python tools/run.py benchmarks.flow_curves --comfyui PATH [--pictures 60] [--weights FILE] [--report FILE]

A method at one setting is a point, and settings differ from paper to paper by more than methods do. So each method is run at
several values of its one main knob (skipped steps; for RF-Inversion the steps of the hold), on held-out pictures of one thing
whose colour, or kind, is to change. "Made" is read from the edited picture; "outside" is the PSNR outside of the thing before and
after. Prints a table, and with --report writes it with a picture of the curves.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...demo import captions, flow_net, pictures, scenes
from .. import inside_comfyui, measure
from ..training import evaluate

STEPS, SOURCE_CFG, CFG, AT_ONCE, FIRST = 28, 1.0, 3.0, 20, 940_000
SKIPS, HOLDS = (4, 8, 12, 16), (2, 5, 9, 14)
# name: (path, eta of the edit or None, values of the knob, colour)
METHODS = {
    "FlowEdit (independent, eta 0)": ("independent", 0.0, SKIPS, "#d0552b"),
    "independent, eta 0.5": ("independent", 0.5, SKIPS, "#d99a2b"),
    "LEDITS (independent, eta 1)": ("independent", 1.0, SKIPS, "#3d7dca"),
    "Brownian, eta 0": ("Brownian", 0.0, SKIPS, "#2fa36b"),
    "Brownian, eta 1": ("Brownian", 1.0, SKIPS, "#7a5aa6"),
    "ODE path (Uni-Inv)": ("ode", None, (0, *SKIPS), "#c0408e"),
    "RF-Inversion": ("rf", None, HOLDS, "#6b6b6b"),
    "SDEdit": ("sdedit", None, SKIPS, "#222222"),
}


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="a ComfyUI folder")
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--weights", type=Path, default=flow_net.WEIGHTS)
    parser.add_argument("--report", type=Path, help="a Markdown file; the picture lies beside it")
    return parser.parse_args(arguments)


def tasks(what, count, first=FIRST):
    """(source scene, target scene) of held-out pictures of one thing, whose "colour" or "kind" is to change."""
    made = []
    for scene in pictures.held_out(first, count, things=1):
        rng = np.random.default_rng(scene.seed)
        if what == "colour":
            made.append((scene, pictures.recoloured(scene, pictures.other_colour(scene, rng))))
        else:
            kind = str(rng.choice([k for k in scenes.KINDS if k != scene.things[0].kind]))
            made.append((scene, replace(scene, things=(replace(scene.things[0], kind=kind),))))
    return made


class Flow:
    """The demo flow model and the pack's nodes around it; a CONDITIONING holds one prompt for each picture of a batch."""

    def __init__(self, weights):
        from ...demo import loader
        self.model, self.clip, self.vae = loader.load_flow(weights)
        self._paths, self.rows = {}, 0

    def prompts(self, texts):
        return evaluate.prompts(self.clip, texts)

    def path(self, kind, group, number):
        """The inversion of a group of scenes by a kind of path."""
        import torch

        from ...nodes.ddim_inversions import DirectInversion
        from ...nodes.edit_friendly_inversion import EditFriendlyInversion
        from ...nodes.rf_inversion import RFInversion
        from ...nodes.sdedit import SDEditPath

        key = kind, number, tuple(scene.seed for scene in group)
        if key not in self._paths:
            drawn = np.stack([scenes.render(scene)[0] for scene in group])
            latent = {"samples": self.vae.encode(torch.from_numpy(drawn))}
            common = {"model": self.model, "latent": latent, "steps": STEPS, "scheduler": "simple"}
            source = {"positive": self.prompts([captions.sentence(s) for s in group]), "negative": self.prompts([""]),
                      "cfg": SOURCE_CFG}
            if kind in ("independent", "Brownian"):
                made = EditFriendlyInversion.execute(**common, **source, eta=1.0, seed=number, noise=kind)
            elif kind == "ode":
                made = DirectInversion.execute(**common, **source, refinements=0, tolerance=0.0, convention="A",
                                               ablation={"ablation": "none"})
            elif kind == "rf":
                made = RFInversion.execute(**common, **source, seed=number, gamma=0.5)
            else:
                made = SDEditPath.execute(**common, seed=number)
            self._paths[key] = made[0]
        return self._paths[key]

    def edit(self, pairs, kind, eta, knob):
        """Edited pictures, float32 [H, W, 3]."""
        from ...nodes.rf_inversion import HoldToPicture
        from ...nodes.sampling import LeditsKSampler

        edited = []
        for start in range(0, len(pairs), AT_ONCE):
            group = pairs[start : start + AT_ONCE]
            path, model, skip = self.path(kind, [source for source, _ in group], start), self.model, knob
            if kind == "rf":
                model, skip = HoldToPicture.execute(model=model, inversion=path, strength=0.9, start=0.0, stop=knob / STEPS)[0], 0
            out = LeditsKSampler.execute(
                model=model, positive=self.prompts([captions.sentence(target) for _, target in group]),
                negative=self.prompts([""]), inversion=path, cfg=CFG, skip=skip, **({} if eta is None else {"eta": eta}))
            edited += list(self.vae.decode(out[0]["samples"]).float().cpu().clamp(0, 1).numpy())
        return edited


def judged(what, pairs, edited):
    """Share of edits made, and mean PSNR outside of the thing before and after."""
    made, kept = [], []
    for (source, target), picture in zip(pairs, edited):
        (before, old), (_, new) = scenes.render(source), scenes.render(target)
        masks = np.stack([old[0], new[0]])
        if what == "colour":
            made.append(measure.has_colour(picture, new[0], target.things[0].colour))
        else:
            found = measure.read(picture).things
            made.append(len(found) == 1 and found[0].kind == target.things[0].kind)
        kept.append(measure.psnr(before, picture, measure.outside(masks)))
    return float(np.mean(made)), float(np.mean(kept))


def curves(flow, what, count, say):
    """{method: [(knob, made, outside)]}."""
    pairs, found = tasks(what, count), {}
    for name, (kind, eta, knobs, _) in METHODS.items():
        found[name] = []
        for knob in knobs:
            made, kept = judged(what, pairs, flow.edit(pairs, kind, eta, knob))
            found[name].append((knob, made, kept))
            say(f"{what:7s} {name:32s} {knob:3d}  made {100 * made:5.1f} %  outside {kept:5.2f} dB")
    return found


def chart(title, found, size=(760, 560)):
    """The curves as a picture: edits made to the right, PSNR outside upwards."""
    page = Image.new("RGB", size, "white")
    pen, small = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    left, top, right, bottom = 60, 40, size[0] - 20, size[1] - 50
    points = [p for line in found.values() for p in line]
    low, high = np.floor(min(p[2] for p in points)), np.ceil(max(p[2] for p in points))

    def place(made, kept):
        return left + made * (right - left), bottom - (kept - low) / max(high - low, 1) * (bottom - top)

    pen.text((left, 10), title, "black", ImageFont.load_default(size=18))
    for share in range(0, 101, 20):
        x = place(share / 100, low)[0]
        pen.line([(x, top), (x, bottom)], "#e4e4e4")
        pen.text((x, bottom + 6), f"{share} %", "black", small, anchor="ma")
    for level in np.arange(low, high + 0.1, max(round((high - low) / 6), 1)):
        y = place(0, level)[1]
        pen.line([(left, y), (right, y)], "#e4e4e4")
        pen.text((left - 8, y), f"{level:.0f} dB", "black", small, anchor="rm")
    pen.text(((left + right) / 2, bottom + 26), "edit made", "black", small, anchor="ma")
    for k, (name, line) in enumerate(found.items()):
        colour = METHODS[name][3]
        at = [place(made, kept) for _, made, kept in line]
        pen.line(at, colour, 2)
        for (knob, *_), (x, y) in zip(line, at):
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
            pen.text((x + 6, y - 8), str(knob), colour, ImageFont.load_default(size=11))
        pen.rectangle([left + 12, bottom - 16 - 18 * k, left + 24, bottom - 6 - 18 * k], fill=colour)
        pen.text((left + 30, bottom - 20 - 18 * k), name, "black", small)
    return page


def table(found):
    """The curves in Markdown."""
    lines = ["| method | knob: made, outside |", "|---|---|"]
    for name, points in found.items():
        lines.append(f"| {name} | " + "; ".join(f"{knob}: {100 * made:.0f} %, {kept:.1f} dB" for knob, made, kept in points) + " |")
    return "\n".join(lines)


def main(arguments):
    options = parse(arguments)
    inside_comfyui.prepare(options.comfyui)
    import torch

    def say(text):
        print(text, flush=True)

    with torch.inference_mode():
        flow = Flow(options.weights)
        found = {what: curves(flow, what, options.pictures, say) for what in ("colour", "kind")}
    for what, of in found.items():
        say(f"\n{what}\n" + table(of))
    if options.report:
        charts = [chart(f"Change of {what}, {options.pictures} pictures", of) for what, of in found.items()]
        page = Image.new("RGB", (sum(c.width for c in charts), charts[0].height), "white")
        for k, one in enumerate(charts):
            page.paste(one, (k * one.width, 0))
        page.save(options.report.with_suffix(".jpg"), quality=90)
        options.report.write_text("\n\n".join(f"**Change of {what}**\n\n{table(of)}" for what, of in found.items()) + "\n", "utf-8")
    return 0
