"""Every language in locales/ translates every node and socket, and nothing else."""
import json
import re
import urllib.request

import pytest
from comfyui_ledits.tools import schema_snapshot, translations

import dev

TEXTS = translations.english(schema_snapshot.node_infos())
LANGUAGES = translations.languages()
REFRESH = "Run `python dev.py translations`, translate what is empty in locales/{}/phrases.json, and run it again:"
MAIN_PAGES = ("EditFriendlyInversion", "DDIMInversion", "DirectInversion", "NullTextInversion", "SemanticConcept",
              "EditPrompts", "PromptToPrompt", "MasaCtrl", "PlugAndPlay", "KSampler")


def read(language, name):
    return json.loads((translations.LOCALES / language / name).read_text("utf-8"))


def test_the_languages_are_those_comfyui_has():
    assert "zh" in LANGUAGES
    assert set(LANGUAGES) <= {"zh", "zh-TW", "ja", "ko", "fr", "de", "es", "ru", "ar", "tr", "pt-BR"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_everything_is_translated(language):
    gaps = translations.missing(TEXTS, translations.read(language))
    assert not gaps, "\n".join([REFRESH.format(language), *gaps])


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_translated_that_is_not_there(language):
    old = translations.stale(TEXTS, translations.read(language))
    assert not old, "\n".join(["The English of these was changed, or they are gone:", *old])


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_comfyui_reads_is_made_from_the_phrases(language):
    assert read(language, "nodeDefs.json") == translations.node_defs(TEXTS, translations.read(language)), REFRESH.format(language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_keys_are_those_of_the_nodes(language):
    """Against ComfyUI's own description of each node, apart from how translations.py walks it."""
    infos = schema_snapshot.node_infos()
    defs = read(language, "nodeDefs.json")
    assert defs.keys() == infos.keys()
    for node, words in defs.items():
        top = infos[node]["input_order"]
        names = {*top.get("required", ()), *top.get("optional", ())}
        keys = set(words.get("inputs", {})) - {"control_after_generate"}
        assert names <= keys, node
        assert all(any(key.startswith(f"{name}_") for name in names) for key in keys - names), node
        assert list(words.get("outputs", {})) == [str(index) for index in range(len(infos[node]["output"]))], node


@pytest.mark.parametrize("language", LANGUAGES)
def test_categories_are_translated_that_comfyui_does_not_have(language):
    words = {word for info in schema_snapshot.node_infos().values() for word in info["category"].split("/")}
    assert read(language, "main.json")["nodeCategories"].keys() == words - {"LEDITS", "sampling", "guidance"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_say_the_same_numbers_and_are_in_the_language(language):
    for english, translated in translations.read(language).items():
        if english in TEXTS.values() and " " in english:
            assert numbers(translated) == numbers(english), f"{english}\n{translated}"
            if len(english.split()) > 5:
                assert re.search(r"[^\x00-\x7f]", translated), f"not translated: {english}"


def numbers(text):
    return sorted(re.findall(r"\d+(?:\.\d+)*", text))


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_that_the_browser_would_take_for_a_placeholder(language):
    """vue-i18n reads braces, @ and | in all but tooltips."""
    defs = read(language, "nodeDefs.json")
    for place in TEXTS:
        if place[-1] != "tooltip":
            text = defs
            for key in place:
                text = text[key]
            assert not set(text) & set("{}@|"), place


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", MAIN_PAGES)
def test_the_main_help_pages_are_translated(language, name):
    folder = dev.ROOT / "web" / "docs"
    page, original = folder / f"LEDITS_{name}" / f"{language}.md", folder / f"LEDITS_{name}.md"
    assert page.is_file(), f"translate {original.name}"
    assert re.search(r"[^\x00-\x7f]", page.read_text("utf-8"))
    links = [set(re.findall(r"https?://[^)\s]+", file.read_text("utf-8"))) for file in (page, original)]
    assert links[0] == links[1]


def test_a_server_gives_the_browser_words_and_pages(server_url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    served = json.loads(opener.open(f"{server_url}/i18n", timeout=60).read())
    for language in LANGUAGES:
        assert served[language]["nodeDefs"] == read(language, "nodeDefs.json")
        assert "inversion" in served[language]["nodeCategories"]
        path = f"LEDITS_KSampler/{language}.md"
        page = opener.open(f"{server_url}/extensions/{dev.PACK}/docs/{path}", timeout=60).read().decode()
        assert page == (dev.ROOT / "web" / "docs" / path).read_text("utf-8")


# --- the script -----------------------------------------------------------------------------------------------------

HERE = {("N", "display_name"): "Name", ("N", "inputs", "a", "name"): "path", ("N", "outputs", "0", "name"): "path"}


def test_gaps_and_stale_phrases_are_found():
    assert translations.missing(HERE, {"Name": "n", "path": ""}) == ["path"]
    assert translations.missing(HERE, {"Name": "n", "path": "p"}) == []
    assert translations.stale(HERE, {"Name": "n", "Old": "o", "N.inputs.a.name": "p", "N.inputs.b.name": "p"}) == [
        "Old", "N.inputs.b.name"]


def test_one_phrase_may_have_two_translations():
    phrases = {"Name": "n", "path": "p", "N.outputs.0.name": "q"}
    assert translations.node_defs(HERE, phrases) == {
        "N": {"display_name": "n", "inputs": {"a": {"name": "p"}}, "outputs": {"0": {"name": "q"}}}}


def test_a_new_language_begins_with_all_phrases_and_keeps_what_was_translated(tmp_path, monkeypatch):
    monkeypatch.setattr(translations, "LOCALES", tmp_path)
    assert translations.refresh("xx", HERE) == (2, 0)
    assert translations.read("xx") == {"Name": "", "path": ""}
    translations.write("xx", "phrases.json", {"path": "p", "Gone": "g", "Name": ""})
    assert translations.refresh("xx", HERE) == (1, 1)
    assert translations.read("xx") == {"path": "p", "Name": "", "Gone": "g"}
    assert read_in(tmp_path) == {"N": {"inputs": {"a": {"name": "p"}}, "outputs": {"0": {"name": "p"}}}}


def read_in(folder):
    return json.loads((folder / "xx" / "nodeDefs.json").read_text("utf-8"))
