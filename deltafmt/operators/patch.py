"""`patch`: a prediction, corrected bit for bit by the difference of ordered bit patterns (spec/operators/patch.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..dtypes import Bits, Dtype, round_to
from ..scratch import scratch
from ..strictjson import Fields
from .base import Facts, Operator, Scope, Source, Target, Value, misfit
from .stored import Stored


@dataclass(frozen=True)
class Patch(Operator):
    prediction: Operator
    residual: Operator
    op: ClassVar[str] = "patch"

    @classmethod
    def parse(cls, fields: Fields, node: Callable[[str, object], Operator], pointer: str) -> Patch:
        prediction = node("prediction", fields.object("prediction"))
        return cls(prediction, node("residual", fields.object("residual")))

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "prediction": self.prediction.to_json(), "residual": self.residual.to_json()}

    def operands(self) -> tuple[Operator, ...]:
        return (self.prediction, self.residual)

    def infer(self, scope: Scope, target: Target, pointer: str) -> Facts:
        prediction = self.prediction.infer(scope, target, f"{pointer}/prediction")
        residual = self.residual.infer(scope, target, f"{pointer}/residual")
        wanted = f"U{8 * target.dtype.width}"
        if residual.dtype is None or residual.dtype.name != wanted:
            found = "a wide node" if residual.dtype is None else residual.dtype.name
            raise misfit("a residual of the wrong dtype", f"{pointer}/residual", wanted, found)
        if prediction.dtype is None or not predicts(prediction.dtype, target.dtype):
            found = "a wide node" if prediction.dtype is None else prediction.dtype.name
            raise misfit("a prediction of the wrong dtype", f"{pointer}/prediction", target.dtype.name, found)
        if prediction.shape != residual.shape:
            raise misfit(
                "prediction and residual differ in shape", pointer, list(prediction.shape), list(residual.shape)
            )
        if not (prediction.exact and residual.exact):
            raise misfit("a patch of something that is not exact", pointer)
        return Facts(target.dtype, prediction.shape, exact=True)

    def bind(self, source: Source, scope: Scope, target: Target) -> Value:
        facts = self.infer(scope, target, target.name)
        nested = not isinstance(self.residual, Stored)
        prediction, residual = (operand.bind(source, scope, target) for operand in self.operands())
        return _Patch(facts, prediction, residual, target.dtype, nested)


class _Patch(Value):
    def __init__(self, facts: Facts, prediction: Value, residual: Value, dtype: Dtype, nested: bool) -> None:
        self.facts = facts
        self._prediction, self._residual, self._dtype, self._nested = prediction, residual, dtype, nested

    def bits(self, lo: int, hi: int, out: Bits) -> None:
        source = self._prediction.facts.dtype
        assert source is not None
        # A residual that may itself be patched uses this thread's buffers.
        count, bits = hi - lo, source.bits
        predicted = np.empty(count, bits) if self._nested else scratch("patch prediction", bits, count)
        self._prediction.bits(lo, hi, predicted)
        residual = scratch("patch residual", self._dtype.bits, hi - lo)
        self._residual.bits(lo, hi, residual)
        correct(cast(predicted, source, self._dtype), residual, self._dtype, out)


def predicts(source: Dtype, target: Dtype) -> bool:
    """Whether a tensor of dtype `source` can predict one of dtype `target`."""
    return source == target or (source.name == "F32" and target.name in ("BF16", "F16"))


def cast(bits: Bits, source: Dtype, target: Dtype) -> Bits:
    """A prediction's bits in the target's dtype; rounded once where the dtypes differ."""
    if source == target:
        return bits
    rounded: Bits = scratch("patch cast", target.bits, bits.size)
    return round_to(bits.view(source.values), target, rounded)


def difference(bits: Bits, predicted: Bits, dtype: Dtype) -> Bits:
    """The zigzag-coded residual that turns `predicted` into `bits`: all `[m]` unsigned integers of one width."""
    ordered = _order(predicted, dtype, "patch ordered prediction")
    residual: Bits = np.subtract(_order(bits, dtype, "patch ordered"), ordered)
    sign = _sign_mask(residual, "patch sign")
    np.left_shift(residual, 1, out=residual)
    np.bitwise_xor(residual, sign, out=residual)
    return residual


def correct(predicted: Bits, residual: Bits, dtype: Dtype, out: Bits) -> None:
    """Undo `difference`: put the corrected bits into `out`. `residual` is overwritten."""
    low_bit = scratch("patch sign", residual.dtype, residual.size)
    np.bitwise_and(residual, 1, out=low_bit)
    np.negative(low_bit, out=low_bit)
    np.right_shift(residual, 1, out=residual)
    np.bitwise_xor(residual, low_bit, out=residual)
    np.add(residual, _order(predicted, dtype, "patch ordered"), out=out)
    if dtype.is_ordered_float:
        np.invert(out, out=low_bit)
        np.bitwise_xor(out, _flips(low_bit), out=out)


def _order(bits: Bits, dtype: Dtype, purpose: str) -> Bits:
    """Bit patterns as integers in the order of the numbers they stand for."""
    if not dtype.is_ordered_float:
        return bits
    ordered: Bits = scratch(purpose, bits.dtype, bits.size)
    np.copyto(ordered, bits)
    np.bitwise_xor(bits, _flips(ordered), out=ordered)
    return ordered


def _flips(bits: Bits) -> Bits:
    """In place: all ones where the top bit is set, the top bit alone elsewhere."""
    signed = bits.view(f"i{bits.itemsize}")
    np.right_shift(signed, 8 * bits.itemsize - 1, out=signed)
    np.bitwise_or(bits, bits.dtype.type(1 << (8 * bits.itemsize - 1)), out=bits)
    return bits


def _sign_mask(bits: Bits, purpose: str) -> Bits:
    mask: Bits = scratch(purpose, bits.dtype, bits.size)
    signed = bits.view(f"i{bits.itemsize}")
    np.right_shift(signed, 8 * bits.itemsize - 1, out=mask.view(signed.dtype))
    return mask
