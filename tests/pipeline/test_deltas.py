"""Versions that hold what changed since a whole one: restored to the last bit, pruned and set aside with what they build on."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import Examples
from data_schemas.hashing import mix64
from pipeline.config import UpdateConfig, load_config
from pipeline.data.encode import encode, num_normalised
from pipeline.data.normalise import RunningMoments
from pipeline.data.windows import Window
from pipeline.model_state import ModelState, admit_ids, restore_or_create, restore_version, save
from pipeline.publishing import checkpoint, table_files
from pipeline.publishing.checkpoint import (
    Base,
    current_version,
    go_back_to,
    is_due,
    publish_head,
    read_manifest,
    undone_versions,
    versions,
)
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import Learned, learn
from pipeline.training.processes import Processes

T = TypeVar("T")
ROWS = 150
HISTORY = {"of": ("item",), "length": 4, "capacity": 512, "attended_clicks": 2}


@pytest.fixture
def spec(small_spec: DatasetSpec) -> DatasetSpec:
    """Tables with many more rows than a window has; ids that are admitted and evicted, histories, crosses, counters, ages."""
    own = {
        "user": {"capacity": 1024, "ids": "admitted", "admit_after": 2, "evict_after_hours": 2},
        "item": {"capacity": 4096},
    }
    categorical = [feature.model_dump() | own.get(feature.name, {}) for feature in small_spec.categorical]
    more = {"crosses": (("user", "item"),), "cross_capacity": 8192, "age_capacity": 512, "ages": ("item",), "history": HISTORY}
    counters = ({"over": ("item",), "half_lives_hours": (1.0, 24.0), "capacity": 512},)
    return DatasetSpec.model_validate(small_spec.model_dump() | {"categorical": categorical, "counters": counters} | more)


def config_in(folder: Path, *settings: str, deltas: bool = True) -> UpdateConfig:
    small = ["training.precision='fp32'", "training.batch_size=32", "training.micro_batch_size=32", "model.hidden=[8]"]
    own = [f"state_dir={folder}", "model.interaction_dim=8", f"delta_checkpoints_from_mib={0 if deltas else 1 << 20}"]
    return load_config(overrides=[*small, *own, *settings])


class Stream:
    """Hours of rows whose users and items change, so that ids come, go, and come back."""

    def __init__(self, spec: DatasetSpec, make: Callable[..., Examples]) -> None:
        self.spec, self._make = spec, make

    def hour(self, hour: int) -> Examples:
        examples = self._make(ROWS, seed=hour, hour=hour)
        rng = np.random.default_rng([hour, 7])
        user = mix64(rng.integers(100 * (hour % 3), 100 * (hour % 3) + 60, ROWS).astype(np.uint64))
        item = mix64(rng.integers(0, 5000, ROWS).astype(np.uint64) ** np.uint64(2) // np.uint64(5000))
        examples.single_ids["user"][:], examples.single_ids["item"][:] = user, item  # type: ignore[index]
        examples.user_R[:], examples.item_R[:] = user, item
        return examples

    def learned(self, state: ModelState, config: UpdateConfig, hour: int) -> tuple[ModelState, Learned]:
        examples = self.hour(hour)
        window = encode(examples, self.spec, state.memory, state.moments, hour=hour, ids=state.ids)
        window, _ = admit_ids(state, examples, window, self.spec, hour=hour)
        done = learn(state.learner, window, seed=[hour], policy=FixedBatch(batch_size=32, learning_rate=0.01))
        state.memory.add(examples, hour)
        assert state.moments is None or num_normalised(self.spec)
        before = state.moments or RunningMoments.nothing_seen(num_normalised(self.spec))
        return ModelState(**(vars(state) | {"moments": before.after(window.raw_dense_NR)})), done

    def update(self, state: ModelState, config: UpdateConfig, hour: int, *, published: bool = True) -> ModelState:
        state, done = self.learned(state, config, hour)
        bounds = Window(start=hour, end=hour + 1, log_id="log", log_version=hour, pieces=(), late_rows=0, left=())
        return save(state, bounds, done, config, self.spec, seed=(hour,), published=published)

    def restored(self, config: UpdateConfig) -> ModelState:
        return restore_or_create(config, self.spec, Processes())

    def go_on(self, config: UpdateConfig, hours: range) -> ModelState:
        """Restores before each hour."""
        for hour in hours:
            state = self.update(self.restored(config), config, hour)
        return state


@pytest.fixture
def stream(spec: DatasetSpec, small_examples: Callable[..., Examples]) -> Stream:
    return Stream(spec, small_examples)


def bits(state: ModelState) -> dict[str, bytes]:
    """Every number that the next update depends on."""
    learner = state.learner
    pieces = [*learner.model.tables.slices(), *learner.sparse_step.slices()]
    found = {f"{piece.name}@{piece.row}": piece.tensor.detach().clone() for piece in pieces}
    found |= {name: weight.detach() for name, weight in learner.parameters.items()}
    for name, parameter in learner.parameters.items():
        found |= {f"{name} {key}": torch.as_tensor(value) for key, value in learner.optimizer.state[parameter].items()}
    told = {name: tensor.contiguous().numpy().tobytes() for name, tensor in found.items()}
    told |= {name: array.tobytes() for name, array in (state.memory.arrays() | state.ids.arrays()).items()}
    return told | {"steps": str([learner.steps, *(each.steps for each in learner.sparse_step.averages().values())]).encode()}


def kinds(config: UpdateConfig) -> dict[int, int | None]:
    """What each kept version builds on."""
    return {number: read_manifest(config.model_dir, number).base for number in versions(config.model_dir)}


AVERAGED = ("training.sparse_weight_ema=0.9", "training.sparse_gradient_ema=0.5", "training.cowclip=true")
DECAYED = ("training.accumulator_decay=0.7", "training.sparse_optimizer='adagrad'")


@pytest.mark.parametrize("settings", [(), AVERAGED, DECAYED], ids=["plain", "averages of rows", "decayed accumulators"])
def test_a_delta_restores_the_live_state_and_what_follows_to_the_last_bit(
    tmp_path: Path, stream: Stream, settings: tuple[str, ...]
) -> None:
    """In memory all along; restored before each hour from deltas, and from whole versions."""
    config = config_in(tmp_path / "deltas", *settings)
    live = stream.restored(config)
    for hour in range(5):
        live = stream.update(live, config, hour)
        assert bits(stream.restored(config)) == bits(live), f"hour {hour}"
    assert None in kinds(config).values()
    assert sum(base is not None for base in kinds(config).values()) >= 2
    again = config_in(tmp_path / "again", *settings)
    whole = config_in(tmp_path / "whole", *settings, deltas=False)
    assert bits(stream.go_on(again, range(5))) == bits(stream.go_on(whole, range(5))) == bits(live)
    assert set(kinds(whole).values()) == {None}


def test_no_row_differs_from_the_base_but_those_that_a_delta_holds(tmp_path: Path, stream: Stream) -> None:
    config = config_in(tmp_path)
    state = stream.go_on(config, range(4))
    assert state.base is not None
    base = restore_version(config, stream.spec, state.base.version)
    some = False
    for own, before in zip(state.learner.model.tables.slices(), base.learner.model.tables.slices(), strict=True):
        differs = np.flatnonzero((own.tensor != before.tensor).any(dim=1).numpy())
        changed = state.learner.model.tables.changed[own.table].rows()
        assert not np.setdiff1d(differs, changed).size, own.name
        some |= 0 < len(differs) <= len(changed) < len(own.tensor) / 2
    assert some


def test_a_delta_costs_what_was_touched_and_a_new_base_comes_when_deltas_have_cost_one(tmp_path: Path, stream: Stream) -> None:
    config = config_in(tmp_path, "keep_checkpoints=20")
    stream.go_on(config, range(10))
    since = 0
    for number in versions(config.model_dir):
        manifest = read_manifest(config.model_dir, number)
        size = sum(part.bytes for part in manifest.parts if part.of is None and part.content in ("tables", "memory"))
        if manifest.base is None:
            since, whole = 0, size
            continue
        since += size
        assert (manifest.delta_bytes, size < whole) == (since, True)
        assert since < 1.1 * whole
    assert sum(base is None for base in kinds(config).values()) >= 2


@pytest.mark.parametrize("added", [1.0, 3.0, 40.0])
def test_the_rule_for_a_new_base_costs_hardly_more_than_the_best_interval(added: float) -> None:
    """Against every fixed interval, over deltas that grow by as much each time."""

    def cost(is_time: Callable[[int, float], bool]) -> float:
        total, since, bytes_since = 0.0, 0, 0.0
        for _ in range(1000):
            delta = added * (since + 1)
            if is_time(since, bytes_since + delta):
                total, since, bytes_since = total + 1000, 0, 0.0
            else:
                total, since, bytes_since = total + delta, since + 1, bytes_since + delta
        return total

    def base(bytes_since: float) -> Base:
        part = checkpoint.Part(kind="base", content="tables", file="", bytes=1000, sha256="")
        return Base(version=1, parts=(part,), delta_bytes=round(bytes_since))

    best = min(cost(lambda since, _, every=every: since >= every) for every in range(1000))  # type: ignore[misc]
    assert cost(lambda _, bytes_since: is_due(base(0), round(bytes_since))) < 1.2 * best


def test_small_models_are_always_whole_and_large_tables_lie_in_several_files(
    tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "FILE_BYTES", 40_000)
    config = config_in(tmp_path, deltas=False)
    state = stream.go_on(config, range(2))
    assert set(kinds(config).values()) == {None}
    folder = config.model_dir / "checkpoints" / "v000002"
    files = list(folder.glob("tables-*"))
    assert len(files) > 5
    assert max(file.stat().st_size for file in files) < 50_000
    assert bits(stream.restored(config)) == bits(state)


def test_changes_lie_in_several_files_too_and_their_size_is_known_before(
    tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "FILE_BYTES", 2_000)
    config = config_in(tmp_path)
    state = stream.go_on(config, range(2))
    assert kinds(config)[2] == 1
    files = list((config.model_dir / "checkpoints" / "v000002").glob("tables-*.changed.safetensors"))
    assert len(files) > 5
    assert max(file.stat().st_size for file in files) < 4_000
    assert bits(stream.restored(config)) == bits(state)
    pieces = [*state.learner.model.tables.slices()]
    changed = {name: rows.rows() for name, rows in state.learner.model.tables.changed.items()}
    copied = [tensor.nbytes for file in table_files.changed_files(pieces, changed) for tensor in file.values()]
    assert sum(copied) == table_files.changed_bytes(pieces, changed) > 0


@dataclass(frozen=True, kw_only=True)
class WithAnother(Processes):
    """One process, which another seems to tell something once, where what is gathered is of that type."""

    told: list[Any]

    def gather(self, value: T) -> list[T]:
        return [value, self.told.pop()] if self.told and isinstance(value, type(self.told[0])) else [value]


def test_what_another_process_finds_corrupt_is_set_aside_by_all(tmp_path: Path, stream: Stream) -> None:
    config = config_in(tmp_path)
    stream.go_on(config, range(2))
    state = restore_or_create(config, stream.spec, WithAnother(told=["v000002: memory.safetensors cannot be read"]))
    assert state.version == 1
    assert state.notes == ("v000002: memory.safetensors cannot be read; went back to the checkpoint before",)
    assert versions(config.model_dir) == [1]


def test_a_file_of_another_process_that_is_not_there_is_not_published_without(tmp_path: Path, stream: Stream) -> None:
    config = config_in(tmp_path)
    state = stream.go_on(config, range(1))
    state.learner.processes = WithAnother(told=[["tables-1-of-2.safetensors"]])
    with pytest.raises(OSError, match=r"tables-1-of-2\.safetensors of the other processes cannot be seen"):
        stream.update(state, config, 1)
    assert [path.name for path in (config.model_dir / "checkpoints").iterdir()] == ["v000001"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "Too many open files"), torch.OutOfMemoryError("CUDA out of memory"), FileNotFoundError("no file")],
    ids=["too many files", "no memory", "too many files, as safetensors says it"],
)
def test_what_the_machine_fails_in_sets_no_version_aside(
    tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config = config_in(tmp_path)
    stream.go_on(config, range(2))

    def fail(path: Path) -> dict[str, torch.Tensor]:
        raise error

    monkeypatch.setattr(table_files, "load_file", fail)
    with pytest.raises(type(error)):
        stream.restored(config)
    assert versions(config.model_dir) == [1, 2]


def test_ids_that_are_not_counted_and_lose_their_rows_share_one_again(tmp_path: Path, stream: Stream) -> None:
    """Ids that were not seen for hours expire in the call that counts others, and are looked up beside them."""
    state = stream.restored(config_in(tmp_path))
    stream.learned(state, config_in(tmp_path), 0)
    old, new = stream.hour(0), stream.hour(4)
    single = {name: np.concatenate([old.single_ids[name], new.single_ids[name]]) for name in old.single_ids}
    both = replace(old.take(np.resize(np.arange(ROWS), 2 * ROWS)), single_ids=single)
    window = encode(both, stream.spec, state.memory, state.moments, hour=4, ids=state.ids)
    user, place = stream.spec.categorical[0], window.single_keys.index("user")
    had_R = window.single_RK[:, place].copy()
    window, _ = admit_ids(state, both, window, stream.spec, hour=4, counted_rows=np.arange(ROWS, 2 * ROWS))
    np.testing.assert_array_equal(window.single_RK[:, place], state.ids.rows(user, both.single_ids["user"]))
    assert (had_R[:ROWS] > 1).any()
    assert set(window.single_RK[:ROWS, place]) == {0}


def test_what_versions_build_on_stays_and_one_that_builds_on_something_else(tmp_path: Path, stream: Stream) -> None:
    config = config_in(tmp_path, "keep_checkpoints=2")
    for hour in range(9):
        stream.go_on(config, range(hour, hour + 1))
        kept = kinds(config)
        newest = sorted(kept)[-2:]
        assert newest[-1] == hour + 1
        assert {base for base in kept.values() if base} <= kept.keys()
        assert len({base or number for number, base in kept.items()}) == min(2, 1 + sum(b is None for b in kept.values()) // 2)
        for number in kept:
            restore_version(config, stream.spec, number)
    assert len(kept) <= 2 + 3


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _with_two_bases(config: UpdateConfig, stream: Stream) -> tuple[int, int]:
    """Learns until a version builds on a second base; the newest version, and its base."""
    for hour in range(40):
        state = stream.go_on(config, range(hour, hour + 1))
        kept = kinds(config)
        if kept[state.version] not in (None, 1):
            return state.version, kept[state.version] or 0
    raise AssertionError("no second base in 40 hours")


def test_with_a_broken_base_its_deltas_are_set_aside_and_the_version_before_goes_on(tmp_path: Path, stream: Stream) -> None:
    config = config_in(tmp_path, "keep_checkpoints=2")
    newest, base = _with_two_bases(config, stream)
    _flip(config.model_dir / "checkpoints" / f"v{base:06d}" / "tables-0-of-1.safetensors")
    state = stream.restored(config)
    assert state.version < base
    assert any(f"of v{base:06d}, which it builds on, has hash" in note for note in state.notes)
    aside = {path.name for path in (config.model_dir / "checkpoints").glob("*.corrupt")}
    assert {f"v{number:06d}.corrupt" for number in (newest, base)} <= aside
    after = stream.update(state, config, newest)
    assert after.version == newest + 1
    assert bits(stream.restored(config)) == bits(after)


def test_a_base_that_is_broken_where_no_delta_reads_it_takes_none_with_it(tmp_path: Path, stream: Stream) -> None:
    config = config_in(tmp_path)
    state = stream.go_on(config, range(2))
    _flip(config.model_dir / "checkpoints" / "v000001" / "dense.safetensors")
    checkpoint.set_aside(config.model_dir, 1)
    assert bits(stream.restored(config)) == bits(state)
    after = stream.go_on(config, range(2, 3))
    assert kinds(config)[3] is None, "a base that was set aside is not built on further"
    assert bits(stream.restored(config)) == bits(after)


def test_a_rollback_goes_to_deltas_and_back(tmp_path: Path, stream: Stream) -> None:
    config = config_in(tmp_path, "keep_checkpoints=3")
    newest, base = _with_two_bases(config, stream)
    at = {number: bits(restore_version(config, stream.spec, number)) for number in versions(config.model_dir)}
    older = max(number for number in at if number < base)
    go_back_to(config.model_dir, older)
    assert bits(stream.restored(config)) == at[older]
    assert newest in undone_versions(config.model_dir)
    stream.go_on(config, range(newest, newest + 3))
    assert bits(restore_version(config, stream.spec, newest)) == at[newest], "undone, and its base stays"
    go_back_to(config.model_dir, newest)
    assert (current_version(config.model_dir), bits(stream.restored(config))) == (newest, at[newest])
    after = stream.go_on(config, range(newest, newest + 1))
    assert bits(stream.restored(config)) == bits(after)


def test_what_is_not_published_is_no_base(tmp_path: Path, stream: Stream) -> None:
    config = config_in(tmp_path)
    state = stream.go_on(config, range(1))
    for hour in range(1, 8):
        state = stream.update(stream.restored(config), config, hour, published=False)
        assert bits(stream.restored(config)) == bits(state)
        manifest = read_manifest(config.model_dir, state.version)
        assert manifest.base == 1
    publish_head(config.model_dir, state.version)
    assert bits(stream.restored(config)) == bits(state)
    after = stream.go_on(config, range(8, 9))
    assert kinds(config)[9] is None, "the deltas since the base have cost more than a new one"
    assert bits(stream.restored(config)) == bits(after)


def test_turning_an_average_of_rows_on_or_off_starts_from_a_whole_version(tmp_path: Path, stream: Stream) -> None:
    plain, averaged = config_in(tmp_path), config_in(tmp_path, *AVERAGED)
    stream.go_on(plain, range(2))
    states = [stream.go_on(config, range(hour, hour + 1)) for hour, config in enumerate((averaged, plain, averaged), 2)]
    assert [kinds(plain)[state.version] for state in states] == [None] * 3
    assert bits(stream.restored(averaged)) == bits(states[-1])


def as_of_format(number: int, folder: Path, *, without: Collection[str] = (), without_in_parts: Collection[str] = ()) -> None:
    """Lets the manifest of a version say what an older tidemark would have said of the files that are there now."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    for part in manifest["parts"]:
        if part["of"] is None:
            part["sha256"] = hashlib.sha256((folder / part["file"]).read_bytes()).hexdigest()
    manifest["parts"] = [{key: part[key] for key in part if key not in without_in_parts} for part in manifest["parts"]]
    kept = {key: manifest[key] for key in manifest if key not in {"digest", *without}}
    (folder / "manifest.json").write_text(json.dumps(kept | {"format": number}))


