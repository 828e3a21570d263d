"""`python -m stepfuse` is the `stepfuse` command."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
