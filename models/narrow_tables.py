"""Tables that only predict: embeddings in 8 or 16 bits, looked up as they are stored.

Enters: fp32 tables. Leaves: narrow ones, and from these `Pooled`, as `EmbeddingTables` gives it, to within a rounding.

With 8 bits each row has a scale and a bias of its own, of 16 bits each: the row's range is cut into 255 steps, so that a value
is off by half a step at most, and by what scale and bias lose to their 16 bits (2^-11 of the row's largest value, about). A row
of D numbers takes D + 4 bytes instead of 4 D. Wide weights take 16 bits with either precision: a scale and a bias would be
larger than the one number of a row, and it goes into the logit as it is, where an embedding's rounding averages out.

torchrec's own `quantize_embeddings` passes fused collections by without a word; this goes to fbgemm's operators directly.

Letters: R rows of a table, D its dimension, B rows of the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_schemas.errors import CorruptCheckpoint
from models.embeddings import Pooled, in_order
from models.tables import Table, TableLayout, wide_weights_of_times

NarrowPrecision = Literal["fp16", "int8"]

_TYPES = {"fp16": SparseType.FP16, "int8": SparseType.INT8}


def narrowed(weight_RD: torch.Tensor, precision: NarrowPrecision) -> dict[str, torch.Tensor]:
    """The tensors that hold an fp32 table: `weight`, `[R, D]` fp16 or uint8, and with int8 `scale_bias`, `[R, 2] fp16`.

    >>> {name: tuple(tensor.shape) for name, tensor in narrowed(torch.zeros(3, 8), "int8").items()}
    {'weight': (3, 8), 'scale_bias': (3, 2)}
    """
    weight_RD = weight_RD.detach().cpu().contiguous()
    if precision == "fp16":
        return {"weight": weight_RD.half()}
    fused = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(weight_RD)
    scale_bias_R2 = fused[:, -8:].contiguous().view(torch.float32)
    return {"weight": fused[:, :-8].contiguous(), "scale_bias": scale_bias_R2.half()}


def widened(saved: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`[R, D] float32`: the values that `narrowed` tensors stand for."""
    weight_RD = saved["weight"].float()
    if "scale_bias" not in saved:
        return weight_RD
    scale_bias_R2 = saved["scale_bias"].float()
    return weight_RD * scale_bias_R2[:, :1] + scale_bias_R2[:, 1:]


class NarrowTables(nn.Module):
    """Looks embeddings and wide weights up in narrow tables; nothing here learns."""

    def __init__(
        self, layout: TableLayout, saved: Mapping[str, torch.Tensor], *, precision: NarrowPrecision, device: torch.device
    ) -> None:
        """Takes the tensors as they were saved.

        Args:
            layout: of the model.
            saved: by name: `deep.<table>.weight`, `deep.<table>.scale_bias` with int8, and `wide.<table>.weight`, `[R, 1]`.
            precision: of the embeddings.
            device: where they are looked up.

        Raises:
            CorruptCheckpoint: a tensor is missing, has another shape or type, or a number that is not finite.
        """
        super().__init__()
        self.layout = layout
        _check(layout, saved, precision)
        self.deep = _lookups(layout.deep, layout.lookup_keys, precision, device) if layout.deep else None
        if self.deep is not None:
            self.deep.assign_embedding_weights([_as_bytes(saved, f"deep.{table.name}") for table in layout.deep])
        self.wide = _lookups(layout.wide, layout.wide_keys, "fp16", device)
        self.wide.assign_embedding_weights([_as_bytes(saved, f"wide.{table.name}") for table in layout.wide])

    @torch.no_grad()
    def forward(self, deep: KeyedJaggedTensor, wide: KeyedJaggedTensor) -> Pooled:
        """Weighted sums for each key, in fp32."""
        assert deep.keys() == self.layout.lookup_keys, "ids come in the order of the tables"
        assert wide.keys() == self.layout.wide_keys, "and so do those of wide weights"
        wide_BW = _pooled(self.wide, wide)
        if self.deep is None:
            return Pooled(deep_BS=wide_BW.new_empty(len(wide_BW), 0), wide_BW=wide_BW)
        deep_BS = in_order(deep.keys(), self.layout.lookup_dims, _pooled(self.deep, deep), self.layout.deep_keys)
        return Pooled(deep_BS=deep_BS, wide_BW=wide_BW)

    def nbytes(self, part: Literal["deep", "wide"]) -> int:
        """Bytes of the embeddings, or of the wide weights, as they lie in memory."""
        held = self.deep if part == "deep" else self.wide
        pieces = [] if held is None else held.split_embedding_weights()
        return sum(tensor.nbytes for pair in pieces for tensor in pair if tensor is not None)


def _lookups(
    tables: Sequence[Table], keys: Sequence[str], precision: NarrowPrecision, device: torch.device
) -> IntNBitTableBatchedEmbeddingBagsCodegen:
    place = EmbeddingLocation.HOST if device.type == "cpu" else EmbeddingLocation.DEVICE
    table_of = {key: number for number, table in enumerate(tables) for key in table.lookups}
    made = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(table.name, table.rows, table.dim, _TYPES[precision], place) for table in tables],
        feature_table_map=[table_of[key] for key in keys],
        pooling_mode=PoolingMode.SUM,
        output_dtype=SparseType.FP32,
        device=device,
    )
    made.initialize_weights()
    return made


def _pooled(tables: IntNBitTableBatchedEmbeddingBagsCodegen, batch: KeyedJaggedTensor) -> torch.Tensor:
    pooled: torch.Tensor = tables(batch.values(), batch.offsets().to(batch.values().dtype), batch.weights())
    return pooled


def _as_bytes(saved: Mapping[str, torch.Tensor], table: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As fbgemm takes them."""
    scale_bias = saved.get(f"{table}.scale_bias")
    weight = saved[f"{table}.weight"].contiguous().view(torch.uint8)
    return weight, None if scale_bias is None else scale_bias.contiguous().view(torch.uint8)


def _check(layout: TableLayout, saved: Mapping[str, torch.Tensor], precision: NarrowPrecision) -> None:
    expected: dict[str, tuple[tuple[int, int], torch.dtype]] = {
        f"wide.{table.name}.weight": ((table.rows, 1), torch.float16) for table in layout.wide
    }
    for table in layout.deep:
        kind = torch.float16 if precision == "fp16" else torch.uint8
        expected[f"deep.{table.name}.weight"] = ((table.rows, table.dim), kind)
        if precision == "int8":
            expected[f"deep.{table.name}.scale_bias"] = ((table.rows, 2), torch.float16)
    of_times = wide_weights_of_times(layout)
    if saved.keys() - of_times != expected.keys():
        raise CorruptCheckpoint(
            f"tables in {precision} need {sorted(expected)}; missing are {sorted(expected.keys() - saved.keys())}, unknown "
            f"{sorted(saved.keys() - expected.keys() - of_times)}"
        )
    for name, (shape, kind) in expected.items():
        tensor = saved[name]
        if (tuple(tensor.shape), tensor.dtype) != (shape, kind):
            raise CorruptCheckpoint(f"{name} must be {kind} of {shape}, got {tensor.dtype} of {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CorruptCheckpoint(f"{name} in {precision} has numbers that are not finite; export it in fp32 instead")
