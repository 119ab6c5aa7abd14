"""Train the demo model's autoencoder, and encode the pictures that its U-Net learns from."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ...demo import nets
from .training import DEVICE, Log, amp, cosine, draw_pictures, grid, load_state, save_state, to_net


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


def train(args, pictures, stage, steps, vae=None):
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
        loss = F.l1_loss(y, x) + 5 * F.mse_loss(y, x) + (0 if decoder_only else 0.05) * pull
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
                     for chunk in pictures.split(50)]
            save_file({"z": torch.cat(z).contiguous()}, path)
            print(f"latents {start + part}/{args.pool}", flush=True)
        parts.append(load_file(path)["z"])
    return torch.cat(parts)[: args.pool]
