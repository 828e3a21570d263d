"""stepfuse: a diffusion inference engine.

Nothing heavy is imported here: names are loaded on first use (PEP 562), so `import stepfuse` imports no torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import errors
    from .engine.config import EngineConfig
    from .engine.engine import Engine
    from .engine.optimize import optimize
    from .engine.request import Control, Event, Job, Request, Result

__version__ = "0.1.0"

__all__ = [
    "Control",
    "Engine",
    "EngineConfig",
    "Event",
    "Job",
    "Request",
    "Result",
    "__version__",
    "errors",
    "optimize",
]

_HOME = {
    "Control": ".engine.request",
    "Engine": ".engine.engine",
    "EngineConfig": ".engine.config",
    "Event": ".engine.request",
    "Job": ".engine.request",
    "Request": ".engine.request",
    "Result": ".engine.request",
    "errors": ".engine.errors",
    "optimize": ".engine.optimize",
}
_MODULES = {"errors"}

logging.getLogger("stepfuse").addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(home, __name__)
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
