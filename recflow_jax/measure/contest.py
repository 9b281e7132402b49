"""Incremental batching, serial batching on the same engine, and plain JAX behind a queue if it is
among the rivals, online.

All are first saturated, in turns, as a machine is not equally fast all the time. At each load
serial batching is tuned, then all get the same arrivals, one after the other. Then the largest load
is looked for at which each keeps a p99, and serial batching is tuned anew where it fails. A profile
table foretells what batching in either way does at each load. Requests for the engine, in either
way, can come from front ends in processes of their own.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from recflow_jax.batch import JaggedBatch
from recflow_jax.engine.engine import Engine
from recflow_jax.engine.segments import Segments
from recflow_jax.measure.apart import apart, check_answers_of, saturating_samples
from recflow_jax.measure.caller_process import Pool
from recflow_jax.measure.callers import Callers, Here
from recflow_jax.measure.contenders import RECFLOW, Lineup
from recflow_jax.measure.foretold import Foreteller, Foretold
from recflow_jax.measure.load import LoadResult, Submit, of_median_p99
from recflow_jax.measure.online import (
    OnlineOptions,
    OnlinePoint,
    OnlineResult,
    Servers,
    check_served,
    plain_server,
)
from recflow_jax.measure.requests import arrivals_at, least_qps, mean_samples
from recflow_jax.measure.serial_server import SerialServer
from recflow_jax.measure.sustained import Sustained, keeps, sustained
from recflow_jax.measure.tuning import best_collecting, tries, tuned_where_it_fails
from recflow_jax.measure.waited import Waited
from recflow_jax.model import Params
from recflow_jax.remote.front_ends import FrontEnds
from scheduling import Collecting, ProfileTable

SERIAL, PLAIN = "serial", "jax"
TRY_SHARE = 0.4  # of a point's seconds: how long each of many tries lasts


def contenders_of(rivals: Sequence[str]) -> tuple[str, ...]:
    """Who takes part where these are the engine's rivals: plain JAX only if it is one."""
    return (RECFLOW, SERIAL, PLAIN) if PLAIN in rivals else (RECFLOW, SERIAL)


def measurements(options: OnlineOptions, rivals: Sequence[str], *, foretells: bool) -> int:
    """How often `bench_online` calls `advance`, at most; foretells: with a profile table."""
    points, contenders = len(options.qps or options.loads), len(contenders_of(rivals))
    in_flight = options.serial_in_flight
    saturating = options.repeats * (contenders - 1 + len(in_flight))
    offered = options.repeats * (contenders + foretells)
    return saturating + points * (tries(in_flight) + offered) + contenders


def bench_online(
    segments: Segments,
    engine: Engine,
    lineup: Lineup,
    params: Params,
    requests: Sequence[JaggedBatch],
    *,
    profile: ProfileTable | None = None,
    ids: str = "uniform",
    seed: int = 0,
    options: OnlineOptions,
    advance: Callable[[], None] = lambda: None,
    keep: Callable[[OnlineResult], None] = lambda _: None,
) -> OnlineResult:
    """`engine` batches incrementally on `segments`. profile: to foretell by; not with front ends,
    of whose requests the engine sees bundles alone.

    Who takes part, see `contenders_of`.
    `advance` is called after each measurement, see `measurements`, and `keep` with what there is so
    far. Raises WrongAnswers before anything is timed, LoadError.
    """
    with (
        _servers(segments, engine, lineup, requests, options) as (servers, serial),
        _front_ends(
            {RECFLOW: engine, SERIAL: serial}, params, options, ids=ids, seed=seed
        ) as guests,
    ):
        check_served(engine.config, params, requests, servers)
        here = {name: _here(submit, requests, options, engine) for name, submit in servers.items()}
        teller = None
        if profile is not None:
            of = (segments, profile, engine, requests)
            teller = Foreteller.calibrated(*of, ids=ids, seed=seed)
        return _Contest(
            engine=engine,
            serial=serial,
            callers={**here, **guests},
            requests=requests,
            options=options,
            seed=seed,
            batch_buckets=segments.batch_buckets,
            teller=teller,
            advance=advance,
            keep=keep,
        ).run()


