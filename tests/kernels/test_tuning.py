"""Launch configurations: saved ones are found by device, then by generation, then by nearest shape."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="launch configurations are Triton's")

from kvlens.kernels import tuning
from kvlens.kernels.tuning import DenseConfiguration, PackedConfiguration, Shape, Tuned

CUDA = torch.device("cuda")
LLAMA = Shape(head_dim=128, heads_per_kv=4, batch=1, bits=2)


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A function that makes the GPU one of that name; nothing is saved for any."""
    monkeypatch.setattr(tuning, "TUNED", tmp_path)

    def named(name: str) -> None:
        tuning.load.cache_clear()
        tuning.configuration_of.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    named("NVIDIA H200")
    yield named
    tuning.load.cache_clear()
    tuning.configuration_of.cache_clear()


def packed(programs: int) -> PackedConfiguration:
    return PackedConfiguration(num_stages=2, programs=programs)


def save(name: str, arch: int, *found: tuple[Shape, PackedConfiguration]) -> None:
    tuned = [Tuned(shape, configuration, 4096, 0.5, 0.6) for shape, configuration in found]
    tuning.save(name, arch, {"date": "2026-01-01"}, {"packed_attend": tuned})


def found(shape: Shape = LLAMA, arch: int = 90) -> tuning.Configuration:
    return tuning.configuration_of("packed_attend", shape, arch, CUDA)


def test_a_device_takes_its_own_file(device):
    save("NVIDIA H200", 90, (LLAMA, packed(5)))
    save("NVIDIA H100 80GB HBM3", 90, (LLAMA, packed(6)))
    assert tuning.path_of("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
    assert found() == packed(5)
    device("NVIDIA H100 80GB HBM3")
    assert found() == packed(6)


def test_the_nearest_shape_counts_heads_before_batch(device):
    batches = [(replace(LLAMA, batch=batch), packed(batch)) for batch in (1, 8, 32)]
    save("NVIDIA H200", 90, *batches, (replace(LLAMA, heads_per_kv=1, batch=16), packed(99)))
    assert [found(replace(LLAMA, batch=batch)).programs for batch in (1, 2, 3, 12, 500)] == [1, 1, 8, 8, 32]
    assert found(replace(LLAMA, heads_per_kv=1)) == packed(99)


def test_other_bits_or_channels_keep_the_default(device):
    save("NVIDIA H200", 90, (LLAMA, packed(5)))
    for shape in (replace(LLAMA, bits=4), replace(LLAMA, head_dim=64)):
        assert found(shape) == tuning.default_of("packed_attend", shape, 90)
    dense = replace(LLAMA, bits=0)
    assert tuning.configuration_of("dense_attend", dense, 90, CUDA) == DenseConfiguration(3, 6)


def test_an_unknown_device_takes_the_nearest_of_its_generation(device):
    save("A100", 80, (LLAMA, packed(80)))
    save("RTX 3090", 86, (LLAMA, packed(86)))
    device("RTX 4090")
    assert found(arch=89) == packed(86)
    assert found(arch=120) == tuning.default_of("packed_attend", LLAMA, 120)


def test_a_file_for_more_shared_memory_is_not_taken(device):
    save("A100", 80, (LLAMA, packed(80)))
    device("RTX 3090")
    assert found(arch=86) == tuning.default_of("packed_attend", LLAMA, 86)


def test_without_a_gpu_nothing_saved_counts(device):
    save("NVIDIA H200", 90, (LLAMA, packed(5)))
    default = tuning.default_of("packed_attend", LLAMA, 90)
    assert tuning.configuration_of("packed_attend", LLAMA, 90, torch.device("cpu")) == default


def test_what_is_saved_comes_back_with_its_figures(device):
    save("NVIDIA H200", 90, (LLAMA, packed(5)))
    assert tuning.load("NVIDIA H200", 90) == {"packed_attend": (Tuned(LLAMA, packed(5), 4096, 0.5, 0.6),)}
    written = json.loads(tuning.path_of("NVIDIA H200").read_text())
    assert written["device"] == "NVIDIA H200"
    assert written["operations"]["packed_attend"]["conditions"] == {"date": "2026-01-01"}


def test_saving_an_operation_leaves_the_others_and_their_conditions(device):
    save("NVIDIA H200", 90, (LLAMA, packed(5)))
    dense = Tuned(replace(LLAMA, bits=0), DenseConfiguration(2, 4), 4096, 0.5, 0.6)
    path = tuning.save("NVIDIA H200", 90, {"date": "2026-01-02"}, {"dense_attend": [dense]})
    assert tuning.load("NVIDIA H200", 90)["dense_attend"] == (dense,)
    assert found() == packed(5)
    dates = {name: each["conditions"]["date"] for name, each in json.loads(path.read_text())["operations"].items()}
    assert dates == {"packed_attend": "2026-01-01", "dense_attend": "2026-01-02"}


@pytest.mark.parametrize(
    "change", [{"operations": {"packed_attend": {"tuned": [{"shape": {}}]}}}, {"compute_capability": None}, {}]
)
def test_a_file_of_another_version_is_named(device, change):
    save("NVIDIA H200", 90, (LLAMA, packed(5)))
    path = tuning.path_of("NVIDIA H200")
    path.write_text(json.dumps(change) if change else "{")
    with pytest.raises(ValueError, match=r"nvidia-h200\.json .* run `python -m benchmarks\.tune`"):
        found()


def test_shipped_files_are_of_this_version():
    for path in tuning.TUNED.glob("*.json"):
        arch, tuned = tuning.read(path)
        assert arch >= 80
        assert tuned
