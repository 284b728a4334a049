"""`python -m llorch` is the same program as `llorch`."""

from llorch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
