"""What attention cut into parts shares, in Triton: how many parts, how a part is stored, how parts are merged.

A part gives its normalized output and the log-sum-exp of its scores, in units of log 2; together they are one
softmax. The number of parts depends on static sizes alone. This module does not know what a part reads.
"""

import torch
import triton
import triton.language as tl

from kvlens.kernels.compiled import Launch
from kvlens.kernels.exact_tokens import Attended

LOG2_E = 1.4426950408889634
DOT_ROWS = 16  # the least that a tensor-core product takes
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
MOST_SPLITS = 256
MOST_TILES = 256  # that one part reads: the longest sequence of a ragged batch is waited for


def padded(size: int) -> int:
    """The block, of a size that tensor cores take, that holds `size`."""
    return max(DOT_ROWS, triton.next_power_of_2(size))


def product_dtype(*dtypes: torch.dtype) -> tl.dtype:
    """What tensors of these dtypes are multiplied in: their own if it is one, else fp32."""
    dtype = DTYPES[dtypes[0]] if len(set(dtypes)) == 1 else tl.float32
    # the interpreter's bf16 products are wrong
    return tl.float32 if triton.knobs.runtime.interpret and dtype == tl.bfloat16 else dtype


def num_splits_of(num_blocks: int, num_tiles: int, at_once: int) -> int:
    """Splits for each of `num_blocks` sequences and heads, of which `at_once` run together.

    About two waves, so that a slow program delays little; of those, the fullest: a third wave of a few
    programs would leave the rest of the GPU idle.
    """

    def fullness(splits: int) -> float:
        waves = splits * num_blocks / at_once
        return waves / -(-splits * num_blocks // at_once)

    fewest = max(1, triton.cdiv(3 * at_once, 2 * max(1, num_blocks)))  # one and a half waves
    most = max(fewest, 5 * at_once // (2 * max(1, num_blocks)))
    splits = max(max(range(fewest, most + 1), key=fullness), triton.cdiv(num_tiles, MOST_TILES))
    return max(1, min(splits, num_tiles, MOST_SPLITS))


@triton.jit
def dot(a, b, accumulator=None):
    return tl.dot(a, b, accumulator, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def store_part(
    output_ptr, log_sum_exp_ptr, mask_n, maximum, total, outputs,
    NUM_BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, HEAD_DIM: tl.constexpr, IS_WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Store a part: outputs, NUM_BLOCKS blocks of (at least) CHANNELS channels `[C, N]`, divided by total.

    A part that IS_WHOLE, the only one, is the result: its log-sum-exp is a natural logarithm.
    """
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    for block in tl.static_range(NUM_BLOCKS):
        offs_c = tl.arange(0, outputs[block].shape[0])
        mask_c = (offs_c < CHANNELS) & (block * CHANNELS + offs_c < HEAD_DIM)
        tl.store(
            output_ptr[None, :] + (block * CHANNELS + offs_c)[:, None], outputs[block] * share[None, :],
            mask=mask_n[None, :] & mask_c[:, None],
        )  # fmt: skip
    log_sum_exp = maximum + tl.log2(total)
    tl.store(log_sum_exp_ptr, log_sum_exp * 0.6931471805599453 if IS_WHOLE else log_sum_exp, mask=mask_n)


@triton.jit(do_not_specialize=["num_parts"])
def _merge_kernel(
    part_output_ptr, part_log_sum_exp_ptr, output_ptr, log_sum_exp_ptr,
    num_parts, BLOCK_PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The parts of one query head as one softmax: each weighs 2^(its log-sum-exp - the largest)."""
    head = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_p = tl.arange(0, BLOCK_PARTS)
    maximum = float("-inf")
    for first in range(0, num_parts, BLOCK_PARTS):
        log_sum_exp = tl.load(
            part_log_sum_exp_ptr + head * num_parts + first + offs_p,
            mask=first + offs_p < num_parts, other=float("-inf"),
        )  # fmt: skip
        maximum = tl.maximum(maximum, tl.max(log_sum_exp, axis=0))
    reference = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = 0.0
    output = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        part = first + offs_p
        log_sum_exp = tl.load(
            part_log_sum_exp_ptr + head * num_parts + part, mask=part < num_parts, other=float("-inf")
        )
        weights = tl.exp2(log_sum_exp - reference)
        part_outputs = tl.load(
            part_output_ptr + (head * num_parts + part)[:, None] * HEAD_DIM + offs_d[None, :],
            mask=(weights > 0.0)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(weights, axis=0)
        output += tl.sum(weights[:, None] * part_outputs, axis=0)
    output /= tl.where(total == 0.0, 1.0, total)
    tl.store(output_ptr + head * HEAD_DIM + offs_d, output, mask=offs_d < HEAD_DIM)
    tl.store(log_sum_exp_ptr + head, (reference + tl.log2(total)) * 0.6931471805599453)


def empty_parts(query: torch.Tensor, num_parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the parts of every head: outputs fp32 `[B, HQ, parts, D]` and log-sum-exps `[B, HQ, parts]`."""
    batch, num_heads, head_dim = query.shape
    part_output = query.new_empty((batch, num_heads, num_parts, head_dim), dtype=torch.float32)
    return part_output, query.new_empty((batch, num_heads, num_parts), dtype=torch.float32)


def empty_result(query: torch.Tensor) -> Attended:
    """The answer to `query [B, HQ, D]`, contiguous, not yet written."""
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return Attended(output, query.new_empty(query.shape[:2], dtype=torch.float32))


def merge(part_output: torch.Tensor, part_log_sum_exp: torch.Tensor, result: Attended) -> Launch:
    """The launch that makes parts one result."""
    batch, num_heads, num_parts, head_dim = part_output.shape
    arguments = {
        "part_output_ptr": part_output,
        "part_log_sum_exp_ptr": part_log_sum_exp,
        "output_ptr": result.output,
        "log_sum_exp_ptr": result.log_sum_exp,
        "num_parts": num_parts,
        "BLOCK_PARTS": 32,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded(head_dim),
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    return Launch(_merge_kernel, (batch * num_heads,), arguments)
