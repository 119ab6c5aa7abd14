"""The numbers of flow models: against the formulas in variance-exploding space, diffusers and ComfyUI's own solver."""
import comfy.k_diffusion.sampling
import comfy.model_sampling
import diffusers
import pytest
import torch
from comfyui_ledits.samplers import models
from comfyui_ledits.samplers.methods import ddim, edit_friendly
from comfyui_ledits.samplers.methods.families import FAMILIES, second_order, slope
from support import tiny_flow

FLOW, VE = FAMILIES["flow"], FAMILIES["ve"]


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


def pairs(draw, count=20):
    """Levels (s, s') that fall, none at an end."""
    levels = torch.rand(count, 2, generator=draw, dtype=torch.float64).mul(0.99).add(0.005).sort(dim=1, descending=True)
    return levels.values.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_is_that_of_variance_exploding_space(draw, eta):
    """y = x / (1 - s) with sigma = s / (1 - s); DDPM's posterior and DDIM's formula written out."""
    for s, t in pairs(draw):
        sigma, lower = s / (1 - s), t / (1 - t)
        up = eta * lower * (1 - (lower / sigma) ** 2) ** 0.5
        down = (lower**2 - up**2) ** 0.5
        x, d, z = torch.randn(3, 50, generator=draw, dtype=torch.float64)
        y = d + down / sigma * (x / (1 - s) - d) + up * z
        c = FLOW.step(s, t, eta)
        torch.testing.assert_close(c.keep * x + c.take * d + c.up * z, y * (1 - t), rtol=1e-10, atol=1e-10)


