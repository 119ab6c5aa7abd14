"""The results of a run in its folder: one line of `results.csv` and one picture for every edit, written as they come.

A run that was interrupted goes on where it ended: what is finished is read from the file, what failed is tried again.
"""

import csv
import io
import json
import os
from pathlib import Path

from .piebench import TYPES, Problem, shown
from .runner_work import COLUMNS

RESULTS, SETTINGS, EDITS = "results.csv", "settings.json", "edits"


class Book:
    """The results in a folder.

    Args:
        folder: made where it is missing.
        settings: dict of plain values that all results of a folder share.

    Raises:
        Problem: the folder holds results of other settings.
    """

    def __init__(self, folder, settings):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check(json.loads(json.dumps(settings)))
        self.rows = {(row["key"], row["method"]): row for row in self._read() if not row["error"]}
        self._write()

    def _check(self, settings):
        path = self.folder / SETTINGS
        if not path.is_file():
            _replace(path, (json.dumps(settings, indent=1) + "\n").encode())
            return
        try:
            before = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError):
            raise Problem(f"{path} cannot be read: delete {self.folder}, or choose another --output.") from None
        if other := [name for name in settings if before.get(name) != settings[name]]:
            had = ", ".join(f"{name} {before.get(name)}" for name in other)
            raise Problem(f"{self.folder} holds results made with {had}: choose another --output, or delete it.")

    def _read(self):
        """Lines of the file as {column: text}; those that an interruption or a disk has damaged are left out."""
        path = self.folder / RESULTS
        if not path.is_file():
            return []
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]  # what has no end was cut off
        rows = [cells for line in lines if (cells := _cells(line))]
        return [row for cells in rows[1:] if _sane(row := dict(zip(rows[0], cells)), len(cells) == len(rows[0]))]

    def _write(self):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(self.rows.values())
        _replace(self.folder / RESULTS, text.getvalue().encode())

    def finished(self, key, method):
        return (key, method) in self.rows

    def edit_path(self, key, method):
        return self.folder / EDITS / method / f"{key}.png"

    def add(self, result):
        """Keep a `Result`; an edit that is there already is not added again."""
        row = {name: _text(result.row.get(name)) for name in COLUMNS}
        where = row["key"], row["method"]
        if where in self.rows:
            return
        if result.edited is not None:  # before its line, which says that it is there
            path = self.edit_path(*where)
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, result.edited)
        if not row["error"]:
            self.rows[where] = row
        with open(self.folder / RESULTS, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)


def _replace(path, data):
    """Write a file that is there complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _cells(line):
    """The cells of one line of CSV, [] where it is none."""
    try:
        return next(csv.reader([line.rstrip("\r").replace("\0", "")]), [])
    except csv.Error:
        return []


def _sane(row, whole):
    """Whether a line has all columns, and numbers where numbers belong."""
    if not whole or any(row.get(name) is None for name in COLUMNS) or not (row["key"] and row["method"]):
        return False
    try:
        for name in COLUMNS[3:-1]:
            float(row[name] or 0)
        return row["error"] or int(row["type"]) in range(len(TYPES))
    except ValueError:
        return False


def _text(value):
    """A value as a cell on one line."""
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else shown(value, 1000)
