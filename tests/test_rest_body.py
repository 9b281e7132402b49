"""What is wrong with a body over HTTP, or a message over gRPC, is said by name."""

import json
from typing import Any

import pytest

from fake_clients import message, tensors
from recflow_jax.batch import InputError
from recflow_jax.serving import rest_body, rpc_body
from request_tensors import as_json

GOOD = tensors(1, 2)


def with_entry(index: int = 0, **changes: Any) -> dict[str, Any]:
    """A good body whose input at `index` is changed; None leaves something out."""
    body = as_json(GOOD)
    entry = body["inputs"][index] | changes
    body["inputs"][index] = {name: value for name, value in entry.items() if value is not None}
    return body


def binary_size(size: Any) -> dict[str, Any]:
    return with_entry(data=None, parameters={"binary_data_size": size})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"inputs": {}}, "'inputs' is {}, not a JSON array"),
        ({"inputs": [3]}, "'inputs' is no list of objects"),
        ({"outputs": [{"name": "x"}]}, "output 'x' is not one of the model's: scores"),
        ({"id": 7}, "'id' is 7, not a JSON string"),
        (as_json(GOOD, priority=True), "parameter 'priority' is True, not a whole number"),
        (as_json(GOOD, timeout=-1), "parameter 'timeout' is -1, below 0 microseconds"),
        (as_json(GOOD, timeout=0.5), "parameter 'timeout' is 0.5, not a whole number"),
        (with_entry(name=None), "'name' is missing"),
        (with_entry(index=1, name="dense"), "input 'dense' comes twice"),
        (with_entry(datatype="FP64"), "datatype 'FP64' is not one of FP32, INT32, INT64"),
        (with_entry(shape=[2, True]), r"shape is \[2, True\], not whole numbers"),
        (with_entry(shape=[2, -1]), r"shape \[2, -1\] is none of ours"),
        (with_entry(shape=[3, 1]), r"2 elements, 3 for shape \[3, 1\]"),
        (with_entry(data=["a", "b"]), "data are not all FP32"),
        (with_entry(index=1, data=[1, 0.5]), "data are not all INT32"),
        (with_entry(index=1, data=[1, 2**31]), "2147483648 is no INT32"),
        (with_entry(data=[[1], [2, 3]]), "no array of numbers"),
        (binary_size("8"), "binary_data_size is '8', not a number of bytes"),
        (binary_size(-8), "binary_data_size is -8, not a number of bytes"),
        (binary_size(8), r"0 bytes, 8 for FP32\[2, 1\]"),
        (with_entry(parameters={"binary_data_size": 8}), "has both data and bytes"),
    ],
)
def test_a_wrong_body(body: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        rest_body.decode(json.dumps(body).encode(), None, model="m", version="", timeout_s=None)


def test_bytes_that_belong_to_nothing() -> None:
    body = json.dumps(as_json(GOOD)).encode()
    with pytest.raises(InputError, match="3 bytes of the body belong to no input"):
        rest_body.decode(body + b"abc", len(body), model="m", version="", timeout_s=None)


@pytest.mark.parametrize(
    ("outputs", "parameters", "binary"),
    [
        ([], {}, False),
        ([], {"binary_data_output": True}, True),
        ([{"name": "scores", "parameters": {"binary_data": True}}], {}, True),
        (
            [{"name": "scores", "parameters": {"binary_data": False}}],
            {"binary_data_output": 1},
            False,
        ),
    ],
)
def test_the_answer_is_encoded_as_asked(
    outputs: list[Any], parameters: dict[str, Any], binary: bool
) -> None:
    body = json.dumps(as_json(GOOD, **parameters) | {"outputs": outputs}).encode()
    asked = rest_body.decode(body, None, model="m", version="", timeout_s=None)
    assert asked.binary is binary


def test_a_wrong_message() -> None:
    short, mixed = message(GOOD), message(GOOD)
    del short.raw_input_contents[0]
    with pytest.raises(InputError, match="2 raw contents for 3 inputs"):
        rpc_body.decode(short, timeout_s=None)
    del mixed.raw_input_contents[:]
    mixed.inputs[0].contents.fp64_contents.extend([1, 2])
    with pytest.raises(InputError, match="input 'dense': fp64_contents for FP32"):
        rpc_body.decode(mixed, timeout_s=None)
