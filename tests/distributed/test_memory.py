"""Out of memory in one process: all halve their micro-batches and start the step anew; none waits for ever."""

from typing import Any

import numpy as np
import pytest

from data_schemas.errors import GroupFailed
from pipeline.launch import run_together

pytestmark = pytest.mark.slow


def test_all_processes_halve_together_and_learn_what_the_smaller_micro_batches_would(day: Any) -> None:
    words = day.overrides("poor", "training.micro_batch_size=32")
    arguments = {"poor_rank": 1, "most_rows": 8, "overrides": words, "now": day.end.isoformat()}
    with pytest.raises(GroupFailed, match="does not fit into memory"):
        run_together("parts:update_with_little_memory", 2, arguments)
    (report, *_) = run_together("parts:update_with_little_memory", 2, arguments | {"most_rows": 16})[0]
    assert any("micro_batch_size = 16" in note for note in report["notes"])
    day.updated("small", 2, "training.micro_batch_size=16")
    found, expected = day.numbers("poor"), day.numbers("small")
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
