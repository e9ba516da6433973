"""What cannot be spread over processes is refused before anything is made."""

from pathlib import Path

import pytest
import torch

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.errors import ConfigError
from models.tables import table_layout
from pipeline.config import load_config
from pipeline.model_state import restore_or_create
from pipeline.training.processes import Processes
from pipeline.training.sharding import _whole_needs


def test_tables_that_do_not_fit_are_refused_before_they_are_made(tmp_path: Path) -> None:
    spec: DatasetSpec = load_spec("synthetic")
    large = tuple(f.model_copy(update={"capacity": 2**31 - 1, "embedding_dim": 1024}) for f in spec.categorical[:1])
    config = load_config(overrides=[f"state_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"GiB in process 0, and .* GiB are free there; 8.2e\+03 GiB are of deep_user_id"):
        restore_or_create(config, spec.model_copy(update={"categorical": (*large, *spec.categorical[1:])}), Processes())


def test_no_process_is_too_few() -> None:
    with pytest.raises(ConfigError, match=r"processes\.count: .* greater than or equal to 1, got 0"):
        load_config(overrides=["processes.count=0"])


def test_the_memory_of_wide_weights_is_that_of_the_vector_on_a_cpu_and_of_four_columns_on_a_gpu() -> None:
    """Beside each weight its sum of squares; on a GPU three columns of zeros as well."""
    layout = table_layout(load_spec("synthetic"))
    rows = {f"wide_{table.name}": table.rows for table in layout.wide}
    for kind, numbers in (("cpu", 2), ("cuda", 5)):
        needs = {need.table: need.bytes for need in _whole_needs(layout, "adagrad", torch.device(kind))}
        assert {name: needs[name] for name in rows} == {name: 4 * numbers * count for name, count in rows.items()}
