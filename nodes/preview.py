"""Preview Attention: where the words of an edit look, and the masks it used."""

import comfy.model_management
import numpy
import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..attention_hooks.blocks import HELP, preset_help
from ..attention_hooks.controls.local_blend import NAME as BLEND
from ..attention_hooks.controls.masactrl import NAME as MASACTRL
from ..attention_hooks.controls.record import Record
from ..attention_hooks.observed import SIDES, Observed
from ..attention_hooks.text import widget_text
from . import sockets
from .attention_inputs import CATEGORY, attention_output, chain_input, chained, prompts_input
from .choices import known
from .drawing.card import Card
from .drawing.pixels import to_batch

VIEWS = ["average", "by step"]
COLUMNS = 8  # steps that are drawn
CARDS = 16  # pictures of a batch that are drawn
WORDS = 24  # words that are drawn where none are chosen
# From no attention to the most: colours at equal distances.
_HEAT = numpy.array([[21, 22, 27], [84, 40, 92], [190, 66, 82], [255, 176, 87], [255, 250, 220]], numpy.float32) / 255


class RecordAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_RecordAttention",
            display_name="Record Attention",
            category=CATEGORY,
            description="Remembers the attention of every word while the picture is edited, for Preview Attention. "
            "Changes nothing of the edit.",
            search_aliases=["attention maps", "cross-attention maps", "daam"],
            inputs=[
                prompts_input(),
                io.String.Input("blocks", default="words", optional=True, advanced=True,
                                tooltip=f"Which layers' attention is averaged: {preset_help('words')} {HELP}"),
                chain_input(),
            ],
            outputs=attention_output(),
        )

    @classmethod
    def execute(cls, prompts, blocks="words", attention=None):
        return chained(attention, Record(prompts=prompts, blocks=blocks))


class PreviewAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_PreviewAttention",
            display_name="Preview Attention",
            category=CATEGORY,
            description="Shows where the words of an edit look, in the source and in the target, and the masks of "
            "local blend, of MasaCtrl and of concepts. Put Record Attention among the edit's controls for the words.",
            search_aliases=["show attention", "attention maps", "attention heatmap", "local blend mask",
                            "visualize attention"],
            is_output_node=True,
            inputs=[
                io.Latent.Input("latent", tooltip="The edited latent, from the LEDITS KSampler (or, with a SAMPLER "
                                "connected, from SamplerCustomAdvanced)."),
                io.String.Input("words", default="",
                                tooltip="Words of either prompt, such as 'cat, red hat'. Empty for all."),
                io.Combo.Input("view", options=VIEWS,
                               tooltip="average: the mean of all steps, source beside target. by step: "
                               f"up to {COLUMNS} steps side by side."),
                io.Sampler.Input("sampler", optional=True, tooltip="The LEDITS Sampler that made the latent, where "
                                 "SamplerCustomAdvanced ran it. Not needed with the LEDITS KSampler."),
                io.Image.Input("image", optional=True, tooltip="The source picture, to draw its attention over."),
                io.Image.Input("edited_image", optional=True,
                               tooltip="The edited picture, to draw its attention over."),
            ],
            outputs=[
                io.Image.Output(display_name="attention",
                                tooltip="What the node shows, one for each picture of a batch."),
                io.Mask.Output(display_name="blend_mask", tooltip="Local blend's mask of the last step: where the "
                               "picture could change."),
                io.Mask.Output(display_name="source_mask", tooltip="MasaCtrl's mask of the object in the source, of "
                               "the last step and the finest layer."),
                io.Mask.Output(display_name="target_mask", tooltip="The same in the target."),
                io.Mask.Output(display_name="concept_mask", tooltip="Where the concepts pushed, at the last step of each."),
            ],
        )

    @classmethod
    def execute(cls, latent, words, view, sampler=None, image=None, edited_image=None):
        known(cls, view=view)
        observed = _observed(latent, sampler)
        rows = _rows(observed, _phrases(observed, words), None if view == VIEWS[0] else _steps(observed))
        pictures = range(min(len(observed.latent), CARDS))
        picture = to_batch([_card(observed, rows, b, view, images=(image, edited_image)) for b in pictures])
        device = comfy.model_management.intermediate_device()
        return io.NodeOutput(
            picture.to(device), *(m if isinstance(m, ExecutionBlocker) else m.to(device) for m in _masks(observed)),
            ui=ui.PreviewImage(picture, cls=cls),
        )


def _observed(latent, sampler) -> Observed:
    """The attention of the run that made a latent.

    Raises:
        ValueError: nothing, or the SAMPLER made another latent since.
    """
    observed = latent.get(sockets.OBSERVED) if sampler is None else getattr(sampler, "observed", None)
    if observed is None:
        raise ValueError(
            "There is no attention to see. Connect the latent of a LEDITS KSampler (for SamplerCustomAdvanced also the "
            "SAMPLER) that has concepts, or whose controls hold Record Attention, local blend, or MasaCtrl with masks."
        )
    if sampler is not None:
        made, given = sampler.inversion.latent_format.process_out(observed.latent), latent["samples"].cpu()
        same = made.shape == given.shape
        if not same or not torch.allclose(made, given, rtol=1e-4, atol=1e-4 * float(given.abs().max())):
            raise ValueError(
                "The SAMPLER did not make this latent: connect 'output' of its SamplerCustomAdvanced. If two of them "
                "share the SAMPLER, give each a LEDITS Sampler of its own."
            )
    return observed


