"""Checks of an architecture's options, each with the one line that a user reads; the field's prefix is added above."""

from typing import Any

from diffdfkd.engine.errors import UserError


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value`, which must be a whole number of at least `least`; raises UserError ``options.<name>: ...``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"options.{name}: got {value!r}; a whole number from {least} on")
    return value


def share(name: str, value: Any) -> float:
    """`value`, which must be a number from 0 to below 1, such as a dropout rate."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"options.{name}: got {value!r}; a number from 0 to below 1")
    return float(value)


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """`value`, which must be one of `allowed`."""
    if isinstance(value, bool) or value not in allowed:
        raise UserError(f"options.{name}: got {value!r}; one of {', '.join(map(str, allowed))}")
    return value
