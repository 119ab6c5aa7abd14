"""A kept `AttentionStore` as a file: safetensors with a versioned header.

    metadata   format, version, dtype (of what was captured), model: words
               path: fingerprint of the path it was captured from
               beside words: <branch>: guidance and reference pictures that it was captured with, where there were any
               sha256: of all other metadata and all tensors as they are stored, in the order of their names
    tensors    <branch>/<site>/<layer>/<name>/<steps> [steps, B, ...], such as source/attn2/input.4.0/q/0-18,20: what
               was captured at one place, at steps 0 to 18 and 20 of the path;
               about/<branch> [1 or B, tokens, width] in float32: the source prompts it was captured with

Written and read piece by piece, as stored: a store may take most of the memory. In version 1 the checksum is of the
tensors alone.
"""

import re

import torch

from ..attention_hooks.store import AttentionStore, Origin
from .file_kind import FileKind
from .inversion_file import STEP_LIMIT
from .tensor_file import Entry, TensorFile
from .tensor_writer import Overflow, Piece, whole, write

KIND = FileKind(
    format="ledits-attention-store",
    version=2,
    suffix=".ledits-store.safetensors",
    what="attention store",
    other="an inversion or a checkpoint",
    advice="Choose a file that Save Attention Store has written, or capture again.",
    # All controls together read 600 tensors of SDXL's 70 layers: a header of 80 kB.
    header_limit=128 * 1024,
    tensor_limit=1024,
)
_NUMBER = "(?:0|[1-9][0-9]{0,3})"
_LAYER = rf"(?:input|middle|output|double|single)\.{_NUMBER}\.{_NUMBER}"
_SLOT = re.compile(rf"(source|negative)/(?:attn[12]/{_LAYER}/[qkv]|joint/{_LAYER}/[qkvt]|feature/{_LAYER}/h)")
_STEPS = re.compile(rf"{_NUMBER}(?:-{_NUMBER})?(?:,{_NUMBER}(?:-{_NUMBER})?)*")
_ABOUT, _BESIDE = "about/", "beside words: "


def nbytes(store: AttentionStore, half=False) -> int:
    """Size of the numbers that `save` writes."""
    return sum(t.numel() * _dtype(store, half).itemsize for t in store.tensors().values())


def save(path, store: AttentionStore, half=False):
    """Write a store. The file is complete or not there at all.

    Args:
        path: of the file; one of this name is replaced.
        store: one that Capture Attention made: not empty, with an origin.
        half: float16 also for what was captured in float32.

    Raises:
        ValueError: numbers that are not finite, or more names than a file may have.
        OSError: the file cannot be written.
    """
    dtype, prompts = _dtype(store, half), store.origin.prompts
    pieces = {_ABOUT + branch: Piece(slices=[prompt], dtype=torch.float32, shape=tuple(prompt.shape))
              for branch, prompt in prompts.items()}
    for slot, steps in _by_slot(store).items():
        shape = (len(steps), *next(iter(steps.values())).shape)
        slices = [steps[step] for step in sorted(steps)]
        pieces[f"{slot}/{_text(sorted(steps))}"] = Piece(slices=slices, dtype=dtype, shape=shape)
    origin, dtype_name = store.origin, str(dtype).removeprefix("torch.")
    metadata = KIND.metadata | {"dtype": dtype_name, "model": origin.model, "path": origin.path}
    metadata |= {_BESIDE + branch: said for branch, said in origin.beside.items() if said}
    try:
        with whole(path) as file:
            write(file, metadata, pieces, KIND.header_limit, KIND.tensor_limit)
    except Overflow:
        raise ValueError(
            "This store holds too many layers and windows to be saved: capture it for fewer controls or blocks."
        ) from None
    except ValueError:
        raise ValueError(
            "This store holds numbers that float16 cannot hold (above 65504) or that are no numbers: capture and save "
            "it as float32."
        ) from None


