"""How good is an edit: the metrics of PIE-Bench as a node."""

import contextlib
import math
import os

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from comfy_api.latest import io, ui
from einops import repeat

from ..evaluation import metrics, networks, table
from ..files import csv_file
from ..files.letters import whole_letters
from ..files.places import inside, not_written, relative
from .choices import known
from .drawing.card import Card
from .drawing.pixels import to_batch, to_image
from .edit_inputs import finite
from .feedback import show

CARDS = 16  # pictures of a batch that are drawn
_VAE_SCALES = (8, 16, 32, 64)  # pixels of a latent's place
ROWS = (  # of the card
    ("structure_distance", "psnr_unedit_part", "lpips_unedit_part", "mse_unedit_part", "ssim_unedit_part"),
    ("clip_similarity_source_image", "clip_similarity_target_image", "clip_similarity_target_image_edit_part",
     "ns_lpips", "clip_score"),
)
OUTPUTS = (  # (metric, name of the output, what it says)
    ("psnr_unedit_part", "psnr", "PSNR outside the mask, dB. More is better."),
    ("ssim_unedit_part", "ssim", "SSIM outside the mask, 1 at most. More is better."),
    ("mse_unedit_part", "mse", "Mean squared error outside the mask. Less is better."),
    ("lpips_unedit_part", "lpips", "LPIPS outside the mask. Less is better; nan where its network is missing."),
    ("structure_distance", "structure_distance", "Structure distance. Less is better; nan where DINO is missing."),
    ("clip_similarity_target_image", "clip_whole", "CLIP similarity of the edit and the target prompt. More is better; "
     "nan without the prompt or where CLIP is missing."),
    ("clip_similarity_target_image_edit_part", "clip_edited", "The same inside the mask; nan also without a mask."),
)

# Where users put the networks; settings of ComfyUI may add more folders.
folder_paths.add_model_folder_path(networks.FOLDER, os.path.join(folder_paths.models_dir, networks.FOLDER))


class EditMetrics(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_EditMetrics",
            display_name="Edit Metrics",
            category="LEDITS/evaluation",
            description="Measures an edit as PIE-Bench does: how well the rest of the picture is kept, and how well "
            "the edit fits its prompt. Metrics whose network is not there are left out, and the node says where to put "
            "it.",
            search_aliases=["PIE-Bench", "PSNR", "SSIM", "LPIPS", "CLIP score", "structure distance"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("source", tooltip="The picture before the edit. One serves a whole batch of edits."),
                io.Image.Input("edited", tooltip="The edit, of the same size."),
                io.Combo.Input("mode", options=list(metrics.MODES),
                               tooltip="pie-bench gives numbers to compare with published ones, quirks included. plain "
                               "measures over the pixels that count."),
                io.String.Input("source_prompt", default="", multiline=True,
                                tooltip="Words for the source, for its CLIP similarity."),
                io.String.Input("target_prompt", default="", multiline=True,
                                tooltip="Words for the edit, for its CLIP similarity. Empty leaves it out."),
                io.Mask.Input("mask", optional=True,
                              tooltip="White where the edit may change the picture; the rest should stay. Without it "
                              "the whole picture should stay."),
                io.Boolean.Input("jpeg", optional=True, default=False, advanced=True,
                                 tooltip="Sends the edit through a JPEG first, as the published numbers did."),
                io.String.Input("csv", optional=True, default="",
                                tooltip="Name of a CSV file in ComfyUI's output folder, with '/' for subfolders; a row "
                                "for each picture is added. Empty writes none."),
                io.String.Input("label", optional=True, default="",
                                tooltip="A name for the row in the CSV file, such as the method's."),
            ],
            outputs=[
                *(io.Float.Output(display_name=name, tooltip=about) for _, name, about in OUTPUTS),
                io.String.Output(display_name="table", tooltip="All metrics as text, and what is missing."),
            ],
        )

    @classmethod
    def execute(cls, source, edited, mode, source_prompt, target_prompt, mask=None, jpeg=False, csv="", label=""):
        known(cls, mode=mode)
        finite("The mask", mask)
        sources, edits, masks, cropped = _matched(source, edited, mask)
        prompts = {"source_prompt": whole_letters(source_prompt), "target_prompt": whole_letters(target_prompt)}
        note = {"label": label, "mode": mode, "jpeg": jpeg, **prompts}
        path = _csv_path(csv)
        if path:
            with _refused(csv):
                csv_file.check(path, [*note, *metrics.METRICS])
        local = networks.Networks(folder_paths.get_folder_paths(networks.FOLDER), place=_Place())
        tool = metrics.Metrics(mode, local, jpeg=jpeg)
        rows = [tool.measure(*picture, **prompts) for picture in zip(sources, edits, masks)]
        if path:
            with _refused(csv):
                csv_file.append(path, [note | row for row in rows])
        values = table.mean(rows)
        text = cropped + table.text(values, tool.missing)
        show(cls, text)
        pictures = list(zip(sources, edits, masks, rows))[:CARDS]
        cards = to_batch([_card(*picture, mode=mode) for picture in pictures])
        numbers = [math.nan if values[name] is None else values[name] for name, _, _ in OUTPUTS]
        return io.NodeOutput(*numbers, text, ui=ui.PreviewImage(cards, cls=cls).as_dict() | {"text": [text]})


