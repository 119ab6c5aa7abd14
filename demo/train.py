"""Train the demo model from a seed: autoencoder, then text encoder and U-Net together.

    python demo/train.py --comfyui PATH [--work .dev/train] [--seed 0]

Two CPU cores take about two hours; a GPU is used where there is one. Interrupt it at will: the same command resumes.
Sample grids and logs go to the work folder, the weights (float16 safetensors) to demo/weights.safetensors.
Every random draw is made from (seed, step), so a resumed run sees what an uninterrupted one would have seen.
"""

import argparse
import functools
import multiprocessing
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo import captions, nets, scenes  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def amp():
    return torch.autocast(DEVICE, torch.bfloat16)


def training_scene(index, seed):
    """The index-th training scene: seeds are skipped until the combination is not a held-out one."""
    for attempt in range(100):
        scene = scenes.random_scene(10_000_000 + seed * 1_000_000_000 + index * 100 + attempt)
        if not scenes.held_out(scene):
            return scene
    raise RuntimeError("every candidate scene is held out")


def _draw(job):
    index, seed = job
    return (scenes.render(training_scene(index, seed))[0] * 255 + 0.5).astype(np.uint8)


def draw_pictures(count, seed, start=0):
    """Training pictures uint8 [count, 3, side, side], drawn by worker processes."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        drawn = pool.map(_draw, [(start + i, seed) for i in range(count)], chunksize=64)
    return torch.from_numpy(np.stack(drawn)).movedim(-1, 1).contiguous()


def to_net(pictures):
    """uint8 pictures to the network's -1..1."""
    return pictures.to(DEVICE, torch.float32) / 127.5 - 1


class Log:
    def __init__(self, work, name, steps):
        self.file, self.steps, self.begun, self.first = work / f"{name}.log", steps, time.time(), None
        self.name = name

    def __call__(self, step, **values):
        self.first = step if self.first is None else self.first
        rate = (step - self.first) / max(time.time() - self.begun, 1e-9)
        left = (self.steps - step) / rate / 60 if rate else float("nan")
        line = f"{self.name} {step}/{self.steps} " + " ".join(f"{k} {v:.4g}" for k, v in values.items())
        line += f"  {rate:.2f} steps/s, {left:.0f} min left"
        print(line, flush=True)
        with self.file.open("a") as f:
            f.write(line + "\n")


def save_state(path, modules, optimizer, step):
    """Modules and AdamW moments as safetensors, replaced atomically."""
    state = {"step": torch.tensor(step)}
    for name, module in modules.items():
        state |= {f"{name}/{k}": v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{number}/{k}": v.cpu().contiguous() for k, v in values.items()}
    save_file(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_state(path, modules, optimizer):
    """Undo `save_state`; returns the step to go on from (0 where there is nothing to resume)."""
    if not path.exists():
        return 0
    state = load_file(path)
    for name, module in modules.items():
        module.load_state_dict({k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(name + "/")})
    moments = {}
    for key, value in state.items():
        if key.startswith("optimizer/"):
            _, number, name = key.split("/")
            moments.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(state["step"])


def cosine(step, steps, warmup=200):
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / steps)))


def grid(pictures, path, columns=8):
    from PIL import Image

    pictures = (pictures.clamp(-1, 1) * 127.5 + 127.5).byte().cpu().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(pictures[i : i + columns]), 1) for i in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate(rows, 0)).save(path)


def random_crops(pictures, rng, side, count):
    """Training pictures of the autoencoder: random crops, -1..1."""
    crops = []
    for index in rng.integers(len(pictures), size=count):
        top, left = rng.integers(nets.SIDE - side + 1, size=2)
        crops.append(pictures[index, :, top : top + side, left : left + side])
    return to_net(torch.stack(crops)).contiguous(memory_format=torch.channels_last)


class Stage(NamedTuple):
    """One stretch of the autoencoder's training."""

    name: str
    stream: int  # of random numbers
    side: int  # of the crops, px
    batch: int
    lr: float
    decoder_only: bool = False


