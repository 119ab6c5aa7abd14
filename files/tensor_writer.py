"""Writes the safetensors files that `tensor_file` reads: piece by piece, complete or not at all."""

import contextlib
import hashlib
import json
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

import torch

from .tensor_file import DTYPE_NAMES, title, words

PART = ".part"  # of a file while it is written
STALE = 24 * 3600  # seconds after which nobody writes to a part any more


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor to write: parts that follow each other in it, the dtype it is stored as, its shape."""

    slices: Iterable[torch.Tensor]
    dtype: torch.dtype
    shape: tuple[int, ...]


def piece(tensor: torch.Tensor) -> Piece:
    """A tensor as it is."""
    return Piece(slices=tensor.split(1), dtype=tensor.dtype, shape=tuple(tensor.shape))


def write(file: BinaryIO, metadata: dict[str, str], pieces: dict[str, Piece], header_limit: int, tensor_limit: int):
    """Write tensors and metadata, to which `sha256` is added: the checksum of the words and of all numbers.

    Args:
        file: open for writing, empty.
        pieces: {name: Piece}.
        header_limit, tensor_limit: of those who read the file.

    Raises:
        Overflow: the header is longer than that, or there are more tensors.
        ValueError: numbers that are not finite as they are stored.
        OSError: the file cannot be written.
    """
    entries, end = {}, 0
    for name in sorted(pieces, key=lambda name: (-pieces[name].dtype.itemsize, name)):  # so that all numbers are aligned
        dtype, shape = pieces[name].dtype, pieces[name].shape
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    head = _head(metadata | {"sha256": "0" * 64}, entries)
    if len(head) - 8 > header_limit or len(entries) > tensor_limit:
        raise Overflow
    digest = hashlib.sha256(words(metadata))
    for name in sorted(pieces):
        file.seek(len(head) + entries[name]["data_offsets"][0])
        digest.update(title(name, entries[name]["dtype"], pieces[name].shape))
        for part in pieces[name].slices:
            numbers = part.detach().to("cpu", pieces[name].dtype).contiguous()
            if not torch.isfinite(numbers).all():
                raise ValueError(f"The tensor {name} holds NaN or infinite numbers, which no file may: make it again.")
            digest.update(numbers.numpy())
            file.write(numbers.numpy())
    file.seek(0)
    file.write(_head(metadata | {"sha256": digest.hexdigest()}, entries))


class Overflow(ValueError):
    """More words or tensors than a file of the kind may have."""


def _head(metadata, entries):
    """The beginning of the file; of the same length whatever the checksum."""
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# --- names and parts --------------------------------------------------------------------------------------------------


def reserve(path) -> bool:
    """Make the part of a new file, and with it take the file's name: whoever has the part may make the file.

    Returns:
        whether the name was free; it is also taken where another process, on this machine or another, writes the file.

    Raises:
        OSError: nothing can be written there.
    """
    try:
        os.close(os.open(f"{path}{PART}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    if os.path.lexists(path):  # finished between the look into the folder and now
        release(path)
        return False
    return True


def release(path):
    """Give back what `reserve` took, where no file came of it."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{path}{PART}")


@contextlib.contextmanager
def whole(path):
    """Yields a binary file to write, which takes the place of `path` at the end: complete, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with open(f"{path}{PART}", "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # some systems say only here that the disk is full
        os.replace(f"{path}{PART}", path)
    finally:
        release(path)


def remove_stale(folder, suffix: str):
    """Remove parts that a process which was killed has left in a folder: of files with this suffix, a day old."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(suffix + PART) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):  # another process was faster, or it is not ours to remove
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE:
                    os.remove(entry.path)
