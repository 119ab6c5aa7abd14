"""Lines of the benchmark's table."""


def say(text):
    print(text, flush=True)


def row(name, first, second, a, b, unit="s", note=""):
    """One line of the table: a of `first` beside b of `second`."""
    return {"name": name, "first": first, "second": second, "a": a, "b": b, "unit": unit, "ratio": a / b, "note": note}


def rows_of(output):
    """Rows (pictures x predictions) that a node's run cost."""
    return output.ui["ledits"][0]["unet_rows"]
