"""Our messages are the protocol's: the same numbers, types and labels as in tritonclient's."""

from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from recflow_jax.serving.rpc_messages import MESSAGES

BEYOND_TRITON = {("ModelMetadataResponse", "properties")}  # of the protocol, but not of Triton
FILES = (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR)
OUTER = [message for file in FILES for message in file.message_types_by_name.values()]
TRITONS = {m.name: m for outer in OUTER for m in (*outer.nested_types, outer)}


def on_the_wire(field: Any) -> tuple[Any, ...]:
    """What of a field counts there."""
    kind = field.message_type
    entry = kind.fields if kind is not None and kind.GetOptions().map_entry else ()
    return field.number, field.type, field.is_repeated, *(on_the_wire(part) for part in entry)


@pytest.mark.parametrize("name", MESSAGES)
def test_fields_are_the_protocols(name: str) -> None:
    theirs = TRITONS[name].fields_by_name
    for field in MESSAGES[name].DESCRIPTOR.fields:
        if (name, field.name) not in BEYOND_TRITON:
            assert on_the_wire(field) == on_the_wire(theirs[field.name]), field.name


def test_data_types_are_the_protocols() -> None:
    theirs = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"].values_by_name
    ours = MESSAGES["ModelInput"].DESCRIPTOR.fields_by_name["data_type"].enum_type
    assert all(value.number == theirs[value.name].number for value in ours.values)
