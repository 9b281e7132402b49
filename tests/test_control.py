"""Models and rows that are changed while they are served: no request fails, none is torn."""

import dataclasses
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

import versioned
from fake_segments import OPTIONS, FakeSegments
from recflow_jax.engine.engine import Engine
from recflow_jax.params import load_params, save_params
from recflow_jax.serving import control
from recflow_jax.serving.repository import Repository
from request_tensors import as_inputs, as_json, packed
from running_server import SOON_S, RunningServer, serving, wait_for

MODEL = "/v2/models/versioned"
INFER = f"{MODEL}/infer"
ROWS = f"{MODEL}/tables/t/rows"
LOAD, UNLOAD = (f"/v2/repository/models/versioned/{what}" for what in ("load", "unload"))
TENSORS = packed(versioned.CONFIG, versioned.batch(5))


def load(path: Path) -> Engine:
    return Engine(*load_params(path), options=versioned.OPTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1 to 4, and a fifth that is none."""
    path = tmp_path_factory.mktemp("repository")
    for version in range(1, 5):
        file = path / f"{version}.safetensors"
        save_params(file, versioned.CONFIG, versioned.params(version))
    (path / "5.safetensors").write_bytes(b"no parameters")
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[RunningServer]:
    repository = Repository(folder=folder, load=load)
    with serving(lambda: versioned.engine(1), repository) as server:
        yield server


@pytest.fixture
def web(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http, timeout=SOON_S) as client:
        yield client


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, server: RunningServer) -> Iterator[Any]:
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    address = getattr(server, f"{request.param}_address")
    with closing(module.InferenceServerClient(address)) as client:
        yield client


def load_version(web: httpx.Client, version: str) -> httpx.Response:
    return web.post(LOAD, json={"parameters": {"version": version}})


def rows(of: float, **changed: np.ndarray) -> dict[str, Any]:
    """The body of an update of the whole table."""
    return as_json(versioned.all_rows(of) | changed)


def asked(web: httpx.Client) -> tuple[int, int]:
    """The version of the model, and that of its rows, that an answer was made with."""
    answer = web.post(INFER, json=as_json(TENSORS))
    assert answer.status_code == 200, answer.text
    told = answer.json()
    found = versioned.version_in(np.array(told["outputs"][0]["data"]))
    assert str(found // 1000) == told["model_version"]
    return found // 1000, found % 1000


def states(triton: Any) -> dict[str, str]:
    is_grpc = isinstance(triton, tritonclient.grpc.InferenceServerClient)
    told = triton.get_model_repository_index(**{"as_json": True} if is_grpc else {})
    return {model["version"]: model["state"] for model in (told["models"] if is_grpc else told)}


def metric(web: httpx.Client, name: str) -> float:
    lines = web.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


# --- versions


def test_tritons_clients_load_and_unload(triton: Any, web: httpx.Client, folder: Path) -> None:
    """The latest version is a broken one until it is mended."""
    broken = (folder / "5.safetensors").read_bytes()
    with pytest.raises(InferenceServerException, match="version '5' was not loaded: ParamsError"):
        triton.load_model("versioned")
    assert asked(web) == (1, 0)
    others = dict.fromkeys("2345", "UNAVAILABLE")
    assert states(triton) == {"1": "READY", **others}
    save_params(folder / "5.safetensors", versioned.CONFIG, versioned.params(5))
    try:
        triton.load_model("versioned")
    finally:
        (folder / "5.safetensors").write_bytes(broken)
    assert asked(web) == (5, 0) and states(triton)["5"] == "READY"
    triton.unload_model("versioned")
    assert {*states(triton).values()} == {"UNAVAILABLE"} and not triton.is_server_ready()
    refused = web.post(INFER, json=as_json(TENSORS))
    assert (refused.status_code, refused.json()) == (503, {"error": "the model is not loaded"})
    triton.unload_model("versioned")
    assert load_version(web, "2").json() == {}
    assert asked(web) == (2, 0) and triton.is_model_ready("versioned", "2")


def test_a_failed_load_is_told_and_counted(web: httpx.Client) -> None:
    answer = load_version(web, "5")
    assert answer.status_code == 500 and "is no whole safetensors file" in answer.json()["error"]
    index = {model["version"]: model for model in web.post("/v2/repository/index").json()}
    assert "is no whole safetensors file" in index["5"]["reason"] and "reason" not in index["4"]
    assert metric(web, 'recflow_model_changes_total{outcome="failed"}') == 1
    assert metric(web, 'recflow_engine_in_use{model="versioned",version="1"}') == 1
    assert load_version(web, "4").status_code == 200
    assert metric(web, 'recflow_model_changes_total{outcome="loaded"}') == 1
    assert metric(web, "recflow_engine_in_use") == 1
    assert metric(web, 'recflow_engine_in_use{model="versioned",version="4"}') == 1


class Clients:
    """Threads that ask until they are told to stop; every answer is checked as it comes."""

    def __init__(self, server: RunningServer) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(3)
        self.least: tuple[int, int] = (0, 0)
        self._asking = [self._pool.submit(self._over_http, server) for _ in range(2)]
        self._asking.append(self._pool.submit(self._over_grpc, server))

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *_: object) -> None:
        """Raises what any of them saw."""
        self._stop.set()
        self.seen = [future.result(SOON_S) for future in self._asking]
        self._pool.shutdown()

    def _over_http(self, server: RunningServer) -> list[tuple[int, int]]:
        with httpx.Client(base_url=server.http, timeout=SOON_S) as client:
            return self._until_stopped(lambda: asked(client))

    def _over_grpc(self, server: RunningServer) -> list[tuple[int, int]]:
        inputs = as_inputs(tritonclient.grpc, TENSORS)
        with closing(tritonclient.grpc.InferenceServerClient(server.grpc_address)) as client:

            def ask() -> tuple[int, int]:
                answer: Any = client.infer("versioned", inputs)
                found = versioned.version_in(answer.as_numpy("scores"))
                return found // 1000, found % 1000

            return self._until_stopped(ask)

    def _until_stopped(self, ask: Any) -> list[tuple[int, int]]:
        seen = []
        while not self._stop.is_set():
            least = self.least
            seen.append(ask())
            assert seen[-1] >= least, "an older version than was there before it was asked"
        return seen


def test_a_swap_under_load_fails_no_request(server: RunningServer, web: httpx.Client) -> None:
    """And leaves one engine's table in memory."""
    with Clients(server) as clients:
        for version in (2, 3, 4):
            assert load_version(web, str(version)).status_code == 200
            clients.least = (version, 0)
            before = metric(web, "recflow_requests_total")
            wait_for(lambda before=before: metric(web, "recflow_requests_total") > before + 100)
    for seen in clients.seen:
        assert seen == sorted(seen) and {model for model, _ in seen} == {1, 2, 3, 4}
    assert metric(web, "recflow_requests_total") == metric(
        web, 'recflow_requests_total{outcome="ok"'
    )


def test_what_is_swapped_out_is_let_go(server: RunningServer, web: httpx.Client) -> None:
    def tables() -> int:
        shape = (versioned.ROWS, versioned.DIM)
        return sum(array.shape == shape for array in jax.live_arrays())

    gc.collect()  # what other tests have left
    before = tables()
    for version in "234":
        assert load_version(web, version).status_code == 200
        wait_for(lambda: tables() == before)
    assert web.post(UNLOAD).status_code == 200
    wait_for(lambda: tables() == before - 1)


def test_rows_change_under_load(server: RunningServer, web: httpx.Client) -> None:
    with Clients(server) as clients:
        for version in range(1, 151):
            answer = web.post(ROWS, json=rows(version))
            assert answer.json() == {
                "model_name": "versioned",
                "model_version": "1",
                "rows": versioned.ROWS,
            }
            clients.least = (1, version)
    for seen in clients.seen:
        assert seen == sorted(seen) and len({*seen}) > 10
    assert metric(web, "recflow_engine_updates_total") == 150
    assert metric(web, "recflow_engine_rows_updated_total") == 150 * versioned.ROWS


def test_rows_and_versions_change_at_once(server: RunningServer, web: httpx.Client) -> None:
    """Whichever model an update meets, it is written whole, and neither fails."""
    with Clients(server) as clients, ThreadPoolExecutor(1) as pool:
        swaps = pool.submit(lambda: [load_version(web, str(v)).status_code for v in (2, 3, 4)])
        updates = [web.post(ROWS, json=rows(i)).status_code for i in range(100)]
        assert swaps.result(SOON_S) == [200] * 3 and {*updates} == {200}
    assert all(seen for seen in clients.seen)


def test_binary_rows(web: httpx.Client) -> None:
    """As infer takes its tensors; of an id that comes twice the last counts."""
    ids, values = np.array([*range(64), 0], np.int32), np.full((65, 4), 7, np.float32)
    values[0] = 99
    inputs = as_inputs(tritonclient.http, {"ids": ids, "values": values}, binary_data=True)
    body, header_length = tritonclient.http.InferenceServerClient.generate_request_body(inputs)
    headers = {"Inference-Header-Content-Length": str(header_length)}
    answer = web.post(f"{MODEL}/versions/1/tables/t/rows", content=body, headers=headers)
    assert (answer.status_code, answer.json()["rows"]) == (200, 65)
    assert asked(web) == (1, 7)


# --- what is not allowed, and what is wrong

NARROW, INFINITE = np.zeros((64, 2), np.float32), rows(1)
INFINITE["inputs"][1]["data"][5] = 1e39  # in JSON; in bytes it could be NaN
WRONG = {
    "table": (f"{MODEL}/tables/u/rows", rows(1), 400, "no table 'u' (it has t)"),
    "id": (ROWS, rows(1, ids=np.arange(1, 65)), 400, "id 64 is not in [0, 64)"),
    "shape": (ROWS, rows(1, values=NARROW), 400, "not floats [k, 4]"),
    "number": (ROWS, INFINITE, 400, "value inf at [1, 1] is not a finite float32"),
    "count": (ROWS, rows(1, ids=np.arange(3)), 400, "3 ids, 64 rows of values"),
    "missing": (ROWS, {"inputs": []}, 400, "input 'ids' is missing"),
    "unknown": (ROWS, rows(1, dense=NARROW), 400, "input 'dense' is neither 'ids' nor 'values'"),
    "no object": (ROWS, [], 400, "the body is no JSON object"),
    "model": ("/v2/models/m/tables/t/rows", rows(1), 404, "no model 'm'"),
    "model version": (f"{MODEL}/versions/9/tables/t/rows", rows(1), 404, "version '9'"),
    "other model": ("/v2/repository/models/m/load", {}, 404, "no model 'm' is served here"),
    "no version": (LOAD, {"parameters": {"version": "8"}}, 404, "no version '8' is in the"),
    "a path": (LOAD, {"parameters": {"version": "../x"}}, 404, "no version '../x' is in the"),
    "version": (LOAD, {"parameters": {"version": 2}}, 400, "'version' is 2, not a string"),
    "parameter": (LOAD, {"parameters": {"config": "{}"}}, 400, "'config' is not read here"),
    "of unload": (UNLOAD, {"parameters": {"version": "1"}}, 400, "'version' is not read here"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(shared: httpx.Client, case: str) -> None:
    path, body, status, message = WRONG[case]
    answer = shared.post(path, json=body)
    assert answer.status_code == status and message in answer.json()["error"]
    assert asked(shared)[0] == 1


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[httpx.Client]:
    """One server for all that changes nothing."""
    repository = Repository(folder=folder, load=load)
    with serving(lambda: versioned.engine(1), repository) as server:
        with httpx.Client(base_url=server.http, timeout=SOON_S) as client:
            yield client


@pytest.mark.parametrize("path", [LOAD, UNLOAD, ROWS])
def test_changes_are_posted(shared: httpx.Client, path: str) -> None:
    assert shared.get(path).status_code == 405


def test_all_is_off_unless_it_is_allowed() -> None:
    """Over both protocols."""
    with serving(lambda: Engine.from_segments(FakeSegments())) as server:
        for path in ("/v2/repository/models/fake/load", "/v2/repository/models/fake/unload"):
            answer = httpx.post(server.http + path)
            assert answer.status_code == 403 and "--model-control" in answer.json()["error"]
        with closing(tritonclient.grpc.InferenceServerClient(server.grpc_address)) as client:
            with pytest.raises(InferenceServerException, match="PERMISSION_DENIED"):
                client.load_model("fake")
    fixed = Engine.from_segments(FakeSegments(dataclasses.replace(OPTIONS, max_update_rows=None)))
    with serving(lambda: fixed) as server:
        answer = httpx.post(f"{server.http}/v2/models/fake/tables/t/rows", json=rows(1))
        assert answer.status_code == 403 and "--row-updates" in answer.json()["error"]


def test_a_token_is_asked_for(folder: Path) -> None:
    repository = Repository(folder=folder, load=load)
    with serving(lambda: versioned.engine(1), repository, token="sesame") as server:
        with httpx.Client(base_url=server.http, timeout=SOON_S) as web:
            for path in (LOAD, UNLOAD, ROWS):
                assert web.post(path, json=rows(1)).status_code == 401
            web.headers["authorization"] = "Bearer sesame"
            assert web.post(ROWS, json=rows(1)).status_code == 200
            assert load_version(web, "2").status_code == 200
        with closing(tritonclient.grpc.InferenceServerClient(server.grpc_address)) as client:
            for change in (client.load_model, client.unload_model):
                with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                    change("versioned")
            with pytest.raises(InferenceServerException, match="version '5' was not loaded"):
                client.load_model("versioned", headers={"authorization": "Bearer sesame"})


# --- what ends in between


class SlowLoads:
    """Of versions that are loaded when they are let."""

    def __init__(self) -> None:
        self.asked, self.let = threading.Event(), threading.Event()

    def __call__(self, path: Path) -> Engine:
        self.asked.set()
        self.let.wait(SOON_S)
        return load(path)


def test_a_load_goes_on_without_the_client_that_asked(folder: Path) -> None:
    slow = SlowLoads()
    with serving(lambda: versioned.engine(1), Repository(folder=folder, load=slow)) as server:
        with closing(tritonclient.grpc.InferenceServerClient(server.grpc_address)) as client:
            with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
                client.load_model("versioned", client_timeout=0.2)
            assert slow.asked.wait(SOON_S) and states(client)["5"] == "LOADING"
            slow.let.set()
            wait_for(lambda: "LOADING" not in states(client).values())
            with httpx.Client(base_url=server.http) as web:
                assert asked(web) == (1, 0)  # the fifth is broken
                wait_for(lambda: metric(web, 'recflow_model_changes_total{outcome="failed"') == 1)


def test_it_ends_while_it_loads(folder: Path) -> None:
    slow = SlowLoads()
    with serving(lambda: versioned.engine(1), Repository(folder=folder, load=slow)) as server:
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(httpx.post, server.http + LOAD, timeout=SOON_S)
            assert slow.asked.wait(SOON_S)
            server.stop()
            ending = server.ending()
            slow.let.set()
            assert ending.drained and not ending.quiet
            assert loading.exception(SOON_S) or loading.result().status_code >= 500


def test_it_ends_while_rows_change(server: RunningServer) -> None:
    """Each update is written, or the server says that it ends."""

    def update_until_refused() -> int:
        with httpx.Client(base_url=server.http, timeout=SOON_S) as web:
            written = 0
            while (answer := web.post(ROWS, json=rows(1))).status_code == 200:
                written += 1
                busy.set()
            assert answer.status_code == 503, answer.text
            return written

    busy = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        updating = [pool.submit(update_until_refused) for _ in range(3)]
        assert busy.wait(SOON_S)
        server.stop()
        ending = server.ending()
        assert ending.drained and ending.quiet
        for outcome in updating:
            assert isinstance(outcome.exception(SOON_S), httpx.TransportError | None)


def test_a_device_that_hangs_can_be_swapped_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests are told; what comes later is answered."""
    monkeypatch.setattr(control, "CLOSING_S", 0.2)
    hanging = FakeSegments()
    hanging.hold()
    engine = Engine.from_segments(hanging)
    with serving(lambda: engine, Repository(folder=folder, load=load), drain_s=0.2) as server:
        with httpx.Client(base_url=server.http, timeout=SOON_S) as web, ThreadPoolExecutor(1) as p:
            body = as_json({"dense": np.zeros((1, 1), np.float32), "f": np.ones(1, np.int32)})
            inside = p.submit(web.post, "/v2/models/fake/infer", json=body)
            wait_for(lambda: engine.stats().requests_accepted == 1)
            answer = httpx.post(f"{server.http}/v2/repository/models/fake/load", json=FOURTH)
            assert answer.status_code == 200
            assert inside.result(SOON_S).status_code == 503
            assert web.post(INFER, json=as_json(TENSORS)).json()["model_version"] == "4"
    hanging.go_on()


FOURTH = {"parameters": {"version": "4"}}
