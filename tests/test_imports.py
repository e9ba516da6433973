"""The import direction, the walls around Prefect and MLflow, and the names that are ours alone."""

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "data_schemas": set(),
    "sampling": {"data_schemas"},
    "models": {"data_schemas"},
    "pipeline": {"data_schemas", "sampling", "models"},
    "flows": {"data_schemas", "sampling", "models", "pipeline"},
}
WALLS = {"prefect": "flows", "mlflow": "pipeline/publishing"}
"""A package, and the only folder that may import it."""

FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level package and line of every import in `path`, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name.split(".")[0], node.lineno) for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.split(".")[0], node.lineno
            case ast.ImportFrom(level=level) if level:
                raise AssertionError(f"{path}:{node.lineno} imports relatively; name the package")


def test_the_packages_are_all_here() -> None:
    assert len(FILES) > len(MAY_IMPORT)
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES
        if path.is_relative_to(ROOT / package)
        for name, line in imported_packages(path)
        if name in forbidden
    ]
    assert wrong == []


@pytest.mark.parametrize("wall", WALLS)
def test_prefect_and_mlflow_stay_behind_their_walls(wall: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        if not path.is_relative_to(ROOT / WALLS[wall])
        for name, line in imported_packages(path)
        if name == wall
    ]
    assert wrong == []


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_our_names_belong_to_nobody_else(name: str) -> None:
    assert set(importlib.metadata.packages_distributions()[name]) == {"tidemark"}


def test_a_flow_is_not_named_after_a_package() -> None:
    names = {path.stem for path in (ROOT / "flows").glob("*.py")}
    taken = set(MAY_IMPORT) | set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    assert names & taken <= {"__init__"}
