"""A DLRM as PyTorch users write it: one EmbeddingBag per table, eager, on the same parameters.

torch is optional: it is imported when the baseline is built. Tables are shared with JAX, not
copied.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.layout import Layout
from recflow_jax.model import Params, with_compute_dtype


def torch_is_installed() -> bool:
    """Whether torch can be imported (nothing is imported to find out)."""
    return importlib.util.find_spec("torch") is not None


@dataclass(frozen=True, kw_only=True)
class TorchInputs:
    """Tensors on the device: dense [samples, dense_width]; per slot ids, offsets, weights."""

    dense: Any
    bags: tuple[tuple[Any, Any, Any], ...]


class TorchModel:
    """`model(inputs)` gives float32 logits [samples, outputs] as a torch tensor."""

    def __init__(self, config: DLRMConfig, params: Params):
        import torch  # pyright: ignore[reportMissingImports]

        self._torch = torch
        self.config = config
        self.layout = layout = Layout.of(config)
        self.device = torch.device("cuda" if _on_gpu(params) else "cpu")
        self.dtype = getattr(torch, config.carried_dtype)
        params = with_compute_dtype(params, config)
        groups = [torch.from_dlpack(group) for group in params.groups]
        tables = [
            groups[group][base : base + table.rows]
            for table, (group, base) in zip(config.tables, layout.table_places, strict=True)
        ]
        index = {table.name: i for i, table in enumerate(config.tables)}
        features = [config.features[i] for i in layout.slot_features]
        self._slot_tables = [tables[index[feature.table]] for feature in features]
        vectors = config.dot_vectors
        self._upper = torch.triu_indices(vectors, vectors, offset=1, device=self.device)
        self._bottom = [self._linear(layer) for layer in params.bottom]
        self._top = [self._linear(layer) for layer in params.top]
        self._cross = [
            tuple(self._tensor(p) for p in (layer.down.T, layer.up.T, layer.bias))
            for layer in params.cross
        ]

    def _tensor(self, leaf: Any) -> Any:
        return self._torch.from_dlpack(leaf).to(self.dtype).contiguous()

    def _linear(self, layer: Any) -> tuple[Any, Any]:
        return self._tensor(layer.kernel.T), self._tensor(layer.bias)

    def load(self, batch: JaggedBatch) -> TorchInputs:
        """`batch` on the device, with ids within each slot's own table."""
        torch, slots = self._torch, len(self.layout.slots)
        offsets = self.layout.slot_offsets(batch)
        lengths = np.diff(offsets).reshape(batch.samples, -1)
        slot_of_id = np.repeat(
            np.tile(np.arange(slots, dtype=np.int16), batch.samples), lengths.flat
        )
        by_slot = np.split(slot_of_id.argsort(kind="stable"), lengths.sum(axis=0).cumsum()[:-1])
        bags = []
        for slot, own in enumerate(by_slot):
            starts = np.concatenate([[0], np.cumsum(lengths[:, slot])])
            weights = None if batch.weights is None else batch.weights[own]
            bag = (batch.values[own].astype(np.int32), starts.astype(np.int32), weights)
            bags.append(tuple(None if a is None else self._upload(a) for a in bag))
        dense = self._upload(batch.dense).to(self.dtype)
        self.wait(torch)
        return TorchInputs(dense=dense, bags=tuple(bags))

    def _upload(self, array: np.ndarray) -> Any:
        return self._torch.from_numpy(np.array(array)).to(self.device)

    def wait(self, _: Any = None) -> None:
        """Until everything launched has run."""
        if self.device.type == "cuda":
            self._torch.cuda.synchronize()

    def __call__(self, inputs: TorchInputs) -> Any:
        """Launches one forward pass."""
        torch, config = self._torch, self.config
        with torch.inference_mode():
            bottom = self._mlp(self._bottom, inputs.dense)
            pooled = [self._pool(slot, *bag) for slot, bag in enumerate(inputs.bags)]
            hidden = self._mlp(self._top[:-1], self._interact(bottom, pooled))
            weight, bias = self._top[-1]
            scores = torch.nn.functional.linear(hidden, weight, bias)
            return scores.float().reshape(-1, config.outputs)

    def _mlp(self, layers: list[tuple[Any, Any]], x: Any) -> Any:
        functional = self._torch.nn.functional
        activation = self.config.activation
        for weight, bias in layers:
            x = functional.linear(x, weight, bias)
            if activation == "gelu":  # as jax.nn.gelu approximates it
                x = functional.gelu(x, approximate="tanh")
            elif activation != "identity":
                x = getattr(self._torch, activation)(x)
        return x

    def _pool(self, slot: int, ids: Any, offsets: Any, weights: Any) -> Any:
        table, mean = self._slot_tables[slot], self.layout.slots[slot].mean
        pooled = self._torch.nn.functional.embedding_bag(
            ids,
            table,
            offsets,
            mode="mean" if mean and weights is None else "sum",
            include_last_offset=True,
            per_sample_weights=None if weights is None else weights.to(table.dtype),
        )
        if mean and weights is not None:
            pooled = pooled / offsets.diff().clamp(min=1)[:, None]
        return pooled.to(self.dtype)

    def _interact(self, bottom: Any, pooled: list[Any]) -> Any:
        torch = self._torch
        x = x0 = torch.cat([bottom, *pooled], dim=1)
        if self.config.interaction == "dot":
            return self._pairwise_dots(bottom, x)
        for down, up, bias in self._cross:
            low = torch.nn.functional.linear(x, down)
            x = x0 * torch.nn.functional.linear(low, up, bias) + x
        return x

    def _pairwise_dots(self, bottom: Any, x: Any) -> Any:
        x = x.reshape(len(x), self.config.dot_vectors, -1)
        products = self._torch.bmm(x, x.transpose(1, 2))
        rows, columns = self._upper
        return self._torch.cat([bottom, products[:, rows, columns]], dim=1)


def _on_gpu(params: Params) -> bool:
    return all(d.platform == "gpu" for leaf in jax.tree.leaves(params) for d in leaf.devices())
