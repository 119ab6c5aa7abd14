"""Tiny text encoders of flow models, of ComfyUI's own classes: real tokenizers and numbers of rows, random weights.

    clip = text_encoders.clip("sd3")     # CLIP

SentencePiece models that come with a checkpoint are trained here, on a few sentences.
"""
import functools
import importlib
import io
import random

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import pytest
import sentencepiece
import tokenizers
import torch
import transformers

ALL = ["flux", "sd3", "chroma", "aura", "wan", "qwen", "omnigen2", "zimage", "klein", "flux2", "krea2", "lumina2", "hidream",
       "hunyuan"]
WIDE = 4096  # SD3 pads CLIP's rows to T5's width, which is fixed
LLAMA = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=1, num_key_value_heads=1)
T5 = dict(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1)
LIKE_CLIP = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
# kind: (module of comfy.text_encoders, tokenizer, class or maker of the networks, its arguments, {network: settings})
KINDS = {
    "flux": ("flux", "FluxTokenizer", "flux_clip", {}, {"clip_l": LIKE_CLIP, "t5xxl": T5}),
    "sd3": ("sd3_clip", "SD3Tokenizer", "sd3_clip", {}, {"clip_l": LIKE_CLIP, "clip_g": LIKE_CLIP,
                                                        "t5xxl": {**T5, "d_model": WIDE}}),
    "chroma": ("pixart_t5", "PixArtTokenizer", "pixart_te", {}, {"t5xxl": T5}),
    "aura": ("aura_t5", "AuraT5Tokenizer", "AuraT5Model", None, {"pile_t5xl": T5}),
    "wan": ("wan", "WanT5Tokenizer", "te", {}, {"umt5xxl": {**T5, "vocab_size": 1000}}),
    "qwen": ("qwen_image", "QwenImageTokenizer", "te", {}, {"qwen25_7b": LLAMA}),
    "omnigen2": ("omnigen2", "Omnigen2Tokenizer", "te", {}, {"qwen25_3b": LLAMA}),
    "zimage": ("z_image", "ZImageTokenizer", "te", {}, {"qwen3_4b": LLAMA}),
    "klein": ("flux", "KleinTokenizer", "klein_te", {}, {"qwen3_4b": {**LLAMA, "num_hidden_layers": 36}}),
    "flux2": ("flux", "Flux2Tokenizer", "flux2_te", {}, {"mistral3_24b": {**LLAMA, "num_hidden_layers": 40,
                                                                         "vocab_size": 1000}}),
    "krea2": ("krea2", "Krea2Tokenizer", "te", {}, {"qwen3vl_4b": {**LLAMA, "num_hidden_layers": 36}}),
    "lumina2": ("lumina2", "LuminaTokenizer", "te", {}, {"gemma2_2b": {**LLAMA, "vocab_size": 1000}}),
    "hidream": ("hidream", "HiDreamTokenizer", "hidream_clip", {}, {"clip_l": LIKE_CLIP, "clip_g": LIKE_CLIP, "t5xxl": T5,
                                                                   "llama": LLAMA}),
    "hunyuan": ("hunyuan_video", "HunyuanVideoTokenizer", "hunyuan_video_clip", {}, {"clip_l": LIKE_CLIP, "llama": LLAMA}),
    "anima": ("anima", "AnimaTokenizer", "te", {}, {"qwen3_06b": LLAMA}),
}
SENTENCES = ["a cat sitting on a bench, red hat", "a dog runs in the park at night", "two silver spoons and 3 forks, a ginger-cat",
             "an oil painting of a schnauzer; it's old", "You are an assistant designed to generate superior images.",
             "caf\u00e9 au lait \u65e5\u672c\u306e\u732b"] + ["<Prompt Start> the quick brown fox, 12:30 (blue sky)"]


