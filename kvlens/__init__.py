"""The import name of the project: `kvlens.engine`, `kvlens.kernels`, `kvlens.ui`.

The folders stand at the top of the repository so that a reader sees the architecture at once. Python
must not see them there: a bare top-level `kernels` hides the Hugging Face package of that name, and
every transformers model then fails to import. So the repository root joins this package's path, and
nothing is ever imported as plain `engine` or `kernels`. An installed wheel holds the folders inside
this package already (`package-dir` in pyproject.toml) and the extra entry finds nothing to add.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "engine").is_dir() and (_root / "kernels").is_dir():
    __path__.append(str(_root))
