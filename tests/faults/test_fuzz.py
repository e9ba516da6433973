"""Any bytes in any format: every row is accepted, or quarantined with a reason; every file is read, or quarantined whole."""

import gzip
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INPUTS_A_PLACE = 25
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
MARKS = [b'"', b"\n", b"\0", b",", b"{", b"\xff\xfe", b"\r", b"|", b"=cmd|' /C calc'!A0", b"PAR1"]
NOISE = st.binary(max_size=40) | st.sampled_from(MARKS)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.text(max_size=5) | st.none() | st.integers(), max_size=4),
    st.sampled_from(["", "NaN", "inf", "-0", "1e400", "2024-02-30", "2024-05-01T00:00:00Z", "9999-12-31", "x" * 2000]),
)
NAMES = ("event_id", "at", "clicked", "item", "tags", "price")
ROWS = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, VALUES)), max_size=5)


@st.composite
def files(draw: st.DrawFn, made: Any) -> tuple[str, bytes]:
    """A name and bytes: good rows, rows with any values, good files with noise in them, or noise alone."""
    suffix = draw(st.sampled_from(sorted(made.writers)))
    plain = suffix.removesuffix(".gz")
    kind = draw(st.sampled_from(["values", "noise", "cut", "alone"]))
    if kind == "alone":
        return suffix, draw(NOISE)
    rows = [made.event(number) for number in range(draw(st.integers(0, 5)))]
    if kind == "values" and plain != ".parquet":
        rows += [made.event(number) | row for number, row in enumerate(draw(ROWS), start=50)]
    content = made.writers[plain](rows)
    if kind != "values":
        at = draw(st.integers(0, len(content)))
        noise = b"" if kind == "cut" else draw(NOISE)
        rest = len(content) if kind == "cut" else at + draw(st.sampled_from([0, len(noise)]))
        content = content[:at] + noise + content[rest:]
    return suffix, gzip.compress(content, mtime=0) if suffix != plain else content


class _Places:
    """A place for each input, the same one for some in a row: to make one costs more than to ingest a file."""

    def __init__(self, root: Path, made: Any) -> None:
        self._root, self._made, self._used = root, made, 0

    def next(self) -> Any:
        """A landing folder without files, a click log and a quarantine."""
        if self._used % INPUTS_A_PLACE == 0:
            shutil.rmtree(self._root, ignore_errors=True)
            self._place = self._made.place(self._root)
        for path in self._place.landing.iterdir():
            path.unlink()
        self._used += 1
        return self._place


def _fuzz(tmp_path: Path, made: Any, examples: int) -> Counter[str]:
    seen, places = Counter[str](), _Places(tmp_path / "place", made)

    @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET, database=None, derandomize=True)
    @given(file=files(made))
    def every_input_has_an_outcome(file: tuple[str, bytes]) -> None:
        place = places.next()
        before = place.quarantine.rows().num_rows, sum(found.num_rows for found in place.log.files())
        place.arrive(f"{seen['files']}{file[0]}", file[1])
        report = place.ingest()
        assert report.files_read + report.files_broken == 1
        bad = place.quarantine.rows().slice(before[0]).to_pylist()
        assert report.rows_rejected + report.files_broken == len(bad)
        assert all(row["reason"] for row in bad)
        assert before[1] + report.rows_accepted == len(place.rows())
        assert place.orphans() == set()
        seen["files"] += 1
        seen["refused whole"] += report.files_broken
        seen["rows accepted"] += report.rows_accepted
        seen["rows known already"] += report.rows_duplicate
        seen["rows quarantined"] += report.rows_rejected

    every_input_has_an_outcome()
    return seen


def test_a_few_hundred_inputs(tmp_path: Path, made: Any, tell: Callable[[str], None]) -> None:
    seen = _fuzz(tmp_path, made, 150)
    tell(f"{dict(seen)}")
    assert min(seen["refused whole"], seen["rows accepted"], seen["rows quarantined"]) > 0


@pytest.mark.slow
def test_ten_thousand_inputs(tmp_path: Path, made: Any, tell: Callable[[str], None]) -> None:
    seen = _fuzz(tmp_path, made, 10_000)
    tell(f"{dict(seen)}")
    assert seen["files"] >= 10_000
