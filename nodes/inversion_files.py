"""Inversions as files in ComfyUI's own output and input folders."""

import os
import re
import time
from dataclasses import replace

import comfy.model_management
import folder_paths
from comfy_api.latest import io, ui

from ..demo.loader import DemoLatent
from ..files import inversion_file, latent_formats
from . import sockets

latent_formats.register(DemoLatent)

CATEGORY = "LEDITS/inversion"
DTYPES = ["float32", "float16"]
DEPTH = 5  # folders below input or output in which files are looked for


def inside(folder, path):
    """Whether a path lies in a folder, links followed."""
    folder, path = os.path.realpath(folder), os.path.realpath(path)
    try:
        return os.path.commonpath((folder, path)) == folder
    except ValueError:  # different drives
        return False


def relative(name, what):
    """A file name or prefix as a relative path with `/`.

    Raises:
        ValueError: absolute, with a drive, or with a step up; `what` names it in the sentence.
    """
    parts = re.split(r"[/\\]", name)
    if not name.strip() or os.path.isabs(name) or not parts[0] or ".." in parts or ":" in name or not name.isprintable():
        raise ValueError(f"{what} {name[:80]!r} is not a plain name inside of ComfyUI's own folders: use letters, digits "
                         "and '/' for subfolders.")
    return "/".join(parts)


def path_of(file):
    """The path of a file by its name in the picker, "name" or "name [output]".

    Raises:
        ValueError: it is not in ComfyUI's input or output folder, or not there at all.
    """
    name, _, kind = file.rpartition(" [") if file.endswith((" [input]", " [output]")) else (file, "", "input]")
    folder = folder_paths.get_directory_by_type(kind.rstrip("]"))
    path = os.path.join(folder, *relative(name, "The file").split("/"))
    if not inside(folder, path):
        raise ValueError(f"'{name}' is a link that leads out of ComfyUI's {kind.rstrip(']')} folder: copy the file there.")
    if not os.path.isfile(path):
        raise ValueError(
            f"There is no '{name}' in ComfyUI's {kind.rstrip(']')} folder. Press R to refresh the list, and choose again."
        )
    return os.path.realpath(path)


def found(file_kind):
    """Names of all files of a `FileKind` in the output and input folders, newest first."""
    files = []
    for kind in ("output", "input"):
        folder = folder_paths.get_directory_by_type(kind)
        for path in _walk(folder, DEPTH):
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            if inside(folder, path) and file_kind.matches(path):
                files.append((os.stat(path).st_mtime_ns, name if kind == "input" else f"{name} [{kind}]"))
    return [name for _, name in sorted(files, reverse=True)]


def _walk(folder, depth):
    """Paths of the .safetensors files in a folder and those below it; links to folders are not followed."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".safetensors") and entry.is_file():
                    yield entry.path
                elif depth and entry.is_dir(follow_symlinks=False):
                    yield from _walk(entry.path, depth - 1)
    except OSError:  # removed meanwhile, or not ours to read
        return


def with_date(prefix, now=None):
    """`%date%` and `%date:yyyy-MM-dd hh-mm-ss%` filled in, as ComfyUI's frontend does for its own save nodes."""
    now = now or time.localtime()
    codes = {"yyyy": "%Y", "yy": "%y", "MM": "%m", "dd": "%d", "hh": "%H", "mm": "%M", "ss": "%S"}
    return re.sub(
        "%date(?::([^%]*))?%",
        lambda m: re.sub("|".join(codes), lambda c: time.strftime(codes[c[0]], now), m[1] or "yyyy-MM-dd"),
        prefix,
    )


def new_file(prefix, suffix, width=0, height=0):
    """A file to write in the output folder: (path, name, subfolder).

    Args:
        prefix: a `filename_prefix` as people write it; a number is added.
        width, height: for %width% and %height%.

    Raises:
        ValueError: it leads out of the folder.
        OSError: the subfolder cannot be made.
    """
    prefix, output = relative(with_date(prefix), "The prefix"), folder_paths.get_output_directory()
    if not inside(output, os.path.join(output, os.path.dirname(prefix))):
        raise ValueError(f"The prefix '{prefix}' follows a link out of ComfyUI's output folder: choose another.")
    folder, name, count, subfolder, _ = folder_paths.get_save_image_path(prefix, output, width, height)
    name = f"{name}_{count:05}_{suffix}"
    return os.path.join(folder, name), name, subfolder


def show(node, text):
    """Shows a text on the node, where there is a server and a node to show it on."""
    from server import PromptServer  # the web server, which tests of a node alone do not have

    server, shown = getattr(PromptServer, "instance", None), getattr(node.hidden, "unique_id", None)
    if server is not None and shown is not None:
        server.send_progress_text(text, shown)


class FileLoader:
    """What nodes with a file picker have in common; `check_file(path)` refuses a file from its header alone."""

    @classmethod
    def validate_inputs(cls, file):
        try:
            cls.check_file(path_of(file))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file):
        status = os.stat(path_of(file))
        return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"


def size_of(path):
    size = os.path.getsize(path)
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


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
        if source_prompt.strip():
            inversion = replace(inversion, settings=inversion.settings | {"source_prompt": source_prompt})
        description = latent_formats.describe(inversion.latent_format)
        height, width = inversion.latents.shape[-2:]
        try:
            path, name, subfolder = new_file(filename_prefix, inversion_file.KIND.suffix, width, height)
            cost = inversion_file.save(path, inversion, description, half=dtype == "float16")
        except OSError as error:
            raise ValueError(f"The inversion could not be written to '{filename_prefix}' ({error.strerror}).") from None
        text = f"{'/'.join(p for p in (subfolder, name) if p)}\n{size_of(path)}, {dtype}{_cost(cost)}"
        show(cls, text)
        saved = ui.SavedResult(name, subfolder, io.FolderType.output)
        return io.NodeOutput(ui={"text": [text], "inversions": [saved]})


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
                io.Combo.Input("file", options=found(inversion_file.KIND),
                               tooltip="Inversions in the output and input folders, newest first. Press R to refresh."),
            ],
            outputs=[
                sockets.Inversion.Output(display_name="inversion", tooltip="The path, for a LEDITS sampler with the "
                                         "kind of model that made it."),
                io.Latent.Output(display_name="x_T", tooltip="The noisiest latent, where an unskipped edit begins."),
                io.String.Output(display_name="source_prompt", tooltip="What was noted when it was saved, or empty."),
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
        text = f"{inversion.method}, {inversion.steps} steps, {inversion.batch} x {_size(inversion)}\n{inversion.model}"
        show(cls, text)
        prompt = inversion.settings.get("source_prompt", "")
        return io.NodeOutput(inversion, x_T, prompt, ui={"text": [text]})


def _size(inversion):
    return " x ".join(str(n) for n in inversion.latents.shape[2:])


NODES = [SaveInversion, LoadInversion]
