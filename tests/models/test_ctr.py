"""What every model has to do, whatever its head."""

from typing import Literal

import pytest
import torch
from sklearn.metrics import log_loss
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_schemas.minibatch import MiniBatch
from models.ctr import Architecture, CtrModel, build_model
from models.dcn import DcnHead
from models.deepfm import DeepFmHead
from models.layers import CommonLength
from models.loss import weighted_log_loss_sum
from models.tables import Table, TableLayout

Kind = Literal["dlrm", "dcnv2", "deepfm", "linear"]
KINDS: list[Kind] = ["dlrm", "dcnv2", "deepfm", "linear"]
TABLES = tuple(Table(name=name, rows=50, dim=dim, lookups=(name,)) for name, dim in (("a", 8), ("b", 4), ("c", 8)))
LAYOUT = TableLayout(deep=TABLES, wide=TABLES)


def _model(kind: Kind, *, num_dense: int = 2, linear_only: tuple[int, ...] = (), seed: int = 0) -> CtrModel:
    architecture = Architecture(kind=kind, hidden=(16, 8), common_dim=8, cross_layers=2, cross_rank=4)
    model = build_model(
        architecture,
        TableLayout(deep=(), wide=TABLES) if kind == "linear" else LAYOUT,
        num_dense=num_dense,
        linear_only=linear_only,
        sparse_optimizer="adagrad",
        sparse_learning_rate=0.1,
        wide_learning_rate=0.1,
        device=torch.device("cpu"),
        seed=seed,
    )
    if kind == "linear":
        for piece in model.tables.slices(with_optimizer=False):
            assert not piece.tensor.any(), "a new one predicts the same for all"
            torch.nn.init.normal_(piece.tensor)
    return model


def _batch(rows: int, num_dense: int = 2) -> MiniBatch:
    generator = torch.Generator().manual_seed(3)
    ids_FB = torch.randint(0, 50, (len(TABLES), rows), generator=generator)
    return _of(ids_FB, torch.randn(rows, num_dense, generator=generator))


def _of(ids_FB: torch.Tensor, dense_BN: torch.Tensor) -> MiniBatch:
    rows = ids_FB.shape[1]
    sparse = KeyedJaggedTensor(
        keys=["a", "b", "c"],
        values=ids_FB.reshape(-1),
        weights=torch.ones(ids_FB.numel()),
        lengths=torch.ones(ids_FB.numel(), dtype=torch.int32),
    )
    ones_B = torch.ones(rows)
    return MiniBatch(
        deep=sparse, wide=sparse, history_row_B=None, dense_BN=dense_BN, labels_B=torch.zeros(rows), weights_B=ones_B
    )


@pytest.mark.parametrize("kind", KINDS)
class TestEveryModel:
    def test_gives_one_finite_fp32_logit_a_row(self, kind: Kind) -> None:
        logits_B = _model(kind)(_batch(6))
        assert logits_B.shape == (6,)
        assert logits_B.dtype == torch.float32
        assert logits_B.isfinite().all()

    def test_works_without_dense_columns(self, kind: Kind) -> None:
        assert _model(kind, num_dense=0)(_batch(4, num_dense=0)).shape == (4,)

    @pytest.mark.parametrize("linear_only", [(1,), (0, 1)])
    def test_a_linear_column_adds_its_weight_and_nothing_more(self, kind: Kind, linear_only: tuple[int, ...]) -> None:
        model, batch = _model(kind, linear_only=linear_only), _batch(5)
        torch.nn.init.constant_(model.net.linear_N, 0.3)
        moved = _of(batch.deep.values().view(3, 5), batch.dense_BN + torch.tensor([0.0, 2.0]))
        torch.testing.assert_close(model(moved), model(batch) + 0.6)
        assert sum(weight.numel() for weight in model.net.head.parameters()) == sum(
            weight.numel() for weight in _model(kind, num_dense=2 - len(linear_only)).net.head.parameters()
        )

    def test_scores_a_row_alike_alone_and_in_a_batch(self, kind: Kind) -> None:
        model, batch = _model(kind), _batch(5)
        together_B = model(batch)
        ids_FB = batch.deep.values().view(3, 5)
        for row in range(5):
            alone = _of(ids_FB[:, row : row + 1].contiguous(), batch.dense_BN[row : row + 1])
            torch.testing.assert_close(model(alone)[0], together_B[row])

    def test_the_same_seed_gives_the_same_bits(self, kind: Kind) -> None:
        logits = [_model(kind, seed=seed)(_batch(4)) for seed in (5, 5, 6)]
        assert torch.equal(logits[0], logits[1])
        assert not torch.equal(logits[0], logits[2])

    def test_the_wide_part_adds_to_the_logit(self, kind: Kind) -> None:
        model, batch = _model(kind), _batch(4)
        pooled = model.tables(batch.deep, batch.wide)
        before_B = model.net(pooled.deep_BS, pooled.wide_BW, batch.dense_BN)
        raised_B = model.net(pooled.deep_BS, pooled.wide_BW + 0.5, batch.dense_BN)
        torch.testing.assert_close(raised_B, before_B + 0.5 * len(TABLES))

    def test_every_dense_weight_and_every_embedding_gets_a_gradient(self, kind: Kind) -> None:
        model, batch = _model(kind), _batch(32)
        pooled = model.tables(batch.deep, batch.wide)
        deep_BS = pooled.deep_BS.detach().requires_grad_()
        model.net(deep_BS, pooled.wide_BW.detach(), batch.dense_BN).square().sum().backward()
        assert deep_BS.grad is not None
        assert (deep_BS.grad.abs().sum(dim=0) > 0).all()
        for name, parameter in model.net.named_parameters():
            assert parameter.grad is not None, name


