"""Runtimes: exported graphs behind the interface of our own networks."""
