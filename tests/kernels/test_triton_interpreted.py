"""The Triton kernels in Triton's interpreter, on the CPU: what they compute, not how fast.

Triton decides when a kernel is defined whether it is interpreted, so TRITON_INTERPRET must be set before
the kernels are imported, and a process with it can compile nothing. This file therefore runs itself in a
process of its own; there, and only there, it holds the real tests.
"""

import os
import subprocess
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_kernels_in_the_interpreter():
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]

else:
    from operator import attrgetter

    from any_append import check_any_append
    from any_layout import check_any_layout, check_any_sparse_layout
    from append_checks import append_cases, check_append
    from cases import quantize_cases
    from dense_cases import dense_cases
    from pursuit_checks import MODES, check_pursuit, pursuit_cases
    from triton.runtime.interpreter import interpreter_builder
    from triton_checks import (
        append_step,
        check_attend,
        check_dense,
        check_quantize,
        check_sparse,
        shipped_cases,
        triton_cases,
        triton_sparse_cases,
    )

    name = attrgetter("name")

    # The interpreter takes milliseconds for what a GPU does in none: what only adds size is left to the GPU.
    LEFT_OUT = {"long", "many_rows", "many_columns", "heads16_1", "dim256_bits4_group256"} | {
        f"keys{keys}_values{values}"
        for keys, values in [(1, 2), (1, 8), (2, 1), (2, 4), (4, 2), (4, 8), (8, 1), (8, 4)]
    }

    # The interpreter is NumPy: log2(0) = -inf is meant, and numbers in masked lanes may overflow.
    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

    @pytest.mark.parametrize("case", [case for case in triton_cases() if case.name not in LEFT_OUT], ids=name)
    def test_packed_attend(case):
        check_attend(case, "cpu")

    @pytest.mark.parametrize("case", shipped_cases(), ids=name)
    def test_packed_attend_of_shipped_formats(case):
        check_attend(case, "cpu")

    def test_packed_attend_of_any_layout():
        check_any_layout("cpu", max_examples=10)

    @pytest.mark.parametrize("case", dense_cases(), ids=name)
    def test_dense_attend(case):
        check_dense(case, "cpu")

    @pytest.mark.parametrize("case", [case for case in triton_sparse_cases() if case.name not in LEFT_OUT], ids=name)
    def test_sparse_attend(case):
        check_sparse(case, "cpu")

    def test_sparse_attend_of_any_layout():
        check_any_sparse_layout("cpu", max_examples=10)

    @pytest.mark.parametrize("case", [case for case in quantize_cases() if case.name not in LEFT_OUT], ids=name)
    def test_quantize_pack(case):
        check_quantize(case, "cpu")

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("case", [case for case in pursuit_cases() if case.name not in LEFT_OUT], ids=name)
    def test_pursuit(case, mode):
        check_pursuit(case, mode, "cpu")

    # fp32 is cut to bf16 here, where a GPU rounds it
    @pytest.mark.parametrize("case", [case for case in append_cases() if case.name != "rounded_to_bf16"], ids=name)
    def test_append_pack(case):
        check_append(case, append_step)

    def test_append_pack_by_few_programs(monkeypatch):
        """Where sequences are many a program takes several blocks."""
        monkeypatch.setattr("kvlens.kernels.append_pack.triton.PROGRAMS", 1)
        for case in append_cases():
            if case.name in ("paper", "flush_over_pages"):
                check_append(case, append_step)

    def test_append_pack_whatever_program_comes_first(monkeypatch):
        """On a GPU programs have no order: here the last, which packs, comes before the first, which writes."""
        first_to_last = interpreter_builder.set_grid_idx

        def last_to_first(*program):
            sizes = interpreter_builder.grid_dim
            first_to_last(*(size - 1 - index for size, index in zip(sizes, program, strict=True)))

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", last_to_first)
        for case in append_cases():
            if case.name in ("paper", "no_value_window"):
                check_append(case, append_step)

    def test_append_pack_of_any_layout():
        check_any_append(append_step, max_examples=8)
