"""`python -m detr_fast.native`: compile the host's part of the ops, and say where it is."""

import sys

from detr_fast import native

if __name__ == "__main__":
    try:
        print(native.compile())
    except native.CompilationError as error:
        sys.exit(str(error))
