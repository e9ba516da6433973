"""Work of many files spread over a Dask cluster by Prefect's own task runner.

Enters: the setting `cluster`, and work that takes a `map`. Leaves: what the work returns, the same as without a cluster.

What a worker raises is raised here. A worker that dies is replaced and its file is done again by another one; a file that takes
several workers down with it is left for the next run, and reported.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL, temporary_settings

from data_schemas.errors import ConfigError, DataError
from flows.stages import run_as_task
from pipeline.data.ingest import Spread, Stage
from pipeline.data.landing import LandingFile
from pipeline.data.staging import StagedFile, UnstagedFile

T = TypeVar("T")

GROUP_FILES, GROUP_BYTES = 16, 16 << 20
"""A task of Prefect's takes a tenth of a second by itself: it stages so many small files, or fewer that have so many bytes."""

GROUPS_AHEAD = 2
"""Tasks that are begun for each thread of the cluster, at most. Until it is committed, a row holds 8 bytes in the flow."""

CONNECT_SECONDS = 30
"""How long a scheduler may take to answer, and then its first worker."""


def run_spread(name: str, cluster: str, work: Callable[[Spread], T]) -> T:
    """Does `work` as a Prefect task called `name`; or, where there is a cluster, as a flow of that name whose tasks are there.

    Args:
        cluster: as in the settings.
        work: gets the `map` that it is to use.

    Raises:
        ConfigError: the packages of the cluster are not installed.
        DataError: the scheduler does not answer.
    """
    if cluster == "none":
        return run_as_task(name, lambda: work(map))
    # Prefect sends the flow to the workers with every task: work and result pass through lists that are empty meanwhile.
    waiting, done = [work], list[T]()

    def spread() -> None:
        done.append(waiting.pop()(_spread(cluster)))

    runner = _task_runner(cluster)
    # Without an address each worker would start a Prefect server of its own.
    with get_client(sync_client=True) as client:
        address = str(client.api_url)
    with temporary_settings({PREFECT_API_URL: address}):
        flow(name=name, task_runner=runner, persist_result=False)(spread)()
    return done.pop()


def threads_of(cluster: str) -> int:
    """Of all workers that are there; waits for the first. Inside the flow that `run_spread` makes.

    Raises:
        DataError: the scheduler does not answer, or has no worker.
    """
    context = FlowRunContext.get()
    assert context is not None
    try:
        client: Any = context.task_runner.client  # type: ignore[attr-defined]  # of Dask's runner
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except OSError as error:  # TimeoutError is one
        raise DataError(
            f"no Dask scheduler with a worker answers at cluster = {cluster!r} within {CONNECT_SECONDS} s ({error}); start "
            "them, or set cluster = 'none'"
        ) from error
    return int(sum(client.nthreads().values()))


def _task_runner(cluster: str) -> Any:
    try:
        import dask
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise ConfigError(
            f"cluster = {cluster!r} needs packages that are not installed ({error}); run pip install --no-deps -r "
            "requirements/cluster.txt, or set cluster = 'none'"
        ) from error
    dask.config.set({"distributed.comm.timeouts.connect": f"{CONNECT_SECONDS} s"})
    kind, _, place = cluster.partition(":")
    if kind == "local":
        local = {"n_workers": int(place), "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
        return DaskTaskRunner(cluster_kwargs=local)
    return DaskTaskRunner(address=cluster)


def _spread(cluster: str) -> Spread:
    def spread(stage: Stage, files: Iterable[LandingFile]) -> Iterator[StagedFile | UnstagedFile]:
        groups = iter(_groups(files))
        waiting = deque((group, _stage.submit(stage, group)) for group in islice(groups, GROUPS_AHEAD * threads_of(cluster)))
        while waiting:
            yield from _results(stage, *waiting.popleft())
            waiting.extend((group, _stage.submit(stage, group)) for group in islice(groups, 1))

    return spread


def _groups(files: Iterable[LandingFile]) -> Iterator[list[LandingFile]]:
    """Consecutive files that are worth a task together."""
    group: list[LandingFile] = []
    for file in files:
        group.append(file)
        if len(group) == GROUP_FILES or sum(member.size for member in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


@task(name="stage files", task_run_name="stage {files[0].source}", cache_policy=NO_CACHE, persist_result=False)
def _stage(stage: Stage, files: list[LandingFile]) -> list[StagedFile | UnstagedFile]:
    """In a worker."""
    return [stage(file) for file in files]


def _results(stage: Stage, files: list[LandingFile], future: Any) -> Iterator[StagedFile | UnstagedFile]:
    """One of several files that takes workers down must not keep the others out: each is then tried alone."""
    from distributed import KilledWorker

    try:
        yield from future.result()
    except KilledWorker as error:
        if len(files) == 1:
            yield UnstagedFile(landing=files[0], reason=f"the workers that read it died ({error})", broken=False)
        else:
            for file in files:
                yield from _results(stage, [file], _stage.submit(stage, [file]))
