"""A decoder's step on the CPU: a few loops a layer, which torch's threads go through in one native call.

Products are memory-bound, so weights are read once, in the bits they are stored in, and every thread draws runs
of rows. What is tiny (norms, rotation) is an item a sequence.
"""

import ctypes
from collections.abc import Sequence

import torch

from kvlens.kernels.decoder_step import Attend, DecoderWeights, LayerWeights
from kvlens.kernels.native import jit, threads
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.program import Program, Task
from kvlens.kernels.native.project_rows import (
    ROWS_TOGETHER,
    add_to,
    gate,
    multiply_rows,
    scale_by,
    sum_of_squares,
    widen,
)
from kvlens.kernels.native.scalars import field_access, read_float, read_int64, write_float
from kvlens.kernels.native.vectors import BF16, FP16, FP32, NUM_LANES

jit.require_half_floats()

ELEMENTS = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
ITEM_BYTES = 2**15
"""Weights of an item: some microseconds of reading."""
ITEMS_PER_THREAD = 4
VECTORS_TOGETHER = (1, 2, 4)
"""Vectors of a batch that meet a weight while it is in a register."""


class StepArguments(ctypes.Structure):
    """What changes from step to step; all tasks read it: int64 `[B]` of tokens and of rotations' addresses."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("tokens", "rotations"))


class ProductArguments(ctypes.Structure):
    """`output = weights · vector (+ bias)` for each vector of the batch, and `total += output` where there is a total.

    A `*_stride` counts bytes from one vector of the batch to the next; 0 is no address.
    """

    _fields_ = tuple((name, ctypes.c_int64) for name in (
        "weights", "others", "row_bytes", "num_rows", "columns", "rows_per_item", "batch", "vector", "vector_stride",
        "bias", "total", "total_stride", "output", "output_stride", "other_output", "gated",
    ))  # fmt: skip


class VectorArguments(ctypes.Structure):
    """Work on one vector, or on some heads, of each sequence: an item each."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "step", "source", "source_stride", "weights", "other_weights", "count", "target", "target_stride",
            "num_heads", "num_other_heads", "head_dim",
        )),
        ("epsilon", ctypes.c_float),
    )  # fmt: skip


step_field, _ = field_access(StepArguments)
product, _ = field_access(ProductArguments)
vector, vector_address = field_access(VectorArguments)

# ---------------------------------------------------------------------------------------------------------
# Kernels of tasks. `element` is that of the weights; the item of a vector's task is its row of the batch.


def embed_kernel(element, source):
    def embed(arguments, item, thread):
        depends_on(source)
        token = read_int64(step_field(vector(arguments, "step"), "tokens") + 8 * item)
        place = vector(arguments, "source") + token * vector(arguments, "source_stride")
        target = vector(arguments, "target") + item * vector(arguments, "target_stride")
        widen(place, vector(arguments, "count"), target, element)

    return embed


def norm_kernel(source):
    def norm(arguments, item, thread):
        depends_on(source)
        place = vector(arguments, "source") + item * vector(arguments, "source_stride")
        target = vector(arguments, "target") + item * vector(arguments, "target_stride")
        count = vector(arguments, "count")
        mean = sum_of_squares(place, count) / count
        factor = 1 / (mean + read_float(vector_address(arguments, "epsilon"))) ** 0.5
        scale_by(place, vector(arguments, "weights"), count, factor, target)

    return norm


def rotate_kernel(source):
    """Norms of query and key heads where a model has them, then their rotation, in place."""

    def rotate(arguments, item, thread):
        depends_on(source)
        dim = vector(arguments, "head_dim")
        half = dim // 2
        cosine = read_int64(step_field(vector(arguments, "step"), "rotations") + 8 * item)
        sine = cosine + 4 * half
        heads = vector(arguments, "source") + item * vector(arguments, "source_stride")
        num_queries = vector(arguments, "num_heads")
        for head in range(num_queries + vector(arguments, "num_other_heads")):
            place = heads + 4 * dim * head
            weights = vector(arguments, "weights") if head < num_queries else vector(arguments, "other_weights")
            if weights != 0:
                mean = sum_of_squares(place, dim) / dim
                factor = 1 / (mean + read_float(vector_address(arguments, "epsilon"))) ** 0.5
                scale_by(place, weights, dim, factor, place)
            for index in range(half):
                first, second = place + 4 * index, place + 4 * (half + index)
                left, right = read_float(first), read_float(second)
                turn, lift = read_float(cosine + 4 * index), read_float(sine + 4 * index)
                write_float(first, left * turn - right * lift)
                write_float(second, right * turn + left * lift)

    return rotate


