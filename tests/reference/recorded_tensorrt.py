"""The part of the Python API of TensorRT that plans need, as its bindings declare it, recording every call.

Signatures of 10.13 (without attention layers) and 11.4 (with them); neither builds or runs anything.
"""

from __future__ import annotations

import enum
from types import ModuleType, SimpleNamespace
from typing import Any

ENUMS: dict[str, list[str]] = {
    "DataType": ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64", "INT4"],
    "LayerType": ["CONVOLUTION", "CONSTANT", "ATTENTION_INPUT", "ATTENTION_OUTPUT"],
    "MemoryPoolType": ["WORKSPACE", "DLA_MANAGED_SRAM"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
    "TensorIOMode": ["NONE", "INPUT", "OUTPUT"],
}


class Recorded(ModuleType):
    """A stand-in for the package `tensorrt`. calls: (name, arguments) in order. tensors: the ports of the model.

    attentions: query shapes of the attention layers. fail: names of the functions that report failure.
    """

    def __init__(self, version: str, attentions: list[tuple[int, ...]] | None = None) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.fail: set[str] = set()
        self.tensors: list[tuple[str, bool, str]] = []
        self.profiles = 1
        for name, members in ENUMS.items():
            setattr(self, name, enum.IntEnum(name, members, start=0))
        if attentions is not None:
            self.IAttention = type("IAttention", (), {})
            self.IAttentionOutputLayer = type("IAttentionOutputLayer", (Layer,), {"attention": property(_attention)})
        self.layers = [Layer(self, shape) for shape in attentions or []]
        self.ILogger = Logger
        self.IStreamWriter = type("IStreamWriter", (), {})
        self.IProgressMonitor = type("IProgressMonitor", (), {})
        for cls in (Builder, OnnxParser, Runtime):
            setattr(self, cls.__name__, lambda *given, cls=cls: cls(self, *given))

    def said(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of every call of that name."""
        return [given for called, given in self.calls if called == name]

    def record(self, name: str, *given: Any) -> bool:
        """Note the call; whether it succeeds."""
        self.calls.append((name, given))
        return name not in self.fail


class Logger:
    """ILogger with its severities."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Layer:
    """ILayer of an attention's output, as `get_layer` gives it: its class is to be set."""

    def __init__(self, trt: Recorded, query: tuple[int, ...]) -> None:
        self.name, self.type = "attention", trt.LayerType.ATTENTION_OUTPUT
        tensor = SimpleNamespace(shape=query, dtype=trt.DataType.HALF)
        self.num_outputs, self.result = 1, tensor
        self.held = SimpleNamespace(decomposable=False, get_input=lambda index: tensor)

    def get_output(self, index: int) -> Any:
        return (self.result,)[index]


def _attention(layer: Layer) -> Any:
    return layer.held


class Builder:
    def __init__(self, trt: Recorded, logger: Logger) -> None:
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int = 0) -> Network:
        self.trt.record("create_network", flags)
        return Network(self.trt)

    def create_builder_config(self) -> Config:
        return Config(self.trt)

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile(self.trt)

    def build_serialized_network_to_stream(self, network: Network, config: Config, writer: Any) -> bool:
        monitor = config.progress_monitor
        if monitor is not None:
            monitor.phase_start("Building engine", None, 2)
            assert monitor.step_complete("Building engine", 0) is True
            monitor.phase_finish("Building engine")
        if not self.trt.record("build_serialized_network_to_stream"):
            self.logger.log(Logger.ERROR, "no implementation for node {conv}")
            return False
        assert writer.write(b"plan ") == 5
        assert writer.write(b"bytes") == 5
        return True


class Network:
    def __init__(self, trt: Recorded) -> None:
        self.trt = trt
        self.num_layers = len(trt.layers)
        self.ports = [name for name, is_input, _ in trt.tensors if is_input]
        self.num_inputs = len(self.ports)

    def get_input(self, index: int) -> Any:
        return SimpleNamespace(name=self.ports[index], is_shape_tensor=False)

    def get_layer(self, index: int) -> Layer:
        return self.trt.layers[index]


class OnnxParser:
    def __init__(self, trt: Recorded, network: Network, logger: Logger) -> None:
        self.trt, self.num_errors = trt, 1

    def parse_from_file(self, model: str) -> bool:
        return self.trt.record("parse_from_file", model)

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(
            node_operator=lambda: "Attention", node_name=lambda: "node_7", desc=lambda: "No importer registered"
        )


class Config:
    def __init__(self, trt: Recorded) -> None:
        object.__setattr__(self, "trt", trt)
        object.__setattr__(self, "progress_monitor", None)

    def __setattr__(self, name: str, value: Any) -> None:
        assert name == "progress_monitor", f"IBuilderConfig of tensorrt is not asked for {name}"
        object.__setattr__(self, name, value)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.trt.record("set_memory_pool_limit", pool, pool_size)

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        return len(self.trt.said("add_optimization_profile")) if self.trt.record("add_optimization_profile") else -1


class OptimizationProfile:
    def __init__(self, trt: Recorded) -> None:
        self.trt = trt

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        self.trt.record("set_shape", input, min, opt, max)


class Runtime:
    def __init__(self, trt: Recorded, logger: Logger) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None:
        if not self.trt.record("deserialize_cuda_engine", serialized_engine):
            self.logger.log(Logger.ERROR, "magicTag mismatch")
            return None
        return CudaEngine(self.trt)


class CudaEngine:
    def __init__(self, trt: Recorded) -> None:
        self.trt = trt
        self.num_io_tensors, self.num_optimization_profiles = len(trt.tensors), trt.profiles

    def get_tensor_name(self, index: int) -> str:
        return self.trt.tensors[index][0]

    def get_tensor_mode(self, name: str) -> Any:
        (is_input,) = (is_input for own, is_input, _ in self.trt.tensors if own == name)
        return self.trt.TensorIOMode.INPUT if is_input else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        (kind,) = (kind for own, _, kind in self.trt.tensors if own == name)
        return self.trt.DataType[kind]

    def create_execution_context(self) -> ExecutionContext:
        return ExecutionContext(self.trt)


class ExecutionContext:
    def __init__(self, trt: Recorded) -> None:
        self.trt = trt

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return self.trt.record("set_optimization_profile_async", profile_index, stream_handle)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.trt.record("set_input_shape", name, shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        return self.trt.record("set_tensor_address", name, memory)

    def execute_async_v3(self, stream_handle: int) -> bool:
        return self.trt.record("execute_async_v3", stream_handle)
