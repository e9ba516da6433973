"""Growing a trained model when its data set's declaration grows: what is new starts from zero effect.

Enters: the old spec and the new one, tensors of the old dense network. Leaves: tensors of the new one, filled with zeros
where an input is new, so that the predictions are the old ones until something is learned.

Every axis of a dense parameter that is as long as the inputs are wide gets labels: the names of the inputs. Labels, not
positions, say which old number belongs where, so a new feature may stand anywhere in the declaration.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import assert_never

import torch

from data_schemas.dataset import Categorical, DatasetSpec, History
from data_schemas.errors import SpecMismatch
from models.ctr import Architecture
from models.tables import TableLayout

Labels = tuple[str, ...]
"""Names along an axis."""
DENSE_NETWORK_OF_DLRM = "head.bottom.0.weight"
"""The parameter that a DLRM has where its head sees dense columns."""


def additions(old: DatasetSpec, new: DatasetSpec) -> list[str] | None:
    """What the new spec declares above the old one, in words; None where it is not the old one with something added.

    When an id is admitted or evicted may differ: it changes no shape.
    """
    categorical, before = [_shape(f) for f in new.categorical], [_shape(f) for f in old.categorical]
    kept = (
        (old.user, old.item, old.has_labels) == (new.user, new.item, new.has_labels)
        and (not old.crosses or old.cross_capacity == new.cross_capacity)
        and (not old.ages or old.age_capacity == new.age_capacity)
        and (old.history is None or new.history in (old.history, _attending(old.history, new.history)))
        and all(feature in categorical for feature in before)
        and all(number in new.numeric for number in old.numeric)
        and all(cross in new.crosses for cross in old.crosses)
        and all(counter in new.counters for counter in old.counters)
        and all(feature in new.ages for feature in old.ages)
    )
    if not kept:
        return None
    return [
        *(f"feature {feature.name}" for feature in categorical if feature not in before),
        *(f"feature {number.name}" for number in new.numeric if number not in old.numeric),
        *(f"cross {' x '.join(cross)}" for cross in new.crosses if cross not in old.crosses),
        *(f"counter of {', '.join(counter.over)}" for counter in new.counters if counter not in old.counters),
        *(f"age of {feature}" for feature in new.ages if feature not in old.ages),
        *([f"history of {', '.join(new.history.of)}"] if new.history and not old.history else []),
        *([f"attention to {', '.join(new.history.of)}"] if new.history and old.history and new.history != old.history else []),
    ]


def new_tables(old: TableLayout, new: TableLayout) -> set[str]:
    """`deep.<name>` and `wide.<name>` of the tables that only the new layout has."""
    before, after = (
        {f"{part}.{table.name}" for part in ("deep", "wide") for table in getattr(layout, part)} for layout in (old, new)
    )
    return after - before


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A dense parameter whose shape depends on the inputs."""

    name: str
    """In the network; it may hold the number of a feature."""
    meaning: str
    """The same for the same parameter of an old and a new network."""
    axes: tuple[Labels | None, ...]
    """None for an axis that does not depend on the inputs."""


def labelled_parameters(
    architecture: Architecture, layout: TableLayout, dense_names: Sequence[str], linear_only: Collection[str] = ()
) -> list[Labelled]:
    """Every parameter of a `DenseNet` whose shape, or name, depends on the inputs.

    Args:
        architecture: of the network.
        layout: of its tables.
        dense_names: a name for each dense column.
        linear_only: those that the head does not see.
    """
    dims = dict(zip(layout.head_keys, layout.head_dims, strict=True))
    histories = [*(pool for pool, _ in layout.pools), *(f"attended {of}" for of in layout.attended)]
    widths = [*(dims[pool] for pool, _ in layout.pools), *(dims[of] for of in layout.attended)]
    linear = (*dense_names, *(f"sum({history})" for history in histories))
    products = tuple(f"product({key})[{place}]" for key, dim in zip(histories, widths, strict=True) for place in range(dim))
    attended = tuple(f"attended {of}[{place}]" for of in layout.attended for place in range(dims[of]))
    embedded = tuple(f"{key}[{place}]" for key, dim in dims.items() for place in range(dim))
    seen = tuple(name for name in linear if name not in linear_only)
    head = _head(architecture, layout.head_keys, embedded, (*seen, *products, *attended))
    return [Labelled(name="linear_N", meaning="linear_N", axes=(linear,)), *head, *_projections(architecture, dims)]


