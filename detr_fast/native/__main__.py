"""`python -m detr_fast.native`: compile the host's part of the ops, and say where it is."""

import signal
import sys

from detr_fast import native

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the compiler ends, too
    try:
        print(native.compile())
    except native.CompilationError as error:
        sys.exit(str(error))
