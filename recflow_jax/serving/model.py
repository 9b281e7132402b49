"""One version of a model that is being served: its engine, and what is known of it."""

import json
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.serving.calls import InferCall
from recflow_jax.serving.inputs import ModelInputs
from recflow_jax.serving.pending import Landing, Pending
from recflow_jax.serving.served import Served
from recflow_jax.serving.tensors import TensorSpec

PLATFORM = "recflow_jax"
ID_BYTES = 8  # no request has more ids, laid out, than a body has room for


class ServedModel:
    """An engine under a name and a version."""

    def __init__(
        self,
        engine: Served,
        *,
        name: str,
        version: str,
        landing: Landing,
        max_body_bytes: int,
    ) -> None:
        self.engine = engine
        self.name = name
        self.version = version
        self._landing = landing
        self._inputs = ModelInputs(
            engine.config,
            max_samples=engine.max_queued_samples,
            max_ids=engine.max_ids_per_sample,
            max_ids_in_all=max_body_bytes // ID_BYTES,
        )

    def batch(self, call: InferCall) -> JaggedBatch:
        """The samples of a request. Raises InputError."""
        return self._inputs.batch(call.tensors)

    def submit(self, batch: JaggedBatch, *, due_s: float, priority: int) -> Pending:
        """Lets samples in; due_s: their deadline, of time.monotonic. Raises InputError and what
        `Engine.submit` raises.
        """
        left_s = due_s - time.monotonic()
        answer = self.engine.submit(batch, deadline_ms=1000 * left_s, priority=priority)
        return Pending(answer, self._landing, left_s)

    def try_out(self, timeout_s: float) -> Pending:
        """One sample of zeros and empty bags. Raises what `Engine.submit` raises."""
        config = self.engine.config
        sample = JaggedBatch(
            dense=np.zeros((1, config.dense_width), np.float32),
            values=np.zeros(0, np.int32),
            offsets=np.zeros(len(config.features) + 1, np.int64),
            weights=np.zeros(0, np.float32) if config.weighted else None,
        )
        return Pending(self.engine.submit(sample), self._landing, timeout_s)

    def metadata(self) -> dict[str, Any]:
        """Tensors, and what it takes beside them to build a request."""
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": PLATFORM,
            "inputs": [_tensor(spec) for spec in self._inputs.specs],
            "outputs": [_tensor(spec) for spec in self._inputs.outputs],
            "properties": self._properties(),
        }

    def configuration(self) -> dict[str, Any]:
        """The same as Triton has it in a model's config."""
        return {
            "name": self.name,
            "platform": PLATFORM,
            "backend": PLATFORM,
            "max_batch_size": 0,  # shapes are whole ones: no axis is left out
            "input": [
                {**_config_tensor(spec), "optional": spec.optional} for spec in self._inputs.specs
            ],
            "output": [_config_tensor(spec) for spec in self._inputs.outputs],
            "parameters": {
                name: {"string_value": value} for name, value in self._properties().items()
            },
        }

    def _properties(self) -> dict[str, str]:
        config = self.engine.config
        features = [
            {
                "name": feature.name,
                "rows": rows,
                "side": feature.side,
                "pooling": feature.pooling,
                "hotness": feature.hotness,
                "weighted": feature.weighted,
                "bag": asdict(feature.bag),
            }
            for feature, rows in zip(config.features, config.feature_rows, strict=True)
        ]
        return {
            "features": json.dumps(features),
            "optional_inputs": json.dumps([s.name for s in self._inputs.specs if s.optional]),
            "max_samples": str(self.engine.max_queued_samples),
            "max_ids_per_sample": str(self.engine.max_ids_per_sample),
            "backend": self.engine.backend_name,
            "fingerprint": config.fingerprint,
        }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _config_tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape)}
