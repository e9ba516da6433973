"""Windows of a model that are held aside: listed, released to be learned, or discarded for good.

python flows/held.py --state-dir state --release 2026-01-01T05
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import sys

from rich.console import Console

from data_schemas.errors import ConfigError
from flows.settings import settings_for
from flows.terminal import run_command
from pipeline.data.held import HeldWindow, decide, held_windows
from pipeline.data.windows import as_time
from pipeline.lock import alone


def held(
    *,
    config: str | None = None,
    state_dir: str | None = None,
    model_name: str | None = None,
    release: str | None = None,
    discard: str | None = None,
    wait: float | None = None,
    overrides: list[str] | None = None,
) -> None:
    """List the windows that are held aside, or decide on one of them.

    Args:
        config: Settings file (TOML), as the hourly update takes it.
        state_dir: Folder of everything that is kept.
        model_name: Which model in it.
        release: Window that the next update learns after all, by the name that the list gives it.
        discard: Window that is never learned.
        wait: Seconds to wait where another process has the model; without it, the command ends with exit code 75 at once.
        overrides: Any other setting, such as model_name=nightly; may be given several times.
    """
    if release and discard:
        raise ConfigError(f"release {release!r} and discard {discard!r} are two decisions; give one at a time")
    settings = settings_for(config, overrides, state_dir=state_dir, model_name=model_name, lock_wait_seconds=wait)
    if not settings.model_dir.is_dir():
        raise ConfigError(f"there is no model in {settings.model_dir}; name another state_dir or model_name")
    console = Console(soft_wrap=True, highlight=False)
    if name := release or discard:
        with alone(settings.model_dir, "release or discard a window", wait_seconds=settings.lock_wait_seconds):
            decided = decide(settings.model_dir, name, "released" if release else "discarded")
        what = "the next update learns it" if release else "it is never learned"
        console.print(f"{decided.id} was held and is {decided.status}: {decided.num_rows:,} rows, {what}", markup=False)
        return
    windows = held_windows(settings.model_dir)
    for window in windows:
        console.print(_line(window), markup=False)
    if not windows:
        console.print(f"{settings.model_name}: no window was ever held aside", markup=False)


def _line(window: HeldWindow) -> str:
    hours = f"{as_time(window.start):%Y-%m-%d %H:%M} to {as_time(window.end):%H:%M} UTC"
    return f"{window.id}  {window.status}  {hours}, {window.num_rows:,} rows, by the {window.kind}: {window.reason}"


if __name__ == "__main__":
    sys.exit(run_command(held, held, name="held"))
