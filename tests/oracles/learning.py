"""The inversions that learn, in their papers' words: variance-preserving, float64, one picture and one row at a time.

Slow and plain on purpose: the tests hold the nodes against it. Nothing of the pack is used here. A network is the U-Net
of a tiny model made anew from its seed, in float64, as any PyTorch module; its gradients are autograd's.
"""
import contextlib

import comfy.ldm.modules.attention
import comfy.sampler_helpers
import comfy.samplers
import torch
from support import tiny

from oracles import diffusion


class Network:
    """eps(x, t, words) of a tiny model in float64; `value` and `maps` reach into its cross-attention by module hooks."""

    def __init__(self, kind):
        model = tiny.model(kind).model
        self.unet = model.diffusion_model.double().requires_grad_(False)
        self.v = model.model_type.name == "V_PREDICTION"
        self.model, self.value, self.maps = model, None, None
        self.cross = {name: m for name, m in self.unet.named_modules() if name.endswith("attn2")}
        for module in self.cross.values():
            module.to_v.register_forward_pre_hook(self._to_v)

    def _to_v(self, module, args):
        return (self.value,) if self.value is not None else args

    def vector(self, conditioning, latent):
        """SDXL's vector of pooled text and sizes; None for others."""
        cond = comfy.sampler_helpers.convert_cond(conditioning)
        noise = torch.zeros_like(latent)
        encoded = comfy.samplers.encode_model_conds(self.model.extra_conds, cond, noise, noise.device, "positive")
        found = encoded[0]["model_conds"].get("y")
        return None if found is None else found.cond.double()

    def eps(self, x, t, words, y=None, value=None):
        self.value = value
        more = {} if y is None else {"y": y}
        out = self.unet(x, torch.tensor([float(t)]), context=words, **more)
        return out

    def as_eps(self, out, x, level):
        """The answer `out` of the network read at timestep `level` (arXiv 2202.00512, appendix D)."""
        if not self.v:
            return out
        return diffusion.abar(level).sqrt() * out + (1 - diffusion.abar(level)).sqrt() * x

    @contextlib.contextmanager
    def watching(self, layers):
        """Lists attention maps [heads, queries, tokens] of the layers while it is open."""
        maps, handles = [], []

        def watch(module):
            seen = {}
            handles.append(module.to_q.register_forward_hook(lambda m, a, out: seen.update(q=out)))

            def take(m, a, out):
                q, k = (t[0].view(t.shape[1], module.heads, -1).transpose(0, 1) for t in (seen["q"], out))
                maps.append((q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(-1))

            handles.append(module.to_k.register_forward_hook(take))

        for name in layers:
            watch(self.cross[name])
        try:
            yield maps
        finally:
            for handle in handles:
                handle.remove()


def ddim_inversion(network, x_0, timesteps, words, y=None, layers=()):
    """Latents x* for every timestep (noisiest first), and the attention maps that were seen at each.

    eps is that of the network at the next noisier timestep (code of arXiv 2211.09794). The noisiest latent is not
    evaluated, and takes the maps of the one before.
    """
    path, maps = [x_0], [None]
    for i in range(len(timesteps) - 2, -1, -1):
        t, p, x = timesteps[i], timesteps[i + 1], path[-1]
        with network.watching(layers) as seen:
            e = network.as_eps(network.eps(x, t, words, y), x, p)
        picture = (x - (1 - diffusion.abar(p)).sqrt() * e) / diffusion.abar(p).sqrt()
        path.append(diffusion.abar(t).sqrt() * picture + (1 - diffusion.abar(t)).sqrt() * e)
        maps[-1] = seen
        maps.append(None)
    maps[-1] = maps[-2]
    return path[::-1], maps[::-1]


def null_text(network, x_0, timesteps, words, null, cfg, inner, vectors=(None, None)):
    """Embeddings for every step and the last losses of each (arXiv 2211.09794, algorithm 1 and its code)."""
    path, _ = ddim_inversion(network, x_0, timesteps, words, vectors[0])
    x, out, losses = path[0], [], []
    for i in range(len(timesteps) - 1):
        t, p = timesteps[i], timesteps[i + 1]
        null = null.clone().requires_grad_()
        optimiser = torch.optim.Adam([null], lr=1e-2 * (1 - i / 100))
        e_c = network.as_eps(network.eps(x, t, words, vectors[0]), x, t)

        def predict(x=x, t=t, p=p, e_c=e_c, null=null):
            e_u = network.as_eps(network.eps(x, t, null, vectors[1]), x, t)
            return diffusion.step(x, e_u + cfg * (e_c - e_u), t, p, eta=0.0)[0]

        for _ in range(inner):
            loss = torch.nn.functional.mse_loss(predict(), path[i + 1])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if loss.item() < 1e-5 + i * 2e-5:
                break
        x, null = predict().detach(), null.detach()
        out.append(null)
        losses.append(loss.item())
    return torch.stack(out), losses


def style_diffusion(network, x_0, timesteps, words, null, cfg, counts, layers, vectors=(None, None)):
    """Scales and shifts for every step, and the last losses (arXiv 2303.15649 and its code, without its network)."""
    path, source = ddim_inversion(network, x_0, timesteps, words, vectors[0], layers)
    scale, shift = torch.ones_like(words), torch.zeros_like(words)
    x, out, losses = path[0], [], []
    for i in range(len(timesteps) - 1):
        t, p = timesteps[i], timesteps[i + 1]
        scale, shift = scale.clone().requires_grad_(), shift.clone().requires_grad_()
        optimiser = torch.optim.Adam([scale, shift], lr=1e-2 * (1 - i / 100))
        e_u = network.as_eps(network.eps(x, t, null, vectors[1]), x, t)

        def predict(x=x, t=t, p=p, e_u=e_u, scale=scale, shift=shift):
            e_c = network.as_eps(network.eps(x, t, words, vectors[0], words * scale + shift), x, t)
            return diffusion.step(x, e_u + cfg * (e_c - e_u), t, p, eta=0.0)[0]

        for _ in range(counts[i]):
            with network.watching(layers) as maps:
                loss = torch.nn.functional.mse_loss(predict(), path[i + 1])
            for mine, wanted in zip(maps, source[i]):
                loss = loss + torch.nn.functional.mse_loss(mine, wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if loss.item() < 1e-5 + i * 2e-5:
                break
        x, scale, shift = predict().detach(), scale.detach(), shift.detach()
        out.append(torch.stack([scale[0], shift[0]]))
        losses.append(loss.item())
    return torch.stack(out), losses
