"""Inversions of flow models as files and as pictures: everything comes back, videos are shown, float16 edits alike."""
import functools

import pytest
import safetensors
import torch
from comfyui_ledits.files import inversion_file, latent_formats
from comfyui_ledits.nodes.compare import Sweep
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, NegativePromptInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.flowedit import FlowEditSource
from comfyui_ledits.nodes.inspect_inversion import InspectInversion
from comfyui_ledits.nodes.rf_inversion import RFInversion
from support import runs, tiny_flow
from support.runs import EMPTY, TARGET, edit, error, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode")
invert = functools.partial(runs.invert, scheduler="simple", steps=8)


def saved(path, inversion, half=False):
    """The record that comes back from a file."""
    cost = inversion_file.save(path, inversion, latent_formats.describe(inversion.latent_format), half=half)
    return inversion_file.load(path, latent_formats.make), cost


@pytest.mark.parametrize("kind", tiny_flow.KINDS)
@pytest.mark.parametrize("node, more", [
    (EditFriendlyInversion, {"cfg": 3.0}), (RFInversion, {}), (DDIMInversion, {"replay": "input shift"}),
    (NegativePromptInversion, {})], ids=["edit-friendly", "RF", "shift", "NPI"])
def test_everything_comes_back_and_edits_the_same(tmp_path, kind, node, more):
    inversion = invert(node, kind, tiny_flow.latent(kind, 2), **more)[0]
    back, cost = saved(tmp_path / "x.safetensors", inversion)
    assert cost is None and back.settings == inversion.settings
    for name in ("sigmas", "latents", "residuals", "shifts", "etas"):
        a, b = getattr(back, name), getattr(inversion, name)
        assert (a is None and b is None) or torch.equal(a, b)
    assert back.overrides.keys() == inversion.overrides.keys()
    target = tiny_flow.conditioning(kind, TARGET, 15), prompts(kind, EMPTY)[0]
    assert torch.equal(edit(kind, back, cfg=3.0, pair=target), edit(kind, inversion, cfg=3.0, pair=target))


def test_what_negative_prompt_inversion_keeps_of_hidream_comes_back(tmp_path):
    inversion = invert(NegativePromptInversion, "hidream")[0]
    back, _ = saved(tmp_path / "x.safetensors", inversion)
    assert "negative.conditioning_llama3" in back.overrides
    for name, value in inversion.overrides.items():
        assert torch.equal(back.overrides[name], value)


@pytest.mark.parametrize("steps", [8, 50])
@pytest.mark.parametrize("kind", tiny_flow.SMALL)
def test_float16_keeps_what_the_model_predicted(tmp_path, kind, steps):
    """The first of 50 steps takes 0.003 of D: solved from rounded noise maps it would be off by 0.1."""
    latent = tiny_flow.latent(kind, 2)
    inversion = invert(EditFriendlyInversion, kind, latent, steps=steps)[0]
    back, cost = saved(tmp_path / "x.safetensors", inversion, half=True)
    for i in range(steps):
        torch.testing.assert_close(back.denoised(i), inversion.denoised(i), rtol=3e-3, atol=3e-3)
    assert error(kind, edit(kind, back, cfg=1.0), latent) < 5e-3
    assert cost["picture"]["abs"] < 5e-3
    exact, rounded = (edit(kind, path, cfg=1.0, prompt=TARGET, solver="dpmpp_2m_sde") for path in (inversion, back))
    assert error(kind, rounded, exact) < 2e-2


def test_a_float16_file_is_half_the_size(tmp_path):
    inversion = invert(EditFriendlyInversion, "flux", tiny_flow.latent("flux", 2, 16, 16))[0]
    sizes = []
    for half in (False, True):
        saved(tmp_path / "x.safetensors", inversion, half)
        sizes.append((tmp_path / "x.safetensors").stat().st_size)
    assert sizes[1] < 0.55 * sizes[0]


def test_draws_and_their_paths_come_back(tmp_path):
    latent, (source, empty) = tiny_flow.latent("sd3"), prompts("sd3")
    inversion = FlowEditSource.execute(model=model("sd3"), positive=source, negative=empty, latent=latent, draws=2,
                                       scheduler="simple", settings={"settings": "own", "steps": 6, "cfg": 2.0}, seed=0)[0]
    back, _ = saved(tmp_path / "x.safetensors", inversion)
    assert back.draws == 2
    assert edit("sd3", back, cfg=2.0).shape == latent["samples"].shape


# --- pictures -------------------------------------------------------------------------------------------------------------

class VideoVae:
    """A VAE that gives frames as video VAEs do: [B, T, H, W, 3]."""

    def decode(self, samples):
        assert samples.ndim == 5
        frames = samples[:, :3].permute(0, 2, 3, 4, 1)
        return (frames / 4 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("kind", ["qwen", "wan", "hunyuan"])
def test_a_video_is_inspected(kind):
    latent = tiny_flow.latent(kind, 2)
    inversion = invert(EditFriendlyInversion, kind, latent)[0]
    again = {"samples": edit(kind, inversion, cfg=1.0)}
    for vae in (None, VideoVae()):
        shown = InspectInversion.execute(inversion=inversion, vae=vae, reconstruction=again)
        assert shown[0].shape[0] == 2 and shown[0].shape[-1] == 3
        assert "noise maps" in shown[1]


def test_the_path_of_a_flow_model_is_shown_at_equal_contrast():
    """Divided by sqrt((1 - s)^2 + s^2), a latent of unit variance stays one at every level."""
    kind = "flux"
    inversion = invert(EditFriendlyInversion, kind, tiny_flow.latent(kind, 1, 32, 32))[0]
    for i in range(inversion.steps + 1):
        shown = inversion.latents[i] / inversion.kind.power(float(inversion.sigmas[i])) ** 0.5
        assert float(shown.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["qwen", "wan"])
def test_a_sweep_of_a_video_has_a_sheet_for_each_frame(kind):
    latent, (target, empty) = tiny_flow.latent(kind), prompts(kind, TARGET, EMPTY)
    inversion = invert(EditFriendlyInversion, kind, latent)[0]
    swept = Sweep.execute(model=model(kind), positive=target, negative=empty, inversion=inversion, vae=VideoVae(),
                          skip_values="1, 3", cfg_values="1, 2")
    assert len(swept[0]) == latent["samples"].shape[2]
    assert swept[1]["samples"].shape[0] == 4


def test_a_file_of_a_diffusion_model_is_as_it_was(tmp_path):
    """Nothing new is written where nothing new is meant: an older version reads it."""
    inversion = invert(EditFriendlyInversion, "sd1")[0]
    for half in (False, True):
        saved(tmp_path / "x.safetensors", inversion, half)
        with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
            assert set(file.keys()) == {"sigmas", "etas", "latents", "residuals"}
