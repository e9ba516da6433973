"""`prefect run`: finding a flow in a file, its parameters from words, and its exit code."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_schemas.errors import ConfigError
from flows.prefect_run import find_flow
from flows.terminal import run_flow

ROOT = Path(__file__).parents[2]

TWO_FLOWS = """
import flows.environment
from prefect import flow

@flow
def {name}(*, rows: int = 3, budget_seconds: float = 60.0, names: list[str] | None = None) -> None:
    print("rows", rows, "budget", budget_seconds, "names", names)
    if rows < 0:
        raise RuntimeError("the flow failed")

@flow(name="second-flow")
def second() -> None:
    print("second")
"""


@pytest.fixture
def flow_file(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(file_name: str, flow_name: str) -> Path:
        path = tmp_path / f"{file_name}.py"
        path.write_text(TWO_FLOWS.format(name=flow_name))
        return path

    return write


def test_the_flow_named_like_the_file_is_found(flow_file: Callable[[str, str], Path]) -> None:
    assert find_flow(str(flow_file("first_a", "first_a"))).name == "first-a"


@pytest.mark.parametrize("name", ["second", "second-flow"])
def test_a_flow_is_found_by_its_own_or_its_function_s_name(flow_file: Callable[[str, str], Path], name: str) -> None:
    assert find_flow(f"{flow_file('first_b', 'first_b')}:{name}").name == "second-flow"


def test_several_flows_ask_for_a_name(flow_file: Callable[[str, str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"several flows; name one: .*first_c\.py:(other|second)"):
        find_flow(str(flow_file("first_c", "other")))


def test_an_unknown_flow_a_missing_file_and_a_file_without_a_flow_are_refused(tmp_path: Path) -> None:
    (tmp_path / "no_flow.py").write_text("rows = 3\n")
    with pytest.raises(ConfigError, match="has no flow; write @flow"):
        find_flow(str(tmp_path / "no_flow.py"))
    with pytest.raises(ConfigError, match="there is no file"):
        find_flow(str(tmp_path / "absent.py"))
    with pytest.raises(ConfigError, match="is no Python file"):
        find_flow(str(ROOT / "pyproject.toml"))


@dataclass
class FlowWithoutServer:
    """What `run_flow` needs of a flow, called directly."""

    fn: Callable[..., None]
    name: str = "taker"

    def __call__(self, *args: object, **kwargs: object) -> None:
        self.fn(*args, **kwargs)


def taking(seen: list[tuple[int, float, list[str] | None]]) -> FlowWithoutServer:
    def taker(*, rows: int = 3, budget_seconds: float = 60.0, names: list[str] | None = None) -> None:
        """Take some rows."""
        if rows < 0:
            raise ConfigError(f"rows = {rows} is below 0; use 1")
        seen.append((rows, budget_seconds, names))

    return FlowWithoutServer(taker)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (3, 60.0, None)),
        (["rows=5", "--budget-seconds", "7", "--names", "a=1", "--names", "b"], (5, 7.0, ["a=1", "b"])),
        (["budget_seconds=7", "--rows=5"], (5, 7.0, None)),
        (["--names", "rows=5"], (3, 60.0, ["rows=5"])),
    ],
)
def test_parameters_come_typed_in_every_spelling(words: list[str], expected: tuple[object, ...]) -> None:
    seen: list[tuple[int, float, list[str] | None]] = []
    assert run_flow(taking(seen), words) == 0
    assert seen == [expected]


@pytest.mark.parametrize("words", [["--bugdet-seconds", "7"], ["bugdet_seconds=7"], ["7"]])
def test_an_unknown_parameter_names_the_known_ones(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_flow(taking([]), words) == 1
    message = capsys.readouterr().err
    assert words[0].split("=")[0].replace("_", "-") in message
    assert "--rows, --budget-seconds, --names" in message
    assert message.count("\n") == 1


def test_a_value_of_the_wrong_type_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_flow(taking([]), ["rows=many"]) == 1
    assert "many" in capsys.readouterr().err


def test_an_error_of_ours_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_flow(taking([]), ["rows=-1"]) == 1
    assert capsys.readouterr().err == "error: rows = -1 is below 0; use 1\n"


@given(words=st.lists(st.text(max_size=12), max_size=5))
def test_any_words_end_in_a_call_or_in_one_line(words: list[str]) -> None:
    assert run_flow(taking([]), words) in (0, 1)


def prefect_run(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("prefect")), "run", *words]
    environment = os.environ | {"PREFECT_HOME": str(home)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_prefect_run_is_a_command_in_this_folder(tmp_path: Path) -> None:
    done = prefect_run(str(tmp_path / "absent.py"), home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no file")


@pytest.mark.slow
def test_prefect_run_runs_fails_and_helps(flow_file: Callable[[str, str], Path], tmp_path: Path) -> None:
    path = str(flow_file("whole", "whole"))
    succeeded = prefect_run(path, "rows=5", "--budget-seconds", "7", home=tmp_path)
    assert (succeeded.returncode, succeeded.stdout) == (0, "rows 5 budget 7.0 names None\n")
    failed = prefect_run(path, "rows=-1", home=tmp_path)
    assert failed.returncode == 1
    said = [line for line in failed.stderr.splitlines() if "| EventsWorker -" not in line]  # a warning that may come last
    assert said[-1] == "RuntimeError: the flow failed"
    assert "--budget-seconds" in prefect_run(path, "--help", home=tmp_path).stdout
    assert "prefect run PATH[:FLOW]" in prefect_run("--help", home=tmp_path).stdout
