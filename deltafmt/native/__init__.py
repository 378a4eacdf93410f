"""Compiled kernels for what Python and numpy cannot do in one pass. Whoever has none gets the same bytes, more slowly.

The library is built with the package where a C compiler is at hand (hatch_build.py), and lies beside this file. It does
not depend on the version of Python. Calls into it let other threads run.
"""

from .groups import (
    Bounds,
    cheapest_begins,
    exponent_groups,
    from_exponent_groups,
    from_groups,
    kinds_by_exponent,
    margin_groups,
    to_groups,
)
from .keys import keys_differ
from .library import available
from .planes import Problem, merge_planes, merge_segments, segment_longest, split_planes, split_segments
from .products import (
    TILE_COLUMNS,
    component,
    packed_a,
    packed_b,
    product,
    product_in_bf16,
    product_onto_bf16,
    product_with_margins,
    round_bf16,
    widen_bf16,
)
from .steps import Steps, move_by_steps

__all__ = [
    "TILE_COLUMNS",
    "Bounds",
    "Problem",
    "Steps",
    "available",
    "cheapest_begins",
    "component",
    "exponent_groups",
    "from_exponent_groups",
    "from_groups",
    "keys_differ",
    "kinds_by_exponent",
    "margin_groups",
    "merge_planes",
    "merge_segments",
    "move_by_steps",
    "packed_a",
    "packed_b",
    "product",
    "product_in_bf16",
    "product_onto_bf16",
    "product_with_margins",
    "round_bf16",
    "segment_longest",
    "split_planes",
    "split_segments",
    "to_groups",
    "widen_bf16",
]
