"""What a batch raised eight times costs, and which rule wins it back: linear rate, warm-up, LARS, cosine decay, more passes.

Enters: generated clicks, a reference batch and its rate. Leaves: AUC on held-out rows over seeds with intervals, and how far
the AUC on learned rows lies above it.

The linear rule and its warm-up: Goyal et al. 2017. LARS: You et al. 2017. As many steps as the small batch made: Hoffer et al.
2017. Optimizers and rates are those of the pipeline.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.comparison.statistics import Estimate, PairedDifference, holm, mean_with_interval, paired_difference
from pipeline.config import RateDecay, RateScaling, TrainingConfig
from pipeline.lab.checks import need_batches, need_seeds
from pipeline.lab.experiment import Finding, main_of
from pipeline.lab.figures import canvas, name_axes
from pipeline.lab.problems import Clicks, clicks, descend, loss_and_auc, small_net
from pipeline.publishing.plots import BLUE, GREEN, ORANGE
from pipeline.training.learning_rate import decayed, scaled
from pipeline.training.optimizers import dense_optimizer, warmed_up


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one strategy learns."""

    name: str
    raised: bool = True
    """The large batch, not the reference."""
    scaling: RateScaling = "none"
    warmup_share: float = 0.0
    """Of the steps, in [0, 1)."""
    decay: RateDecay = "constant"
    optimizer: Literal["sgd", "lars"] = "sgd"
    same_steps: bool = False
    """As many steps as the reference, and so more passes over the rows."""

    def rate_at(self, step: int, steps: int, *, rate: float, times: float) -> float:
        """Of step `step`, from 0, of `steps`.

        >>> Rule(name="", scaling="linear", warmup_share=0.5).rate_at(0, 4, rate=0.1, times=8.0)
        0.4
        """
        full = rate * scaled(self.scaling, times if self.raised else 1.0, 1.0, None) * decayed(self.decay, step / steps)
        return warmed_up(full, step, round(self.warmup_share * steps))


RULES = (
    Rule(name="reference", raised=False),
    Rule(name="reference, cosine", raised=False, decay="cosine"),
    Rule(name="rate unchanged"),
    Rule(name="root rule", scaling="sqrt"),
    Rule(name="linear rule", scaling="linear"),
    Rule(name="linear, warm-up", scaling="linear", warmup_share=0.15),
    Rule(name="linear, warm-up, cosine", scaling="linear", warmup_share=0.15, decay="cosine"),
    Rule(name="LARS, warm-up, cosine", optimizer="lars", warmup_share=0.15, decay="cosine"),
    Rule(name="unchanged, as many steps", same_steps=True),
)


def run(
    *,
    reference_batch: int = 512,
    times: int = 8,
    learning_rate: float = 1.0,
    lars_learning_rate: float = 3.0,
    passes: int = 12,
    num_rows: int = 16_384,
    seeds: int = 5,
) -> Finding:
    """The linear rule with warm-up makes a large batch as good as a small one.

    Args:
        reference_batch: rows of the batch that the learning rate belongs to.
        times: how often the large batch is the reference.
        learning_rate: of SGD at the reference batch.
        lars_learning_rate: of LARS at the large batch, as a multiple of its trust ratio.
        passes: over the rows.
        num_rows: to learn.
        seeds: of first weights and of the order of rows; at least 2.
    """
    need_seeds(seeds)
    need_batches([reference_batch * times], num_rows)
    data = clicks(num_rows)
    rates = {"sgd": learning_rate, "lars": lars_learning_rate}
    held_out: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    for rule in RULES:
        pairs = [
            aucs(data, rule, batch=reference_batch, times=times, rate=rates[rule.optimizer], passes=passes, seed=seed)
            for seed in range(seeds)
        ]
        held_out[rule.name] = [own for _, own in pairs]
        gaps[rule.name] = [learned - own for learned, own in pairs]
    estimates = {name: mean_with_interval(values) for name, values in held_out.items()}
    large = [rule.name for rule in RULES if rule.raised]
    differences = {name: paired_difference(held_out[name], held_out["reference"]) for name in large}
    adjusted = dict(zip(large, holm([differences[name].p_value for name in large]), strict=True))
    warmed = paired_difference(held_out["linear, warm-up"], held_out["linear rule"])
    figure, (axes,) = canvas(panel_inches=4.4)
    for place, rule in enumerate(reversed(RULES)):
        found = estimates[rule.name]
        colour, marker = (ORANGE if rule.optimizer == "lars" else BLUE, "o") if rule.raised else (GREEN, "s")
        axes.plot([found.low, found.high], [place, place], color=colour, lw=3)
        axes.plot(found.mean, place, marker, color=colour, ms=9)
    axes.set_yticks(range(len(RULES)), [rule.name for rule in reversed(RULES)])
    axes.axvline(estimates["reference"].mean, color=GREEN, lw=1.2, ls=":")
    axes.grid(axis="y", visible=False)
    name_axes(axes, f"Squares {reference_batch}, circles {times * reference_batch} rows", "held-out AUC", "")
    return Finding(
        name="large_batch_rules",
        question=f"Which rule wins back what a batch raised from {reference_batch} to {times * reference_batch} loses?",
        sentence=sentence(times * reference_batch, differences, adjusted, warmed),
        columns=("rule", "held-out AUC", "low", "high", "less reference", "p (Holm)", "learned less held-out AUC"),
        rows=tuple(
            (name, found.mean, found.low, found.high, *_less(name, differences, adjusted), _mean(gaps[name]))
            for name, found in estimates.items()
        ),
        figure=figure,
        metrics={"reference_auc": estimates["reference"].mean}
        | {f"loss_{_key(name)}": -found.estimate.mean for name, found in differences.items()},
    )


