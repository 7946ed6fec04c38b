"""`python -m detr_fast` is `detr-fast`."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line. Ctrl-C ends it with status 130 also while it is imported, when nothing has begun."""
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored, as behind a shell's &
    if handled:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    from detr_fast.cli import main as run

    if handled:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
