"""Growing a dense network by the names of its inputs."""

import pytest
import torch

from data_schemas.dataset import Categorical, Counter, DatasetSpec, History, Numeric
from data_schemas.errors import SpecMismatch
from models.ctr import Architecture, DenseNet
from models.tables import table_layout
from models.widening import additions, labelled_parameters, new_tables, refuse_first_dense_columns, widen


def spec(*features: str, **more: object) -> DatasetSpec:
    categorical = tuple(Categorical(name=name, embedding_dim=8 if name == "user" else 4) for name in features)
    declared = {"name": "x", "time": {"column": "t"}, "label": {"column": "y"}, "event_key": ("t",), "user": "user"}
    return DatasetSpec.model_validate(declared | {"categorical": categorical} | more)


COUNTER = Counter(over=("item",))
SMALL = spec("user", "item", counters=(COUNTER,))
LARGE = spec(
    "place",
    "user",
    "item",
    numeric=(Numeric(name="price"),),
    counters=(Counter(over=("user",)), COUNTER),
    crosses=(("user", "item"),),
    ages=("item",),
    history=History(of=("item",)),
)


def shape(kind: str, *, gated: bool = False) -> Architecture:
    return Architecture(kind=kind, hidden=(6, 5), common_dim=4, cross_layers=2, cross_rank=3, gated=gated)  # type: ignore[arg-type]


def test_additions_are_named_and_a_changed_or_lost_part_is_no_addition() -> None:
    assert additions(SMALL, SMALL) == []
    assert additions(SMALL, LARGE) == [
        "feature place", "feature price", "cross user x item", "counter of user", "age of item", "history of item",
    ]  # fmt: skip
    assert additions(LARGE, SMALL) is None
    assert additions(LARGE, LARGE.model_copy(update={"cross_capacity": 64})) is None
    assert additions(SMALL, SMALL.model_copy(update={"cross_capacity": 64})) == [], "there was no cross"
    assert additions(SMALL, SMALL.model_copy(update={"user": None})) is None
    admitted = [Categorical(name="user", ids="admitted", capacity=10, admit_after=n) for n in (2, 3)]
    first, second = (SMALL.model_copy(update={"categorical": (feature,)}) for feature in admitted)
    assert additions(first, second) == [], "a threshold changes no shape"
    assert additions(first, SMALL.model_copy(update={"categorical": (Categorical(name="user", capacity=10),)})) is None


def test_tables_that_are_new_are_named() -> None:
    assert new_tables(table_layout(SMALL), table_layout(LARGE)) == {"deep.place", "wide.place", "wide.user x item"}


@pytest.mark.parametrize(
    ("old_linear", "new_linear"), [((), ()), (("ctr",), ("ctr",)), ((), ("age",)), (("ctr",), ("age", "ctr"))]
)
@pytest.mark.parametrize("kind", ["deepfm", "dcnv2", "dlrm", "linear"])
def test_a_widened_network_answers_as_the_old_one_whatever_the_new_inputs_are(
    kind: str, old_linear: tuple[str, ...], new_linear: tuple[str, ...]
) -> None:
    """The old spec's inputs stand at other places in the new one; the new inputs are random."""
    torch.manual_seed(0)
    small, large = (SMALL.linear(), LARGE.linear()) if kind == "linear" else (SMALL, LARGE)
    before, after = table_layout(small), table_layout(large)
    old_names, new_names = ["ctr", "clicks"], ["price", "clicks", "age", "ctr", "missing(price)"]
    old_shape, gated = shape(kind), shape(kind, gated=kind == "deepfm")
    old = DenseNet(old_shape, before, len(old_names), [old_names.index(name) for name in old_linear])
    new = DenseNet(gated, after, len(new_names), [new_names.index(name) for name in new_linear])
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tensors = dict(old.named_parameters()) | ({"head.gate_F": torch.ones(2)} if kind == "deepfm" else {})
    labels = [
        labelled_parameters(gated, layout, names, linear)
        for layout, names, linear in ((before, old_names, old_linear), (after, new_names, new_linear))
    ]
    with torch.no_grad():
        widened = widen(tensors, *labels)
        for name, parameter in new.named_parameters():
            if name in widened:
                parameter.copy_(widened[name])
    assert after.deep_keys[:3] == ([] if kind == "linear" else ["place", "user", "item"])
    deep_BS, dense_BN, wide_BW = torch.randn(20, sum(after.deep_dims)), torch.randn(20, 5), torch.randn(20, 3)
    answers = new(deep_BS, wide_BW, dense_BN)
    torch.testing.assert_close(answers, old(deep_BS[:, 4:16], wide_BW, dense_BN[:, [3, 1]]), rtol=1e-5, atol=1e-5)


def test_a_gate_that_was_learned_keeps_its_values_when_the_model_grows_again() -> None:
    layouts = table_layout(SMALL), table_layout(LARGE)
    labels = [labelled_parameters(shape("deepfm", gated=True), layout, []) for layout in layouts]
    gate = widen({"head.gate_F": torch.tensor([0.5, 2.0])}, *labels)["head.gate_F"]
    assert gate[:3].tolist() == [0.0, 0.5, 2.0]
    assert not gate[3:].any()
    assert widen({"head.deep.0.weight": torch.tensor(7.0)}, *labels)["head.deep.0.weight"] == 7.0, "a count of steps"


def test_the_first_dense_columns_of_a_dlrm_are_refused() -> None:
    ids, remembering = spec("user", "item"), spec("user", "item", history=History(of=("item",)))

    def refuse(kind: str, old: DatasetSpec, new: DatasetSpec, before: tuple[str, ...], after: tuple[str, ...]) -> None:
        labels = [
            labelled_parameters(shape(kind), table_layout(declared), names, linear_only=["ctr"])
            for declared, names in ((old, before), (new, after))
        ]
        refuse_first_dense_columns(*labels)

    refuse("deepfm", ids, ids, (), ("age",))
    refuse("dlrm", ids, ids, ("price",), ("price", "age"))
    refuse("dlrm", ids, ids, (), ("ctr",))
    refuse("dlrm", remembering, remembering, ("ctr",), ("ctr", "age"))
    for new, before, after in ((ids, (), ("age",)), (ids, ("ctr",), ("ctr", "age")), (remembering, ("ctr",), ("ctr",))):
        with pytest.raises(SpecMismatch, match="without dense columns"):
            refuse("dlrm", ids, new, before, after)
