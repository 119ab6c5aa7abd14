"""Inspect Inversion: its numbers against closed forms and plain loops, its picture looked at where that can be done."""
import math

import comfy.latent_formats
import folder_paths
import numpy
import pytest
import torch
from comfyui_ledits.demo import loader
from comfyui_ledits.demo.loader import DemoLatent
from comfyui_ledits.nodes.drawing.card import Scale
from comfyui_ledits.nodes.inspect_inversion import InspectInversion
from comfyui_ledits.samplers.methods import inversion_statistics
from comfyui_ledits.samplers.methods.record import Inversion
from PIL import Image

pytestmark = pytest.mark.usefixtures("inference_mode")
SIGMAS = torch.tensor([14.0, 9.0, 4.0, 3.9, 0.5, 0.0])


def record(eta=1.0, residuals=True, batch=1, size=64, picture=None, error=0.0, latent_format=None):
    """An edit-friendly inversion from the formulas alone, and its predictions: the picture plus `error` * noise."""
    g = torch.Generator().manual_seed(1)
    shape = (batch, 4, size, size)
    picture = torch.randn(shape, generator=g) if picture is None else picture
    steps = len(SIGMAS) - 1
    latents = [picture + s * torch.randn(shape, generator=g) for s in SIGMAS[:-1]] + [picture]
    predictions = [picture + error * torch.randn(shape, generator=g) for _ in range(steps)]
    rest = []
    for i in range(steps):
        s, p = float(SIGMAS[i]), float(SIGMAS[i + 1])
        down = math.sqrt(p**2 - (eta * p) ** 2 * (1 - (p / s) ** 2))
        rest.append(latents[i + 1] - predictions[i] - down / s * (latents[i] - predictions[i]))
    made = Inversion(sigmas=SIGMAS, latents=torch.stack(latents), residuals=torch.stack(rest) if residuals else None,
                     etas=torch.full((steps,), eta if residuals else 0.0), family="ve", model="BaseModel, SD15",
                     method="edit-friendly DDPM", settings={"cfg": 3.5},
                     latent_format=latent_format or comfy.latent_formats.SD15())
    return made, predictions


def test_the_theory_is_the_closed_form_and_the_maps_follow_it():
    noise = inversion_statistics.noise(record(size=128)[0])
    r2 = (SIGMAS[1:-1].double() / SIGMAS[:-2].double()) ** 2
    assert noise.what == "noise maps" and noise.steps == [0, 1, 2, 3]  # the last step adds none
    torch.testing.assert_close(noise.expected, (1 + r2) / (1 - r2))
    torch.testing.assert_close(noise.variances[:, 0], noise.expected, rtol=0.03, atol=0)
    torch.testing.assert_close(noise.norms[:, 0], noise.expected_norms, rtol=0.02, atol=0)


@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_theory_at_other_shares_of_noise(eta):
    noise = inversion_statistics.noise(record(eta, size=128)[0])
    torch.testing.assert_close(noise.variances[:, 0], noise.expected, rtol=0.03, atol=0)


def test_errors_of_the_prediction_show():
    ratio = [inversion_statistics.noise(record(error=e)[0]) for e in (0.0, 5.0)]
    quiet, loud = (float((n.variances[:, 0] / n.expected).max()) for n in ratio)
    assert quiet < 1.1 and loud > 1.4


def test_norm_and_variance_are_those_of_the_noise_maps():
    made, _ = record(batch=2, size=8)
    noise, maps = inversion_statistics.noise(made), made.noise_maps().double().numpy()
    for i in range(4):
        for b in range(2):
            values = maps[i, b].ravel()
            assert float(noise.norms[i, b]) == pytest.approx(math.sqrt(sum(v * v for v in values)), rel=1e-6)
            assert float(noise.variances[i, b]) == pytest.approx(values.var(), rel=1e-6)


def test_a_path_without_maps_shows_the_noise_in_it():
    made, _ = record(residuals=False)
    noise = inversion_statistics.noise(made)
    assert noise.what == "noise in the path" and noise.expected.tolist() == [1.0] * 5
    torch.testing.assert_close(noise.variances[:, 0], noise.expected, rtol=0.03, atol=0)
    assert inversion_statistics.replay_errors(made).tolist() == [[0.0]] * 5


def test_a_replay_stays_on_the_path_but_for_rounding():
    made, _ = record(batch=2)
    errors = inversion_statistics.replay_errors(made)
    assert errors.shape == (5, 2) and 0 < errors.max() < 1e-5


def test_predictions_are_those_the_record_was_made_from():
    made, predictions = record(error=0.5)
    for i, d in enumerate(predictions):
        torch.testing.assert_close(inversion_statistics.predictions(made, i), d, rtol=0, atol=2e-4)
    path, _ = record(residuals=False)
    for i in range(5):  # where the straight line through two latents meets sigma 0
        slope = (path.latents[i + 1] - path.latents[i]) / (SIGMAS[i + 1] - SIGMAS[i])
        torch.testing.assert_close(inversion_statistics.predictions(path, i), path.latents[i] - SIGMAS[i] * slope, rtol=0, atol=2e-3)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[3.0], [1.0, 1.0], [0.93, 1.0], [9.0, 17.0, 1.1], [4e-8, 6e-7], [120.0, 511.0], [0.0, 5e6],
                                    [1e-12, 1e9], [-3.0, 2.0], [0.0]])
