"""A small data set that the tests of several folders share.

The gate is off but where a test asks for it: most tests look at what a window's rows do, and with the gate some of them are
held out.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import hypothesis
import numpy as np
import pytest
import torch

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import Examples, IdLists
from data_schemas.hashing import mix64
from pipeline.evaluation.metrics import measure
from pipeline.outcome import UpdateReport

torch.set_num_threads(1)
hypothesis.settings.register_profile("seeded", derandomize=True)
hypothesis.settings.load_profile("seeded")
os.environ["TIDEMARK_GATE__ACTION"] = "off"

SPEC = DatasetSpec.model_validate(
    {
        "name": "small",
        "time": {"column": "event_time"},
        "label": {"column": "label"},
        "user": "user",
        "item": "item",
        "event_key": ("event_id",),
        "categorical": (
            {"name": "user", "type": "integer", "capacity": 64, "embedding_dim": 8},
            {"name": "tags", "many": True, "capacity": 32, "embedding_dim": 8},
            {"name": "item", "type": "integer", "capacity": 128, "embedding_dim": 8},
            {"name": "hour_of_day", "from_time": "hour_of_day", "capacity": 24, "embedding_dim": 8},
        ),
        "numeric": ({"name": "price"}, {"name": "age"}),
    }
)


@pytest.fixture
def small_spec() -> DatasetSpec:
    """Two ids, a list of ids, an hour and two numbers."""
    return SPEC


@pytest.fixture
def small_examples() -> Callable[..., Examples]:
    """Rows whose label depends on user, item and price; some numbers are missing, some lists empty."""
    return make_examples


@pytest.fixture
def report() -> Callable[..., UpdateReport]:
    """The report of an update of hour 0, 1, ...; any field may be another."""
    return make_report


def make_examples(num_rows: int, *, seed: int = 0, hour: int = 0) -> Examples:
    rng = np.random.default_rng([seed, 99])
    user, item = rng.integers(0, 40, num_rows), rng.integers(0, 60, num_rows)
    numeric_NR = rng.normal(size=(2, num_rows)).astype(np.float32) * [[3.0], [10.0]] + [[5.0], [40.0]]
    logit = -1.0 + 0.8 * np.sin(user) + 0.8 * np.cos(3 * item) + 0.2 * (numeric_NR[0] - 5)
    labels = rng.random(num_rows) < 1 / (1 + np.exp(-logit))
    numeric_NR[rng.random((2, num_rows)) < 0.1] = np.nan
    lengths = rng.integers(0, 4, num_rows)
    user_R, item_R = mix64(user.astype(np.uint64)), mix64(item.astype(np.uint64))
    return Examples(
        single_ids={"user": user_R, "item": item_R, "hour_of_day": np.full(num_rows, hour % 24, np.uint64)},
        list_ids={
            "tags": IdLists(
                values_V=mix64(rng.integers(0, 20, lengths.sum()).astype(np.uint64)),
                offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            )
        },
        numeric_NR=numeric_NR.astype(np.float32),
        labels_R=labels.astype(np.float32),
        weights_R=np.ones(num_rows, np.float32),
        user_R=user_R,
        item_R=item_R,
        hour_R=np.full(num_rows, hour, np.int64),
    )


def make_report(hour: int, **changed: object) -> UpdateReport:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    rng = np.random.default_rng(hour)
    made = UpdateReport(
        dataset="synthetic",
        model_name="hourly",
        outcome="published",
        version=hour + 1,
        log_version=3,
        window_start=start + timedelta(hours=hour),
        window_end=start + timedelta(hours=hour + 1),
        rows=1234,
        late_rows=0,
        rows_learned=1200,
        rows_pending=34,
        batch_size=512,
        precision="fp32",
        before=measure(rng.integers(0, 2, 200), rng.random(200), rng.integers(0, 5, 200)),
        after=None,
        frozen=None,
        evaluated_rows=200,
        seconds={"learn": 1.5},
        budget_seconds=60.0,
        plan=(),
        loss_curve=(),
        skipped_steps=0,
        git_commit="",
        notes=(),
    )
    return replace(made, **changed)  # type: ignore[arg-type]
