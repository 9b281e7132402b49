"""Requests as the bytes that clients send, made once, before any time is taken."""

from collections.abc import Mapping

import numpy as np
import orjson

from recflow_jax.batch import JaggedBatch
from recflow_jax.serving.bags import PackedBags
from recflow_jax.serving.rpc_messages import MESSAGES

DATATYPES = {"float32": "FP32", "int32": "INT32", "int64": "INT64"}
HEADERS = (
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
    "Inference-Header-Content-Length: {header}\r\n\r\n"
)


def packed_tensors(batch: JaggedBatch) -> dict[str, np.ndarray]:
    """The packed form: ids feature by feature."""
    lengths = np.diff(batch.offsets).reshape(batch.samples, batch.features)
    by_sample = PackedBags.packed(batch.values, lengths, batch.weights)
    by_feature = by_sample.batch(batch.dense)  # features and samples change places
    tensors = {
        "values": by_feature.values.astype(np.int64),
        "lengths": np.ascontiguousarray(lengths.T, np.int32),
        "dense": batch.dense,
        "weights": by_feature.weights,
    }
    return {n: a for n, a in tensors.items() if a is not None and (n != "dense" or a.shape[1])}


def http_request(path: str, tensors: Mapping[str, np.ndarray]) -> bytes:
    """A POST with binary tensors that asks for a binary answer."""
    inputs = [
        {**_head(name, array), "parameters": {"binary_data_size": array.nbytes}}
        for name, array in tensors.items()
    ]
    header = orjson.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}})
    body = header + b"".join(array.tobytes() for array in tensors.values())
    return HEADERS.format(path=path, length=len(body), header=len(header)).encode() + body


def grpc_request(model: str, tensors: Mapping[str, np.ndarray]) -> bytes:
    """A ModelInferRequest with raw contents."""
    message = MESSAGES["ModelInferRequest"](model_name=model)
    for name, array in tensors.items():
        message.inputs.add(**_head(name, array))
        message.raw_input_contents.append(array.tobytes())
    return message.SerializeToString()


def _head(name: str, array: np.ndarray) -> dict[str, object]:
    return {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": list(array.shape)}
