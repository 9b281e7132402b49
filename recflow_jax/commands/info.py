"""`recflow info`: what this machine is, which back end it gets, and what it could reach."""

import importlib.metadata
import json
import platform
import subprocess
import tomllib
from importlib import resources
from typing import Any

import jax

from recflow_jax.backend import choose_backend
from recflow_jax.config import shipped_models
from recflow_jax.console import console

PACKAGES = ("recflow-jax", "jax", "jaxlib", "flax", "numpy", "numba")


def info(*, as_json: bool = False) -> None:
    """Prints `facts()`, for reading or as JSON."""
    found = facts()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for topic, lines in _lines(found).items():
        for index, line in enumerate(lines):
            console.print(f"{topic if index == 0 else '':<10}{line}", soft_wrap=True, markup=False)


def facts() -> dict[str, Any]:
    """Device, back end and why, versions, shipped models, known ceilings (None if unknown)."""
    device = jax.devices()[0]
    backend = choose_backend("auto", device)
    return {
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "compute_capability": getattr(device, "compute_capability", None),
        },
        "backend": {"name": backend.name, "reason": backend.reason},
        "versions": versions(),
        "models": list(shipped_models()),
        "ceilings": ceilings(device.device_kind),
    }


def versions() -> dict[str, str | None]:
    """Versions of what answers depend on; None for what is not there."""
    found = {"python": platform.python_version()}
    return {**found, **{name: _version(name) for name in PACKAGES}, "nvidia-driver": _driver()}


def ceilings(kind: str) -> dict[str, Any] | None:
    """Measured copy and matmul rates [lowest, highest] of devices of that name, and the source."""
    text = (resources.files("recflow_jax") / "ceilings.toml").read_text()
    return next((d for d in tomllib.loads(text)["device"] if d["kind"] == kind), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0].strip()


def _lines(found: dict[str, Any]) -> dict[str, list[str]]:
    return {
        "device": [_device_line(found["device"])],
        "back end": [f"{found['backend']['name']} ({found['backend']['reason']})"],
        "ceilings": _ceiling_lines(found["ceilings"]),
        "versions": [f"{name} {version or '-'}" for name, version in found["versions"].items()],
        "models": [", ".join(found["models"])],
    }


def _device_line(device: dict[str, Any]) -> str:
    capability = device["compute_capability"]
    suffix = f", compute capability {capability}" if capability else ""
    return f"{device['count']} x {device['kind']} ({device['platform']}{suffix})"


def _ceiling_lines(ceiling: dict[str, Any] | None) -> list[str]:
    if ceiling is None:
        return ["none known for this device"]
    return [
        f"copy {_span(ceiling['copy_tb_s'])} TB/s",
        f"bf16 matmul {_span(ceiling['bf16_tflop_s'])} TFLOP/s",
        f"source: {ceiling['source']}",
    ]


def _span(limits: list[float]) -> str:
    low, high = limits
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"
