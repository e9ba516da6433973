"""Impressions whose click may still come: what is kept of them, what is learned of them, and that it makes a model right."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.examples import Examples, concatenate
from models.id_table import IdTables
from models.memory import Memory
from pipeline.config import load_config
from pipeline.data.clicks import as_corrections
from pipeline.data.encode import EncodedWindow, encode
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.windows import JoinedClicks
from pipeline.training.late_clicks import LateClicks, Looks
from pipeline.training.past_rows import PastRows
from pipeline.training.sampling import SampledWindow
from pipeline.update import run_update

HOUR = 500_000
ROWS = 60


@pytest.fixture
def spec(small_spec: DatasetSpec) -> DatasetSpec:
    history = {"of": ("item",), "length": 3}
    counters = ({"over": ("item",), "half_lives_hours": (1.0,)},)
    more = {"history": history, "counters": counters, "clicks": {"column": "kind", "attribution_minutes": 180}, "label": None}
    return DatasetSpec.model_validate(small_spec.model_dump() | more)


def joined_clicks(known_until: int, click_hour_E: np.ndarray[tuple[int], np.dtype[np.int64]]) -> JoinedClicks:
    none = np.empty(0, np.int64)
    clicked_I = click_hour_E >= 0
    return JoinedClicks(
        example_W=none,
        clicked_I=clicked_I,
        known_until=known_until,
        end=known_until,
        click_hour_E=click_hour_E,
        corrected=(),
        waiting=0,
        unattributed=0,
    )


class Model:
    """What an update keeps, without the network."""

    def __init__(self, spec: DatasetSpec) -> None:
        self.spec, self.memory, self.ids = spec, Memory(spec), IdTables(spec)
        self.late = LateClicks.nothing(spec)

    def window(self, examples: Examples, keys: np.ndarray[tuple[int], np.dtype[np.uint64]], hour: int) -> EncodedWindow:
        clicks = joined_clicks(hour + 1, np.where(examples.labels_R > 0, hour, -1))

        def encoded(rows: Examples) -> EncodedWindow:
            return encode(rows, self.spec, self.memory, None, hour=hour, ids=self.ids)

        return self.late.encoded(examples, keys, clicks, encoded, self.spec, self.ids, hour=hour)

    def learned(
        self,
        examples: Examples,
        keys: np.ndarray[tuple[int], np.dtype[np.uint64]],
        hour: int,
        *,
        looks: Looks | None = None,
        reached_D: np.ndarray[tuple[int], np.dtype[np.bool_]] | None = None,
    ) -> EncodedWindow:
        window, looks = self.window(examples, keys, hour), looks or Looks()
        self.late = self.late.after(
            examples,
            keys,
            joined_clicks(hour + 1, np.where(examples.labels_R > 0, hour, -1)),
            window,
            self.memory.histories(examples),
            looks,
            np.full(examples.num_rows, -0.25, np.float32),
            reached=np.arange(examples.num_rows),
            reached_D=np.ones(len(looks.places_D), bool) if reached_D is None else reached_D,
            spec=self.spec,
        )
        self.memory.add(examples, hour)
        return window


def keys_of(hour: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.random.default_rng(hour).permutation(ROWS).astype(np.uint64) + np.uint64(1000 * (hour - HOUR + 9))


@pytest.fixture
def model(spec: DatasetSpec, small_examples: Callable[..., Examples]) -> Model:
    """Two hours learned."""
    model = Model(spec)
    for hour in (HOUR, HOUR + 1):
        model.learned(small_examples(ROWS, seed=hour - HOUR, hour=hour), keys_of(hour), hour)
    return model


def test_a_late_click_is_learned_with_what_was_known_at_its_impressions_own_time(
    spec: DatasetSpec, small_examples: Callable[..., Examples]
) -> None:
    model = Model(spec)
    model.learned(small_examples(ROWS, seed=7, hour=HOUR - 1), keys_of(HOUR - 1), HOUR - 1)
    shown = small_examples(ROWS, seed=0, hour=HOUR)
    first = model.learned(shown, keys_of(HOUR), HOUR)
    late = np.flatnonzero(shown.labels_R == 0)[[4, 1, 9]]
    new = small_examples(20, seed=3, hour=HOUR + 1)
    both = concatenate([new, as_corrections(shown.take(late))])
    keys = np.concatenate([keys_of(HOUR + 1)[:20], keys_of(HOUR)[late]])
    window = model.window(both, keys, HOUR + 1)
    was, now = first.minibatch(late), window.minibatch(np.arange(20, 23))
    raw = first.raw_dense_NR[:, late]
    np.testing.assert_array_equal(window.raw_dense_NR[:, 20:], raw)
    today = encode(shown.take(late), spec, model.memory, None, hour=HOUR + 1, ids=model.ids).raw_dense_NR
    assert (today != raw).any(), "counters have gone on"
    for tensor in (was.deep, was.wide):
        other = now.deep if tensor is was.deep else now.wide
        np.testing.assert_array_equal(tensor.values().numpy(), other.values().numpy())
        np.testing.assert_allclose(tensor.weights().numpy(), other.weights().numpy(), rtol=1e-6)
    assert window.labels_R[20:].tolist() == [1, 1, 1]
    assert window.weights_R[20:].tolist() == [1, 1, 1]
    shares = model.late.delays.known_shares()
    assert window.looks_R3 is not None
    np.testing.assert_allclose(np.exp(window.looks_R3[20:, 0]), 1 - shares[1], rtol=1e-5)
    np.testing.assert_allclose(np.exp(window.looks_R3[:20, :2]), [[1, 1 - shares[1]]] * 20, rtol=1e-5)
    assert window.looks_R3[:, 2].tolist() == [0.0] * 20 + [0.25] * 3, "what learning the first look moved is given back"
    np.testing.assert_allclose(window.known_share(np.arange(20)), shares[1], rtol=1e-5)


def test_a_late_click_without_its_impression_is_not_learned_and_counted(
    model: Model, small_examples: Callable[..., Examples]
) -> None:
    late = as_corrections(small_examples(2, seed=0, hour=HOUR))
    unknown = np.array([77_777, 88_888], np.uint64)
    kept = model.late.awaiting.keys_K[:1]
    assert model.late.num_unknown(np.append(unknown, kept)) == 2
    new = small_examples(5, seed=3, hour=HOUR + 2)
    for keys, weights in ((unknown, [0, 0]), (np.append(kept, unknown[:1]), [1, 0])):
        window = model.window(concatenate([new, late]), np.concatenate([keys_of(HOUR + 2)[:5], keys]), HOUR + 2)
        assert window.weights_R[5:].tolist() == weights
        assert Model(model.spec).window(late, unknown, HOUR).weights_R.tolist() == [0, 0]


def test_kept_are_impressions_without_a_click_until_all_their_clicks_are_known(
    model: Model, small_examples: Callable[..., Examples]
) -> None:
    shown = [small_examples(ROWS, seed=hour, hour=HOUR + hour) for hour in range(2)]
    not_clicked = [keys_of(HOUR + hour)[rows.labels_R == 0] for hour, rows in enumerate(shown)]
    awaiting = model.late.awaiting
    assert set(awaiting.keys_K) == set(np.concatenate(not_clicked))
    assert (np.diff(awaiting.keys_K.astype(np.int64)) > 0).all()
    assert (awaiting.find(awaiting.keys_K) == np.arange(len(awaiting.keys_K))).all()
    late = as_corrections(shown[1].take(np.flatnonzero(shown[1].labels_R == 0)[:3]))
    model.learned(late, not_clicked[1][:3], HOUR + 2)
    assert set(model.late.awaiting.keys_K) == set(np.concatenate(not_clicked)) - set(not_clicked[1][:3])
    model.learned(shown[0].take(np.arange(0)), np.empty(0, np.uint64), HOUR + 3)
    assert set(model.late.awaiting.keys_K) == set(not_clicked[1][3:]), "those of the first hour are four hours old"
    model.learned(shown[0].take(np.arange(0)), np.empty(0, np.uint64), HOUR + 4)
    assert model.late.awaiting.rows is None


def test_looks_stand_for_all_rows_and_those_not_reached_stand_for_theirs_later(model: Model) -> None:
    awaiting, delays = model.late.awaiting, model.late.delays
    assert awaiting.rows is not None
    shares, until = delays.known_shares(), HOUR + 3
    age = until - awaiting.rows.examples.hour_R
    probability = shares[np.minimum(age, 4)] - shares[np.minimum(age - 1, 4)]
    came, weights, counts = awaiting.keys_K[:5], np.zeros(len(age)), np.zeros(len(age))
    for seed in range(3000):
        places, own = awaiting.drawn(delays, came, until, [seed])
        weights[places] += own
        counts[places] += 1
    assert (weights[:5] == 0).all()
    np.testing.assert_allclose(counts[5:] / 3000, probability[5:], atol=0.04)
    assert weights[5:].mean() / 3000 == pytest.approx(1, abs=0.02)
    places, own = awaiting.drawn(delays, came, until, [0])
    reached = np.arange(len(places)) % 2 == 0
    looks = Looks(places_D=places, weights_D=own)
    nothing = awaiting.rows.take(np.arange(0))
    after = awaiting.after(
        nothing,
        np.empty(0, np.uint64),
        np.empty(0, np.float32),
        came=came,
        drawn_D=looks.places_D,
        weights_D=looks.weights_D,
        reached_D=reached,
        end=until,
        known_until=until,
        ages=9,
    )
    missed = after.find(awaiting.keys_K[places[~reached]])
    np.testing.assert_array_equal(after.known_until_K[missed], awaiting.known_until_K[places[~reached]])
    np.testing.assert_array_equal(after.weights_K[missed], own[~reached])
    others = np.setdiff1d(np.arange(len(after.keys_K)), missed)
    assert (after.known_until_K[others] == until).all()
    assert (after.weights_K[others] == 1).all()


def test_looks_stand_behind_the_window_and_leave_its_mean_weight(model: Model, small_examples: Callable[..., Examples]) -> None:
    examples = small_examples(40, seed=3, hour=HOUR + 2).with_weights(np.full(40, 3.0, np.float32))
    window = model.window(examples, keys_of(HOUR + 2)[:40], HOUR + 2)
    kept_R = np.arange(40) < 30
    sampled = SampledWindow(window=window, stratum_R=None, kept_R=kept_R, plan=None)
    came, spec, ids = np.empty(0, np.uint64), model.spec, model.ids
    after, looks = model.late.looking_back(sampled, came, HOUR + 3, spec, ids, seed=[1], hour=HOUR + 2)
    assert len(looks.places_D) > 0
    assert after.window.num_rows == 40 + len(looks.places_D)
    assert after.kept_R is not None
    assert after.kept_R[40:].all()
    assert after.mean_weight == 3
    assert (after.window.labels_R[40:] == 0).all()
    np.testing.assert_array_equal(after.window.weights_R[40:], looks.weights_D)


def test_they_are_the_same_after_a_checkpoint(model: Model) -> None:
    num_dense = len(model.window(_nothing(model), np.empty(0, np.uint64), HOUR + 2).raw_dense_NR)
    again = LateClicks.load(model.late.arrays(), model.spec, num_dense)
    first, second = ({name: array.tobytes() for name, array in each.arrays().items()} for each in (model.late, again))
    assert first == second
    assert LateClicks.load(model.late.arrays(), model.spec, num_dense + 1).awaiting.rows is None
    plain = model.spec.model_copy(update={"clicks": None})
    assert LateClicks.nothing(plain).arrays() == {}


def _nothing(model: Model) -> Examples:
    assert isinstance(model.late.awaiting.rows, PastRows)
    return model.late.awaiting.rows.examples.take(np.arange(0))


TOML = """
name = "late"
user = "user"
event_key = ["event_id"]
[time]
column = "time"
[clicks]
files = "clicks-*"
attribution_minutes = 240
[[categorical]]
name = "user"
type = "integer"
capacity = 64
embedding_dim = 4
"""
CTR, QUICK = 0.3, 0.25
"""One click of four comes in the hour of its impression."""


@pytest.mark.parametrize("delay_hours", [0, 2])
def test_a_model_of_late_clicks_predicts_how_many_will_come(tmp_path: Path, delay_hours: int) -> None:
    (tmp_path / "late.toml").write_text(TOML)
    (tmp_path / "landing").mkdir()
    places = [f"dataset={tmp_path / 'late.toml'}", f"landing={tmp_path / 'landing'}", f"state_dir={tmp_path / 'state'}"]
    own = ["model.hidden=[4]", "model.interaction_dim=4", "training.precision='fp32'", "training.dense_learning_rate=0.02"]
    plain = ["training.batch_policy=fixed", "training.batch_size=64", "tracking.enabled=false", "alarms.action=off"]
    config = load_config(overrides=[*places, *own, *plain, f"window.label_delay_minutes={60 * delay_hours}"])
    spec, rng = load_spec(config.dataset), np.random.default_rng(0)
    log, quarantine = ClickLog.open_or_create(config.log_path, spec), Quarantine.open_or_create(config.quarantine_path)
    start, predicted, known, corrected = datetime(2026, 1, 1, tzinfo=UTC), [], [], 0
    delayed: list[tuple[int, int, str]] = []
    for hour in range(16):
        clicked = rng.random(600) < CTR
        delay = np.where(rng.random(600) < QUICK, 0, rng.integers(1, 4, 600))
        ids = [f"{hour}-{row}" for row in range(600)]
        delayed += [(hour, hour + int(delay[row]), ids[row]) for row in np.flatnonzero(clicked)]
        now = [event for _, due, event in delayed if due == hour]
        end = start + timedelta(hours=hour + 1)
        columns = {"event_id": ids, "time": _times(end, 600, minutes=60), "user": rng.integers(0, 20, 600)}
        pq.write_table(pa.table(columns), tmp_path / "landing" / f"shown-{hour}.parquet")
        clicks = {"event_id": now, "time": _times(end, len(now), minutes=1)}
        pq.write_table(pa.table(clicks), tmp_path / "landing" / f"clicks-{hour}.parquet")
        ingest_landing(config.landing, log, quarantine, spec, now=end)
        report = run_update(config, now=end)
        if hour < delay_hours:
            assert report is None
            continue
        assert report is not None
        assert not any("not learned" in note for note in report.notes)
        corrected += report.clicks_corrected
        if hour >= 11:
            assert report.before is not None
            predicted.append(report.before.mean_probability / report.clicks_known_share)
            known.append(report.clicks_known_share)
    assert np.mean(known) == pytest.approx(QUICK + delay_hours * (1 - QUICK) / 3, abs=0.03)
    assert np.mean(predicted) == pytest.approx(CTR, abs=0.03)
    late = [due for shown, due, _ in delayed if shown + delay_hours < due < 16 - delay_hours]
    assert corrected == len(late)


def _times(end: datetime, count: int, *, minutes: int) -> pa.Array:
    return pa.array([end - timedelta(minutes=minutes)] * count, pa.timestamp("us", "UTC"))
