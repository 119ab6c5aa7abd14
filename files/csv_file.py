"""Rows that are added to a CSV file: all of them or none, also where several servers add to one file."""

import csv
import io
import os
import time

_WAIT = 1.0  # seconds in which another process that has just made the file writes its header


def check(path, columns):
    """Refuse a file that rows of these columns do not fit into.

    Raises:
        ValueError: the file is there with other columns.
        OSError: it cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), None)
    except FileNotFoundError:
        return
    except (csv.Error, UnicodeDecodeError):
        header = []
    if header is not None and header != list(columns):
        raise ValueError("The CSV file has other columns than these metrics: choose another name, or move it away.")


def append(path, rows: list[dict]):
    """Add rows of the same keys, with a header if the file is new, and its folder if that is. None is an empty cell.

    Raises:
        ValueError: as `check`.
        OSError: they cannot be written; the file is as it was before.
    """
    columns = list(rows[0])
    os.makedirs(os.path.dirname(path), exist_ok=True)
    mode = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)
    try:
        handle, new = os.open(path, mode | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        handle, new = os.open(path, mode), False
    with open(handle, "r+b", buffering=0) as file:
        if not new:
            _wait_for_header(file)
            check(path, columns)
        size = file.seek(0, os.SEEK_END)
        lines = _lines(([] if size else [columns]) + [["" if v is None else v for v in row.values()] for row in rows])
        if size and _last_byte(file) not in b"\r\n":  # a line that was torn stays a line of its own
            lines = b"\r\n" + lines
        try:
            done = 0
            while done < len(lines):  # mostly one call, which nobody else's rows can divide
                done += file.write(lines[done:])
            os.fsync(file.fileno())
        except OSError:
            if file.seek(0, os.SEEK_END) == size + done:
                file.truncate(size)
            if new and not size:
                os.remove(path)
            raise


def _wait_for_header(file):
    end = time.monotonic() + _WAIT
    while not os.fstat(file.fileno()).st_size and time.monotonic() < end:
        time.sleep(0.02)


def _last_byte(file):
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _lines(rows):
    """Rows as a CSV file holds them; halves of letters, which no file can hold, become '?'."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "replace")
