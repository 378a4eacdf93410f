"""deltafmt: model weights, stored as shared bases and small deltas.

deltafmt.pack("finetune/", "packed/", base="base/")
deltafmt.unpack("packed/", "restored/", base="base/")
with deltafmt.open("packed/", base="base/") as archive:
    weight = archive.get_tensor("model.embed_tokens.weight")
"""

from __future__ import annotations

from . import startup  # noqa: F401 # isort: skip # before what takes its time
from .archive import OpenArchive, TensorSlice, open
from .errors import (
    AccessError,
    DeltafmtError,
    DestinationError,
    IntegrityError,
    MalformedError,
    MissingExtraError,
    RefusedError,
    UnsupportedError,
    UsageError,
    WrongBaseError,
)
from .inspect import inspect
from .limits import Limits
from .pack import pack
from .report import InspectReport, PackReport, Report, TensorReport, UnpackReport, VerifyReport
from .unpack import unpack
from .verify import verify
from .version import __version__

__all__ = [
    "AccessError",
    "DeltafmtError",
    "DestinationError",
    "InspectReport",
    "IntegrityError",
    "Limits",
    "MalformedError",
    "MissingExtraError",
    "OpenArchive",
    "PackReport",
    "RefusedError",
    "Report",
    "TensorReport",
    "TensorSlice",
    "UnpackReport",
    "UnsupportedError",
    "UsageError",
    "VerifyReport",
    "WrongBaseError",
    "__version__",
    "inspect",
    "open",
    "pack",
    "unpack",
    "verify",
]