def test_a_checkpoint_of_format_1_is_read_and_followed_by_a_whole_one(tmp_path: Path, stream: Stream) -> None:
    config = config_in(tmp_path, *AVERAGED)
    state = stream.go_on(config, range(1))
    folder = config.model_dir / "checkpoints" / "v000001"
    tables, dense = load_file(folder / "tables-0-of-1.safetensors"), load_file(folder / "dense.safetensors")
    averages = {key for key in tables if key.startswith("row_")}
    for key in averages:
        tensor, name = tables[key], key.partition("@")[0]
        dense[name] = tensor.squeeze(1) if name.endswith("touched") else tensor
    save_file({key: tensor for key, tensor in tables.items() if key not in averages}, tmp_path / "tables")
    save_file(dense, tmp_path / "dense")
    shutil.move(tmp_path / "tables", folder / "tables-0-of-1.safetensors")
    shutil.move(tmp_path / "dense", folder / "dense.safetensors")
    as_of_format(1, folder, without={"base", "delta_bytes", "decays"}, without_in_parts={"of"})
    restored = stream.restored(config)
    assert bits(restored) == bits(state)
    stream.update(restored, config, 1)
    assert kinds(config) == {1: None, 2: None}


@pytest.mark.parametrize("versions", [1, 2])
def test_wide_weights_of_the_time_in_format_2_are_passed_over_and_told_of(
    tmp_path: Path, stream: Stream, versions: int
) -> None:
    """In a whole version, and in one that tells the changes of another."""
    config = config_in(tmp_path)
    state = stream.go_on(config, range(versions))
    folder = config.model_dir / "checkpoints" / f"v{versions:06d}"
    (path,) = folder.glob("tables-*.safetensors")
    tables = load_file(path)
    deep = {key: tensor for key, tensor in tables.items() if key.startswith("deep.hour_of_day.")}
    assert {key.split("@")[0] for key in deep} == {"deep.hour_of_day.weight", "deep.hour_of_day.accumulator"}
    surplus = {key.replace("deep", "wide"): tensor[:, :1].clone() for key, tensor in deep.items()}
    save_file(tables | surplus, tmp_path / "tables")
    shutil.move(tmp_path / "tables", path)
    as_of_format(2, folder)
    restored = stream.restored(config)
    assert bits(restored) == bits(state)
    (note,) = restored.notes
    assert f"version {versions} was saved by an older tidemark: the wide weights of hour_of_day are left out" in note
    stream.update(restored, config, versions)
    assert not stream.restored(config).notes
    assert kinds(config)[versions + 1] is None, "what an older tidemark wrote is no base"
