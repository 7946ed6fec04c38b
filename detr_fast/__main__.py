"""`python -m detr_fast` is `detr-fast`."""

from __future__ import annotations

from detr_fast.cli import main

if __name__ == "__main__":
    main()
