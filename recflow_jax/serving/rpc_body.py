"""Inference over gRPC: messages to calls, answers to messages."""

from typing import Any

import numpy as np

from recflow_jax.batch import InputError
from recflow_jax.serving.calls import (
    InferAnswer,
    InferCall,
    check_in_message,
    check_outputs,
    priority_of,
    timeout_of,
)
from recflow_jax.serving.inputs import SCORES
from recflow_jax.serving.rpc_messages import MESSAGES
from recflow_jax.serving.tensors import TensorHead

_CONTENTS = {"FP32": "fp32_contents", "INT32": "int_contents", "INT64": "int64_contents"}


def decode(message: Any, *, timeout_s: float | None) -> InferCall:
    """Reads a ModelInferRequest; timeout_s: the call's own deadline. Raises InputError."""
    parameters = parameters_of(message)
    check_outputs([(output.name, parameters_of(output)) for output in message.outputs])
    return InferCall(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        tensors=_tensors(message),
        timeout_s=timeout_of(parameters, timeout_s),
        priority=priority_of(parameters),
    )


def parameters_of(message: Any) -> dict[str, Any]:
    """A message's parameters, whatever their types."""
    return {name: _value(parameter) for name, parameter in message.parameters.items()}


def encode(answer: InferAnswer) -> Any:
    """The ModelInferResponse, its tensor as raw bytes."""
    response = MESSAGES["ModelInferResponse"](
        model_name=answer.model, model_version=answer.version, id=answer.id
    )
    response.outputs.add(name=SCORES, datatype="FP32", shape=answer.scores.shape)
    response.raw_output_contents.append(answer.scores.astype("<f4", copy=False).tobytes())
    return response


def _tensors(message: Any) -> dict[str, np.ndarray]:
    for entry in message.inputs:
        check_in_message(f"input {entry.name!r}", entry.parameters)
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InputError(f"{len(raw)} raw contents for {len(message.inputs)} inputs")
    tensors: dict[str, np.ndarray] = {}
    for index, entry in enumerate(message.inputs):
        head = TensorHead(name=entry.name, datatype=entry.datatype, shape=tuple(entry.shape))
        if head.name in tensors:
            raise InputError(f"input {head.name!r} comes twice")
        tensors[head.name] = head.of_bytes(raw[index]) if raw else _typed(head, entry.contents)
    return tensors


def _typed(head: TensorHead, contents: Any) -> np.ndarray:
    filled = [field.name for field, _ in contents.ListFields()]
    expected = _CONTENTS[head.datatype]
    if any(name != expected for name in filled):
        raise InputError(f"input {head.name!r}: {', '.join(filled)} for {head.datatype}")
    return head.of_numbers(getattr(contents, expected))


def _value(parameter: Any) -> Any:
    field = parameter.WhichOneof("choice")
    return None if field is None else getattr(parameter, field)
