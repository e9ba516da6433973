"""The arithmetic of benchmarks/scaling.py, checked by hand."""

import doctest
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_scaling", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["benchmarks_scaling"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_hold(scaling: ModuleType) -> None:
    assert doctest.testmod(scaling) == (0, 3)


def test_a_step_sends_what_is_counted_by_hand(scaling: ModuleType) -> None:
    wanted = scaling.Wanted(batch=8, features=2, dim=4, dense_weights=10)
    embeddings_there_and_back, ids, dense = 2 * 8 * 2 * 4 * 4, 4 * 2 * 8, 2 * 10 * 4
    assert scaling.step_bytes(wanted, 2, "rows") == (embeddings_there_and_back + ids + dense) / 2
    assert scaling.step_bytes(wanted, 2, "columns") == (embeddings_there_and_back / 2 + ids + dense) / 2
    assert scaling.step_bytes(wanted, 1, "rows") == 0


def test_a_delta_is_what_is_counted_by_hand(scaling: ModuleType) -> None:
    wanted = scaling.Wanted(rows_per_hour=100, features=2, dim=4, distinct_share=0.5)
    number, embedding, wide = 8, 4 * 4, 2 * 4
    assert scaling.delta_bytes(wanted, "rows") == 100 * (number + embedding + 4 + wide)
    assert scaling.delta_bytes(wanted, "columns") == 100 * (number + embedding + 4 * 4 + wide)


def test_the_fewest_processes_are_found_that_are_fast_enough(scaling: ModuleType) -> None:
    here = scaling.Here(rows_per_core_second=1e4, window_bytes=200)
    wanted = scaling.Wanted(rows_per_hour=1e8, parameters=1e8, gigabytes_per_second=10)
    needed = scaling.processes_needed(here, wanted, "columns")
    steps, allowed = wanted.rows_per_hour / wanted.batch, 3600 * wanted.learning_share
    assert scaling.step_seconds(here, wanted, needed, "columns") * steps <= allowed
    assert scaling.step_seconds(here, wanted, needed - 1, "columns") * steps > allowed
    slow = scaling.Wanted(rows_per_hour=1e8, parameters=1e8, gigabytes_per_second=1e-3)
    assert scaling.processes_needed(here, slow, "rows") is None


def test_what_breaks_first_stands_first(scaling: ModuleType) -> None:
    here = scaling.Here(rows_per_core_second=1e4, window_bytes=2**30 / 1e6)
    found = scaling.resources(here, scaling.Wanted(rows_per_hour=16e6, parameters=1e6, counter_keys=1), 4, "columns")
    assert found[0].name == "memory: window, in each"
    assert found[0].needed == pytest.approx(16.0)
    assert found[0].times_over == pytest.approx(16 / scaling.Wanted().memory_gib)
    assert [one.times_over for one in found] == sorted((one.times_over for one in found), reverse=True)
