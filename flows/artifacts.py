"""The report of an update as a Prefect artifact: Markdown with its plots in it, as `data:` images that the UI shows.

Enters: an `UpdateReport` and the model's history. Leaves: one more version of the model's artifact.
"""

import base64
import re
from collections.abc import Mapping

from prefect.artifacts import create_markdown_artifact

from pipeline.config import UpdateConfig
from pipeline.outcome import UpdateReport
from pipeline.publishing.plots import update_plots
from pipeline.publishing.report import as_markdown, read_history, verdict


def publish_report(report: UpdateReport, config: UpdateConfig) -> None:
    """Make the artifact; call it inside a flow or a task."""
    plots = update_plots(report, read_history(config.model_dir))
    create_markdown_artifact(
        as_markdown(report, embed(plots)),
        key=artifact_key(report.dataset, report.model_name),
        description=verdict(report),
    )


def artifact_key(dataset: str, model_name: str) -> str:
    """A key as Prefect allows it: lower case letters, digits and dashes.

    >>> artifact_key("synthetic", "Hourly_2")
    'synthetic-hourly-2'
    """
    return re.sub(r"[^a-z0-9]+", "-", f"{dataset}-{model_name}".lower()).strip("-")


def embed(plots: Mapping[str, bytes]) -> dict[str, str]:
    """PNGs by file name as addresses by title, which need no other file.

    >>> embed({"auc_by_hour.png": b"png"})
    {'auc by hour': 'data:image/png;base64,cG5n'}
    """
    return {
        name.removesuffix(".png").replace("_", " "): f"data:image/png;base64,{base64.b64encode(png).decode()}"
        for name, png in plots.items()
    }
