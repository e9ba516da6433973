"""An experiment is a command of its own, and its table has a cell a column."""

from pathlib import Path

import pytest

from data_schemas.errors import ConfigError
from pipeline.lab.experiment import Finding, main_of, parameters_of, refuse_out_of_range
from pipeline.lab.figures import canvas, look, name_axes, small_png


def halved(*, number: float = 8.0, seed: int = 0) -> Finding:
    """What is half of a number?

    Args:
        number: To halve.
        seed: Of nothing.
    """
    figure, (axes,) = canvas()
    name_axes(axes, "Halves", "number", "half")
    axes.plot([0.0, number], [0.0, number / 2], **look(0))
    half = number / 2
    return Finding(
        name="halved",
        question="What is half of a number?",
        sentence=f"Half of {number:g} is {half:g}.",
        columns=("number", "half"),
        rows=((number, half), (None, "nothing")),
        figure=figure,
        metrics={"half": half},
    )


def test_an_experiment_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main_of(halved, ["--number", "6", "--figure", str(tmp_path / "half.png")])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "What is half of a number?" in printed
    assert "Half of 6 is 3." in printed
    assert (tmp_path / "half.png").read_bytes() == small_png(halved(number=6.0).figure)


def test_help_names_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main_of(halved, ["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for words in ("--number", "To halve.", "--seed", "--figure"):
        assert words in printed


def test_a_wrong_parameter_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main_of(halved, ["--numbr", "6"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_number_out_of_range_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main_of(halved, ["--number", "0"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: number must be above 0, got 0.0\n"
    with pytest.raises(ConfigError, match="seed must be at least 0, got -1"):
        refuse_out_of_range(halved, {"seed": -1})
    refuse_out_of_range(halved, {"seed": 0, "number": 0.1})


def test_parameters_are_as_given_else_the_defaults() -> None:
    assert parameters_of(halved, {"number": 2.0}) == {"number": 2.0, "seed": 0}
    with pytest.raises(ConfigError, match=r"no parameter numbr; it has number, seed"):
        parameters_of(halved, {"numbr": 2.0})


def test_a_row_with_a_cell_too_few_is_refused() -> None:
    figure, _ = canvas()
    with pytest.raises(ValueError, match="2 columns"):
        Finding(name="x", question="", sentence="", columns=("a", "b"), rows=((1,),), figure=figure, metrics={})
