"""What a user sees while nodes work, in a real server: progress, previews, the phase in words; and no second inversion."""
import re
import urllib.request

import pytest
from support.graphs import node
from support.listening import listen

import dev

STEPS, EDITED = 4, 3


def base():
    """The demo model, prompts and a picture."""
    return {
        "model": node("LEDITS_LoadDemoModel"),
        "words": node("LEDITS_EditPrompts", clip=["model", 1], source="a red circle", target="a blue circle"),
        "empty": node("CLIPTextEncode", text="", clip=["model", 1]),
        "image": node("EmptyImage", width=128, height=128, batch_size=1, color=0x3070C0),
        "latent": node("VAEEncode", pixels=["image", 0], vae=["model", 2]),
    }


PROMPTS = {"model": ["model", 0], "positive": ["words", 0], "negative": ["empty", 0]}
LEVELS = {"latent": ["latent", 0], "steps": STEPS, "scheduler": "ddim_uniform"}
DDIM = {"refinements": 0, "tolerance": 0.0, "convention": "A"}
EDIT = PROMPTS | {"positive": ["words", 1], "cfg": 5.0}


def inversions():
    learned = {**PROMPTS, **LEVELS, "cfg": 5.0, "steps": 2, "learning_rate": 0.01, "early_stop": 0.0,
               "on_interrupt": "discard"}
    return {
        "edit-friendly": node("LEDITS_EditFriendlyInversion", **PROMPTS, **LEVELS, cfg=1.0, eta=1.0, seed=0,
                              steps_at_once=2),
        "ddim": node("LEDITS_DDIMInversion", **PROMPTS, **LEVELS, **DDIM, cfg=1.0, path="re-simulated",
                     **{"path.edit_cfg": 1.0}),
        "offset": node("LEDITS_DirectInversion", **PROMPTS, **LEVELS, **DDIM, cfg=1.0, ablation="target side",
                       **{"ablation.edit_cfg": 1.0}),
        "npi": node("LEDITS_NegativePromptInversion", **PROMPTS, **LEVELS, **DDIM, cfg=1.0, path="inverted",
                    interpolation=1.0),
        "null": node("LEDITS_NullTextInversion", **learned, inner_steps=3),
        "style": node("LEDITS_StyleDiffusionInversion", **learned, first_steps=2, attention_loss=0.0, tau_v=0.5),
    }


def edits():
    path = {"inversion": ["npi", 0], "skip": STEPS - EDITED}
    control = {"attention": ["control", 0]}
    return {
        "control": node("LEDITS_PlugAndPlay", pnp_f_t=1.0, pnp_attn_t=1.0, source=["words", 0]),
        "plain": node("LEDITS_KSampler", **EDIT, **path),
        "live": node("LEDITS_KSampler", **EDIT, **path, **control),
        "capture": node("LEDITS_CaptureAttention", model=["model", 0], negative=["empty", 0], **path, **control),
        "kept": node("LEDITS_KSampler", **EDIT, **path, **control, store=["capture", 0]),
        "guider": node("LEDITS_Guider", **EDIT),
        "sampler": node("LEDITS_Sampler", **path, **control),
        "noise": node("DisableNoise"),
        "custom": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0],
                       sigmas=["sampler", 1], latent_image=["npi", 1]),
        "sweep": node("LEDITS_Sweep", **{k: v for k, v in EDIT.items() if k != "cfg"}, inversion=["npi", 0],
                      vae=["model", 2], skip_values="2, 1", cfg_values="1, 5"),
        "stock": node("KSampler", **EDIT, seed=0, steps=3, sampler_name="euler", scheduler="normal", denoise=1.0,
                      latent_image=["latent", 0]),
    }


SLOTS = {"sweep": 1} | dict.fromkeys(inversions(), 1)


def saved(graph, *names):
    """The graph with an output node behind each of some nodes."""
    return graph | {f"{name} saved": node("SaveLatent", samples=[name, SLOTS.get(name, 0)], filename_prefix="feedback")
                    for name in names}


@pytest.fixture(scope="module")
def ran(client):
    """The history's entry and what a client sees of every inversion, of capture, of the edits and of saving."""
    graph = base() | inversions() | edits() | {
        "saved": node("LEDITS_SaveInversion", inversion=["npi", 0], filename_prefix="words/kept", dtype="float32"),
        "saved store": node("LEDITS_SaveAttentionStore", store=["capture", 0], filename_prefix="words/kept", dtype="float16"),
    }
    names = [*inversions(), "plain", "live", "kept", "custom", "sweep", "stock"]
    (found,) = listen(client, saved(graph, *names))
    return found


@pytest.fixture(scope="module")
def seen(ran):
    return ran[1]


RUNNING = [*inversions(), "plain", "live", "capture", "kept", "custom", "sweep", "stock"]


@pytest.mark.parametrize("name", RUNNING)
def test_progress_advances_to_its_end(seen, name):
    """...in each phase: a node that samples twice has two bars."""
    bars = [[]]
    for value, most in seen.progress[name]:
        if bars[-1] and (most != bars[-1][-1][1] or value <= bars[-1][-1][0]):
            bars.append([])
        bars[-1].append((value, most))
    assert len(bars) == (2 if name in ("ddim", "offset") else 1)
    for bar in bars:
        assert bar[-1][0] == bar[0][1] > 1
        assert len(bar) > 1 or name == "capture" or (name == "offset" and bar is bars[1])  # all steps fit into one call


@pytest.mark.parametrize("name", RUNNING)
def test_previews_come_with_progress_as_with_the_stock_sampler(seen, name):
    assert seen.previews[name] == len(seen.progress[name]) > 0