def test_the_axis_holds_the_values(values, log):
    scale = Scale(values, log)
    shares = [scale.share(v) for v in values]
    assert all(0 <= s <= 1 for s in shares)
    assert sorted(shares) == [s for _, s in sorted(zip(values, shares))]
    at = [scale.share(value) for value, _ in scale.ticks]
    assert 2 <= len(at) <= 7 and at == sorted(at) and at[0] == pytest.approx(0)
    assert len({label for _, label in scale.ticks}) == len(at)


# --- the node -------------------------------------------------------------------------------------------------------

def shown(result):
    """The pictures in the node, as arrays."""
    paths = [f"{folder_paths.get_temp_directory()}/{file['filename']}" for file in result.ui["images"]]
    return [numpy.asarray(Image.open(path)) for path in paths]


@pytest.mark.parametrize("latent_format", [comfy.latent_formats.SD15(), comfy.latent_formats.SDXL(), DemoLatent(torch.rand(5, 3)),
                                           DemoLatent()], ids=["SD15", "SDXL", "demo", "no colours"])
@pytest.mark.parametrize("residuals", [True, False])
def test_a_picture_for_each_picture(latent_format, residuals):
    made, _ = record(residuals=residuals, batch=2, size=8, latent_format=latent_format)
    result = InspectInversion.execute(inversion=made)
    picture, summary = result.result
    assert picture.dtype == torch.float32 and picture.shape[0] == 2 and picture.shape[3] == 3
    assert 0 <= picture.min() and picture.max() <= 1
    for mine, theirs in zip(shown(result), picture):
        assert numpy.abs(mine - 255 * theirs.numpy()).max() <= 1
    assert not torch.equal(picture[0], picture[1])
    assert result.ui["text"] == [summary] and "5 steps" in summary and "picture 2:" in summary


def test_the_last_thumbnail_is_the_picture():
    """A flat latent has one colour, which the format's factors give; it is seen where the path ends."""
    latent_format = comfy.latent_formats.SD15()
    flat = torch.tensor([1.0, -0.5, 0.3, 0.4]).view(1, 4, 1, 1).expand(1, 4, 16, 16)
    colour = [sum(float(flat[0, c, 0, 0]) * latent_format.latent_rgb_factors[c][k] for c in range(4)) for k in range(3)]
    colour = numpy.array([(c + 1) / 2 for c in colour])
    picture = InspectInversion.execute(inversion=record(picture=flat, size=16)[0])[0][0].numpy()
    seen = numpy.abs(picture - colour).max(2) < 0.01
    rows, _ = seen.nonzero()
    assert seen[:, -150:-50].sum() > 2 * 100 * 100  # at the end of the path and of the predictions
    assert seen[:, :150].sum() > 100 * 100  # predictions are the picture from the first on
    path = seen[rows.min() : rows.min() + 100]  # the first row of thumbnails: noise at its left, the picture at its right
    assert path[:, -150:-50].mean() > 0.9 and path[:, :150].mean() < 0.05


def test_a_vae_decodes_truly_and_measures():
    vae = loader.load()[2]
    made, _ = record(batch=2, size=16, latent_format=DemoLatent())
    close = {"samples": made.latents[-1] + torch.tensor([0.01, 0.1]).view(2, 1, 1, 1)}
    picture, summary = InspectInversion.execute(inversion=made, vae=vae, reconstruction=close).result
    a, b = (vae.decode(x).double().cpu().numpy() for x in (close["samples"], made.latents[-1]))
    for k in range(2):
        assert f"PSNR to picture {10 * math.log10(1 / ((a[k] - b[k]) ** 2).mean()):.1f} dB" in summary
    plain, summary = InspectInversion.execute(inversion=made, reconstruction=close).result
    picture_rms = float(made.latents[-1][1].square().mean().sqrt())
    assert f"picture error {10 / picture_rms:.2g} %" in summary
    assert not torch.equal(plain, picture)


def test_a_reconstruction_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\[1, 4, 8, 8\].*\[1, 4, 64, 64\].*connect the latent"):
        InspectInversion.execute(inversion=record()[0], reconstruction={"samples": torch.zeros(1, 4, 8, 8)})


@pytest.mark.parametrize("settings", [{}, {"cfg": "x", "prompt": "y" * 5000, "deep": [{}]}])
def test_strange_settings_do_no_harm(settings):
    made, _ = record(size=8)
    made = Inversion(sigmas=made.sigmas[-2:], latents=made.latents[-2:], etas=made.etas[-1:], family="ve", model="m" * 400,
                     method="z" * 90, settings=settings, latent_format=made.latent_format)
    assert InspectInversion.execute(inversion=made)[0].shape[3] == 3
