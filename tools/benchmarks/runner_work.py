"""One picture through a ComfyUI server: its workflows queued together, each result fetched and scored as it comes."""

import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from ...evaluation.metrics import METRICS, PUBLISHED, Metrics
from ...evaluation.networks import FOLDER, Networks
from ..api.client import ComfyClient, ComfyError, NoAnswer, seconds_of
from . import demobench_truth, piebench, table_methods

TRUTH = ("success", "kept", "target_psnr")
COLUMNS = ("key", "type", "method", "seconds", "unet_rows", *METRICS, *TRUTH, "error")
"""Of the results; empty where there is no value."""


@dataclass(frozen=True)
class Scoring:
    """How edits are measured: arguments of `Metrics` and `Networks`.

    Attributes:
        folders: where networks are looked for, beside the models folder that `dev.py` makes and the usual caches.
        every: all of METRICS instead of the published table's.
    """

    mode: str = "pie-bench"
    jpeg: bool = False
    device: str = "cpu"
    folders: tuple[str, ...] = ()
    every: bool = False


@cache
def metrics_of(scoring):
    """The `Metrics` of this process; networks are loaded once."""
    names = tuple(METRICS) if scoring.every else PUBLISHED
    folders = [*scoring.folders, Path(__file__).resolve().parents[2] / ".dev" / "base" / "models" / FOLDER]
    return Metrics(scoring.mode, Networks(folders), scoring.device, scoring.jpeg, names)


def missing(scoring):
    """What cannot be measured here: {why: names of metrics}."""
    reasons = {}
    for name, why in metrics_of(scoring).missing.items():
        reasons.setdefault(why, []).append(name)
    return reasons


@dataclass(frozen=True)
class Job:
    """All that is needed to edit one picture by some methods, wherever it runs."""

    item: piebench.Item
    picture: bytes = field(repr=False)  # the image file's
    methods: tuple[str, ...]
    settings: table_methods.Settings
    scoring: Scoring


@dataclass(frozen=True)
class Result:
    """One line of the results, {column: value}, and the edited picture as PNG (None where it failed)."""

    row: dict
    edited: bytes | None = field(repr=False)


def failed(item, method, problem):
    """The `Result` of an edit that gave no picture."""
    return Result({"key": item.key, "type": item.type, "method": method, "error": piebench.shown(problem, 1000)}, None)


def reason(problem):
    """Why an edit gave no result, of whatever kind: one edit that nobody foresaw is no reason to make none."""
    if isinstance(problem, ComfyError):
        return problem
    return f"The result could not be used ({problem!r}): look at the server's log."


def work(job, client):
    """Edit and score one picture; yields a `Result` for every method as it ends.

    A workflow that fails gives a result with the reason. While one result is scored, the server runs the next workflow.

    Raises:
        NoAnswer: the server has gone.
    """
    try:
        source = piebench.picture_of(job.picture)
    except Exception as error:  # Pillow has many for a damaged file
        for method in job.methods:
            yield failed(job.item, method, f"The picture {job.item.path.name} cannot be read: {error}.")
        return
    queued, ended = {}, set()
    try:
        try:
            # as PNG, so that the model sees the pixels that are scored, whatever decodes JPEG there
            image = client.upload(f"{job.item.key}.png", "ledits-benchmark", piebench.png_of(source), "temp")
        except NoAnswer:
            raise
        except Exception as problem:
            for method in job.methods:
                yield failed(job.item, method, reason(problem))
            return
        for method in job.methods:
            try:
                queued[method] = client.queue(table_methods.build(method, job.item, image, job.settings))
            except NoAnswer:
                raise
            except Exception as problem:
                yield failed(job.item, method, reason(problem))
        for method, prompt_id in queued.items():
            try:
                entry = client.wait(prompt_id, seconds=24 * 3600)
                ended.add(prompt_id)
                edited = client.fetch(entry["outputs"][table_methods.SHOWN]["images"][0])
                result = Result(_row(job, method, source, edited, entry), edited)
            except NoAnswer:
                raise
            except Exception as problem:
                ended.add(prompt_id)
                result = failed(job.item, method, reason(problem))
            yield result
    finally:
        if left := set(queued.values()) - ended:
            try:
                client.cancel(left)
            except ComfyError:
                pass  # it is gone, and its queue with it


def _row(job, method, source, edited, entry):
    item, edited = job.item, piebench.picture_of(edited)
    if edited.shape != source.shape:
        raise ComfyError(f"The edit has {edited.shape[1]} x {edited.shape[0]} pixels, the picture {source.shape[1]} x "
                         f"{source.shape[0]}: the model cannot make pictures of this size.")
    if not np.isfinite(edited).all():
        raise ValueError("it holds values that are no numbers")
    mask = piebench.decode(item.runs, *source.shape[:2])
    rows = sum(report.get("unet_rows", 0) for out in entry["outputs"].values() for report in out.get("ledits", ()))
    row = {"key": item.key, "type": item.type, "method": method, "seconds": seconds_of(entry), "unet_rows": rows}
    row |= metrics_of(job.scoring).measure(source, edited, mask, item.source, item.target)
    return row if item.truth is None else row | demobench_truth.judge(item.truth, edited)


def wait_for(client, seconds=20):
    """Whether a server that did not answer does so again within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            client.check()
            return True
        except NoAnswer:
            time.sleep(1)
        except ComfyError:
            return False
    return False


def local(jobs, server):
    """Run jobs one after the other on one server; yields every `Result`.

    Raises:
        NoAnswer: the server has gone.
    """
    client = ComfyClient(server)
    for job in jobs:
        yield from work(job, client)
