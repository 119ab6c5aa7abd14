"""Cases of the benchmark: what a person waits for beside the network: start-up of the pack, and files."""

import subprocess
import sys
import tempfile
from pathlib import Path

from . import workbench
from .speed_lines import row

# Imports ComfyUI as its server does, then the pack and all its nodes; prints the seconds of both.
IMPORTS = """
import sys, time
began = time.perf_counter()
sys.path[:0] = [{tools!r}]
import run; sys.path.remove({tools!r})
from comfyui_ledits.tools import inside_comfyui
inside_comfyui.prepare()
import nodes, comfy.samplers, comfy_api.latest, server, execution, latent_preview, comfy_extras.nodes_custom_sampler
loaded = time.perf_counter()
import asyncio, importlib.util
spec = importlib.util.spec_from_file_location("ledits", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
pack = sys.modules["ledits"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
count = len(asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list()))
print(loaded - began, time.perf_counter() - loaded, count)
"""


def start(bench):
    """start-up: the pack with all nodes, beside what ComfyUI loads before; its first start compiles the pack to bytecode"""
    script = IMPORTS.format(tools=str(workbench.ROOT / "tools"), root=str(workbench.ROOT))
    with tempfile.TemporaryDirectory() as cache:
        environment = workbench.environment(PYTHONPYCACHEPREFIX=cache, PYTHONDONTWRITEBYTECODE="")
        found = []
        for _ in range(1 + max(3, bench.options.repeat)):
            done = subprocess.run([sys.executable, "-c", script], cwd=workbench.ROOT, env=environment,
                                  capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"The pack could not be imported:\n{done.stderr[-2000:]}")
            found.append([float(number) for number in done.stdout.splitlines()[-1].split()])
    core, pack, count = sorted(found[1:], key=lambda one: one[1])[len(found[1:]) // 2]
    yield row(f"{count:.0f} nodes, first start", "pack", "ComfyUI", found[0][1], found[0][0])
    yield row(f"{count:.0f} nodes, later starts", "pack", "ComfyUI", pack, core)


def records(bench):
    """a record of 100 steps at 1024 px as a file: saved and opened (read whole, its checksum tested), beside reading its bytes"""
    import comfy.latent_formats
    import torch

    from ...files import inversion_file, latent_formats
    from ...samplers.methods.record import Inversion

    for name, form, channels in (("SDXL", comfy.latent_formats.SDXL(), 4), ("Flux", comfy.latent_formats.Flux(), 16)):
        generator = torch.Generator().manual_seed(0)
        steps = 10 if bench.options.quick else 100
        numbers = torch.randn(2 * steps + 1, 1, channels, 128, 128, generator=generator)
        record = Inversion(
            sigmas=torch.linspace(14, 0, steps + 1), latents=numbers[: steps + 1], residuals=numbers[steps + 1 :],
            etas=torch.ones(steps), family="ve", model=name, method="edit-friendly DDPM", latent_format=form)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "record.ledits.safetensors")
            t = bench.times(
                save=lambda: inversion_file.save(path, record, latent_formats.describe(form)),
                open=lambda: inversion_file.load(path, latent_formats.make),
                head=lambda: inversion_file.check(path, latent_formats.make), bytes=path.read_bytes)
            size = f"{path.stat().st_size / 1e6:.0f} MB"
        for side in ("save", "open", "head"):
            yield row(f"{name}, {size}: {side}", side, "bytes read", t[side], t["bytes"])
