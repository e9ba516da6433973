"""What clicks that come hours after their impressions do to calibration, corrected and ignored.

In:  the synthetic stream with its labels taken out; a click is an event of its own, up to six hours after its impression
     (exponential delays with a mean of two hours, cut at six). Every hour, its impressions and the clicks of that hour arrive,
     and the whole update runs.
Out: one table over the last hours: clicks that ever came over predicted clicks (COPC) of the rows of each hour before they were
     learned, for clicks that are
       - `known at once`: all in the hour of their impression, as in a log that was joined afterwards;
       - `corrected`: a click that comes after its impression was learned is learned with the hour in which it comes;
       - `ignored`: a click that comes after its impression's hour never arrives.

    python benchmarks/late_clicks.py [--hours 60] [--rows 4000] [--seeds 3]
"""

import argparse
import tempfile
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from data_schemas.dataset import DATASETS_FOLDER, load_spec
from pipeline.config import UpdateConfig, load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, SyntheticStream
from pipeline.outcome import UpdateReport
from pipeline.training.threads import torch_threads
from pipeline.update import run_update

F64 = npt.NDArray[np.float64]
Clicks = Literal["known at once", "corrected", "ignored"]
KINDS: tuple[Clicks, ...] = ("known at once", "corrected", "ignored")
MEAN_DELAY_HOURS, LONGEST_HOURS = 2.0, 6.0
FIRST_JUDGED = 24
"""Hours before it are left to the new model."""


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--hours", type=int, default=60)
    cli.add_argument("--rows", type=int, default=4000, help="an hour")
    cli.add_argument("--seeds", type=int, default=3)
    options = cli.parse_args()
    if options.hours <= FIRST_JUDGED:
        cli.error(f"--hours must be above {FIRST_JUDGED}, which are learned and not judged; got {options.hours}")
    table = Table("clicks", "clicks judged", "COPC", "AUC of the known labels", "corrected")
    with torch_threads(1):
        for kind in KINDS:
            results = [_measure(kind, options.hours, options.rows, seed) for seed in range(options.seeds)]
            copc = [result[1] for result in results]
            table.add_row(
                kind,
                f"{sum(result[0] for result in results):,.0f}",
                f"{np.mean(copc):.3f} ({min(copc):.3f} to {max(copc):.3f})",
                f"{np.mean([result[2] for result in results]):.4f}",
                f"{sum(result[3] for result in results):,.0f}",
            )
    Console(width=120).print(table)


def _measure(kind: Clicks, hours: int, rows: int, seed: int) -> tuple[float, float, float, float]:
    """Clicks judged, COPC, mean AUC as the updates reported it, and corrected impressions."""
    stream = SyntheticStream(
        SyntheticConfig(
            hours=hours, rows_per_hour=rows, seed=seed, late_share=0, duplicate_share=0, traffic_ratio=1, drift_strength=0.5
        )
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = _config(folder, seed)
        clicks: list[pa.Table] = []
        judged = [0.0, 0.0]
        aucs, corrected = [], 0
        for index in range(hours):
            hour = stream.hour(index)
            happened = _clicks_of(hour.table, kind, seed=[seed, index])
            clicks.append(happened)
            report = _arrive(config, hour.table, clicks, hour.start)
            corrected += report.clicks_corrected
            if index < FIRST_JUDGED or report.before is None:
                continue
            judged[0] += float(np.sum(hour.table["label"].to_numpy()))
            judged[1] += report.before.mean_probability / report.clicks_known_share * hour.table.num_rows
            aucs.append(report.before.auc or 0.5)
    return judged[0], judged[0] / judged[1], float(np.mean(aucs)), corrected


def _config(folder: Path, seed: int) -> UpdateConfig:
    """The settings of the synthetic data set, whose clicks are files of their own."""
    text = (DATASETS_FOLDER / "synthetic.toml").read_text()
    own = text.replace('[label]\ncolumn = "label"\n', '[clicks]\nfiles = "clicks-*"\nattribution_minutes = 360\n')
    (folder / "late.toml").write_text(own)
    (folder / "landing").mkdir()
    places = [f"{name}={folder / place}" for name, place in (("landing", "landing"), ("state_dir", "state"))]
    return load_config(
        overrides=[
            f"dataset={folder / 'late.toml'}",
            *places,
            f"training.seed={seed}",
            "tracking.enabled=false",
            "gate.action=off",
            "alarms.action=off",
            "training.batch_policy=fixed",
        ]
    )


def _clicks_of(shown: pa.Table, kind: Clicks, *, seed: Sequence[int]) -> pa.Table:
    """Event and time of every click on these impressions that will ever arrive."""
    clicked = shown.filter(pc.equal(shown["label"], 1)).select(["event_id", "event_time"])
    delays = _delays_hours(clicked.num_rows, seed)
    if kind == "known at once":
        delays = np.zeros(clicked.num_rows)
    micros = clicked["event_time"].cast(pa.int64()).to_numpy()
    at = micros + (delays * 3.6e9).astype(np.int64)
    if kind == "ignored":
        in_time = at // 3_600_000_000 == micros // 3_600_000_000
        clicked, at = clicked.filter(pa.array(in_time)), at[in_time]
    return clicked.set_column(1, "event_time", pa.array(at).cast(shown.schema.field("event_time").type))


def _delays_hours(count: int, seed: Sequence[int]) -> F64:
    """Exponential, cut at the longest."""
    uniform = np.random.default_rng([*seed, 7]).random(count)
    most = -np.expm1(-LONGEST_HOURS / MEAN_DELAY_HOURS)
    delays: F64 = -MEAN_DELAY_HOURS * np.log1p(-uniform * most)
    return delays


def _arrive(config: UpdateConfig, shown: pa.Table, clicks: Sequence[pa.Table], start: datetime) -> UpdateReport:
    """Writes the impressions and the clicks of one hour, and runs the update."""
    first = int(start.timestamp()) * 1_000_000
    of_hour = [_between(table, first, first + 3_600_000_000) for table in clicks[-8:]]
    name = f"{start:%Y-%m-%dT%H}.parquet"
    pq.write_table(shown.drop_columns(["label"]), Path(config.landing) / f"shown-{name}")
    pq.write_table(pa.concat_tables(of_hour), Path(config.landing) / f"clicks-{name}")
    spec = load_spec(config.dataset)
    log, end = ClickLog.open_or_create(config.log_path, spec), start + timedelta(hours=1)
    ingest_landing(config.landing, log, Quarantine.open_or_create(config.quarantine_path), spec, now=end)
    report = run_update(config, now=end)
    assert report is not None
    return report


def _between(clicks: pa.Table, first_us: int, stop_us: int) -> pa.Table:
    at = clicks["event_time"].cast(pa.int64()).to_numpy()
    return clicks.filter(pa.array((at >= first_us) & (at < stop_us)))


if __name__ == "__main__":
    main()
