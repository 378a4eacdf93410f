"""Ctrl-C while the command line is being imported, which takes a moment: an end without a traceback, as later.

The package imports this module before any other. It does something in a process that is our command line, and nothing
where the package is a library.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

INTERRUPTED = 128 + signal.SIGINT


def is_command_line() -> bool:
    """Whether this process was started as `deltafmt` or `python -m deltafmt`."""
    if sys.argv[:1] == ["-m"]:  # as it is until the module is found
        options = sys.orig_argv
        return "-m" in options and options[options.index("-m") + 1 :][:1] == ["deltafmt"]
    return os.path.basename(sys.argv[0] if sys.argv else "") in ("deltafmt", "deltafmt.exe")


if (
    is_command_line()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's `&` has it ignored
):
    signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(INTERRUPTED))
