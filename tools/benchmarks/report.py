"""What a run found: the paper's table as Markdown and CSV, published rows beside ours, and a contact sheet for every
type of edit.
"""

import csv
import math
from dataclasses import dataclass

import numpy as np

from ...evaluation.metrics import METRICS
from ...evaluation.table import mean_of
from .. import contact_sheet
from . import piebench
from .runner_work import TRUTH

TABLE = ("structure_distance", "psnr_unedit_part", "lpips_unedit_part", "mse_unedit_part", "ssim_unedit_part",
         "clip_similarity_target_image", "clip_similarity_target_image_edit_part")
"""Columns of the Direct Inversion paper's table, in its order."""
PUBLISHED = {
    "ddim+p2p": (69.43, 17.87, 208.80, 219.88, 71.14, 25.01, 22.44),
    "null-text+p2p": (13.44, 27.03, 60.67, 35.86, 84.11, 24.75, 21.86),
    "negative-prompt+p2p": (16.17, 26.21, 69.01, 39.73, 83.40, 24.61, 21.87),
    "stylediffusion+p2p": (11.65, 26.05, 66.10, 38.63, 83.42, 24.78, 21.72),
    "direct+p2p": (11.65, 27.22, 54.55, 32.86, 84.76, 25.02, 22.10),
    "ddim+masactrl": (28.38, 22.17, 106.62, 86.97, 79.67, 23.96, 21.16),
    "direct+masactrl": (24.70, 22.64, 87.94, 81.09, 81.33, 24.38, 21.35),
    "ddim+pix2pix-zero": (61.68, 20.44, 172.22, 144.12, 74.67, 22.80, 20.54),
    "direct+pix2pix-zero": (49.22, 21.53, 138.98, 127.32, 77.05, 23.31, 21.05),
    "ddim+pnp": (28.22, 22.28, 113.46, 83.64, 79.05, 25.41, 22.55),
    "direct+pnp": (24.29, 22.46, 106.06, 80.45, 79.68, 25.41, 22.62),
}
"""Table of arXiv 2310.01506 (700 pictures, SD 1.4, Plug-and-Play SD 1.5), scaled as there; columns of TABLE."""
TRUTH_HEADINGS = {"success": "edit made %", "kept": "rest right %", "target_psnr": "PSNR to true target"}
LINES = 12  # pictures in a contact sheet


@dataclass(frozen=True)
class Column:
    """One column of the table: values of the results times `scale`."""

    name: str
    heading: str
    scale: float
    better: int  # +1 where more is better, -1 where less is


def columns(rows, every=False):
    """The columns of a table that have values: the published ones, or all metrics, and Demo-Bench's truth."""
    names = [*TABLE, *(name for name in METRICS if name not in TABLE)] if every else TABLE
    found = [Column(name, METRICS[name].heading, METRICS[name].scale, METRICS[name].better) for name in names]
    found += [Column(name, TRUTH_HEADINGS[name], 1.0 if name == "target_psnr" else 100.0, 1) for name in TRUTH]
    return [c for c in found if c.name in TABLE or any(not math.isnan(value(row, c)) for row in rows)]


def value(row, column):
    """The number of a line of results, scaled; nan where there is none."""
    text = row.get(column.name, "")
    return float(text) * column.scale if text not in ("", None) else math.nan


def mean(rows, column):
    """Mean over the lines that have a value; nan where none has."""
    return mean_of(value(row, column) for row in rows)


def table(rows, chosen, every=False):
    """Columns, and the lines of the table: [(method, "ours" or "published", pictures, values)]."""
    shown, lines = columns(rows, every), []
    for method in chosen:
        own = [row for row in rows if row["method"] == method]
        lines.append((method, "ours", len(own), [mean(own, column) for column in shown]))
        if method in PUBLISHED:
            known = dict(zip(TABLE, PUBLISHED[method]))
            lines.append((method, "published", 700, [known.get(column.name, math.nan) for column in shown]))
    return shown, lines


