"""Case of the benchmark: the authors' code of methods that diffusers does not have, where the person brings it.

It is a checkout of theirs (`--reference FOLDER`); nothing of it is part of this pack.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import speed_authors, speed_checkouts
from .speed_compare import drawn
from .speed_lines import row, say
from .speed_peers import count, quiet
from .workbench import pytorch_attention


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What is measured of a checkout.

    Attributes:
        file: one that tells the checkout.
        what: inversion and edit in words.
        theirs: `bench -> (run(picture uint8 [512, 512, 3], source, target), network)`, while its modules can be imported.
        ours: `(bench, latent of the picture) -> the edit's NodeOutput`.
        model, steps, repeat: of the benchmark.
    """

    file: str
    what: str
    theirs: Callable
    ours: Callable
    model: str = "demo"
    steps: int = 3
    repeat: int = 1


def references(bench):
    """the authors' code (--reference FOLDER) on the same weights, one picture of 512 x 512, inversion and edit together"""
    if not bench.options.reference:
        say("  left out: it needs --reference FOLDER, a checkout of " + ", ".join(REFERENCES))
        return
    import torch

    picture = drawn(side=512)
    image = torch.from_numpy(picture)[None].float() / 255
    for folder in bench.options.reference:
        name = known(folder)
        reference = REFERENCES[name]
        if bench.options.model != reference.model:
            say(f"  {name} left out: it is measured with --model {reference.model}")
            continue
        with speed_checkouts.imported(folder):
            run, network = reference.theirs(bench)
        theirs = quiet(lambda run=run: run(picture, bench.SOURCE, bench.TARGET))

        def ours(reference=reference):
            bench.conds.clear()
            output = reference.ours(bench, {"samples": bench.vae.encode(image)})
            bench.vae.decode(output.result[0]["samples"])

        alone, rows = bench.bare(ours)
        note = f"{rows} rows, {count(network, theirs)} rows; commit {speed_checkouts.commit(folder)}"
        t = bench.times(ours=ours, theirs=theirs, bare=alone)
        yield row(reference.what, "this pack", name, t["ours"], t["theirs"], note=note)
        yield row("of it the bare network", "this pack", "bare network", t["ours"], t["bare"])
        with pytorch_attention():
            t = bench.times(ours=ours, theirs=theirs)
            yield row("with PyTorch's attention in ComfyUI", "this pack", name, t["ours"], t["theirs"])


def known(folder):
    """Name of the checkout in `folder`.

    Raises:
        SystemExit: it is none of `REFERENCES`.
    """
    for name, reference in REFERENCES.items():
        if (Path(folder) / reference.file).is_file():
            return name
    raise SystemExit(f"{folder} is no checkout of {', '.join(REFERENCES)}.")


def _our_flowedit(bench, latent):
    from ...nodes.flowedit import FlowEdit, FlowEditSource
    from ...samplers import published

    made = {"model": bench.model, "negative": bench.cond("")}
    path = FlowEditSource.execute(**made, positive=bench.cond(bench.SOURCE), latent=latent, scheduler="simple", seed=0,
                                  settings={"settings": "own", "steps": bench.steps, "cfg": 1.0})
    own = {"settings": "own", "cfg": 1.0, "skip": published.FLUX.skip(bench.steps)}
    return FlowEdit.execute(**made, positive=bench.cond(bench.TARGET), inversion=path.result[0], settings=own)


def _edited(method, control):
    """Inversion by a method, and the edit with an attention control."""
    def ours(bench, latent):
        path = bench.methods(latent)[method]().result[0]
        return bench.edit(path, skip=0, concepts=(), attention=(control(bench),))

    return ours


def _our_edit_friendly(bench, latent):
    return bench.edit(bench.invert(latent=latent).result[0], cfg=15.0, concepts=())


REFERENCES = {
    "PnPInversion": Reference(
        file="models/p2p_editor.py", what="Direct Inversion and P2P", theirs=speed_authors.direct_p2p,
        ours=_edited("Direct", lambda bench: bench.prompt_to_prompt(0.4, 0.6))),
    "MasaCtrl": Reference(
        file="masactrl/masactrl_utils.py", what="DDIM inversion and MasaCtrl", theirs=speed_authors.masactrl,
        ours=_edited("DDIM", lambda bench: bench.masactrl())),
    "DDPM_inversion": Reference(
        file="ddm_inversion/inversion_utils.py", what="edit-friendly inversion and edit", theirs=speed_authors.edit_friendly,
        ours=_our_edit_friendly),
    "pnp-diffusers": Reference(
        file="pnp_utils.py", what="DDIM inversion and Plug-and-Play", theirs=speed_authors.plug_and_play, model="small",
        ours=_edited("DDIM", lambda bench: bench.plug_and_play())),
    "FlowEdit": Reference(
        file="FlowEdit_utils.py", what="FlowEdit", theirs=speed_authors.flowedit, ours=_our_flowedit, model="demo-flow",
        steps=28, repeat=3),
}
