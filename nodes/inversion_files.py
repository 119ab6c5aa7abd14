"""Inversions as files in ComfyUI's own output and input folders."""

import os
from dataclasses import replace

import comfy.model_management
from comfy_api.latest import io, ui

from ..files import inversion_file, latent_formats
from ..files.places import in_words, list_files, new_file, not_written, path_of
from . import sockets
from .choices import known
from .feedback import saved_words, show
from .file_picker import FileLoader
from .inversion_inputs import CATEGORY, PathNoise, latent_size, noise_output

DTYPES = ["float32", "float16"]


class SaveInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_SaveInversion",
            display_name="Save Inversion",
            category=CATEGORY,
            description="Writes an inversion into ComfyUI's output folder, so that later edits of the picture need not "
            "invert it again. Load Inversion reads it.",
            search_aliases=["store inversion", "export inversion", "cache inversion"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                sockets.Inversion.Input("inversion", tooltip="The inversion to keep."),
                io.String.Input("filename_prefix", default="inversions/ledits",
                                tooltip="Name in the output folder, with '/' for subfolders; a number is added. "
                                "%date%, %date:yyyy-MM-dd%, %year%, %hour% and so on, %width% and %height% (of the "
                                "latent) are filled in."),
                io.Combo.Input("dtype", options=DTYPES,
                               tooltip="float32 gives the very same edits. float16 halves the file and moves them a "
                               "little; by how much is shown in the node."),
                io.String.Input("source_prompt", optional=True, default="", multiline=True, advanced=True,
                                tooltip="A note of the source prompt, which Load Inversion gives back. Connect the "
                                "text that was inverted with."),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, inversion, filename_prefix, dtype, source_prompt=""):
        known(cls, dtype=dtype)
        if source_prompt.strip():
            inversion = replace(inversion, settings=inversion.settings | {"source_prompt": source_prompt})
        description = latent_formats.describe(inversion.latent_format)
        height, width = inversion.latents.shape[-2:]
        try:
            with new_file(filename_prefix, inversion_file.KIND.suffix, width, height) as (path, name, subfolder):
                cost = inversion_file.save(path, inversion, description, half=dtype == "float16")
                size = os.path.getsize(path)
        except OSError as error:
            raise not_written("The inversion", filename_prefix, error) from None
        text = f"{'/'.join(p for p in (subfolder, name) if p)}\n{in_words(size)}, {dtype}{_cost(cost)}"
        saved = ui.SavedResult(name, subfolder, io.FolderType.output)
        return io.NodeOutput(ui={"text": [text], "inversions": [saved], **saved_words(cls, text)})


def _cost(cost):
    """Lines that say what rounding costs."""
    names = {"path": "path", "noise_maps": "noise maps", "embeddings": "embeddings", "picture": "replayed picture"}
    lines = [f"{names[k]}: up to {v['abs']:.2g} ({100 * v['rel']:.2g} %)" for k, v in (cost or {}).items()]
    return "\nerror of float16 (of its level's size):\n" + "\n".join(lines) if lines else ""


class LoadInversion(FileLoader, io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_LoadInversion",
            display_name="Load Inversion",
            category=CATEGORY,
            description="Reads an inversion that Save Inversion has written, from ComfyUI's output or input folder.",
            search_aliases=["import inversion", "open inversion"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input("file", options=list_files(inversion_file.KIND),
                               tooltip="Inversions in the output and input folders, newest first. Press R to refresh."),
            ],
            outputs=[
                sockets.Inversion.Output(display_name="inversion", tooltip="The path, for a LEDITS sampler with the "
                                         "kind of model that made it."),
                io.Latent.Output(display_name="x_T", tooltip="The noisiest latent, where an unskipped edit begins."),
                io.String.Output(display_name="source_prompt", tooltip="What was noted when it was saved, or empty."),
                noise_output(),
            ],
        )

    @classmethod
    def check_file(cls, path):
        inversion_file.check(path, latent_formats.make)

    @classmethod
    def execute(cls, file):
        path = path_of(file)
        inversion = inversion_file.load(path, latent_formats.make)
        if inversion.latent_format is None:
            raise ValueError(f"'{file}' does not say how its latents are scaled: invert the picture again.")
        samples = inversion.latent_format.process_out(inversion.latents[0])
        x_T = {"samples": samples.to(comfy.model_management.intermediate_device())}
        if inversion.mask is not None:
            x_T["noise_mask"] = inversion.mask
        size = f"{inversion.batch} x {latent_size(inversion)}"
        text = f"{inversion.method}, {inversion.steps} steps, {size}\n{inversion.model}"
        show(cls, text)
        prompt = inversion.settings.get("source_prompt", "")
        return io.NodeOutput(inversion, x_T, prompt, PathNoise(inversion), ui={"text": [text]})


NODES = [SaveInversion, LoadInversion]
