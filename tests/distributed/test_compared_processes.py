"""A strategy trained by two processes is a line of a comparison like any other."""

from pathlib import Path

import pytest

from data_schemas.dataset import load_spec
from pipeline.comparison.run import Probing
from pipeline.comparison.side_by_side import jobs_of, run_jobs
from pipeline.comparison.strategies import TOGETHER, Strategy
from pipeline.comparison.stream import recorded_stream
from pipeline.config import load_config
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.data.synthetic import SyntheticConfig, write_landing

SPEC = load_spec("synthetic")


@pytest.mark.slow
def test_synchronous_processes_learn_what_one_learns_and_local_ones_learn_less_often_together(tmp_path: Path) -> None:
    settings = [f"landing={tmp_path / 'landing'}", f"state_dir={tmp_path / 'state'}", "training.precision=fp32"]
    settings += ["training.dense_optimizer=sgd", "training.dense_learning_rate=0.1"]
    config = load_config(overrides=settings)
    write_landing(SyntheticConfig(hours=4, rows_per_hour=400, traffic_ratio=2.0, late_share=0.0), tmp_path / "landing")
    log, quarantine = ClickLog.open_or_create(config.log_path, SPEC), Quarantine.open_or_create(config.quarantine_path)
    ingest_landing(config.landing, log, quarantine, SPEC, now=SyntheticConfig().start.replace(year=2030))
    stream = recorded_stream(config, SPEC)[:3]  # together, the same windows are recorded anew

    small = ("training.batch_size=64",)
    entered = [Strategy(name="one", overrides=small)]
    entered += [Strategy(name=each.name, overrides=(*each.overrides, *small)) for each in (TOGETHER[0], TOGETHER[2])]
    one, synchronous, never = run_jobs(jobs_of(config, entered, 1, probing=Probing(places=3)), SPEC, stream, workers=1)
    for alone, together in zip(one.windows, synchronous.windows, strict=True):
        assert (together.start, together.rows, together.rows_learned) == (alone.start, alone.rows, alone.rows_learned)
        assert (together.steps, together.batch_size) == (alone.steps, alone.batch_size)
        assert (together.before is None) == (alone.before is None)
        if alone.before and together.before:
            assert together.before.log_loss == pytest.approx(alone.before.log_loss, rel=1e-4)
    assert [point.place for point in synchronous.probe] == [point.place for point in one.probe]
    assert len(one.probe) == 2 * (1 + 3)
    assert [point.log_loss for point in synchronous.probe] == pytest.approx([p.log_loss for p in one.probe], rel=1e-4)
    assert [point.log_loss for point in never.probe][-1] != pytest.approx(one.probe[-1].log_loss, rel=1e-6)
    assert never.windows[1].rows_learned == one.windows[1].rows_learned
