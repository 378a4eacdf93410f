"""Names of one manifest resolved (step 5 of spec/reasons.md).

Operands exist and fit, references end, nothing is left over.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from .dtypes import DTYPES
from .errors import MalformedError
from .limits import DEFAULT_LIMITS, RECIPE_DEPTH, RECIPE_NODES, Limits
from .manifest import Manifest, Tensor
from .names import escaped
from .operators import Facts, Lowrank, Operator, Patch, Ref, Scaled, Stored, Sum, Target
from .strictjson import pointer_to


class _Extent(NamedTuple):
    """Of a recipe, counted through references to tensors of the archive: the longest way down, and all nodes."""

    depth: int
    nodes: int


def _too_large(tensor: str, what: str) -> MalformedError:
    return MalformedError(what, where=pointer_to("tensors", tensor), reason="cycle")


class ManifestScope:
    """What a recipe's names stand for."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def array(self, name: str) -> Facts | None:
        array = self._manifest.arrays.get(name)
        return None if array is None else Facts(array.dtype, array.shape, exact=True, chunk=array.encoding.chunk)

    def tensor(self, name: str) -> Facts | None:
        tensor = self._manifest.tensors.get(name)
        return None if tensor is None else Facts(tensor.dtype, tensor.shape, exact=tensor.exact)

    def base_tensor(self, base: str, name: str) -> Facts | None:
        found = self._manifest.bases.get(base)
        tensor = None if found is None else found.tensors.get(name)
        return None if tensor is None else Facts(tensor.dtype, tensor.shape, exact=True)

    def target(self, name: str) -> Target:
        """The tensor `name` as the target of its recipe, with its accumulation type."""
        tensor = self._manifest.tensors[name]
        factors = [factor for node in tensor.recipe.walk() if isinstance(node, Lowrank) for factor in node.operands()]
        double = (
            tensor.dtype.name == "F64"
            or self._has(tensor.recipe, "F64")
            or any(self._has(factor, "I32") for factor in factors)
        )
        return Target(name, tensor.dtype, tensor.shape, np.dtype("f8" if double else "f4"))

    def _has(self, recipe: Operator, dtype: str) -> bool:
        """Whether something that a recipe reads has this dtype."""
        return any(facts is not None and facts.dtype is DTYPES[dtype] for facts in map(self._leaf, recipe.walk()))

    @property
    def computes(self) -> bool:
        """Whether any tensor is computed, not only read and corrected."""
        recipes = (tensor.recipe for tensor in self._manifest.tensors.values())
        return any(isinstance(node, Sum | Lowrank | Scaled) for recipe in recipes for node in recipe.walk())

    def bases_needed(self, name: str) -> set[str]:
        """The bases that a tensor refers to, directly or through other tensors."""
        needed: set[str] = set()
        for node in self._manifest.tensors[name].recipe.walk():
            if isinstance(node, Ref):
                needed |= self.bases_needed(node.tensor) if node.base is None else {node.base}
        return needed

    def tensors_of(self, arrays: Collection[str]) -> set[str]:
        """The tensors that are made of any of these stored arrays, directly or through other tensors."""
        known: dict[str, bool] = {}

        def reaches(name: str) -> bool:
            if name not in known:
                known[name] = any(map(leads, self._manifest.tensors[name].recipe.walk()))
            return known[name]

        def leads(node: Operator) -> bool:
            if isinstance(node, Stored):
                return node.array in arrays
            return isinstance(node, Ref) and node.base is None and reaches(node.tensor)

        return set(filter(reaches, self._manifest.tensors))

    def _leaf(self, node: Operator) -> Facts | None:
        if isinstance(node, Stored):
            return self.array(node.array)
        if isinstance(node, Ref):
            return self.tensor(node.tensor) if node.base is None else self.base_tensor(node.base, node.tensor)
        return None

    def check(self, limits: Limits = DEFAULT_LIMITS) -> None:
        """Check every recipe and the coverage of stored arrays.

        Raises `MalformedError` (reasons `operand`, `cycle`, `coverage`, `limit`).
        """
        used: set[str] = set(self._manifest.checkpoint.arrays)
        extents: dict[str, _Extent] = {}
        chunks: dict[str, set[int]] = {}
        for name, tensor in self._manifest.tensors.items():
            if self._is_plain(tensor):
                used.add(tensor.recipe.array)  # type: ignore[attr-defined]
                continue
            for node in tensor.recipe.walk():
                if isinstance(node, Stored):
                    used.add(node.array)
                elif isinstance(node, Lowrank):
                    factor = self._leaf(node.a)
                    if factor is not None and factor.shape:
                        limits.check("rank", factor.shape[0], f"tensor '{escaped(name)}'")
            self._check_recipe(name)
            self._extent(name, extents, [], 0)
            if len(self._group_chunks(name, chunks)) > 1:
                where = pointer_to("tensors", name, "recipe")
                raise MalformedError("groups in chunks of several sizes", where=where, reason="operand")
        for array in self._manifest.arrays:
            if array not in used:
                raise MalformedError(
                    "a stored array that nothing uses", where=pointer_to("arrays", array), reason="coverage"
                )
        self._check_checkpoint()

    def _is_plain(self, tensor: Tensor) -> bool:
        """Whether a tensor is a stored array as it is: nearly all are, and nothing else is to be checked of them."""
        array = self._manifest.arrays.get(tensor.recipe.array) if isinstance(tensor.recipe, Stored) else None
        return array is not None and array.dtype is tensor.dtype and array.shape == tensor.shape

    def _check_recipe(self, name: str) -> None:
        tensor = self._manifest.tensors[name]
        pointer = pointer_to("tensors", name, "recipe")
        facts = tensor.recipe.infer(self, self.target(name), pointer)
        if facts.shape != tensor.shape:
            raise MalformedError(
                "the recipe has another shape",
                where=pointer,
                expected=list(tensor.shape),
                found=list(facts.shape),
                reason="operand",
            )
        if facts.dtype is None and not tensor.dtype.is_float:
            raise MalformedError(
                "a wide recipe for a dtype it cannot be rounded to",
                where=pointer,
                found=tensor.dtype.name,
                reason="operand",
            )
        if facts.dtype is not None and facts.dtype != tensor.dtype:
            raise MalformedError(
                "the recipe has another dtype",
                where=pointer,
                expected=tensor.dtype.name,
                found=facts.dtype.name,
                reason="operand",
            )
        if tensor.exact and not facts.exact:
            raise MalformedError("a digest on a recipe that is not exact", where=pointer, reason="coverage")

    def _extent(self, name: str, known: dict[str, _Extent], path: list[str], above: int) -> _Extent:
        """How far a tensor's recipe reaches, through references; `above` is the number of nodes on the way to it."""
        if name in path:
            cycle = " -> ".join(escaped(step) for step in [*path[path.index(name) :], name])
            raise MalformedError(f"references form a cycle: {cycle}", where="/tensors", reason="cycle")
        if above > RECIPE_DEPTH:
            raise _too_large(path[0], f"references deeper than {RECIPE_DEPTH}")
        if name not in known:
            path.append(name)
            known[name] = self._node_extent(self._manifest.tensors[name].recipe, known, path, above + 1)
            path.pop()
        if known[name].depth > RECIPE_DEPTH:
            raise _too_large(name, f"a recipe deeper than {RECIPE_DEPTH} nodes")
        if known[name].nodes > RECIPE_NODES:
            raise _too_large(name, f"a recipe of more than {RECIPE_NODES} nodes")
        return known[name]

    def _node_extent(self, node: Operator, known: dict[str, _Extent], path: list[str], level: int) -> _Extent:
        below = [self._node_extent(operand, known, path, level + 1) for operand in node.operands()]
        if isinstance(node, Ref) and node.base is None and node.tensor in self._manifest.tensors:
            below.append(self._extent(node.tensor, known, path, level))
        return _Extent(
            1 + max((extent.depth for extent in below), default=0), 1 + sum(extent.nodes for extent in below)
        )

    def _group_chunks(self, name: str, known: dict[str, set[int]]) -> set[int]:
        """The chunk sizes of all patches with groups that a tensor is made of, through references.

        A reader patches whole chunks: of unequal ones, a large one would be read for each small one, at every level.
        """
        if name not in known:
            known[name] = set()
            for node in self._manifest.tensors[name].recipe.walk():
                if isinstance(node, Patch) and node.groups is not None and isinstance(node.residual, Stored):
                    known[name].add(self._manifest.arrays[node.residual.array].encoding.chunk)
                elif isinstance(node, Ref) and node.base is None:
                    known[name] |= self._group_chunks(node.tensor, known)
        return known[name]

    def _check_checkpoint(self) -> None:
        for name in self._manifest.checkpoint.arrays:
            array = self._manifest.arrays.get(name)
            if array is None:
                raise MalformedError(
                    f"there is no stored array '{escaped(name)}'", where="/checkpoint", reason="operand"
                )
            if array.dtype.name != "U8" or len(array.shape) != 1:
                where = pointer_to("arrays", name)
                raise MalformedError("a header that is not a list of bytes", where=where, reason="operand")
