"""The words of nodes in other languages: `python dev.py translations [language]` brings locales/ up to date.

What a translator writes is locales/<language>/phrases.json: every English phrase of the node schemas with its
translation. From it the script makes nodeDefs.json, the file that ComfyUI reads, and adds phrases that are missing
with an empty translation. A phrase whose English was changed is missing under its new wording; the old one is moved
to the end of the file, for the translator to take words from and delete. Where one English phrase needs two
translations, the place in the schema is a phrase too and goes first, such as "LEDITS_Sampler.inputs.skip.name".

English itself is in the schemas and needs no files. Names of the input and output sockets are phrases as well.
"""
import json
from pathlib import Path

from . import inside_comfyui, schema_snapshot

LOCALES = Path(__file__).resolve().parents[1] / "locales"


def languages():
    return sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir())


def english(infos):
    """Every phrase by its place in nodeDefs.json: a tuple of keys."""
    texts = {}
    for node, info in infos.items():
        texts[node, "display_name"], texts[node, "description"] = info["display_name"], info["description"]
        for key, name, tooltip in sockets(info["input"]):
            texts[node, "inputs", key, "name"], texts[node, "inputs", key, "tooltip"] = name, tooltip
        tooltips = info["output_tooltips"] or [None] * len(info["output"])
        for index, (name, tooltip) in enumerate(zip(info["output_name"], tooltips)):
            texts[node, "outputs", str(index), "name"], texts[node, "outputs", str(index), "tooltip"] = name, tooltip
    return {place: text for place, text in texts.items() if text}


def sockets(groups, prefix=""):
    """(key, name, tooltip) of inputs. The browser writes the key of what a choice brings with _ for the dot."""
    for name, of_type, options, _ in schema_snapshot.inputs_of(groups):
        key = (prefix + name).replace(".", "_")
        yield key, options.get("display_name") or name, options.get("tooltip")
        if options.get("control_after_generate"):
            yield "control_after_generate", "control_after_generate", None
        for choice in options["options"] if of_type == "COMFY_DYNAMICCOMBO_V3" else ():
            yield from sockets(choice["inputs"], f"{prefix}{name}.")


def read(language):
    file = LOCALES / language / "phrases.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def missing(texts, phrases):
    """English phrases without a translation, in the order of the schemas."""
    missing = (t for place, t in texts.items() if not (phrases.get(".".join(place)) or phrases.get(t)))
    return list(dict.fromkeys(missing))


def stale(texts, phrases):
    """Phrases that no schema has any more."""
    known = {".".join(place) for place in texts} | set(texts.values())
    return [phrase for phrase in phrases if phrase not in known]


def node_defs(texts, phrases):
    """nodeDefs.json: what is translated, in ComfyUI's layout."""
    tree = {}
    for place, text in texts.items():
        translated = phrases.get(".".join(place)) or phrases.get(text)
        if translated:
            *folders, last = place
            branch = tree
            for folder in folders:
                branch = branch.setdefault(folder, {})
            branch[last] = translated
    return tree


def write(language, name, content):
    folder = LOCALES / language
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def refresh(language, texts):
    """Write both files; the numbers of phrases that are missing and stale."""
    phrases = read(language)
    gaps, old = missing(texts, phrases), stale(texts, phrases)
    for phrase in old:
        print(f"{language}: no longer used: {phrase}")
    for phrase in gaps:
        print(f"{language}: to translate: {phrase}")
    in_order = {text: phrases.get(text, "") for text in texts.values() if text in phrases or text in gaps}
    places = {phrase: words for phrase, words in phrases.items() if phrase not in in_order and phrase not in old}
    write(language, "phrases.json", in_order | places | {phrase: phrases[phrase] for phrase in old})
    write(language, "nodeDefs.json", node_defs(texts, phrases))
    return len(gaps), len(old)


def main(arguments):
    inside_comfyui.prepare(cpu=True)
    texts = english(schema_snapshot.node_infos())
    for language in arguments or languages():
        gaps, old = refresh(language, texts)
        done = len(set(texts.values())) - gaps
        print(f"{language}: {done} phrases translated, {gaps} to translate, {old} no longer used")
