"""Draws `docs/csr.svg` from the saved ablation: `python -m benchmarks.csr_plot`.

Error of the attention output against real bits, all modes on one picture; readable in light and dark.
"""

import csv
import math
from pathlib import Path

from benchmarks.report import RESULTS

OUT = Path(__file__).resolve().parent.parent / "docs" / "csr.svg"
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 200, 20, 52
# Okabe and Ito's palette: told apart by colour-blind readers, on white and on black.
SERIES = {
    "paper": ("CSR, the paper, N 4096", "#E69F00", ""),
    "post-rope centred": ("compact, after RoPE", "#56B4E9", ""),
    "pre-rope centred": ("compact, before RoPE", "#009E73", ""),
    "KIVI": ("KIVI, group 32 and 64", "#CC79A7", "4 4"),
}
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #333 } .axis { stroke: #888 } .grid { stroke: #8884 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } }
</style>"""


def points(rows: list[dict[str, str]], series: str) -> list[tuple[float, float]]:
    """Bits and errors of a series, by bits."""
    chosen = [
        row for row in rows
        if row["group"] == "modes" and row["variant"].startswith(series + " ")
        and (series != "paper" or row["variant"].endswith("N 4096"))
    ]  # fmt: skip
    return sorted((float(row["bits_per_value"]), float(row["attention_error"])) for row in chosen)


def draw(rows: list[dict[str, str]]) -> str:
    """The picture as SVG."""
    lines = {series: points(rows, series) for series in SERIES}
    errors = [error for line in lines.values() for _, error in line]
    low, high = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(bits: float) -> float:
        return LEFT + width * bits / 6

    def y(error: float) -> float:
        return TOP + height * (high - math.log10(error)) / (high - low)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">', STYLE]
    for bits in range(7):
        parts.append(f'<line class="grid" x1="{x(bits):.1f}" x2="{x(bits):.1f}" y1="{TOP}" y2="{TOP + height}"/>')
        parts.append(f'<text x="{x(bits):.1f}" y="{TOP + height + 20}" text-anchor="middle">{bits}</text>')
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + width}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    parts.append(f'<text x="{LEFT + width / 2}" y="{HEIGHT - 8}" text-anchor="middle">bits a value, all counted</text>')
    parts.append(
        f'<text transform="translate(16 {TOP + height / 2}) rotate(-90)" text-anchor="middle">'
        "squared relative error of attention's output</text>"
    )
    labels = sorted((y(line[-1][1]), series) for series, line in lines.items() if line)
    for place, (at, series) in enumerate(labels):
        # Names keep apart where lines end close together.
        labels[place] = (max(at, labels[place - 1][0] + 17) if place else at, series)
    for at, series in labels:
        name, colour, dashes = SERIES[series]
        path = " ".join(f"{x(bits):.1f},{y(error):.1f}" for bits, error in lines[series])
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}"/>'
        )
        parts += [
            f'<circle cx="{x(bits):.1f}" cy="{y(error):.1f}" r="4" fill="{colour}"/>' for bits, error in lines[series]
        ]
        parts.append(f'<rect x="{LEFT + width + 14}" y="{at - 5:.1f}" width="14" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + width + 34}" y="{at + 4:.1f}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    with (RESULTS / "csr_ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    OUT.write_text(draw(rows))
    print(f"wrote {OUT.name}")


if __name__ == "__main__":
    main()