@contextmanager
def _servers(
    segments: Segments,
    engine: Engine,
    lineup: Lineup,
    requests: Sequence[JaggedBatch],
    options: OnlineOptions,
) -> Iterator[tuple[Servers, SerialServer]]:
    with ExitStack() as stack:
        collecting = Collecting(wait_ms=0)
        serial = stack.enter_context(SerialServer.from_segments(segments, batching=collecting))
        servers: dict[str, Submit] = {RECFLOW: engine.submit, SERIAL: serial.submit}
        if PLAIN in contenders_of(lineup.rivals):
            of = (lineup, requests, segments.options.max_batch, options.wait_ms)
            servers[PLAIN] = stack.enter_context(plain_server(*of)).submit
        yield servers, serial


def _here(
    submit: Submit, requests: Sequence[JaggedBatch], options: OnlineOptions, engine: Engine
) -> Here:
    return Here(
        submit=submit,
        requests=requests,
        in_flight_samples=options.in_flight_batches * engine.options.max_batch,
        arrivals_s=options.arrivals_s,
    )


@contextmanager
def _front_ends(
    engines: Mapping[str, Engine],
    params: Params,
    options: OnlineOptions,
    *,
    ids: str,
    seed: int,
) -> Iterator[dict[str, Callers]]:
    """Each engine's own ones, if there are to be any; their answers are checked first."""
    drawn: dict[str, Any] = {"ids": ids, "seed": seed, "request_samples": options.request_samples}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        callers: dict[str, Callers] = {}
        for name, engine in engines.items() if options.front_ends else ():
            listening = stack.enter_context(FrontEnds(engine, Path(folder) / name))
            guests = apart(
                *(Pool(path=listening.path, **drawn), options.front_ends),
                in_flight_samples=saturating_samples(engine.options.max_batch),
                check=partial(check_answers_of, name, engine.config, params),
                arrivals_s=options.arrivals_s,
            )
            callers[name] = stack.enter_context(guests)
        yield callers


