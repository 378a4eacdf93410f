"""The compiled library: what is in it, and how it is called."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Floats = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]

FILE = Path(__file__).with_name("libkernels.so.1")
_ABI = 7  # as in native.h: another one is what an older build left behind
_ANSWERING = ("keys_differ", "merge_segments")  # the rest return nothing
_POINTER, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, Sequence[Any]] = {
    "keys_differ": (_POINTER, _COUNT),
    "pack_a": (_POINTER, *[_COUNT] * 2, _POINTER),
    "pack_b": (_POINTER, *[_COUNT] * 2, _POINTER),
    "set_product": (_POINTER, *[_COUNT] * 4, _POINTER, _POINTER),
    "add_product": (_POINTER, *[_COUNT] * 4, _POINTER, _POINTER),
    "add_product_in_bf16": (_POINTER, *[_COUNT] * 4, _POINTER, _POINTER),
    "add_product_onto_bf16": (_POINTER, _POINTER, *[_COUNT] * 4, _POINTER, _POINTER),
    "widen_bf16": (_POINTER, _COUNT, _POINTER),
    "round_bf16": (_POINTER, _COUNT, _POINTER),
    "add_product_with_margins": (_POINTER, *[_COUNT] * 4, *[_POINTER] * 3, _COUNT, *[_POINTER] * 3),
    "cheapest_begins": (_POINTER, *[_COUNT] * 2, _POINTER, *[_COUNT] * 3, *[_POINTER] * 2),
    "margin_groups_4": (_POINTER, _COUNT, _INT, _POINTER, _COUNT, *[_POINTER] * 3),
    "margin_groups_8": (_POINTER, _COUNT, _INT, _POINTER, _COUNT, *[_POINTER] * 3),
}
for _width in (2, 4):
    _SIGNATURES[f"move_by_steps_{_width}"] = (*[_POINTER] * 3, _INT, _INT, _COUNT, _POINTER)
for _width in (2, 4, 8):
    _SIGNATURES |= {
        f"exponent_groups_{_width}": (_POINTER, _COUNT, _INT, _INT, _POINTER, _COUNT, *[_POINTER] * 2),
        f"kinds_by_exponent_{_width}": (*[_POINTER] * 2, *[_COUNT] * 2, _INT, _INT, _POINTER),
        f"to_groups_{_width}": (*[_POINTER] * 4, _COUNT, _COUNT, _POINTER, _POINTER),
        f"from_groups_{_width}": (*[_POINTER] * 3, _COUNT, _COUNT, _INT, _POINTER),
        f"from_exponent_groups_{_width}": (_POINTER, *[_COUNT] * 2, _INT, _INT, _POINTER, _COUNT, *[_POINTER] * 3),
        f"split_planes_{_width}": (_POINTER, _COUNT, _INT, _POINTER),
        f"merge_planes_{_width}": (_POINTER, _COUNT, _INT, _POINTER),
    }
for _width in (1, 2, 4, 8):
    _SIGNATURES |= {
        f"segment_longest_{_width}": (_POINTER, _POINTER, _COUNT, _POINTER),
        f"split_segments_{_width}": (*[_POINTER] * 4, _COUNT, _POINTER),
        f"merge_segments_{_width}": (*[_POINTER] * 4, _COUNT, _POINTER),
    }


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(FILE))
        library.deltafmt_abi.restype = _INT
        if library.deltafmt_abi() != _ABI:
            return None
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _INT if name.startswith(_ANSWERING) else None
    except (OSError, AttributeError):
        return None
    return library


LIBRARY = _load()


def available() -> bool:
    """Whether there are kernels to call; if not, `keys_differ` alone may be called, which then does without."""
    return LIBRARY is not None


def require(condition: bool) -> None:
    """What C is told about its arguments has to be true, with `python -O` too."""
    if not condition:
        raise ValueError("a kernel was given arrays that do not fit together")


def addresses(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uintp]:
    """Where each begins: a list of pointers, to be used while they are there."""
    require(all(array.flags.c_contiguous for array in arrays))
    return np.array([_address(array) for array in arrays], np.uintp)


def _address(array: npt.NDArray[Any]) -> int:
    """Where it begins. `array.ctypes.data` says so too, and takes three times as long."""
    if array.size and array.flags.writeable:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    return int(array.ctypes.data)


def call(name: str, *arguments: npt.NDArray[Any] | int | None) -> Any:
    """Call a kernel; of arrays it gets the address. They have to be what it is told about them; the last is written."""
    passed: list[int | None] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            flags = argument.flags
            require(flags.c_contiguous and flags.aligned)
            passed.append(_address(argument))
        else:
            passed.append(argument)
    require(flags.writeable)
    return getattr(LIBRARY, name)(*passed)
