"""Row groups are shared out over processes: no row twice, none lost, all in the order of the log."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_schemas.dataset import load_spec
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.lineage import Piece
from pipeline.data.shares import Part, own_share, owners, read_examples
from pipeline.data.synthetic import SyntheticConfig, write_landing
from pipeline.data.windows import read_pieces
from pipeline.training.processes import Processes


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 20))
def test_groups_go_to_processes_in_order_and_about_evenly(num_rows: list[int], count: int) -> None:
    owner = owners(num_rows, count)
    assert len(owner) == len(num_rows)
    assert owner == sorted(owner)
    assert all(0 <= rank < count for rank in owner)
    read = np.bincount(owner, weights=num_rows, minlength=count) if num_rows else np.zeros(count)
    assert max(read) <= sum(num_rows) / count + max(num_rows, default=0)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ClickLog:
    """Three hours of the synthetic stream, each file in several row groups."""
    folder, spec = tmp_path_factory.mktemp("log"), load_spec("synthetic")
    write_landing(SyntheticConfig(hours=3, rows_per_hour=60, num_users=20, num_items=20, num_authors=5), folder / "landing")
    log = ClickLog.open_or_create(folder / "click_log", spec)
    quarantine = Quarantine.open_or_create(folder / "quarantine")
    ingest_landing(str(folder / "landing"), log, quarantine, spec, now=datetime(2026, 1, 2, tzinfo=UTC))
    for number, file in enumerate(log.files()):
        path = log.root / file.path
        pq.write_table(pq.read_table(path, partitioning=None), path, row_group_size=7 + number, write_page_checksum=True)
    return log


def _rows(log: ClickLog, parts: list[Part]) -> list[tuple[str, int]]:
    found = []
    for part in parts:
        rows = np.arange(part.rows.start, part.rows.stop)
        found += [(part.rows.file.path, int(row)) for row in (rows if part.mask is None else rows[part.mask])]
    return found


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_every_row_is_read_once(log: ClickLog, count: int, seed: int) -> None:
    """Of random rows of random files, some files whole; with up to more processes than row groups."""
    rng = np.random.default_rng(seed)
    files = [file for file in log.files() if rng.random() < 0.8]
    masks = [None if rng.random() < 0.3 else rng.random(file.num_rows) < rng.random() for file in files]
    pieces = [Piece(file=file, mask=mask) for file, mask in zip(files, masks, strict=True)]
    wanted = [(piece.file.path, int(row)) for piece in pieces for row in np.flatnonzero(piece.rows)]
    shares = [_rows(log, own_share(log, pieces, Processes(rank=rank, count=count))) for rank in range(count)]
    assert [row for share in shares for row in share] == wanted


def test_one_process_reads_what_the_log_holds(log: ClickLog) -> None:
    spec = load_spec("synthetic")
    pieces = [Piece(file=file, mask=np.arange(file.num_rows) % 3 > 0) for file in log.files()]
    read, table = read_examples(log, pieces, spec, Processes()), read_pieces(log, pieces, ["label", "event_time"])
    np.testing.assert_array_equal(read.examples.labels_R, table["label"].to_numpy())
    hours = table["event_time"].cast(pa.int64()).to_numpy() // 3_600_000_000
    np.testing.assert_array_equal(read.examples.hour_R, hours)
    assert len(read.sample) == 5
    assert read.event_keys is None
