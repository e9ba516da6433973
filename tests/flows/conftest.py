"""Prefect in a folder of its own: neither the user's settings nor the user's database take part in the tests."""

import os
import tempfile
from collections.abc import Iterator

import pytest

os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-of-tests-")
os.environ.pop("PREFECT_API_URL", None)


@pytest.fixture(scope="session")
def temporary_server() -> Iterator[None]:
    """One temporary Prefect server for all tests that run a flow."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield
