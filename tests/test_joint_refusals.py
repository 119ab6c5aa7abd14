"""What attention control on transformers of flow models cannot do right is refused in words."""
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_ledits.attention_hooks import backbones
from comfyui_ledits.attention_hooks.controls.local_blend import LocalBlend
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from comfyui_ledits.attention_hooks.controls.record import Record
from oracles.joint_softmax import KINDS
from support import editing, flow_editing, tiny_flow

EVERY = (0.0, 1.0)


def test_video_has_no_maps_of_words():
    path, words = flow_editing.path("wan"), flow_editing.prompts("wan")
    for control in (Record(prompts=words), PromptToPrompt(prompts=words, blend=LocalBlend(words=("wa",)))):
        with pytest.raises(ValueError, match="3 frames"):
            flow_editing.edit("wan", path, words, [control])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("sd3", "wan", "hidream")])
@pytest.mark.parametrize("of", ["source", "target"])
def test_tokens_that_are_not_the_prompts_are_refused(kind, of):
    """A patch takes the last words away from one of the two: the picture's tokens would be looked for beside their places."""
    path, words = flow_editing.path(kind, 1, 1), flow_editing.prompts(kind, 12, 12)
    model, source = tiny_flow.model(kind).clone(), words.source[0][0]

    def shorter(executor, x, t, context, *args, **kwargs):
        is_source = context.shape[1] >= 12 and torch.equal(context[:, -12:], source.to(context))
        if kind == "zimage":  # padded to 32 for up to 32 words
            context = torch.cat([context] * 3, 1) if is_source == (of == "source") else context
        elif is_source == (of == "source"):
            context = context[:, :-2]
        return executor(x, t, context, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", shorter)
    with pytest.raises(ValueError, match="tokens beside the picture where its prompt makes"):
        editing.run(model, path, words.target, words.target, 1.0, [PlugAndPlay(prompts=words, features=(0, 0), attention=EVERY)])


def test_another_text_added_to_the_prompt_is_refused():
    """A conditioning of more tokens than the prompt: only Flux.2 pads in front."""
    backbone = backbones.of(tiny_flow.model("flux").model)
    assert backbone.positions(12, 12, 12)[0].tolist() == list(range(12))
    with pytest.raises(ValueError, match="12 tokens and its conditioning 20"):
        backbone.positions(12, 20, 20)
    padded = backbones.of(tiny_flow.model("flux2").model).positions(12, 512, 512)[0]
    assert padded[:500].eq(-1).all() and padded[500:].tolist() == list(range(12))


def test_what_is_not_known_is_refused():
    model = tiny_flow.made("wan").model
    assert backbones.of(model)
    model.diffusion_model.model_type = "i2v"
    with pytest.raises(ValueError, match="does not know how WAN21"):
        backbones.of(model)
    with pytest.raises(ValueError, match="below 0 has no meaning"):
        words = flow_editing.prompts("flux")
        flow_editing.edit("flux", flow_editing.path("flux"), words, [PromptToPrompt(prompts=words, equalizer=(("wa", -1.0),))])
