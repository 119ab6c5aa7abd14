"""The results of a run in its folder: one line of `results.csv` and one picture for every edit, written as they come.

A run that was interrupted goes on where it ended: what is finished is read from the file, what failed is tried again.
"""

import csv
import json
import os
from pathlib import Path

from .piebench import Problem
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
            path.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
            return
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError:
            raise Problem(f"{path} cannot be read: delete {self.folder}, or choose another --output.") from None
        if other := [name for name in settings if before.get(name) != settings[name]]:
            had = ", ".join(f"{name} {before.get(name)}" for name in other)
            raise Problem(f"{self.folder} holds results made with {had}: choose another --output, or delete it.")

    def _read(self):
        """Lines of the file as {column: text}; what an interruption cut off is left out."""
        path = self.folder / RESULTS
        if not path.is_file():
            return []
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        whole = [row for row in rows if None not in row and all(row.get(name) is not None for name in COLUMNS)]
        return [row for row in whole if row["key"] and row["method"]]

    def _write(self):
        partial = self.folder / (RESULTS + ".partial")
        with open(partial, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows.values())
        os.replace(partial, self.folder / RESULTS)

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
            path.write_bytes(result.edited)
        if not row["error"]:
            self.rows[where] = row
        with open(self.folder / RESULTS, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)


def _text(value):
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)
