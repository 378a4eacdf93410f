"""`sum`: terms added in order, wide (spec/operators/sum.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..dtypes import Bits, Dtype
from ..gemm import OntoBf16
from ..limits import SUM_TERMS
from ..scratch import borrowed
from ..strictjson import Fields
from .base import Facts, Operator, Rectangle, Scope, Source, Target, Value, Wide, misfit


@dataclass(frozen=True)
class Sum(Operator):
    terms: tuple[Operator, ...]
    op: ClassVar[str] = "sum"

    @classmethod
    def parse(cls, fields: Fields, node: Callable[[str, object], Operator], pointer: str) -> Sum:
        terms = fields.array("terms")
        if not 2 <= len(terms) <= SUM_TERMS:
            raise misfit("wrong number of terms", pointer, f"2 to {SUM_TERMS}", len(terms))
        return cls(tuple(node(f"terms/{index}", term) for index, term in enumerate(terms)))

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "terms": [term.to_json() for term in self.terms]}

    def operands(self) -> tuple[Operator, ...]:
        return self.terms

    def infer(self, scope: Scope, target: Target, pointer: str) -> Facts:
        facts = [term.infer(scope, target, f"{pointer}/terms/{index}") for index, term in enumerate(self.terms)]
        for index, term in enumerate(facts):
            if term.shape != facts[0].shape:
                raise misfit(
                    "terms of unequal shape", f"{pointer}/terms/{index}", list(facts[0].shape), list(term.shape)
                )
            if term.dtype is not None and not term.dtype.is_float:
                raise misfit(
                    "a term that is not a float", f"{pointer}/terms/{index}", "F64, F32, F16 or BF16", term.dtype.name
                )
        return Facts(None, facts[0].shape, exact=all(term.exact for term in facts))

    def bind(self, source: Source, scope: Scope, target: Target) -> Value:
        return _Sum([term.bind(source, scope, target) for term in self.terms])


class _Sum(Value):
    def __init__(self, terms: list[Value]) -> None:
        self.facts = Facts(None, terms[0].facts.shape, exact=all(term.facts.exact for term in terms))
        self.granularity = max(term.granularity for term in terms)
        self._terms = terms

    def accumulate(self, lo: int, hi: int, into: Wide, first: bool) -> None:
        if self.facts.exact and not first:  # a sum in a sum: its terms are added up before they are added
            super().accumulate(lo, hi, into, first)
            return
        pair = self.bf16_and_product(lo, hi) if first else None
        if pair is not None:
            with borrowed(np.uint16, hi - lo) as bits:
                pair[0].bits(lo, hi, bits)
                pair[1].add_into(bits, into)
            return
        for term in self._terms:
            term.accumulate(lo, hi, into, first)
            first = False

    def accumulate_rectangle(self, part: Rectangle, into: Wide, first: bool) -> None:
        if self.facts.exact and not first:
            super().accumulate_rectangle(part, into, first)
            return
        for term in self._terms:
            term.accumulate_rectangle(part, into, first)
            first = False

    def rounded(self, lo: int, hi: int, accumulator: np.dtype[Any], dtype: Dtype, out: Bits) -> None:
        pair = self.bf16_and_product(lo, hi) if dtype.name == "BF16" else None
        if pair is None:
            super().rounded(lo, hi, accumulator, dtype, out)
        else:
            pair[0].bits(lo, hi, out)
            pair[1].add(out)

    def bf16_and_product(self, lo: int, hi: int) -> tuple[Value, OntoBf16] | None:
        first, *others = self._terms
        is_bf16 = first.facts.dtype is not None and first.facts.dtype.name == "BF16"
        onto = others[0].onto_bf16(lo, hi) if is_bf16 and len(others) == 1 else None
        return None if onto is None else (first, onto)

    def reference(self, lo: int, hi: int, accumulator: np.dtype[Any]) -> Wide:
        total = self._terms[0].reference(lo, hi, accumulator)
        for term in self._terms[1:]:
            total = total + term.reference(lo, hi, accumulator)
        return total
