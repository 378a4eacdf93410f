"""`patch`: a prediction, corrected bit for bit by the difference of ordered bit patterns (spec/operators/patch.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import native
from ..dtypes import SILENT, Bits, Dtype, round_to, widen
from ..gemm import round_wide
from ..scratch import STEP_BYTES, borrowed, scratch
from ..strictjson import Fields
from .base import Facts, Operator, Scope, Source, Target, Value, misfit
from .groups import Grouping, Groups, Up, margin_bits
from .stored import Stored


@dataclass(frozen=True)
class Patch(Operator):
    prediction: Operator
    residual: Operator
    groups: Groups | None = None
    op: ClassVar[str] = "patch"

    @classmethod
    def parse(cls, fields: Fields, node: Callable[[str, object], Operator], pointer: str) -> Patch:
        prediction = node("prediction", fields.object("prediction"))
        residual = node("residual", fields.object("residual"))
        groups = Groups.parse(fields.object("groups"), f"{pointer}/groups") if fields.has("groups") else None
        return cls(prediction, residual, groups)

    def to_json(self) -> dict[str, Any]:
        groups = {} if self.groups is None else {"groups": self.groups.to_json()}
        return {"op": self.op, "prediction": self.prediction.to_json(), "residual": self.residual.to_json(), **groups}

    def operands(self) -> tuple[Operator, ...]:
        return (self.prediction, self.residual)

    def infer(self, scope: Scope, target: Target, pointer: str) -> Facts:
        prediction = self.prediction.infer(scope, target, f"{pointer}/prediction")
        residual = self.residual.infer(scope, target, f"{pointer}/residual")
        wanted = f"U{8 * target.dtype.width}"
        if residual.dtype is None or residual.dtype.name != wanted:
            found = "a wide node" if residual.dtype is None else residual.dtype.name
            raise misfit("a residual of the wrong dtype", f"{pointer}/residual", wanted, found)
        if not predicts(prediction.dtype, target.dtype):
            found = "a wide node" if prediction.dtype is None else prediction.dtype.name
            raise misfit("a prediction of the wrong dtype", f"{pointer}/prediction", target.dtype.name, found)
        if prediction.shape != residual.shape:
            raise misfit(
                "prediction and residual differ in shape", pointer, list(prediction.shape), list(residual.shape)
            )
        if not (prediction.exact and residual.exact):
            raise misfit("a patch of something that is not exact", pointer)
        if self.groups is not None:
            self._check_groups(self.groups, prediction, target, pointer)
        return Facts(target.dtype, prediction.shape, exact=True)

    def _check_groups(self, groups: Groups, prediction: Facts, target: Target, pointer: str) -> None:
        if not isinstance(self.residual, Stored):
            raise misfit("groups in a residual that is not a stored array", f"{pointer}/residual")
        if not target.dtype.is_float:
            raise misfit("groups of a dtype without them", pointer, "F64, F32, F16 or BF16", target.dtype.name)
        if groups.by == "margin" and prediction.dtype is not None:
            raise misfit(
                "a margin of what is rounded already", f"{pointer}/prediction", "a wide node", prediction.dtype.name
            )
        if groups.by == "margin" and margin_bits(target.accumulator, target.dtype) <= 0:
            raise misfit("a margin where nothing is rounded away", pointer, found=target.dtype.name)

    def bind(self, source: Source, scope: Scope, target: Target) -> Value:
        facts = self.infer(scope, target, target.name)
        prediction, residual = (operand.bind(source, scope, target) for operand in self.operands())
        if self.groups is None:
            return _Patch(facts, prediction, residual, target)
        return _Grouped(facts, prediction, residual, target, self.groups)


class _Patch(Value):
    def __init__(self, facts: Facts, prediction: Value, residual: Value, target: Target) -> None:
        self.facts = facts
        self.granularity = prediction.granularity
        self._residual, self._dtype = residual, target.dtype
        self._predicted = _Predicted(prediction, target)

    def bits(self, lo: int, hi: int, out: Bits) -> None:
        with borrowed(self._dtype.bits, hi - lo) as residual:
            self._residual.bits(lo, hi, residual)
            self._predicted.bits(lo, hi, out)
            correct(out, residual, self._dtype, out)


class _Grouped(Value):
    """Residuals are in order of groups within each chunk: chunks are patched as a whole."""

    def __init__(self, facts: Facts, prediction: Value, residual: Value, target: Target, groups: Groups) -> None:
        assert residual.facts.chunk is not None
        self.facts = facts
        self.granularity = prediction.granularity
        self._residual, self._groups, self._dtype = residual, groups, target.dtype
        self._predicted = _Predicted(prediction, target)
        self._chunk = residual.facts.chunk
        self._together = max(STEP_BYTES // (self._chunk * target.dtype.width), 1) * self._chunk
        self._count = facts.count

    def bits(self, lo: int, hi: int, out: Bits) -> None:
        begin = lo // self._chunk * self._chunk
        while begin < hi:
            end = min(begin + self._chunk, self._count)
            if lo <= begin and end <= hi:
                end = min(begin + self._together, hi // self._chunk * self._chunk if hi < self._count else hi)
                self._read(begin, end, out[begin - lo : end - lo])
            else:
                with borrowed(self._dtype.bits, end - begin) as whole:
                    self._read(begin, end, whole)
                    first, last = max(lo, begin), min(hi, end)
                    np.copyto(out[first - lo : last - lo], whole[first - begin : last - begin])
            begin = end

    def _read(self, lo: int, hi: int, out: Bits) -> None:
        """Put whole chunks into `out`."""
        grouping = None
        if self._groups.by == "exponent":
            self._predicted.bits(lo, hi, out)
        else:
            grouping = self._predicted.margins(lo, hi, self._groups, out)
        # Now, and not before: what predicts may be another patch, and uses the same buffer.
        residual = scratch("patch residual", self._dtype.bits, hi - lo)
        self._residual.bits(lo, hi, residual)
        if grouping is None:
            correct_by_exponents(self._groups, self._chunk, residual, self._dtype, out)
        else:
            correct_in_groups(self._groups, grouping, self._chunk, residual, self._dtype, out)


class _Predicted:
    """A prediction as bits of the tensor's dtype, or as it is before it is rounded to it."""

    def __init__(self, value: Value, target: Target) -> None:
        self._value, self._dtype, self._accumulator = value, target.dtype, target.accumulator

    def bits(self, lo: int, hi: int, out: Bits) -> None:
        source = self._value.facts.dtype
        if source is None:
            self._value.rounded(lo, hi, self._accumulator, self._dtype, out)
        elif source == self._dtype:
            self._value.bits(lo, hi, out)
        else:
            with borrowed(source.bits, hi - lo) as bits:
                self._value.bits(lo, hi, bits)
                cast(bits, source, self._dtype, out)

    def margins(self, lo: int, hi: int, groups: Groups, out: Bits) -> Grouping:
        """Put a wide prediction into `out`, rounded, and group it by what it was before."""
        pair = self._value.bf16_and_product(lo, hi) if self._dtype.name == "BF16" else None
        if pair is not None:
            pair[0].bits(lo, hi, out)
            return groups.of_product(pair[1], out)
        with borrowed(self._accumulator, hi - lo) as values:
            with np.errstate(**SILENT):
                self._value.accumulate(lo, hi, values, first=True)
            round_wide(values, self._dtype, out)
            return groups.of_margins(values, self._dtype)


