"""A click that comes late is learned once, as what it is: whatever arrives in what order, and whatever is killed."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_schemas.dataset import Clicks, DatasetSpec
from data_schemas.errors import ConfigError
from data_schemas.examples import Examples
from pipeline.config import MaintenanceConfig, SamplingConfig, WindowConfig
from pipeline.data.clicks import as_corrections, is_correction, join_clicks, require_correctable
from pipeline.data.compaction import compact
from pipeline.data.held import decide, held_windows, hold_aside
from pipeline.data.ingest import IngestReport, ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.windows import Cursor, Window, next_window, read_pieces, read_window

SPEC = DatasetSpec.model_validate(
    {
        "name": "shop",
        "time": {"column": "at", "format": "unix_seconds"},
        "clicks": {"column": "kind", "attribution_minutes": 120},
        "event_key": ("id",),
        "categorical": ({"name": "id", "type": "integer"}, {"name": "item"}),
        "numeric": ({"name": "price"},),
    }
)
START = datetime(2024, 1, 1, tzinfo=UTC)
NOW = START + timedelta(days=9)


class Shop:
    """A landing folder and its click log."""

    def __init__(self, folder: Path, spec: DatasetSpec = SPEC) -> None:
        self.spec, self.landing = spec, folder / "landing"
        self.landing.mkdir(parents=True)
        self.log = ClickLog.open_or_create(folder / "log", spec)
        self.quarantine = Quarantine.open_or_create(folder / "quarantine")
        self.files = 0

    def arrive(self, *events: tuple[str, int, float], name: str = "") -> IngestReport:
        """`(kind, id, hour)` of each event; clicks know nothing but their id and time."""
        lines = ["kind,id,at,item,price"]
        for kind, key, hour in events:
            features = ",," if kind == "click" else f",item-{key},{key}.5"
            lines.append(f"{kind},{key},{(START + timedelta(hours=hour)).timestamp():.0f}{features}")
        self.files += 1
        (self.landing / (name or f"{self.files:03d}.csv")).write_text("\n".join(lines) + "\n")
        return ingest_landing(str(self.landing), self.log, self.quarantine, self.spec, now=NOW)

    def window(self, cursor: Cursor, config: WindowConfig | None = None) -> Window | None:
        config = config or WindowConfig()
        window = next_window(self.log, cursor, config, NOW)
        return window and join_clicks(self.log, window, self.spec, config.label_delay_minutes)

    def learn(
        self, cursor: Cursor, unreached: list[bool] | None = None, config: WindowConfig | None = None
    ) -> tuple[Cursor, list[tuple[int, int]]]:
        """The next cursor, and `(id, label)` of what was learned; a correction has label 2."""
        window = self.window(cursor, config)
        assert window is not None
        assert window.clicks is not None
        events = read_window(self.log, window, ["id", "is_click"]).to_pylist()
        shown = [event["id"] for event in events if not event["is_click"]]
        examples = [(key, int(clicked)) for key, clicked in zip(shown, window.clicks.clicked_I.tolist(), strict=True)]
        corrected = read_pieces(self.log, window.clicks.corrected, ["id"])["id"].to_pylist()
        examples += [(key, 2) for key in corrected]
        left = np.array(unreached if unreached is not None else [False] * len(examples), bool)
        learned = [example for example, stays in zip(examples, left.tolist(), strict=True) if not stays]
        return window.cursor_after(left), learned


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_a_click_that_is_known_in_time_is_the_label(shop: Shop) -> None:
    report = shop.arrive(("shown", 1, 0.1), ("shown", 2, 0.2), ("click", 2, 0.9), ("click", 1, 1.1))
    assert (report.rows_accepted, report.rows_rejected) == (4, 0)
    cursor, learned = shop.learn(Cursor(), config=WindowConfig(label_delay_minutes=60))
    assert learned == [(1, 1), (2, 1)], "the delay gives it time"
    assert cursor.pending == ()


def test_what_is_known_of_a_window_does_not_depend_on_when_it_is_learned(shop: Shop) -> None:
    shop.arrive(("shown", 1, 0.1), ("shown", 2, 0.2), ("click", 2, 0.9), ("click", 1, 1.1))
    cursor, learned = shop.learn(Cursor())
    assert learned == [(1, 0), (2, 1)], "the click of the next hour is there already, and is not looked at"
    window = shop.window(cursor)
    assert window is not None
    assert window.clicks is not None
    assert (window.clicks.known_until - int(START.timestamp()) // 3600, window.clicks.num_corrections) == (2, 1)
    assert (window.clicks.click_hour_E - int(START.timestamp()) // 3600).tolist() == [1]


def test_a_click_that_comes_after_its_impression_was_learned_corrects_it_once(shop: Shop) -> None:
    shop.arrive(("shown", 1, 0.1), ("shown", 2, 0.2))
    cursor, learned = shop.learn(Cursor())
    assert learned == [(1, 0), (2, 0)]
    shop.arrive(("shown", 3, 1.5), ("click", 1, 1.2), ("click", 1, 1.3))
    after, learned = shop.learn(cursor)
    assert learned == [(3, 0), (1, 2)]
    assert shop.arrive(("click", 1, 1.2), name="again.csv").rows_duplicate == 1
    shop.arrive(("shown", 4, 2.5), ("click", 1, 1.8), name="other.csv")
    assert shop.learn(after)[1] == [(4, 0)]
    assert shop.learn(cursor)[1] == [(3, 0), (1, 2)], "after a rollback it is learned again"


def test_a_click_waits_with_an_impression_that_was_not_reached(shop: Shop) -> None:
    shop.arrive(("shown", 1, 0.1), ("shown", 2, 0.2), ("click", 1, 0.3))
    cursor, learned = shop.learn(Cursor(), unreached=[True, False])
    assert learned == [(2, 0)]
    assert [piece.num_rows for piece in cursor.pending] == [2]
    shop.arrive(("shown", 3, 1.5))
    cursor, learned = shop.learn(cursor)
    assert sorted(learned) == [(1, 1), (3, 0)]
    assert cursor.pending == ()


def test_a_click_waits_for_an_impression_that_the_window_has_no_room_for(shop: Shop) -> None:
    shop.arrive(("click", 1, 0.5), ("shown", 2, 0.1))
    shop.arrive(("shown", 1, 0.1))
    window = shop.window(Cursor(), WindowConfig(max_rows=2))
    assert window is not None
    assert window.clicks is not None
    assert (window.num_rows, window.clicks.waiting, window.clicks.num_corrections) == (2, 1, 0)
    shop.arrive(("shown", 3, 1.1))
    cursor, learned = shop.learn(window.cursor_after())
    assert sorted(learned) == [(1, 1), (3, 0)]
    assert cursor.pending == ()


def test_a_correction_that_was_not_reached_comes_again(shop: Shop) -> None:
    shop.arrive(("shown", 1, 0.1))
    cursor, _ = shop.learn(Cursor())
    shop.arrive(("shown", 2, 1.1), ("click", 1, 1.2))
    cursor, learned = shop.learn(cursor, unreached=[False, True])
    assert learned == [(2, 0)]
    shop.arrive(("shown", 3, 2.1))
    cursor, learned = shop.learn(cursor)
    assert learned == [(3, 0), (1, 2)]
    assert cursor.pending == ()


def test_a_click_waits_for_an_impression_that_comes_after_it_and_is_given_up_in_the_end(shop: Shop) -> None:
    shop.arrive(("shown", 1, 0.1), ("click", 7, 0.5), ("click", 8, 0.6))
    cursor, learned = shop.learn(Cursor())
    assert learned == [(1, 0)]
    shop.arrive(("shown", 7, 0.4), ("shown", 2, 1.1))
    window = shop.window(cursor)
    assert window is not None
    assert window.clicks is not None
    assert window.clicks.waiting == 1
    cursor, learned = shop.learn(cursor)
    assert sorted(learned) == [(2, 0), (7, 1)]
    shop.arrive(("shown", 3, 3.1))
    window = shop.window(cursor)
    assert window is not None
    assert window.clicks is not None
    assert (window.clicks.waiting, window.clicks.unattributed) == (0, 1)
    assert window.cursor_after().pending == ()


def test_a_click_that_is_too_late_for_its_impression_changes_nothing(shop: Shop) -> None:
    shop.arrive(("shown", 1, 0.1))
    cursor, _ = shop.learn(Cursor())
    shop.arrive(("shown", 2, 2.2), ("click", 1, 2.11), ("click", 2, 2.1))
    cursor, learned = shop.learn(cursor)
    assert learned == [(2, 0)]


def test_a_click_on_a_discarded_impression_is_left_out_and_one_on_a_held_one_waits(shop: Shop, tmp_path: Path) -> None:
    shop.arrive(("shown", 1, 0.1))
    first = shop.window(Cursor())
    assert first is not None
    hold_aside(
        tmp_path,
        start=first.start,
        end=first.end,
        log_version=first.log_version,
        pieces=first.pieces,
        kind="alarm",
        reason="looks odd",
        now=NOW,
    )
    shop.arrive(("click", 1, 1.2), ("shown", 2, 1.1))
    fates = []
    for _ in range(2):
        window = next_window(shop.log, Cursor(), WindowConfig(), NOW, held_windows(tmp_path))
        assert window is not None
        window = join_clicks(shop.log, window, shop.spec)
        assert window.clicks is not None
        fates.append((window.clicks.waiting, window.clicks.unattributed, window.clicks.num_corrections))
        if len(fates) == 1:
            decide(tmp_path, held_windows(tmp_path)[0].id, "discarded")
    assert fates == [(1, 0, 0), (0, 1, 0)]


def test_files_of_clicks_need_nothing_but_time_and_key(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"clicks": Clicks(files="*clicks*", attribution_minutes=120)})
    shop = Shop(tmp_path, spec)
    (shop.landing / "clicks-1.csv").write_text(f"id,at\n1,{(START + timedelta(hours=0.5)).timestamp():.0f}\nx,1\n")
    (shop.landing / "shown-1.csv").write_text(
        f"id,at,item,price\n1,{START.timestamp():.0f},a,1\n2,{START.timestamp():.0f},a,1\n"
    )
    report = ingest_landing(str(shop.landing), shop.log, shop.quarantine, spec, now=NOW)
    assert (report.rows_accepted, report.rows_rejected, report.files_broken) == (3, 1, 0)
    assert shop.learn(Cursor())[1] == [(1, 1), (2, 0)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"event_key": ("at",)}, "not its time"),
        ({"event_key": ("*",)}, "not its time"),
        ({"repeats": "keep"}, "unique"),
        ({"label": {"column": "clicked"}}, "what the label is made of"),
        ({"clicks": {"attribution_minutes": 5}}, "'column', which tells clicks"),
    ],
)
def test_a_declaration_that_cannot_join_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DatasetSpec.model_validate(SPEC.model_dump(exclude={"label"}) | change)


def test_settings_under_which_a_correction_undoes_nothing_are_refused() -> None:
    require_correctable(SPEC, SamplingConfig())
    for sampling in (SamplingConfig(replay_share=0.1), SamplingConfig(negative_keep_rate=0.5, correction="logit_shift")):
        with pytest.raises(ConfigError, match="come later than their impressions"):
            require_correctable(SPEC, sampling)


def test_a_correction_counts_one_click_and_next_to_no_impression(small_examples: Callable[..., Examples]) -> None:
    rows = small_examples(9)
    examples = replace(rows, labels_R=np.zeros(9, np.float32))
    correction = as_corrections(examples)
    assert is_correction(correction.labels_R).all()
    assert not is_correction(rows.labels_R).any()
    assert (correction.labels_R * correction.weights_R == 1).all()
    assert correction.weights_R.max() < 1e-3


Event = st.tuples(st.sampled_from(["shown", "click"]), st.integers(0, 5), st.integers(0, 3), st.integers(0, 5))
Steps = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.lists(Event, min_size=1, max_size=5)),
        st.tuples(st.just("learn"), st.sampled_from([0.0, 0.5, 1.0])),
        st.tuples(st.just("compact"), st.just(2)),
        st.tuples(st.just("roll back"), st.integers(0, 9)),
    ),
    min_size=4,
    max_size=14,
)


@settings(deadline=None, max_examples=12)
@given(steps=Steps, seed=st.integers(0, 2**32))
def test_every_impression_ends_as_what_it_is(steps: list[tuple[str, object]], seed: int) -> None:
    """An impression is learned once; it ends as a positive, at once or by one correction, just if it was clicked in time.

    Impression k is shown in the hour k / 2, and clicked up to three hours later; within two hours it counts. A click that
    arrived before its impression may have been given up by then.
    """
    folder = Path(mkdtemp())
    try:
        _check(Shop(folder), steps, np.random.default_rng(seed))
    finally:
        shutil.rmtree(folder)


def _check(shop: Shop, steps: list[tuple[str, object]], rng: np.random.Generator) -> None:
    kept: list[tuple[Cursor, Counter[tuple[int, int]]]] = [(Cursor(), Counter())]
    shown, clicked, may_be_given_up = set[int](), dict[int, float](), set[int]()
    for what, value in [*steps, *[("close", hour) for hour in range(6, 12)]]:
        match what, value:
            case "arrive", list():
                events = []
                for kind, key, hours, sixth in value:
                    at = key / 2 + (hours + sixth / 6 + 0.01 if kind == "click" else 0.0)
                    if kind == "click" and key in clicked:
                        continue  # of several clicks the first to arrive counts; here there is one
                    events.append((kind, key, at))
                    if kind == "shown" and key not in shown:
                        may_be_given_up |= {key} & clicked.keys()
                        shown.add(key)
                    clicked |= {key: at} if kind == "click" else {}
                shop.arrive(*events)
            case "compact", _:
                compact(shop.log, MaintenanceConfig(compact_files=2, compact_after_hours=0))
            case "learn", float():
                kept.append(_learned(shop, *kept[-1], value, rng))
            case "roll back", place:
                kept = kept[: int(str(place)) % len(kept) + 1]
            case _, hour:
                shop.arrive(("shown", 100 + int(str(hour)), float(str(hour))))
                while shop.window(kept[-1][0]) is not None:
                    kept.append(_learned(shop, *kept[-1], 1.0, rng))
    cursor, learned = kept[-1]
    assert cursor.pending == ()
    for key in shown:
        in_time = key in clicked and clicked[key] - key / 2 <= 2
        assert learned[key, 0] + learned[key, 1] == 1
        corrected_or_not = {in_time, False} if key in may_be_given_up else {in_time}
        assert learned[key, 1] + learned[key, 2] in corrected_or_not, (key, clicked.get(key))


def _learned(
    shop: Shop, cursor: Cursor, learned: Counter[tuple[int, int]], share: float, rng: np.random.Generator
) -> tuple[Cursor, Counter[tuple[int, int]]]:
    window = shop.window(cursor)
    if window is None or window.clicks is None:
        return cursor, learned
    num_examples = len(window.clicks.clicked_I) + window.clicks.num_corrections
    cursor, examples = shop.learn(cursor, unreached=(rng.random(num_examples) >= share).tolist())
    return cursor, learned + Counter(examples)
