"""What the start leaves out is there again afterwards."""

import subprocess
import sys


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_start_loads_no_compiler_and_leaves_no_trace():
    found = run(
        "import sys\n"
        "from kvlens.engine import light_imports\n"
        "light_imports.load()\n"
        "print('torch._dynamo' in sys.modules, [name for name in light_imports.UNUSED if name in sys.modules])\n"
        "import torch\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())\n"
    )
    assert found.splitlines() == ["False []", "2.0"]


def test_a_model_is_loaded_without_the_compiler_and_distributed_tensors(tiny_folder):
    found = run(
        "import sys\n"
        "from kvlens.engine import light_imports\n"
        "light_imports.load()\n"
        "from kvlens.engine.model import load_model\n"
        "import torch\n"
        f"model = load_model({tiny_folder!r}, device='cpu')\n"
        "unused = [name for name in ('torch._dynamo', 'torch.distributed.tensor') if name in sys.modules]\n"
        "print(unused, model.short_step is not None, torch.distributed.is_available())\n"
    )
    assert found.splitlines()[-1] == "[] True True"
