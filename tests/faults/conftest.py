"""What the faults came to is printed as a table behind the tests: name of the test, and what it counted."""

from collections.abc import Callable
from typing import Any

import pytest

Tell = Callable[[str], None]


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """Takes one line for the table."""
    return lambda line: record_property("fault", line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table; also of tests that ran in other processes."""
    lines = [
        f"{report.nodeid.partition('::')[2]}: {value}"
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "fault"
    ]
    if lines:
        terminalreporter.section("faults")
        terminalreporter.write("\n".join(sorted(lines)) + "\n")
