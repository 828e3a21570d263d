"""ONNX Runtime: a graph of an artefact, run on torch's tensors.

Inputs and outputs are bound where torch has them; nothing is copied but what must change its dtype or layout. Verified
on CPU; on CUDA the same code binds device pointers, which has not been run.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifact import Graph, Manifest, inside
from ..errors import CheckpointError, DeviceError, RequestError

INSTALL = "pip install 'stepfuse[onnx]'"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
COMPUTE = frozenset(("Attention", "Conv", "FusedConv", "FusedMatMul", "Gelu", "Gemm", "GroupNormalization",
                     "InstanceNormalization", "LayerNormalization", "MatMul", "MultiHeadAttention", "Resize",
                     "Softmax"))  # fmt: skip
"""Operators that take the time of a network, before and after onnxruntime fuses them."""
_RECORD = "session.record_ep_graph_assignment_info"
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: numpy has no such type


class Session:
    """One graph of an artefact, ready to run on a device.

    The hashes of the graph's files are compared first. Raises CheckpointError for a damaged artefact, RequestError
    where onnxruntime is missing or has not the dtype, DeviceError where it cannot use the device: left alone, it would
    run the graph, or the operators its device has no kernel for, on the CPU without a word.
    """

    only_profiles = False

    def __init__(self, folder: Path, name: str, device: torch.device | str = "cpu") -> None:
        if find_spec("onnxruntime") is None:
            raise RequestError(f"runtime='onnxruntime' needs onnxruntime, which is not installed: {INSTALL}")
        import onnxruntime as ort

        manifest = Manifest.load(folder)
        if manifest.kind != "onnx":
            raise CheckpointError(
                f"{folder} holds {manifest.kind} graphs; runtime='onnxruntime' needs an ONNX artefact"
            )
        self.graph: Graph = manifest.graph(name)
        manifest.check(folder, only=[name])
        self.device = torch.device(device)
        cuda = self.device.type == "cuda"
        wanted = PROVIDERS[self.device.type]
        if wanted not in ort.get_available_providers():
            raise DeviceError(
                f"onnxruntime has no {wanted}: for CUDA, pip install onnxruntime-gpu; or use device='cpu'"
            )
        if self.graph.dtype == "bfloat16" and not cuda:
            raise RequestError(f"onnxruntime has no bfloat16 on the CPU: export {name} with --dtype float32")
        options, self.options = ort.SessionOptions(), ort.RunOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry(_RECORD, "1")
        # a stream of its own: onnxruntime takes torch's default stream, which is 0, for none given
        self.stream = torch.cuda.Stream(self.device) if cuda else None
        settings: dict[str, Any] = {}
        if self.stream is not None:
            settings = {"device_id": self.device.index or 0, "user_compute_stream": str(self.stream.cuda_stream)}
            self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        path = inside(folder, self.graph.file)
        self.session = ort.InferenceSession(str(path), options, providers=[(wanted, settings)])
        if self.session.get_providers()[0] != wanted:
            raise DeviceError(f"onnxruntime could not load {wanted} and would run on the CPU: check its CUDA libraries")
        require_provider(self.session, wanted)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph; on CUDA nothing waits for it. Raises RequestError for shapes it was not exported for."""
        axes = self.graph.measure({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        binding = self.session.io_binding()
        held = {
            port.name: inputs[port.name].to(self.device, getattr(torch, port.dtype)).contiguous()
            for port in self.graph.inputs
        }
        made = {
            port.name: torch.empty(port.sizes(axes), dtype=getattr(torch, port.dtype), device=self.device)
            for port in self.graph.outputs
        }
        for name, tensor in held.items():
            self._bind(binding.bind_input, name, tensor)
        for name, tensor in made.items():
            self._bind(binding.bind_output, name, tensor)
        if self.stream is None:
            self.session.run_with_iobinding(binding, self.options)
            return made
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        self.session.run_with_iobinding(binding, self.options)
        current.wait_stream(self.stream)
        for tensor in (*held.values(), *made.values()):  # their memory may be taken again before the graph has run
            tensor.record_stream(self.stream)
        return made

    def _bind(self, bind: Any, name: str, tensor: Tensor) -> None:
        kind = _BFLOAT16 if tensor.dtype == torch.bfloat16 else np.dtype(str(tensor.dtype).removeprefix("torch."))
        bind(name, self.device.type, self.device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr())


def require_provider(session: Any, wanted: str) -> None:
    """Raise DeviceError where another execution provider than `wanted` has operators that compute images.

    Arithmetic on shapes belongs on the CPU, and stays there.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # onnxruntime before 1.24
        return
    strays = {
        f"{node.op_type} on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
        if part.ep_name != wanted and node.op_type in COMPUTE
    }
    if strays:
        raise DeviceError(
            f"{wanted} has no kernel for all operators: {', '.join(sorted(strays))}; export with --opset 18, or in "
            "another --dtype"
        )
