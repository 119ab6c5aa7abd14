"""Inversions as files: everything comes back, float16 costs what it says, and any other file is refused."""
import dataclasses
import hashlib
import os
import pickle
import struct

import comfy.latent_formats
import numpy
import pytest
import safetensors
import safetensors.torch
import torch
from comfyui_ledits.demo.loader import DemoLatent
from comfyui_ledits.files import inversion_file, latent_formats
from comfyui_ledits.nodes import demo  # noqa: F401  it registers the demo model's latents
from support import mutations
from support.mutations import change, item, word
from support.records import record, saved

pytestmark = pytest.mark.usefixtures("inference_mode")


# --- the detour changes nothing -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("residuals", "shapes"), [
    (True, {}),
    (False, {"negative": (6, 2, 5, 3), "value": (4, 1, 2, 5, 3)}),
    (False, {"negative": (1, 1, 5, 3), "negative_pooled": (2, 7)}),
])
def test_everything_in_a_record_comes_back(tmp_path, residuals, shapes):
    own = {name: torch.randn(shape) for name, shape in shapes.items()}
    made, _ = record(residuals=residuals, overrides=own, cfg=3.5, tau_v=0.5, etas=[1, 0.5], flag=True, nothing=None,
                     source_prompt='two "cats"\n\u00e9\u732b')
    back, cost = saved(tmp_path / "x", made)
    assert cost is None
    for name in ("sigmas", "latents", "residuals", "etas"):
        a, b = getattr(back, name), getattr(made, name)
        assert (a is None and b is None) or (a.dtype == torch.float32 and torch.equal(a, b))
    assert back.overrides.keys() == own.keys() and all(torch.equal(back.overrides[k], own[k]) for k in own)
    for name in ("family", "model", "method", "settings"):
        assert getattr(back, name) == getattr(made, name)


@pytest.mark.parametrize("latent_format", [
    comfy.latent_formats.SD15(), comfy.latent_formats.SD15(0.3), comfy.latent_formats.SDXL(),
    comfy.latent_formats.SDXL_Playground_2_5(), DemoLatent(), DemoLatent(torch.randn(5, 3)),
], ids=lambda f: type(f).__name__)
def test_latent_formats_come_back_equal(tmp_path, latent_format):
    made, _ = record(latent_format=latent_format)
    own = saved(tmp_path / "x", made)[0].latent_format
    assert type(own) is type(latent_format) and vars(own).keys() == vars(latent_format).keys()
    for name, value in vars(latent_format).items():
        same = torch.equal(value, vars(own)[name]) if isinstance(value, torch.Tensor) else value == vars(own)[name]
        assert same, name
    assert torch.equal(own.process_out(made.latents[-1]), latent_format.process_out(made.latents[-1]))


def test_a_latent_format_of_another_pack_is_not_guessed():
    class SD15(comfy.latent_formats.SD15):  # of the same name
        pass

    with pytest.raises(ValueError, match="cannot be stored yet"):
        latent_formats.describe(SD15())


def test_safetensors_reads_the_file_too(tmp_path):
    made, _ = record()
    saved(tmp_path / "x", made)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x")["latents"], made.latents)
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        words = file.metadata()
    assert (words["format"], words["version"], words["dtype"]) == ("ledits-inversion", "2", "float32")
    assert words["source_sha256"] == hashlib.sha256(made.latents[-1].numpy().tobytes()).hexdigest()


def test_values_that_share_memory_are_saved(tmp_path):
    made, _ = record(residuals=False, overrides={"negative": torch.randn(1, 1, 5, 3).expand(6, 2, 5, 3)})
    made = dataclasses.replace(made, latents=made.latents.transpose(3, 4))  # not contiguous either
    back, _ = saved(tmp_path / "x", made)
    assert torch.equal(back.overrides["negative"], made.overrides["negative"])
    assert torch.equal(back.latents, made.latents)


# --- float16 --------------------------------------------------------------------------------------------------------

def test_the_error_of_float16_is_the_true_one(tmp_path):
    made, predictions = record(overrides={"negative": torch.randn(6, 1, 5, 3)})
    back, cost = saved(tmp_path / "x", made, half=True)
    exact, rounded = made.latents.double().numpy(), back.latents.double().numpy()
    path = [(numpy.abs(a - b).max(), numpy.abs(a - b).max() / numpy.sqrt((b * b).mean())) for a, b in zip(rounded, exact)]
    assert cost["path"]["abs"] == pytest.approx(max(p[0] for p in path)) and 1e-3 < cost["path"]["abs"] < 0.05
    assert cost["path"]["rel"] == pytest.approx(max(p[1] for p in path))
    assert cost["noise_maps"]["abs"] == pytest.approx(float((back.residuals - made.residuals).abs().max()))
    words = (back.overrides["negative"] - made.overrides["negative"]).abs().max()
    assert cost["embeddings"]["abs"] == pytest.approx(float(words))

    replayed = []  # with the model's predictions as they were when the picture was inverted
    for inversion in (made, back):
        y = inversion.latents[0].double()
        for i in range(6):
            r2 = float(made.sigmas[i + 1]) ** 2 / float(made.sigmas[i]) ** 2
            y = r2 * y + (1 - r2) * predictions[i].double() + inversion.residuals[i].double()
        replayed.append(y)
    assert (replayed[0] - made.latents[-1]).abs().max() < 1e-5
    error = float((replayed[1] - replayed[0]).abs().max())
    assert cost["picture"]["abs"] == pytest.approx(error, rel=1e-3) and error > 1e-6

    assert back.settings["float16"] == cost
    assert os.path.getsize(tmp_path / "x") < 0.6 * made.latents.numel() * 4 * 2


