"""`python -m detr_fast` is `detr-fast`."""

from __future__ import annotations

import os
import signal
import threading


def main() -> None:
    """Run the command line. Ctrl-C ends it with status 130 also while it is imported, when nothing has begun."""
    # and not ignored, as behind a shell's &; only the main thread may set it
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    handled = handled and threading.current_thread() is threading.main_thread()
    if handled:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    from detr_fast.cli import main as run

    if handled:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
