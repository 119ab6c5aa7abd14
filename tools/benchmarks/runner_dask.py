"""The benchmark on a Dask cluster: one task a picture, and beside every Dask worker a ComfyUI server of its own.

    python dev.py benchscheduler                        # once: starts the Dask scheduler
    python dev.py benchworker tcp://SCHEDULER:8786      # on every machine: starts ComfyUI and a Dask worker beside it
    python dev.py piebench --scheduler tcp://SCHEDULER:8786 --data FOLDER --checkpoint NAME

Any other way to start them works too, with Dask's `--preload tools/run.py`, by which Dask finds this pack, and for
workers `--nthreads 1`; LEDITS_COMFYUI tells a worker the address of its server. Balancing, retries and lost workers are
Dask's business. A worker whose server has gone leaves the cluster, so that it does not draw tasks and fail them.
"""

import asyncio
import contextlib
import os
import tempfile

from ..api.client import ComfyClient, ComfyError, NoAnswer
from . import runner_work

SERVER, DEFAULT = "LEDITS_COMFYUI", "http://127.0.0.1:8188"
RETRIES = 2  # of a task that failed in itself


def run_job(job):
    """The task: all `Result`s of a job, from the server beside the Dask worker that runs it."""
    from distributed import Reschedule, get_worker

    client = ComfyClient(os.environ.get(SERVER, DEFAULT))
    for _ in range(2):
        try:
            return list(runner_work.work(job, client))
        except NoAnswer:
            if not runner_work.wait_for(client):
                break
    worker = get_worker()
    print(f"The ComfyUI at {client.url} has gone: leaving the cluster.", flush=True)
    worker.loop.add_callback(worker.close, executor_wait=False, reason="its ComfyUI server has gone")
    raise Reschedule()


def spread(jobs, address, say):
    """Run jobs on a cluster; yields (job, its `Result`s, or the exception that ended it) as they end.

    Args:
        jobs: list of `runner_work.Job`.
        address: of the scheduler.
        say: called with a sentence when the cluster has no worker.

    Raises:
        ComfyError: no scheduler there.
    """
    import distributed

    try:
        client = distributed.Client(address, timeout=20)
    except (OSError, ValueError, TypeError) as error:
        raise ComfyError(f"No Dask scheduler answers at {address} ({error}): start one with "
                         "`python dev.py benchscheduler` and give the address that it prints.") from None
    with contextlib.closing(client):
        waiting = {client.submit(run_job, job, pure=False, retries=RETRIES): job for job in jobs}
        told = False
        while waiting:
            try:
                done = distributed.wait(list(waiting), timeout=5, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                if client.status != "running":
                    raise ComfyError(f"The Dask scheduler at {address} has gone: start it again.") from None
                alone = not client.scheduler_info()["workers"]
                if alone and not told:
                    say(f"The cluster at {address} has no workers; waiting for one: "
                        f"python dev.py benchworker {address}")
                told = alone
                continue
            for future in done:
                job, problem = waiting.pop(future), future.exception()
                yield job, future.result() if problem is None else problem
                future.release()


def sentence(problem):
    """Why a task ended without results."""
    if isinstance(problem, ImportError):
        return f"A Dask worker cannot import this pack ({problem}): start it with `python dev.py benchworker`."
    if type(problem).__name__ == "KilledWorker":
        return "The Dask workers that had this picture ended one after the other: look at their logs."
    return f"{type(problem).__name__}: {problem}"


async def serve(scheduler):
    """Be a Dask worker until the cluster ends."""
    from distributed import Worker

    with tempfile.TemporaryDirectory(prefix="ledits-dask-", ignore_cleanup_errors=True) as folder:
        async with Worker(scheduler, nthreads=1, local_directory=folder, dashboard=False) as worker:
            await worker.finished()


def main(arguments):
    import argparse

    parser = argparse.ArgumentParser(description="Be a Dask worker beside a ComfyUI server.")
    parser.add_argument("scheduler", help="address of the Dask scheduler, such as tcp://host:8786")
    parser.add_argument("--server", default=os.environ.get(SERVER, DEFAULT), help="the ComfyUI server beside it")
    options = parser.parse_args(arguments)
    ComfyClient(options.server).check()
    os.environ[SERVER] = options.server
    print(f"Working for {options.scheduler} with the ComfyUI at {options.server}.", flush=True)
    asyncio.run(serve(options.scheduler))
    return 0