def test_progress_counts_what_is_evaluated(seen):
    def values(name):
        return [value for value, _ in seen.progress[name]]

    assert seen.progress["stock"] == [(1, 3), (2, 3), (3, 3)] == seen.progress["plain"]
    assert seen.progress["kept"] == seen.progress["plain"]
    assert seen.progress["live"][-1] == (2 * EDITED, 2 * EDITED)  # the source's steps count as the target's
    assert values("edit-friendly") == [2, 4]  # two steps at once
    # two steps of the path, then Adam steps: three for each step
    assert values("null") == [1, 2, 3, 4, 5, 6, 7, 8]
    # 2 and 3 steps at two scales each
    assert seen.progress["sweep"] == [(n, 10) for n in range(1, 11)]


PHASES = {
    "edit-friendly": ["inverting 2/4", "inverting 4/4"],
    "ddim": ["inverting 1/4", "inverting 4/4", "sampling the source 1/4", "sampling the source 4/4"],
    "offset": ["inverting 4/4", "measuring the offset 4/4"],
    "npi": ["inverting 1/4", "inverting 4/4"],
    "null": ["inverting 2/2", "null-text step 1/2, try 3/3", "null-text step 1/2, loss N",
             "null-text step 2/2, try 1/3, loss N", "null-text step 2/2, loss N"],
    "style": ["inverting 2/2", "StyleDiffusion step 1/2, try 1/2", "StyleDiffusion step 2/2, loss N"],
    "plain": ["editing 1/3", "editing 2/3", "editing 3/3"],
    "live": ["source pass, steps 1 to N of 3", "editing 1/3", "editing 3/3"],
    "capture": ["capturing 3/3"],
    "kept": ["editing 1/3", "editing 3/3"],
    "custom": ["source pass, steps 1 to N of 3", "editing 1/3", "editing 3/3"],
    "sweep": ["1 of 4: editing 1/2", "2 of 4: editing 2/2", "3 of 4: editing 1/3", "4 of 4: editing 3/3"],
}


@pytest.mark.parametrize("name", PHASES)
def test_the_phase_is_named_on_the_node(seen, name):
    told = [re.sub(r"(?<=loss )\d\.\de[-+]\d\d|(?<=to )\d", "N", text) for text in seen.texts[name]]
    wanted = iter(told)
    assert all(phase in wanted for phase in PHASES[name]), told  # all of them, in this order
    if name != "custom":  # ComfyUI's own node
        assert told[0] == "loading the model"
        assert re.fullmatch(r"done: \d+ steps(?: from noise level [\d.]+)?, \d+ network evaluations?", told[-1])
    assert ("source pass" in " ".join(told)) == (name in ("live", "custom"))


@pytest.mark.parametrize("name", [*inversions(), "plain", "live", "capture", "kept", "sweep", "saved", "saved store"])
def test_the_last_words_are_kept_in_the_history(ran, name):
    """...where the web extension finds them when the job is over."""
    entry, seen = ran
    assert entry["outputs"][name]["ledits_words"] == seen.texts[name][-1:] != []


@pytest.mark.parametrize("name, key", [("saved", "inversions"), ("saved store", "stores")])
def test_a_saved_file_is_named_with_its_folder(ran, name, key):
    output = ran[0]["outputs"][name]
    (file,), (words,) = output[key], output["ledits_words"]
    assert words.splitlines()[:2] == ["saved in ComfyUI's output folder:", f"words/{file['filename']}"]
    assert re.match(r"kept_\d{5}_\.ledits", file["filename"])


def test_the_server_offers_the_web_extension_and_the_help_pages(client):
    served = f"/extensions/{dev.PACK}"
    assert f"{served}/js/ledits.js" in client.ask_json("/extensions")
    for path in ("js/ledits.js", "docs/LEDITS_KSampler.md"):
        with urllib.request.urlopen(f"{client.url}{served}/{path}") as answer:
            assert answer.read() == (dev.ROOT / "web" / path).read_bytes()


def test_words_count_in_the_singular():
    from comfyui_ledits.nodes.feedback import costs
    assert costs(1, 1)["ledits_words"] == ["done: 1 step, 1 network evaluation"]
    assert costs(0, 2, level=0.51234, note="Why")["ledits_words"] == [
        "done: 2 steps from noise level 0.512, 0 network evaluations. Why"]


def test_a_changed_edit_does_not_invert_again(client):
    """Two prompts in the queue at once: the second evaluates the U-Net for its edit only."""
    def graph(cfg):
        found = base() | {name: inversions()[name] for name in ("edit-friendly",)}
        found["edit-friendly"]["inputs"] |= {"cfg": 2.0, "seed": 77}  # not cached by another test
        found["edit"] = node("LEDITS_KSampler", **EDIT | {"cfg": cfg}, inversion=["edit-friendly", 0], skip=1)
        return saved(found, "edit")

    (first, saw), (second, then) = listen(client, graph(5.0), graph(6.0))

    def rows(entry):
        cached = dict(entry["status"]["messages"])["execution_cached"]["nodes"]
        return {name: report["ledits"][0]["unet_rows"] for name, report in entry["outputs"].items()
                if "ledits" in report and name not in cached}

    assert rows(first) == {"edit-friendly": 2 * STEPS, "edit": 2 * EDITED}
    assert rows(second) == {"edit": 2 * EDITED}
    assert {"edit-friendly", "edit"} <= set(saw.ran)
    assert "edit" in then.ran and "edit-friendly" not in then.ran
    assert not then.progress["edit-friendly"] and then.progress["edit"][-1] == (EDITED, EDITED)
