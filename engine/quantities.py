"""Numbers as the report prints them; a dash where there is none."""

NONE = "–"


def percent(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value * 100:.{digits}f} %"


def rate(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def figure(value: float | None) -> str:
    """Three significant digits."""
    return NONE if value is None else f"{value:.3g}"


def memory(mebibytes: float | None) -> str:
    return NONE if mebibytes is None else f"{mebibytes / 1024:.2f} GiB"


def size(bytes: float | None) -> str:
    if bytes is None:
        return NONE
    return f"{bytes / 2**20:.2f} MiB" if bytes >= 2**20 else f"{bytes / 2**10:.0f} KiB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def counted(count: int | None, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"
