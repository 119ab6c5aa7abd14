"""Values of `metrics.Metrics` as text, and their means."""

import math

from .metrics import METRICS


def number(name: str, value: float | None) -> str:
    """A value as the papers print it, in the scale of its heading."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "no area"
    return f"{value * METRICS[name].scale:.2f}"


def text(values, missing):
    """Values as lines, and below them what is missing and what to do, each reason once.

    Args:
        values: dict name -> float or None.
        missing: dict name -> sentence.
    """
    width = max(len(METRICS[name].heading) for name in values)
    lines = [f"{METRICS[name].heading:<{width}}  {number(name, value):>8}" for name, value in values.items()]
    reasons = {}
    for name, reason in missing.items():
        if name in values:
            reasons.setdefault(reason, []).append(METRICS[name].heading)
    return "\n".join(lines + [f"\nNot measured: {', '.join(names)}. {reason}" for reason, names in reasons.items()])


def mean(rows):
    """Mean of every metric over pictures, as the published table: pictures where it is nan or None are left out.

    Args:
        rows: list of dict name -> float or None, of the same names.

    Returns:
        dict name -> float; nan or None where all of them are.
    """
    means = {}
    for name in rows[0]:
        measured = [row[name] for row in rows if row[name] is not None]
        means[name] = mean_of(measured) if measured else None
    return means


def mean_of(values) -> float:
    """Mean of the numbers that are not nan, as the published evaluation takes it; nan where all are."""
    counted = [value for value in values if not math.isnan(value)]
    return sum(counted) / len(counted) if counted else math.nan
