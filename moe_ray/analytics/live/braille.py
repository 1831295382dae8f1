"""Curves of dots: each character of the braille block has two columns of four."""

from collections.abc import Sequence

_BLOCK = 0x2800
# Bits of the dots of a character, by row from the top and column.
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BARS = "▁▂▃▄▅▆▇█"


def curve(points: Sequence[tuple[float, float]], low: float, high: float, width: int, height: int) -> list[str]:
    """Rows of a chart, from the top.

    Args:
        points: (x, y), x from 0 to 1; joined where neighbouring columns both have one.
        low, high: y of the lowest and the highest row.
        width, height: in characters.
    """
    rows, columns = 4 * height, 2 * width
    dots = [[False] * columns for _ in range(rows)]
    before = None
    for x, y in sorted(points):
        column = min(columns - 1, int(x * columns))
        share = (y - low) / (high - low) if high > low else 0.5
        row = min(rows - 1, max(0, round((1 - share) * (rows - 1))))
        for step_column, step_row in _line(before or (column, row), (column, row)):
            dots[step_row][step_column] = True
        before = (column, row)
    return ["".join(_character(dots, 4 * y, 2 * x) for x in range(width)) for y in range(height)]


def bars(values: Sequence[float], top: float) -> str:
    """A character for each value, as high as its share of `top`."""
    steps = len(_BARS) - 1
    return "".join(
        _BARS[min(steps, max(0, round(value / top * steps)))] if top > 0 else _BARS[0] for value in values
    )


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * i / length), round(start[1] + (end[1] - start[1]) * i / length))
        for i in range(length + 1)
    ]


def _character(dots: Sequence[Sequence[bool]], top: int, left: int) -> str:
    bits = sum(bit for y, row in enumerate(_BITS) for x, bit in enumerate(row) if dots[top + y][left + x])
    return chr(_BLOCK + bits)
