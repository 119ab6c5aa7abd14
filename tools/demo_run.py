"""Edit the demo pictures through a running ComfyUI server, with the example workflows.

    python dev.py demo                                            # starts a server and runs this
    python tools/run.py demo_run --server http://127.0.0.1:8188 --output output [PICTURE ...]

Writes every result and one contact sheet, and prints what was measured. Needs numpy, scipy and Pillow.
"""

import argparse
import io
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ..demo import pictures
from . import contact_sheet, measure
from .api import workflow
from .api.client import ComfyClient, ComfyError, seconds_of

WORKFLOWS = Path(__file__).resolve().parents[1] / "example_workflows"
CONCEPTS, PROMPT = "LEDITS concepts (demo model)", "LEDITS prompt and concepts (demo model)"
FLOWEDIT = "FlowEdit (demo model)"
RECONSTRUCTION = "reconstruction"


def surface(entry):
    """A surface pattern that the edited thing does not have."""
    return "dotted" if entry["scene"]["things"][0]["pattern"] == "striped" else "striped"


# name, workflow, what is set in it for a picture ({title of a node: {input: value}}), words for the contact sheet
EDITS = (
    ("concept", CONCEPTS, lambda e: {"Concept": {"prompt": e["edit"]["target"]}},
     lambda e: f"concept: {e['edit']['target']}"),
    ("concept in two words", CONCEPTS, lambda e: {"Concept": {"prompt": e["edit"]["fragment"]}},
     lambda e: f"concept: {e['edit']['fragment']}"),
    ("prompt", PROMPT, lambda e: words(e) | {"Concept": {"prompt": surface(e), "weight": 0.0}},
     lambda e: f"prompt: {e['edit']['target']}"),
    ("prompt and concept", PROMPT, lambda e: words(e) | {"Concept": {"prompt": surface(e)}},
     lambda e: f"prompt, and concept: {surface(e)}"),
    ("FlowEdit", FLOWEDIT, lambda e: words(e), lambda e: f"FlowEdit, flow model: {e['edit']['target']}"),
)


def words(entry):
    return {"Source prompt": {"text": entry["caption"]}, "Target prompt": {"text": entry["edit"]["target"]}}


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="address of a ComfyUI with this pack")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the results")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="such as red_star; all where none is named")
    return parser.parse_args(arguments)


def chosen(names):
    """The entries of truth.json with these names.

    Raises:
        ComfyError: an unknown name.
    """
    entries = {Path(entry["file"]).stem: entry for entry in pictures.load()}
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise ComfyError(f"There is no demo picture {', '.join(unknown)}: choose of {', '.join(entries)}.")
    return {name: entries[name] for name in names or entries}


def example(name, object_info):
    """The prompt of an example workflow, whatever number its file name begins with."""
    found = [path for path in sorted(WORKFLOWS.glob("*.json")) if re.sub(r"^\d+ ", "", path.stem) == name]
    if not found:
        raise ComfyError(f"The example workflow '{name}' is missing in {WORKFLOWS}: install the pack again.")
    return workflow.to_prompt(workflow.read(found[0]), object_info)


