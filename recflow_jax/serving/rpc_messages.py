"""The protocol's gRPC messages, in a descriptor pool of their own.

tritonclient registers messages of the same names in the default pool, where two definitions cannot
live in one process. On the wire only field numbers and types count; those are the protocol's.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

# name: number, type; "*" is repeated, "map" is from string, "|" a member of the message's choice.
_MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live:1 bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:1 bool",
    "ModelReadyRequest": "name:1 string, version:2 string",
    "ModelReadyResponse": "ready:1 bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name:1 string, version:2 string, extensions:3 *string",
    "ModelMetadataRequest": "name:1 string, version:2 string",
    "TensorMetadata": "name:1 string, datatype:2 string, shape:3 *int64",
    "ModelMetadataResponse": "name:1 string, versions:2 *string, platform:3 string, "
    "inputs:4 *TensorMetadata, outputs:5 *TensorMetadata, properties:6 map string",
    "InferParameter": "bool_param:1 |bool, int64_param:2 |int64, string_param:3 |string, "
    "double_param:4 |double, uint64_param:5 |uint64",
    "InferTensorContents": "bool_contents:1 *bool, int_contents:2 *int32, int64_contents:3 *int64, "
    "uint_contents:4 *uint32, uint64_contents:5 *uint64, fp32_contents:6 *float, "
    "fp64_contents:7 *double, bytes_contents:8 *bytes",
    "InferInputTensor": "name:1 string, datatype:2 string, shape:3 *int64, "
    "parameters:4 map InferParameter, contents:5 InferTensorContents",
    "InferRequestedOutputTensor": "name:1 string, parameters:2 map InferParameter",
    "ModelInferRequest": "model_name:1 string, model_version:2 string, id:3 string, "
    "parameters:4 map InferParameter, inputs:5 *InferInputTensor, "
    "outputs:6 *InferRequestedOutputTensor, raw_input_contents:7 *bytes",
    "InferOutputTensor": "name:1 string, datatype:2 string, shape:3 *int64, "
    "parameters:4 map InferParameter, contents:5 InferTensorContents",
    "ModelInferResponse": "model_name:1 string, model_version:2 string, id:3 string, "
    "parameters:4 map InferParameter, outputs:5 *InferOutputTensor, raw_output_contents:6 *bytes",
    "ModelConfigRequest": "name:1 string, version:2 string",
    "ModelInput": "name:1 string, data_type:2 DataType, dims:4 *int64, optional:8 bool",
    "ModelOutput": "name:1 string, data_type:2 DataType, dims:3 *int64",
    "ModelParameter": "string_value:1 string",
    "ModelConfig": "name:1 string, platform:2 string, backend:17 string, max_batch_size:4 int32, "
    "input:5 *ModelInput, output:6 *ModelOutput, parameters:14 map ModelParameter",
    "ModelConfigResponse": "config:1 ModelConfig",
    "ModelStatisticsRequest": "name:1 string, version:2 string",
    "StatisticDuration": "count:1 uint64, ns:2 uint64",
    "InferStatistics": "success:1 StatisticDuration, fail:2 StatisticDuration",
    "InferBatchStatistics": "batch_size:1 uint64",
    "ModelStatistics": "name:1 string, version:2 string, last_inference:3 uint64, "
    "inference_count:4 uint64, execution_count:5 uint64, inference_stats:6 InferStatistics, "
    "batch_stats:7 *InferBatchStatistics",
    "ModelStatisticsResponse": "model_stats:1 *ModelStatistics",
    "RepositoryIndexRequest": "repository_name:1 string, ready:2 bool",
    "ModelIndex": "name:1 string, version:2 string, state:3 string, reason:4 string",
    "RepositoryIndexResponse": "models:1 *ModelIndex",
    "ModelRepositoryParameter": "bool_param:1 |bool, int64_param:2 |int64, "
    "string_param:3 |string, bytes_param:4 |bytes",
    "RepositoryModelLoadRequest": "repository_name:1 string, model_name:2 string, "
    "parameters:3 map ModelRepositoryParameter",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": "repository_name:1 string, model_name:2 string, "
    "parameters:3 map ModelRepositoryParameter",
    "RepositoryModelUnloadResponse": "",
}
_DATA_TYPES = {"TYPE_INVALID": 0, "TYPE_INT32": 8, "TYPE_INT64": 9, "TYPE_FP32": 11}

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="recflow/inference.proto", package=PACKAGE, syntax="proto3"
    )
    data_type = file.enum_type.add(name="DataType")
    for name, number in _DATA_TYPES.items():
        data_type.value.add(name=name, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in filter(None, fields.split(", ")):
            _add_field(message, *field.split(" ", 1))
    return file


def _add_field(message: descriptor_pb2.DescriptorProto, label: str, kind: str) -> None:
    name, number = label.split(":")
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind.startswith("|"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="choice")
        field.oneof_index = 0
    if kind.startswith(("*", "map ")):
        field.label = _Field.LABEL_REPEATED
    if kind.startswith("map "):
        kind = _add_entry(message, name, kind.removeprefix("map "))
    _set_type(field, kind.lstrip("*|"))


def _add_entry(message: descriptor_pb2.DescriptorProto, name: str, value: str) -> str:
    """The message that a map is a list of on the wire."""
    entry_name = "".join(word.title() for word in name.split("_")) + "Entry"
    entry = message.nested_type.add(name=entry_name)
    entry.options.map_entry = True
    _add_field(entry, "key:1", "string")
    _add_field(entry, "value:2", value)
    return f"{message.name}.{entry_name}"


def _set_type(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    if kind in _SCALARS:
        field.type = getattr(_Field, f"TYPE_{kind.upper()}")
        return
    field.type = _Field.TYPE_ENUM if kind == "DataType" else _Field.TYPE_MESSAGE
    field.type_name = f".{PACKAGE}.{kind}"


def _classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(_file().SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in _MESSAGES
    }


MESSAGES: dict[str, Any] = _classes()
"""Message classes by name."""
