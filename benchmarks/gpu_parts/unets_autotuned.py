"""SDXL under Inductor's max-autotune, which takes minutes to compile: last, in a time box of its own."""

from .session import Session
from .unets import run_autotune


def run(session: Session) -> None:
    run_autotune(session)
