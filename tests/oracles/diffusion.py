"""The papers' algorithms in their own words: variance-preserving, float64, one prediction at a time.

    x_t = sqrt(abar_t) * x_0 + sqrt(1 - abar_t) * noise;   t is 0..999, and -1 the picture itself

Slow and plain on purpose: the tests hold the nodes against it. Nothing of the pack is used here.
"""
import numpy as np
import torch

ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def abar(t):
    return ABAR[t] if t >= 0 else torch.ones((), dtype=torch.float64)


def sigma(t):
    """The noise level of the variance-exploding space."""
    return ((1 - abar(t)) / abar(t)).sqrt()


def ddim_uniform(steps):
    """Timesteps of ComfyUI's scheduler of that name, and -1."""
    return [*reversed(range(1, 1000, 1000 // steps)), -1]


def noise(seed, levels, shape):
    """The noise that a seed stands for, [levels, *shape] from the highest level: drawn from the lowest, one by one."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(levels)]).flip(0)


def eps(model, conditioning, x, t):
    """The noise prediction of a tiny SD 1 or SD 2 model, straight from its U-Net."""
    words = conditioning[0][0].expand(len(x), -1, -1)
    out = model.model.diffusion_model(x.float(), torch.full((len(x),), float(t)), context=words).double()
    if model.model.model_type.name == "V_PREDICTION":
        return abar(t).sqrt() * out + (1 - abar(t)).sqrt() * x  # arXiv 2202.00512, appendix D
    return out


def guided(model, positive, negative, cfg):
    """Classifier-free guidance (arXiv 2207.12598), as a function of x and t."""

    def predict(x, t):
        unconditional = eps(model, negative, x, t)
        return unconditional + cfg * (eps(model, positive, x, t) - unconditional)

    return predict


def step(x, e, t, p, eta=1.0):
    """Mean and standard deviation of x_p (arXiv 2010.02502, eq. 12 and 16)."""
    std = eta * ((1 - abar(p)) / (1 - abar(t))).sqrt() * (1 - abar(t) / abar(p)).sqrt()
    x_0 = (x - (1 - abar(t)).sqrt() * e) / abar(t).sqrt()
    return abar(p).sqrt() * x_0 + (1 - abar(p) - std**2).clamp(min=0).sqrt() * e, std


def invert(predict, x_0, timesteps, noise, eta=1.0):
    """Edit-friendly DDPM inversion (arXiv 2304.06140, algorithm 1) that keeps the last step.

    Returns:
        the latents x_t for every t, and `std * z`, what a step's mean lacks of the next latent.
    """
    x = [abar(t).sqrt() * x_0 + (1 - abar(t)).sqrt() * n for t, n in zip(timesteps, noise)] + [x_0]
    means = [step(x[i], predict(x[i], t), t, timesteps[i + 1], eta)[0] for i, t in enumerate(timesteps[:-1])]
    return x, [x[i + 1] - mean for i, mean in enumerate(means)]


def edit(predict, x, rest, timesteps, eta=1.0):
    """The LEDITS update (arXiv 2307.00522, eq. 3) from x at `timesteps[0]`, with what `invert` found missing."""
    for t, p, r in zip(timesteps, timesteps[1:], rest):
        x = step(x, predict(x, t), t, p, eta)[0] + r
    return x


class Sega:
    """Semantic guidance (arXiv 2301.12247, section 3 and appendix A), picture by picture and channel by channel.

    Concepts are dictionaries with the paper's symbols: sign, s_e, lambda, delta, s_m, beta_m, g, and cooldown or None.
    While only some concepts are past their warm-up it follows the authors' code (diffusers): their weighted mean,
    without momentum. Where their weights sum to zero, it gives nothing.
    """

    def __init__(self, concepts):
        self.concepts = concepts
        self.nu = [0.0] * len(concepts)

    def __call__(self, k, unconditional, conditional):
        """gamma at step k, from the noise predictions [B, C, H, W] of all concepts."""
        psi = [self.psi(c, (e - unconditional).double().numpy()) for c, e in zip(self.concepts, conditional)]
        acts = [not (c["cooldown"] is not None and k >= c["cooldown"]) for c in self.concepts]
        psi = [p * a for p, a in zip(psi, acts)]
        gamma = [p + c["s_m"] * nu for c, p, nu in zip(self.concepts, psi, self.nu)]
        self.nu = [c["beta_m"] * nu + (1 - c["beta_m"]) * g for c, nu, g in zip(self.concepts, self.nu, gamma)]
        warm = [i for i, c in enumerate(self.concepts) if k >= c["delta"]]
        if len(warm) == len(self.concepts):
            return torch.from_numpy(sum(c["g"] * g for c, g in zip(self.concepts, gamma)))
        weights = [self.concepts[i]["g"] * acts[i] for i in warm]
        total = sum((w / sum(weights) * psi[i] for w, i in zip(weights, warm)), 0.0) if sum(weights) else 0.0
        return torch.from_numpy(total + np.zeros(unconditional.shape))

    @staticmethod
    def psi(concept, difference):
        scaled = concept["sign"] * concept["s_e"] * difference
        out = np.zeros_like(scaled)
        for b, picture in enumerate(scaled):
            for c, channel in enumerate(picture):
                least = np.quantile(abs(channel), concept["lambda"])
                out[b, c] = np.where(abs(channel) >= least, channel, 0)
        return out
