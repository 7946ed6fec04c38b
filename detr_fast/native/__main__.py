"""`python -m detr_fast.native`: compile the host's part of the ops, and say where it is."""

from detr_fast import native

if __name__ == "__main__":
    print(native.compile())
