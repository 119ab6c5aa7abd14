"""What both trainings of the demo model need: pictures drawn from a seed, a log, a state to resume from."""

import multiprocessing
import time

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ...demo import scenes

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