def widen(tensors: Mapping[str, torch.Tensor], old: Sequence[Labelled], new: Sequence[Labelled]) -> dict[str, torch.Tensor]:
    """Tensors by the parameters of the old network, as the new one has them; zeros where an input is new.

    Returns:
        The tensors by the new network's names, those that depend on no input included. A parameter that only the new
        network has is not among them.
    """
    by_meaning = {parameter.meaning: parameter for parameter in old}
    moved = {parameter.name for parameter in (*old, *new)}
    widened = {name: tensor for name, tensor in tensors.items() if name not in moved}
    for parameter in new:
        before = by_meaning.get(parameter.meaning)
        if before is not None and before.name in tensors:
            widened[parameter.name] = _widen(tensors[before.name], before.axes, parameter.axes)
    return widened


def place_by_name(old: Sequence[str], new: Sequence[str]) -> list[int]:
    """The place in `new` of each of `old`.

    >>> place_by_name(["a", "c"], ["a", "b", "c"])
    [0, 2]
    """
    place = {name: number for number, name in enumerate(new)}
    return [place[name] for name in old]


def _attending(old: History, new: History | None) -> History:
    """A history that is attended to as the new one, where it was not before."""
    if new is None or old.attended_clicks:
        return old
    return old.model_copy(update={"attended_clicks": new.attended_clicks})


def _shape(feature: Categorical) -> Categorical:
    """A feature without the settings that may change at any time."""
    return feature.model_copy(update={"admit_after": 2, "evict_after_hours": None})


def _widen(tensor: torch.Tensor, old: Sequence[Labels | None], new: Sequence[Labels | None]) -> torch.Tensor:
    """A scalar, such as an optimizer's count of steps, stays as it is."""
    if tensor.dim() == 0:
        return tensor
    for axis, (before, after) in enumerate(zip(old, new, strict=True)):
        if before is None or after is None or before == after:
            continue
        size = [*tensor.shape[:axis], len(after), *tensor.shape[axis + 1 :]]
        places = torch.tensor(place_by_name(before, after), dtype=torch.long, device=tensor.device)
        tensor = tensor.new_zeros(size).index_copy(axis, places, tensor)
    return tensor


def _head(architecture: Architecture, keys: Sequence[str], embedded: Labels, dense: Labels) -> list[Labelled]:
    """Parameters of the head but for its projections."""
    inputs = (*embedded, *dense)
    match architecture.kind:
        case "deepfm":
            axes: dict[str, tuple[Labels | None, ...]] = {"deep.0.weight": (None, inputs)}
            if architecture.gated:
                axes["gate_F"] = (tuple(keys),)
        case "dcnv2":
            rank = tuple(f"rank {number}" for number in range(min(architecture.cross_rank, len(inputs))))
            hidden = tuple(f"hidden {number}" for number in range(architecture.hidden[-1]))
            axes = {"deep.0.weight": (None, inputs), "last.weight": (None, (*inputs, *hidden))}
            for layer in range(architecture.cross_layers):
                axes[f"cross.W_kernels.{layer}"] = (inputs, rank)
                axes[f"cross.V_kernels.{layer}"] = (rank, inputs)
                axes[f"cross.bias.{layer}"] = (inputs,)
        case "dlrm":
            bottom = tuple(f"bottom {number}" for number in range(architecture.common_dim))
            pairs = tuple(" . ".join(sorted(pair)) for pair in combinations(("dense columns", *keys), 2))
            axes = {"top.0.weight": (None, (*bottom, *pairs))}
            if dense:
                axes[DENSE_NETWORK_OF_DLRM.removeprefix("head.")] = (None, dense)
        case "linear":
            axes = {}
        case unknown:
            assert_never(unknown)
    return [Labelled(name=f"head.{name}", meaning=f"head.{name}", axes=labels) for name, labels in axes.items()]


def _projections(architecture: Architecture, dims: Mapping[str, int]) -> list[Labelled]:
    """Those of embeddings that have not the common length; they are numbered by the embedding's place."""
    if architecture.kind == "dcnv2":
        return []
    return [
        Labelled(
            name=f"head.common.projections.{number}.weight", meaning=f"head.common.projections of {key}", axes=(None, None)
        )
        for number, (key, dim) in enumerate(dims.items())
        if dim != architecture.common_dim
    ]


def refuse_first_dense_columns(old: Sequence[Labelled], new: Sequence[Labelled]) -> None:
    """A DLRM whose head sees no dense columns has a learned vector where with them it has a network.

    Raises:
        SpecMismatch: such a DLRM is to get some.
    """
    before, after = (any(parameter.name == DENSE_NETWORK_OF_DLRM for parameter in each) for each in (old, new))
    if after and not before:
        raise SpecMismatch(
            "a DLRM that was trained without dense columns (numbers, ages, histories, counters that are not linear_only) "
            "cannot get its first ones; start a new model under another model_name"
        )
