"""How far a TensorRT build is, from the phases and steps that it reports, and how to stop it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Attention:
    """Keeps what a callback raised: TensorRT would print it and go on, Ctrl-C included.

    A build is stopped at its next step, and whoever began it raises ``failure``.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None

    def call(self, function: Callable[..., object], *arguments: object) -> bool:
        """Call it, unless something has been raised before; whether to go on."""
        if self.failure is None:
            try:
                function(*arguments)
            except BaseException as error:  # raised again by the build
                self.failure = error
        return self.failure is None


class Phases:
    """Fraction of a build from nested phases; it never falls, and reaches 1 with the last outermost phase."""

    def __init__(self) -> None:
        self.fraction = 0.0
        self._phases: dict[str, _Phase] = {}
        # TensorRT may report from threads of its own.
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = _Phase(parent, max(1, steps))

    def step(self, name: str, step: int) -> None:
        with self._lock:
            if phase := self._phases.get(name):
                phase.done = min(step + 1, phase.steps)
                self.fraction = max(self.fraction, self._fraction_at(name))

    def finish(self, name: str) -> None:
        with self._lock:
            if (phase := self._phases.pop(name, None)) and phase.parent not in self._phases:
                self.fraction = 1.0

    def _fraction_at(self, name: str) -> float:
        phase = self._phases[name]
        fraction, parent = phase.done / phase.steps, phase.parent
        for _ in self._phases:
            above = self._phases.get(parent or "")
            if above is None:
                break
            # What it is in is one of its parent's steps, the one after those that are done.
            fraction = min(1.0, (above.done + fraction) / above.steps)
            parent = above.parent
        return fraction


def make_monitor(module: Any, attention: Attention, report: Callable[[str, float], None] | None) -> Any:
    """TensorRT's IProgressMonitor that hands (phase, fraction of the build) to ``report`` after each step and phase."""
    phases = Phases()

    def tell(phase: str) -> bool:
        return attention.call(report, phase, phases.fraction) if report else attention.failure is None

    class Monitor(module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(this) -> None:
            module.IProgressMonitor.__init__(this)

        def phase_start(this, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(this, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return tell(phase_name)

        def phase_finish(this, phase_name: str) -> None:
            phases.finish(phase_name)
            tell(phase_name)

    return Monitor()
