"""2,000 damaged files of each kind, and 1,000 whose checksum was made to fit: equal to what was saved, or a sentence."""
import contextlib
import json
import struct

import pytest
import torch
from comfyui_ledits.files import inversion_file, latent_formats, store_file
from comfyui_ledits.nodes.inspect_inversion import InspectInversion
from comfyui_ledits.nodes.unpack_pack import PackInversion, UnpackInversion
from comfyui_ledits.samplers.models import describe
from support import mutations, runs, tiny
from support.records import record, saved
from support.stores import by_hand, same

pytestmark = [pytest.mark.standing, pytest.mark.usefixtures("inference_mode")]
COUNT, SIGNED = 2000, 1000


def refused(error, ends):
    said = str(error)
    assert said.isprintable() and len(said) < 400 and said.endswith(ends), said


def equal(a, b):
    """Whether two inversions are the same, tensors and words."""
    tensors = ("sigmas", "latents", "residuals", "shifts", "etas", "mask")
    pairs = [(getattr(a, name), getattr(b, name)) for name in tensors]
    pairs += [(a.overrides.get(name), b.overrides.get(name)) for name in a.overrides.keys() | b.overrides.keys()]
    if not all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs):
        return False
    words = ("family", "model", "method", "settings")
    return all(getattr(a, name) == getattr(b, name) for name in words) and latent_formats.equal(a.latent_format, b.latent_format)


@pytest.mark.parametrize("half", [False, True])
def test_a_damaged_inversion_is_loaded_equal_or_refused(tmp_path, half):
    made, _ = record(steps=3, batch=1, size=6, overrides={"negative": torch.randn(1, 1, 5, 3)}, cfg=3.5, scheduler="simple",
                     note={"deep": [1, "two"]}, source_prompt="a cat")
    exact, _ = saved(tmp_path / "x", made, half)
    raw, path, loaded = (tmp_path / "x").read_bytes(), tmp_path / "y", 0
    for kind, damaged in mutations.unsigned(raw, COUNT, seed=7):
        path.write_bytes(damaged)
        try:
            back = inversion_file.load(path, latent_formats.make)
        except ValueError as error:
            refused(error, (inversion_file.KIND.advice, "update the pack to load it."))
            continue
        assert equal(back, exact), kind
        loaded += 1
    assert loaded < COUNT / 10


def test_a_damaged_store_is_loaded_equal_or_refused(tmp_path):
    store, path, loaded = by_hand(2), tmp_path / ("y" + store_file.KIND.suffix), 0
    store_file.save(tmp_path / "x", store)
    for kind, damaged in mutations.unsigned((tmp_path / "x").read_bytes(), COUNT, seed=8):
        path.write_bytes(damaged)
        try:
            back = store_file.load(path)
        except ValueError as error:
            refused(error, (store_file.KIND.advice, "update the pack to load it."))
            continue
        assert same(back, store) and back.origin.model == store.origin.model and back.origin.path == store.origin.path, kind
        loaded += 1
    assert loaded < COUNT / 10


# --- those that somebody has made to fit ------------------------------------------------------------------------------

WORDS = {"tau_v": [None, 0, 1, 0.5, -1, 7, "1", True, []], "draws": [0, 1, 2, 1.5, None, "many", 10**9],
         "noise_scale": [0, 1, None, "1", 8.0, -1, 1e300], "cfg": [None, 3, "3", 10**400, [], {}], "noise": [5, "Brownian", None],
         "source_prompt": [5, None], "loss": ["x", None, [1]], "edit_cfg": [None, "x"], "\u732b": [1], "steps": [10**300]}


def forged(raw, rng):
    """Other settings, words and numbers, with a checksum that fits."""
    parts = mutations.Parts(raw)
    words = parts.header["__metadata__"]
    settings = json.loads(words["settings"])
    for name in rng.sample(sorted(WORDS), rng.randint(1, 3)):
        settings[name] = rng.choice(WORDS[name])
    if rng.random() < 0.7:
        words["settings"] = json.dumps(settings)
    if rng.random() < 0.3:
        words[rng.choice(["method", "source_prompt", "new"])] = rng.choice(["x", "", "a\nb", "x" * 499, "\u732b", "\ud800"])
    if rng.random() < 0.2:
        words["family"] = rng.choice(["flow", "ve", "VE", ""])
    if rng.random() < 0.2:
        words["model"] = rng.choice(["BaseModel, SD15", "x", " "])
    if rng.random() < 0.3:
        name = rng.choice(sorted(parts.tensors))
        numbers = [rng.choice([0.0, 1.0, -1.0, 1e5, 1e-30, 3e6, 1e8]) for _ in range(3)]
        parts.numbers(name, numbers[: parts.tensors[name]["data_offsets"][1] // 4])
    if rng.random() < 0.3:
        new = rng.choice(["negative", "negative_pooled", "value", "negative.attention_mask", "negative.conditioning_llama3"])
        shape = rng.choice([[1, 1, 77, tiny.CONTEXT], [4, 1, 2, 77, tiny.CONTEXT], [1, 24], [1, 1, 5, 3], [2, 1, 2, 5, 3], [1, 77],
                            [4, 1, 7, tiny.CONTEXT], [1, 2, 12, tiny.CONTEXT]])
        size = 4
        for n in shape:
            size *= n
        begin = len(parts.data)
        parts.data += struct.pack("<f", 0.5) * (size // 4)
        parts.header[f"overrides.{new}"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + size]}
    with contextlib.suppress(UnicodeEncodeError):
        parts.signed()
    return parts.bytes()


def test_the_next_nodes_take_what_is_loaded_or_say_why_not(tmp_path):
    """What passes the reader passes the nodes after it: a picture without NaN, or a sentence before the model runs."""
    import random

    made = runs.invert(runs.EditFriendlyInversion, "sd1", steps=4)[0]
    assert made.model == describe(runs.model("sd1"))
    saved(tmp_path / "x", made)
    raw, path, rng, ended = (tmp_path / "x").read_bytes(), tmp_path / "y", random.Random(9), {"edited": 0, "refused": 0}
    for _ in range(SIGNED):
        path.write_bytes(forged(raw, rng))
        try:
            back = inversion_file.load(path, latent_formats.make)
        except ValueError as error:
            refused(error, (inversion_file.KIND.advice, "update the pack to load it."))
            ended["refused"] += 1
            continue
        unpacked = UnpackInversion.execute(inversion=back).result
        PackInversion.execute(back, *unpacked)
        if ended["edited"] % 25 == 0:
            InspectInversion.execute(inversion=back)
        with tiny.Calls(runs.model("sd1")) as calls:
            try:
                out = runs.edit("sd1", back, cfg=3.0, skip=ended["edited"] % 4)
            except ValueError as error:
                assert not calls.calls and str(error).endswith((".", ".)")), error
                ended["refused"] += 1
                continue
        assert out.isfinite().all()
        ended["edited"] += 1
    assert min(ended.values()) > SIGNED / 10
