"""Weights for tensor parallelism: those that it splits by columns are stored so that a rank reads its part of them.

Of weights split by rows it does so anyway.
"""

from __future__ import annotations

import dataclasses
import re

from ..dtypes import Dtype, Shape
from ..encodings import CHUNK_ELEMENTS, Encoding, compressed
from ..operators import Operator, Panels
from ..operators.panels import MOST_TOGETHER, Order
from ..pieces import PIECE_BYTES

MOST_RANKS = 64

_SPLIT_BY_COLUMNS = re.compile(
    r"(?:^|\.)(?:o_proj|out_proj|wo|(?:self_)?attention\.dense|self_attn\.dense|down_proj|fc2|w2|mlp\.c_proj|dense_4h_to_h)\.weight$"
)
"""What transformers and vLLM call the linear layers that others, split by rows, feed into."""

_LEAST_ELEMENTS = 1 << 16  # of a tensor: of less all may be read


def good_order(name: str, shape: Shape, dtype: Dtype, ranks: int) -> Order | None:
    """The order of a tensor's elements in which each of so many ranks finds its columns together, in chunks of its own.

    None where the tensor is small, is not split by columns or cannot be.
    """
    if ranks == 1 or len(shape) != 2 or not _SPLIT_BY_COLUMNS.search(name):
        return None
    height, width = shape
    most = min(MOST_TOGETHER, PIECE_BYTES // dtype.width)
    if height * width < _LEAST_ELEMENTS or width % ranks or width > most:
        return None
    rows = max(min(ranks * CHUNK_ELEMENTS, most) // width, 1)
    blocks = -(-height // rows)
    even = next((number for number in range(blocks, 2 * blocks) if height % number == 0), blocks)
    return Order(height, width, -(-height // even), width // ranks)


def of_panels(dtype: Dtype, order: Order) -> Encoding:
    """The encoding of weights in this order: a chunk for each panel."""
    whole = compressed(dtype, (order.height, order.width))
    return dataclasses.replace(whole, chunk=order.rows * order.columns)


def in_panels(x: Operator, order: Order | None) -> Operator:
    """What makes a tensor of its elements in this order."""
    return x if order is None else Panels(x, order.rows, order.columns)
