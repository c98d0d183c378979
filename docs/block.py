"""A block of a plain vision transformer with its hook points, as SVG: the figure of ``concepts.md``."""

from __future__ import annotations

from house import text

Column = tuple[str, ...]
ROWS: tuple[tuple[str, str, tuple[Column, ...], str], ...] = (
    (
        "resid_pre", "attention",
        (("ln1.scale", "ln1.normalized"), ("q", "k", "v"), ("attn_scores",), ("pattern",), ("z",), ("attn_out",)),
        "resid_mid",
    ),
    ("resid_mid", "MLP", (("ln2.scale", "ln2.normalized"), ("mlp.pre",), ("mlp.post",), ("mlp_out",)), "resid_post"),
)  # fmt: skip
BETWEEN = {"attn_scores": "softmax", "pattern": "· v", "z": "W_O", "mlp.pre": "GELU", "mlp.post": "W_out"}
"""What stands between a column and the next."""
WIDTH, WIDE, STEP, TALL = 900, 104, 134, 26


def names() -> list[str]:
    """Return every hook point in the figure, by its shorthand."""
    return [name for start, _, columns, end in ROWS for name in (start, *(n for c in columns for n in c), end)]


def figure() -> str:
    """Return the figure: a row for each branch, the residual stream below it."""
    height = 230 * len(ROWS) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-label="A block with its hook points: attention and MLP read the residual stream and add to it" '
        'font-family="system-ui, sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for row, (start, title, columns, end) in enumerate(ROWS):
        parts += _row(start, title, columns, end, 20 + 230 * row)
    return "\n".join([*parts, "</svg>", ""])


def _row(start: str, title: str, columns: tuple[Column, ...], end: str, top: int) -> list[str]:
    stream, middle, last = top + 185, top + 75, 40 + STEP * (len(columns) - 1)
    plus = last + WIDE // 2
    parts = [
        text(40, top + 12, title, 15, bold=True),
        f'<path d="M20 {stream} H{WIDTH - 20}" stroke="#5b7db1" stroke-width="5"/>',
        f'<path d="M{40 + WIDE // 2} {stream} V{middle}" stroke="#8a8a86" fill="none"/>',
        f'<path d="M{40 + WIDE // 2} {middle} H{plus} V{stream - 12}" stroke="#8a8a86" fill="none"/>',
        f'<circle cx="{plus}" cy="{stream}" r="12" fill="#ffffff" stroke="#5b7db1" stroke-width="2"/>',
        f'<path d="M{plus - 6} {stream} h12 m-6 -6 v12" stroke="#5b7db1" stroke-width="2"/>',
        *_box(start, 20, stream - TALL // 2, "#e8eef7", "#5b7db1", 78),
        *_box(end, min(plus + 30, WIDTH - 100), stream - TALL // 2, "#e8eef7", "#5b7db1", 84),
    ]
    for at, column in enumerate(columns):
        y = middle - (TALL + 4) * len(column) / 2
        for place, name in enumerate(column):
            parts += _box(name, 40 + STEP * at, y + place * (TALL + 4), "#fdf1d8", "#c08a1e", WIDE)
        if word := BETWEEN.get(column[-1]):
            parts.append(text(40 + STEP * at + WIDE + 15 - 3 * len(word), middle - 20, word, 11))
    return parts


def _box(name: str, x: float, y: float, fill: str, line: str, wide: int) -> list[str]:
    return [
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide}" height="{TALL}" rx="5" fill="{fill}" stroke="{line}"/>',
        text(x + 8, round(y) + 17, name, 12),
    ]
