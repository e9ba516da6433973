"""Settings of a flow, from its command line; imports little, so that `--help` and small commands answer at once."""

import json
from collections.abc import Sequence

from pipeline.config import UpdateConfig, load_config


def settings_for(
    config: str | None,
    overrides: Sequence[str] | None,
    *,
    defaults: Sequence[str] = (),
    **given: str | float | None,
) -> UpdateConfig:
    """From the file, the environment, the flow's own `defaults`, what was `given`, and `overrides`; the later wins.

    >>> settings_for(None, ["budget.seconds=30"], budget__seconds=60, dataset="brunch").budget.seconds
    30.0
    """
    named = {name.replace("__", "."): value for name, value in given.items() if value is not None}
    written = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in named.items()]
    return load_config(config, [*defaults, *written, *(overrides or ())])