def picture_of(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255


class Result:
    """The result of one run of a workflow."""

    def __init__(self, client, prompt, entry):
        self.client, self.prompt, self.outputs = client, prompt, entry["outputs"]
        self.seconds = seconds_of(entry)

    def _of(self, title):
        for key in workflow.find(self.prompt, title=title):
            if key in self.outputs:
                return self.outputs[key]
        raise ComfyError(f"The workflow's node '{title}' gave no result: look at the server's log.")

    def file(self, title):
        """The bytes of the picture that a Save Image node saved."""
        return self.client.fetch(self._of(title)["images"][0])

    def rows(self):
        """Network rows that this run evaluated: of the edit, and of inversion and reconstruction.

        Nodes whose result ComfyUI reused from an earlier run report nothing.
        """
        of = {key: sum(r["unet_rows"] for r in found.get("ledits", ())) for key, found in self.outputs.items()}
        edit = sum(of.get(key, 0) for key in workflow.find(self.prompt, title="Edit"))
        return edit, sum(of.values()) - edit


def measured(entry, source, edited, rows, seconds):
    """The numbers of one edit, by column of the table."""
    mask = pictures.draw(entry)[1][0]
    return {
        "change inside": measure.change(source, edited, mask),
        "PSNR outside": measure.psnr(source, edited, measure.outside(mask[None])),
        "colour": float(measure.has_colour(edited, mask, entry["edit"]["colour"])),
        "edit rows": rows[0],
        "other rows": rows[1],
        "seconds": seconds,
    }


COLUMNS = ("change inside", "PSNR outside", "colour", "edit rows", "other rows", "seconds")
HEAD = f"{'picture':32}{'edit':22}" + "".join(f"{name:>14}" for name in COLUMNS)
LEGEND = """
change inside   mean absolute difference to the picture inside the edited thing, 0 to 1
PSNR outside    of everything but the edited thing, to the picture
colour          whether most of the thing has the asked-for colour, as measured
edit rows       network rows (pictures x predictions) of the edit; other rows: of inversion and reconstruction. ComfyUI
                reuses those where picture and source prompt stay the same
"""


def line(name, edit, row, share=False):
    colour = f"{100 * row['colour']:.0f} %" if share else ("yes" if row["colour"] else "no")
    return (f"{name:32}{edit:22}{row['change inside']:14.3f}{row['PSNR outside']:11.1f} dB{colour:>14}"
            f"{row['edit rows']:14.0f}{row['other rows']:14.0f}{row['seconds']:14.1f}")


def edit_picture(client, prompts, name, entry, number, output):
    """Every edit of one picture: the cells of its line in the contact sheet, its rows of the table, and the
    reconstruction's PSNR."""
    source = picture_of((pictures.FOLDER / entry["file"]).read_bytes())
    cells, rows, reconstruction = [(entry["caption"], source)], {}, None

    def keep(data, what):
        (output / f"{name} - {what}.png").write_bytes(data)
        return picture_of(data)

    for edit, which, changes, label in EDITS:
        settings = {"Source picture": {"picture": name}, "Inversion": {"seed": number}} | changes(entry)
        prompt = workflow.with_inputs(prompts[which], settings)
        result = Result(client, prompt, client.run(prompt, progress=waiting(name, edit)))
        if reconstruction is None:
            rebuilt = keep(result.file("Save reconstruction"), RECONSTRUCTION)
            reconstruction = measure.psnr(source, rebuilt)
            cells.append((f"reconstruction, {reconstruction:.1f} dB", rebuilt))
        edited = keep(result.file("Save edit"), edit)
        cells.append((label(entry), edited))
        rows[edit] = measured(entry, source, edited, result.rows(), result.seconds)
        say(line(name, edit, rows[edit]))
    say(f"{name:32}{RECONSTRUCTION:22}{'':14}{reconstruction:11.1f} dB (whole picture)")
    return cells, rows, reconstruction


def waiting(name, edit):
    """A progress function: on a terminal one line that changes, elsewhere nothing."""
    if not sys.stdout.isatty():
        return None
    return lambda seconds: print(f"\r{name}, {edit}: {seconds:.0f} s ...", end="", flush=True)


def say(text):
    print(("\r" + text) if sys.stdout.isatty() else text, flush=True)


def main(arguments):
    options = parse(arguments)
    entries = chosen(options.pictures)
    options.output.mkdir(parents=True, exist_ok=True)
    client = ComfyClient(options.server)
    object_info = client.object_info()
    prompts = {name: example(name, object_info) for name in {which for _, which, *_ in EDITS}}
    say(f"Editing {len(entries)} pictures, {len(EDITS)} edits each.\n{LEGEND}\n{HEAD}")
    lines, table, rebuilt = [], {edit: [] for edit, *_ in EDITS}, []
    for number, (name, entry) in enumerate(entries.items()):
        cells, rows, psnr = edit_picture(client, prompts, name, entry, number, options.output)
        lines.append(cells)
        rebuilt.append(psnr)
        for edit, row in rows.items():
            table[edit].append(row)
    say(f"\nThe mean of {len(entries)} pictures\n{HEAD}")
    for edit, rows in table.items():
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        say(line("", edit, mean, share=True))
    say(f"{'':32}{RECONSTRUCTION:22}{'':14}{np.mean(rebuilt):11.1f} dB (whole picture)")
    path = options.output / "contact sheet.png"
    contact_sheet.draw(["source", RECONSTRUCTION, *(edit for edit, *_ in EDITS)], lines).save(path)
    say(f"\nThe pictures and the contact sheet are in {options.output}: open {path.name}.")
    return 0
