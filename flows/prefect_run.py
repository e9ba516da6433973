"""The command `prefect run PATH[:FLOW]`: call a flow in this process, with its parameters typed and checked.

Enters: a file with a flow, the flow's name where the file has several, parameters as `--name value` or `name=value`.
Leaves: exit code 0, or 1 where the file, the flow or a parameter is wrong, or the flow failed.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import cyclopts
from prefect import Flow
from rich.console import Console

from data_schemas.errors import ConfigError
from flows.terminal import run_flow

app = cyclopts.App(
    name="run",
    help="Run a flow from a file: prefect run PATH[:FLOW] [--PARAMETER VALUE | PARAMETER=VALUE]...",
    help_flags=[],
    version_flags=[],
)

_TARGET = cyclopts.Parameter(
    help="File of the flow, such as flows/hourly_update.py", allow_leading_hyphen=True, show_default=False
)


@app.default  # type: ignore[untyped-decorator]  # cyclopts is untyped here
def run(
    target: Annotated[str, _TARGET] = "--help",
    /,
    *words: Annotated[str, cyclopts.Parameter(help="The flow's parameters", allow_leading_hyphen=True)],
) -> None:
    """Run a flow from a file: prefect run PATH[:FLOW] [--PARAMETER VALUE | PARAMETER=VALUE]..."""
    if target in ("--help", "-h"):
        app.help_print([])
        return
    try:
        flow = find_flow(target)
    except ConfigError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(1)
    sys.exit(run_flow(flow, words, program=f"prefect run {target}"))


def find_flow(target: str) -> Flow[..., Any]:
    """The flow in the file `PATH`, or the one called FLOW in `PATH:FLOW`.

    Without FLOW it is the one named like the file, or the file's only one.

    Raises:
        ConfigError: no such file, no such flow, or several to choose from.
    """
    path, _, wanted = target.partition(":")
    module = _import(Path(path))
    flows = {name: value for name, value in vars(module).items() if isinstance(value, Flow)}
    here = {name: flow for name, flow in flows.items() if flow.fn.__module__ == module.__name__}
    found = [flow for name, flow in flows.items() if wanted in (name, flow.name)] if wanted else []
    found = found or ([here[module.__name__]] if not wanted and module.__name__ in here else [])
    found = found or (list(here.values()) if not wanted else [])
    if len(found) == 1:
        return found[0]
    if not flows:
        raise ConfigError(f"{path} has no flow; write @flow above a function of it")
    raise ConfigError(f"{path} has no flow {wanted!r}" if wanted else f"{path} has several flows; name one: {path}:{min(here)}")


def _import(path: Path) -> ModuleType:
    """Run the file as a module of its own name, with its folder on the path, as `python FILE` does."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; give the path of a flow, such as flows/hourly_update.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file; give the path of a flow, such as flows/hourly_update.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module
