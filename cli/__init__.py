"""The command line: `stepfuse generate | upscale | models | doctor | bench | export`.

Imports torch only when a command needs it. Errors are one line on standard error.

Exit codes: 0 done; 1 other failure; 2 bad request or option; 3 checkpoint problem; 4 device problem; 5 NaN or Inf;
6 cancelled; 9 more memory than there is; 130 interrupted.
"""

from .commands import app, main

__all__ = ["app", "main"]
