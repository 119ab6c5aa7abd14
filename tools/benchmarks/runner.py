"""What `python dev.py piebench` and `python dev.py demobench` share: run methods on pictures, write the tables."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from ...evaluation.metrics import MODES
from ..api.client import ComfyClient, ComfyError
from . import piebench, report, runner_dask, runner_work, table_methods
from .piebench import Problem
from .runner_book import Book
from .runner_work import Job, Scoring, failed, local


def parser_of(doc, defaults):
    """The arguments of a benchmark.

    Args:
        defaults: {option: default} of what the two benchmarks choose differently.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_argument_group("where it runs")
    where.add_argument("--server", help="address of a ComfyUI with this pack; one is started where this is left out")
    where.add_argument("--scheduler", help="address of a Dask scheduler, to spread the pictures over its workers")
    where.add_argument("--output", type=Path, help="folder of the results; the same one goes on with a stopped run")
    what = parser.add_argument_group("what is edited, and how")
    what.add_argument("--methods", help="all, paper (the table of the Direct Inversion paper), or names such as "
                      "direct+p2p,*+masactrl; * stands for any")
    what.add_argument("--pictures", type=int, help="how many a method, evenly over the types of edits; 0 for all")
    what.add_argument("--types", help="numbers of the types of edits, such as 1,8; all where left out")
    what.add_argument("--steps", type=int, default=50)
    what.add_argument("--cfg", type=float,
                      help="guidance of all edits (default: %(default)s; None is each method's own)")
    what.add_argument("--concept-scale", type=float,
                      help="of LEDITS (default: %(default)s; None is its authors' presets)")
    what.add_argument("--xa-guidance", type=float,
                      help="of pix2pix-zero (default: %(default)s; None is its authors' 0.1)")
    what.add_argument("--seed", type=int, default=1234)
    how = parser.add_argument_group("how edits are measured")
    how.add_argument("--mode", choices=MODES, help="pie-bench: as published; plain: over the pixels that count")
    how.add_argument("--jpeg", action="store_true", help="edits go through a JPEG first, as in the published numbers")
    how.add_argument("--networks", action="append", default=[], metavar="FOLDER", help="of the metrics' networks")
    how.add_argument("--every-metric", action="store_true", help="also those that the published table does not have")
    how.add_argument("--device", default="cpu", help="where metrics are computed, such as cuda")
    parser.set_defaults(**defaults)
    return parser


def numbers(text):
    """The set of ints in "1,8".

    Raises:
        Problem: something else, or no type of edit.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if unknown := [part for part in parts if part not in map(str, range(len(piebench.TYPES)))]:
        known = ", ".join(f"{number} {name}" for number, name in enumerate(piebench.TYPES))
        raise Problem(f"There is no type of edit {', '.join(unknown)}: choose of {known}.")
    return {int(part) for part in parts}


def run(options, folder, checkpoint=""):
    """Do what the arguments ask for, on the data in a folder.

    Returns:
        exit code: 0 where every edit succeeded.

    Raises:
        Problem, ComfyError: nothing can be done.
    """
    network = getattr(options, "model", "U-Net")
    chosen = table_methods.parse(options.methods, network)
    chosen_settings = ("steps", "cfg", "concept_scale", "xa_guidance", "seed")
    named = {name: getattr(options, name) for name in chosen_settings}
    settings = table_methods.Settings(checkpoint, **named, network=network)
    if settings.steps < 1:
        raise Problem(f"--steps is {settings.steps}: give at least 1.")
    items, problems = piebench.load(folder)
    for problem in problems:
        say(problem)
    items = piebench.choose(items, options.pictures or None, numbers(options.types))
    if not items:
        raise Problem(f"{folder} has no pictures of the types {options.types}.")
    scoring = Scoring(options.mode, options.jpeg, options.device, tuple(options.networks), options.every_metric)
    data = str(Path(folder).resolve())
    book = Book(options.output, {"data": data, **vars(settings), "mode": scoring.mode, "jpeg": scoring.jpeg})
    pending = [(item, wanted) for item in items
               if (wanted := tuple(name for name in chosen if not book.finished(item.key, name)))]
    total, left = len(items) * len(chosen), sum(len(wanted) for _, wanted in pending)
    say(f"{len(items)} pictures, {len(chosen)} methods: {total} edits" +
        (f", {total - left} of them finished before." if left < total else "."))
    wrong = 0
    try:
        if pending:
            wrong = _collect(pending, settings, scoring, book, options)
    finally:  # also of a run that was stopped: what there is
        written = report.write(book, items, chosen, scoring)
    say(f"\n{written}\nThe table, the contact sheets and the edits are in {options.output}.")
    if wrong:
        say(f"{wrong} of {left} edits failed; their lines in {book.folder / 'results.csv'} say why. The same command "
            "tries them again.")
    return 1 if wrong or problems else 0


def _jobs(pending, settings, scoring):
    """A `Job` for every picture; its file is read when its turn comes."""
    for item, wanted in pending:
        try:
            picture = item.path.read_bytes()
        except OSError:  # gone since the folder was read: its edits will say that it cannot be read
            picture = b""
        yield Job(item, picture, wanted, settings, scoring)


def _results(jobs, options):
    """`Result`s from the server or the cluster, as they come."""
    if not options.scheduler:
        yield from local(jobs, options.server)
        return
    for job, results in runner_dask.spread(jobs, options.scheduler, say):
        if isinstance(results, BaseException):
            results = [failed(job.item, method, runner_dask.sentence(results)) for method in job.methods]
        yield from results


def _collect(pending, settings, scoring, book, options):
    """Run what is not finished and keep the results; how many failed."""
    if not options.scheduler:
        _check_server(options.server, settings.checkpoint)
        for why, names in runner_work.missing(scoring).items():
            say(f"Not measured: {', '.join(names)}. {why}")
    wrong = 0
    with progress(sum(len(wanted) for _, wanted in pending), "edit") as bar:
        for result in _results(_jobs(pending, settings, scoring), options):
            book.add(result)
            row = result.row
            if row.get("error"):
                wrong += 1
                say(f"{row['key']}, {row['method']}: {row['error']}")
            bar.set_postfix_str(f"{row['key']}, {row['method']}", refresh=False)
            bar.update()
    return wrong


def _check_server(url, checkpoint):
    client = ComfyClient(url)
    client.check()
    known = client.object_info()["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"]
    names = known[0] if isinstance(known[0], list) else known[1].get("options", [])
    if checkpoint and checkpoint not in names:
        had = ", ".join(names) or "none"
        raise ComfyError(f"The ComfyUI at {url} has no checkpoint '{checkpoint}': it has {had}. Put the file "
                         "into its models/checkpoints.")


def progress(total=None, unit="picture"):
    """A bar of `tqdm`; where there is no terminal, a line now and then. Nothing of what is over in a moment."""
    often = 0.1 if sys.stderr.isatty() else 10  # seconds
    return tqdm(total=total, unit=unit, mininterval=often, delay=1, dynamic_ncols=True)


say = tqdm.write
