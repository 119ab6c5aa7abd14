"""Questions asked of conditionings. An entry is one part of an encoded conditioning, as in `CFGGuider.conds[...]`."""

import comfy.conds
import torch


def equal(x, y) -> bool:
    """Whether two values of conditionings are the same: tensors of one shape, dtype and content, conds, lists, plain ones."""
    if x is y:
        return True
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, comfy.conds.CONDRegular):
        return type(x) is type(y) and equal(x.cond, y.cond)
    if isinstance(x, (list, tuple)):
        return type(x) is type(y) and len(x) == len(y) and all(map(equal, x, y))
    return type(x) is type(y) and isinstance(x, (str, int, float, bool, type(None))) and x == y


def equal_but(x: dict, y: dict, ignored=()) -> bool:
    """Whether two dictionaries are the same, apart from some of their keys."""
    x, y = ({k: v for k, v in entry.items() if k not in ignored} for entry in (x, y))
    return x.keys() == y.keys() and all(equal(v, y[k]) for k, v in x.items())


def same_words(a: list, b: list) -> bool:
    """Whether two CONDITIONINGs say the same: words and pooled output of every part."""
    return a is b or len(a) == len(b) and all(
        equal(x[0], y[0]) and equal(x[1].get("pooled_output"), y[1].get("pooled_output")) for x, y in zip(a, b)
    )


def everywhere(entry: dict, size: tuple[int, int]) -> bool:
    """Whether an entry is for the whole picture; areas are (height, width, y, x)."""
    area = entry.get("area")
    return area is None or (not any(area[2:]) and area[0] >= size[0] and area[1] >= size[1])


def in_range(entry: dict, level) -> bool:
    """Whether an entry is evaluated at a noise level (ConditioningSetTimestepRange)."""
    early = "timestep_start" in entry and level > entry["timestep_start"]
    return not (early or ("timestep_end" in entry and level < entry["timestep_end"]))


def plain(entry: dict) -> dict:
    """An entry's words alone, for the whole picture at every step."""
    return {"model_conds": entry["model_conds"], "uuid": entry["uuid"]}


def repeats_by_picture(entries: list[dict], pictures: int) -> bool:
    """Whether rows of several noise levels may stand in one call, all pictures of a level together.

    ComfyUI repeats what is encoded over all rows of a call; only where its rows divide the number of pictures does each
    level begin with the first of them again.
    """
    values = (getattr(value, "cond", None) for entry in entries for value in entry.get("model_conds", {}).values())
    tensors = (t for value in values for t in (value if isinstance(value, (list, tuple)) else [value]))
    return all(pictures % t.shape[0] == 0 for t in tensors if isinstance(t, torch.Tensor) and t.ndim and t.shape[0])
