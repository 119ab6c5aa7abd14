"""An `Inversion` as a file: safetensors with a versioned header.

    metadata   format, version, dtype, method, family, model: words
               latent_format, settings, rounding: JSON
               source_prompt: where it is known
               source_sha256: of the encoded picture `latents[-1]` in float32
               sha256: of all other metadata and all tensors as they are stored, in the order of their names
    tensors    sigmas [N + 1] and etas [N] in float32;
               latents [N + 1, B, C, H, W] (of video models [N + 1, B, C, T, H, W]), residuals [N, B, C, H, W] and shifts
               of the same shape where there are any, mask [M, h, w] where there is one, overrides.<name>
               denoised [N, B, C, H, W] in place of residuals, in float16 files of flow models: near their highest level
               a step takes so little of D that rounded residuals would not give D back

In version 1 the checksum is of the tensors alone. A reader refuses what a later version may mean differently.
"""

import hashlib
import json
import math
from dataclasses import replace

import torch

from ..samplers.methods.families import FAMILIES
from ..samplers.methods.record import Inversion, check_sigmas
from .file_kind import FileKind
from .letters import whole_letters
from .rounding import rounding
from .tensor_file import HEADER_LIMIT, Entry, TensorFile, is_text, parse
from .tensor_writer import piece, whole, write

KIND = FileKind(
    format="ledits-inversion",
    version=2,
    suffix=".ledits.safetensors",
    what="inversion",
    other="a checkpoint or LoRA",
    advice="Choose a file that Save Inversion has written, or invert the picture again.",
)
STEP_LIMIT = 10_000
LARGEST = 1e7  # noise levels of a zero-terminal-SNR schedule end near 5,000
_WORDS = ("method", "family", "model")
# Settings that an edit reckons with: types, lowest, highest.
_RANGES = {"tau_v": ((int, float), 0, 1), "draws": (int, 1, 10_000), "noise_scale": ((int, float), 1e-3, 1e3)}
# Of the embeddings in `Inversion.overrides`.
_RANKS = {"negative": 4, "negative_pooled": 2, "value": 5, "negative.attention_mask": 2,
          "negative.conditioning_llama3": 4, "negative.conditioning_byt5small": 3}


def save(path, inversion: Inversion, latent_format, half=False):
    """Write an inversion. The file is complete or not there at all.

    Args:
        path: of the file; one of this name is replaced.
        inversion: the record. `settings["source_prompt"]`, if there, goes into the header under its own name.
        latent_format: plain values that the caller can make `inversion.latent_format` from again.
        half: float16 for everything but sigmas and etas, which halves the size.

    Returns:
        None, or with `half` what it costs, see `rounding`.

    Raises:
        ValueError: float16 cannot hold the numbers, or the settings are too long.
        OSError: the file cannot be written.
    """
    tensors = {"latents": inversion.latents, "residuals": inversion.residuals, "shifts": inversion.shifts,
               "mask": inversion.mask}
    tensors |= {f"overrides.{name}": value for name, value in inversion.overrides.items()}
    exact = {name: _plain(value) for name, value in tensors.items() if value is not None}
    stored, cost = exact, None
    if half:
        stored = {name: value.half() for name, value in exact.items()}
        if not all(torch.isfinite(value).all() for value in stored.values()):
            raise ValueError("This inversion holds numbers above 65504, too large for float16: save it as float32.")
        if inversion.residuals is not None and inversion.kind.bounded:
            stored["denoised"] = torch.stack([inversion.denoised(i) for i in range(inversion.steps)]).half()
            stored["residuals"] = _residuals(inversion, stored["latents"], stored["denoised"])
        cost = rounding(inversion, stored)
        if "denoised" in stored:
            del stored["residuals"]
    stored |= {"sigmas": _plain(inversion.sigmas), "etas": _plain(inversion.etas)}
    settings = {k: v for k, v in inversion.settings.items() if k != "source_prompt"}
    metadata = KIND.metadata | {"dtype": "float16" if half else "float32"}
    metadata |= {name: str(getattr(inversion, name)) for name in _WORDS}
    metadata |= {"latent_format": _json(latent_format), "settings": _json(settings),
                 "source_sha256": _hash(exact["latents"][-1])}
    if inversion.settings.get("source_prompt"):
        metadata["source_prompt"] = whole_letters(str(inversion.settings["source_prompt"]))
    if cost is not None:
        metadata["rounding"] = _json(cost)
    if len(json.dumps(metadata)) > HEADER_LIMIT // 2:
        raise ValueError("The prompt or the settings of this inversion are too long to be stored: shorten the prompt.")
    with whole(path) as file:
        pieces = {name: piece(value) for name, value in stored.items()}
        write(file, metadata, pieces, KIND.header_limit, KIND.tensor_limit)
    return cost


