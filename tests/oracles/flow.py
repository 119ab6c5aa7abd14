"""Flow models and the methods on them, from core's own functions and the papers: nothing of the pack runs."""
import comfy.sampler_helpers
import comfy.samplers
import torch


def velocities(on, conditionings, shape):
    """`(x, s, name, cfg) -> v` of a MODEL, from core's own functions: nothing of the pack runs."""
    conds = {name: comfy.sampler_helpers.convert_cond(c) for name, c in conditionings.items()}
    inner, conds, _ = comfy.sampler_helpers.prepare_sampling(on, shape, conds, on.model_options)
    on.pre_run()
    conds = comfy.samplers.process_conds(inner, torch.zeros(shape), conds, torch.device("cpu"))

    def velocity(x, s, name, cfg=1.0):
        d, u = comfy.samplers.calc_cond_batch(inner, [conds[name], conds["negative"]], x, torch.full((len(x),), float(s)),
                                              on.model_options)
        return (x - (u + cfg * (d - u))) / s

    return velocity


def flowedit_published(velocity, x0, levels, noises, n_max, n_min, source_cfg, target_cfg):
    """The loop of the released code (FlowEdit_utils.py), typed anew, with noise given instead of drawn.

    noises: for every step a list of n_avg draws.
    """
    steps, z = len(levels) - 1, x0.clone()
    for i in range(steps):
        t, t_next = levels[i], levels[i + 1]
        if steps - i > n_max:
            continue
        if steps - i > n_min:
            average = torch.zeros_like(x0)
            for noise in noises[i]:
                zt_source = (1 - t) * x0 + t * noise
                zt_target = z + zt_source - x0
                source = velocity(zt_source, t, "source", source_cfg)
                target = velocity(zt_target, t, "target", target_cfg)
                average += (target - source) / len(noises[i])
            z = z + (t_next - t) * average
        else:
            if i == steps - n_min:
                xt_source = (1 - t) * x0 + t * noises[i][0]
                xt_target = z + xt_source - x0
            xt_target = xt_target + (t_next - t) * velocity(xt_target, t, "target", target_cfg)
    return z if n_min == 0 else xt_target
