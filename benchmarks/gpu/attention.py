"""One layer's decode attention: packed and sparse caches against the best exact fp16 attention of this machine.

"Dense" is every backend of torch's scaled_dot_product_attention (for grouped heads also with the query heads of a
key/value head folded into rows, which reads each key once), FlashAttention if it is installed, and our own kernel
on exact tokens; others are compared with the fastest of them. `limit` is the ratio of the bytes that must be read:
what a kernel at the same share of the memory's bandwidth would reach.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import layers
from benchmarks.gpu.layers import Case, DenseLayer
from benchmarks.gpu.peers import Peer
from benchmarks.gpu.plan import PACKED, Plan
from benchmarks.gpu.session import Deadline, Results, attempt, release
from benchmarks.gpu.timing import Step, copies_beyond_cache, copy_gigabytes_per_second, in_turns, timed

BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@dataclass(frozen=True)
class Row:
    """`layer_mb` must be read in a step of `ms`; `share_of_limit` is times_best_dense / limit."""

    model: str
    batch: int
    tokens: int
    method: str
    ms: float
    layer_mb: float
    gb_per_s: float
    share_of_copy: float
    times_best_dense: float
    limit: float
    share_of_limit: float


@dataclass(frozen=True)
class Method:
    """`steps` gives a step for each of so many copies of a layer."""

    name: str
    layer_bytes: int
    steps: Callable[[int], list[Step]]
    is_dense: bool = False
    in_graph: bool = True


def run(plan: Plan, device: torch.device, results: Results, deadline: Deadline, peers: Sequence[Peer] = ()) -> None:
    copy = copy_gigabytes_per_second(device)
    print(f"copying moves {copy:.0f} GB/s (read and written)\n")
    for case in plan.layers:
        what = f"{case.model}, batch {case.batch}, {case.tokens:,} tokens"
        if deadline.allows(what):
            with attempt(what):
                results.add(measure(case, device, copy, plan.turn_seconds, peers))
            release(device)


def measure(case: Case, device: torch.device, copy: float, seconds: float, peers: Sequence[Peer]) -> list[Row]:
    """All methods in turns. Shapes and bytes are those of `case`."""
    walks, sizes, dense = {}, {}, []
    for method in methods(case, device, peers):
        with attempt(method.name):
            steps = method.steps(copies_beyond_cache(method.layer_bytes, device))
            walks[method.name] = timed(steps, method.layer_bytes, device, in_graph=method.in_graph)
            sizes[method.name] = method.layer_bytes
            dense += [method.name] * method.is_dense
    found = in_turns(walks, seconds)
    best = min(found[name] for name in dense)
    rows = []
    for name, ms in sorted(found.items(), key=lambda entry: entry[1]):
        speed, limit = sizes[name] / ms / 1e6, case.dense_bytes / sizes[name]
        rows.append(
            Row(
                case.model, case.batch, case.tokens, name, ms, sizes[name] / 1e6, speed, speed / copy, best / ms,
                limit, best / ms / limit,
            )
        )  # fmt: skip
    return rows


def methods(case: Case, device: torch.device, peers: Sequence[Peer]) -> Iterator[Method]:
    copies = copies_beyond_cache(case.dense_bytes, device)
    exact = layers.dense_layers(case, copies, device)

    def dense(name: str, step: Callable[[DenseLayer], Step]) -> Method:
        return Method(name, case.dense_bytes, lambda _: [step(layer) for layer in exact], is_dense=True)

    for backend in BACKENDS:
        name = "sdpa " + backend.name.removesuffix("_ATTENTION").lower()
        yield dense(name, partial(sdpa_step, backend))
        if case.shape.num_query_heads != case.shape.num_kv_heads:
            yield dense(f"{name} folded", partial(sdpa_step, backend, is_folded=True))
    yield from (dense(name, step) for name, step in _installed())
    yield dense("our dense kernel", partial(layers.own_dense_step, case))
    for entry in PACKED:
        build = {"kivi": layers.kivi_steps, "csr": layers.csr_steps}[entry.method]
        steps = partial(build, case, entry.config, device=device)
        yield Method(entry.label, case.stored_bytes(entry.config), steps)
    for peer in peers:
        steps = partial(peer.steps, case, exact[0])
        yield Method(peer.name, case.stored_bytes(peer.config), steps, in_graph=False)


def sdpa_step(backend: SDPBackend, layer: DenseLayer, *, is_folded: bool = False) -> Step:
    query, keys, values = layer.query, layer.keys, layer.values
    if is_folded:
        query = query.view(len(query), keys.shape[1], -1, query.shape[-1])
    is_grouped = query.shape[1] != keys.shape[1]

    def step() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=is_grouped)

    return step


def _installed() -> Iterator[tuple[str, Callable[[DenseLayer], Step]]]:
    """Decode kernels of packages that are here."""
    try:
        import flash_attn
    except ImportError:
        return

    def flash_step(layer: DenseLayer) -> Step:
        tensors = (tensor.transpose(1, 2).contiguous() for tensor in (layer.query, layer.keys, layer.values))
        return partial(flash_attn.flash_attn_with_kvcache, *tensors)

    yield f"flash-attn {flash_attn.__version__}", flash_step