def load(path, make_latent_format) -> Inversion:
    """Read an inversion. Allocates no more than the record itself, and nothing of its size for a file it refuses early.

    Args:
        path: of the file.
        make_latent_format: from the plain values given to `save`, to a latent format; ValueError where it cannot.

    Returns:
        Inversion, float32 on the CPU. Its settings hold "source_prompt" where the file does, and "float16" with the
        cost where it was rounded.

    Raises:
        ValueError: a sentence that says what is wrong with the file.
    """
    with KIND.refusals(path), KIND.open(path) as file:
        header, entries, settings, latent_format = _header(file, make_latent_format)
        tensors = file.read_all(entries, header["version"] != "1")
        if header["dtype"] == "float32" and header.get("source_sha256", "") not in ("", _hash(tensors["latents"][-1])):
            raise ValueError("it names another picture than it holds: it is damaged")
        _check_levels(tensors["sigmas"], tensors["etas"])
        ends = (end for value in tensors.values() if value.numel() for end in value.aminmax())  # needs no copy of the path
        if any(abs(float(end)) > LARGEST for end in ends):
            raise ValueError("its numbers are too large to be latents")
        overrides = {n.removeprefix("overrides."): t for n, t in tensors.items() if n.startswith("overrides.")}
        inversion = Inversion(
            sigmas=tensors["sigmas"],
            latents=tensors["latents"],
            residuals=tensors.get("residuals"),
            shifts=tensors.get("shifts"),
            mask=tensors.get("mask"),
            etas=tensors["etas"],
            family=header["family"],
            model=header["model"],
            method=header["method"],
            settings=settings,
            overrides=overrides,
            latent_format=latent_format,
        )
        value = overrides.get("value")
        if value is not None and len(value) < inversion.settings.get("tau_v", 1) * inversion.steps:
            raise ValueError(f"it prescribes values for {len(value)} of {inversion.steps} steps only")
        if inversion.batch % inversion.draws:
            raise ValueError(f"it holds {inversion.batch} latents a level for {inversion.draws} draws of every picture")
        if "denoised" not in tensors:
            return inversion
        return replace(inversion, residuals=_residuals(inversion, tensors["latents"], tensors["denoised"]))


def _residuals(inversion: Inversion, latents, denoised):
    """Residuals, float32 [N, B, C, ...], of a path and of what the model predicted along it."""
    steps = [inversion.step(i) for i in range(inversion.steps)]
    return torch.stack([latents[i + 1].float() - c.keep * latents[i].float() - c.take * denoised[i].float()
                        for i, c in enumerate(steps)])


def check(path, make_latent_format):
    """Refuse a file as `load` does, but from its header alone: its numbers are not read."""
    with KIND.refusals(path), KIND.open(path) as file:
        _header(file, make_latent_format)


def _header(file: TensorFile, make_latent_format):
    """The header, checked: metadata, entries, settings, latent format."""
    header = _metadata(file)
    entries = file.entries()
    _check_shapes(entries, header["dtype"])
    return header, entries, _settings(header), _latent_format(header, entries["latents"].shape[2], make_latent_format)


def _metadata(file: TensorFile):
    """The metadata of an inversion, checked as far as they do not depend on the tensors."""
    header = file.metadata
    KIND.check_version(header)
    missing = [n for n in (*_WORDS, "dtype", "latent_format", "settings", "sha256") if n not in header]
    if missing:
        raise ValueError(f"its header lacks '{missing[0]}'")
    if not all(header[n].isprintable() and 0 < len(header[n]) <= 500 for n in _WORDS):
        raise ValueError("its header does not say in plain words what made it")
    if header["family"] not in FAMILIES:
        raise ValueError("it is of a family of models that this version does not know")
    if header["dtype"] not in ("float32", "float16"):
        raise ValueError("its numbers are neither float32 nor float16")
    return header