def load(path) -> AttentionStore:
    """Read a store. Allocates no more than its numbers, and nothing of their size for a file that is refused early.

    Returns:
        AttentionStore in host memory, float16 where the file is.

    Raises:
        ValueError: a sentence that says what is wrong with the file.
    """
    with KIND.refusals(path), KIND.open(path) as file:
        header, entries, steps = _header(file)
        tensors = file.read_all(entries, header["version"] != "1", as_stored=True)
    prompts = {name.removeprefix(_ABOUT): t for name, t in tensors.items() if name.startswith(_ABOUT)}
    beside = {branch: header.get(_BESIDE + branch, "") for branch in prompts}
    store = AttentionStore(origin=Origin(header["path"], header["model"], prompts, beside))
    for name, steps_of_name in steps.items():
        for step, tensor in zip(steps_of_name, tensors[name]):
            store.add_named(f"{step}/{name.rpartition('/')[0]}", tensor)
    return store


def check(path) -> int:
    """Refuse a file as `load` does, but from its header alone: its numbers are not read; its size in bytes."""
    with KIND.refusals(path), KIND.open(path) as file:
        _header(file)
        return file.size


def _header(file: TensorFile):
    """The header, checked: metadata, entries, and the steps of every captured tensor."""
    header = file.metadata
    KIND.check_version(header)
    if not header.get("model", "").isprintable() or not 0 < len(header.get("model", "")) <= 500:
        raise ValueError("its header does not name the model")
    if not re.fullmatch("[0-9a-f]{64}", header.get("path", "")) or "sha256" not in header:
        raise ValueError("its header does not say which picture it belongs to")
    if any(len(said) > 500 or not said.isprintable() for key, said in header.items() if key.startswith(_BESIDE)):
        raise ValueError("its header does not say what was given beside the prompt")
    if header.get("dtype") not in ("float32", "float16"):
        raise ValueError("its numbers are neither float32 nor float16")
    entries = file.entries()
    return header, entries, _check_entries(entries, {"float32": "F32", "float16": "F16"}[header["dtype"]])


def _check_entries(entries: dict[str, Entry], dtype: str) -> dict[str, list[int]]:
    """{name: steps} of all that was captured; tensors that are not those of a store or do not fit are refused."""
    steps, slots, pictures = {}, set(), set()
    for name, entry in entries.items():
        slot, _, text = name.rpartition("/")
        if name in (_ABOUT + "source", _ABOUT + "negative"):
            fits = entry.dtype == "F32" and len(entry.shape) == 3
        elif not _SLOT.fullmatch(slot) or not _STEPS.fullmatch(text):
            raise ValueError(
                f"it holds {name[:80]!r}, which this version cannot apply (update the pack if it is newer)"
            )
        else:
            steps[name] = _numbers(text)
            fits = len(entry.shape) == (5 if "/feature/" in name else 4) and entry.shape[0] == len(steps[name])
            fits = fits and entry.dtype == dtype and slot not in slots
            slots.add(slot)
            pictures.add(entry.shape[1] if fits else 0)
        if not fits:
            raise ValueError(
                f"its tensor {name[:80]!r} is not what its name promises ({entry.dtype} {list(entry.shape)})"
            )
    missing = {slot.split("/")[0] for slot in slots} - {name.removeprefix(_ABOUT) for name in entries}
    if missing or not slots:
        raise ValueError(f"its {'prompt is' if missing else 'tensors are'} missing")
    if len(pictures) != 1 or not all(entries[n].shape[0] in (1, *pictures) for n in entries.keys() - steps.keys()):
        raise ValueError("its tensors are of different numbers of pictures")
    return steps


def _dtype(store, half):
    everything = {tensor.dtype for tensor in store.tensors().values()}
    return torch.float16 if half or everything == {torch.float16} else torch.float32


def _by_slot(store):
    """{name without the step: {step: tensor}} of everything held."""
    out = {}
    for name, tensor in store.tensors().items():
        step, _, slot = name.partition("/")
        out.setdefault(slot, {})[int(step)] = tensor
    return out


def _text(steps):
    """Ascending steps as '0-18,20'."""
    first = [s for s in steps if s - 1 not in steps]
    last = [s for s in steps if s + 1 not in steps]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last))


def _numbers(text):
    """Undoes `_text`."""
    out = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        steps = range(int(first), int(last or first) + 1)
        if not steps or (out and steps[0] <= out[-1]) or steps[-1] >= STEP_LIMIT:
            raise ValueError(f"'{text[:80]}' in the name of a tensor are no steps")
        out += steps
    return out
