"""DeepCTR-Torch and FuxiCTR, on the same files, with the same sizes, batch and precision (fp32: neither has another).

Both hold dense gradients of whole tables and step them with Adam. DeepCTR-Torch learns through its own `fit`, without a
penalty on weights, as FuxiCTR's defaults have none either. FuxiCTR's package ships layers, an optimizer and a `train_step` but
no models: they are put together from its layers here, and its own reader, which wants a Ray cluster, is not timed: it is given
batches that are in memory.
"""

import contextlib
import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_schemas.dataset import DatasetSpec
from data_schemas.examples import F32
from models.ctr import Architecture
from peers.torch_loops import DENSE_RATE, read_columns


class DeepCtr:
    """DeepFM, or DCN with full matrices; it has no DLRM."""

    def __init__(self, spec: DatasetSpec, architecture: Architecture, *, batch_size: int, device: torch.device) -> None:
        inputs = importlib.import_module("deepctr_torch.inputs")
        models = importlib.import_module("deepctr_torch.models")
        self._names, self._batch_size = [feature.name for feature in spec.categorical], batch_size
        columns = [
            inputs.SparseFeat(f.name, vocabulary_size=f.capacity, embedding_dim=f.embedding_dim) for f in spec.categorical
        ]
        shape: dict[str, Any] = {"dnn_hidden_units": tuple(architecture.hidden), "l2_reg_linear": 0.0, "l2_reg_embedding": 0.0}
        match architecture.kind:
            case "deepfm":
                make: Any = models.DeepFM
            case "dcnv2":
                make = models.DCN
                shape |= {"cross_num": architecture.cross_layers, "cross_parameterization": "matrix", "l2_reg_cross": 0.0}
            case other:
                raise ModuleNotFoundError(f"it has no {other}")
        self._model = make(columns, columns, device=str(device), **shape)
        self._model.compile(torch.optim.Adam(self._model.parameters(), lr=DENSE_RATE), "binary_crossentropy", metrics=[])

    def learn(self, files: Sequence[Path]) -> None:
        """Its `fit`, silent."""
        ids_RF, labels_R = read_columns(files, self._names)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self._model.fit(self._columns(ids_RF), labels_R.numpy(), batch_size=self._batch_size, epochs=1, verbose=0)

    def predict(self, file: Path) -> F32:
        """Its `predict`."""
        ids_RF, _ = read_columns([file], self._names)
        probability_R1: F32 = self._model.predict(self._columns(ids_RF), 4096).astype(np.float32)
        return probability_R1.reshape(-1)

    def _columns(self, ids_RF: torch.Tensor) -> dict[str, Any]:
        return {name: ids_RF[:, place].numpy() for place, name in enumerate(self._names)}


class FuxiCtr:
    """Models of FuxiCTR's own layers, trained by its own `train_step`."""

    def __init__(self, spec: DatasetSpec, architecture: Architecture, *, batch_size: int, device: torch.device) -> None:
        features = importlib.import_module("fuxictr.features")
        self._names, self._batch_size = [feature.name for feature in spec.categorical], batch_size
        feature_map = features.FeatureMap("throughput", ".")
        for feature in spec.categorical:
            feature_map.features[feature.name] = {"type": "categorical", "source": "", "vocab_size": feature.capacity}
        feature_map.labels, feature_map.num_fields = ["label"], len(self._names)
        feature_map.default_emb_dim = spec.categorical[0].embedding_dim
        self._model = _fuxi_model(feature_map, architecture, gpu=-1 if device.type == "cpu" else 0)

    def learn(self, files: Sequence[Path]) -> None:
        """Its `train_step` on shuffled batches."""
        ids_RF, labels_R = read_columns(files, self._names)
        self._model.train()
        for rows_B in torch.randperm(len(labels_R)).split(self._batch_size):
            self._model.train_step(self._batch(ids_RF[rows_B], labels_R[rows_B])).item()

    @torch.no_grad()
    def predict(self, file: Path) -> F32:
        """In batches of 4096."""
        ids_RF, labels_R = read_columns([file], self._names)
        self._model.eval()
        batches = zip(ids_RF.split(4096), labels_R.split(4096), strict=True)
        return torch.cat([self._model(self._batch(*batch))["y_pred"].cpu().reshape(-1) for batch in batches]).numpy()

    def _batch(self, ids_BF: torch.Tensor, labels_B: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**dict(zip(self._names, ids_BF.unbind(1), strict=True)), "label": labels_B}


def _fuxi_model(feature_map: Any, architecture: Architecture, *, gpu: int) -> Any:
    base: Any = importlib.import_module("fuxictr.pytorch.models").BaseModel
    layers: Any = importlib.import_module("fuxictr.pytorch.layers")
    dim, hidden, kind = feature_map.default_emb_dim, list(architecture.hidden), architecture.kind
    width, pairs = dim * feature_map.num_fields, feature_map.num_fields * (feature_map.num_fields - 1) // 2

    class Model(base):  # type: ignore[misc]
        """Embeddings, an interaction, a deep network."""

        def __init__(self) -> None:
            settings = {"verbose": 0, "model_root": ".", "metrics": [], "gpu": gpu}
            super().__init__(feature_map, model_id=kind, **settings)
            self.embedding = layers.FeatureEmbedding(feature_map, dim)
            if kind == "deepfm":
                self.interaction = layers.FactorizationMachine(feature_map)
                self.deep = layers.MLP_Block(input_dim=width, output_dim=1, hidden_units=hidden)
            elif kind == "dcnv2":
                self.interaction = layers.CrossNetV2(width, architecture.cross_layers)
                self.deep = layers.MLP_Block(input_dim=width, hidden_units=hidden)
                self.last = torch.nn.Linear(width + hidden[-1], 1)
            else:
                self.interaction = layers.InnerProductInteraction(feature_map.num_fields, output="inner_product")
                self.deep = layers.MLP_Block(input_dim=pairs, output_dim=1, hidden_units=hidden)
            self.compile("adam", "binary_crossentropy", DENSE_RATE)
            self._max_gradient_norm = 10.0  # its `fit` sets this
            self.reset_parameters()
            self.model_to_device()

        def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            """As the base class wants it."""
            ids = self.get_inputs(inputs)
            embedded_BFD = self.embedding(ids)
            flat_BS = embedded_BFD.flatten(start_dim=1)
            match kind:
                case "deepfm":
                    logits_B1 = self.interaction(ids, embedded_BFD) + self.deep(flat_BS)
                case "dcnv2":
                    logits_B1 = self.last(torch.cat([self.interaction(flat_BS), self.deep(flat_BS)], dim=1))
                case "dlrm":
                    logits_B1 = self.deep(self.interaction(embedded_BFD))
            return {"y_pred": self.output_activation(logits_B1)}

    return Model()
