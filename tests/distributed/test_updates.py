"""Whole updates are the same on one process and on many; what one number of processes saved, another goes on from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.data.synthetic import SyntheticConfig, SyntheticStream

slow = pytest.mark.slow
LABEL = '[label]\ncolumn = "label"\n'
STREAM = SyntheticConfig(hours=3, rows_per_hour=400, num_users=60, num_items=40, num_authors=8, traffic_ratio=1.5)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=slow), pytest.param(16, marks=slow)])
def test_many_processes_learn_as_one_does(day: Any, count: int) -> None:
    """With counters, histories, admitted ids and the gate; 16 are more than an hour has row groups."""
    hours = 2 if count == 2 else day.hours
    alone, together = day.updated("one", 1, hours=hours), day.updated("many", count, hours=hours)
    day.assert_same(together, alone)
    assert any(report["gate"] for report in alone), "a model was judged"
    day.assert_same_numbers("many", "one")


@slow
@pytest.mark.parametrize("sharding", ["auto", "table_wise", "row_wise", "column_wise", "data_parallel"])
def test_every_way_to_spread_tables_learns_as_one_process_does_and_another_number_goes_on(day: Any, sharding: str) -> None:
    """The first hours by three processes, the last by one, or by two that spread the tables by rows."""
    adagrad = "training.sparse_optimizer=adagrad"
    alone = day.updated("one", 1, adagrad)
    day.updated("many", 3, adagrad, f"processes.sharding={sharding}", hours=day.hours - 1)
    for model, count in (("then-one", 1), ("then-two", 2)):
        shutil.copytree(day.folder / "state" / "models" / "many", day.folder / "state" / "models" / model)
        last = day.updated(model, count, adagrad, "processes.sharding=row_wise")
        day.assert_same(last, alone[-1:])
        day.assert_same_numbers(model, "one", adagrad)


@slow
@pytest.mark.parametrize("sharding", ["auto", "column_wise", "data_parallel"])
def test_a_linear_model_is_spread_over_processes_too(day: Any, sharding: str) -> None:
    """Adagrad by coordinate is what columns can be cut with, though a linear model has no row to cut."""
    linear = ("model.kind=linear", "training.sparse_optimizer=adagrad")
    alone, together = day.updated("one", 1, *linear), day.updated("many", 2, *linear, f"processes.sharding={sharding}")
    day.assert_same(together, alone)
    day.assert_same_numbers("many", "one", *linear)


@slow
@pytest.mark.parametrize(
    "settings",
    [
        ["sampling.replay_share=0.3", "sampling.replay_capacity=200", "sampling.negative_keep_rate=0.5"],
        ["training.batch_policy=goodput", "training.min_batch_size=32", "training.max_batch_size=128"],
        ["tracking.enabled=true", "evaluation.frozen_after_updates=1", "gate.action=off"],
        ["training.precision=auto"],
    ],
    ids=["replay and thinning", "planned batches", "published", "measured arithmetic"],
)
def test_two_processes_do_whatever_the_settings_ask_for(day: Any, settings: list[str]) -> None:
    """All rows are learned, and what is drawn or published is the same; plans and arithmetic hang on a clock."""
    alone, together = day.updated("one", 1, *settings), day.updated("many", 2, *settings)
    for one, other in zip(together, alone, strict=True):
        for name in ("version", "outcome", "rows", "rows_learned", "rows_pending", "evaluated_rows"):
            assert one[name] == other[name], name
        for measured in ("before", "frozen"):
            assert (one[measured] is None) == (other[measured] is None)
    if settings[0].startswith("sampling"):
        day.assert_same(together, alone)
    assert not any("failed" in note for report in together for note in report["notes"])


def _clicks_only(landing: Path) -> None:
    for hour in range(3):
        table = SyntheticStream(STREAM).hour(hour).table
        pq.write_table(table.filter(pc.equal(table["label"], 1)), landing / f"hour-{hour}.parquet")


def _clicks_later(landing: Path) -> None:
    """Every second click comes 70 minutes after its impression, the others at once."""
    for hour in range(3):
        table = SyntheticStream(STREAM).hour(hour).table
        clicked = table.filter(pc.equal(table["label"], 1)).select(["event_id", "event_time"])
        late = pa.array(np.arange(clicked.num_rows) % 2 * 70 * 60 * 1_000_000, pa.duration("us"))
        pq.write_table(table.drop_columns(["label"]), landing / f"shown-{hour}.parquet")
        clicks = clicked.set_column(1, "event_time", pc.add(clicked["event_time"].cast(pa.timestamp("us", "UTC")), late))
        pq.write_table(clicks, landing / f"clicks-{hour}.parquet")


@slow
@pytest.mark.parametrize(
    ("write", "clicks", "settings"),
    [
        (_clicks_only, "", ["sampling.negatives=hard", "sampling.negatives_trailing_hours=1"]),
        (_clicks_later, '[clicks]\nfiles = "clicks-*"\nattribution_minutes = 180\n', []),
    ],
    ids=["negatives that are drawn", "clicks that come late"],
)
def test_two_processes_learn_other_kinds_of_logs(
    make_day: Callable[..., Any], declaration: str, write: Callable[[Path], None], clicks: str, settings: list[str]
) -> None:
    only = 'over = ["item_id"]\n' + ("" if clicks else 'of = ["clicks"]\n')
    day = make_day(declaration.replace(LABEL, clicks).replace('over = ["item_id"]\n', only), write)
    alone, together = day.updated("one", 1, *settings), day.updated("many", 2, *settings)
    day.assert_same(together, alone)
    assert [report["notes"] for report in together] == [report["notes"] for report in alone]
    assert any(report["clicks_corrected"] for report in alone) == bool(clicks)
    day.assert_same_numbers("many", "one")
