"""Many edits on one sheet: by method, and by skip and cfg from one inversion."""

import re
from dataclasses import replace

import comfy.model_management
import torch
from comfy_api.latest import io

from ..samplers import models
from ..samplers.guider import LeditsGuider
from ..samplers.ledits import LeditsSampler
from ..samplers.phased import PhasedSampler, Run
from . import feedback
from .choices import known
from .drawing import sheet
from .drawing.pixels import decoded
from .edit_inputs import SOLVERS, edit, edit_inputs, fine_inputs, path_inputs, sigmas_after

CATEGORY = "LEDITS/compare"
MOST = 32  # pictures of a sheet that have a socket
MOST_EDITS, LONGEST = 400, 20  # edits of a sweep; characters of one of its numbers


def _size():
    return io.Int.Input("size", default=0, min=0, max=4096, optional=True, advanced=True,
                        tooltip="Longer side of a picture on the sheet, in pixels. 0 keeps them as they are.")


def _sized(pictures, size):
    """Pictures [H, W, C] with a longer side of `size`, or as they are where that is 0."""
    return [sheet.fitted(p, (size, size)) for p in pictures] if size else pictures


def _page(pictures, size, columns, **labels):
    page = sheet.draw(_sized(pictures, size), columns, **labels)
    return page.to(comfy.model_management.intermediate_device())


class Sheet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        template = io.Autogrow.TemplatePrefix(
            io.Image.Input("image", tooltip="A picture or a batch; each gets a column of its own."), "image", 1, MOST
        )
        return io.Schema(
            node_id="LEDITS_Sheet",
            display_name="Labelled Sheet",
            category=CATEGORY,
            description="Puts pictures side by side with words under them: the source and what several methods make of "
            "it. A batch gets a row for each of its pictures.",
            search_aliases=["contact sheet", "image grid", "compare images", "labels"],
            inputs=[
                io.Autogrow.Input("images", template=template,
                                  tooltip="The pictures, in order. A new socket appears when the last one is used."),
                io.String.Input("labels", multiline=True, default="",
                                tooltip="One line for each connected input (or for each picture of the sheet). Empty "
                                "for none; an empty line in between leaves one picture without."),
                io.Int.Input("columns", default=0, min=0, max=100,
                             tooltip="Pictures in a row. 0: one for each connected input, so that methods are "
                             "columns."),
                _size(),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="One picture, for Preview Image or Save Image.")],
        )

    @classmethod
    def execute(cls, images, labels, columns, size=0):
        batches = [images[name] for name in sorted(images, key=lambda name: int(name.removeprefix("image")))]
        pictures = in_rows(batches)
        lines = labels_of(labels, len(batches), len(pictures))
        return io.NodeOutput(_page(pictures, size, columns or len(batches), labels=lines)[None])


def in_rows(batches):
    """Pictures of several IMAGEs, row by row: the first of all of them, then the second, ...

    Raises:
        ValueError: none is connected, or batches of different sizes (one picture goes with every size).
    """
    most = max(map(len, batches), default=0)
    if most == 0:
        raise ValueError("The sheet has no picture: connect at least one image.")
    if any(len(batch) not in (1, most) for batch in batches):
        raise ValueError(
            f"The images are batches of {', '.join(str(len(b)) for b in batches)} pictures: a sheet takes batches of "
            "one size, and single pictures beside them."
        )
    return [batch[b if len(batch) > 1 else 0] for b in range(most) for batch in batches]