def predicts(source: Dtype | None, target: Dtype) -> bool:
    """Whether what has dtype `source`, or is wide, can predict a tensor of dtype `target`."""
    return source == target or (target.is_float and (source is None or source.is_float))


def cast(bits: Bits, source: Dtype, target: Dtype, out: Bits | None = None) -> Bits:
    """A prediction's bits in the target's dtype, in `out` if it is given; rounded once where the dtypes differ."""
    if source == target:
        return bits
    wider = np.dtype("f8" if "F64" in (source.name, target.name) else "f4")
    values = widen(bits, source, wider, scratch("patch widened", wider, bits.size))
    return round_to(values, target, scratch("patch cast", target.bits, bits.size) if out is None else out)


def difference_in_groups(
    groups: Groups, grouping: Grouping, chunk: int, bits: Bits, predicted: Bits, dtype: Dtype
) -> tuple[Bits, list[list[int]]]:
    """The residuals of chunks of so many elements (the last may have fewer), each in order of groups; and of each chunk
    the elements of each group.

    Args:
        grouping: `[m]`, of the prediction.
        bits, predicted: `[m]`, as in `difference`.
    """
    grouped: Bits = np.empty_like(bits)
    if native.available():
        lengths = native.to_groups(bits, predicted, grouping.up, grouping.numbers, chunk, grouped)
        return grouped, [of_chunk[: groups.count] for of_chunk in lengths.tolist()]
    residual = difference(bits, predicted, dtype, grouping.up)
    numbers = [grouping.numbers[begin : begin + chunk] for begin in range(0, bits.size, chunk)]
    for index, of_chunk in enumerate(numbers):
        part = slice(index * chunk, (index + 1) * chunk)
        grouped[part] = residual[part][np.argsort(of_chunk, kind="stable")]
    return grouped, [np.bincount(of_chunk, minlength=groups.count).tolist() for of_chunk in numbers]


