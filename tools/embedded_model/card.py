"""Writes the model card and the training curve: `python -m tools.embedded_model.card --model assets/model`.

Figures come from `evaluation.json` and `curve.csv` beside the model, sentences from `card_template.md`. It
measures nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

TEMPLATE = Path(__file__).with_name("card_template.md")
WIDTH, HEIGHT, MARGIN = 720, 300, 56
# Okabe and Ito's palette: told apart by colour-blind readers.
SERIES = (
    ("train_loss", "training loss (weighted nats)", "#0072B2", 0.0, 6.0),
    ("held_out_loss", "held-out loss (weighted nats)", "#D55E00", 0.0, 6.0),
    ("recall_accuracy", "tokens copied right, unseen wordings (0 to 1)", "#009E73", 0.0, 1.0),
)


def perplexity_table(figures: dict) -> str:
    """Held-out losses by kind of text."""
    lines = ["| text | nats/token | perplexity | bits/character | tokens |", "| --- " * 5 + "|"]
    for kind, row in figures["perplexity"].items():
        losses = f"{row['nats_per_token']:.2f} | {row['perplexity']:.1f} | {row['bits_per_character']:.2f}"
        lines.append(f"| {kind} | {losses} | {row['num_tokens']:,} |")
    return "\n".join(lines)


def recall_table(table: dict[str, dict[str, float]]) -> str:
    """Shares of recalled values by length and depth, in per cent."""
    depths = list(next(iter(table.values())))
    lines = [
        "| tokens | " + " | ".join(d if d == "mean" else f"depth {float(d):.0%}" for d in depths) + " |",
        "| --- " * (len(depths) + 1) + "|",
    ]
    for num_tokens, row in table.items():
        lines.append(f"| {int(num_tokens):,} | " + " | ".join(f"{row[depth]:.0%}" for depth in depths) + " |")
    return "\n".join(lines)


def channel_table(figures: dict) -> str:
    """Largest channel over median channel, per layer and key/value head."""
    lines = ["| layer | keys | values |", "| --- | --- | --- |"]
    for row in figures["channel_outliers"]:
        keys, values = (
            ", ".join(f"{ratio:.1f}" for ratio in row[name])
            for name in ("keys_max_over_median", "values_max_over_median")
        )
        lines.append(f"| {row['layer']} | {keys} | {values} |")
    return "\n".join(lines)


def sample_list(figures: dict) -> str:
    """Prompts and replies as quotations."""
    quoted = (
        f"**{sample['prompt']}**\n\n> " + sample["reply"].strip().replace("\n", "\n> ") for sample in figures["samples"]
    )
    return "\n\n".join(quoted)


def curve_svg(rows: list[dict[str, str]]) -> str:
    """The training curve as SVG: losses on the left axis (0 to 6), recall on the right (0 to 1)."""
    last = max(float(row["tokens"]) for row in rows)

    def point(row: dict[str, str], name: str, low: float, high: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * float(row["tokens"]) / last
        share = min(1.0, max(0.0, (float(row[name]) - low) / (high - low)))
        return f"{x:.1f},{HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * share:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for mark in range(7):
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * mark / 6
        parts.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#dddddd"/>')
        parts.append(f'<text x="{MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#333333">{mark}</text>')
        parts.append(f'<text x="{WIDTH - MARGIN + 8}" y="{y + 4:.1f}" fill="#333333">{mark / 6:.2f}</text>')
    for index, (name, label, colour, low, high) in enumerate(SERIES):
        line = " ".join(point(row, name, low, high) for row in rows)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{MARGIN + 215 * index}" y="24" fill="{colour}">{label}</text>')
    caption = f"tokens read, 0 to {last / 1e6:.1f} million"
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 18}" text-anchor="middle" fill="#333333">{caption}</text></svg>')
    return "\n".join(parts) + "\n"


def write_card(model_folder: Path) -> None:
    """`README.md` and `curve.svg` of the model folder."""
    figures = json.loads((model_folder / "evaluation.json").read_text(encoding="utf-8"))
    with (model_folder / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (model_folder / "curve.svg").write_text(curve_svg(rows), encoding="utf-8")
    fields = {
        "made": figures["made"],
        "device": figures["device"],
        "torch": figures["versions"]["torch"],
        "transformers": figures["versions"]["transformers"],
        "parameters": f"{figures['num_parameters'] / 1e6:.2f}",
        "tokens": f"{float(rows[-1]['tokens']) / 1e6:.1f}",
        "steps": rows[-1]["step"],
        "load_seconds": figures["load_seconds"],
        "decode": f"{figures['decode_tokens_per_second']:.0f}",
        "perplexity_table": perplexity_table(figures),
        "recall_unseen": recall_table(figures["recall_one_fact_unseen_wording"]),
        "recall_subject": recall_table(figures["recall_one_fact_unseen_wording_and_subject"]),
        "recall_seen": recall_table(figures["recall_one_fact_seen_wording"]),
        "recall_four": recall_table(figures["recall_four_facts_unseen_wording"]),
        "count": figures["num_recall_questions"],
        "channel_table": channel_table(figures),
        "samples": sample_list(figures),
    }
    card = TEMPLATE.read_text(encoding="utf-8")
    for name, value in fields.items():
        card = card.replace(f"[[{name}]]", str(value))
    (model_folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/model"))
    write_card(parser.parse_args().model)


if __name__ == "__main__":
    main()
