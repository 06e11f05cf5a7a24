"""Every dense path gives the same attention, ragged or not; the fastest one is measured once."""

import pytest
import torch

from kvlens.kernels import dense_attend
from kvlens.kernels.dense_attend import paths, reference, tune

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 128), (3, 1, 80)])
@pytest.mark.parametrize("lengths", [(1,), (300,), (7, 300, 129)])
def test_paths_agree_with_the_reference(path, dtype, heads, kv_heads, head_dim, lengths):
    capacity = 320
    query = torch.randn(len(lengths), heads, head_dim)
    keys, values = (torch.randn(len(lengths), kv_heads, capacity, head_dim).to(dtype) for _ in range(2))
    length = torch.tensor(lengths, dtype=torch.int32)
    want = reference.dense_attend(query, keys, values, length, scaling=0.1)
    got = paths.PATHS[path](
        query, keys, values, length, scaling=0.1, longest=max(lengths), is_ragged=len(set(lengths)) > 1
    )
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_what_lies_behind_the_last_token_is_never_read():
    keys = torch.full((1, 2, 64, 32), torch.nan, dtype=torch.float16)
    keys[:, :, :10] = 1
    query, length = torch.randn(1, 4, 32), torch.tensor([10], dtype=torch.int32)
    for path in paths.PATHS.values():
        output = path(query, keys, keys, length, scaling=0.1, longest=10, is_ragged=False)
        assert output.isfinite().all()


def test_paths_are_measured_once_and_the_winner_is_named():
    tune.fastest.cache_clear()
    keys = torch.randn(1, 2, 3000, 32).half()
    dense_attend.prepare(keys, num_query_heads=4)
    assert tune.fastest.cache_info().misses == 3
    query, length = torch.randn(1, 4, 32), torch.tensor([600], dtype=torch.int32)
    dense_attend.dense_attend(query, keys, keys, length, scaling=0.1, longest=600)
    assert tune.fastest.cache_info().misses == 3
    assert dense_attend.chosen_path(query.device) in paths.DESCRIPTIONS.values()


def test_heads_that_do_not_group_are_refused():
    keys = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match="multiple of 2; got 3"):
        dense_attend.dense_attend(
            torch.randn(1, 3, 16), keys, keys, torch.tensor([8], dtype=torch.int32), scaling=1.0, longest=8
        )
