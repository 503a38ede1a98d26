"""Tables for the terminal: aligned columns, numbers to the right."""

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], widest: int = 48) -> str:
    """Lines of the heads and rows, indented by two; cells longer than ``widest`` are cut.

    A row may have more cells than there are heads: the last head then stands over all of these.
    """
    lines = [[cell if len(cell) <= widest else cell[: widest - 1] + "…" for cell in row] for row in rows]
    count = max([len(heads), *map(len, lines)])
    columns = [[line[i] for line in lines if i < len(line)] for i in range(count)]
    widths = [max(map(len, column), default=0) for column in columns]
    for i, head in enumerate(heads):
        if i < len(heads) - 1 or len(heads) == count:
            widths[i] = max(widths[i], len(head))
    right = [i > 0 and all(map(_is_number, column)) for i, column in enumerate(columns)]
    text = []
    for line in [list(heads), *lines]:
        cells = [cell.rjust(widths[i]) if right[i] else cell.ljust(widths[i]) for i, cell in enumerate(line)]
        text.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(text)


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.rstrip("%").replace(".", "", 1).isdecimal()
