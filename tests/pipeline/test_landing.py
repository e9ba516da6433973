"""Files as they arrive."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_schemas.dataset import Categorical, DatasetSpec, FileDialect, TimeColumn
from data_schemas.errors import BrokenFile, DataError
from pipeline.data import landing as landing_module
from pipeline.data.landing import LandingFile, RawBatch, list_landing, read_batches


def make_spec(*, file: FileDialect | None = None) -> DatasetSpec:
    return DatasetSpec(
        name="shop",
        time=TimeColumn(column="at"),
        event_key=("at",),
        categorical=(Categorical(name="item"), Categorical(name="tags", many=True)),
        file=file or FileDialect(),
    )


def only_file(folder: Path, name: str, content: bytes) -> LandingFile:
    (folder / name).write_bytes(content)
    (found,) = (file for file in list_landing(str(folder)).files if Path(file.path).name == name)
    return found


def read(folder: Path, name: str, content: bytes, spec: DatasetSpec | None = None) -> list[RawBatch]:
    return list(read_batches(only_file(folder, name, content), spec or make_spec()))


def items(batches: list[RawBatch]) -> list[str]:
    values = [value for batch in batches for value in batch.columns.column("item").to_pylist()]
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def rows(batches: list[RawBatch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.rows]


def malformed(batches: list[RawBatch]) -> list[tuple[int | None, str]]:
    return [(row.row, row.reason) for batch in batches for row in batch.malformed]


CSV = b"at,item,tags,unused\n2024-01-01,a,x|y,1\n2024-01-02,b,,2\n"
JSON = b'{"at":"2024-01-01","item":"a","tags":["x","y"]}\n{"at":"2024-01-02","item":"b","tags":null,"more":1}\n'


def parquet(num_rows: int = 2, row_group_size: int = 1000) -> bytes:
    sink = pa.BufferOutputStream()
    columns = {
        "at": pa.array(np.arange(num_rows), pa.timestamp("s", tz="UTC")),
        "item": [chr(ord("a") + row % 26) for row in range(num_rows)],
        "tags": [["x", "y"]] * num_rows,
    }
    pq.write_table(pa.table(columns), sink, row_group_size=row_group_size, write_page_checksum=True)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV),
        ("a.CSV", CSV),
        ("a.txt", CSV),
        ("a.b.csv.gz", gzip.compress(CSV, mtime=0)),
        ("two-members.csv.gz", gzip.compress(CSV[:20], mtime=0) + gzip.compress(CSV[20:], mtime=0)),
        ("bom.csv", b"\xef\xbb\xbf" + CSV),
        ("windows.csv", CSV.replace(b"\n", b"\r\n")),
        ("no-last-newline.csv", CSV[:-1]),
        ("a.jsonl", JSON),
        ("a.ndjson", JSON),
        ("a.json", JSON[:-1]),
        ("a.jsonl.gz", gzip.compress(JSON, mtime=0)),
        ("a.parquet", parquet()),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    batches = read(tmp_path, name, content)
    assert items(batches) == ["a", "b"]
    assert rows(batches) == [1, 2]
    assert malformed(batches) == []
    assert "unused" not in batches[0].columns.column_names


def test_a_delimited_file_without_a_header_gets_its_names_from_the_spec(tmp_path: Path) -> None:
    spec = make_spec(file=FileDialect(delimiter="\t", columns=("at", "item", "tags")))
    batches = read(tmp_path, "a.tsv", b"2024-01-01\ta\tx\nshort\n2024-01-02\tb\ty\n", spec)
    assert items(batches) == ["a", "b"]
    assert rows(batches) == [1, 3]
    assert malformed(batches) == [(2, "the row has 1 values, the header 3")]


def test_quoted_line_breaks_belong_to_the_value(tmp_path: Path) -> None:
    batches = read(tmp_path, "a.csv", b'at,item,tags\n2024-01-01,"a\nb",\n2024-01-02,c,\n')
    assert items(batches) == ["a\nb", "c"]
    assert rows(batches) == [1, 2]


def test_rows_of_another_width_are_numbered_and_the_others_keep_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landing_module, "CSV_BLOCK_BYTES", 64)
    lines = [b"2024-01-01,i%d,x" % row for row in range(1, 201)]
    bad = [1, 2, 17, 18, 19, 60, 199, 200]
    for row in bad:
        lines[row - 1] = b"torn" if row % 2 else b"1,2,3,4"
    batches = read(tmp_path, "a.csv", b"at,item,tags\n" + b"\n".join(lines) + b"\n")
    assert len(batches) > 5
    assert rows(batches) == [row for row in range(1, 201) if row not in bad]
    assert items(batches) == [f"i{row}" for row in rows(batches)]
    assert [row for row, _ in malformed(batches)] == bad


def test_bad_json_lines_are_numbered_and_the_others_go_on(tmp_path: Path) -> None:
    content = JSON + b'\n[1]\n{"at":\n{"at":1,"item":{"a":1},"tags":[]}\n{"at":1,"item":2.5,"tags":["a",[1]]}\n'
    content += b'{"at":true,"item":2.50,"tags":"u|v"}\n{"at":null}\n"\xff"\n'
    batches = read(tmp_path, "a.jsonl", content)
    assert rows(batches) == [1, 2, 7, 8]
    assert batches[0].columns.column("tags").to_pylist() == [["x", "y"], None, ["u", "v"], None]
    assert batches[0].columns.column("at").to_pylist()[2:] == ["true", None]
    reasons = dict(malformed(batches))
    assert reasons[3] == "the line is not a JSON object, got [1]"
    assert "not JSON" in reasons[4]
    assert reasons[5] == "item: is a JSON dict where one value is expected, got {'a': 1}"
    assert reasons[6] == "tags: is a JSON list where one value is expected, got [1]"
    assert "not JSON" in reasons[9]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "empty"),
        ("a.parquet", b"", "empty"),
        ("a.csv.gz", gzip.compress(b"", mtime=0), "columns"),
        ("a.csv", b"\n\n", "columns"),
        ("a.csv", b"at,thing\n1,2\n", r"lacks the columns \['item', 'tags'\].*thing"),
        ("a.csv", CSV.replace(b",", b";"), "lacks the columns"),
        ("a.csv", CSV.replace(b"unused", b"item"), r"more than one column called \['item'\]"),
        ("a.csv", b"at,item,tags\n1,2\n3,4\n", "no row fits the header"),
        ("a.csv.gz", gzip.compress(CSV * 1000, mtime=0)[:-20], "[Tt]runcated"),
        ("a.csv.gz", gzip.compress(CSV, mtime=0) + b"garbage", "cannot be read"),
        ("a.csv.gz", CSV, "cannot be read"),
        ("a.jsonl.gz", gzip.compress(JSON * 1000, mtime=0)[:-20], "[Tt]runcated"),
        ("a.jsonl", b'[\n{"at":1}\n]\n'.replace(b"1}", b"1},"), "no line is a JSON object"),
        ("a.jsonl", b'{"at":1,"thing":2}\n', r"lacks the columns \['item', 'tags'\].*thing"),
        ("a.parquet", b"PAR1 not really", "cannot be read"),
        ("a.parquet", parquet(1000)[:-100], "cannot be read"),
        ("a.parquet", CSV, "cannot be read"),
    ],
)
def test_an_unreadable_file_is_broken_and_says_why(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    with pytest.raises(BrokenFile, match=words):
        read(tmp_path, name, content)


def test_a_header_alone_is_an_hour_without_rows(tmp_path: Path) -> None:
    assert items(read(tmp_path, "a.csv", b"at,item,tags\n")) == []
    assert items(read(tmp_path, "a.parquet", parquet(0))) == []


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landing_module, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(landing_module, "CSV_BLOCK_BYTES", 1000)
    with pytest.raises(BrokenFile, match="row 3 is longer"):
        read(tmp_path, "a.jsonl", JSON + b'{"at":"' + b"x" * 2000)
    with pytest.raises(BrokenFile, match="block"):
        read(tmp_path, "a.csv", CSV + b"x" * 5000)


def test_a_bit_that_flipped_in_a_page_breaks_the_file(tmp_path: Path) -> None:
    content = bytearray(parquet(5000))
    content[len(content) // 3] ^= 4
    with pytest.raises(BrokenFile):
        read(tmp_path, "a.parquet", bytes(content))


def test_a_small_file_that_unpacks_into_a_great_many_rows_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = 2_000_000
    columns = {"at": np.zeros(num_rows, np.int32), "item": np.zeros(num_rows, np.int8), "tags": np.zeros(num_rows, np.int8)}
    pq.write_table(pa.table(columns), tmp_path / "bomb.parquet")
    (bomb,) = list_landing(str(tmp_path)).files
    with pytest.raises(BrokenFile, match="2000000 rows"):
        next(read_batches(bomb, make_spec()))
    monkeypatch.setattr(landing_module, "MAX_PARQUET_CELLS", 100)
    with pytest.raises(BrokenFile, match="Split the file"):
        read(tmp_path, "wide.parquet", parquet(50))


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.parquet"])
def test_batches_of_a_large_file_are_bounded(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landing_module, "BATCH_ROWS", 1000)
    monkeypatch.setattr(landing_module, "CSV_BLOCK_BYTES", 32_000)
    content = {"csv": CSV + b"2024-01-02,b,,2\n" * 49_998, "jsonl": JSON * 25_000, "parquet": parquet(50_000, 50_000)}
    plain = content[name.split(".")[1]]
    batches = read(tmp_path, name, gzip.compress(plain, 1, mtime=0) if name.endswith("gz") else plain)
    assert rows(batches) == list(range(1, 50_001))
    assert max(batch.columns.num_rows for batch in batches) <= 2100


def test_hidden_and_unfinished_files_are_left_alone_and_unknown_ones_are_listed(tmp_path: Path) -> None:
    for name in [
        "b.csv",
        "a/c.parquet",
        "a/.d.csv",
        "_e/f.csv",
        "g.csv.tmp",
        "h.part",
        ".i.crc",
        "j.xlsx",
        "k",
        "l.parquet.gz",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = list_landing(str(tmp_path))
    assert [os.path.relpath(file.path, tmp_path) for file in found.files] == ["a/c.parquet", "b.csv"]
    assert [os.path.relpath(path, tmp_path) for path in found.unknown] == ["j.xlsx", "k", "l.parquet.gz"]


def test_the_fingerprint_changes_when_the_file_does_and_only_then(tmp_path: Path) -> None:
    before = only_file(tmp_path, "a.csv", CSV).fingerprint
    assert list_landing(str(tmp_path)).files[0].fingerprint == before
    os.utime(tmp_path / "a.csv", ns=(1, 1))
    touched = list_landing(str(tmp_path)).files[0].fingerprint
    assert touched != before
    assert only_file(tmp_path, "b.csv", CSV).fingerprint != only_file(tmp_path, "a.csv", CSV).fingerprint


def test_a_missing_folder_says_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no landing folder .*nowhere.*create it"):
        list_landing(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="cannot list"):
        list_landing("nosuchprotocol://bucket")


def test_any_fsspec_address_can_be_a_landing_folder() -> None:
    system = fsspec.filesystem("memory")
    for name, content in {"a.csv": CSV, "b.jsonl.gz": gzip.compress(JSON, mtime=0), "c.parquet": parquet()}.items():
        system.pipe(f"/landing-test/{name}", content)
    try:
        found = list_landing("memory://landing-test").files
        assert [items(list(read_batches(file, make_spec()))) for file in found] == [["a", "b"]] * 3
    finally:
        system.rm("/landing-test", recursive=True)


def test_a_file_that_vanished_is_not_called_broken(tmp_path: Path) -> None:
    file = only_file(tmp_path, "a.csv", CSV)
    (tmp_path / "a.csv").unlink()
    with pytest.raises(FileNotFoundError):
        list(read_batches(file, make_spec()))


def mutate(content: bytes, place: float, noise: bytes, kind: str) -> bytes:
    at = int(place * len(content))
    match kind:
        case "insert":
            return content[:at] + noise + content[at:]
        case "overwrite":
            return content[:at] + noise + content[at + len(noise) :]
        case _:
            return content[:at]


PACK: dict[str, Callable[[bytes], bytes]] = {"": lambda plain: plain, ".gz": lambda plain: gzip.compress(plain, mtime=0)}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a.csv", "a.jsonl", "a.parquet", "a.csv.gz", "a.jsonl.gz"]),
    place=st.floats(0, 1),
    noise=st.binary(max_size=20) | st.sampled_from([b'"', b"\n", b"\0", b",", b"{", b"\xff\xfe"]),
    kind=st.sampled_from(["insert", "overwrite", "cut", "replace"]),
)
def test_any_bytes_are_rows_or_malformed_rows_or_a_broken_file(
    tmp_path: Path, name: str, place: float, noise: bytes, kind: str
) -> None:
    plain = {"a.csv": CSV, "a.jsonl": JSON, "a.parquet": parquet()}[name.removesuffix(".gz")]
    packed = PACK[".gz" if name.endswith(".gz") else ""](plain)
    try:
        batches = read(tmp_path, name, noise if kind == "replace" else mutate(packed, place, noise, kind))
    except BrokenFile:
        return
    numbers = sorted([*rows(batches), *(row or 0 for row, _ in malformed(batches))])
    assert numbers == list(range(1, len(numbers) + 1))
