"""A request and its answer as both protocols have them, once decoded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recflow_jax.batch import InputError
from recflow_jax.serving.inputs import SCORES

US_PER_S = 1e6
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, kw_only=True)
class InferCall:
    """What a client asks: scores of the samples in `tensors`.

    timeout_s: the client's deadline, from the request's arrival; None if it has none. priority:
    lower ones run first.
    """

    model: str
    version: str = ""
    id: str = ""
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    timeout_s: float | None = None
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class InferAnswer:
    """The scores, float32 [n, outputs], and which model gave them."""

    model: str
    version: str
    id: str
    scores: np.ndarray


def timeout_of(parameters: Mapping[str, Any], transport_s: float | None) -> float | None:
    """Seconds to the earlier of the deadlines that the request (its parameter `timeout`, in
    microseconds, 0 for none) and its transport set; None without. Raises InputError.
    """
    timeout_us = _whole(parameters, "timeout", 0)
    if timeout_us < 0:
        raise InputError(f"parameter 'timeout' is {timeout_us}, below 0 microseconds")
    if not timeout_us:
        return transport_s
    timeout_s = timeout_us / US_PER_S
    return timeout_s if transport_s is None else min(timeout_s, transport_s)


def priority_of(parameters: Mapping[str, Any]) -> int:
    """The parameter `priority`. Raises InputError."""
    return _whole(parameters, "priority", 0)


def version_of(parameters: Mapping[str, Any]) -> str:
    """The parameter `version` of a load, its only one; "" without. Raises InputError."""
    check_known(parameters, "version")
    version = parameters.get("version", "")
    if not isinstance(version, str):
        raise InputError(f"parameter 'version' is {version!r}, not a string")
    return version


def check_known(parameters: Mapping[str, Any], *known: str) -> None:
    """Raises InputError for a parameter that is not one of these."""
    for name in parameters.keys() - {*known}:
        raise InputError(f"parameter {name!r} is not read here ({', '.join(known)} may be given)")


def check_outputs(outputs: Iterable[tuple[Any, Mapping[str, Any]]]) -> None:
    """Raises InputError for an output, by its name and parameters, that no model gives."""
    for name, parameters in outputs:
        if name != SCORES:
            raise InputError(f"output {name!r} is not one of the model's: {SCORES}")
        check_in_message(f"output {name!r}", parameters)
        if parameters.get("classification"):
            raise InputError(f"output {name!r}: no classification is done here, these are logits")


def check_in_message(tensor: str, parameters: Mapping[str, Any]) -> None:
    """Raises InputError, which names `tensor`, for one that is to lie in shared memory."""
    if "shared_memory_region" in parameters:
        raise InputError(f"{tensor}: shared memory is not used here, tensors are part of messages")


def _whole(parameters: Mapping[str, Any], name: str, default: int) -> int:
    if name not in parameters:
        return default
    value = parameters[name]
    if type(value) is not int or value not in _INT64:
        raise InputError(f"parameter {name!r} is {value!r}, not a whole number")
    return value
