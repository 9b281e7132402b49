"""`recflow demo`: the main job on real input, from ratings to served answers, with a report."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recflow_jax.backend import choose_backend
from recflow_jax.batch import JaggedBatch
from recflow_jax.commands.info import versions
from recflow_jax.commands.profile import profile_segments
from recflow_jax.console import console, progress
from recflow_jax.data.movielens import MovieLens, load
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.options import EngineOptions
from recflow_jax.engine.segments import Segments
from recflow_jax.measure import plots, report
from recflow_jax.measure.agreement import check_answers
from recflow_jax.measure.contenders import RECFLOW, Lineup
from recflow_jax.measure.online import (
    OnlineOptions,
    OnlinePoint,
    OnlineResult,
    check_served,
    offer,
    plain_server,
    saturate,
)
from recflow_jax.measure.requests import mean_samples
from recflow_jax.model import Params
from recflow_jax.params import ParamsError, load_params, save_params
from recflow_jax.train import TrainOptions, auc, predict, train_movielens

# A model this small runs in one piece: each cut costs a dispatch, and there is nothing to hide.
SERVED = EngineOptions(
    max_batch=512, max_slice=512, smallest_batch=16, smallest_slice=16, segments=1
)
LOADS = (0.2, 0.5, 0.8)
SECONDS, QUICK_SECONDS = 4.0, 1.5
MODEL_FILE = "movielens.safetensors"


def demo(
    *,
    out: str | Path = "demo",
    quick: bool = False,
    data: str | Path | None = None,
    options: EngineOptions = SERVED,
) -> dict[str, Any]:
    """Trains (or loads) the click model, profiles this device, serves the test interactions as
    requests and compares with plain JAX. Writes model, profile, figures and report.json to `out`;
    returns the report.

    quick: one epoch, shorter runs. `data`: folder of the data set's files (default: recbole's).
    Raises DataError if they are missing, WrongAnswers if a served answer is not the model's.
    """
    out = Path(out)
    samples = load(data)
    out.mkdir(parents=True, exist_ok=True)
    params = _model(samples, out / MODEL_FILE, epochs=1 if quick else TrainOptions.epochs)
    segments = Segments(samples.config, params, choose_backend(options.backend), options)
    profiled = profile_segments(segments, out=out, quick=True)
    demonstration = Demonstration(samples=samples, params=params, out=out)
    with Engine.from_segments(segments, profile=profiled.table) as engine:
        result = demonstration.run(engine, seconds=QUICK_SECONDS if quick else SECONDS)
    report.save_json(out / "report.json", result)
    console.print(f"report: {out}/report.json, latency.png, batch_sizes.png, roc.png", markup=False)
    return result


def _model(samples: MovieLens, path: Path, *, epochs: int) -> Params:
    """The model of an earlier run, if it is there and for this data, else a new one."""
    console.print(
        f"MovieLens-100K: {len(samples.train):,} interactions to train on, "
        f"{len(samples.test):,} later ones to serve"
    )
    if path.exists():
        try:
            _, params = load_params(path, config=samples.config)
            console.print(f"model: loaded from {path}", markup=False, soft_wrap=True)
            return params
        except ParamsError as error:
            console.print(f"model: trained anew ({error})", markup=False, soft_wrap=True)
    result = train_movielens(samples, options=TrainOptions(epochs=epochs))
    save_params(path, result.config, result.params)
    console.print(
        f"model: trained in {result.seconds:.0f} s ({result.epochs} epochs), "
        f"test AUC {result.auc:.4f}"
    )
    return result.params


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """The test interactions, one request per user, the model, and where results go."""

    samples: MovieLens
    params: Params
    out: Path

    def run(self, engine: Engine, *, seconds: float) -> dict[str, Any]:
        """Serves, checks, measures, prints, draws; returns the report."""
        users = self.samples.requests()
        requests = [batch for _, batch, _ in users]
        labels = np.concatenate([labels for _, _, labels in users])
        served = self._serve(engine, requests, labels)
        at_once = engine.stats().batch_buckets
        online, sizes = self._compare(engine, requests, seconds)
        sizes["all at once"] = at_once
        result = report.header(
            engine.config, engine.backend, ids="MovieLens-100K", seed=0, versions=versions()
        )
        result |= {"online": report.as_json(online), "batch_sizes": sizes}
        plots.bench(result, self.out / "latency.png")
        plots.batch_sizes(sizes, self.out / "batch_sizes.png", title="batch sizes by load")
        stats = engine.stats()
        console.print(
            f"engine: {stats.requests_answered:,} requests in {stats.batches:,} batches of "
            f"{stats.mean_batch:.0f} samples on average, {stats.sample_padding:.0%} padding"
        )
        return result | {"served": served}

    def _serve(
        self, engine: Engine, requests: Sequence[JaggedBatch], labels: np.ndarray
    ) -> dict[str, Any]:
        """All requests at once, each answer held against the reference forward pass."""
        answers = [engine.submit(request) for request in requests]
        scores = np.concatenate([answer.result() for answer in answers])
        joined = JaggedBatch.join(requests)
        reference = predict(engine.config, self.params, joined)[:, None]
        dtype = engine.config.compute_dtype
        error = check_answers(reference, {RECFLOW: scores}, dtype=dtype)[RECFLOW]
        area = auc(labels, scores[:, 0])
        console.print(
            f"served: {len(requests)} users' requests at once, {joined.samples:,} samples, all "
            f"answers equal the reference's (largest error {error:.1g} standard deviations)"
        )
        console.print(f"served: AUC of the answers {area:.4f}")
        curve = {f"served answers, AUC {area:.3f}": scores[:, 0]}
        plots.roc(labels, curve, self.out / "roc.png", title="liked or not: test interactions")
        return {
            "requests": len(requests),
            "samples": joined.samples,
            "auc": area,
            "error": error,
        }

    def _compare(
        self, engine: Engine, requests: Sequence[JaggedBatch], seconds: float
    ) -> tuple[OnlineResult, dict[str, dict[int, int]]]:
        """Engine and plain JAX at several loads; the engine's batch sizes at each."""
        options = OnlineOptions(loads=LOADS, seconds=seconds)
        lineup = Lineup(engine.config, self.params, engine.backend, ("jax",))
        max_batch = engine.options.max_batch
        points, sizes = [], {}
        with (
            plain_server(lineup, requests, max_batch, options.wait_ms) as server,
            progress("serving", 2 + 2 * len(LOADS)) as advance,
        ):
            servers = {RECFLOW: engine.submit, "jax": server.submit}
            check_served(engine.config, self.params, requests, servers)
            saturation = saturate(servers, requests, max_batch, options, advance)
            for share in LOADS:
                before = Counter(engine.stats().batch_buckets)
                qps = share * min(saturation.values())
                loads = offer(servers, requests, qps, seconds, 0, advance)
                points.append(OnlinePoint(share=share, qps=qps, contenders=loads))
                sizes[f"{share:.0%} load"] = dict(Counter(engine.stats().batch_buckets) - before)
        result = OnlineResult(
            max_batch=max_batch,
            mean_request_samples=mean_samples(requests),
            wait_ms=options.wait_ms,
            saturation=saturation,
            points=tuple(points),
        )
        console.print(
            "throughput: "
            + ", ".join(
                f"{name} {qps:,.0f} requests/s ({qps * result.mean_request_samples:,.0f} samples/s)"
                for name, qps in saturation.items()
            )
        )
        report.show(report.online_table(result))
        return result, sizes