# Small crops teach fast but let the networks lean on the padded border; whole pictures mend that.
CROPS, WHOLE = Stage("vae", 1, 48, 8, 1e-3), Stage("vae_whole", 3, nets.SIDE, 2, 5e-4)
DECODER = Stage("decoder", 4, nets.SIDE, 2, 3e-4, decoder_only=True)


def train_vae(args, pictures, stage, steps, vae=None):
    """TAESD architecture, no normalisation layers: L1 and L2 on the picture, latents pulled to unit variance.

    Args:
        pictures: function that gives the training pictures.
    """
    torch.manual_seed(args.seed)
    name, decoder_only, lr = stage.name, stage.decoder_only, stage.lr
    vae = vae or nets.build_vae().to(DEVICE, memory_format=torch.channels_last)
    trained = (vae.decoder if decoder_only else vae).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-4)
    done, log = args.work / f"{name}.safetensors", Log(args.work, name, steps)
    first = load_state(done, {"vae": vae}, optimizer)
    if first >= steps:
        return vae.eval().requires_grad_(False)
    for step in range(first, steps):
        rng = np.random.default_rng([args.seed, stage.stream, step])
        torch.manual_seed(args.seed * 1_000_003 + step)
        x = random_crops(pictures(), rng, stage.side, stage.batch)
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps)
        with amp():
            with torch.set_grad_enabled(not decoder_only):
                z = vae.encoder(x)
            y = vae.decoder(z + 0.02 * torch.randn_like(z))
        z, y = z.float(), y.float()
        pull = (z.mean((0, 2, 3)) ** 2).mean() + ((z.var((0, 2, 3)) - 1) ** 2).mean() + F.relu(z.abs() - 2.8).mean()
        loss = F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x) + (0 if decoder_only else 0.05) * pull
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            log(step, loss=loss.item(), std=z.std().item(), psnr=-10 * F.mse_loss(y / 2, x / 2).log10().item())
        if step % 500 == 499 or step == steps - 1:
            save_state(done, {"vae": vae}, optimizer, step + 1)
    with torch.no_grad():
        x = to_net(pictures()[:8])
        grid(torch.cat([x, vae.decoder(vae.encoder(x))]), args.work / f"{name}.png")
    return vae.eval().requires_grad_(False)


def preview_factors(latents, pictures):
    """Least-squares map from latents to small pictures, [5, 3] (last row the bias), for ComfyUI's previews."""
    small = F.avg_pool2d(to_net(pictures), nets.FACTOR).permute(0, 2, 3, 1).reshape(-1, 3).cpu()
    z = latents[: len(pictures)].float().permute(0, 2, 3, 1).reshape(-1, nets.LATENT_CHANNELS)
    return torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], 1), small).solution


def encode_pool(args, vae):
    """Latents of the training pictures, float16 [pool, 4, 16, 16], made in parts that survive an interruption."""
    parts, part = [], 2000
    for start in range(0, args.pool, part):
        path = args.work / f"latents_{start:06d}.safetensors"
        if not path.exists():
            pictures = draw_pictures(part, args.seed, start)
            with torch.no_grad(), amp():
                z = [vae.encoder(to_net(chunk).contiguous(memory_format=torch.channels_last)).half().cpu()
                     for chunk in pictures.split(50)]  # fmt: skip
            save_file({"z": torch.cat(z).contiguous()}, path)
            print(f"latents {start + part}/{args.pool}", flush=True)
        parts.append(load_file(path)["z"])
    return torch.cat(parts)[: args.pool]


@torch.no_grad()
def sample(unet, text, tokens, prompts, cfg=3.0, steps=30, seed=0):
    """DDIM with classifier-free guidance on a v-prediction network; latents [len(prompts), 4, 16, 16]."""
    abar = nets.alphas_cumprod().float().to(DEVICE)
    context = text(tokens([*prompts, *[""] * len(prompts)]).to(DEVICE)).last_hidden_state
    x = torch.randn(len(prompts), nets.LATENT_CHANNELS, nets.SIDE // nets.FACTOR, nets.SIDE // nets.FACTOR,
                    generator=torch.Generator().manual_seed(seed)).to(DEVICE)  # fmt: skip
    times = torch.linspace(999, 0, steps).round().long().tolist()
    for t, after in zip(times, [*times[1:], None]):
        v_cond, v_uncond = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        v = v_uncond + cfg * (v_cond - v_uncond)
        a, s = abar[t].sqrt(), (1 - abar[t]).sqrt()
        x0, eps = a * x - s * v, s * x + a * v
        x = x0 if after is None else abar[after].sqrt() * x0 + (1 - abar[after]).sqrt() * eps
    return x


