"""What cannot be spread over processes is refused before anything is made."""

from pathlib import Path

import pytest

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.errors import ConfigError
from pipeline.config import load_config
from pipeline.model_state import restore_or_create
from pipeline.training.processes import Processes


def test_tables_that_do_not_fit_are_refused_before_they_are_made(tmp_path: Path) -> None:
    spec: DatasetSpec = load_spec("synthetic")
    large = tuple(f.model_copy(update={"capacity": 2**31 - 1, "embedding_dim": 1024}) for f in spec.categorical[:1])
    config = load_config(overrides=[f"state_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"GiB in process 0, and .* GiB are free there; 8.2e\+03 GiB are of deep_user_id"):
        restore_or_create(config, spec.model_copy(update={"categorical": (*large, *spec.categorical[1:])}), Processes())


def test_no_process_is_too_few() -> None:
    with pytest.raises(ConfigError, match=r"processes\.count: .* greater than or equal to 1, got 0"):
        load_config(overrides=["processes.count=0"])