def correct_in_groups(groups: Groups, grouping: Grouping, chunk: int, residual: Bits, dtype: Dtype, out: Bits) -> None:
    """Undo `difference_in_groups` for chunks of so many elements (the last may have fewer): correct the predicted bits
    in `out`. `residual` is overwritten."""
    if native.available():
        native.from_groups(residual, grouping.up, grouping.numbers, groups.count, chunk, out)
        return
    scattered = scratch("patch scattered", dtype.bits, residual.size)
    for begin in range(0, residual.size, chunk):
        part = slice(begin, begin + chunk)
        scattered[part][np.argsort(grouping.numbers[part], kind="stable")] = residual[part]
    correct(out, scattered, dtype, out, grouping.up)


def correct_by_exponents(groups: Groups, chunk: int, residual: Bits, dtype: Dtype, out: Bits) -> None:
    """`correct_in_groups`, of groups of the exponents in `out`."""
    if native.available():
        groups.correct_by_exponents(residual, chunk, dtype, out)
    else:
        correct_in_groups(groups, groups.of_exponents(out, dtype), chunk, residual, dtype, out)


def difference(bits: Bits, predicted: Bits, dtype: Dtype, up: Up | None = None) -> Bits:
    """The zigzag-coded residual that turns `predicted` into `bits`: all `[m]` unsigned integers of one width.

    `up` turns the sign of the difference around where it is true.
    """
    ordered = _order(predicted, dtype, "patch ordered prediction")
    residual: Bits = np.subtract(_order(bits, dtype, "patch ordered"), ordered)
    if up is not None:
        _negate(residual, up)
    sign = _sign_mask(residual, "patch sign")
    np.add(residual, residual, out=residual)  # a shift by 1, and twice as fast
    np.bitwise_xor(residual, sign, out=residual)
    return residual


def correct(predicted: Bits, residual: Bits, dtype: Dtype, out: Bits, up: Up | None = None) -> None:
    """Undo `difference`: put the corrected bits into `out`, which may be `predicted`. `residual` is overwritten."""
    low_bit = scratch("patch sign", residual.dtype, residual.size)
    np.bitwise_and(residual, 1, out=low_bit)
    np.negative(low_bit, out=low_bit)
    np.right_shift(residual, 1, out=residual)
    np.bitwise_xor(residual, low_bit, out=residual)
    if up is not None:
        _negate(residual, up)
    np.add(residual, _order(predicted, dtype, "patch ordered"), out=out)
    if dtype.is_ordered_float:
        np.invert(out, out=low_bit)
        np.bitwise_xor(out, _flips(low_bit, low_bit), out=out)


def _negate(bits: Bits, where: Up) -> None:
    """In place, modulo the width."""
    mask = scratch("patch negated", bits.dtype, bits.size)
    np.copyto(mask, where)
    np.subtract(bits, mask, out=bits)
    np.negative(mask, out=mask)
    np.bitwise_xor(bits, mask, out=bits)


def _order(bits: Bits, dtype: Dtype, purpose: str) -> Bits:
    """Bit patterns as integers in the order of the numbers they stand for."""
    if not dtype.is_ordered_float:
        return bits
    ordered = _flips(bits, scratch(purpose, bits.dtype, bits.size))
    np.bitwise_xor(bits, ordered, out=ordered)
    return ordered


def _flips(bits: Bits, out: Bits) -> Bits:
    """All ones where the top bit is set, the top bit alone elsewhere; `out` may be `bits`."""
    top = 8 * bits.itemsize - 1
    signed = f"i{bits.itemsize}"
    np.right_shift(bits.view(signed), top, out=out.view(signed))
    np.bitwise_or(out, bits.dtype.type(1 << top), out=out)
    return out


def _sign_mask(bits: Bits, purpose: str) -> Bits:
    mask: Bits = scratch(purpose, bits.dtype, bits.size)
    signed = bits.view(f"i{bits.itemsize}")
    np.right_shift(signed, 8 * bits.itemsize - 1, out=mask.view(signed.dtype))
    return mask
