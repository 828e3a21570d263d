"""Measuring: one harness, one resumable suite for GPU machines, and the `stepfuse bench` commands."""
