"""Where files lie: names within ComfyUI's own input and output folders, and nothing outside of them."""

import contextlib
import errno
import os
import re
import time

import folder_paths

from .file_kind import FileKind
from .tensor_writer import release, remove_stale, reserve

DEPTH = 5  # folders below input or output in which files are looked for


def inside(folder, path) -> bool:
    """Whether a path lies in a folder, links followed."""
    folder, path = os.path.realpath(folder), os.path.realpath(path)
    try:
        return os.path.commonpath((folder, path)) == folder
    except ValueError:  # different drives
        return False


def relative(name: str, what: str) -> str:
    """A file name or prefix as a relative path with `/`.

    Raises:
        ValueError: absolute, with a drive, or with a step up; `what` names it in the sentence.
    """
    parts = re.split(r"[/\\]", name)
    plain = name.strip() and name.isprintable() and ":" not in name
    if not plain or os.path.isabs(name) or not parts[0] or ".." in parts:
        raise ValueError(f"{what} {name[:80]!r} is not a plain name inside of ComfyUI's own folders: use letters, "
                         "digits and '/' for subfolders.")
    return "/".join(parts)


def path_of(file: str) -> str:
    """The path of a file by its name in the picker, "name" or "name [output]".

    Raises:
        ValueError: it is not in ComfyUI's input or output folder, or not there at all.
    """
    name, kind = file, "input"
    if file.endswith((" [input]", " [output]")):
        name, _, kind = file[:-1].rpartition(" [")
    folder = folder_paths.get_directory_by_type(kind)
    path = os.path.join(folder, *relative(name, "The file").split("/"))
    if not inside(folder, path):
        raise ValueError(f"'{name}' is a link that leads out of ComfyUI's {kind} folder: copy the file there.")
    if not os.path.isfile(path):
        raise ValueError(
            f"There is no '{name}' in ComfyUI's {kind} folder. Press R to refresh the list, and choose again."
        )
    return os.path.realpath(path)


def list_files(file_kind: FileKind) -> list[str]:
    """Names of all files of a `FileKind` in the output and input folders, newest first."""
    files = []
    for kind in ("output", "input"):
        folder = folder_paths.get_directory_by_type(kind)
        for path in _walk(folder, DEPTH):
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            if inside(folder, path) and file_kind.matches(path):
                with contextlib.suppress(OSError):  # removed meanwhile
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


@contextlib.contextmanager
def new_file(prefix: str, suffix: str, width=0, height=0):
    """A file to write in the output folder by `tensor_writer.whole`: yields (path, name, subfolder).

    The name is this run's own until the block ends, also where several servers share the folder. What a server that was
    killed has left in the subfolder is removed.

    Args:
        prefix: a `filename_prefix` as people write it; a number is added.
        width, height: for %width% and %height%.

    Raises:
        ValueError: it leads out of the folder.
        OSError: nothing can be written there.
    """
    prefix, output = relative(with_date(prefix), "The prefix"), folder_paths.get_output_directory()
    if not inside(output, os.path.join(output, os.path.dirname(prefix))):
        raise ValueError(f"The prefix '{prefix}' follows a link out of ComfyUI's output folder: choose another.")
    folder, stem, count, subfolder, _ = folder_paths.get_save_image_path(prefix, output, width, height)
    remove_stale(folder, suffix)
    name = f"{stem}_{count:05}_{suffix}"
    while not reserve(os.path.join(folder, name)):
        count += 1
        name = f"{stem}_{count:05}_{suffix}"
    try:
        yield os.path.join(folder, name), name, subfolder
    finally:
        release(os.path.join(folder, name))


def not_written(what: str, name: str, error: OSError) -> ValueError:
    """Why a file in the output folder could not be written, as a sentence."""
    advice = {errno.ENOSPC: "make room on the disk", errno.EDQUOT: "make room on the disk",
              errno.EFBIG: "the disk takes no file of this size", errno.ENAMETOOLONG: "choose a shorter name"}
    why = error.strerror or str(error) or type(error).__name__
    do = advice.get(error.errno, "choose another name, or look at the rights of ComfyUI's output folder")
    return ValueError(f"{what} could not be written to '{name[:80]}' ({why}): {do}.")


def in_words(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
