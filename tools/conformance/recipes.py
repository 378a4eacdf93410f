"""Recipes (spec/operators/): operands fit, references end, no recipe is too large, arrays are used: step 5."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from conformance.manifest import DEPTH, FLOATS, NODES, RANK, WIDTH, Node, Rejected, children, need, nodes

FACTORS = ("I8", "I16", "I32")  # dtypes of integer factors
WIDE_OR_FLOAT = (None, *FLOATS)  # dtypes of what can be converted to the accumulation type


class Kind(NamedTuple):
    """What is known of a node without its value; ``dtype`` is None for a wide one."""

    dtype: str | None
    shape: tuple[int, ...]
    exact: bool

    def __str__(self) -> str:
        return f"{'' if self.exact else 'bounded '}{self.dtype or 'wide'} {list(self.shape)}"


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
    chunks: dict[str, set[int]] = {"": set()}
    for name in order:
        depths[name] = max(depth + depths[local_reference(node)] for node, depth in nodes(tensors[name]["recipe"]))
        need(depths[name] <= DEPTH, "cycle", f"tensor {name!r}: recipe more than {DEPTH} nodes deep")
        sizes[name] = sum(1 + sizes[local_reference(node)] for node, _ in nodes(tensors[name]["recipe"]))
        need(sizes[name] <= NODES, "cycle", f"tensor {name!r}: recipe of more than {NODES} nodes")
        root = kind_of(m, name, tensors[name]["recipe"])
        chunks[name] = set().union(*(chunks[local_reference(node)] for node, _ in nodes(tensors[name]["recipe"])))
        chunks[name] |= {
            arrays[node["residual"]["array"]]["encoding"]["chunk"]
            for node, _ in nodes(tensors[name]["recipe"])
            if "groups" in node
        }
        need(len(chunks[name]) <= 1, "operand", f"tensor {name!r}: groups in chunks of {sorted(chunks[name])}")
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
        return Kind(leaf_dtype(m, node), tuple(m["arrays"][node["array"]]["shape"]), True)
    if op == "ref":
        listed = m["bases"][node["base"]]["tensors"] if "base" in node else m["tensors"]
        found = listed[node["tensor"]]
        return Kind(found["dtype"], tuple(found["shape"]), "digest" in found)  # manifest.md: then it is exact
    parts = [kind_of(m, owner, child) for child in children(node)]
    exact = all(part.exact for part in parts)
    if op == "sum":
        need(2 <= len(parts) <= 64, "operand", f"{here}: {len(parts)} terms")
        need(all(part.dtype in WIDE_OR_FLOAT for part in parts), "operand", f"{here}: a term is no float")
        need(len({part.shape for part in parts}) == 1, "operand", f"{here}: terms of several shapes")
        return Kind(None, parts[0].shape, exact)
    if op == "scaled":
        x, scale = parts
        need(x.dtype in WIDE_OR_FLOAT and x.shape == target_shape, "operand", f"{here}: {x} for {target_shape}")
        fits = scale.dtype in FLOATS and scale.shape in ((), target_shape[:1])
        need(fits, "operand", f"{here}: a scale of {scale} for {target_shape}")
        return Kind(None, target_shape, exact)
    if op == "rows":
        (x,) = parts
        fits = len(x.shape) >= 1 and len(target_shape) >= 1 and x.shape[1:] == target_shape[1:]
        need(x.dtype is not None and fits, "operand", f"{here}: {x} for {target_shape}")
        return Kind(x.dtype, target_shape, exact)
    if op == "panels":
        (x,) = parts
        fits = x.dtype is not None and len(target_shape) >= 2 and x.shape == target_shape
        need(fits, "operand", f"{here}: {x} for {target_shape}")
        need(node["columns"] * 4096 >= math.prod(target_shape[1:]), "operand", f"{here}: {node['columns']} columns")
        return Kind(x.dtype, target_shape, exact)
    if op == "decayed":
        x, table = parts
        need(x.dtype in ("F32", "F16", "BF16") and x.exact, "operand", f"{here}: {x}")
        fits = table.dtype == "U32" and len(table.shape) == 2 and table.shape[0] == 2 and table.exact
        most = min(2 ** FLOATS[x.dtype or ""][1], 65_536, max(math.prod(x.shape), 1))
        fits = fits and 1 <= table.shape[1] <= most
        need(fits, "operand", f"{here}: a table of {table} for {x}")
        return Kind(x.dtype, x.shape, True)
    if op == "patch":
        prediction, residual = parts
        typed = prediction.dtype == target_dtype or (prediction.dtype in WIDE_OR_FLOAT and target_dtype in FLOATS)
        need(typed and prediction.exact, "operand", f"{here}: a prediction of {prediction}")
        fits = residual.dtype == f"U{8 * WIDTH[target_dtype]}" and residual.shape == prediction.shape
        need(fits and residual.exact, "operand", f"{here}: a residual of {residual} for {prediction}")
        if "groups" in node:
            stored = node["residual"]["op"] == "stored"
            need(stored and target_dtype in FLOATS, "operand", f"{here}: groups of {node['residual']['op']}")
        if node.get("groups", {}).get("by") == "margin":
            longer = FLOATS[accumulation(m, owner)][1] > FLOATS[target_dtype][1]
            need(prediction.dtype is None and longer, "operand", f"{here}: {prediction} has no margin")
        return Kind(target_dtype, residual.shape, True)
    a, b = parts
    integers = exact and {a.dtype, b.dtype} <= set(FACTORS)
    floats = a.dtype in FLOATS and b.dtype in FLOATS
    need(integers or floats, "operand", f"{here}: factors {a}, {b}")
    need(len(a.shape) == len(b.shape) == 2 and len(target_shape) >= 2, "operand", f"{here}: not matrices")
    (rank, columns), rows = a.shape, target_shape[0]
    need(rank <= RANK, "limit", f"{here}: rank {rank}")
    fits = columns == math.prod(target_shape[1:]) and b.shape == (rank, rows) and 1 <= rank <= min(rows, columns)
    need(fits, "operand", f"{here}: factors {a.shape}, {b.shape} for {target_shape}")
    scale = node.get("scale", 1)
    power = scale > 0 and math.frexp(scale)[0] == 0.5 and 2.0**-100 <= scale <= 2.0**100
    need(floats or power, "operand", f"{here}: {scale} is no power of two from 2^-100 to 2^100")
    return Kind(None, target_shape, integers)


def accumulation(m: dict[str, Any], owner: str) -> str:
    """The accumulation type of a tensor's recipe (arithmetic.md), ``F32`` or ``F64``."""
    recipe = m["tensors"][owner]["recipe"]
    dtypes = {m["tensors"][owner]["dtype"], *(leaf_dtype(m, node) for node, _ in nodes(recipe))}
    factors = [child for node, _ in nodes(recipe) if node["op"] == "lowrank" for child in children(node)]
    wide = "F64" in dtypes or "I32" in {leaf_dtype(m, leaf) for factor in factors for leaf, _ in nodes(factor)}
    return "F64" if wide else "F32"


def leaf_dtype(m: dict[str, Any], node: Node) -> str | None:
    """The dtype of a `stored` or `ref` node; None for one that is computed."""
    if node["op"] == "stored":
        return str(m["arrays"][node["array"]]["dtype"])
    if node["op"] == "ref":
        return str((m["bases"][node["base"]]["tensors"] if "base" in node else m["tensors"])[node["tensor"]]["dtype"])
    return None
