"""Two processes under torchrun train and restore like one."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.examples import Examples
from pipeline.config import UpdateConfig, load_config
from pipeline.data.encode import encode
from pipeline.data.loader import to_examples
from pipeline.data.synthetic import SyntheticConfig, SyntheticStream
from pipeline.data.windows import Window
from pipeline.model_state import admit_ids, restore_or_create, save
from pipeline.publishing.checkpoint import read_manifest
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn
from pipeline.training.processes import Processes

SETTINGS = ["training.precision='fp32'", "training.batch_size=64", "training.micro_batch_size=16", "model.hidden=[8]"]
SETTINGS += ["delta_checkpoints_from_mib=0"]
"""The second of two hours is a delta."""


def _spec() -> DatasetSpec:
    """The synthetic data set; its largest feature, cut by rows over the processes, and its smallest admit their ids."""
    spec = load_spec("synthetic")
    logged = list(spec.logged_categorical())
    chosen = {max(logged, key=lambda f: f.capacity).name: 2, min(logged, key=lambda f: f.capacity).name: 1}
    categorical = tuple(
        feature.model_copy(update={"ids": "admitted", "admit_after": chosen[feature.name]})
        if feature.name in chosen
        else feature
        for feature in spec.categorical
    )
    return spec.model_copy(update={"categorical": categorical})


def _config(state_dir: Path, *settings: str) -> UpdateConfig:
    return load_config(overrides=[f"state_dir={state_dir}", *SETTINGS, *settings])


def learn_windows(state_dir: Path, hours: range, *settings: str) -> None:
    """Restores or creates the model, learns some hours, and saves after each."""
    config, spec = _config(state_dir, *settings), _spec()
    for hour in hours:
        state = restore_or_create(config, spec, Processes.started())
        examples = _examples(spec, hour)
        window = encode(examples, spec, state.memory, state.moments, hour=hour, ids=state.ids)
        window, admitted = admit_ids(state, examples, window, spec, hour=hour)
        assert all(figures.stored for figures in admitted.values())
        policy = FixedBatch(batch_size=64, learning_rate=0.01)
        learned = learn(state.learner, window, seed=[hour], policy=policy)
        bounds = Window(start=hour, end=hour + 1, log_id="log", log_version=hour, pieces=(), late_rows=0, left=())
        save(state, bounds, learned, config, spec, seed=(hour,))


@pytest.mark.slow  # the quick tests have whole updates of two processes, in tests/distributed
@pytest.mark.parametrize("cut", ["both hours together", "first alone", "second alone"])
def test_two_processes_train_and_restore_like_one(tmp_path: Path, cut: str) -> None:
    """One process learns both hours; then the hours are learned by two processes, or by two and one in turn."""
    learn_windows(tmp_path / "one", range(2))
    match cut:
        case "both hours together":
            _together(tmp_path / "two", 0, 2)
        case "first alone":
            learn_windows(tmp_path / "two", range(1))
            _together(tmp_path / "two", 1, 2)
        case "second alone":
            _together(tmp_path / "two", 0, 1)
            learn_windows(tmp_path / "two", range(1, 2))
    first, second = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_what_two_processes_touched_is_one_delta_that_one_process_restores(tmp_path: Path) -> None:
    """The second hour is a delta over the first, each process with its own rectangles and its own rows of the window."""
    _together(tmp_path / "deltas", 0, 2)
    _together(tmp_path / "whole", 0, 2, "delta_checkpoints_from_mib=1000000")
    found = []
    for name in ("deltas", "whole"):
        config = _config(tmp_path / name)
        manifest = read_manifest(config.model_dir, 2)
        changed = [part.file for part in manifest.parts if part.kind == "delta"]
        assert (manifest.base, len(changed)) == ((1, 3) if name == "deltas" else (None, 0))
        found.append(_weights(tmp_path / name))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def _weights(state_dir: Path) -> dict[str, torch.Tensor]:
    learner = restore_or_create(_config(state_dir), _spec(), Processes()).learner
    tables = {piece.name: piece.tensor.clone() for piece in learner.model.tables.slices()}
    return tables | {name: parameter.detach() for name, parameter in learner.parameters.items()}


def _together(state_dir: Path, start: int, stop: int, *settings: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", __file__, str(state_dir), str(start), str(stop), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def _examples(spec: DatasetSpec, hour: int) -> Examples:
    table = SyntheticStream(SyntheticConfig(hours=2)).hour(hour).table
    return to_examples(table.slice(0, 500), spec)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    learn_windows(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3])), *sys.argv[4:])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
