"""A stage is a Prefect task: its name, its result, its error, and nothing kept alive."""

import gc
import weakref

import numpy as np
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from data_schemas.errors import DataError
from flows.stages import run_as_task

pytestmark = pytest.mark.usefixtures("temporary_server")


def test_a_stage_returns_what_its_work_returns_under_its_own_name() -> None:
    @flow
    def adding() -> tuple[int, str]:
        total = run_as_task("evaluate before learning", lambda: 1 + 2)
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        return total, str(context.flow_run.id)

    total, flow_run_id = adding()
    assert total == 3
    with get_client(sync_client=True) as client:
        names = [run.name for run in client.read_task_runs() if str(run.flow_run_id) == flow_run_id]
    assert names == ["evaluate before learning"]


def test_the_error_of_a_stage_is_the_error_of_its_work() -> None:
    def fail() -> None:
        raise DataError("the disk is full; make room")

    @flow
    def failing() -> None:
        run_as_task("publish", fail)

    with pytest.raises(DataError, match="the disk is full; make room"):
        failing()


def test_prefect_keeps_neither_a_stage_s_rows_nor_what_its_work_refers_to_alive() -> None:
    @flow
    def loading() -> list[object]:
        window = np.zeros(1000)
        rows = run_as_task("load", lambda window=window: window + 1)
        remembered = [weakref.ref(window), weakref.ref(rows)]
        del window, rows
        gc.collect()
        return [reference() for reference in remembered]

    assert loading() == [None, None]
