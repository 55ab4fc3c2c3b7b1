"""Small SVG charts: bars with their spread, and lines over a logarithmic axis."""

import math
from html import escape

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 170, 44, 48
COLORS = ("#0b6e4f", "#3a6ea5", "#c8553d", "#8a5a83", "#b08900", "#4d4d4d", "#2a9d8f", "#9b2226", "#6c757d")


def _text(x, y, text, anchor="middle", size=12, extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" {extra}>{escape(str(text))}</text>'


def _page(title, parts, height=HEIGHT):
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" fill="#222"><rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    )
    return "\n".join([head, _text(16, 24, title, "start", 15, 'font-weight="bold"'), *parts, "</svg>"]) + "\n"


def bars(title, unit, rows):
    """Horizontal bars. `rows`: name, value, least, most."""
    most = max(row[3] for row in rows) * 1.05
    left, step = 170, 28
    height = TOP + step * len(rows) + 40

    def x(value):
        return left + (WIDTH - left - 90) * value / most

    parts = []
    for index, (name, value, low, high) in enumerate(rows):
        y = TOP + index * step
        color = COLORS[0] if name.startswith("towpath") else COLORS[8]
        parts.append(_text(left - 8, y + 15, name, "end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{x(value) - left:.1f}" height="20" fill="{color}"/>')
        parts.append(f'<path d="M{x(low):.1f} {y + 10}H{x(high):.1f}" stroke="#222" stroke-width="1.5"/>')
        parts.append(_text(x(high) + 6, y + 15, f"{value:.3g}", "start"))
    parts.append(_text(left, height - 12, unit, "start", 12))
    return _page(title, parts, height)


def lines(title, x_label, y_label, series, x_names=None, log_y=False):
    """Lines. `series`: name to a list of (x, y), x on a logarithmic axis, or an index into `x_names`."""
    points = [point for line in series.values() for point in line]
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    scale_x = (lambda value: value) if x_names else math.log10
    scale_y = math.log10 if log_y else (lambda value: value)
    x_low, x_high = scale_x(min(xs)), scale_x(max(xs))
    y_low = math.floor(scale_y(min(ys))) if log_y else 0
    y_high = math.ceil(scale_y(max(ys))) if log_y else max(ys) * 1.1

    def x(value):
        return LEFT + (WIDTH - LEFT - RIGHT) * (scale_x(value) - x_low) / ((x_high - x_low) or 1)

    def y(value):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scale_y(value) - y_low) / ((y_high - y_low) or 1)

    parts = []
    ticks = [10**power for power in range(int(y_low), int(y_high) + 1)] if log_y else [y_high * part / 5 for part in range(6)]
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y(tick) + 4, f"{tick:.3g}", "end", 11))
    for value in sorted(set(xs)):
        parts.append(_text(x(value), HEIGHT - BOTTOM + 18, x_names[value] if x_names else f"{value:,}", size=11))
    # Names stand beside the ends of their lines, and never over each other.
    ends = sorted(series.items(), key=lambda item: y(item[1][-1][1]))
    place = 0.0
    for name, line in ends:
        color = COLORS[list(series).index(name) % len(COLORS)]
        path = " ".join(f"{'M' if index == 0 else 'L'}{x(px):.1f} {y(py):.1f}" for index, (px, py) in enumerate(line))
        parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="3" fill="{color}"/>' for px, py in line]
        place = max(place + 14, y(line[-1][1]) + 4)
        parts.append(_text(WIDTH - RIGHT + 8, place, name, "start", 12, f'style="fill:{color}"'))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label))
    parts.append(_text(12, TOP - 8, y_label, "start", 11))
    return _page(title, parts)
