"""Checkpoints: find their files, tell what they are, map their keys, stream them into a module of the caller's."""
