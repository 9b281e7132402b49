"""`recflow bench loadgen`: MLPerf LoadGen's scenarios against the engine in this process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recflow_jax.batch import JaggedBatch
from recflow_jax.calibration import ready
from recflow_jax.commands.info import versions
from recflow_jax.config import DLRMConfig
from recflow_jax.console import Missing, console, progress
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.measure import report
from recflow_jax.measure.contenders import RECFLOW
from recflow_jax.measure.load import saturation_samples_per_s
from recflow_jax.measure.online import check_served
from recflow_jax.measure.requests import mean_samples, request_pool
from recflow_jax.params import init_params

try:
    from recflow_jax.measure.loadgen import TICK_S, LoadGenResult, run_offline, run_server
except ModuleNotFoundError as error:
    raise Missing(f"{error}: pip install 'recflow-jax[loadgen]'") from error

SCENARIOS = ("server", "offline", "both")
WARM_UP_S = 2.0
MARGIN = 1.1  # of Offline's queries over those that the warm-up foretells
MOST_QUEUED = 1 << 22  # pairs: a refused query makes a run invalid, one that is late does not


@dataclass(frozen=True, kw_only=True)
class LoadGenOptions:
    """scenario: of SCENARIOS; `both` is offline, then server at `shares` of its rate.

    qps: of each server run of `server`, in queries per second. p99_ms: of each server run, or one
    for all. request_samples: user-item pairs of each query; None draws MLPerf's sizes. seconds: of
    each run at least. in_flight_batches: largest batches inside, offline.
    """

    scenario: str = "both"
    qps: tuple[float, ...] = ()
    shares: tuple[float, ...] = (0.7, 0.85)
    p99_ms: tuple[float, ...] = (60.0,)
    request_samples: int | None = None
    seconds: float = 60.0
    in_flight_batches: int = 3

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise ValueError(f"scenario {self.scenario!r} is not one of {', '.join(SCENARIOS)}")
        if (self.scenario == "server") != bool(self.qps):
            raise ValueError("rates (--qps) are for scenario server, which needs them")
        for name in ("qps", "shares", "p99_ms"):
            bad = [value for value in getattr(self, name) if not value > 0]
            if bad:
                raise ValueError(f"loadgen: {name} has {bad[0]}, not above 0")
        if not self.seconds > 0:
            raise ValueError(f"loadgen: seconds is {self.seconds}, not above 0")
        if len(self.p99_ms) not in (1, self._loads):
            raise ValueError(f"loadgen: {len(self.p99_ms)} bounds of p99 for {self._loads} loads")

    @property
    def _loads(self) -> int:
        return len(self.qps or self.shares)

    def loads(self, offline_qps: float) -> list[tuple[float, float]]:
        """Of each server run, the queries per second and the p99 in milliseconds."""
        rates = self.qps or [share * offline_qps for share in self.shares]
        bounds = self.p99_ms * (self._loads if len(self.p99_ms) == 1 else 1)
        return [*zip(rates, bounds, strict=True)]


def bench_loadgen(
    config: DLRMConfig,
    *,
    engine: EngineOptions,
    options: LoadGenOptions,
    profile: Path | None = None,
    ids: str = "uniform",
    seed: int = 0,
    out: Path,
) -> dict[str, Any]:
    """Runs the scenarios, prints a table, writes into the folder `out` LoadGen's own files of each
    run, and `loadgen.json`, which it returns. The engine's queue has room for MOST_QUEUED pairs.

    Raises WrongAnswers before anything is timed, ValueError.
    """
    params = init_params(config, seed=seed)
    config = ready(config, params, ids=ids, seed=seed)
    requests = request_pool(config, ids=ids, seed=seed, request_samples=options.request_samples)
    engine = replace(engine, max_queued_samples=MOST_QUEUED)
    with Engine(config, params, options=engine, profile=profile) as system:
        result = report.header(config, system.backend, ids=ids, seed=seed, versions=versions())
        check_served(config, params, requests, {RECFLOW: system.submit})
        runs = _Runs(system, requests, options, seed, out).all()
    report.show(report.loadgen_table(runs))
    offline = runs.get("offline")
    result["loadgen"] = {
        "mean_request_samples": mean_samples(requests),
        "profile": None if profile is None else str(profile),
        "runs": report.as_json(runs),
        "of_offline": {} if offline is None else _shares(runs, offline),
    }
    report.save_json(out / "loadgen.json", result)
    console.print(f"wrote {out}", markup=False, soft_wrap=True)
    return result


def _shares(runs: Mapping[str, LoadGenResult], offline: LoadGenResult) -> dict[str, float]:
    """The completed rate of each server run over the offline rate of the same invocation."""
    return {
        name: run.pairs_per_s / offline.pairs_per_s
        for name, run in runs.items()
        if run is not offline
    }


class _Runs:
    """The runs of one invocation, by name."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[JaggedBatch],
        options: LoadGenOptions,
        seed: int,
        out: Path,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._options = options
        self._seed = seed
        self._out = out

    def all(self) -> dict[str, LoadGenResult]:
        """Offline first, as its rate is what the server runs are a share of."""
        runs = {} if self._options.scenario == "server" else {"offline": self._offline()}
        if self._options.scenario != "offline":
            offline_qps = runs["offline"].queries_per_s if runs else 0.0
            for index, (qps, p99_ms) in enumerate(self._options.loads(offline_qps)):
                runs[f"server-{index}"] = self._server(f"server-{index}", qps, p99_ms)
        return runs

    def _offline(self) -> LoadGenResult:
        inside = self._options.in_flight_batches * self._engine.options.max_batch
        per_s = saturation_samples_per_s(
            self._engine.submit, self._requests, in_flight_samples=inside, seconds=WARM_UP_S
        )
        mean = mean_samples(self._requests)
        with self._progress("offline") as tick:
            return run_offline(
                *(self._engine, self._requests),
                expected_qps=MARGIN * per_s / mean,
                in_flight=max(int(inside / mean), 1),
                tick=tick,
                **self._shared("offline"),
            )

    def _server(self, name: str, qps: float, p99_ms: float) -> LoadGenResult:
        with self._progress(f"server, {qps:,.0f} queries/s") as tick:
            return run_server(
                *(self._engine, self._requests),
                qps=qps,
                p99_ms=p99_ms,
                tick=tick,
                **self._shared(name),
            )

    def _shared(self, name: str) -> dict[str, Any]:
        return {
            "seconds": self._options.seconds,
            "seed": self._seed,
            "folder": self._out / name,
        }

    def _progress(self, name: str) -> Any:
        return progress(name, round(self._options.seconds / TICK_S))