def train_unet(args, vae, latents, factors):
    """Text encoder and U-Net: v-prediction, SD noise schedule, a fresh caption form at every visit of a scene."""
    torch.manual_seed(args.seed + 1)
    tokens = nets.Tokens()
    nets_now = {"unet": nets.build_unet(), "text": nets.build_text(len(tokens.ids))}
    ema = {"unet_ema": nets.build_unet(), "text_ema": nets.build_text(len(tokens.ids))}
    for (name, module), average in zip(nets_now.items(), ema.values()):
        module.to(DEVICE)
        average.load_state_dict(module.state_dict())
        average.to(DEVICE).requires_grad_(False).eval()
    print({k: sum(p.numel() for p in m.parameters()) for k, m in nets_now.items()}, len(tokens.ids), "tokens", flush=True)
    params = [p for m in nets_now.values() for p in m.parameters()]
    averages = [p for m in ema.values() for p in m.parameters()]
    optimizer = torch.optim.AdamW(params, args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    done = args.work / "unet.safetensors"
    first = load_state(done, nets_now | ema, optimizer)
    abar = nets.alphas_cumprod().float()
    pool = [training_scene(i, args.seed) for i in range(len(latents))]
    log = Log(args.work, "unet", args.unet_steps)
    losses = []
    for step in range(first, args.unet_steps):
        rng = np.random.default_rng([args.seed, 2, step])
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        picks = rng.integers(len(pool), size=args.batch)
        x0 = latents[picks].float()
        rows = tokens([captions.draw_caption(pool[i], rng) for i in picks]).to(DEVICE)
        # one stratified timestep a row, leaning to the noisy levels, where shapes and places are decided
        u = (torch.arange(args.batch) + torch.rand(args.batch, generator=generator)) / args.batch
        t = (1000 * u**0.7).long().clamp(max=999)
        noise = torch.randn(x0.shape, generator=generator)
        a, s = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine(step, args.unet_steps)
        with amp():
            context = nets_now["text"](rows).last_hidden_state
            out = nets_now["unet"]((a * x0 + s * noise).to(DEVICE), t.to(DEVICE), context).sample
        loss = F.mse_loss(out.float(), (a * noise - s * x0).to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 1 - min(0.995, (step + 1) / (step + 10)))
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI folder (its CLIP tokenizer is used)")
    parser.add_argument("--work", type=Path, default=ROOT / ".dev" / "train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--vae-whole-steps", type=int, default=1500)
    parser.add_argument("--decoder-steps", type=int, default=1500)
    parser.add_argument("--pool", type=int, default=12_000, help="training pictures")
    parser.add_argument("--unet-steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()
    sys.path.insert(0, str(args.comfyui))
    args.work.mkdir(parents=True, exist_ok=True)
    pictures = functools.cache(lambda: draw_pictures(6000, args.seed))
    vae = train_vae(args, pictures, CROPS, args.vae_steps)
    vae = train_vae(args, pictures, WHOLE, args.vae_whole_steps, vae)
    latents = encode_pool(args, vae)
    factors = preview_factors(latents, draw_pictures(min(1000, args.pool), args.seed))
    unet, text, tokens = train_unet(args, vae, latents, factors)
    vae = train_vae(args, pictures, DECODER, args.decoder_steps, vae)  # the latents are fixed now, the decoder may still improve
    save_file(nets.checkpoint(vae, unet, text, tokens.ids, factors), nets.WEIGHTS)
    print(f"{nets.WEIGHTS}: {nets.WEIGHTS.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
