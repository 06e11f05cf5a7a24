"""Numbers as a person reads them. The page's scripts use the same rules (`assets/js/00_units.js`)."""

BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def bytes_text(num_bytes: float) -> str:
    """`3.42 MB`: three figures, decimal units."""
    value, unit = float(num_bytes), 0
    while value >= 999.5 and unit < len(BYTE_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    if unit == 0:
        return f"{value:.0f} B"
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {BYTE_UNITS[unit]}"


def count_text(count: int) -> str:
    """`12,345`."""
    return f"{count:,}"
