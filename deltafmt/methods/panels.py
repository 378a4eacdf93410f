"""Weights for tensor parallelism: those that it splits by columns are stored so that a rank reads its part of them.

Of weights split by rows it does so anyway.
"""

from __future__ import annotations

import dataclasses
import re

from ..dtypes import Dtype, Shape
from ..encodings import CHUNK_ELEMENTS, Encoding, choose_chunk, compressed
from ..manifest import Manifest
from ..operators import Operator, Panels, Ref
from ..operators.panels import MOST_GRANULARITY, Order
from ..pieces import PIECE_BYTES

MAX_TENSOR_PARALLEL = 64

_SPLIT_BY_COLUMNS = re.compile(
    r"(?:^|\.)(?:o_proj|out_proj|wo|(?:self_)?attention\.dense|self_attn\.dense|down_proj|fc2|w2|dense_4h_to_h)\.weight$"
)
"""What transformers and vLLM call the linear layers that others, split by rows, feed into."""

_LEAST_ELEMENTS = 1 << 16  # of a tensor: of less all may be read
_MANY = 16  # blocks: what one of them costs hardly matters


def good_order(name: str, shape: Shape, dtype: Dtype, ranks: int) -> Order | None:
    """The order of a tensor's elements in which each of so many ranks finds its columns together, in chunks of its own.

    None where the tensor is small, is not split by columns or cannot be.
    """
    if ranks == 1 or not _is_split_by_columns(name, shape):
        return None
    height, width = shape
    most = min(MOST_GRANULARITY, PIECE_BYTES // dtype.width)
    if height * width < _LEAST_ELEMENTS or width % ranks or width > most:
        return None
    of_chunk = choose_chunk(shape, dtype.width) // width
    rows = _block_rows(height, max(min(ranks * CHUNK_ELEMENTS, most) // width, 1), of_chunk)
    return Order(height, width, rows, width // ranks)


def _block_rows(height: int, most: int, of_chunk: int) -> int:
    """Rows of a block, up to `most`: such that the last is no smaller, which would cut chunks elsewhere, and that the
    chunks of a patch, of `of_chunk` rows, end where blocks do. Where not both can be, the latter, if blocks are many.
    """
    fewest = -(-height // most)
    even = [height // number for number in range(fewest, 2 * fewest) if height % number == 0]
    aligned = [rows for rows in even if of_chunk and rows % of_chunk == 0]
    if aligned:
        return aligned[0]
    if fewest >= _MANY and 0 < of_chunk <= most:
        return most // of_chunk * of_chunk
    return even[0] if even else -(-height // fewest)


def _is_split_by_columns(name: str, shape: Shape) -> bool:
    return len(shape) == 2 and _SPLIT_BY_COLUMNS.search(name) is not None


def not_in_panels(manifest: Manifest) -> tuple[int, int]:
    """Of the weights that tensor parallelism splits by columns: how many are not stored so, and how many there are."""
    split = [name for name, tensor in manifest.tensors.items() if _is_split_by_columns(name, tensor.shape)]
    return sum(not isinstance(_stored_recipe(manifest, name), Panels) for name in split), len(split)


def _stored_recipe(manifest: Manifest, name: str) -> Operator:
    """The recipe of a tensor; of a copy of another, that one's."""
    recipe = manifest.tensors[name].recipe
    while isinstance(recipe, Ref) and recipe.base is None:
        recipe = manifest.tensors[recipe.tensor].recipe
    return recipe


def of_panels(dtype: Dtype, order: Order) -> Encoding:
    """The encoding of weights in this order: a chunk for each panel."""
    whole = compressed(dtype, (order.height, order.width))
    return dataclasses.replace(whole, chunk=order.rows * order.columns)


def in_panels(x: Operator, order: Order) -> Panels:
    """What makes a tensor of its elements in this order."""
    return Panels(x, order.rows, order.columns)
