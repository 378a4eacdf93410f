"""Weights without a gradient, which weight decay alone moved: by as many last places as their mantissa tells.

Each step of AdamW (Loshchilov and Hutter 2019, algorithm 2) multiplies a weight by `1 - lr * decay` and rounds. In
float32 that factor is a few last places below 1, and rounding makes whole ones of them: a weight loses, say, 2 a step
if its mantissa is below 1.5 and 3 above. What that adds up to is read off the weights. Of a base in 16 bits that was
trained in float32 this is not looked for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..dtypes import DTYPES, SILENT, Bits
from ..operators.decayed import MOST_STEPS, Table
from .magnitudes import row_products
from .matrices import Index, Matrix, WideRows, spread

_F32, _WIDE = DTYPES["F32"], np.dtype("f8")
_SIGN, _EXPONENT, _MANTISSA = 1 << 31, 0x7F800000, 0x007FFFFF
_EXPLAINED = 0.8  # of how a row changed a multiple of it explains, if it only decayed
_ENOUGH = 1 / 16  # of the rows
_PART = 1 << 22  # elements tell where the steps change
_ELEMENTS_TO_A_STEP = 16  # at least, or it is not the mantissa that tells

Words = npt.NDArray[np.uint32]


def may_have_decayed(base: Matrix, changed: Matrix) -> bool:
    """Whether enough of these rows are about multiples of what they were."""
    return bool(np.count_nonzero(_are_multiples(base, changed)) > _ENOUGH * base.shape[0])


def decay_table(base: Bits, bits: Bits, rows: Index) -> Table | None:
    """The table of `decayed` that makes most of `bits` of `base` where rows only decayed; None if there is none.

    Args:
        base, bits: `[all rows, columns]`, float32 as bit patterns.
        rows: which of them changed.
    """
    some = rows[spread(len(rows), _PART // base.shape[1] + 1)]
    before, after = WideRows(base, some, _F32, _WIDE), WideRows(bits, some, _F32, _WIDE)
    some = some[_are_multiples(before, after)]
    old, new = base[some].reshape(-1), bits[some].reshape(-1)
    normal = ((old ^ new) < _SIGN) & (old & _EXPONENT != 0)
    return _stairs(old[normal] & _MANTISSA, old[normal] - new[normal])


def _are_multiples(base: Matrix, changed: Matrix) -> npt.NDArray[np.bool_]:
    with np.errstate(**SILENT):  # of what is not finite nothing is explained
        own, shared, change = row_products(base, changed)
        explained: npt.NDArray[np.bool_] = (shared > -own) & (shared**2 > _EXPLAINED * own * change)
    return explained


def _stairs(mantissas: Words, steps: Words) -> Table | None:
    """Steps by mantissa, `[m]` both, as a table; steps that no neighbour has are chance."""
    if not len(steps):
        return None
    ordered = np.sort(mantissas.astype(np.uint64) << 32 | steps)
    mantissas, steps = (ordered >> 32).astype(np.uint32), ordered.astype(np.uint32)
    alike = steps[1:] == steps[:-1]
    kept = np.append(alike, False) | np.append(False, alike)
    mantissas, steps = mantissas[kept], steps[kept]
    begins = _begins(steps)
    lengths, values = np.diff(begins, append=len(steps)), steps[begins]
    shorter = lengths[1:-1] < np.minimum(lengths[:-2], lengths[2:])
    begins = np.delete(begins, 1 + np.flatnonzero(shorter & (values[:-2] == values[2:])))  # between two alike: chance
    begins = begins[_begins(steps[begins])]
    if not 0 < len(begins) <= min(len(steps) // _ELEMENTS_TO_A_STEP, MOST_STEPS):
        return None
    bounds = mantissas[begins]
    bounds[0] = 0  # mantissas below the first one seen move like it
    return np.stack([np.diff(each, prepend=np.uint32(0)) for each in (bounds, steps[begins])])


def _begins(values: Words) -> Index:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.append(np.ones(min(len(values), 1), np.bool_), values[1:] != values[:-1]))