@contextlib.contextmanager
def _refused(name):
    """Errors of the CSV file in a sentence."""
    try:
        yield
    except OSError as error:
        raise not_written("The metrics", name, error) from None


class _Place:
    """Moves a network to ComfyUI's device by ComfyUI's memory management, beside its own models."""

    def __init__(self):
        self._patchers = {}

    def __call__(self, module):
        device = comfy.model_management.get_torch_device()
        if module not in self._patchers:
            offload = comfy.model_management.unet_offload_device()
            self._patchers[module] = comfy.model_patcher.ModelPatcher(module, device, offload)
        comfy.model_management.load_models_gpu([self._patchers[module]], force_full_load=True)
        return device


def _matched(source, edited, mask):
    """Source and edit float32 [B, H, W, 3], mask float32 [B, H, W], on the CPU, of one size and number; what was cropped, in
    words.
    """
    cropped = ""
    source, edited = source[..., :3].float().cpu(), edited[..., :3].float().cpu()
    masks = torch.zeros(source.shape[:3]) if mask is None else mask.float().cpu()
    masks = masks[None] if masks.ndim == 2 else masks
    if source.shape[1:3] != edited.shape[1:3]:
        (h, w), (eh, ew) = source.shape[1:3], edited.shape[1:3]
        if not _cropped_by_a_vae((h, w), (eh, ew)):
            raise ValueError(f"The source is {w} x {h} and the edit {ew} x {eh} pixels: scale or crop the source to the "
                             "size that was edited.")
        top, left = (h - eh) // 2, (w - ew) // 2
        if masks.shape[1:] == (h, w):
            masks = masks[:, top : top + eh, left : left + ew]
        source = source[:, top : top + eh, left : left + ew]
        cropped = f"The source of {w} x {h} was cropped to {ew} x {eh} in the middle, as VAE Encode does.\n"
    if masks.shape[1:] != edited.shape[1:3]:
        masks = torch.nn.functional.interpolate(masks[:, None], edited.shape[1:3], mode="nearest-exact")[:, 0]
    n = len(edited)
    for name, batch in (("sources", source), ("masks", masks)):
        if len(batch) not in (1, n):
            raise ValueError(f"There are {len(batch)} {name} for {n} edits: give one for all, or one for each.")
    return source.expand(n, -1, -1, -1), edited, masks.expand(n, -1, -1), cropped


def _cropped_by_a_vae(size, edited):
    """Whether VAE Encode makes a picture of `edited` pixels out of one of `size`: it crops to a multiple of the VAE's scale,
    in the middle."""
    return any(all(side // scale * scale == left for side, left in zip(size, edited)) for scale in _VAE_SCALES)


def _csv_path(name):
    """The path of a CSV file in the output folder, or None without a name."""
    if not name.strip():
        return None
    name, output = relative(name.strip(), "The CSV file"), folder_paths.get_output_directory()
    path = os.path.join(output, *name.split("/"))
    path = path if path.lower().endswith(".csv") else path + ".csv"
    if not inside(output, path):
        raise ValueError(f"The CSV file '{name}' follows a link out of ComfyUI's output folder: choose another name.")
    return path


def _card(source, edited, mask, values, mode):
    """The picture of one measured edit."""
    card = Card()
    where = f"{100 * float((mask > 0.5).float().mean()):.0f} % of the picture may change"
    card.title("Edit metrics", f"{where}; pixel metrics are outside of the mask", mode)
    for row in ROWS:
        headings = [metrics.METRICS[name].heading.removesuffix(" unedited") for name in row]
        card.numbers([(table.number(name, values[name]), heading) for name, heading in zip(row, headings)])
    difference = (source - edited).abs()
    pictures = [source, edited, repeat(mask, "h w -> h w c", c=3), difference / difference.amax().clamp(min=1e-6)]
    captions = ["source", "edit", "mask", "difference, brightened"]
    card.strip("Pictures", [to_image(x) for x in pictures], captions=captions, columns=4)
    return card.image()


NODES = [EditMetrics]