@dataclass(kw_only=True)
class _Contest:
    """What all measurements share."""

    engine: Engine
    serial: SerialServer
    callers: dict[str, Callers]
    requests: Sequence[JaggedBatch]
    options: OnlineOptions
    seed: int
    batch_buckets: Sequence[int]
    teller: Foreteller | None
    advance: Callable[[], None]
    keep: Callable[[OnlineResult], None]

    def run(self) -> OnlineResult:
        saturation = self._saturation()
        result = OnlineResult(
            max_batch=self.engine.options.max_batch,
            mean_request_samples=mean_samples(self.requests),
            wait_ms=self.options.wait_ms,
            saturation=saturation,
            points=(),
            arrivals="burst" if self.options.burst else "Poisson",
            host=None if self.teller is None else self.teller.host,
            p99_ms=self.options.p99_ms,
            front_ends=self.options.front_ends,
        )
        self.keep(result)
        base = saturation.get(self.options.load_of) or min(saturation.values())
        for share, qps in self.options.rates(base):
            result = replace(result, points=(*result.points, self._point(share, qps)))
            self.keep(result)
        for name in self.callers:
            found = self._sustained(name, saturation[name], result.points)
            result = replace(result, sustained=result.sustained | {name: found})
            self.keep(result)
        return result

    def _saturation(self) -> dict[str, float]:
        """The medians of some rounds; of serial batching, with the number of batches in flight that
        is best.
        """
        rates: defaultdict[str | int, list[float]] = defaultdict(list)
        for _ in range(self.options.repeats):
            for name in self.callers:
                if name != SERIAL:
                    rates[name].append(self._saturate(name))
            for in_flight in self.options.serial_in_flight:
                self.serial.collect(Collecting(wait_ms=0, in_flight=in_flight))
                rates[in_flight].append(self._saturate(SERIAL))
        medians = {way: median(found) for way, found in rates.items()}
        best = max(medians[in_flight] for in_flight in self.options.serial_in_flight)
        return {name: best if name == SERIAL else medians[name] for name in self.callers}

    def _saturate(self, name: str) -> float:
        rate = self.callers[name].saturate(self._try_s)
        self.advance()
        return rate

    def _point(self, share: float | None, qps: float) -> OnlinePoint:
        collecting, _ = self._tuned(qps, self.advance)
        rates: list[float] = []
        of_each: dict[str, list[LoadResult]] = {name: [] for name in self.callers}
        for repeat in range(self.options.repeats):
            if self.teller is not None:
                rates.append(self._saturate(RECFLOW))
            self._offer(qps, of_each, turned=bool(repeat % 2))
        loads = {name: of_median_p99(offered) for name, offered in of_each.items()}
        return OnlinePoint(
            share=share,
            qps=qps,
            contenders=loads,
            p99s_ms={name: [one.p99_ms for one in offered] for name, offered in of_each.items()},
            collecting=collecting,
            waited=self._waited(loads[RECFLOW].requests),
            foretold=self._foretold(qps, loads, collecting, rates),
        )

    def _offer(self, qps: float, of_each: dict[str, list[LoadResult]], *, turned: bool) -> None:
        """The same arrivals for each that has not fallen behind, one after the other; turned: in
        the order turned around.
        """
        for name in reversed(self.callers) if turned else self.callers:
            if all(load.kept_up for load in of_each[name]):
                load = self.callers[name].offer(qps, self.options.seconds, self.seed)
                of_each[name].append(load)
            self.advance()

    def _waited(self, requests: int) -> Waited | None:
        """In the run that was the last; of front ends the engine sees bundles alone."""
        if self.options.front_ends:
            return None
        return Waited.of_last(self.engine.waits(), requests)

    def _tuned(
        self,
        qps: float,
        advance: Callable[[], None] = lambda: None,
        is_enough: Callable[[LoadResult], bool] = lambda _: False,
    ) -> tuple[Collecting, LoadResult]:
        """How serial batching had best collect at a load, or well enough, and does from now on;
        what came of it.
        """

        def serve(collecting: Collecting) -> LoadResult:
            self.serial.collect(collecting)
            load = self._try(SERIAL, qps)
            advance()
            return load

        of = (self.batch_buckets, self.options.serial_in_flight)
        collecting, load = best_collecting(serve, *of, is_enough)
        self.serial.collect(collecting)
        return collecting, load

    def _foretold(
        self,
        qps: float,
        loads: dict[str, LoadResult],
        collecting: Collecting,
        rates: Sequence[float],
    ) -> dict[str, Foretold]:
        """rates: of the engine, saturated beside the loads: how fast the host was meanwhile."""
        if self.teller is None:
            return {}
        teller = self.teller.saturating_at(median(rates), self.requests)
        due_s = arrivals_at(qps, self.options.seconds, self.seed, self.options.arrivals_s)
        ways = {RECFLOW: None, SERIAL: collecting}
        return {
            name: Foretold.of(teller.foretell(way, self.requests, due_s), loads[name])
            for name, way in ways.items()
        }

    def _sustained(self, name: str, most: float, points: Sequence[OnlinePoint]) -> Sustained:
        """What is below a point that kept the bound is not tried again."""
        bound_ms = self.options.p99_ms
        kept = [p for p in points if keeps(p.contenders[name], bound_ms)]
        known = max(kept, key=lambda point: point.qps, default=None)

        def offered(qps: float) -> LoadResult:
            if known is not None and qps <= known.qps:
                return known.contenders[name]
            return self._try(name, qps)

        def is_kept(load: LoadResult) -> bool:
            return keeps(load, bound_ms)

        def tuned(qps: float) -> LoadResult:
            return self._tuned(qps, is_enough=is_kept)[1]

        can_be_tuned = tuned_where_it_fails(offered, tuned, is_kept)
        serve = can_be_tuned if name == SERIAL else offered
        found = sustained(serve, most, bound_ms, least=least_qps(self._try_s))
        self.advance()
        return found

    @property
    def _try_s(self) -> float:
        return TRY_SHARE * self.options.seconds

    def _try(self, name: str, qps: float) -> LoadResult:
        return self.callers[name].offer(qps, self._try_s, self.seed)
