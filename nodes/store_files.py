"""Attention stores as files in ComfyUI's own output and input folders."""

import os
import shutil

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..attention_hooks.store import AttentionStore
from ..files import store_file
from ..files.places import in_words, list_files, new_file, not_written, path_of
from . import sockets
from .attention_inputs import CATEGORY
from .choices import known
from .feedback import saved_words, show
from .file_picker import FileLoader

DTYPES = ["as captured", "float16"]


class SaveAttentionStore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_SaveAttentionStore",
            display_name="Save Attention Store",
            category=CATEGORY,
            description="Writes a source's attention into ComfyUI's output folder, so that edits of the picture in "
            "later sessions need no source pass either. Load Attention Store reads it.",
            search_aliases=["save attention", "export attention", "cache attention"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                sockets.Store.Input("store", tooltip="From Capture Attention. It goes with its inversion: save that "
                                    "too, as float32."),
                io.String.Input("filename_prefix", default="attention/ledits",
                                tooltip="Name in the output folder, with '/' for subfolders; a number is added. "
                                "%date%, %date:yyyy-MM-dd%, %year%, %hour% and so on are filled in."),
                io.Combo.Input("dtype", options=DTYPES,
                               tooltip="as captured keeps every bit: the very same edits. float16 halves a store that "
                               "was captured in float32."),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, store, filename_prefix, dtype=DTYPES[0]):
        known(cls, dtype=dtype)
        half = dtype == "float16"
        try:
            with new_file(filename_prefix, store_file.KIND.suffix) as (path, name, subfolder):
                _check_disk(os.path.dirname(path), store_file.nbytes(store, half))
                store_file.save(path, store, half)
                size = os.path.getsize(path)
        except OSError as error:
            raise not_written("The store", filename_prefix, error) from None
        text = f"{'/'.join(p for p in (subfolder, name) if p)}\n{in_words(size)}, {_about(store, half)}"
        saved = ui.SavedResult(name, subfolder, io.FolderType.output)
        return io.NodeOutput(ui={"text": [text], "stores": [saved], **saved_words(cls, text)})


class LoadAttentionStore(FileLoader, io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_LoadAttentionStore",
            display_name="Load Attention Store",
            category=CATEGORY,
            description="Reads an attention store that Save Attention Store has written, from ComfyUI's output or "
            "input folder.",
            search_aliases=["load attention", "import attention", "open attention store"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input("file", options=list_files(store_file.KIND),
                               tooltip="Stores in the output and input folders, newest first. Press R to refresh."),
            ],
            outputs=[sockets.Store.Output(display_name="store", tooltip="For the store input of a LEDITS sampler, with "
                                          "the inversion and the model that it was captured with.")],
        )

    @classmethod
    def check_file(cls, path):
        store_file.check(path)

    @classmethod
    def execute(cls, file):
        path = path_of(file)
        size = store_file.check(path)
        _check_memory(size)
        store = store_file.load(path)
        text = f"{in_words(size)}, {_about(store)}\n{store.origin.model}"
        show(cls, text)
        return io.NodeOutput(store, ui={"text": [text]})


def _about(store: AttentionStore, half=False):
    """Steps, pictures and dtype in words."""
    first = next(iter(store.tensors().values()))
    dtype = "float16" if half else str(first.dtype).removeprefix("torch.")
    return f"{len(store.steps)} steps, {len(first)} picture{'s'[: len(first) > 1]}, {dtype}"


def _check_disk(folder, needed):
    """Refuse to fill the disk."""
    free = shutil.disk_usage(folder).free
    if needed + 2**20 > free:
        raise ValueError(
            f"The store takes {needed / 2**30:.2f} GB, but only {free / 2**30:.2f} GB are free on the disk of "
            "ComfyUI's output folder: make room, choose float16, or capture fewer steps and blocks."
        )


def _check_memory(needed):
    """As Capture Attention: a store may take half of the free host memory."""
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > free / 2:
        raise ValueError(
            f"This store takes {needed / 2**30:.2f} GB of host memory, but only {free / 2**30:.2f} GB are free (half "
            "of it may be used): close what else needs memory, or capture fewer steps and blocks."
        )


NODES = [SaveAttentionStore, LoadAttentionStore]