def _settings(header):
    settings = parse(header["settings"], "settings")
    if not isinstance(settings, dict) or not _sane(settings):
        raise ValueError("its settings cannot be read")
    for name, (kinds, lowest, highest) in _RANGES.items():
        value = settings.get(name, 1)
        if not isinstance(value, kinds) or not lowest <= value <= highest:
            raise ValueError(f"its settings cannot be read ({name} is {str(value)[:20]!r})")
    noted = {"source_prompt": header["source_prompt"]} if "source_prompt" in header else {}
    if header["dtype"] == "float16" and "rounding" in header:
        noted["float16"] = parse(header["rounding"], "header")
        if not isinstance(noted["float16"], dict) or not _sane(noted["float16"]):
            raise ValueError("its header cannot be read")
    return {k: v for k, v in settings.items() if k != "source_prompt"} | noted


def _sane(value) -> bool:
    """Whether a value read from JSON can be shown: numbers of a size that floats have, text that can be encoded."""
    if isinstance(value, dict):
        return all(_sane(k) and _sane(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(_sane, value))
    if isinstance(value, str):
        return is_text(value)
    return not isinstance(value, (int, float)) or abs(value) < 1e300


def _latent_format(header, channels, make):
    latent_format = make(parse(header["latent_format"], "latent format"))
    if getattr(latent_format, "latent_channels", channels) != channels:
        raise ValueError(f"its latents have {channels} channels, its latent format {latent_format.latent_channels}")
    return latent_format


def _check_shapes(entries: dict[str, Entry], dtype: str):
    """Refuse tensors that are not those of an inversion, or do not fit each other."""
    missing = [name for name in ("sigmas", "etas", "latents") if name not in entries]
    if missing:
        raise ValueError(f"its tensor '{missing[0]}' is missing")
    for name, entry in entries.items():
        wanted = "F32" if name in ("sigmas", "etas") or dtype == "float32" else "F16"
        if entry.dtype != wanted:
            raise ValueError(f"its tensor {name[:80]!r} is {entry.dtype} where {wanted} is expected")
    path = entries["latents"].shape
    if len(path) not in (5, 6) or not 2 <= path[0] <= STEP_LIMIT + 1:
        raise ValueError(f"its path has the shape {list(path)}, not levels x pictures x channels x height x width")
    if "denoised" in entries and ("residuals" in entries or dtype != "float16"):
        raise ValueError("it holds noise maps in two ways")
    steps, pictures = path[0] - 1, path[1]
    expected = {"sigmas": (steps + 1,), "etas": (steps,), "latents": path}
    expected |= dict.fromkeys(("residuals", "denoised", "shifts"), (steps, *path[1:]))
    for name, entry in entries.items():
        kind = name.removeprefix("overrides.")
        if name in expected:
            fits = entry.shape == expected[name]
        elif name == "mask":
            fits = len(entry.shape) in (3, 5) and all(entry.shape)
        elif name == kind or kind not in _RANKS:
            raise ValueError(
                f"it holds {name[:80]!r}, which this version cannot apply (update the pack if it is newer)"
            )
        else:
            fits = len(entry.shape) == _RANKS[kind] and _embedding_fits(kind, entry.shape, steps, pictures)
        if not fits:
            raise ValueError(f"its tensor '{name}' has the shape {list(entry.shape)}, which does not fit its path")


def _embedding_fits(kind, shape, steps, pictures):
    if kind == "negative_pooled" or "." in kind:
        return shape[0] in (1, pictures)
    if kind == "value":
        return shape[0] <= steps and shape[1] in (1, pictures) and shape[2] == 2
    return shape[0] in (1, steps) and shape[1] in (1, pictures)


def _check_levels(sigmas, etas):
    try:
        check_sigmas(sigmas)
    except ValueError:
        raise ValueError("its noise levels do not fall from step to step") from None
    if etas.min() < 0 or etas.max() > 1:
        raise ValueError("its share of noise (eta) is not between 0 and 1")


def _plain(tensor):
    """A copy in float32 on the CPU: safetensors refuses tensors that share memory, as an expanded embedding does."""
    return tensor.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)


def _hash(picture: torch.Tensor) -> str:
    return hashlib.sha256(picture.contiguous().numpy()).hexdigest()


def _json(value):
    return json.dumps(_values(value), ensure_ascii=True, allow_nan=False)


def _values(value):
    """A value as JSON can hold it. Numbers that are not finite become None."""
    if isinstance(value, dict):
        return {whole_letters(str(k)): _values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_values(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int) else whole_letters(str(value))