def write(book, items, chosen, scoring):
    """Write table.md, table.csv and the contact sheets; the text of the table."""
    keys = {item.key for item in items}
    rows = [row for row in book.rows.values() if row["key"] in keys and row["method"] in chosen]
    shown, lines = table(rows, chosen, scoring.every)
    whole = _markdown(shown, lines)
    if any(row["success"] for row in rows):
        whole += "\n" + _by_type(rows, chosen)
    (book.folder / "table.md").write_text(whole, "utf-8")
    with open(book.folder / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "whose", "pictures", *(column.heading for column in shown)])
        for method, whose, count, values in lines:
            writer.writerow([method, whose, count, *("" if math.isnan(v) else f"{v:.6g}" for v in values)])
    _sheets(book, items, chosen)
    return whole


def _markdown(shown, lines):
    head = ["method", "", "pictures", *(column.heading for column in shown)]
    out = [head, ["---"] * 3 + ["---:"] * len(shown)]
    for method, whose, count, values in lines:
        cells = ["-" if math.isnan(v) else f"{v:.2f}" for v in values]
        out.append([method if whose == "ours" else "", whose, str(count), *cells])
    more, less = (", ".join(c.heading for c in shown if c.better == sign) for sign in (1, -1))
    return _lines(out) + f"\nMore is better: {more}. Less is better: {less}.\n"


def _lines(cells):
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def _by_type(rows, chosen):
    """Share of edits that were made, by type of edit."""
    kinds = sorted({int(row["type"]) for row in rows})
    success = Column("success", "", 100.0, 1)
    out = [["edit made %", *(piebench.TYPES[kind] for kind in kinds)], ["---"] + ["---:"] * len(kinds)]
    for method in chosen:
        own = [row for row in rows if row["method"] == method]
        cells = [mean([row for row in own if int(row["type"]) == kind], success) for kind in kinds]
        out.append([method, *("-" if math.isnan(v) else f"{v:.0f}" for v in cells)])
    return _lines(out)


def _sheets(book, items, chosen):
    """sheets/<type>.jpg: for every picture the source, the true target where there is one, and every method's edit."""
    folder = book.folder / "sheets"
    for kind in sorted({item.type for item in items}):
        own = [item for item in items if item.type == kind]
        own = [item for item in own if any(book.edit_path(item.key, m).is_file() for m in chosen)][:LINES]
        if not own:
            continue
        made = [method for method in chosen if any(book.edit_path(item.key, method).is_file() for item in own)]
        true = [_true_target(item) for item in own]
        heads = ["source", *(["true target"] if any(true) else []), *made]
        lines = [_line(book, item, made, path, any(true)) for item, path in zip(own, true)]
        folder.mkdir(exist_ok=True)
        name = f"{kind}_{piebench.TYPES[kind].replace(' ', '_')}.jpg"
        contact_sheet.draw(heads, lines).save(folder / name, quality=85)


def _true_target(item):
    """The path of Demo-Bench's true target, or None."""
    if item.truth is None:
        return None
    path = item.path.parents[2] / "targets" / item.truth["target"]
    return path if path.is_file() else None


def _line(book, item, made, true, with_truth):
    cells = [_cell(item.source, item.path)]
    if with_truth:
        cells.append(_cell(item.target, true))
    for method in made:
        row = book.rows.get((item.key, method), {})
        words = item.target if not row.get("success") else "made" if float(row["success"]) else "not made"
        cells.append(_cell(words, book.edit_path(item.key, method), "failed"))
    return cells


def _cell(words, path, otherwise="cannot be read"):
    """(words, picture) of an image file; an empty cell where it is missing or damaged."""
    try:
        return words, piebench.picture_of(path.read_bytes())
    except Exception:  # Pillow has many for a damaged file
        return words if path is None else otherwise, np.ones((8, 8, 3), np.float32)
