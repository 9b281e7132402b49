"""MLPerf LoadGen's Server and Offline scenarios, with the engine in this process as the system.

What LoadGen calls a sample is a query of many user-item pairs, one request of ours. LoadGen keeps
time and judges; its own files are the result, of which the detail log is read.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlperf_loadgen
import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.engine.answer import Answer
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.errors import EngineError
from recflow_jax.measure.stream import InFlight

DETAIL = "mlperf_log_detail.txt"
LOG_LINE = ":::MLLOG "
PERCENTILES = ("50.00", "90.00", "95.00", "97.00", "99.00", "99.90")
NS_PER_MS = 1e6
REASON, EARLY = "result_invalid_reason", "early_stopping_result"
TICK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class LoadGenResult:
    """One run. LoadGen's verdict and rates are of queries; `pairs_per_s` of user-item pairs.

    valid: LoadGen's verdict, and nothing failed. reasons: what LoadGen says of its verdict.
    failures: queries without scores, by the error's type; to LoadGen they count as answered.
    latencies_ms: by percentile, of queries from when they were scheduled; of Offline, which is one
    query of all, they tell nothing and there are none. target_qps, p99_ms: None in Offline.
    """

    scenario: str
    valid: bool
    reasons: str
    target_qps: float | None
    p99_ms: float | None
    queries: int
    queries_per_s: float
    mean_query_pairs: float
    failures: Mapping[str, int]
    latencies_ms: Mapping[str, float]
    folder: str

    @property
    def pairs_per_s(self) -> float:
        """User-item pairs scored per second."""
        return self.queries_per_s * self.mean_query_pairs


class System:
    """Answers LoadGen's queries with an engine's scores.

    LoadGen calls from threads of its own and is answered on the engine's completion thread, with
    the scores' buffer, which is alive until LoadGen returns. A query that the engine refuses or
    fails is answered with nothing, as LoadGen would wait for ever.
    """

    def __init__(self, engine: Engine, requests: Sequence[JaggedBatch]) -> None:
        self._engine = engine
        self._requests = requests
        self._counting = threading.Lock()
        self.queries = 0
        self.pairs = 0
        self.failures: Counter[str] = Counter()

    def issue(self, samples: Sequence[Any]) -> None:
        """Submits each at once; never waits."""
        for sample in samples:
            self.submit(sample)

    def issue_in_flight(self, samples: Sequence[Any], most: int) -> None:
        """Submits each, once there are fewer than `most` inside."""
        stream = InFlight(lambda i: self.submit(samples[i]), Answer.exception, most)
        for index in range(len(samples)):
            stream.launch(index)

    def submit(self, sample: Any) -> Answer:
        """One query; LoadGen is told when its answer is there."""
        request = self._requests[sample.index]
        try:
            answer = self._engine.submit(request)
        except EngineError as error:
            answer = Answer()
            answer.set_exception(error)
        answer.add_done_callback(partial(self._complete, sample.id, request.samples))
        return answer

    def _complete(self, query: int, pairs: int, answer: Any) -> None:
        error = answer.exception()
        scores = np.zeros(0, np.float32) if error else answer.result()
        with self._counting:
            self.queries += 1
            self.pairs += pairs
            if error:
                self.failures[type(error).__name__] += 1
        response = mlperf_loadgen.QuerySampleResponse(query, scores.ctypes.data, scores.nbytes)
        mlperf_loadgen.QuerySamplesComplete([response])


def run_offline(
    engine: Engine,
    requests: Sequence[JaggedBatch],
    *,
    expected_qps: float,
    seconds: float,
    in_flight: int,
    seed: int,
    folder: Path,
    tick: Callable[[], None] = lambda: None,
) -> LoadGenResult:
    """All queries of `seconds` at once, `in_flight` of them inside.

    expected_qps: LoadGen makes a tenth more queries than this rate takes; if they are answered
    sooner than in `seconds` the run is not valid.
    """
    settings = _settings(mlperf_loadgen.TestScenario.Offline, seconds, seed)
    settings.offline_expected_qps = expected_qps
    system = System(engine, requests)
    issue = partial(system.issue_in_flight, most=in_flight)
    return _result(system, _run(issue, settings, len(requests), folder, tick), folder)


def run_server(
    engine: Engine,
    requests: Sequence[JaggedBatch],
    *,
    qps: float,
    p99_ms: float,
    seconds: float,
    seed: int,
    folder: Path,
    tick: Callable[[], None] = lambda: None,
) -> LoadGenResult:
    """Poisson arrivals of `qps` queries per second, whose p99 has to be at most `p99_ms`.

    What is due together LoadGen hands over together.
    """
    settings = _settings(mlperf_loadgen.TestScenario.Server, seconds, seed)
    settings.server_target_qps = qps
    settings.server_target_latency_ns = round(p99_ms * NS_PER_MS)
    settings.server_target_latency_percentile = 0.99
    settings.server_coalesce_queries = True
    system = System(engine, requests)
    log = _run(system.issue, settings, len(requests), folder, tick)
    return _result(system, log, folder)


def _settings(scenario: Any, seconds: float, seed: int) -> Any:
    settings = mlperf_loadgen.TestSettings()
    settings.scenario = scenario
    settings.mode = mlperf_loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1000 * seconds)
    settings.min_query_count = 1
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = seed
    return settings


def _run(
    issue: Callable[[Sequence[Any]], None],
    settings: Any,
    samples: int,
    folder: Path,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """What LoadGen logged. It runs on a thread of its own, so that this one can be interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    with _constructed(issue, samples) as (system, library):
        start = partial(
            mlperf_loadgen.StartTestWithLogSettings, system, library, settings, _logs(folder)
        )
        thread = threading.Thread(target=start, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(TICK_S)
            tick()
    return read_log(folder / DETAIL)


@contextmanager
def _constructed(issue: Callable[[Sequence[Any]], None], samples: int) -> Iterator[tuple[Any, Any]]:
    """LoadGen's handles of the system under test and of its library of samples."""
    system = mlperf_loadgen.ConstructSUT(issue, _nothing)
    library = mlperf_loadgen.ConstructQSL(samples, samples, _nothing, _nothing)
    yield system, library
    mlperf_loadgen.DestroyQSL(library)
    mlperf_loadgen.DestroySUT(system)


def _nothing(*_: Any) -> None:
    """Samples are in memory already, and nothing is held back that could be flushed."""


def _logs(folder: Path) -> Any:
    settings = mlperf_loadgen.LogSettings()
    settings.enable_trace = False
    settings.log_output.outdir = str(folder)
    return settings


def read_log(path: Path) -> dict[str, Any]:
    """Every key of a detail log with its last value; of reasons, all."""
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        if line.startswith(LOG_LINE):
            entry = json.loads(line.removeprefix(LOG_LINE))
            key, value = entry["key"], entry["value"]
            found[key] = found.get(key, "") + value if key == REASON else value
    return found


def _result(system: System, log: Mapping[str, Any], folder: Path) -> LoadGenResult:
    served = log["effective_scenario"] == "Server"
    rate = "result_completed_samples_per_sec" if served else "result_samples_per_second"
    latencies = {p: log[f"result_{p}_percentile_latency_ns"] / NS_PER_MS for p in PERCENTILES}
    return LoadGenResult(
        scenario=log["effective_scenario"].lower(),
        valid=log["result_validity"] == "VALID" and not system.failures,
        reasons=" ".join(f"{log.get(REASON, '')} {log.get(EARLY, '')}".split()),
        target_qps=log["effective_target_qps"] if served else None,
        p99_ms=log["effective_target_latency_ns"] / NS_PER_MS if served else None,
        queries=system.queries,
        queries_per_s=log[rate],
        mean_query_pairs=system.pairs / system.queries,
        failures=dict(system.failures),
        latencies_ms={p.rstrip("0").rstrip("."): ms for p, ms in latencies.items() if served},
        folder=str(folder),
    )
