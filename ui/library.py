"""The recorded runs that come with the page, and what a visitor exports or brings along."""

import base64
import json
import uuid
from pathlib import Path

from kvlens.ui import text
from kvlens.ui.recording import MAX_FILE_BYTES, Recording, RecordingFault, from_bytes, to_bytes, to_csv

RUNS_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "runs"
SUFFIX = ".json.gz"


class Library:
    """Recorded runs by file name, read when first asked for. The first by name is painted at first."""

    def __init__(self, folder: Path = RUNS_FOLDER) -> None:
        self._files = {path.name.removesuffix(SUFFIX): path for path in sorted(folder.glob(f"*{SUFFIX}"))}
        self._read: dict[str, Recording] = {}

    def names(self) -> list[str]:
        return list(self._files)

    def get(self, name: str) -> Recording:
        """Raises: RecordingFault if there is no such run or its file is damaged."""
        if name not in self._files:
            raise RecordingFault(text.UNKNOWN_RUN)
        if name not in self._read:
            self._read[name] = from_bytes(self._files[name].read_bytes())
        return self._read[name]

    def first(self) -> Recording | None:
        for name in self._files:
            try:
                return self.get(name)
            except RecordingFault:
                continue
        return None

    def entries(self) -> list[dict[str, str]]:
        """What the menu shows: a name such as `1-short-story` reads `short story`."""
        return [{"id": name, "label": " ".join(name.split("-")[1:]) or name} for name in self._files]


def label(recording: Recording) -> str:
    return text.recorded_label(recording.log.model, recording.log.device, recording.date)


def export(recording: Recording, kind: str) -> str:
    """A download as the page takes it: JSON of name, type and base64 data."""
    name = f"kvlens-run-{recording.log.run_id}"
    if kind == "csv":
        name, mime, data = f"{name}.csv", "text/csv", to_csv(recording).encode()
    else:
        name, mime, data = f"{name}{SUFFIX}", "application/gzip", to_bytes(recording)
    content = {"name": name, "mime": mime, "data": base64.b64encode(data).decode(), "nonce": uuid.uuid4().hex}
    return json.dumps(content)


def import_upload(data: object) -> Recording:
    """A run out of what the page uploaded. Raises: RecordingFault with a sentence."""
    if isinstance(data, str) and len(data) > 4 * MAX_FILE_BYTES // 3 + 4:
        raise RecordingFault(text.RUN_TOO_LARGE.format(limit=MAX_FILE_BYTES // 2**20))
    try:
        raw = base64.b64decode(data, validate=True)
    except (TypeError, ValueError) as error:
        raise RecordingFault("it did not arrive whole.") from error
    return from_bytes(raw)
