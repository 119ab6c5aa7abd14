"""A strict reader of small safetensors files that may come from strangers.

The header is checked against the file before anything of the size of a tensor is allocated, and the numbers are read
from the one open handle that was checked, piece by piece: a mapped file that is replaced or cut short while it is in
use would end the process. What is accepted here, safetensors' own parser accepts as well; it accepts more.

Layout (https://github.com/huggingface/safetensors): uint64 little-endian length n of the header, n bytes of JSON
`{"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}`, the data without gaps.
"""

import hashlib
import json
import math
import os
import stat
import struct
from dataclasses import dataclass

import numpy
import torch

HEADER_LIMIT = 64 * 1024  # bytes; Python objects made from JSON can take 30 times as much
TENSOR_LIMIT = 16
RANK_LIMIT = 6
DTYPES = {"F32": numpy.dtype("<f4"), "F16": numpy.dtype("<f2")}
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16"}
_PIECE = 1 << 18  # numbers converted at once


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor lies: dtype "F32" or "F16", shape, first byte from the beginning of the file, bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


class TensorFile:
    """A safetensors file opened for reading; a context manager.

    Only `metadata` is checked on opening. Call `entries` before `read`.

    Attributes:
        metadata: {str: str}.
        size: bytes of the whole file.

    Args:
        path: a regular file.
        header_limit, tensor_limit: more bytes of header, or more tensors, are refused.

    Raises:
        ValueError: it cannot be opened, or its header is not one of a small safetensors file.
        OSError: it cannot be read.
    """

    def __init__(self, path, header_limit=HEADER_LIMIT, tensor_limit=TENSOR_LIMIT):
        self._header_limit, self._tensor_limit = header_limit, tensor_limit
        try:
            # Never open what can block, such as a named pipe.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError("it is not a regular file")
            self._handle = open(path, "rb")
        except OSError as error:
            raise ValueError(f"it cannot be opened ({error.strerror})") from None
        try:
            self.size = os.fstat(self._handle.fileno()).st_size
            self._header, self._start = self._read_header()
            self.metadata = self._header.pop("__metadata__", {})
            if not isinstance(self.metadata, dict) or not all(map(is_text, [*self.metadata, *self.metadata.values()])):
                raise ValueError("its metadata are not words")
        except BaseException:
            self._handle.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.close()

    def _read_header(self):
        first = self._handle.read(8)
        if len(first) < 8:
            raise ValueError("it is too short")
        (length,) = struct.unpack("<Q", first)
        if length > self.size - 8:
            raise ValueError("its header is cut off")
        if length > self._header_limit:
            raise ValueError(f"its header has {length} bytes, more than {self._header_limit}")
        raw = self._handle.read(length)
        if len(raw) != length or not raw.startswith(b"{"):
            raise ValueError("its header is not that of a safetensors file")
        header = parse(raw, "header")
        if not isinstance(header, dict):
            raise ValueError("its header is not that of a safetensors file")
        return header, 8 + length

    def entries(self) -> dict[str, Entry]:
        """{name: Entry}, checked: the tensors fill the rest of the file exactly, without gap or overlap.

        Raises:
            ValueError: anything else.
        """
        if not 0 < len(self._header) <= self._tensor_limit:
            raise ValueError(f"it holds {len(self._header)} tensors, not 1 to {self._tensor_limit}")
        entries = {name: self._entry(name[:80], item) for name, item in self._header.items()}
        at = self._start
        for entry in sorted(entries.values(), key=lambda e: e.begin):
            if entry.begin != at:
                raise ValueError("its tensors overlap or leave gaps")
            at += entry.size
        if at != self.size:
            raise ValueError(f"it has {self.size} bytes where its header promises {at}: it is cut off or damaged")
        return entries

    def _entry(self, name, item):
        if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the description of its tensor {name!r} is malformed")
        dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"its tensor {name!r} is not of type F32 or F16")
        if not _whole(shape) or not 1 <= len(shape) <= RANK_LIMIT or not all(0 < n < 2**31 for n in shape):
            raise ValueError(f"the shape of its tensor {name!r} is impossible")
        if not _whole(offsets) or len(offsets) != 2 or not 0 <= offsets[0] < offsets[1] <= self.size - self._start:
            raise ValueError(f"its tensor {name!r} lies outside of the file: it is cut off or damaged")
        size = offsets[1] - offsets[0]
        if math.prod(shape) * DTYPES[dtype].itemsize != size:
            raise ValueError(f"the shape of its tensor {name!r} does not fit its {size} bytes")
        return Entry(dtype=dtype, shape=tuple(shape), begin=self._start + offsets[0], size=size)

    def read_all(self, entries: dict[str, Entry], with_words: bool, as_stored=False) -> dict[str, torch.Tensor]:
        """All tensors, see `read`.

        Their checksum is `metadata["sha256"]`: of the `words` and of each tensor, in the order of the names, its
        `title` and its bytes as they are stored.

        Args:
            with_words: False for files whose checksum is of the tensors alone.

        Raises:
            ValueError: another checksum; also as `read`.
        """
        digest, tensors = hashlib.sha256(words(self.metadata) if with_words else b""), {}
        for name in sorted(entries):
            digest.update(title(name, entries[name].dtype, entries[name].shape))
            tensors[name] = self.read(entries[name], digest, as_stored)
        if digest.hexdigest() != self.metadata["sha256"]:
            raise ValueError(f"its numbers{' or words' * with_words} are not those that were saved: it is damaged")
        return tensors

    def read(self, entry: Entry, digest, as_stored=False) -> torch.Tensor:
        """A tensor as float32.

        Args:
            entry: from `entries`.
            digest: hashlib object, updated with the bytes as they are stored.
            as_stored: leave float16 as it is.

        Raises:
            ValueError: the file has become shorter, or a number is NaN or infinite.
        """
        try:
            out = torch.empty(entry.shape, dtype=torch.float16 if as_stored and entry.dtype == "F16" else torch.float32)
        except RuntimeError:
            raise ValueError("there is not enough memory for it") from None
        flat = out.view(-1).numpy()
        piece = numpy.empty(min(_PIECE, len(flat)), DTYPES[entry.dtype])
        self._handle.seek(entry.begin)
        for begin in range(0, len(flat), len(piece)):
            part = piece[: len(flat) - begin]
            if self._handle.readinto(part.view(numpy.uint8)) != part.nbytes:
                raise ValueError("it was cut off while it was being read")
            if not numpy.isfinite(part).all():
                raise ValueError("it holds NaN or infinite numbers")
            digest.update(part)
            flat[begin : begin + len(part)] = part
        return out


def title(name: str, dtype: str, shape) -> bytes:
    """The line before a tensor's numbers in the checksum of a file."""
    return f"{name} {dtype} {list(shape)}\n".encode()


def words(metadata: dict[str, str]) -> bytes:
    """Metadata in the checksum of a file: a line for each but the checksum itself."""
    return b"".join(json.dumps([key, metadata[key]]).encode() + b"\n" for key in sorted(metadata) if key != "sha256")


def is_text(value) -> bool:
    """Whether a value is text that can be shown; halves of letters ("\\ud800"), which JSON may hold, cannot."""
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode("utf-8")


def parse(text, what):
    """A JSON value without repeated keys, NaN or infinities.

    Raises:
        ValueError: names `what`.
    """

    def unique(pairs):
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError
        return out

    def refuse(_):
        raise ValueError

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise ValueError(f"its {what} cannot be read") from None
    return value


def _whole(numbers):
    """Whether it is a list of whole numbers."""
    return isinstance(numbers, list) and all(type(n) is int for n in numbers)