def clip(kind, embeddings=None, **arguments):
    """A CLIP of one of the KINDS, float32, on the CPU.

    Args:
        embeddings: a folder.
        arguments: of the maker of the networks, such as `t5=False`.
    """
    name, tokenizer, model, own, settings = KINDS[kind]
    module = pytest.importorskip(f"comfy.text_encoders.{name}", reason=f"this ComfyUI has no text encoders for {kind}")
    model = getattr(module, model)
    model = model if own is None else model(**own, **arguments)
    target = comfy.supported_models_base.ClipTarget(getattr(module, tokenizer), model)
    options = {f"{network}_model_config": its for network, its in settings.items()} | {"dtype": torch.float32}
    clip = comfy.sd.CLIP(target, embedding_directory=embeddings, tokenizer_data=tokenizer_data(kind), model_options=options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, p in clip.cond_stage_model.named_parameters():
            if ".visual." in path:
                continue
            if p.ndim == 2 and p.numel() > 2**25:  # an embedding as wide as SD3's: a few rows in turn
                few = torch.randn(1, p.shape[1], generator=generator).expand(p.shape)
                layer, _, last = path.rpartition(".")
                setattr(clip.cond_stage_model.get_submodule(layer), last, torch.nn.Parameter(few, requires_grad=False))
            elif p.ndim > 1:
                p.normal_(generator=generator).mul_(p.shape[-1] ** -0.5)
            else:
                p.fill_(1 if path.endswith("weight") else 0)
    return clip


def tokenizer_data(kind):
    """What ComfyUI's tokenizers take from a checkpoint."""
    if kind == "wan":
        return {"spiece_model": spiece_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=False)}
    if kind == "lumina2":
        return {"spiece_model": spiece_model(pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, vocab_size=500,
                                             add_dummy_prefix=False, remove_extra_whitespaces=False)}
    return {"mistral3_24b_tokenizer_class": Mistral} if kind == "flux2" else {}


@functools.cache
def spiece_model(**settings):
    """A SentencePiece model as it lies in a checkpoint: bytes in a tensor."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=out, hard_vocab_limit=False, minloglevel=2,
        **{"vocab_size": 200, **settings})
    return torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8)


class Mistral(comfy.sd1_clip.SDTokenizer):
    """ComfyUI's tokenizer for Mistral around a tiny model. (Its own reads tekken only with older transformers.)"""

    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__("", pad_with_end=False, embedding_directory=embedding_directory, embedding_size=5120,
                         embedding_key="mistral3_24b", tokenizer_class=Tekken, has_end_token=False, pad_to_max_length=False,
                         pad_token=11, start_token=1, max_length=99999999, min_length=1, pad_left=True,
                         tokenizer_data=tokenizer_data)

    def state_dict(self):
        return {}


class Tekken:
    @staticmethod
    def from_pretrained(path):
        special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<{n}>" for n in range(5, 11)), "<pad>", "[SYSTEM_PROMPT]",
                   "[/SYSTEM_PROMPT]"]
        made = byte_level(special, 500)
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def byte_level(special, size):
    """A small byte-level BPE tokenizer of the `tokenizers` library."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(SENTENCES * 20, tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return made


def module(name):
    return importlib.import_module(f"comfy.text_encoders.{name}")


LETTERS = "cat dog sofa Schnauzer un-believable ginger-cat pig's they'll caf\u00e9 na\u00efve \u00dcber garc\u0327on 2024 3.5 12:30 \
x_y \u201cquoted\u201d \"quoted\" e.g. red, blue; (grey) ... !? -- a I \u00bd \ufb01sh \u00c5ngstr\u00f6m".split()
CJK = "\u65e5\u672c\u306e\u732b \u732b \uff76\uff9e \ud55c\uad6d\uc5b4 \u0440\u044b\u0436\u0438\u0439 \U0001f431 \U0001f468\u200d\U0001f469\u200d\U0001f467 \
\u2764\ufe0f \u0928\u092e\u0938\u094d\u0924\u0947 \u0e41\u0e21\u0e27 \u01b0\u1edbu ti\u1ebfng".split()


def random_prompt(number, weights=True):
    """A prompt of the words above, the same for the same number."""
    draw = random.Random(number)
    words = []
    for _ in range(draw.randint(1, 25)):
        word = draw.choice(LETTERS if draw.random() < 0.8 else CJK)
        if draw.random() < 0.2:
            word += draw.choice([",", ".", "!", "...", "'s"])
        if weights and draw.random() < 0.15 and not set(word) & set("()"):
            word = draw.choice(["({}:1.3)", "({})", "(({}:0.7) more:1.1)", "\\({}\\)"]).format(word)
        words += [word, draw.choice([" ", " ", " ", " ", "  ", "\n", ""])]
    return "".join(words)


def encoded(clip, text):
    """The CONDITIONING of a text."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))
