"""The variants that the ablation compares, group by group."""

from dataclasses import replace
from math import log2

from benchmarks.csr_coding import Variant
from kvlens.engine.dictionaries.store import DictionaryKind

BUDGETS = (1.0, 1.5, 2.0, 4.0)
HEAD_DIM = 64


def paper(bits: float, num_atoms: int = 4096, group: str = "modes") -> Variant:
    """The paper's mode: keys before RoPE, MP, 32 bits an atom, values in two halves."""
    atoms = int(bits * HEAD_DIM / 32)
    # Half of three atoms is no whole number: a value then gets two halves of two, a quarter bit more than a key.
    return Variant(
        group, f"paper {bits:g} bit, N {num_atoms}", DictionaryKind("pre_rope", num_atoms, 2),
        key_atoms=atoms, value_atoms=2 * -(-atoms // 2),
    )  # fmt: skip


def compact(bits: float, space: str = "pre_rope", *, is_centred: bool = True, num_atoms: int = 1024) -> Variant:
    """Ours: 16 bits an atom, index and coefficient together, and 16 of scale; one final fit."""
    atoms = int((bits * HEAD_DIM - 16) / 16)
    name = f"{space.replace('_', '-')}{' centred' * is_centred} {bits:g} bit, N {num_atoms}"
    kind = DictionaryKind(space, num_atoms, 1, is_centred)
    return Variant(
        "modes", name, kind, key_atoms=atoms, value_atoms=atoms, pursuit="MP + fit",
        coefficient_bits=16 - int(log2(num_atoms)),
    )  # fmt: skip


def variants() -> list[Variant]:
    """All of them."""
    best = compact(2.0)
    found = [paper(bits) for bits in BUDGETS]
    found += [paper(bits, 1024) for bits in BUDGETS]
    for space, is_centred in (("pre_rope", True), ("pre_rope", False), ("post_rope", True), ("post_rope", False)):
        found += [compact(bits, space, is_centred=is_centred) for bits in BUDGETS]
    found += [compact(bits, num_atoms=4096) for bits in BUDGETS]
    found += [
        Variant("modes", f"KIVI {bits} bit, group {group}", kivi_bits=bits, kivi_group=group)
        for bits in (2, 4)
        for group in (32, 64)
    ]

    def of_best(group: str, name: str, **changes) -> Variant:
        return replace(best, group=group, name=name, **changes)

    found += [of_best("atoms", f"N {count}", kind=replace(best.kind, num_atoms=count)) for count in (256, 512, 1024)]
    found += [
        of_best(
            "atoms",
            f"N {count}, {16 - bits}+{bits} bit",
            kind=replace(best.kind, num_atoms=count),
            coefficient_bits=bits,
        )
        for count, bits in ((256, 8), (512, 7), (2048, 5), (4096, 4))
    ]
    found += [
        of_best("split", f"keys {keys}, values {14 - keys}", key_atoms=keys, value_atoms=14 - keys)
        for keys in (3, 4, 5, 6, 7, 8)
    ]
    found += [of_best("pursuit", pursuit, pursuit=pursuit) for pursuit in ("MP", "MP + fit", "OMP")]
    found += [of_best("coefficients", f"{bits} bit", coefficient_bits=bits) for bits in (4, 5, 6, 16)]
    found += [
        of_best("scales", "16 bit a vector"),
        of_best("scales", "8 bit a vector", scale_bits=8),
        of_best("scales", "none: a scale a slot and layer", scale="slot"),
        of_best("scales", "none, 8 atoms", scale="slot", key_atoms=8, value_atoms=8),
        of_best(
            "scales",
            "none, 8 atoms of N 4096, 12+4 bit",
            scale="slot",
            key_atoms=8,
            value_atoms=8,
            kind=replace(best.kind, num_atoms=4096),
            coefficient_bits=4,
        ),
    ]
    halves = replace(best.kind, value_parts=2)
    found += [
        of_best("parts", "values whole, 6 atoms", value_atoms=6),
        of_best("parts", "values in halves of 3 atoms", kind=halves, value_atoms=6),
    ]
    found += [
        replace(paper(2.0, 1024, "online"), name=f"paper, {sampled} sampled, {guarded} guarded", num_sampled=sampled,
                num_guarded=guarded)
        for sampled, guarded in ((0, 0), (64, 0), (0, 64), (256, 256))
    ]  # fmt: skip
    found += [
        of_best("window", f"sinks {sinks}, window {window}", sinks=sinks, window=window)
        for sinks, window in ((0, 0), (4, 0), (0, 64), (4, 64), (4, 128))
    ]
    return found
