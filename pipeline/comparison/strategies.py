"""The strategies that are compared: each a name and the settings that it changes, nothing else.

Enters: names from a command line. Leaves: `Strategy`s, in the order of the list. A new setting is a new strategy at once: add
a line, or name one on the command line as `NAME: setting=value setting=value`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data_schemas.errors import ConfigError
from pipeline.config import ModelKind, UpdateConfig

REFERENCE = "fixed 512"
"""What the others are measured against, unless another is named."""
REFERENCE_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Overrides of settings under a name."""

    name: str
    overrides: tuple[str, ...]
    """Such as `training.batch_size=4096`."""


def _fixed(batch_size: int, *more: str) -> tuple[str, ...]:
    return (f"training.batch_size={batch_size}", *more)


def _scaled(batch_size: int, rule: str, *more: str) -> tuple[str, ...]:
    """From the reference batch on."""
    reference = f"training.reference_batch_size={REFERENCE_BATCH}"
    return _fixed(batch_size, reference, f"training.learning_rate_scaling={rule}", *more)


def _planned(policy: str) -> tuple[str, ...]:
    """The batch is chosen while it runs; the dense rate follows it as far as the noise scale says."""
    reference = (f"training.batch_size={REFERENCE_BATCH}", f"training.reference_batch_size={REFERENCE_BATCH}")
    return (*reference, f"training.batch_policy={policy}", "training.learning_rate_scaling=noise_scale")


STRATEGIES = (
    Strategy(name="fixed 1", overrides=_fixed(1, "window.max_rows=100")),
    Strategy(name="fixed 512", overrides=_fixed(REFERENCE_BATCH)),
    Strategy(name="fixed 4096", overrides=_fixed(4096)),
    Strategy(name="4096 linear", overrides=_scaled(4096, "linear")),
    Strategy(name="4096 sqrt", overrides=_scaled(4096, "sqrt")),
    Strategy(name="4096 linear, warm-up", overrides=_scaled(4096, "linear", "training.warmup_steps=20")),
    Strategy(
        name="4096 warm-up, LARS",
        overrides=_fixed(4096, "training.dense_optimizer=lars", "training.dense_learning_rate=0.1", "training.warmup_steps=20"),
    ),
    Strategy(name="4096 CowClip", overrides=_fixed(4096, "training.cowclip=true")),
    Strategy(name="32768 CowClip", overrides=_fixed(32768, "training.cowclip=true")),
    Strategy(name="deadline", overrides=_planned("deadline")),
    Strategy(name="goodput", overrides=_planned("goodput")),
)
"""In the order in which tables and plots show them. A batch of 1 is too slow for all rows: it has a sample of each hour's."""

TOGETHER = tuple(
    Strategy(
        name=f"2 processes, {name}",
        overrides=_fixed(REFERENCE_BATCH, "processes.count=2", f"training.share_gradients_every={every}"),
    )
    for name, every in (("synchronous", 1), ("every 16", 16), ("never", 0))
)
"""Each with its half of every batch; they share gradients in every step, or weights every 16 steps, or at the end of a window
alone. Not compared unless named, for they want a processor core for each process."""


def chosen(names: Sequence[str] | None, reference: str) -> tuple[Strategy, ...]:
    """The strategies of these names (None: all of the list) in their order; the reference is among them.

    Args:
        names: of the list, or `NAME: setting=value ...` for one that is not in it.
        reference: a name, without settings.

    Raises:
        ConfigError: an unknown name, a name given twice, fewer than two strategies, or no reference among them.
    """
    strategies = STRATEGIES if names is None else tuple(_strategy(name) for name in names)
    given = [strategy.name for strategy in strategies]
    if twice := next((name for name in given if given.count(name) > 1), None):
        raise ConfigError(f"the strategy {twice!r} is named twice; name it once")
    if reference not in given:
        raise ConfigError(f"the reference {reference!r} is not among the strategies {_listed(given)}; add it, or name another")
    if len(given) < 2:
        raise ConfigError(f"a comparison needs two strategies or more, got {_listed(given)} alone; add one")
    return strategies


def with_gradient_ema(strategies: Sequence[Strategy], decay: float | None) -> tuple[Strategy, ...]:
    """Each strategy, and each once more with a moving average of its gradients; as they are where `decay` is None.

    Raises:
        ConfigError: `decay` outside (0, 1).
    """
    if decay is None:
        return tuple(strategies)
    if not 0 < decay < 1:
        raise ConfigError(f"gradient_ema must be in (0, 1), got {decay}; leave it out to compare without averages")
    smoothed = f"training.gradient_ema={decay}"
    return tuple(
        one
        for strategy in strategies
        for one in (
            strategy,
            Strategy(name=f"{strategy.name}, gradient EMA", overrides=(*strategy.overrides, smoothed)),
        )
    )


def refuse_unheeded(config: UpdateConfig) -> None:
    """A strategy must not seem to have done what its run leaves out.

    Raises:
        ConfigError: past rows are to be learned again, of which a run keeps none; or it asks for threads.
    """
    share = config.sampling.replay_share
    if share:
        raise ConfigError(
            f"sampling.replay_share = {share} is not heeded by a comparison, which keeps no past rows as an update does, "
            "so that its figures would be those of another strategy; set sampling.replay_share to 0"
        )
    if config.training.threads not in ("auto", 1):
        raise ConfigError(
            f"training.threads = {config.training.threads} is not heeded by a comparison: its runs have one thread each, so "
            "that they can go side by side and CPU seconds mean the same in all; leave training.threads at auto"
        )


def require_same_inputs(kind: ModelKind, of_all: ModelKind) -> None:
    """All strategies learn one recording; that of a linear model has neither histories nor features of the time.

    Raises:
        ConfigError: one model of both is linear.
    """
    if kind != of_all and "linear" in (kind, of_all):
        raise ConfigError(
            f"model.kind = {kind!r} cannot be set beside {of_all!r}: all strategies learn one recording, and that of a "
            "linear model has neither histories nor features of the time; set model.kind for the whole comparison"
        )


def _strategy(text: str) -> Strategy:
    name, own, settings = text.partition(":")
    if own:
        return Strategy(name=name.strip(), overrides=tuple(settings.split()))
    known = {strategy.name: strategy for strategy in (*STRATEGIES, *TOGETHER)}
    if name not in known:
        raise ConfigError(
            f"unknown strategy {name!r}; known are {_listed(known)}; or write one's settings behind its name, such as "
            "'fixed 64: training.batch_size=64'"
        )
    return known[name]


def _listed(names: Sequence[str] | dict[str, Strategy]) -> str:
    return ", ".join(repr(name) for name in names)
