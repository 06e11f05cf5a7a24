"""Imports go one way, no file grows too long, and the installed names are those of the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("engine", "kernels", "ui")
LONGEST_FILE = 420


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as a wheel lays them out: `kvlens/engine` and so on."""
    target = tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "kvlens", target / "kvlens")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / "kvlens" / folder)
        (target / "kvlens" / folder / "__init__.py").touch()
    return target


def test_imports_go_one_way(installed):
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--config", ROOT / "pyproject.toml", "--no-cache"],
        cwd=installed, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_linter_sees_a_broken_rule(installed, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(installed, broken)
    (broken / "kvlens" / "kernels" / "wrong.py").write_text("import kvlens.engine.cache\n")
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--config", ROOT / "pyproject.toml", "--no-cache"],
        cwd=broken, env=os.environ | {"PYTHONPATH": str(broken)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert "kvlens.kernels.wrong" in result.stdout


def test_engine_runs_from_an_installed_layout_without_gradio_and_plotly(installed):
    code = (
        "import sys; sys.modules['gradio'] = sys.modules['plotly'] = None\n"
        "import kvlens.engine.compare, kvlens.engine.registry as registry\n"
        f"assert kvlens.engine.compare.__file__.startswith({str(installed)!r})\n"
        "print(*registry.available())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=installed, env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["dense", "csr", "kivi"]


def test_packages_of_the_wheel_are_all_there_are():
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml with Python 3.11 or newer")
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(("kvlens", *path.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert declared == found | {"kvlens"}


@pytest.mark.parametrize("folder", ["engine", "kernels", "ui", "benchmarks"])
def test_files_do_one_thing(folder):
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert not long
