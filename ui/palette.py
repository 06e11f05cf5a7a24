"""One colour a method, the same in every panel and in the text. Safe for the common colour blindnesses.

The hues are those of Okabe and Ito. Exact fp16 is ink grey everywhere, also where a compressed cache
keeps some of its tokens exact: grey always means exact.
"""

from dataclasses import dataclass

from kvlens.engine.footprint import PARTS


@dataclass(frozen=True)
class Shade:
    """A colour in its light and its dark version."""

    light: str
    dark: str


EXACT = Shade("#5b626c", "#aab1bb")
METHODS = {
    "dense": EXACT,
    "kivi": Shade("#0072b2", "#56a9e0"),
    "csr": Shade("#d55e00", "#f28c45"),
}
FURTHER = (
    Shade("#00856a", "#3cc7a3"),
    Shade("#a8528c", "#dd8fc2"),
    Shade("#9a7400", "#e0b13c"),
    Shade("#4b53b8", "#9aa2f4"),
    Shade("#8c4a2f", "#d3967c"),
)
"""Given in order to methods that have no colour of their own yet."""

PART_STRENGTH = {
    "codes": 1.0,
    "scales": 0.55,
    "indices": 1.0,
    "coefficients": 0.55,
    "tables": 0.3,
    "dictionary": 0.75,
    "scratch": 0.2,
}
"""How strongly a part carries its method's colour. Parts not named here are exact tokens, hence grey."""

HEAT_LIGHT = ("#fbf7ee", "#fbd9b5", "#f5a582", "#df6a73", "#b13f77", "#76246f", "#33114f")
HEAT_DARK = ("#17151f", "#371a52", "#6b2370", "#a93773", "#dd5f6b", "#f6a07f", "#fdeccb")
"""The sequential scale of all heatmaps: lightness grows or falls steadily, low is close to the page."""

SURFACES = {
    "paper": Shade("#f5f4f0", "#111316"),
    "card": Shade("#ffffff", "#191c20"),
    "sunken": Shade("#faf9f6", "#15181b"),
    "ink": Shade("#1c2025", "#e9e7e2"),
    "muted": Shade("#656b73", "#979ea8"),
    "faint": Shade("#6b7078", "#8b929c"),
    "line": Shade("#e3e1da", "#2a2e34"),
    "line-strong": Shade("#c9c6bd", "#41464e"),
    "exact-cell": Shade("#e9ebee", "#262b31"),
    "warn": Shade("#8a5a00", "#e8b756"),
    "warn-back": Shade("#fdf3dc", "#2d2616"),
    "bad": Shade("#a3261f", "#ff8f84"),
    "bad-back": Shade("#fdeceb", "#321b1a"),
}


def method_shades(methods: list[str]) -> dict[str, Shade]:
    """The colour of each method; those without one of their own take the further ones in order."""
    unnamed = [name for name in methods if name not in METHODS]
    taken = {name: FURTHER[index % len(FURTHER)] for index, name in enumerate(unnamed)}
    return {name: METHODS.get(name) or taken[name] for name in methods}


def client_palette(methods: list[str]) -> dict:
    """What the page's scripts need to draw: colours by method, strengths by part, heat scales."""
    return {
        "methods": {name: vars(shade) for name, shade in method_shades(methods).items()},
        "strength": {part: PART_STRENGTH.get(part) for part in PARTS},
        "heat": {"light": HEAT_LIGHT, "dark": HEAT_DARK},
        "exact": vars(EXACT),
    }


def css_variables(methods: list[str]) -> str:
    """The palette as CSS custom properties, for both themes."""
    shades = {**SURFACES, **{f"method-{name}": shade for name, shade in method_shades(methods).items()}}
    light = "".join(f"--kv-{name}:{shade.light};" for name, shade in shades.items())
    dark = "".join(f"--kv-{name}:{shade.dark};" for name, shade in shades.items())
    return f":root{{{light}}}\n.dark{{{dark}}}\n"
