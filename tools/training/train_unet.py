"""Train the demo model's text encoder and U-Net on latents."""

import os
import sys
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ...demo import captions, nets, scenes
from .train_autoencoder import encode_pool
from .training import DEVICE, Log, amp, cosine, grid, load_state, save_state, training_scene

CORNERS = {"square", "star", "cross"}  # the kinds that are learned last


@torch.no_grad()
def sample(unet, text, tokens, prompts, cfg=3.0, steps=30, seed=0):
    """DDIM with classifier-free guidance on a v-prediction network; latents [len(prompts), 4, 16, 16]."""
    abar = nets.alphas_cumprod().float().to(DEVICE)
    context = text(tokens([*prompts, *[""] * len(prompts)]).to(DEVICE)).last_hidden_state
    x = torch.randn(len(prompts), nets.LATENT_CHANNELS, nets.SIDE // nets.FACTOR, nets.SIDE // nets.FACTOR,
                    generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    times = torch.linspace(999, 0, steps).round().long().tolist()
    for t, after in zip(times, [*times[1:], None]):
        v_cond, v_uncond = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        v = v_uncond + cfg * (v_cond - v_uncond)
        a, s = abar[t].sqrt(), (1 - abar[t]).sqrt()
        x0, eps = a * x - s * v, s * x + a * v
        x = x0 if after is None else abar[after].sqrt() * x0 + (1 - abar[after]).sqrt() * eps
    return x


class Shared:
    """One batch shared by processes of one thread each: on CPUs that do other work too, threads that meet at every
    layer lose most of their time waiting; processes meet once a step."""

    def __init__(self, args, rank=0):
        self.rank, self.count = rank, args.workers
        self.rows = slice(rank, None, args.workers)
        if self.count > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            meeting = (args.work / "meeting").absolute().as_uri()
            torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=self.count)
            torch.set_num_threads(1)

    def average(self, tensors):
        """Replace each tensor by its mean over the processes."""
        if self.count > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            torch.distributed.all_reduce(flat)
            flat /= self.count
            means = flat.split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [m.view_as(t) for m, t in zip(means, tensors)])


    def step(self, loss, params, optimizer):
        """One step of the optimizer on the whole batch, of which every process has had its rows."""
        optimizer.zero_grad()
        loss.backward()
        self.average([p.grad for p in params if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()


@torch.no_grad()
def mean_follows(averages, params, step):
    """The exponential mean of the weights, which forgets faster in the beginning."""
    torch._foreach_lerp_(averages, params, 1 - min(0.995, (step + 1) / (step + 10)))


def follow(args, rank):
    """What the processes beside the first do in `train`."""
    sys.path.insert(0, str(args.comfyui))
    train(args, None, encode_pool(args, None), None, rank)


def thing_weights(pool):
    """Weights of the loss, float32 [pool, 1, 16, 16]: 4 on things and around them, up to 16 where the outline tells a
    thing's kind from the others, 1 elsewhere; mean 1.

    The ground is most of the picture and soon learned; a kind is in a few places of its outline.
    """
    side = nets.SIDE // nets.FACTOR

    def cover(thing):
        every = [scenes.coverage(replace(thing, kind=kind), side) for kind in scenes.KINDS]
        own = every[scenes.KINDS.index(thing.kind)]
        return own, np.abs(own - np.mean(every, axis=0))

    found = np.stack([np.max([cover(thing) for thing in scene.things], axis=0) for scene in pool])
    things, outlines = torch.from_numpy(found)[:, :, None].unbind(1)
    weights = 1 + 3 * F.max_pool2d(things, 3, 1, 1) + 12 * outlines
    return weights / weights.mean()


def chances(pool):
    """The chance of each scene at every draw, float64 [pool]: twice that of others where a thing has many corners, half
    of it where there are two things (a lone "red star" is to be the star that is seen, not a second one)."""
    chance = np.array([2.0 if {thing.kind for thing in scene.things} & CORNERS else 1.0 for scene in pool])
    chance *= np.array([0.5 if len(scene.things) > 1 else 1.0 for scene in pool])
    return chance / chance.sum()


def timesteps(count, generator):
    """Stratified timesteps, int64 [count] in random order: three of four from 300 to 850, where shapes and places are
    decided and edits begin, the rest from all 1,000."""
    few = count // 4
    u = torch.rand(count, generator=generator)
    all_, middle = (torch.arange(few) + u[:few]) / few, (torch.arange(count - few) + u[few:]) / (count - few)
    t = torch.cat([1000 * all_, 300 + 550 * middle])[torch.randperm(count, generator=generator)]
    return t.long().clamp(max=999)


def train(args, vae, latents, factors, rank=0):
    """Text encoder and U-Net: v-prediction, SD noise schedule, a fresh caption form at every visit of a scene."""
    from diffusers.models.attention_processor import AttnProcessor

    shared = Shared(args, rank)
    torch.manual_seed(args.seed + 1)
    if args.begin:
        _, unet, text, tokens = nets.load_diffusers(args.begin)
        nets_now = {"unet": unet.train(), "text": text.train()}
    else:
        tokens = nets.Tokens()
        nets_now = {"unet": nets.build_unet(), "text": nets.build_text(len(tokens.ids))}
    ema = {"unet_ema": nets.build_unet(), "text_ema": nets.build_text(len(tokens.ids))}
    for (name, module), average in zip(nets_now.items(), ema.values()):
        module.to(DEVICE)
        average.load_state_dict(module.state_dict())
        average.to(DEVICE).requires_grad_(False).eval()
    if rank == 0:
        sizes = {k: sum(p.numel() for p in m.parameters()) for k, m in nets_now.items()}
        print(sizes, len(tokens.ids), "tokens", flush=True)
    # Explicit attention matrices: at these sizes a third faster on a CPU than the fused kernel's backward pass.
    nets_now["unet"].set_attn_processor(AttnProcessor())
    nets_now["text"].set_attn_implementation("eager")
    unet = torch.compile(nets_now["unet"]) if args.compile else nets_now["unet"]
    params = [p for m in nets_now.values() for p in m.parameters()]
    averages = [p for m in ema.values() for p in m.parameters()]
    optimizer = torch.optim.AdamW(params, args.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    done = args.work / "unet.safetensors"
    first = load_state(done, nets_now | ema, optimizer)
    abar = nets.alphas_cumprod().float()
    pool = [training_scene(i, args.seed) for i in range(len(latents))]
    weights, chance = thing_weights(pool), chances(pool)
    log = Log(args.work, "unet", args.unet_steps)
    losses = []
    for step in range(first, args.unet_steps):
        rng = np.random.default_rng([args.seed, 2, step])
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        picks = rng.choice(len(pool), size=args.batch, p=chance)
        x0 = latents[picks].float()
        rows = tokens([captions.draw_caption(pool[i], rng) for i in picks]).to(DEVICE)
        t = timesteps(args.batch, generator)
        noise = torch.randn(x0.shape, generator=generator)
        a, s = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine(step, args.unet_steps)
        mine = shared.rows
        noisy, target = (a * x0 + s * noise)[mine].to(DEVICE), (a * noise - s * x0)[mine].to(DEVICE)
        with amp():
            context = nets_now["text"](rows[mine]).last_hidden_state
            out = unet(noisy, t[mine].to(DEVICE), context).sample
        loss = (weights[picks][mine].to(DEVICE) * (out.float() - target) ** 2).mean()
        shared.step(loss, params, optimizer)
        if rank:
            continue
        mean_follows(averages, params, step)
        losses.append(loss.item())
        if step % 50 == 0:
            log(step, loss=float(np.mean(losses[-200:])), pictures=(step + 1) * args.batch)
        if step % args.save_every == args.save_every - 1 or step == args.unet_steps - 1:
            save_state(done, nets_now | ema, optimizer, step + 1)
            state = nets.checkpoint(vae, ema["unet_ema"], ema["text_ema"], tokens.ids, factors)
            save_file(state, args.work / "weights.safetensors")
            asked = [captions.sentence(scenes.random_scene(seed, things=1)) for seed in range(16)]
            drawn = sample(ema["unet_ema"], ema["text_ema"], tokens, asked)
            with torch.no_grad():
                grid(vae.decoder(drawn), args.work / f"samples_{step + 1:06d}.png")
    return ema["unet_ema"], ema["text_ema"], tokens