def product_kernel(element, together, source):
    """`together` vectors of the batch meet each weight as it is read; where fewer are left, some come again."""

    def multiply(arguments, item, thread):
        depends_on(source)
        first = item * product(arguments, "rows_per_item")
        count = min(product(arguments, "rows_per_item"), product(arguments, "num_rows") - first)
        if count % ROWS_TOGETHER != 0:  # the last rows, of which some come again
            first -= ROWS_TOGETHER - count % ROWS_TOGETHER
            count += ROWS_TOGETHER - count % ROWS_TOGETHER
        row_bytes, columns, batch = (
            product(arguments, "row_bytes"),
            product(arguments, "columns"),
            product(arguments, "batch"),
        )
        vector_stride, stride = product(arguments, "vector_stride"), product(arguments, "output_stride")
        output, others = product(arguments, "output") + 4 * first, product(arguments, "others")
        other_output = product(arguments, "other_output") + 4 * first
        place = first * row_bytes
        for start in range(0, batch, together):
            row = min(start, batch - together)
            vectors = product(arguments, "vector") + row * vector_stride
            multiply_rows(
                product(arguments, "weights") + place, row_bytes, count, columns, vectors, vector_stride,
                output + row * stride, stride, element, together,
            )  # fmt: skip
            if others != 0:
                multiply_rows(
                    others + place, row_bytes, count, columns, vectors, vector_stride, other_output + row * stride,
                    stride, element, together,
                )  # fmt: skip
        for row in range(batch):
            here = row * stride
            if product(arguments, "bias") != 0:
                add_to(output + here, product(arguments, "bias") + 4 * first, count)
            if product(arguments, "total") != 0:
                total = product(arguments, "total") + row * product(arguments, "total_stride")
                add_to(total + 4 * first, output + here, count)
            if others != 0:
                gate(output + here, other_output + here, count, product(arguments, "gated") + 4 * first + here)

    return multiply


# ---------------------------------------------------------------------------------------------------------


