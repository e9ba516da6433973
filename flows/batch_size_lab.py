"""The batch-size laboratory: claims about mini-batches, each run, drawn, and answered in one sentence made from the result.

Figures, tables and sentences are in MLflow, one run an experiment, and on one HTML page in the state folder.

    python flows/batch_size_lab.py --state-dir lab/state --workers 2
    python flows/batch_size_lab.py --state-dir lab/state --experiments noise_scale --experiments best_rate
"""

import flows.environment  # noqa: F401 - before prefect

# isort: split
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from rich.console import Console

from data_schemas.errors import ConfigError
from flows.artifacts import embed
from flows.settings import settings_for
from flows.stages import run_as_task
from flows.terminal import progress, run_flow, tell
from pipeline.config import UpdateConfig
from pipeline.lab.experiment import Run, print_finding
from pipeline.lab.running import Result, chosen, name_of, run_all
from pipeline.publishing.lab import HEADING, LabRuns, html_page, image_name, markdown_table, renewed, section, this_machine

PAGE = "batch_size.md"
"""Its last section is renewed, in the folder that `docs` names."""


@flow(name="batch-size-lab", persist_result=False)
def batch_size_lab(
    *,
    experiments: list[str] | None = None,
    workers: int = 1,
    docs: str | None = None,
    config: str | None = None,
    state_dir: str | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Run the experiments of the laboratory, and write down what each found.

    Args:
        experiments: Names of experiments; may be given several times. All by default.
        workers: Processes at a time.
        docs: Folder of the documentation, where batch_size.md and its figures are renewed; only with all experiments.
        config: Settings file (TOML). Without it, and for what it leaves out, the defaults hold.
        state_dir: Folder of everything that is kept: the HTML page and the MLflow database.
        overrides: Any other setting, such as tracking.enabled=false; may be given several times.
    """
    settings = settings_for(config, overrides, state_dir=state_dir)
    settings = _own_experiment(settings)
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    runs, page = chosen(experiments), _page_in(docs, experiments)
    tracked = LabRuns(settings) if settings.tracking.enabled else None
    results = run_as_task("run experiments", lambda: _results(runs, workers, tracked))
    target = settings.state_dir / "batch_size_lab.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    machine = this_machine()
    target.write_text(html_page(results, machine=machine, now=datetime.now(UTC)), encoding="utf-8")
    if page is not None:
        _renew(page, results, machine)
    create_markdown_artifact(_artifact(results), key="batch-size-lab", description=f"{len(results)} experiments")
    _show(settings, results, target, page)


def _results(runs: Sequence[Run], workers: int, tracked: LabRuns | None) -> list[Result]:
    results: list[Result] = []
    with progress("experiments", total=len(runs)) as advance:
        advance(name_of(runs[0]), 0)
        for result in run_all(runs, workers=workers):
            results.append(result)
            if tracked is not None:
                tracked.add(result)
            advance(f"{result.finding.name} done", len(results))
    return results


def _own_experiment(settings: UpdateConfig) -> UpdateConfig:
    """Runs of experiments are not among those of updates."""
    if settings.tracking.experiment:
        return settings
    tracking = settings.tracking.model_copy(update={"experiment": "tidemark-batch-size-lab"})
    return settings.model_copy(update={"tracking": tracking})


def _page_in(docs: str | None, experiments: Sequence[str] | None) -> Path | None:
    if docs is None:
        return None
    if experiments:
        raise ConfigError("docs renews the page of all experiments; leave out either docs or experiments")
    page = Path(docs) / PAGE
    if not page.is_file() or HEADING not in page.read_text(encoding="utf-8"):
        raise ConfigError(f"{page} is not there, or has no line {HEADING!r} below which the findings belong")
    return page


def _renew(page: Path, results: Sequence[Result], machine: str) -> None:
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    for result in results:
        (images / image_name(result.finding)).write_bytes(result.png)
    text = renewed(page.read_text(encoding="utf-8"), section(results, machine=machine))
    page.write_text(text, encoding="utf-8")


def _artifact(results: Sequence[Result]) -> str:
    parts = []
    for number, result in enumerate(results, start=1):
        finding = result.finding
        ((name, address),) = embed({image_name(finding): result.png}).items()
        title = f"## {number}. {finding.question}"
        parts += [title, finding.sentence, f"![{name}]({address})", markdown_table(finding)]
    return "\n\n".join(parts)


def _show(settings: UpdateConfig, results: Sequence[Result], target: Path, page: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    for result in results:
        print_finding(result.finding, console)
        console.print(f"({result.cpu_seconds:.1f} CPU seconds)\n", highlight=False)
    tell(f"page: {target}")
    if page is not None:
        tell(f"renewed: {page}")
    if settings.tracking.enabled:
        tell(f"Every figure and table: experiment {settings.experiment!r} in {settings.tracking_uri}")


if __name__ == "__main__":
    sys.exit(run_flow(batch_size_lab))
