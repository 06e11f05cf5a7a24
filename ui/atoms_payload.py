"""The atoms panel's numbers out of a RunLog: what is used, what it captures, one vector atom by atom. Pure."""

from collections.abc import Callable

import numpy as np

from kvlens.engine.trace import AtomSnapshot, CodedSide, LaneLog, RunLog
from kvlens.ui.heat import KINDS, View

MAX_POINTS = 160

Encode = Callable[[object, str], dict]


def atoms_payload(log: RunLog, view: View, encode: Encode) -> dict | None:
    """An entry for each lane with sparse codes; None if there is no such lane, and no panel either."""
    lanes = [_lane(lane, lane.atoms, view, encode) for lane in log.lanes if lane.atoms is not None]
    if not lanes:
        return None
    first = next(lane.atoms for lane in log.lanes if lane.atoms is not None)
    return {
        "probed_layer": first.probed_layer,
        "num_layers": int(first.coverage.shape[1]),
        "num_heads": int(first.keys.indices.shape[0]),
        "lanes": lanes,
    }


def _lane(lane: LaneLog, atoms: AtomSnapshot, view: View, encode: Encode) -> dict:
    chosen = (atoms.keys, atoms.values)[KINDS.index(view.kind)]
    head = min(view.head, chosen.indices.shape[0] - 1)
    return {
        "id": lane.lane_id,
        "num_coded": int(chosen.indices.shape[1]),
        "usage": usage(chosen, head, encode),
        "energy": [captured(side) for side in (atoms.keys, atoms.values)],
        "coverage": [[round(float(share), 5) for share in layers] for layers in atoms.coverage],
        "has_mean": bool(chosen.start.any()),
        "vector": vector(chosen, head, view.token, encode),
    }


def usage(side: CodedSide, head: int, encode: Encode) -> dict:
    """How often the atoms of a layer occur in the codes of one head, most used first; thinned to a curve.

    `used` are those that this head uses, `used_by_any` those that any head of the layer does.
    """
    num_atoms = len(side.atoms)
    counts = np.sort(np.bincount(side.indices[head].ravel(), minlength=num_atoms))[::-1]
    used = int((counts > 0).sum())
    ranks = np.arange(used)
    if used > MAX_POINTS:
        # Few atoms are used very often: points lie close where the curve bends.
        ranks = np.unique(np.geomspace(1, used, MAX_POINTS).round().astype(int)) - 1
    return {
        "num_atoms": num_atoms,
        "used": used,
        "used_by_any": len(np.unique(side.indices)),
        "ranks": encode(ranks + 1, "u4"),
        "counts": encode(counts[ranks], "u4"),
    }


def captured(side: CodedSide) -> list[float] | None:
    """The share of the squared norm of all known vectors that the start and 1, 2, ... atoms bring back."""
    energy = np.square(side.exact).sum(axis=-1)
    is_known = np.isfinite(energy) & np.isfinite(side.remaining).all(axis=-1)
    if not is_known.any():
        return None
    missing = (np.square(side.remaining[is_known]) * energy[is_known][:, None]).sum(axis=0)
    return [round(float(share), 5) for share in 1 - missing / max(float(energy[is_known].sum()), 1e-12)]


def vector(side: CodedSide, head: int, token: int | None, encode: Encode) -> dict | None:
    """One vector atom by atom: the exact one, the sums after 0, 1, ... atoms, what is missing after each.

    Without a token the newest coded one is taken, and the nearest coded one for a token that is still exact.
    Shapes: exact `[D]` or None where it is not known any more; sums `[s * parts + 1, D]`.
    """
    num_coded = side.indices.shape[1]
    if num_coded == 0:
        return None
    last = side.first_token + num_coded - 1
    shown = min(max(last if token is None else token, side.first_token), last)
    at = (head, shown - side.first_token)
    indices, coefficients = side.indices[at], side.coefficients[at]
    sums = [side.start[head if len(side.start) > 1 else 0, at[1] if side.start.shape[1] > 1 else 0].astype(np.float32)]
    width = side.atoms.shape[1]
    for step, part in np.ndindex(indices.shape):
        sums.append(sums[-1].copy())
        sums[-1][part * width : (part + 1) * width] += coefficients[step, part] * side.atoms[indices[step, part]]
    exact, remaining = side.exact[at], side.remaining[at]
    is_known = bool(np.isfinite(exact).all() and np.isfinite(remaining).all())
    return {
        "token": shown,
        "asked": token,
        "first": side.first_token,
        "last": last,
        "parts": indices.shape[1],
        "indices": [int(index) for index in indices.ravel()],
        "coefficients": [round(float(one), 5) for one in coefficients.ravel()],
        "exact": encode(exact, "f4") if is_known else None,
        "remaining": [round(float(one), 5) for one in remaining] if is_known else None,
        "sums": encode(np.stack(sums), "f4"),
    }