class Decoder:
    """See `kvlens.kernels.decoder_step.decoder`. One thread at a time.

    `query [B, HQ, D]`, `key` and `value [B, HK, D]` and `attended [B, HQ, D]` are where attention meets the other
    tasks.
    Raises: ValueError for sizes that the kernels do not read.
    """

    def __init__(self, weights: DecoderWeights, num_rows: int = 1) -> None:
        layer, dim = weights.layers[0], weights.head_dim
        _check(weights)
        hidden, inner = weights.embedding.shape[1], layer.gate.shape[0]
        num_queries, num_keys = layer.query.shape[0] // dim, layer.key.shape[0] // dim
        self._weights, self._num_rows = weights, num_rows
        self._tokens, self._rotations = ((ctypes.c_int64 * num_rows)() for _ in range(2))
        self._step = StepArguments(*(ctypes.addressof(numbers) for numbers in (self._tokens, self._rotations)))
        self._hidden, self._normed, self._projected = (torch.empty(num_rows, hidden) for _ in range(3))
        self._gates, self._ups, self._gated = (torch.empty(num_rows, inner) for _ in range(3))
        self._logits = torch.empty(num_rows, weights.head.shape[0])
        self._heads = torch.empty(num_rows, num_queries + 2 * num_keys, dim)
        self.query, self.key, self.value = self._heads.split([num_queries, num_keys, num_keys], dim=1)
        self.attended = torch.empty(num_rows, num_queries, dim)
        self._pieces: list[Program] = []

    def run(self, tokens: Sequence[int], cosine: torch.Tensor, sine: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Attention by a function: Python comes in once a layer."""
        if not self._pieces:
            self._pieces = [Program(tasks) for tasks in self.tasks()]
        rotations = torch.cat([cosine, sine], dim=-1)
        self.set(tokens, [rotation.data_ptr() for rotation in rotations])
        for layer, piece in enumerate(self._pieces[:-1]):
            piece.run()
            self.attended.copy_(attend(layer, self.query, self.key, self.value))
        self._pieces[-1].run()
        return self.logits()

    def set(self, tokens: Sequence[int], rotations: Sequence[int]) -> None:
        """The next token of each sequence, and the address of the cosines and sines of its position."""
        self._tokens[:], self._rotations[:] = tokens, rotations

    def logits(self) -> torch.Tensor:
        return self._logits.clone()

    def tasks(self) -> list[list[Task]]:
        """What is to do before the attention of each layer, and after the last one's."""
        weights, pieces = self._weights, [[self._embed()]]
        for layer in weights.layers:
            pieces[-1] += self._before_attention(layer)
            pieces.append(self._after_attention(layer))
        pieces[-1] += [self._norm(weights.norm), self._product(weights.head, self._normed, self._logits)]
        return pieces

    def _embed(self) -> Task:
        table = self._weights.embedding
        arguments = VectorArguments(
            step=ctypes.addressof(self._step), source=table.data_ptr(), source_stride=_stride(table),
            count=table.shape[1], target=self._hidden.data_ptr(), target_stride=_stride(self._hidden),
        )  # fmt: skip
        return self._of_each_row(jit.kernel(embed_kernel, ELEMENTS[table.dtype]), arguments)

    def _before_attention(self, layer: LayerWeights) -> list[Task]:
        turned = VectorArguments(
            step=ctypes.addressof(self._step), source=self._heads.data_ptr(), source_stride=_stride(self._heads),
            weights=_address(layer.query_norm), other_weights=_address(layer.key_norm),
            num_heads=self.query.shape[1], num_other_heads=self.key.shape[1], head_dim=self._weights.head_dim,
            epsilon=self._weights.epsilon,
        )  # fmt: skip
        return [
            self._norm(layer.attention_norm),
            self._product(layer.query, self._normed, self.query, bias=layer.query_bias),
            self._product(layer.key, self._normed, self.key, bias=layer.key_bias, waits=False),
            self._product(layer.value, self._normed, self.value, bias=layer.value_bias, waits=False),
            self._of_each_row(jit.kernel(rotate_kernel), turned),
        ]

    def _after_attention(self, layer: LayerWeights) -> list[Task]:
        return [
            self._product(layer.output, self.attended, self._projected, total=self._hidden),
            self._norm(layer.mlp_norm),
            self._product(
                layer.gate, self._normed, self._gates,
                others=layer.up.data_ptr(), other_output=self._ups.data_ptr(), gated=self._gated.data_ptr(),
            ),
            self._product(layer.down, self._gated, self._projected, total=self._hidden),
        ]  # fmt: skip

    def _norm(self, weight: torch.Tensor) -> Task:
        arguments = VectorArguments(
            source=self._hidden.data_ptr(), source_stride=_stride(self._hidden), weights=weight.data_ptr(),
            count=len(weight), target=self._normed.data_ptr(), target_stride=_stride(self._normed),
            epsilon=self._weights.epsilon,
        )  # fmt: skip
        return self._of_each_row(jit.kernel(norm_kernel), arguments)

    def _of_each_row(self, kernel: jit.Kernel, arguments: VectorArguments) -> Task:
        return Task(kernel.address, arguments, self._num_rows, kept=self)

    def _product(
        self, weights: torch.Tensor, source: torch.Tensor, output: torch.Tensor, *,
        bias: torch.Tensor | None = None, total: torch.Tensor | None = None, waits: bool = True, **more: int,
    ) -> Task:  # fmt: skip
        num_rows, columns = weights.shape
        row_bytes = _stride(weights)
        rows = min(ITEM_BYTES // row_bytes, num_rows // (ITEMS_PER_THREAD * threads.num_threads()))
        rows_per_item = max(ROWS_TOGETHER, rows // ROWS_TOGETHER * ROWS_TOGETHER)
        arguments = ProductArguments(
            weights=weights.data_ptr(), row_bytes=row_bytes, num_rows=num_rows, columns=columns,
            rows_per_item=rows_per_item, batch=self._num_rows, vector=source.data_ptr(), vector_stride=_stride(source),
            bias=_address(bias), total=_address(total), total_stride=0 if total is None else _stride(total),
            output=output.data_ptr(), output_stride=_stride(output), **more,
        )  # fmt: skip
        together = max(count for count in VECTORS_TOGETHER if count <= self._num_rows)
        kernel = jit.kernel(product_kernel, ELEMENTS[weights.dtype], together).address
        return Task(kernel, arguments, -(-num_rows // rows_per_item), waits, kept=self)


def _stride(tensor: torch.Tensor) -> int:
    """Bytes from one row to the next."""
    return tensor.stride(0) * tensor.itemsize


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(weights: DecoderWeights) -> None:
    """Raises: ValueError for what the kernels cannot read."""
    matrices: Sequence[torch.Tensor] = [weights.embedding, weights.head]
    for layer in weights.layers:
        matrices = [*matrices, layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down]
    for matrix in matrices:
        if not matrix.is_contiguous() or matrix.dtype not in ELEMENTS:
            raise ValueError(f"weights must be contiguous fp32, fp16 or bf16; got {matrix.dtype}, {matrix.stride()}")
        if matrix.shape[1] % NUM_LANES or matrix.shape[0] < ROWS_TOGETHER:
            raise ValueError(f"weights must have rows of a multiple of {NUM_LANES} values; got {list(matrix.shape)}")
    if weights.head_dim % NUM_LANES:
        raise ValueError(f"head_dim must be a multiple of {NUM_LANES}; got {weights.head_dim}")
