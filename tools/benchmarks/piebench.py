"""PIE-Bench's own data (arXiv 2310.01506): `mapping_file.json` and `annotation_images/`, read and written.

An entry has `image_path`, `original_prompt`, `editing_prompt` (square brackets mark what differs),
`editing_instruction`, `editing_type_id`, `blended_word` ("source-word target-word", or empty) and `mask`: [start,
length, ...] over the rows of the picture, 1 where the edit may change it. Demo-Bench adds `truth`. Numpy and Pillow
only.
"""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MAPPING, PICTURES = "mapping_file.json", "annotation_images"
LONGEST = 200  # bytes of an id, which names files
TYPES = ("random", "change object", "add object", "delete object", "change content", "change pose or place",
         "change colour", "change material", "change background", "change style")
"""What the numbers of `editing_type_id` stand for."""


class Problem(Exception):
    """What is wrong with the data or the settings, in a sentence."""


@dataclass(frozen=True)
class Item:
    """One picture and the edit that is asked for.

    Attributes:
        key: its id in the mapping.
        type: index into TYPES.
        path: of the picture.
        source, target: prompts without brackets.
        source_marked, target_marked: phrases that stood in brackets.
        blended: () or the words that name the edited thing before and after.
        runs: the mask's [start, length, ...].
        truth: what Demo-Bench knows about the edit, or None.
    """

    key: str
    type: int
    path: Path
    source: str
    target: str
    source_marked: tuple[str, ...] = ()
    target_marked: tuple[str, ...] = ()
    blended: tuple[str, ...] = ()
    runs: tuple[int, ...] = ()
    truth: dict | None = None


# --- masks ----------------------------------------------------------------------------------------------------------


def decode(runs, height, width):
    """The mask as the published evaluation uses it: float32 [height, width], 1 to be edited, the border forced to 1.

    Raises:
        Problem: runs that cannot belong to a picture of this size.
    """
    whole = isinstance(runs, list | tuple) and all(type(n) is int and n >= 0 for n in runs)
    if not whole or len(runs) % 2:
        raise Problem("its mask is not a list of starts and lengths")
    mask = np.zeros(height * width, np.float32)
    for start, length in zip(runs[::2], runs[1::2]):
        if start > len(mask):
            raise Problem(f"its mask reaches beyond the picture of {width} x {height}")
        mask[start : start + length] = 1  # what is too long ends with the picture
    mask = mask.reshape(height, width)
    mask[[0, -1]], mask[:, [0, -1]] = 1, 1
    return mask


