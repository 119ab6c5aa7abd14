"""Cases of the benchmark: seconds of inversions and edits beside the bare network and beside each other."""

from .speed_lines import row, rows_of
from .workbench import pytorch_attention


def inversion(bench):
    """edit-friendly inversion: all steps in few batches, or one by one"""
    for pictures in (1,) if bench.options.quick or bench.wide else (1, 4):
        t = bench.times(batched=lambda: bench.invert(pictures), single=lambda: bench.invert(pictures, steps_at_once=1))
        yield row(f"inversion, {pictures} picture{'s' * (pictures > 1)}, {bench.steps} steps", "batched", "one by one",
                  t["batched"], t["single"])


def overhead(bench):
    """a whole edit, and for comparison a KSampler run, beside the bare network on the same batches"""
    path = bench.invert().result[0]
    sides = {
        "LEDITS edit, 2 concepts and cfg": lambda: bench.edit(path),
        "ComfyUI's KSampler, cfg": lambda: bench.ksampler(steps=bench.steps - bench.skip),
    }
    for name, run in sides.items():
        bare, rows = bench.bare(run)
        t = bench.times(whole=run, bare=bare)
        yield row(name, "whole", "bare network", t["whole"], t["bare"], note=f"{rows} rows")


def attention_kinds(bench):
    """a KSampler run with PyTorch's attention (--use-pytorch-cross-attention), beside ComfyUI as it starts"""
    def pytorch():
        with pytorch_attention():
            bench.ksampler()

    t = bench.times(pytorch=pytorch, usual=bench.ksampler)
    yield row("ComfyUI's KSampler, cfg", "PyTorch's", "as it starts", t["pytorch"], t["usual"])


def methods(bench):
    """every inversion method, beside DDIM inversion: seconds, and U-Net rows forward and backward"""
    found = {}
    for name, run in bench.methods().items():
        learns = name in ("null-text", "StyleDiffusion")  # minutes each: once, and not in turns
        forward, backward, seconds = bench.counted(run)
        found[name] = (seconds if learns else bench.times(run=run)["run"]), forward, backward
    for name, (seconds, forward, backward) in found.items():
        yield row(f"{name} inversion, {bench.steps} steps", name, "DDIM", seconds, found["DDIM"][0],
                  note=f"{forward} rows forward, {backward} backward")


def batches(bench):
    """pictures inverted in one batch: seconds a picture beside those of one alone"""
    for pictures in (4, 16):
        t = bench.times(together=lambda: bench.invert(pictures), alone=lambda: bench.invert(1))
        yield row(f"inversion of {pictures} pictures, {bench.steps} steps", "each", "alone",
                  t["together"] / pictures, t["alone"])


def attention(bench):
    """Prompt-to-Prompt on the Direct path, and a second edit from a kept store, beside the bare network on the rows"""
    inversion = bench.methods()["Direct"]()
    path, control = inversion.result[0], (bench.prompt_to_prompt(),)
    store = bench.capture(path, control)
    sides = {
        "P2P on the Direct path": (
            lambda: bench.edit(path, skip=0, concepts=(), attention=control), rows_of(inversion)
        ),
        "second edit, kept store": (
            lambda: bench.edit(path, skip=0, concepts=(), attention=control, store=store.result[0]), 0
        ),
    }
    for name, (run, before) in sides.items():
        bare, rows = bench.bare(run)
        t = bench.times(whole=run, bare=bare)
        more = f", with the inversion's {before + rows}" if before else ""
        yield row(name, "whole", "bare network", t["whole"], t["bare"], note=f"{rows} rows{more}")


def second_edits(bench):
    """a second edit, with what is kept of the first, beside inversion and first edit together"""
    control = (bench.prompt_to_prompt(),)

    def captured():
        path = bench.methods()["Direct"]().result[0]
        store = bench.capture(path, control).result[0]
        return path, store, again(path, store)

    def again(path, store):
        return bench.edit(path, skip=0, concepts=(), attention=control, store=store)

    path, store, _ = captured()
    t = bench.times(first=captured, second=lambda: again(path, store))
    yield row("P2P on the Direct path, from a kept store", "second", "first", t["second"], t["first"])
    record = bench.invert().result[0]
    t = bench.times(first=lambda: bench.edit(bench.invert().result[0]), second=lambda: bench.edit(record))
    yield row("two concepts, from a kept record", "second", "first", t["second"], t["first"])


def growth(bench):
    """how an edit with cfg and one concept grows: seconds beside those of one picture, one concept, all steps"""
    def edit(pictures=1, concepts=1, steps=bench.steps):
        path = bench.noise_path(pictures, steps)
        return lambda: bench.edit(path, skip=0, concepts=bench.concepts(("star", "red", "heart", "blue")[:concepts]))

    sides = {"half the steps": edit(steps=bench.steps // 2), "no concept": edit(concepts=0), "4 concepts": edit(concepts=4),
             "4 pictures": edit(pictures=4)}
    base = edit()
    one = rows_of(base())
    for name, run in sides.items():
        rows = rows_of(run())
        t = bench.times(run=run, base=base)
        yield row(name, name, "base", t["run"], t["base"], note=f"rows {rows / one:.2f} times")
    with bench.larger():
        large, rows = edit(), rows_of(base())
    t = bench.times(run=large, base=base)
    yield row("twice the resolution", "2 x 2", "base", t["run"], t["base"], note="4 times the places")
