"""What every model has to do, whatever its head."""

from typing import Literal

import pytest
import torch
from sklearn.metrics import log_loss
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_schemas.dataset import Categorical
from models.ctr import Architecture, CtrModel, build_model
from models.dcn import DcnHead
from models.deepfm import DeepFmHead
from models.layers import CommonLength
from models.loss import weighted_log_loss_sum

Kind = Literal["dlrm", "dcnv2", "deepfm"]
KINDS: list[Kind] = ["dlrm", "dcnv2", "deepfm"]
FEATURES = [Categorical(name=name, capacity=50, embedding_dim=dim) for name, dim in (("a", 8), ("b", 4), ("c", 8))]


def _model(kind: Kind, *, num_dense: int = 2, seed: int = 0) -> CtrModel:
    architecture = Architecture(kind=kind, hidden=(16, 8), common_dim=8, cross_layers=2, cross_rank=4)
    return build_model(
        architecture,
        FEATURES,
        num_dense=num_dense,
        sparse_optimizer="adagrad",
        sparse_learning_rate=0.1,
        wide_learning_rate=0.1,
        device=torch.device("cpu"),
        seed=seed,
    )


def _inputs(rows: int, num_dense: int = 2) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 50, (len(FEATURES) * rows,), generator=generator)
    sparse = KeyedJaggedTensor(keys=["a", "b", "c"], values=ids, lengths=torch.ones(len(ids), dtype=torch.int32))
    return sparse, torch.randn(rows, num_dense, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryModel:
    def test_gives_one_finite_fp32_logit_a_row(self, kind: Kind) -> None:
        model = _model(kind)
        sparse, dense_BN = _inputs(6)
        logits_B = model(model.tables(sparse), dense_BN)
        assert logits_B.shape == (6,)
        assert logits_B.dtype == torch.float32
        assert logits_B.isfinite().all()

    def test_works_without_dense_columns(self, kind: Kind) -> None:
        model = _model(kind, num_dense=0)
        sparse, dense_BN = _inputs(4, num_dense=0)
        assert model(model.tables(sparse), dense_BN).shape == (4,)

    def test_scores_a_row_alike_alone_and_in_a_batch(self, kind: Kind) -> None:
        model = _model(kind)
        sparse, dense_BN = _inputs(5)
        together_B = model(model.tables(sparse), dense_BN)
        ids_FB = sparse.values().view(3, 5)
        for row in range(5):
            alone = KeyedJaggedTensor(
                keys=sparse.keys(), values=ids_FB[:, row].contiguous(), lengths=torch.ones(3, dtype=torch.int32)
            )
            torch.testing.assert_close(model(model.tables(alone), dense_BN[row : row + 1])[0], together_B[row])

    def test_the_same_seed_gives_the_same_bits(self, kind: Kind) -> None:
        sparse, dense_BN = _inputs(4)
        first, second, other = (_model(kind, seed=seed) for seed in (5, 5, 6))
        logits = [model(model.tables(sparse), dense_BN) for model in (first, second, other)]
        assert torch.equal(logits[0], logits[1])
        assert not torch.equal(logits[0], logits[2])

    def test_the_wide_part_adds_to_the_logit(self, kind: Kind) -> None:
        model = _model(kind)
        sparse, dense_BN = _inputs(4)
        pooled = model.tables(sparse)
        before_B = model(pooled, dense_BN)
        raised = type(pooled)(deep_BS=pooled.deep_BS, wide_BF=pooled.wide_BF + 0.5)
        torch.testing.assert_close(model(raised, dense_BN), before_B + 0.5 * len(FEATURES))

    def test_every_dense_weight_and_every_embedding_gets_a_gradient(self, kind: Kind) -> None:
        model = _model(kind)
        sparse, dense_BN = _inputs(32)
        pooled = model.tables(sparse)
        deep_BS = pooled.deep_BS.detach().requires_grad_()
        model.net(deep_BS, pooled.wide_BF.detach(), dense_BN).square().sum().backward()
        assert deep_BS.grad is not None
        assert (deep_BS.grad.abs().sum(dim=0) > 0).all()
        for name, parameter in model.net.named_parameters():
            assert parameter.grad is not None, name


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
