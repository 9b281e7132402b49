"""DLRM inference in JAX and Pallas: jagged gathers and incremental batching."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recflow_jax.batch import InputError, JaggedBatch
    from recflow_jax.calibration import calibrate
    from recflow_jax.config import (
        BagConfig,
        DLRMConfig,
        FeatureConfig,
        TableConfig,
        shipped_models,
    )
    from recflow_jax.engine.engine import Engine
    from recflow_jax.engine.errors import (
        DeadlineExceeded,
        EngineClosed,
        EngineError,
        QueueFull,
        StepFailed,
    )
    from recflow_jax.engine.options import EngineOptions
    from recflow_jax.params import init_params, load_params, save_params
    from scheduling import Collecting

__all__ = [
    "BagConfig",
    "Collecting",
    "DLRMConfig",
    "DeadlineExceeded",
    "Engine",
    "EngineClosed",
    "EngineError",
    "EngineOptions",
    "FeatureConfig",
    "InputError",
    "JaggedBatch",
    "QueueFull",
    "StepFailed",
    "TableConfig",
    "calibrate",
    "init_params",
    "load_params",
    "save_params",
    "shipped_models",
]

_MODULES = {
    "batch": ("InputError", "JaggedBatch"),
    "calibration": ("calibrate",),
    "config": ("BagConfig", "DLRMConfig", "FeatureConfig", "TableConfig", "shipped_models"),
    "engine.engine": ("Engine",),
    "engine.errors": ("DeadlineExceeded", "EngineClosed", "EngineError", "QueueFull", "StepFailed"),
    "engine.options": ("EngineOptions",),
    "params": ("init_params", "load_params", "save_params"),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
_HOMES["Collecting"] = "scheduling"


def __getattr__(name: str) -> Any:
    """Loads what is asked for: a command that needs no JAX does not wait for it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
