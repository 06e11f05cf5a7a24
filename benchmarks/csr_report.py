"""Shows the saved ablation: `python -m benchmarks.csr_report` draws `docs/csr.svg` and fills the tables of its page.

The picture: error of the attention output against real bits, all modes; readable in light and dark. The tables of
`docs/csr.md`: one for each group, between `<!-- group -->` and `<!-- /group -->`. No figure of them is typed by hand.
"""

import csv
import math
import re
from pathlib import Path

from benchmarks.report import RESULTS

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 200, 20, 52
# Okabe and Ito's palette: told apart by colour-blind readers, on white and on black.
SERIES = {
    r"paper .*, N 4096": ("CSR, the paper, N 4096", "#E69F00", ""),
    r"post-rope centred .*": ("compact, after RoPE", "#56B4E9", ""),
    r"pre-rope centred .*, N 1024": ("compact, before RoPE", "#009E73", ""),
    r"pre-rope centred .*, N 4096": ("before RoPE, N 4096", "#0072B2", ""),
    r"KIVI .*": ("KIVI, group 32 and 64", "#CC79A7", "4 4"),
}
"""Names of variants as patterns; label, colour, dashes."""
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #333 } .axis { stroke: #888 } .grid { stroke: #8884 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } }
</style>"""


def points(rows: list[dict[str, str]], series: str) -> list[tuple[float, float]]:
    """Bits and errors of a series, by bits."""
    chosen = [row for row in rows if row["group"] == "modes" and re.fullmatch(series, row["variant"])]
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


COLUMNS = {
    "variant": ("", str),
    "bits_per_value": ("bits a value", lambda value: f"{float(value):.2f}"),
    "key_error": ("error of keys", lambda value: f"{float(value):.4f}"),
    "value_error": ("of values", lambda value: f"{float(value):.4f}"),
    "attention_error": ("of attention", lambda value: f"{float(value):.4f}"),
    "kl_nats": ("KL, nats", lambda value: f"{float(value):.4f}"),
    "same_top_token": ("same next token", lambda value: f"{100 * float(value):.1f} %"),
}


def table(rows: list[dict[str, str]], group: str) -> str:
    """A group's rows in Markdown."""
    lines = [[label for label, _ in COLUMNS.values()], ["---"] * len(COLUMNS)]
    lines += [[show(row[name]) for name, (_, show) in COLUMNS.items()] for row in rows if row["group"] == group]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(page: str, rows: list[dict[str, str]]) -> str:
    """`page` with every table made anew. Raises: ValueError if a group has no place."""
    for group in dict.fromkeys(row["group"] for row in rows):
        place = re.compile(rf"(<!-- {group} -->\n).*?(<!-- /{group} -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"docs/csr.md must have <!-- {group} --> and <!-- /{group} -->")
        page = place.sub(lambda found, group=group: f"{found[1]}{table(rows, group)}\n{found[2]}", page)
    return page


def saved() -> list[dict[str, str]]:
    """The ablation as it was saved."""
    with (RESULTS / "csr_ablation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    page = DOCS / "csr.md"
    page.write_text(render(page.read_text("utf-8"), saved()), "utf-8")
    (DOCS / "csr.svg").write_text(draw(saved()), "utf-8")


if __name__ == "__main__":
    main()
