"""Narrow tables stand for the fp32 ones to within a rounding, and are looked up as these are."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_schemas.errors import CorruptCheckpoint
from models.embeddings import EmbeddingTables, TableSlice
from models.narrow_tables import NarrowPrecision, NarrowTables, narrowed, widened
from models.tables import Table, TableLayout

LAYOUT = TableLayout(
    deep=(
        Table(name="user", rows=50, dim=8, lookups=("user",)),
        Table(name="item", rows=30, dim=16, lookups=("item", "item clicked")),
        Table(name="hour", rows=24, dim=4, lookups=("hour",)),
    ),
    wide=tuple(
        Table(name=name, rows=rows, dim=1, lookups=(name,)) for name, rows in (("user", 50), ("item", 30), ("hour", 24))
    ),
    pools=(("item clicked", "item"),),
)
CPU = torch.device("cpu")

both = pytest.mark.parametrize("precision", ["fp16", "int8"])


def weights(*, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    drawn = {f"deep.{table.name}.weight": torch.randn(table.rows, table.dim, generator=rng) for table in LAYOUT.deep}
    return drawn | {f"wide.{table.name}.weight": torch.randn(table.rows, 1, generator=rng) for table in LAYOUT.wide}


def as_saved(tables: Mapping[str, torch.Tensor], precision: NarrowPrecision) -> dict[str, torch.Tensor]:
    saved = {name: tensor.half() for name, tensor in tables.items() if name.startswith("wide.")}
    for table in LAYOUT.deep:
        parts = narrowed(tables[f"deep.{table.name}.weight"], precision)
        saved |= {f"deep.{table.name}.{name}": tensor for name, tensor in parts.items()}
    return saved


def a_batch(keys: list[str], *, rows: int = 7, seed: int = 0) -> KeyedJaggedTensor:
    """Lists of no to three ids, each with a weight."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, len(keys) * rows)
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(rng.integers(0, 24, lengths.sum())),
        weights=torch.from_numpy(rng.random(lengths.sum()).astype(np.float32)),
        lengths=torch.from_numpy(lengths.astype(np.int32)),
    )


def test_int8_is_255_steps_of_the_rows_own_range() -> None:
    weight_RD = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 1, 40)[:, None]
    weight_RD[7] = 0.25  # no range at all
    saved = narrowed(weight_RD, "int8")
    assert saved["weight"].dtype == torch.uint8
    least_R, most_R = weight_RD.numpy().min(axis=1), weight_RD.numpy().max(axis=1)
    step_R = (most_R - least_R) / np.float32(255)
    by_hand = np.round((weight_RD.numpy() - least_R[:, None]) / np.where(step_R > 0, step_R, 1)[:, None])
    by_hand = by_hand * step_R.astype(np.float16).astype(np.float32)[:, None] + least_R.astype(np.float16)[:, None]
    np.testing.assert_allclose(widened(saved).numpy(), by_hand, rtol=0, atol=1e-2 * step_R.max())
    bound_R = step_R / 2 + np.abs(weight_RD.numpy()).max(axis=1) / 2**10
    assert (np.abs(widened(saved).numpy() - weight_RD.numpy()).max(axis=1) <= bound_R).all()


@both
def test_lookups_are_those_of_the_values_that_are_stored(precision: NarrowPrecision) -> None:
    tables = weights()
    saved = as_saved(tables, precision)
    narrow = NarrowTables(LAYOUT, saved, precision=precision, device=CPU)
    wide_tables = EmbeddingTables(
        LAYOUT, sparse_optimizer="rowwise_adagrad", sparse_learning_rate=1.0, wide_learning_rate=1.0, device=CPU
    )
    stored = {name: tensor.half().float() for name, tensor in tables.items() if name.startswith("wide.")}
    for table in LAYOUT.deep:
        prefix = f"deep.{table.name}."
        parts = {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
        stored[f"{prefix}weight"] = widened(parts)
    slices = {name: [TableSlice(name=name, row=0, column=0, tensor=tensor)] for name, tensor in stored.items()}
    wide_tables.load_slices(slices, with_optimizer=False)
    assert LAYOUT.lookup_keys != LAYOUT.deep_keys, "the pool is looked up beside its feature, and stands at the end"
    deep, wide = a_batch(LAYOUT.lookup_keys), a_batch(LAYOUT.wide_keys, seed=1)
    with torch.no_grad():
        expected = wide_tables(deep, wide)
    found = narrow(deep, wide)
    torch.testing.assert_close(found.deep_BS, expected.deep_BS, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.wide_BW, expected.wide_BW, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("precision", "bytes_of_a_row"), [("fp16", 2 * 64), ("int8", 64 + 4)])
def test_they_are_held_as_narrow_as_they_are_stored(precision: NarrowPrecision, bytes_of_a_row: int) -> None:
    deep, wide = (Table(name="user", rows=1000, dim=dim, lookups=("user",)) for dim in (64, 1))
    saved = {f"deep.user.{name}": tensor for name, tensor in narrowed(torch.randn(1000, 64), precision).items()}
    assert sum(tensor.nbytes for tensor in saved.values()) == 1000 * bytes_of_a_row
    saved["wide.user.weight"] = torch.zeros(1000, 1).half()
    held = NarrowTables(TableLayout(deep=(deep,), wide=(wide,)), saved, precision=precision, device=CPU)
    assert held.deep.weights_host.nbytes <= 1.1 * 1000 * bytes_of_a_row
    assert (held.nbytes("deep"), held.nbytes("wide")) == (1000 * bytes_of_a_row, 2000)


@both
def test_what_is_not_whole_is_refused_by_its_name(precision: NarrowPrecision) -> None:
    saved = as_saved(weights(), precision)
    part = "deep.item.weight" if precision == "fp16" else "deep.item.scale_bias"
    spoiled = saved[part].clone()
    spoiled[3, 1] = float("nan")
    for wrong, message in (
        ({name: tensor for name, tensor in saved.items() if name != part}, "missing are .*item"),
        (saved | {"deep.other.weight": saved[part]}, "unknown .*other"),
        (saved | {part: saved[part][:-1]}, "item.* must be"),
        (saved | {part: saved[part].float()}, r"item.* must be torch.float16 .*got torch.float32"),
        (saved | {part: spoiled}, "item.* not finite"),
    ):
        with pytest.raises(CorruptCheckpoint, match=message):
            NarrowTables(LAYOUT, wrong, precision=precision, device=CPU)


@both
def test_a_wide_weight_of_a_time_from_an_older_export_is_passed_over(precision: NarrowPrecision) -> None:
    without = TableLayout(deep=LAYOUT.deep, wide=LAYOUT.wide[:2])
    held = NarrowTables(without, as_saved(weights(), precision), precision=precision, device=CPU)
    assert held.nbytes("wide") == 2 * sum(table.rows for table in LAYOUT.wide[:2])


def test_what_16_bits_cannot_hold_is_refused() -> None:
    tables = weights() | {"deep.user.weight": torch.full((50, 8), 1e6)}
    with pytest.raises(CorruptCheckpoint, match=r"user.* not finite; export it in fp32"):
        NarrowTables(LAYOUT, as_saved(tables, "fp16"), precision="fp16", device=CPU)
