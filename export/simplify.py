"""Rewrites of a recorded program that undo what serves the engine's loop only: tensors side by side, taken apart again.

`Trunk.prepare` puts the time projections of all blocks, and the keys and values of all layers, side by side, because it
runs once per request. In a graph of one update the concatenations would only move memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

aten = torch.ops.aten
_END = 1 << 62


def simplify(program: ExportedProgram) -> None:
    """Apply all rewrites in place; what the program computes stays the same up to rounding."""
    graph = program.graph_module.graph
    for rewrite in (_split_add, _split_select, _drop_slice, _drop_chunk):
        for node in list(graph.nodes):
            rewrite(graph, node)
        graph.eliminate_dead_code()
    program.graph_module.recompile()


def _split_add(graph: Graph, node: Node) -> None:
    """cat(a, b) + cat(c, d), of the same widths along the last dimension -> cat(a + c, b + d)."""
    if node.target is not aten.add.Tensor or len(node.args) != 2:
        return
    left, right = _parts(node.args[0], -1), _parts(node.args[1], -1)
    if left is None or right is None or _widths(left, -1) != _widths(right, -1):
        return
    with graph.inserting_before(node):
        made = [_call(graph, aten.add.Tensor, a, b) for a, b in zip(left, right, strict=True)]
        node.replace_all_uses_with(_call(graph, aten.cat.default, made, -1))


def _split_select(graph: Graph, node: Node) -> None:
    """cat(parts, -1)[:, i] -> cat of part[:, i], for a dimension before the last."""
    if node.target is not aten.select.int:
        return
    arguments: Any = node.args
    source, dim, index = arguments
    parts = _parts(source, -1)
    if parts is None or dim % source.meta["val"].dim() == source.meta["val"].dim() - 1:
        return
    with graph.inserting_before(node):
        made = [_call(graph, aten.select.int, part, dim, index) for part in parts]
        node.replace_all_uses_with(_call(graph, aten.cat.default, made, -1))


def _drop_slice(graph: Graph, node: Node) -> None:
    """cat(parts)[start:stop] -> the part, or the concatenation of the parts, that lies there."""
    if node.target is not aten.slice.Tensor:
        return
    arguments: Any = node.args
    source, dim, start, stop, *step = (*arguments, *(0, 0, _END)[len(arguments) - 1 :])
    parts = _parts(source, dim)
    if parts is None or not isinstance(start, int) or not isinstance(stop, int) or step not in ([], [1]):
        return
    edges = [0, *accumulate(_widths(parts, dim))]
    stop = min(stop, edges[-1])
    if start in edges and stop in edges and start < stop:
        _replace(graph, node, parts[edges.index(start) : edges.index(stop)], dim)


def _drop_chunk(graph: Graph, node: Node) -> None:
    """The i-th of n chunks of cat(n parts of one width) -> the i-th part."""
    source: Any = node.args[0] if node.args else None
    if getattr(node.target, "__name__", "") != "getitem" or getattr(source, "target", None) is not aten.chunk.default:
        return
    tensor, count, dim = (*source.args, 0)[:3]
    parts = _parts(tensor, dim)
    if parts is not None and len(parts) == count and len(set(_widths(parts, dim))) == 1:
        _replace(graph, node, [parts[node.args[1]]], dim)  # type: ignore[index]


def _parts(value: Any, dim: int) -> list[Node] | None:
    """The tensors `value` is the concatenation of, along `dim`."""
    if not isinstance(value, Node) or value.target is not aten.cat.default:
        return None
    tensors, along = (*value.args, 0)[:2]
    rank = value.meta["val"].dim()
    if along % rank != dim % rank or not all(isinstance(size, int) for size in _widths(tensors, dim)):  # type: ignore[operator,arg-type]
        return None
    return list(tensors)  # type: ignore[arg-type]


def _widths(nodes: Sequence[Node], dim: int) -> list[int]:
    return [node.meta["val"].shape[dim] for node in nodes]


def _replace(graph: Graph, node: Node, parts: list[Node], dim: int) -> None:
    with graph.inserting_before(node):
        node.replace_all_uses_with(parts[0] if len(parts) == 1 else _call(graph, aten.cat.default, parts, dim))


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """A new node with the meta data of its result."""
    node = graph.call_function(target, args)

    def value(item: Any) -> Any:
        if isinstance(item, Node):
            return item.meta["val"]
        return [value(entry) for entry in item] if isinstance(item, list) else item

    node.meta["val"] = target(*map(value, args))
    return node