def aucs(data: Clicks, rule: Rule, *, batch: int, times: int, rate: float, passes: int, seed: int) -> tuple[float, float]:
    """AUC on learned rows and on those held out, after one run."""
    net = small_net(data.features_RD.shape[1], seed=seed)
    config = TrainingConfig(dense_optimizer=rule.optimizer, dense_learning_rate=rate)
    own_batch = batch * times if rule.raised else batch
    steps = passes * len(data.learned) // (batch if rule.same_steps else own_batch)
    descend(
        net,
        data,
        batch_size=own_batch,
        steps=steps,
        optimizer=dense_optimizer(net.parameters(), config),
        seed=[seed],
        rate_at=lambda step: rule.rate_at(step, steps, rate=rate, times=float(times)),
    )
    return loss_and_auc(net, data, data.learned)[1], loss_and_auc(net, data, data.held_out)[1]


def sentence(
    batch: int, differences: Mapping[str, PairedDifference], adjusted: Mapping[str, float], warmed: PairedDifference
) -> str:
    """The answer.

    Args:
        differences: from the reference.
        adjusted: their p-values, for all rules at once.
        warmed: the linear rule with warm-up, less the linear rule.
    """
    same_rows = [rule.name for rule in RULES if rule.raised and not rule.same_steps]
    best = max(same_rows, key=lambda name: differences[name].estimate.mean)
    verdicts = {name: _verdict(found, adjusted[name]) for name, found in differences.items()}
    changes = {name: _signed(found.estimate) for name, found in differences.items()}
    longer = next(rule.name for rule in RULES if rule.same_steps)
    return (
        f"With the rate unchanged a batch of {batch} changes held-out AUC by {changes['rate unchanged']}, with the linear rule "
        f"by {changes['linear rule']}, to which warm-up adds {_signed(warmed.estimate)}. On the same rows the best rule is "
        f"{best!r} with {changes[best]}, {verdicts[best]}; as many steps, on more rows, give {changes[longer]}, "
        f"{verdicts[longer]}."
    )


def _verdict(found: PairedDifference, p_value: float) -> str:
    if p_value >= 0.05:
        return "not to be told from the reference"
    return "above the reference" if found.estimate.mean > 0 else "below the reference"


def _less(
    name: str, differences: Mapping[str, PairedDifference], adjusted: Mapping[str, float]
) -> tuple[float | None, float | None]:
    return (differences[name].estimate.mean, adjusted[name]) if name in differences else (None, None)


def _signed(found: Estimate) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _key(name: str) -> str:
    return name.replace(",", "").replace("-", "_").replace(" ", "_").lower()


if __name__ == "__main__":
    main_of(run)
