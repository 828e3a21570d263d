"""The parts of the GPU suite: each runs in a process of its own and writes records (see gpu_suite.py)."""