def test_a_linear_model_adds_weights_up() -> None:
    model, batch = _model("linear"), _batch(6)
    torch.nn.init.normal_(model.net.linear_N)
    torch.nn.init.constant_(model.net.bias, -1.5)
    weights = {piece.name: piece.tensor for piece in model.tables.slices(with_optimizer=False)}
    assert sorted(weights) == ["wide.a.weight", "wide.b.weight", "wide.c.weight"]
    expected_B = batch.dense_BN @ model.net.linear_N - 1.5
    for name, ids_B in zip("abc", batch.wide.values().view(3, 6), strict=True):
        expected_B = expected_B + weights[f"wide.{name}.weight"][ids_B, 0]
    torch.testing.assert_close(model(batch), expected_B)
    assert [name for name, _ in model.net.named_parameters()] == ["linear_N", "bias"]


def test_factorisation_machine_equals_the_sum_over_pairs() -> None:
    head = DeepFmHead(dims=[4, 4, 4], num_dense=0, common_dim=4, hidden=[3])
    for parameter in head.deep.parameters():
        torch.nn.init.zeros_(parameter)
    deep_BS = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    e_BFD = deep_BS.view(5, 3, 4)
    pairs = sum((e_BFD[:, i] * e_BFD[:, j]).sum(1) for i in range(3) for j in range(i + 1, 3))
    torch.testing.assert_close(head(deep_BS, torch.empty(5, 0)), pairs)


def test_a_cross_layer_equals_its_formula() -> None:
    torch.manual_seed(0)
    head = DcnHead(dims=[4], num_dense=0, hidden=[3], cross_layers=1, cross_rank=2)
    x_BI = torch.randn(6, 4)
    down, up, bias = head.cross.V_kernels[0], head.cross.W_kernels[0], head.cross.bias[0]
    expected = x_BI * (x_BI @ down.T @ up.T + bias) + x_BI
    torch.testing.assert_close(head.cross(x_BI), expected)


def test_embeddings_of_another_length_are_projected_and_the_others_pass() -> None:
    layer = CommonLength([8, 4], 8)
    deep_BS = torch.randn(3, 12)
    out_BFD = layer(deep_BS)
    assert torch.equal(out_BFD[:, 0], deep_BS[:, :8])
    assert out_BFD.shape == (3, 2, 8)


def test_weighted_log_loss_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_B = torch.randn(50, generator=generator)
    labels_B = (torch.rand(50, generator=generator) < 0.3).float()
    weights_B = torch.rand(50, generator=generator) * 3
    weights_B[:5] = 0
    probabilities_B = torch.sigmoid(logits_B.double()).numpy()
    expected = log_loss(labels_B.numpy(), probabilities_B, sample_weight=weights_B.numpy(), normalize=False)
    torch.testing.assert_close(weighted_log_loss_sum(logits_B, labels_B, weights_B).item(), expected, rtol=1e-5, atol=1e-5)
