"""Recipes (spec/operators/): operands fit, references end, no recipe is too large, arrays are used: step 5."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from conformance.manifest import DEPTH, FLOATS, NODES, RANK, WIDTH, Node, Rejected, children, need, nodes


class Kind(NamedTuple):
    """What is known of a node without its value; ``dtype`` is None for a wide one."""

    dtype: str | None
    shape: tuple[int, ...]
    exact: bool


def check_recipes(m: dict[str, Any]) -> list[str]:
    """Step 5: operands, cycles, coverage. Returns the tensors in an order in which they can be rebuilt."""
    tensors, arrays, bases = m["tensors"], m["arrays"], m["bases"]
    waits: dict[str, set[str]] = {}
    used = {file["header"] for file in m["checkpoint"]["files"]}
    used |= {m["checkpoint"]["index"]["array"]} if "index" in m["checkpoint"] else set()
    for name in used:
        text = arrays.get(name, {"dtype": None, "shape": []})
        need(text["dtype"] == "U8" and len(text["shape"]) == 1, "operand", f"{name!r} is no one-dimensional U8 array")
    for name, tensor in tensors.items():
        waits[name] = set()
        for node, _ in nodes(tensor["recipe"]):
            if node["op"] == "stored":
                need(node["array"] in arrays, "operand", f"tensor {name!r}: no array {node['array']!r}")
                used.add(node["array"])
            elif node["op"] == "ref" and "base" in node:
                listed = node["base"] in bases and node["tensor"] in bases[node["base"]]["tensors"]
                need(listed, "operand", f"tensor {name!r}: no {node['tensor']!r} in base {node['base']!r}")
            elif node["op"] == "ref":
                need(node["tensor"] in tensors, "operand", f"tensor {name!r}: no tensor {node['tensor']!r}")
                waits[name].add(node["tensor"])

    followers: dict[str, list[str]] = {name: [] for name in tensors}  # Kahn's algorithm: no recursion, linear
    for name, others in waits.items():
        for other in others:
            followers[other].append(name)
    order = [name for name in tensors if not waits[name]]
    for name in order:
        for follower in followers[name]:
            waits[follower].discard(name)
            if not waits[follower]:
                order.append(follower)
    need(len(order) == len(tensors), "cycle", f"references in a circle: {sorted(set(tensors) - set(order))[:3]}")

    depths, sizes = {"": 0}, {"": 0}  # the empty name: no reference
    for name in order:
        depths[name] = max(depth + depths[local_reference(node)] for node, depth in nodes(tensors[name]["recipe"]))
        need(depths[name] <= DEPTH, "cycle", f"tensor {name!r}: recipe more than {DEPTH} nodes deep")
        sizes[name] = sum(1 + sizes[local_reference(node)] for node, _ in nodes(tensors[name]["recipe"]))
        need(sizes[name] <= NODES, "cycle", f"tensor {name!r}: recipe of more than {NODES} nodes")
        root = kind_of(m, name, tensors[name]["recipe"])
        dtype, shape = tensors[name]["dtype"], tuple(tensors[name]["shape"])
        need(root.shape == shape, "operand", f"tensor {name!r}: shape {shape}, recipe gives {root.shape}")
        fits = root.dtype == dtype if root.dtype else dtype in FLOATS
        need(fits, "operand", f"tensor {name!r}: dtype {dtype}, recipe gives {root.dtype or 'floats'}")
        need(root.exact or "digest" not in tensors[name], "coverage", f"tensor {name!r}: a digest on a bounded recipe")
    for name in arrays.keys() - used:
        raise Rejected("coverage", f"array {name!r} is not used")
    return order


def local_reference(node: Node) -> str:
    """The tensor of this archive that a node refers to, or the empty name, which no tensor may have."""
    return str(node["tensor"]) if node["op"] == "ref" and "base" not in node else ""


def kind_of(m: dict[str, Any], owner: str, node: Node) -> Kind:
    """The dtype, shape and grade of a node (operators/), or `Rejected` with ``operand``."""
    here, op = f"tensor {owner!r}, {node['op']}", node["op"]
    target_dtype, target_shape = m["tensors"][owner]["dtype"], tuple(m["tensors"][owner]["shape"])
    if op == "stored":
        return Kind(m["arrays"][node["array"]]["dtype"], tuple(m["arrays"][node["array"]]["shape"]), True)
    if op == "ref":
        listed = m["bases"][node["base"]]["tensors"] if "base" in node else m["tensors"]
        found = listed[node["tensor"]]
        return Kind(found["dtype"], tuple(found["shape"]), "digest" in found)  # manifest.md: then it is exact
    parts = [kind_of(m, owner, child) for child in children(node)]
    if op == "sum":
        need(2 <= len(parts) <= 64, "operand", f"{here}: {len(parts)} terms")
        need(
            all(part.dtype is None or part.dtype in FLOATS for part in parts), "operand", f"{here}: a term is no float"
        )
        need(len({part.shape for part in parts}) == 1, "operand", f"{here}: terms of several shapes")
        return Kind(None, parts[0].shape, False)
    if op == "patch":
        prediction, residual = parts
        typed = prediction.dtype == target_dtype or (prediction.dtype == "F32" and target_dtype in ("BF16", "F16"))
        need(typed and prediction.exact, "operand", f"{here}: prediction of dtype {prediction.dtype}")
        need(residual.dtype == f"U{8 * WIDTH[target_dtype]}", "operand", f"{here}: residual of dtype {residual.dtype}")
        need(residual.exact, "operand", f"{here}: residual that is not exact")
        need(prediction.shape == residual.shape, "operand", f"{here}: prediction and residual of other shapes")
        return Kind(target_dtype, residual.shape, residual.exact)
    a, b = parts
    need(a.dtype in FLOATS and b.dtype in FLOATS, "operand", f"{here}: factors of dtype {a.dtype}, {b.dtype}")
    need(len(a.shape) == len(b.shape) == 2 and len(target_shape) >= 2, "operand", f"{here}: not matrices")
    (rank, columns), rows = a.shape, target_shape[0]
    need(rank <= RANK, "limit", f"{here}: rank {rank}")
    fits = columns == math.prod(target_shape[1:]) and b.shape == (rank, rows) and 1 <= rank <= min(rows, columns)
    need(fits, "operand", f"{here}: factors {a.shape}, {b.shape} for {target_shape}")
    return Kind(None, target_shape, False)
