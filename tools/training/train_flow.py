"""Train the demo flow model's transformer from a seed; text encoder and autoencoder are the demo model's, as they are.

    python tools/run.py training.train_flow --comfyui PATH [--work .dev/train_flow] [--seed 0]

Two CPU cores take an hour and a half; a GPU is used where there is one. Interrupt it at will: the same command resumes.
Sample grids and logs go to the work folder, the weights (float16 safetensors) to demo/flow.safetensors.
Every random draw is made from (seed, step), so a resumed run sees what an uninterrupted one would have seen.
"""

import argparse
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ...demo import captions, flow_net, nets, scenes
from .train_autoencoder import encode_pool
from .train_unet import Shared, chances, mean_follows, thing_weights
from .training import DEVICE, Log, amp, cosine, grid, load_state, save_state, training_scene

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI folder (its CLIP tokenizer is used)")
    parser.add_argument("--work", type=Path, default=ROOT / ".dev" / "train_flow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=6000, help="training pictures")
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--workers", type=int, default=1 if DEVICE == "cuda" else 2,
                        help="processes that share a batch")
    parser.add_argument("--compile", action="store_true", help="compile the network (needs a C++ compiler)")
    return parser.parse_args(arguments)


def levels(count, generator):
    """Stratified noise levels, float32 [count] in random order: s = sigmoid(n + 0.3), n standard normal."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    n = torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4))
    return torch.sigmoid(n + 0.3)[torch.randperm(count, generator=generator)]


@torch.no_grad()
def sample(velocity, text, tokens, prompts, cfg=3.0, steps=28, seed=0):
    """Euler with classifier-free guidance; latents [len(prompts), 4, 16, 16]."""
    words, pooled = flow_net.encode(text, tokens, [*prompts, *[""] * len(prompts)])
    side = nets.SIDE // nets.FACTOR
    x = torch.randn(len(prompts), nets.LATENT_CHANNELS, side, side,
                    generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    times = torch.linspace(1, 0, steps + 1).tolist()
    for s, after in zip(times, times[1:]):
        v_cond, v_uncond = velocity(torch.cat([x, x]), x.new_full((2 * len(x),), s), words, pooled).chunk(2)
        x = x + (after - s) * (v_uncond + cfg * (v_cond - v_uncond))
    return x


def follow(args, rank):
    """What the processes beside the first do."""
    sys.path.insert(0, str(args.comfyui))
    train(args, rank)


def train(args, rank=0):
    """The transformer: rectified flow, a fresh caption form at every visit of a scene. Returns the mean of its weights."""
    shared = Shared(args, rank)
    vae, _, text, tokens = nets.load_diffusers()
    vae, text = vae.to(DEVICE).requires_grad_(False), text.to(DEVICE).requires_grad_(False)
    latents = encode_pool(args, vae)
    torch.manual_seed(args.seed + 1)
    network, average = flow_net.build().to(DEVICE).train(), flow_net.build().to(DEVICE).requires_grad_(False).eval()
    average.load_state_dict(network.state_dict())
    velocity, drawn_by = flow_net.Velocity(network), flow_net.Velocity(average)
    velocity = torch.compile(velocity) if args.compile else velocity
    if rank == 0:
        print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} million parameters", flush=True)
    params, averages = list(network.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(params, args.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    done = args.work / "flow.safetensors.state"
    modules = {"flow": network, "flow_ema": average}
    first = load_state(done, modules, optimizer)
    pool = [training_scene(i, args.seed) for i in range(len(latents))]
    weights, chance = thing_weights(pool), chances(pool)
    log, losses = Log(args.work, "flow", args.steps), []
    for step in range(first, args.steps):
        rng = np.random.default_rng([args.seed, 3, step])
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        picks = rng.choice(len(pool), size=args.batch, p=chance)
        x0 = latents[picks].float()
        prompts = [captions.draw_caption(pool[i], rng) for i in picks]
        s, noise = levels(args.batch, generator), torch.randn(x0.shape, generator=generator)
        at = s.view(-1, 1, 1, 1)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine(step, args.steps)
        mine = shared.rows
        noisy, target = ((1 - at) * x0 + at * noise)[mine].to(DEVICE), (noise - x0)[mine].to(DEVICE)
        with torch.no_grad():
            words, pooled = flow_net.encode(text, tokens, prompts[mine])
        with amp():
            out = velocity(noisy, s[mine].to(DEVICE), words, pooled)
        loss = (weights[picks][mine].to(DEVICE) * (out.float() - target) ** 2).mean()
        shared.step(loss, params, optimizer)
        if rank:
            continue
        mean_follows(averages, params, step)
        losses.append(loss.item())
        if step % 50 == 0:
            log(step, loss=float(np.mean(losses[-200:])), pictures=(step + 1) * args.batch)
        if step % args.save_every == args.save_every - 1 or step == args.steps - 1:
            save_state(done, modules, optimizer, step + 1)
            save_file(flow_net.state(average), args.work / "flow.safetensors")
            asked = [captions.sentence(scenes.random_scene(seed, things=1)) for seed in range(16)]
            with torch.no_grad():
                grid(vae.decoder(sample(drawn_by, text, tokens, asked)), args.work / f"samples_{step + 1:06d}.png")
    return average


def main(arguments):
    args = parse(arguments)
    sys.path.insert(0, str(args.comfyui))
    args.work.mkdir(parents=True, exist_ok=True)
    encode_pool(args, nets.load_diffusers()[0].to(DEVICE))  # before the others need it
    (args.work / "meeting").unlink(missing_ok=True)
    for rank in range(1, args.workers):
        multiprocessing.get_context("spawn").Process(target=follow, args=(args, rank), daemon=True).start()
    average = train(args)
    save_file(flow_net.state(average), flow_net.WEIGHTS)
    print(f"{flow_net.WEIGHTS}: {flow_net.WEIGHTS.stat().st_size / 2**20:.1f} MiB")