def encode(mask):
    """[start, length, ...] of a mask [H, W], 1 where it is more than 0.5."""
    flat = np.concatenate([[False], np.asarray(mask).ravel() > 0.5, [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(n) for start, end in zip(edges[::2], edges[1::2]) for n in (start, end - start)]


# --- prompts --------------------------------------------------------------------------------------------------------


def plain(prompt):
    """A prompt without its brackets, which the published runs only leave out."""
    return prompt.replace("[", "").replace("]", "")


def marked(prompt):
    """The phrases in brackets."""
    return tuple(text for found in re.findall(r"\[([^\[\]]*)\]", prompt) if (text := found.strip()))


# --- the folder -----------------------------------------------------------------------------------------------------


def load(folder):
    """All pictures of a folder.

    Returns:
        list of `Item`, and of the entries that cannot be used: list of sentences.

    Raises:
        Problem: no mapping file, or one that cannot be read.
    """
    folder = Path(folder)
    mapping = _read(folder)
    items, problems = [], []
    for key, entry in mapping.items():
        try:
            items.append(_item(folder, key, entry))
        except Problem as problem:
            problems.append(f"{shown(key)} is left out: {shown(problem, 300)}.")
        except Exception as error:  # one entry that nobody foresaw is no reason to measure none
            problems.append(f"{shown(key)} is left out: it cannot be used ({shown(repr(error), 300)}).")
    if not items:
        what = problems[0] if problems else "it is empty"
        raise Problem(f"Nothing in {folder / MAPPING} can be used. {what}")
    return items, problems


def shown(text, most=80):
    """A text from a file as it can be printed and kept: on one line, not too long, halves of letters and the like escaped."""
    plain = "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in str(text))
    plain = plain.encode("utf-8", "backslashreplace").decode("utf-8")
    return plain if len(plain) <= most else plain[: most - 3] + "..."


def _number(digits):
    return int(digits) if len(digits) < 30 else float("inf")  # which no entry means, and Python may refuse to read


def _read(folder):
    path = folder / MAPPING
    try:
        mapping = json.loads(path.read_text("utf-8-sig"), parse_int=_number)
    except OSError:
        raise Problem(
            f"{folder} has no {MAPPING}: give the folder of PIE-Bench that holds it beside {PICTURES}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise Problem(f"{path} is not JSON ({error}): download it again.") from None
    if not isinstance(mapping, dict):
        raise Problem(f"{path} is not PIE-Bench's mapping: it holds no entries by id.")
    return mapping


def _item(folder, key, entry):
    def text(name, default=None):
        value = entry.get(name, default)
        if not isinstance(value, str):
            raise Problem(f"its {name} is missing or no text")
        if "\0" in value or value != value.encode("utf-8", "ignore").decode("utf-8"):
            raise Problem(f"its {name} holds what is no letter")
        return value

    if not isinstance(entry, dict):
        raise Problem("its entry is no set of fields")
    if not re.fullmatch(r"[\w.-]+", key) or len(key.encode()) > LONGEST:
        raise Problem("its id cannot be a file name")
    truth = entry.get("truth")
    if truth is not None and not (isinstance(truth, dict) and isinstance(truth.get("target"), str)):
        raise Problem("its truth does not say what the target is")
    number = str(entry.get("editing_type_id"))
    if number not in map(str, range(len(TYPES))):
        raise Problem(f"its editing_type_id is {number}, not one of 0 to {len(TYPES) - 1}")
    source, target = text("original_prompt"), text("editing_prompt")
    if not plain(target).strip():
        raise Problem("its editing_prompt is empty")
    path = _picture(folder / PICTURES, text("image_path"))
    runs = entry.get("mask")
    decode(runs, *_size(path))
    return Item(key, int(number), path, plain(source), plain(target), marked(source), marked(target),
                tuple(text("blended_word", "").split()[:2]), tuple(runs), truth)


def _picture(folder, name):
    path = folder / name
    try:
        inside, there = path.resolve().is_relative_to(folder.resolve()), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
        raise Problem(f"its picture {shown(name)} cannot be read ({error})") from None
    if not inside:
        raise Problem(f"its picture {shown(name)} is not inside {PICTURES}")
    if not there:
        raise Problem(f"its picture {shown(name)} is missing in {folder}")
    return path


def _size(path):
    """Height and width of a picture; only its head is read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception as error:  # Pillow has many for a damaged file
        raise Problem(f"its picture {path.name} cannot be read ({error})") from None
    if width % 8 or height % 8:
        raise Problem(f"its picture {path.name} is {width} x {height}: both must be multiples of 8")
    return height, width


def choose(items, count=None, types=()):
    """The first `count` items (all by default) of some types (all by default), as evenly over the types as they go."""
    by_type = {}
    for item in items:
        if not types or item.type in types:
            by_type.setdefault(item.type, []).append(item)
    turns = [(turn, kind) for kind, some in by_type.items() for turn in range(len(some))]
    picked = {id(by_type[kind][turn]) for turn, kind in sorted(turns)[:count]}
    return [item for item in items if id(item) in picked]


def picture_of(data):
    """float32 [H, W, 3] in 0..1 of an image file's bytes."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255


def png_of(picture):
    """An image file's bytes, lossless, of float32 [H, W, 3] in 0..1."""
    file = io.BytesIO()
    Image.fromarray(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()
