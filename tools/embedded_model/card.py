"""Writes the model card and the training curve: `python -m tools.embedded_model.card --model assets/model`.

Figures come from `evaluation.json` and `curve.csv` beside the model, sentences from `card_template.md`. It
measures nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from .curve import curve_svg, read_curve

# A channel whose largest value is this many times the median channel's stands far out.
CLEAR_OUTLIER = 4.0
TEMPLATE = Path(__file__).with_name("card_template.md")


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


def channel_sentence(figures: dict) -> str:
    """The ratios of all heads in one line, and whether any key channel stands far out."""
    keys, values = (
        [ratio for row in figures["channel_outliers"] for ratio in row[name]]
        for name in ("keys_max_over_median", "values_max_over_median")
    )
    verdict = "This model has" if max(keys) >= CLEAR_OUTLIER else "This model has no channel that stands far out, only"
    return (
        f"Over all heads: keys {max(keys):.1f} at most, {mean(keys):.1f} in the mean; values {max(values):.1f} and "
        f"{mean(values):.1f}. {verdict} key channels that are larger than the others."
    )


def sample_list(figures: dict) -> str:
    """Prompts and replies as quotations."""
    quoted = (
        f"**{sample['prompt']}**\n\n> " + sample["reply"].strip().replace("\n", "\n> ") for sample in figures["samples"]
    )
    return "\n\n".join(quoted)


def write_card(model_folder: Path) -> None:
    """`README.md` and `curve.svg` of the model folder."""
    figures = json.loads((model_folder / "evaluation.json").read_text(encoding="utf-8"))
    rows = read_curve(model_folder / "curve.csv")
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
        "recall_second": recall_table(figures["recall_one_fact_second_wording"]),
        "recall_subject": recall_table(figures["recall_one_fact_unseen_wording_and_subject"]),
        "recall_seen": recall_table(figures["recall_one_fact_seen_wording"]),
        "recall_four": recall_table(figures["recall_four_facts_unseen_wording"]),
        "count": figures["num_recall_questions"],
        "channel_table": channel_table(figures),
        "channel_sentence": channel_sentence(figures),
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
