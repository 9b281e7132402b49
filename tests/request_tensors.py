"""Samples as clients send them, made bag by bag: what the server's own decoding is held against."""

import dataclasses
from typing import Any

import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.data.workloads import generate
from small_models import CONCAT

Tensors = dict[str, np.ndarray]
DATATYPES = {"float32": "FP32", "int32": "INT32", "int64": "INT64"}

# Weighted bags, bags laid out, and two features of the user's side.
BOTH_SIDES = dataclasses.replace(
    CONCAT,
    name="both_sides",
    features=tuple(
        dataclasses.replace(f, side="user" if f.name in ("user", "mean") else "item")
        for f in CONCAT.features
    ),
)


def request(config: DLRMConfig, samples: int, *, seed: int, one_user: bool = False) -> JaggedBatch:
    """Random samples; one_user: those of one user, whose bags are the same in all."""
    batch = generate(config, samples, seed=seed)
    if not one_user:
        return batch
    user = [f for f, feature in enumerate(config.features) if feature.side == "user"]
    sources = [[0 if f in user else s for f in range(len(config.features))] for s in range(samples)]
    bags = [[_places(batch, s, f) for f, s in enumerate(row)] for row in sources]
    places = np.array([p for row in bags for bag in row for p in bag], np.int64)
    lengths = [len(bag) for row in bags for bag in row]
    return JaggedBatch(
        dense=batch.dense,
        values=batch.values[places],
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        weights=None if batch.weights is None else batch.weights[places],
    )


def packed(config: DLRMConfig, batch: JaggedBatch, *, one_user: bool = False) -> Tensors:
    """The packed form of `batch`; one_user: the user's features apart, once."""
    everything = range(len(config.features))
    user = [f for f in everything if one_user and config.features[f].side == "user"]
    item = [f for f in everything if f not in user]
    tensors = _part(batch, "", item, batch.samples)
    if one_user:
        tensors |= _part(batch, "user_", user, 1)
    return tensors | ({"dense": batch.dense} if config.dense_width else {})


def as_json(tensors: Tensors, **parameters: Any) -> dict[str, Any]:
    """The body of a request in JSON."""
    inputs = [
        {
            "name": name,
            "datatype": DATATYPES[array.dtype.name],
            "shape": list(array.shape),
            "data": array.ravel().tolist(),
        }
        for name, array in tensors.items()
    ]
    return {"inputs": inputs, "parameters": parameters}


def as_inputs(module: Any, tensors: Tensors, **how: bool) -> list[Any]:
    """The same for a client of tritonclient's; module: its http or grpc."""
    made = []
    for name, array in tensors.items():
        tensor = module.InferInput(name, list(array.shape), DATATYPES[array.dtype.name])
        tensor.set_data_from_numpy(array, **how)
        made.append(tensor)
    return made


def _part(batch: JaggedBatch, prefix: str, features: list[int], samples: int) -> Tensors:
    places = [_places(batch, s, f) for f in features for s in range(samples)]
    joined = np.array([p for bag in places for p in bag], np.int64)
    lengths = np.array([len(bag) for bag in places], np.int32).reshape(len(features), samples)
    tensors = {"values": batch.values[joined].astype(np.int64), "lengths": lengths}
    if batch.weights is not None:
        tensors["weights"] = batch.weights[joined]
    return {prefix + name: array for name, array in tensors.items()}


def _places(batch: JaggedBatch, sample: int, feature: int) -> range:
    first = sample * batch.features + feature
    return range(batch.offsets[first], batch.offsets[first + 1])
