"""The two TensorRT packages, which share one interface: where each builds for, and the one log that each keeps.

``tensorrt`` builds on a GPU, for that GPU, and serves data-centre cards. ``tensorrt-rtx`` builds with or without one,
for several kinds of GeForce and RTX cards in one plan, and compiles its kernels where the plan is loaded.
"""

import importlib
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, get_args

import torch
from packaging.version import Version

from diffdfkd.engine.runner import NoEngine

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
OLDEST: dict[Flavour, str] = {"tensorrt": "10.13", "tensorrt-rtx": "1.7"}
"""Versions from which on the interface is the one that is used here."""
CURRENT = "CURRENT"
"""TensorRT-RTX's name for the GPU at hand as a target."""


def load_flavour(flavour: Flavour) -> Any:
    """The package's module; NoEngine with the cure where it cannot be imported or is too old."""
    try:
        module = importlib.import_module(flavour.replace("-", "_"))
    # Its libraries may be missing, or of another platform, with the package there.
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        reason = "is not installed" if missing else f"cannot be loaded ({_one_line(str(error))})"
        raise NoEngine(f'{flavour} {reason}; pip install "diffdfkd[{flavour}]"') from None
    if Version(module.__version__) < Version(OLDEST[flavour]):
        raise NoEngine(
            f"{flavour} is {module.__version__} here, and {OLDEST[flavour]} is the oldest that serves; "
            f'pip install --upgrade "diffdfkd[{flavour}]"'
        )
    return module


def capabilities(flavour: Flavour) -> tuple[str, ...]:
    """Compute capabilities, such as SM86, that it builds for anywhere; none: it builds for the GPU at hand alone."""
    if flavour == "tensorrt":
        return ()
    return tuple(name for name in load_flavour(flavour).ComputeCapability.__members__ if name.startswith("SM"))


def here(flavour: Flavour) -> str:
    """Compute capability of the current CUDA device; NoEngine where there is none or the flavour does not serve it."""
    if not torch.cuda.is_available():
        offered = capabilities(flavour)
        elsewhere = f", or name what to build for: {', '.join(offered)}" if offered else ""
        raise NoEngine(f"{flavour} needs a GPU for this, and torch finds none; use a machine with one{elsewhere}")
    major, minor = torch.cuda.get_device_capability()
    found = f"SM{major}{minor}"
    if flavour == "tensorrt-rtx" and found not in capabilities(flavour):
        name = torch.cuda.get_device_name()
        raise NoEngine(f"tensorrt-rtx has no {found} ({name}); for data-centre cards the engine is tensorrt")
    return found


def targets(flavour: Flavour, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """What to build for: CURRENT, the GPU at hand, if nothing is wanted; NoEngine for what the flavour has not."""
    wanted = tuple(dict.fromkeys(wanted))
    offered = capabilities(flavour)
    if not offered and wanted and wanted != (found := here(flavour),):
        raise NoEngine(
            f"{flavour} builds for the GPU at hand alone, {found}; to build for {', '.join(wanted)} use a machine that "
            "has it, or tensorrt-rtx"
        )
    if not offered or not wanted:
        here(flavour)
        return (CURRENT,)
    for name in wanted:
        if name not in offered:
            other = "; for data-centre cards the engine is tensorrt" if name in ("SM90", "SM100", "SM103") else ""
            raise NoEngine(f"{flavour} cannot build for {name}; it can for {', '.join(offered)}{other}")
    return wanted


def runs_on(flavour: Flavour, built_for: Sequence[str]) -> str:
    """Where a plan for these targets may be loaded, in words; TensorRT refuses another version or kind of GPU."""
    version = f"under {flavour} {load_flavour(flavour).__version__}"
    if tuple(built_for) == (CURRENT,):
        return f"{torch.cuda.get_device_name()} (compute capability {_number(here(flavour))}), {version}"
    return f"GPUs of compute capability {' or '.join(map(_number, built_for))}, {version}"


def _number(capability: str) -> str:
    return f"{capability[2:-1]}.{capability[-1]}"


class TensorRTLog:
    """What a package says, for as long as the process lives.

    TensorRT keeps the first logger that it is given and uses it for all builders and runtimes; so there is one, and
    whoever builds listens in.
    """

    def __init__(self, module: Any) -> None:
        self.errors: deque[str] = deque(maxlen=8)
        """The last ones, each in one line."""
        self._listeners: list[Callable[[str, str], None]] = []

        class Logger(module.ILogger):  # type: ignore[misc, name-defined]
            def __init__(this) -> None:
                module.ILogger.__init__(this)

            def log(this, severity: Any, message: str) -> None:
                self._hear(severity.name, message)

        self.logger = Logger()

    def _hear(self, severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(_plain(message))
        for listener in tuple(self._listeners):
            listener(severity, message)

    @contextmanager
    def listening(self, listener: Callable[[str, str], None]) -> Iterator[None]:
        """Hand each message of the block, with its severity, to ``listener``, maybe on another thread."""
        self.errors.clear()
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def last_errors(self, count: int = 2) -> str:
        """The last different errors, for a message of one line."""
        return "; ".join(list(dict.fromkeys(self.errors))[-count:]) or "it gave no reason"


@cache
def log_of(module: Any) -> TensorRTLog:
    """The log of one package."""
    return TensorRTLog(module)


def _plain(message: str) -> str:
    """An error without where in TensorRT's own sources it came about."""
    if told := re.search(r"^(?:\S+: )?Error Code \d+: [\w ]+\((.*)\)$", message, re.DOTALL):
        message = told[1]
    return _one_line(re.sub(r"\[\w+\.\w+:\d+: \w+\] | ?In \w+ at /\S+", "", message)).rstrip(". ")


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()[:300]
