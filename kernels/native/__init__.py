"""Native CPU kernels without a compiler on the user's machine: Numba, 16-lane vectors, torch's own threads.

- `vectors`: fp32 vectors as words to generate code with.
- `packed_rows`, `sparse_rows`, `turned_rows`, `dense_rows`: the inner loops, generated for one format each.
- `pursuit_rows`: the sweeps and fits of Matching Pursuit.
- `jit`: compiles them once, keeps them on disk, tells how long it took.
- `threads`: runs a kernel in the OpenMP team that torch uses.
"""
