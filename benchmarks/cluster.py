"""Is ingest faster on a Dask cluster of two local workers?

    python benchmarks/cluster.py --dataset brunch --landing ../shared/data/brunch/impressions --repetitions 3

Ingests the landing folder into an empty log again and again, in turn without a cluster and with each that is named, and prints
medians: seconds of the whole ingest, the start of the workers in them; and of staging and committing alone, from the moment
when the workers are there.
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from cyclopts import run
from prefect import flow
from rich.console import Console
from rich.table import Table

from data_schemas.dataset import load_spec
from flows import cluster as clusters
from flows.cluster import run_spread
from pipeline.data.ingest import IngestReport, Spread, Stage, ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.landing import LandingFile
from pipeline.data.staging import StagedFile, UnstagedFile


def main(*, dataset: str, landing: str, cluster: list[str] | None = None, repetitions: int = 3) -> None:
    """Prints one table.

    Args:
        dataset: Name of a shipped data set, or the path of a TOML file that declares one.
        landing: Folder of the click logs.
        cluster: As the setting; may be given several times. local:2 by default.
        repetitions: Of each.
    """
    entrants = ["none", *(cluster or ["local:2"])]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in entrants}
    rows: dict[str, int] = {}

    @flow(persist_result=False)
    def measured() -> None:
        for _ in range(repetitions):
            for name in entrants:
                report, whole, work = ingest(dataset, landing, name)
                seconds[name].append((whole, work))
                rows[name] = report.rows_accepted

    measured()
    table = Table("cluster", "rows", "s, whole", "s, with workers there", "rows/s, with workers there")
    for name in entrants:
        whole, work = (statistics.median(column) for column in zip(*seconds[name], strict=True))
        table.add_row(name, f"{rows[name]:,}", f"{whole:.1f}", f"{work:.1f}", f"{rows[name] / work:,.0f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def ingest(dataset: str, landing: str, cluster: str) -> tuple[IngestReport, float, float]:
    """The report, seconds of everything, and seconds from the first file on."""
    spec = load_spec(dataset)
    with tempfile.TemporaryDirectory() as folder:
        log = ClickLog.open_or_create(Path(folder) / "log", spec)
        quarantine = Quarantine.open_or_create(Path(folder) / "quarantine")
        ready = time.perf_counter()

        def timed(spread: Spread) -> IngestReport:
            def started(stage: Stage, files: Iterable[LandingFile]) -> Iterator[StagedFile | UnstagedFile]:
                nonlocal ready
                if cluster != "none":
                    clusters.threads_of(cluster)
                ready = time.perf_counter()
                yield from spread(stage, files)

            return ingest_landing(landing, log, quarantine, spec, now=datetime.now(UTC), spread=started)

        start = time.perf_counter()
        report = run_spread("ingest", cluster, timed)
        return report, time.perf_counter() - start, time.perf_counter() - ready


if __name__ == "__main__":
    run(main)