def test_a_path_without_noise_maps_in_float16(tmp_path):
    made, _ = record(residuals=False)
    back, cost = saved(tmp_path / "x", made, half=True)
    assert cost.keys() == {"path", "picture"}
    assert cost["picture"]["abs"] == pytest.approx(float((back.latents[-1] - made.latents[-1]).abs().max()))
    assert torch.equal(back.sigmas, made.sigmas)


def test_what_float16_cannot_hold_is_refused(tmp_path):
    made, _ = record()
    with pytest.raises(ValueError, match="too large for float16"):
        saved(tmp_path / "x", dataclasses.replace(made, latents=made.latents * 1e5), half=True)
    assert os.listdir(tmp_path) == []


# --- files that are refused -----------------------------------------------------------------------------------------

def without(name):
    def edit(parts):  # and its data, so that nothing else is wrong
        begin, end = parts.header.pop(name)["data_offsets"]
        del parts.data[begin:end]
        for other in parts.tensors.values():
            other["data_offsets"] = [x - (end - begin) * (x >= end) for x in other["data_offsets"]]

    return edit


NAN = float("nan")
REFUSED = {  # name: (what to do to the file, words of the refusal)
    "empty": (lambda raw: b"", "too short"),
    "a picture": (lambda raw: b"\x89PNG\r\n\x1a\n" + bytes(5000), "header"),
    "a pickle": (lambda raw: pickle.dumps({"a": 1}) * 9, "header"),
    "a LoRA": (lambda raw: safetensors.torch.save({"lora": torch.ones(4, dtype=torch.bfloat16)}), "checkpoint or LoRA"),
    "cut short": (lambda raw: raw[:-1], "cut off"),
    "header of 2^63": (lambda raw: struct.pack("<Q", 2**63) + raw[8:], "header is cut off"),
    "huge header": (lambda raw: struct.pack("<Q", 70000) + b"{" + b" " * 69999 + raw, "70000 bytes"),
    "nested header": (lambda raw: struct.pack("<Q", 60000) + b'{"a":' * 12000, "header cannot be read"),
    "newer": (lambda raw: change(raw, word("version", "3")), "newer version of this pack"),
    "no version": (lambda raw: change(raw, word("version", "x")), "version"),
    "other numbers": (lambda raw: raw[:-9] + b"\0" + raw[-8:], "damaged"),
    "negative offset": (lambda raw: change(raw, item("etas", "data_offsets", [-4, 20]), sign=False), "outside of the file"),
    "offset beyond": (lambda raw: change(raw, item("etas", "data_offsets", [0, 2**62]), sign=False), "outside of the file"),
    "overlap": (lambda raw: change(raw, item("sigmas", "data_offsets", [0, 28])), "overlap"),
    "other dtype": (lambda raw: change(raw, item("latents", "dtype", "BF16")), "F32 or F16"),
    "dtype not promised": (lambda raw: change(raw, word("dtype", "float16")), "F16 is expected"),
    "other shape": (lambda raw: change(raw, item("latents", "shape", [7, 2, 4, 4, 16])), "does not fit"),
    "shape of the wrong size": (lambda raw: change(raw, item("latents", "shape", [7, 2, 4, 8, 9])), "does not fit"),
    "rank": (lambda raw: change(raw, item("latents", "shape", [14, 4, 8, 8])), "not levels x pictures"),
    "no latents": (lambda raw: change(raw, without("latents")), "'latents' is missing"),
    "unknown embedding": (
        lambda raw: change(raw, lambda p: p.header.update({"overrides.x": p.header.pop("residuals")})), "cannot apply"),
    "unknown tensor": (lambda raw: change(raw, lambda p: p.header.update({"../x": p.header.pop("residuals")})), "cannot apply"),
    "not descending": (lambda raw: change(raw, lambda p: p.numbers("sigmas", [1.0, 2.0])), "do not fall"),
    "NaN": (lambda raw: change(raw, lambda p: p.numbers("latents", [0.0, NAN])), "NaN"),
    "NaN in sigmas": (lambda raw: change(raw, lambda p: p.numbers("sigmas", [NAN])), "NaN"),
    "eta 2": (lambda raw: change(raw, lambda p: p.numbers("etas", [2.0])), "between 0 and 1"),
    "family": (lambda raw: change(raw, word("family", "cascade")), "family"),
    "a class to make": (lambda raw: change(raw, word("latent_format", '{"name": "os.system"}')), "latent format"),
    "other channels": (lambda raw: change(raw, word("latent_format", '{"name": "SD3"}')), "16"),
    "scale 0": (lambda raw: change(raw, word("latent_format", '{"name": "SD15", "scale_factor": 0}')), "impossible scale"),
    "settings": (lambda raw: change(raw, word("settings", "[" * 20000)), "settings"),
    "lines in the name": (lambda raw: change(raw, word("method", "a\nb")), "plain words"),
    "half a letter": (lambda raw: change(raw, word("source_prompt", "a \ud800")), "not words"),
    "another picture": (lambda raw: change(raw, word("source_sha256", "0" * 64)), "another picture"),
    "values for too few steps": (lambda raw: change(raw, with_values(4)), "values for 4 of 6 steps"),
}


