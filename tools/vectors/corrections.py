"""What `patch` needs to turn a prediction into a target (spec/operators/patch.md), in Python's integers.

Shares no code with the package or any reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from vectors.exact import FIELDS, NAN, Real, converted, nearest_real, pattern, real
from vectors.values import WIDTH, Tensor, bits, words


def difference(target: Tensor, prediction: Tensor) -> list[int]:
    """How far each element lies from its prediction in the order of the numbers, modulo ``2^w``."""
    if prediction.dtype != target.dtype:
        prediction = converted(prediction, target.dtype)
    size = 8 * WIDTH[target.dtype]
    is_float = target.dtype.startswith(("F", "BF")) and target.dtype != "F8_E8M0"  # which has no sign bit

    def order(u: int) -> int:
        return u if not is_float else (1 << size) - 1 - u if u >> (size - 1) else u + (1 << (size - 1))

    pairs = zip(words(prediction), words(target), strict=True)
    return [(order(v) - order(p)) % (1 << size) for p, v in pairs]


def stepped(prediction: Tensor, differences: Sequence[int]) -> Tensor:
    """The numbers that lie so many steps from the predicted ones."""
    size = 8 * WIDTH[prediction.dtype]
    top, ones = 1 << (size - 1), (1 << size) - 1
    places = [ones - p if p & top else p + top for p in words(prediction)]
    moved = [(place + d) & ones for place, d in zip(places, differences, strict=True)]
    target = bits(prediction.dtype, *(u - top if u & top else ones - u for u in moved))._replace(shape=prediction.shape)
    assert difference(target, prediction) == [d & ones for d in differences]
    return target


def coded(differences: Sequence[int], target: Tensor) -> Tensor:
    """Differences as a residual of the target's shape."""
    size = 8 * WIDTH[target.dtype]
    signed = [d - ((d >> (size - 1)) << size) for d in differences]
    return bits(f"U{size}", *(2 * d if d >= 0 else -2 * d - 1 for d in signed))._replace(shape=target.shape)


def residual(target: Tensor, prediction: Tensor) -> Tensor:
    return coded(difference(target, prediction), target)


class Keys(NamedTuple):
    """The key of each element, and whether its difference is stored with the other sign."""

    key: list[int]
    up: list[bool]


def exponents(prediction: Tensor) -> Keys:
    """Groups by exponent of a prediction that already has the target's dtype."""
    exponent_bits, mantissa_bits = FIELDS[prediction.dtype]
    fields = [u >> mantissa_bits & (1 << exponent_bits) - 1 for u in words(prediction)]
    return Keys(fields, [False] * len(fields))


def margins(prediction: Sequence[Real], accumulator: str, dtype: str) -> Keys:
    """Groups by margin: how far a wide prediction lies from where its rounding changes over, to which side."""
    n = FIELDS[accumulator][1] - FIELDS[dtype][1]
    keys = Keys([], [])
    for x in prediction:
        u = pattern(x, accumulator)
        over = real(u - u % 2**n + 2 ** (n - 1), accumulator)
        if isinstance(x.size, Fraction) and isinstance(over.size, Fraction):
            assert over.negative == x.negative
            t = Real(False, abs(x.size - over.size))
            assert nearest_real(t, accumulator) == t
            up = x.size < over.size if not x.negative else x.size > over.size
        else:
            t, up = NAN, False
        keys.key.append(pattern(t, accumulator) >> FIELDS[accumulator][1])
        keys.up.append(up)
    return keys


def grouped(
    differences: Sequence[int], keys: Keys, bounds: Sequence[int], chunk: int, modulus: int
) -> tuple[list[int], list[list[int]]]:
    """Differences in the order in which they are stored, and of each chunk the sizes of its groups."""
    oriented = [-d % modulus if up else d for d, up in zip(differences, keys.up, strict=True)]
    stored, sizes = [], []
    for begin in range(0, len(oriented), chunk):
        members: list[list[int]] = [[] for _ in range(len(bounds) + 1)]
        for i in range(begin, min(begin + chunk, len(oriented))):
            members[sum(bound <= keys.key[i] for bound in bounds)].append(oriented[i])
        stored += [d for group in members for d in group]
        sizes.append([len(group) for group in members])
    return stored, sizes
