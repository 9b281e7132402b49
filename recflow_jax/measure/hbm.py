"""Bytes that kernels move between HBM and the chip, as NVIDIA's profiler `ncu` counts them.

It counts launches of another process, `counted`: the DNN of a batch, and a step that co-runs it
with the embeddings of the next one. What runs at the same time is a kernel; kernels are counted one
after the other, with nothing beside them.
"""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from recflow_jax.config import DLRMConfig
from recflow_jax.measure.launched import SHARING

BYTES, TIME = "dram__bytes.sum", "gpu__time_duration.sum"
PEAK_PCT = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
NCU = (
    *("--profile-from-start", "off", "--target-processes", "all"),
    *("--clock-control", "none", "--cache-control", "none", "--graph-profiling", "node"),
    *("--csv", "--page", "raw", "--print-units", "base", "--metrics", f"{BYTES},{TIME},{PEAK_PCT}"),
)
BOUNDARY = "cbrt"  # in the name of the kernel between the DNN and the co-run
LIMIT_S = 300
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {
    **{"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6},
    **{"ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0},
}


class NotCounted(RuntimeError):
    """Nobody counted; the message says why."""


@dataclass(frozen=True, kw_only=True)
class CountedKernel:
    """One kernel: bytes of DRAM, microseconds, and the rate as percent of the peak."""

    name: str
    dram_bytes: float
    us: float
    peak_pct: float


@dataclass(frozen=True, kw_only=True)
class HbmTraffic:
    """Kernels one after the other. Raises NotCounted for none."""

    kernels: Sequence[CountedKernel]

    def __post_init__(self) -> None:
        if not self.us:
            raise NotCounted("ncu counted no kernel")

    @property
    def us(self) -> float:
        """Microseconds of all."""
        return sum(kernel.us for kernel in self.kernels)

    @property
    def dram_bytes(self) -> float:
        """Bytes of DRAM of all."""
        return sum(kernel.dram_bytes for kernel in self.kernels)

    @property
    def tb_per_s(self) -> float:
        """TB of DRAM per second."""
        return self.dram_bytes / self.us / 1e6

    @property
    def peak_pct(self) -> float:
        """The rate as percent of the peak, of which each kernel has had its own for its time."""
        return sum(kernel.peak_pct * kernel.us for kernel in self.kernels) / self.us


@dataclass(frozen=True, kw_only=True)
class HbmUse:
    """A batch's DNN alone, and with the next batch's embeddings in its launches."""

    dnn: HbmTraffic
    co_run: HbmTraffic


def count_hbm(config: DLRMConfig, *, batch: int, ride: str, ids: str, seed: int) -> HbmUse:
    """Counts with `ncu`, in a process that draws the same parameters. Raises NotCounted."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise NotCounted("ncu is not on PATH")
    with TemporaryDirectory() as folder:
        model, log = Path(folder) / "model.toml", Path(folder) / "ncu.csv"
        model.write_text(config.to_toml())
        launches = [sys.executable, "-m", "recflow_jax.measure.counted", str(model)]
        launches += [str(batch), ride, ids, str(seed)]
        _run([ncu, *NCU, "--log-file", str(log), *launches], log)
        return hbm_use(read_csv(log.read_text().splitlines()))


def _run(command: Sequence[str], log: Path) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, **SHARING}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotCounted(f"ncu did not end well: {error}") from None
    written = log.read_text() if log.exists() else ""
    if done.returncode or "==ERROR==" in written:
        raise NotCounted(f"ncu ended with {done.returncode}: {_why(written + done.stdout, done)}")


def _why(told: str, done: subprocess.CompletedProcess[str]) -> str:
    """The last that ncu called an error, and the last line of the launches' own errors."""
    lines = [line for line in told.splitlines() if line.startswith("==ERROR==")][-1:]
    lines += done.stderr.strip().splitlines()[-1:]
    return "; ".join(lines) or "nothing was said"


def hbm_use(kernels: Sequence[CountedKernel]) -> HbmUse:
    """The kernels before the boundary, and those behind it. Raises NotCounted without one."""
    places = [i for i, kernel in enumerate(kernels) if BOUNDARY in kernel.name]
    if len(places) != 1:
        raise NotCounted(f"{len(places)} of {len(kernels)} kernels are the boundary, not 1")
    before, behind = kernels[: places[0]], kernels[places[0] + 1 :]
    return HbmUse(dnn=HbmTraffic(kernels=before), co_run=HbmTraffic(kernels=behind))


def read_csv(lines: Iterable[str]) -> list[CountedKernel]:
    """The kernels of ncu's raw page: a header, a row of units, a row per kernel, among lines of its
    own that start with ==. Raises NotCounted where a metric is not there.
    """
    kept = [line for line in lines if line.strip() and not line.startswith("==")]
    start = next((i for i, line in enumerate(kept) if line.startswith('"ID"')), len(kept))
    header, *rows = [*csv.reader(kept[start:])] or [[]]
    for column in ("Kernel Name", BYTES, TIME, PEAK_PCT):
        if column not in header:
            raise NotCounted(f"ncu wrote no {column}")
    units, *of_kernels = [dict(zip(header, row, strict=False)) for row in rows] or [{}]
    return [_counted(row, units) for row in of_kernels if row["ID"].isdigit()]


def _counted(row: Mapping[str, str], units: Mapping[str, str]) -> CountedKernel:
    return CountedKernel(
        name=row["Kernel Name"],
        dram_bytes=_number(row[BYTES]) * _bytes_in(units[BYTES]),
        us=_number(row[TIME]) * _seconds_in(units[TIME]) * 1e6,
        peak_pct=_number(row[PEAK_PCT]),
    )


def _number(text: str) -> float:
    """A number, with separators of thousands or without. Raises NotCounted for "n/a"."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        raise NotCounted(f"ncu wrote {text!r}, not a number") from None


def _bytes_in(unit: str) -> float:
    prefix = unit.lower().removesuffix("byte")
    if prefix not in _PREFIXES:
        raise NotCounted(f"ncu counts bytes in {unit!r}")
    return _PREFIXES[prefix]


def _seconds_in(unit: str) -> float:
    if unit not in _SECONDS:
        raise NotCounted(f"ncu counts time in {unit!r}")
    return _SECONDS[unit]