def with_values(steps):
    """An edit that adds embeddings for `to_v` at some steps."""
    def edit(parts):
        numbers = numpy.ones((steps, 1, 2, 5, 3), "<f4").tobytes()
        begin = len(parts.data)
        parts.data += numbers
        parts.header["overrides.value"] = {"dtype": "F32", "shape": [steps, 1, 2, 5, 3],
                                           "data_offsets": [begin, begin + len(numbers)]}
    return edit


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "x"
    saved(path, record()[0])
    return path.read_bytes()


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_sentence(tmp_path, raw, name):
    damage, words = REFUSED[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(damage(raw))
    with pytest.raises(ValueError) as error:
        inversion_file.load(path, latent_formats.make)
    assert words in str(error.value) and len(str(error.value)) < 300
    assert str(error.value).endswith((". Choose a file that Save Inversion has written, or invert the picture again.",
                                      ": update the pack to load it."))
    if name in ("other numbers", "NaN", "NaN in sigmas", "not descending", "eta 2", "another picture",
                "values for too few steps"):
        inversion_file.check(path, latent_formats.make)
    else:  # told from the header alone
        with pytest.raises(ValueError) as early:
            inversion_file.check(path, latent_formats.make)
        assert str(early.value) == str(error.value)


def test_an_untouched_file_is_not_refused(tmp_path, raw):
    (tmp_path / "x").write_bytes(change(raw, lambda p: None))
    inversion_file.check(tmp_path / "x", latent_formats.make)
    assert inversion_file.load(tmp_path / "x", latent_formats.make).steps == 6


def old(raw):
    """The same file in version 1, whose checksum is of the tensors alone."""
    return change(raw, word("version", "1"))


def test_files_of_version_1_are_still_read(tmp_path, raw):
    (tmp_path / "x").write_bytes(raw)
    (tmp_path / "old").write_bytes(old(raw))
    new, back = (inversion_file.load(tmp_path / name, latent_formats.make) for name in ("x", "old"))
    assert torch.equal(new.latents, back.latents) and torch.equal(new.residuals, back.residuals)
    assert (new.method, new.model, new.settings) == (back.method, back.model, back.settings)


@pytest.mark.parametrize("key", ["method", "model", "settings", "latent_format", "source_prompt", "version"])
def test_words_that_were_changed_are_refused(tmp_path, raw, key):
    """Words as sane as those that were saved: only the checksum tells."""
    other = {"method": "DDIM", "model": "BaseModel, SD16", "settings": '{"cfg": 3.0}', "source_prompt": "a dog",
             "latent_format": '{"name": "SD15", "scale_factor": 0.2}', "version": "1"}[key]
    (tmp_path / "x").write_bytes(change(raw, word(key, other), sign=False))
    with pytest.raises(ValueError, match="not those that were saved: it is damaged"):
        inversion_file.load(tmp_path / "x", latent_formats.make)
    if key != "version":
        (tmp_path / "x").write_bytes(change(old(raw), word(key, other), sign=False))
        inversion_file.load(tmp_path / "x", latent_formats.make)  # version 1 could not tell


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(ValueError, match="not a regular file"):
        inversion_file.load(tmp_path / "x", latent_formats.make)


def test_200_damaged_files(tmp_path):
    """No crash, no hang, and no more memory than twice the file's size: see `mutations`."""
    made, _ = record(steps=20, batch=1, size=64, residuals=False, source_prompt="a cat")  # one tensor is nearly all of it
    saved(tmp_path / "half", made, half=True)
    saved(tmp_path / "x", made)
    raw = (tmp_path / "x").read_bytes()
    assert len(raw) > mutations.FLOOR
    mutations.check_204(tmp_path / "x", tmp_path / "y", tmp_path / "half")


def test_what_is_loaded_safetensors_accepts_as_well(tmp_path, raw):
    checked = 0
    for _, damaged in mutations.mutations(raw, 408, seed=5):
        (tmp_path / "x").write_bytes(damaged)
        try:
            back = inversion_file.load(tmp_path / "x", latent_formats.make)
        except ValueError:
            continue
        theirs = safetensors.torch.load_file(tmp_path / "x")
        assert torch.equal(theirs["latents"], back.latents)
        checked += 1
    assert checked > 5
