"""Exporters: the engine's own graphs as ONNX models, each with a manifest and a parity report."""
