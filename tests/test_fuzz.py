"""Whatever a client sends, it gets the right scores or an InputError, and nothing else."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fake_clients import message, tensors
from fake_segments import CONFIG, FakeSegments, samples, scores
from recflow_jax.batch import InputError, JaggedBatch
from recflow_jax.engine.engine import Engine
from recflow_jax.serving import rest_body, rpc, rpc_body
from recflow_jax.serving.calls import InferCall
from recflow_jax.serving.inputs import ModelInputs
from recflow_jax.serving.rpc_messages import MESSAGES
from request_tensors import DATATYPES, Tensors, as_json
from running_server import SOON_S

INPUTS = ModelInputs(CONFIG, max_samples=64, max_ids=600, max_ids_in_all=1000)
GOOD = tensors(1, 2, 3, ids=2)

ARRAYS = st.sampled_from(["float32", "int32", "int64"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=3, max_side=4))
)
ANY_TENSORS = st.dictionaries(st.sampled_from(["dense", "values", "lengths", "f", "x"]), ARRAYS)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def decoded(body: bytes, header_bytes: int | None = None) -> InferCall | None:
    """What the HTTP end makes of a body; None for an error that its client is told."""
    try:
        return rest_body.decode(body, header_bytes, model="m", version="", timeout_s=None).call
    except InputError:
        return None


def with_bytes(asked: Tensors) -> tuple[bytes, int]:
    """A body with binary tensors, and the length of its JSON part."""
    body = as_json(asked)
    for entry, array in zip(body["inputs"], asked.values(), strict=True):
        del entry["data"]
        entry["parameters"] = {"binary_data_size": array.nbytes}
    header = json.dumps(body).encode()
    return header + b"".join(array.tobytes() for array in asked.values()), len(header)


def assert_same(found: InferCall | None, expected: Tensors) -> None:
    assert found is not None and found.tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found.tensors[name], array, strict=True)


# --- what is right comes through


@given(asked=ANY_TENSORS)
def test_bytes_come_through(asked: Tensors) -> None:
    assert_same(decoded(*with_bytes(asked)), asked)
    assert_same(rpc_body.decode(message(asked), timeout_s=None), asked)


@given(asked=ANY_TENSORS)
def test_numbers_come_through(asked: Tensors) -> None:
    finite = {name: np.nan_to_num(array, posinf=1, neginf=1) for name, array in asked.items()}
    assert_same(decoded(json.dumps(as_json(finite)).encode()), finite)


@given(asked=ANY_TENSORS)
def test_typed_contents_come_through(asked: Tensors) -> None:
    contents = {"FP32": "fp32_contents", "INT32": "int_contents", "INT64": "int64_contents"}
    typed = message(asked)
    del typed.raw_input_contents[:]
    for entry, array in zip(typed.inputs, asked.values(), strict=True):
        field = getattr(entry.contents, contents[DATATYPES[array.dtype.name]])
        field.extend(array.ravel().tolist())
    assert_same(rpc_body.decode(typed, timeout_s=None), asked)


# --- what is wrong is an InputError


@given(body=st.binary(max_size=200), header_bytes=st.none() | st.integers(0, 300))
def test_any_bytes_over_http(body: bytes, header_bytes: int | None) -> None:
    decoded(body, header_bytes)


@given(data=st.data())
def test_a_json_body_that_is_wrong_somewhere(data: st.DataObject) -> None:
    body = as_json(GOOD, timeout=1, priority=1) | {"id": "1", "outputs": [{"name": "scores"}]}
    for _ in range(data.draw(st.integers(1, 3))):
        spoil(body, data)
    decoded(json.dumps(body).encode())


def spoil(owner: Any, data: st.DataObject) -> None:
    """Replaces or removes something, anywhere in a JSON value."""
    keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
    if not keys:
        return
    key = data.draw(st.sampled_from(keys))
    if isinstance(owner[key], dict | list) and data.draw(st.booleans()):
        spoil(owner[key], data)
    elif data.draw(st.booleans()):
        owner[key] = data.draw(ANY_JSON)
    else:
        del owner[key]


@given(data=st.data())
def test_a_body_with_bytes_that_is_wrong_somewhere(data: st.DataObject) -> None:
    body, header_bytes = with_bytes(GOOD)
    decoded(
        garbled(body, data), data.draw(st.integers(0, 2 * header_bytes) | st.just(header_bytes))
    )


def garbled(sent: bytes, data: st.DataObject) -> bytes:
    """Some bytes in the middle are others, fewer or more."""
    start = data.draw(st.integers(0, len(sent)))
    stop = data.draw(st.integers(start, min(start + 8, len(sent))))
    return sent[:start] + data.draw(st.binary(max_size=8)) + sent[stop:]


@given(data=st.data())
def test_a_message_that_is_wrong_somewhere(data: st.DataObject) -> None:
    sent = garbled(message(GOOD, priority=1).SerializeToString(), data)
    try:
        rpc_body.decode(rpc.parsed(MESSAGES["ModelInferRequest"], sent), timeout_s=None)
    except InputError:
        pass


# --- from tensors to scores


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_segments(FakeSegments()) as engine:
        yield engine


WILD = {
    "dense": hnp.arrays(
        "float32",
        st.tuples(st.integers(0, 4), st.just(1)),
        elements=st.sampled_from([0, np.nan, np.inf]),
    ),
    "values": hnp.arrays("int64", st.integers(0, 8)),
    "lengths": hnp.arrays("int64", st.tuples(st.just(1), st.integers(0, 4))),
}


LENGTHS = hnp.arrays(
    "int32", st.tuples(st.just(1), st.integers(0, 4)), elements=st.integers(0, 3)
) | st.integers(0, 4).map(lambda samples: np.full((1, samples), 2, np.int32))
"""Any, or those that the model expects: ids of such bags are looked at later."""


@st.composite
def nearly_right(draw: st.DrawFn) -> Tensors:
    """Right tensors, or with one that is not."""
    lengths, ids = draw(LENGTHS), draw(st.sampled_from(["int32", "int64"]))
    numbers = st.floats(-(2.0**100), 2.0**100, width=32)
    asked = {
        "dense": draw(hnp.arrays("float32", (lengths.shape[1], 1), elements=numbers)),
        "values": draw(hnp.arrays(ids, int(lengths.sum()), elements=st.integers(0, 1000))),
        "lengths": lengths,
    }
    spoilt = draw(st.sampled_from([None, *asked]))
    return asked if spoilt is None else asked | {spoilt: draw(WILD[spoilt])}


@contextmanager
def unharmed_neighbours(engine: Engine) -> Iterator[None]:
    """Requests of either kind of bags that come before are answered right, whatever is raised."""
    neighbours = [engine.submit(samples(7)), engine.submit(samples(8, ids=2).frozen())]
    try:
        yield
    finally:
        found = [neighbour.result(SOON_S).tolist() for neighbour in neighbours]
        assert found == [scores(7), scores(8, ids=2)]


@given(asked=nearly_right())
def test_tensors_become_scores_or_an_error(engine: Engine, asked: Tensors) -> None:
    """Right are finite numbers, ids in [0, 1000), and lengths of every sample that use them up."""
    dense, values, lengths = asked["dense"], asked["values"], asked["lengths"]
    right = (
        np.isfinite(dense).all()
        and ((values >= 0) & (values < 1000)).all()
        and (lengths >= 0).all()
        and lengths.shape[1] == len(dense)
        and sum(lengths.ravel().tolist()) == len(values)
    )
    try:
        with unharmed_neighbours(engine):
            found = engine.submit(INPUTS.batch(asked)).result(SOON_S)
    except InputError:
        assert not right
        return
    assert right
    bags = np.split(values, np.cumsum(lengths[0])[:-1]) if len(dense) else []
    sums = np.array([bag.sum() for bag in bags], np.int64)
    expected = (2 * (dense[:, 0] + 10 * sums).astype(np.float32))[:, None]
    np.testing.assert_array_equal(found, expected)


WILD_BATCHES = st.builds(
    JaggedBatch,
    dense=WILD["dense"] | ARRAYS,
    values=WILD["values"] | hnp.arrays("int32", 3, elements=st.integers(0, 1000)) | ARRAYS,
    offsets=st.lists(st.integers(-1, 4), max_size=5).map(lambda o: np.array([0, *o], np.int64))
    | ARRAYS,
    weights=st.none() | ARRAYS,
)


@given(batch=WILD_BATCHES | WILD_BATCHES.map(JaggedBatch.frozen))
def test_any_batch_becomes_scores_or_an_error(engine: Engine, batch: JaggedBatch) -> None:
    try:
        with unharmed_neighbours(engine):
            found = engine.submit(batch).result(SOON_S)
    except InputError:
        return
    bags = [batch.bag(sample, 0) for sample in range(batch.samples)]
    sums = np.array([bag.sum() for bag in bags], np.int64)
    expected = (2 * (batch.dense[:, 0] + 10 * sums).astype(np.float32))[:, None]
    np.testing.assert_array_equal(found, expected)