def test_ends_are_finite_and_exact():
    assert tuple(FLOW.step(1.0, 0.94, 1.0).__dict__.values()) == pytest.approx((0.0, 0.06, 0.94))
    assert tuple(FLOW.step(1.0, 0.94, 0.0).__dict__.values()) == pytest.approx((0.94, 0.06, 0.0))
    for eta in (0.0, 0.5, 1.0):
        assert tuple(FLOW.step(0.3, 0.0, eta).__dict__.values()) == pytest.approx((0.0, 1.0, 0.0))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_step_keeps_mean_and_variance_of_the_noisy_picture(draw, eta):
    for s, t in [*pairs(draw), (1.0, 0.9)]:
        c = FLOW.step(s, t, eta)
        assert c.keep * (1 - s) + c.take == pytest.approx(1 - t)
        assert (c.keep * s) ** 2 + c.up**2 == pytest.approx(t**2)


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_eta_0_is_diffusers_euler(draw, steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas.tolist()
    assert levels[0] == 1
    x = ours = torch.randn(1, 4, 8, 8, generator=draw)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(x.shape, generator=draw)
        x = scheduler.step(velocity, timestep, x).prev_sample
        c = FLOW.step(levels[i], levels[i + 1], 0.0)
        ours = c.keep * ours + c.take * (ours - levels[i] * velocity)
        torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_eta_1_is_comfyuis_sde_dpm_solver(draw, order):
    """Core's DPM-Solver++(2M) SDE for CONST; without its memory of the step before it is of first order."""
    levels = torch.tensor([0.97, 0.9, 0.72, 0.5, 0.31, 0.12, 0.0])
    sampling = type("Sampling", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {})()
    predictions = [torch.randn(1, 4, 8, 8, generator=draw) for _ in levels[:-1]]
    noises = [torch.randn(1, 4, 8, 8, generator=draw) for _ in levels[:-1]]

    class Model:
        class inner_model:
            class model_patcher:
                @staticmethod
                def get_model_object(name):
                    return sampling

        def __init__(self):
            self.i = -1

        def __call__(self, x, sigma, **_):
            self.i += 1
            return predictions[self.i]

    start = torch.randn(1, 4, 8, 8, generator=draw)
    theirs, x = start, start
    ranges = [levels] if order == 2 else [levels[i : i + 2] for i in range(len(levels) - 1)]
    model, drawn = Model(), iter(noises)
    for part in ranges:
        theirs = comfy.k_diffusion.sampling.sample_dpmpp_2m_sde(
            model, theirs, part, disable=True, noise_sampler=lambda *_: next(drawn), solver_type="midpoint")
    before = None
    for i in range(len(levels) - 1):
        c, d = FLOW.step(levels[i], levels[i + 1], 1.0), predictions[i]
        better = second_order(d, before, levels[i - 1], levels[i], levels[i + 1], family=FLOW) if order == 2 else d
        x, before = c.keep * x + c.take * better + c.up * noises[i], d
    torch.testing.assert_close(x, theirs, rtol=2e-5, atol=2e-5)


def test_after_level_1_the_second_order_is_the_first():
    d, before = torch.randn(2, 10)
    assert torch.equal(second_order(d, before, 1.0, 0.9, 0.8, family=FLOW), d)


@pytest.mark.parametrize("of", [comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.ModelSamplingDiscreteFlow])
def test_noisy_latents_are_those_that_comfyui_starts_from(draw, of):
    """A path is on the model's own manifold: core's noise_scaling is the oracle."""
    sampling = type("Sampling", (of, comfy.model_sampling.CONST), {})()
    picture, noise = torch.randn(2, 1, 4, 8, 8, generator=draw)
    for s in (1.0, 0.7, 0.1):
        wanted = sampling.noise_scaling(torch.tensor([s]), noise.clone(), picture)
        torch.testing.assert_close(FLOW.noisy(picture, s, noise), wanted)
        torch.testing.assert_close(FLOW.noise(wanted, picture, s), noise, rtol=1e-4, atol=1e-4)


def test_the_slope_is_the_velocity_and_noise_is_changed_with_the_prediction_kept(draw):
    x0, n, other = torch.randn(3, 2, 4, 8, 8, generator=draw, dtype=torch.float64)
    for s in (1.0, 0.6, 0.05):
        x = (1 - s) * x0 + s * n
        v = slope(x, x0, s)
        torch.testing.assert_close(v, n - x0)
        moved = FLOW.change_noise(v, x, s, lambda noise: noise + other)
        torch.testing.assert_close(moved, n + other - x0)  # the velocity of the same picture under the other noise
        torch.testing.assert_close(FLOW.noise(x, x0, s), n)


@pytest.mark.parametrize("family", [FLOW, VE], ids=["flow", "ve"])
@pytest.mark.parametrize("brownian", [False, True], ids=["independent", "Brownian"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noise_maps_have_the_variance_of_theory(draw, family, brownian, eta):
    levels = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.2, 0.0]) * (1 if family is FLOW else 12)
    picture = torch.randn(1, 4, 100, 100, generator=draw, dtype=torch.float64)
    draws = torch.randn(5, *picture.shape, generator=draw, dtype=torch.float64)
    path = (edit_friendly.brownian_path if brownian else edit_friendly.noisy_path)(picture, levels, draws, family=family)
    for i in range(4):
        c = family.step(levels[i], levels[i + 1], eta)
        z = (path[i + 1] - c.keep * path[i] - c.take * picture) / c.up
        expected = family.noise_map_variance(levels[i], levels[i + 1], eta, brownian)
        assert float(z.var()) == pytest.approx(expected, rel=0.05)
        if brownian and eta == 1:
            assert expected == pytest.approx(1)
        # every level by itself is a noisy picture
        noise = family.noise(path[i], picture, float(levels[i]))
        assert float(noise.var()) == pytest.approx(1, rel=0.05)
        assert abs(float((noise * picture).mean())) < 0.03


class Mixture:
    """The exact denoiser of pictures that are points of a Gaussian mixture, in flow space: an ODE with a known answer."""

    def __init__(self, draw, points=6, size=16):
        self.centres, self.width = torch.randn(points, size, generator=draw, dtype=torch.float64), 0.1
        self.pictures = (self.centres + self.width * torch.randn(points, size, generator=draw, dtype=torch.float64))
        self.pictures = self.pictures.reshape(points, 1, 4, 4)
        self.calls = 0

    def __call__(self, x, s, i):
        self.calls += 1
        s = s.reshape(-1, 1).double()
        x = x.flatten(1)
        spread = (1 - s) ** 2 * self.width**2 + s**2
        away = x[:, None] - (1 - s)[..., None] * self.centres
        weight = torch.softmax(-(away**2).sum(-1) / (2 * spread), dim=1)
        means = self.centres + ((1 - s) * self.width**2 / spread)[..., None] * away
        return (weight[..., None] * means).sum(1).reshape(-1, 1, 4, 4)


def scaling(s):
    return ddim.Scaling(1.0, 1.0, -s)


def path_error(draw, solver, steps, **how):
    """RMS distance of the noise an inversion ends at from the ODE's, which very many steps give."""
    exact = _ends(draw, "midpoint", 2000)
    return float((_ends(draw, solver, steps, **how) - exact).square().mean().sqrt())


def _ends(draw, solver, steps, **how):
    mixture = Mixture(draw.manual_seed(0))
    levels = torch.linspace(0.8, 0.05, steps + 1, dtype=torch.float64)
    path = ddim.invert(mixture.pictures, levels, mixture, family=FLOW, scaling=scaling, solver=solver, **how)
    return path[0]


def test_solvers_have_their_order(draw):
    """Halving the step halves Euler's error and quarters that of midpoint; FireFlow's and Uni-Inv's fall in between."""
    euler = [path_error(draw, "Euler", n, convention="B") for n in (100, 200)]
    midpoint = [path_error(draw, "midpoint", n) for n in (100, 200)]
    fire = [path_error(draw, "FireFlow", n) for n in (100, 200)]
    assert 1.7 < euler[0] / euler[1] < 2.3
    assert 3.3 < midpoint[0] / midpoint[1] < 4.7
    assert 3.0 < fire[0] / fire[1] < 5.0
    assert midpoint[1] < fire[1] < euler[1] / 5


@pytest.mark.parametrize("solver, evaluations", [("Euler", 10), ("Uni-Inv", 10), ("midpoint", 20), ("FireFlow", 11)])
def test_solvers_cost_what_they_say(draw, solver, evaluations):
    mixture = Mixture(draw)
    levels = torch.linspace(1.0, 0.0, 11, dtype=torch.float64)
    ddim.invert(mixture.pictures, levels, mixture, family=FLOW, scaling=scaling, solver=solver, lowest=1e-3)
    assert mixture.calls == evaluations


def test_uni_inv_comes_back_to_the_picture_better_than_euler_at_the_same_cost(draw):
    errors = {}
    for solver in ("Euler", "Uni-Inv"):
        mixture = Mixture(draw.manual_seed(0))
        levels = torch.linspace(1.0, 0.0, 29, dtype=torch.float64)
        path = ddim.invert(mixture.pictures, levels, mixture, family=FLOW, scaling=scaling, solver=solver)
        x = path[0]
        for i in range(28):
            v = (x - mixture(x, levels[i].expand(len(x)), i)) / levels[i]
            x = x + (levels[i + 1] - levels[i]) * v
        errors[solver] = float((x - mixture.pictures).square().mean().sqrt())
    assert errors["Uni-Inv"] < errors["Euler"] / 2


@pytest.mark.parametrize("kind", tiny_flow.KINDS)
def test_comfyuis_scaling_of_a_flow_model_is_the_identity(kind):
    at = models.scaling(tiny_flow.model(kind))
    for s in (1.0, 0.5, 0.01):
        assert (at(s).c_in, at(s).c_skip) == (1, 1)
        assert at(s).c_out == pytest.approx(-s)
