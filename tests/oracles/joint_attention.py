"""The attention editors as their papers run them: one joint batch of source and target rows, explicit matrices.

Slow and plain on purpose: the tests hold the nodes against it. Nothing of the pack is used in `joint_edit`, which calls the
tiny model's U-Net itself, with rows [u_source, u_target, c_source, c_target] and every attention replaced by
softmax(Q K^T) V on matrices of [rows, heads, queries, keys] that an editor may change. Variance-preserving DDIM.
"""
import comfy.samplers
import torch


class Editor:
    """Changes nothing. `maps` and `values` see each layer's matrices and may return others.

    Rows come as [u_source, u_target, c_source, c_target], each of B pictures, as dictionaries of views.
    """

    def begin(self, step):
        pass

    def before(self, x, evaluate):
        """The target latent with which the step is evaluated; `evaluate(x)` runs the U-Net for another one."""
        return x

    def self_attention(self, q, k, v, probs, layer):
        return {name: probs[name] @ v[name] for name in probs}

    def cross_maps(self, probs, layer):
        return probs

    def feature(self, h, block):
        return h

    def latent(self, x, source, step):
        return x


ROWS = ("u_s", "u_t", "c_s", "c_t")


def joint_edit(model, inversion, source, target, negative, cfg, editor, start=0):
    """Edited latents [B, 4, h, w] of a path, by DDIM with the source row held on the path.

    `negative` may be a list of CONDITIONINGs, one for every step.
    """
    unet, batch = model.model.diffusion_model, inversion.latents.shape[1]
    sampling = model.get_model_object("model_sampling")
    every = negative if isinstance(negative[0][0], list) and len(negative) > 1 else None
    negative = negative if every is None else every[0]

    def contexts(i):
        n = negative if every is None else every[i]
        return torch.cat([c[0][0].expand(batch, -1, -1) for c in (n, n, source, target)])

    y = None
    if unet.num_classes is not None:
        noise = inversion.latents[0]
        entries = [{"cross_attn": c[0][0], "pooled_output": c[0][1]["pooled_output"], "model_conds": {}}
                   for c in (negative, negative, source, target)]
        entries = comfy.samplers.encode_model_conds(model.model.extra_conds, entries, noise, noise.device, "positive")
        y = torch.cat([e["model_conds"]["y"].cond.expand(batch, -1) for e in entries])
    steps = len(inversion.sigmas) - 1
    x = None
    for i in range(start, steps):
        s, p = inversion.sigmas[i], inversion.sigmas[i + 1]
        a, b = 1 / (1 + s**2), 1 / (1 + p**2)
        x_s = inversion.latents[i] * a.sqrt()
        x = x_s.clone() if x is None else x
        editor.begin(i - start)
        t = sampling.timestep(s)

        def evaluate(x, x_s=x_s, t=t, i=i):
            return _unet(unet, torch.cat([x_s, x, x_s, x]), t, contexts(i), y, editor, batch)

        x = editor.before(x, evaluate)
        rows = torch.cat([x_s, x, x_s, x])
        out = evaluate(x)
        if model.model.model_type.name == "V_PREDICTION":
            out = a.sqrt() * out + (1 - a).sqrt() * rows
        _, u, _, c = out.chunk(4)
        e = u + cfg * (c - u)
        x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
        x = editor.latent(x, inversion.latents[i + 1] * b.sqrt(), i - start)
    return x / b.sqrt()


def _unet(unet, rows, t, context, y, editor, batch):
    def named(tensor):
        return dict(zip(ROWS, tensor.unflatten(0, (4, batch))))

    def heads(tensor, extra):
        return tensor.unflatten(-1, (extra["n_heads"], -1)).transpose(-3, -2)

    def layer(key, kind):
        def patch(q, k, v, extra):
            q, k, v = (named(heads(z, extra)) for z in (q, k, v))
            place = key, tuple(extra["activations_shape"][-2:])
            probs = {n: (q[n] @ k[n].mT * q[n].shape[-1] ** -0.5).softmax(-1) for n in ROWS}
            if kind == "attn1":
                out = editor.self_attention(q, k, v, probs, place)
            else:
                probs = editor.cross_maps(probs, place)
                out = {n: probs[n] @ v[n] for n in ROWS}
            return torch.cat([out[n] for n in ROWS]).transpose(-3, -2).flatten(-2)

        return patch

    handles, replaced = [], {"attn1": {}, "attn2": {}}
    blocks = [*(("input", n, b) for n, b in enumerate(unet.input_blocks)), ("middle", 0, unet.middle_block),
              *(("output", n, b) for n, b in enumerate(unet.output_blocks))]
    for part, number, block in blocks:
        for module in block:
            for index, _ in enumerate(getattr(module, "transformer_blocks", ())):
                for kind, own in replaced.items():
                    own[part, number, index] = layer((part, number, index), kind)
            if hasattr(module, "out_layers"):
                def hook(module, inputs, out, place=(part, number)):
                    changed = editor.feature(named(out), place)
                    return torch.cat([changed[n] for n in ROWS])
                handles.append(module.out_layers.register_forward_hook(hook))
    try:
        with torch.set_grad_enabled(rows.requires_grad):
            return unet(rows, t.expand(len(rows)).float(), context=context, y=y,
                        transformer_options={"patches_replace": replaced, "cond_or_uncond": []})
    finally:
        for handle in handles:
            handle.remove()
