"""Bodies of inference over HTTP: JSON, and JSON with binary tensors behind it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from recflow_jax.batch import InputError
from recflow_jax.serving.calls import (
    InferAnswer,
    InferCall,
    check_in_message,
    check_outputs,
    priority_of,
    timeout_of,
)
from recflow_jax.serving.failures import Unsupported
from recflow_jax.serving.inputs import SCORES
from recflow_jax.serving.tensors import TensorHead

HEADER_LENGTH = b"inference-header-content-length"
TIMEOUT = b"inference-timeout-ms"


@dataclass(frozen=True, kw_only=True)
class DecodedBody:
    """A request, and whether its client wants the answer's tensor as bytes."""

    call: InferCall
    binary: bool


def decode_request(
    body: bytes, headers: dict[bytes, bytes], path: Mapping[str, str]
) -> DecodedBody:
    """`decode` by a request's headers and its path's parts. Raises InputError, Unsupported."""
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding != b"identity":
        raise Unsupported(f"content-encoding {encoding.decode('latin-1')!r} is not read here")
    model, version = named(path)
    return decode(
        body,
        _header_length(headers),
        model=model,
        version=version,
        timeout_s=_timeout_s(headers),
    )


def named(path: Mapping[str, str]) -> tuple[str, str]:
    """Model and version ("": any) in a path."""
    return path["model"], path.get("version", "")


def parameters_of(body: bytes) -> Mapping[str, Any]:
    """The parameters of a request that may have nothing else, nor a body. Raises InputError."""
    header, _ = _split(body or b"{}", None)
    return _parameters(header)


def decode(
    body: bytes, header_bytes: int | None, *, model: str, version: str, timeout_s: float | None
) -> DecodedBody:
    """Reads a request's body, whose JSON part is `header_bytes` long (None: all of it).

    timeout_s: the deadline that the HTTP headers set. Raises InputError.
    """
    header, binary = _split(body, header_bytes)
    parameters = _parameters(header)
    outputs = _objects(header, "outputs")
    check_outputs([(output.get("name"), _parameters(output)) for output in outputs])
    call = InferCall(
        model=model,
        version=version,
        id=_entry(header, "id", str, ""),
        tensors=_tensors(_objects(header, "inputs"), binary),
        timeout_s=timeout_of(parameters, timeout_s),
        priority=priority_of(parameters),
    )
    return DecodedBody(call=call, binary=_wants_binary(parameters, outputs))


def encode(answer: InferAnswer, *, binary: bool) -> tuple[bytes, int | None]:
    """The answer's body and the length of its JSON part if bytes follow it."""
    output: dict[str, Any] = {
        "name": SCORES,
        "datatype": "FP32",
        "shape": list(answer.scores.shape),
    }
    if binary:
        output["parameters"] = {"binary_data_size": answer.scores.nbytes}
    else:
        output["data"] = answer.scores.ravel()
    header = orjson.dumps(
        {
            "model_name": answer.model,
            "model_version": answer.version,
            "id": answer.id,
            "outputs": [output],
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    if not binary:
        return header, None
    return header + answer.scores.astype("<f4", copy=False).tobytes(), len(header)


def _header_length(headers: dict[bytes, bytes]) -> int | None:
    text = headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not text.isdigit():
        raise InputError(f"{HEADER_LENGTH.decode()} is {text!r}, not a number of bytes")
    return int(text)


def _timeout_s(headers: dict[bytes, bytes]) -> float | None:
    text = headers.get(TIMEOUT)
    if text is None:
        return None
    try:
        timeout_s = float(text) / 1000
    except ValueError:
        timeout_s = math.nan
    if not 0 <= timeout_s < math.inf:
        raise InputError(f"{TIMEOUT.decode()} is {text!r}, not a number of milliseconds")
    return timeout_s


def _split(body: bytes, header_bytes: int | None) -> tuple[dict[str, Any], memoryview]:
    size = len(body) if header_bytes is None else header_bytes
    if size > len(body):
        raise InputError(f"the body has {len(body)} bytes, its JSON part is said to have {size}")
    view = memoryview(body)
    try:
        header = orjson.loads(view[:size])
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise InputError("the body is no JSON object")
    return header, view[size:]


def _tensors(inputs: list[dict[str, Any]], binary: memoryview) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for entry in inputs:
        head = _head(entry)
        if head.name in tensors:
            raise InputError(f"input {head.name!r} comes twice")
        size = _binary_size(entry, head.name)
        if size is None:
            tensors[head.name] = head.of_numbers(_entry(entry, "data", list))
        else:
            tensors[head.name] = head.of_bytes(binary[:size])
            binary = binary[size:]
    if len(binary):
        raise InputError(f"{len(binary)} bytes of the body belong to no input")
    return tensors


def _head(entry: Mapping[str, Any]) -> TensorHead:
    name = _entry(entry, "name", str)
    shape = _entry(entry, "shape", list)
    if not {*map(type, shape)} <= {int}:
        raise InputError(f"input {name!r}: shape is {shape!r}, not whole numbers")
    return TensorHead(name=name, datatype=_entry(entry, "datatype", str), shape=tuple(shape))


def _binary_size(entry: Mapping[str, Any], name: str) -> int | None:
    parameters = _parameters(entry)
    check_in_message(f"input {name!r}", parameters)
    size = parameters.get("binary_data_size")
    if size is None:
        return None
    if type(size) is not int or size < 0:
        raise InputError(f"input {name!r}: binary_data_size is {size!r}, not a number of bytes")
    if "data" in entry:
        raise InputError(f"input {name!r} has both data and bytes")
    return size


def _wants_binary(parameters: Mapping[str, Any], outputs: list[dict[str, Any]]) -> bool:
    asked = [_parameters(output).get("binary_data") for output in outputs]
    first = asked[0] if asked else None
    return bool(parameters.get("binary_data_output") if first is None else first)


def _parameters(owner: Mapping[str, Any]) -> dict[str, Any]:
    return _entry(owner, "parameters", dict, {})


def _objects(header: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    entries = _entry(header, name, list, [])
    if not {*map(type, entries)} <= {dict}:
        raise InputError(f"{name!r} is no list of objects")
    return entries


def _entry[T](owner: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    value = owner.get(name, default)
    if isinstance(value, kind):
        return value
    if value is None:
        raise InputError(f"{name!r} is missing")
    raise InputError(f"{name!r} is {value!r:.80}, not a JSON {_JSON_NAMES[kind]}")


_JSON_NAMES: dict[type, str] = {dict: "object", list: "array", str: "string"}
