"""What the tests marked `demo` share: the demo model, and held-out pictures by the dozen."""

import os
from pathlib import Path

import numpy as np
import torch
from comfyui_ledits.demo import loader, nets, pictures, scenes
from comfyui_ledits.tools.training import evaluate

FIRST_SEED = 900_000  # of held-out scenes; training's seeds begin at 10,000,000
# Fewer pictures than a test asks for, for a quick look.
MOST = int(os.environ.get("LEDITS_DEMO_PICTURES", 10_000))


def held_out(count, first_seed=FIRST_SEED, **fixed):
    """Scenes of one thing whose combination of kind, colour and ground was never trained on."""
    return pictures.held_out(first_seed, min(count, MOST), things=1, **fixed)


class DemoNodes:
    """The demo model of LEDITS_DEMO_WEIGHTS, or of the pack, and the stock nodes around it.

    A CONDITIONING holds one prompt for each picture of a batch.
    """

    def __init__(self):
        self.model, self.clip, self.vae = loader.load(Path(os.environ.get("LEDITS_DEMO_WEIGHTS") or nets.WEIGHTS))

    def prompts(self, texts):
        return evaluate.prompts(self.clip, texts)

    def encode(self, drawn):
        """LATENT of pictures float32 [H, W, 3]."""
        return {"samples": self.vae.encode(torch.from_numpy(np.stack(drawn)))}

    def decode(self, samples):
        """Pictures float32 [H, W, 3] in 0..1 of a latent [B, 4, h, w]."""
        return list(self.vae.decode(samples).float().cpu().clamp(0, 1).numpy())


def draw(scene):
    """Picture float32 [H, W, 3] and the mask [H, W] of the scene's thing."""
    picture, masks = scenes.render(scene)
    return picture, masks[0]