def _phrases(observed: Observed, text):
    """The words to show.

    Raises:
        ValueError: none were recorded, or one is in neither prompt.
    """
    chosen = widget_text.phrases(text)
    if observed.tokens is None:
        if chosen:
            raise ValueError(
                "The attention of words was not recorded in this edit: put Record Attention among its controls, or "
                "leave 'words' empty to see the masks alone."
            )
        return ()
    observed.check(chosen)
    return chosen or observed.words()[:WORDS]


def _steps(observed: Observed):
    """The steps to draw, evenly chosen from those that have something to show."""
    recorded = sorted(set(observed.maps).union(*observed.masks.values()))
    count = min(len(recorded), COLUMNS)
    return [recorded[round(k * (len(recorded) - 1) / max(count - 1, 1))] for k in range(count)]


def _rows(observed: Observed, phrases, steps):
    """Rows of the table: (words, softer words, cells).

    Args:
        steps: to show side by side; None for the average, source beside target.

    Returns:
        Of every row the cells are (side, tensor [B, h, w] or words or None).
    """
    rows = []
    for phrase in phrases:
        if steps is None:
            maps = [observed.word_map(phrase, side) for side in SIDES]
            rows.append((phrase, "", [(k, "not in this prompt" if m is None else m) for k, m in enumerate(maps)]))
            continue
        for k, side in enumerate(SIDES):
            maps = [observed.word_map(phrase, side, s) if s in observed.maps else "not recorded" for s in steps]
            if maps[0] is not None:
                rows.append((phrase, side, [(k, m) for m in maps]))
    masks = [(BLEND, "mask", 1), *((MASACTRL, f"{side} mask", k) for k, side in enumerate(SIDES))]
    masks += [(name, "pushes here", 1) for name in _concepts(observed)]
    masks = [(*mask, {step: pair[mask[2]] for step, pair in observed.masks.get(mask[0], {}).items()}) for mask in masks]
    for name, what, k, by_step in masks:
        if by_step and steps is None:
            rows.append((name, what, [(j, by_step[max(by_step)] if j == k else None) for j in range(2)]))
        elif by_step:
            rows.append((name, what, [(k, by_step.get(step, "no mask")) for step in steps]))
    return rows


def _concepts(observed: Observed):
    """The names of the concepts' masks."""
    return [name for name in observed.masks if name not in (BLEND, MASACTRL)]


def _card(observed: Observed, rows, b, view, images):
    """The picture for picture b of the batch."""
    card = Card(height=600 + 330 * len(rows))
    line = f"some of {observed.steps} steps" if view != VIEWS[0] else f"mean of {len(observed.maps)} steps"
    line = f"{line}; in every row the brightest colour is its highest value" if observed.maps else "masks"
    card.title("Attention", line, f"picture {b + 1} of {len(observed.latent)}" if len(observed.latent) > 1 else "")
    if observed.tokens is not None:
        card.lines([f"{side}: {tokens.text}" for side, tokens in zip(SIDES, observed.tokens)])
    drawn = []
    for name, what, cells in rows:
        maps = [cell[b] for _, cell in cells if isinstance(cell, torch.Tensor)]
        top = max((float(m.max()) for m in maps), default=0.0)
        of_words = any(m.dtype != torch.bool for m in maps)
        below = f"{what}{', ' if what else ''}up to {top:.2g}" if of_words else what
        drawn.append((name, below, [_cell(cell, b, top, images[side]) for side, cell in cells]))
    heads = list(SIDES) if view == VIEWS[0] else [f"step {step + 1}" for step in _steps(observed)]
    card.table(heads, drawn)
    return card.image()


def _cell(cell, b, top, image):
    """A map or mask of picture b as a picture, its colours spread from 0 to `top`; words as they are."""
    if not isinstance(cell, torch.Tensor):
        return cell
    values = cell[b]
    if values.dtype == torch.bool:
        return Image.fromarray(values.numpy().astype(numpy.uint8) * 255).convert("1")
    share = (values / top if top else values).clamp(0, 1).numpy()
    if image is None:
        return Image.fromarray(_bytes(_heat(share)))
    ground = image[min(b, len(image) - 1), ..., :3].float().cpu().numpy()
    share = numpy.asarray(Image.fromarray(share).resize(ground.shape[1::-1], Image.Resampling.BICUBIC)).clip(0, 1)
    return Image.fromarray(_bytes(ground * 0.5 * (1 - share[..., None]) + _heat(share) * share[..., None]))


def _heat(share):
    """Colours [h, w, 3] of values 0..1."""
    at = numpy.linspace(0, 1, len(_HEAT))
    return numpy.stack([numpy.interp(share, at, _HEAT[:, c]) for c in range(3)], -1)


def _bytes(colours):
    return (colours.clip(0, 1) * 255).round().astype(numpy.uint8)


def _masks(observed: Observed):
    """MASKs of the last step at the picture's size, [B, H, W] each, or where the edit had none an ExecutionBlocker."""

    def last(name):
        trace = observed.masks.get(name)
        return trace[max(trace)] if trace else (None, None)

    pushed = [last(name)[1] for name in _concepts(observed)]
    masks = last(BLEND)[1], *last(MASACTRL), torch.stack(pushed).any(0) if pushed else None
    names = "local blend", "MasaCtrl with masks", "MasaCtrl with masks", "concepts"
    return [
        ExecutionBlocker(f"Preview Attention has no such mask: the edit ran without {name}.") if mask is None
        else F.interpolate(mask[:, None].float(), observed.size)[:, 0]
        for name, mask in zip(names, masks)
    ]


NODES = [RecordAttention, PreviewAttention]