def labels_of(text, inputs, pictures):
    """Words for every picture of a sheet.

    Raises:
        ValueError: another number of lines than of inputs or pictures.
    """
    lines = [line.strip() for line in text.splitlines()]
    if not any(lines):
        return []
    while not lines[-1] and len(lines) not in (inputs, pictures):
        lines.pop()
    if len(lines) == inputs:
        return lines * (pictures // inputs)
    if len(lines) == pictures:
        return lines
    wanted = f"{inputs} inputs" + (f" with {pictures} pictures" if pictures != inputs else "")
    raise ValueError(f"labels has {len(lines)} lines for {wanted}: write one line for each, or none at all.")


class Sweep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_Sweep",
            display_name="LEDITS Sweep (skip by cfg)",
            category=CATEGORY,
            description="Edits one inversion with every pair of skip and cfg and shows the results as a labelled grid "
            "(figure 5 of LEDITS, arXiv 2307.00522).",
            search_aliases=["xy plot", "grid", "parameter sweep", "skip and cfg"],
            inputs=[
                *edit_inputs(),
                *path_inputs(),
                io.Vae.Input("vae", tooltip="Decodes the edits for the sheet."),
                io.String.Input("skip_values", default="0, 0.15, 0.3, 0.45",
                                tooltip="A row of the sheet for each. Below 1, or with %: the share of the path's "
                                "steps to leave out; whole numbers: steps, as in the LEDITS KSampler."),
                io.String.Input("cfg_values", default="3, 7.5, 15",
                                tooltip="A column of the sheet for each: guidance towards the target prompt."),
                *fine_inputs(),
                _size(),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The labelled grid; one for each picture of a batch."),
                io.Latent.Output(display_name="latents",
                                 tooltip="All edits as a batch, row by row; of a batch the pictures of one edit "
                                 "together."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative, inversion, vae, skip_values, cfg_values, concepts=None, mask=None,
                solver=SOLVERS[0], attention=None, store=None, size=0):
        known(cls, solver=solver)
        models.check(model, inversion)
        skips, scales = skips_of(skip_values, inversion.steps), scales_of(cfg_values)
        if len(skips) * len(scales) > MOST_EDITS:
            raise ValueError(
                f"{len(skips)} skips by {len(scales)} scales are {len(skips) * len(scales)} edits: a sheet holds up to "
                f"{MOST_EDITS}. Give fewer skip_values or cfg_values."
            )
        runs = [(sigmas_after(inversion, skip), cfg) for skip in skips for cfg in scales]
        sampler = LeditsSampler(inversion, solver=solver, attention=attention, store=store)

        def guider_at(cfg):
            return LeditsGuider(model, positive, negative, cfg, concepts=concepts or ())

        edits, rows = _sweep(guider_at, sampler, runs, mask)
        grids = zip(*(decoded(vae, samples) for samples in edits))  # a grid for each picture of the batch
        tops = [f"cfg {cfg:g}" for cfg in scales]
        lefts = [f"skip {skip} ({100 * skip / inversion.steps:.0f} %)" for skip in skips]
        pages = [_page(pictures, size, len(scales), tops=tops, lefts=lefts) for pictures in grids]
        costs = feedback.costs(rows, sum(len(sigmas) - 1 for sigmas, _ in runs))
        return io.NodeOutput(torch.stack(pages), {"samples": torch.cat(edits)}, ui=costs)


def _sweep(guider_at, sampler: LeditsSampler, runs, mask):
    """Samples of every run, and the U-Net rows of all.

    Args:
        guider_at: `(cfg) -> LeditsGuider`.
        runs: list of (SIGMAS, cfg).
    """
    sigmas, cfg = runs[0]
    guider, edits, rows = guider_at(cfg), [], 0
    progress = feedback.Runs(guider.model_patcher, [len(sigmas) - 1 for sigmas, _ in runs])
    edit(guider, _Trial(sampler, runs), sigmas, mask=mask)
    for sigmas, cfg in runs:
        guider = guider_at(cfg)
        edits.append(edit(guider, sampler, sigmas, mask=mask, runs=progress))
        rows += guider.rows
    return edits, rows


class _Trial(PhasedSampler):
    """A dry run: begins every run of a sweep and evaluates nothing, so that all are checked before the first starts."""

    def __init__(self, sampler: LeditsSampler, runs):
        self.inversion, self._sampler, self._runs = sampler.inversion, sampler, runs

    def run(self, run: Run):
        for sigmas, cfg in self._runs:
            run.guider.set_cfg(cfg)
            self._sampler.begin(replace(run, sigmas=sigmas))
        return run.latent_image


def skips_of(text, steps):
    """The steps to leave out, for a text such as "0, 0.15, 30 %, 18": below 1 and with % a share of all steps.

    Raises:
        ValueError: a word that is no such number, or one that leaves no step.
    """
    out = []
    for word, value in _numbers(text, "skip_values"):
        if word.endswith("%"):
            value = value / 100 * steps
        elif value < 1:
            value *= steps
        elif value != int(value):
            raise ValueError(f"skip_values holds {word}: give shares below 1, percentages, or whole numbers of steps.")
        skip = int(value + 0.5)
        if skip >= steps:
            raise ValueError(
                f"skip_values holds {word}, but the inversion has {steps} steps: nothing would be left to run. "
                f"Choose 0 to {steps - 1}, or shares below 1."
            )
        out.append(skip)
    return out


def scales_of(text):
    """The guidance scales of a text such as "3, 7.5, 15".

    Raises:
        ValueError: a word that is no number, or larger than the LEDITS KSampler takes.
    """
    scales = _numbers(text, "cfg_values", percent=False)
    for word, value in scales:
        if value > 100:
            raise ValueError(f"cfg_values holds {word}: choose 0 to 100.")
    return [value for _, value in scales]


def _numbers(text, name, percent=True):
    """(word, number) for the words of a list; numbers are not negative.

    Raises:
        ValueError: it is empty, or a word is no such number.
    """
    words = " ".join(text.replace(";", " ").replace(",", " ").split()).replace(" %", "%").split()
    if not words:
        raise ValueError(f"{name} is empty: write numbers with commas between them, such as '0, 0.15, 0.3'.")
    for word in words:
        if len(word) > LONGEST or not re.fullmatch(r"\d*\.?\d+|\d+\.", word.removesuffix("%") if percent else word):
            raise ValueError(
                f"{name} holds '{word[:LONGEST]}', which is no number of 0 or more: write numbers like '0, 0.15, 0.3'."
            )
    return [(word, float(word.removesuffix("%"))) for word in words]


NODES = [Sheet, Sweep]
