"""The step function against the papers' formulas in variance-preserving form, and against diffusers' schedulers."""
import diffusers
import pytest
import torch
from comfyui_ledits.samplers.methods.families import FAMILIES, second_order
from oracles import diffusion

VE = FAMILIES["ve"]
SHAPE = (2, 4, 5, 3)
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PAIRS = [(999, 998), (999, 500), (999, 0), (981, 961), (500, 480), (21, 1), (1, 0), (1, -1), (999, -1), (0, -1)]


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def next_latent(t, p, x, e, z, eta):
    """x_p by the function under test: to the variance-exploding space, a step, and back."""
    y = x / diffusion.abar(t).sqrt()
    c = VE.step(diffusion.sigma(t), diffusion.sigma(p), eta)
    return diffusion.abar(p).sqrt() * (c.keep * y + c.take * (y - diffusion.sigma(t) * e) + c.up * z)


@pytest.mark.parametrize(("t", "p"), PAIRS)
def test_eta_1_is_the_ddpm_posterior(draw, t, p):
    x, e, z = draw(), draw(), draw()
    a, b = diffusion.abar(t), diffusion.abar(p)
    alpha, beta = a / b, 1 - a / b
    x_0 = (x - (1 - a).sqrt() * e) / a.sqrt()
    # arXiv 2006.11239, eq. 7, for a step from t to p
    mean = b.sqrt() * beta / (1 - a) * x_0 + alpha.sqrt() * (1 - b) / (1 - a) * x
    variance = (1 - b) / (1 - a) * beta
    torch.testing.assert_close(next_latent(t, p, x, e, z, 1.0), mean + variance.sqrt() * z, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("t", "p"), PAIRS)
def test_any_eta_is_ddim(draw, t, p, eta):
    x, e, z = draw(), draw(), draw()
    mean, std = diffusion.step(x, e, t, p, eta)
    torch.testing.assert_close(next_latent(t, p, x, e, z, eta), mean + std * z, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [1e-3, 0.5, 14.6, 1e4])
def test_a_step_to_zero_is_the_prediction(sigma, eta):
    c = VE.step(sigma, 0.0, eta)
    assert (c.keep, c.take, c.up) == (0, 1, 0)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("prediction", "offset"), [("epsilon", 0), ("epsilon", 1), ("v_prediction", 1)])
def test_a_whole_run_is_that_of_diffusers_ddim(draw, eta, prediction, offset):
    scheduler = diffusers.DDIMScheduler(
        **SCHEDULE, prediction_type=prediction, clip_sample=False, set_alpha_to_one=True, steps_offset=offset
    )
    scheduler.set_timesteps(10)
    ends = [*scheduler.timesteps.tolist()[1:], -1]
    ours = x = draw()
    for t, p in zip(scheduler.timesteps.tolist(), ends):
        e, z = draw(), draw()
        out = e if prediction == "epsilon" else (e - (1 - diffusion.abar(t)).sqrt() * x) / diffusion.abar(t).sqrt()
        x = scheduler.step(out, t, x, eta=eta, variance_noise=z).prev_sample
        ours = next_latent(t, p, ours, e, z, eta)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_a_whole_run_of_the_second_order_is_that_of_diffusers_sde_dpm_solver(draw, end):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="sde-dpmsolver++", solver_order=2, solver_type="midpoint", timestep_spacing="trailing",
        final_sigmas_type=end, lower_order_final=False,
    )
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas.double()
    x = draw() * sigmas[0]
    y = x * (1 + sigmas[0] ** 2).sqrt()
    before, changed = None, 0
    for i, t in enumerate(scheduler.timesteps):
        e, z = draw(), draw()
        c = VE.step(sigmas[i], sigmas[i + 1])
        d = y - sigmas[i] * e
        extrapolated = second_order(d, before, sigmas[i - 1] if i else None, sigmas[i], sigmas[i + 1], family=VE)
        changed += not torch.equal(extrapolated, d)
        y = c.keep * y + c.take * extrapolated + c.up * z
        before = d
        x = scheduler.step(e, t, x, variance_noise=z).prev_sample
    assert changed == (10 if end == "zero" else 11)
    torch.testing.assert_close(y / (1 + sigmas[-1] ** 2).sqrt(), x.double(), rtol=1e-4, atol=1e-4)


def test_the_second_order_is_exact_where_the_prediction_is_linear_in_log_sigma(draw):
    start, slope = draw(), draw()
    levels = torch.tensor([9.0, 4.0, 2.5], dtype=torch.float64)
    before, now = (start + slope * level.log() for level in levels[:2])
    middle = start + slope * (levels[1].log() + levels[2].log()) / 2
    torch.testing.assert_close(second_order(now, before, *levels, family=VE), middle, rtol=1e-6, atol=1e-6)
