"""Metrics as JSON lines, the settings in the first line and then one record a line; as event files if asked for."""

import json
import math
from pathlib import Path
from typing import Any

from experiments.task import DataError


class Metrics:
    """Appends records to `path`; those after step `start` are dropped first, as a resume needs.

    A folder for `events` gets the numbers of the records as event files of TensorBoard too.
    """

    def __init__(self, path: Path, header: dict[str, Any], start: int, events: Path | None = None) -> None:
        kept = [r for r in read(path)[1] if r["step"] <= start] if start else []
        replace(path, "".join(map(_line, (header, *kept))))
        self._file = path.open("a", encoding="utf-8")
        self._events = _event_writer(events, start) if events else None

    def write(self, **record: Any) -> None:
        """Write one line at once, so that a killed run keeps its records."""
        self._file.write(_line(record))
        self._file.flush()
        if self._events:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, record["step"])
            self._events.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def _event_writer(folder: Path, start: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise DataError("--tensorboard: pip install tensorboardX") from None
    return SummaryWriter(str(folder), purge_step=start)


def replace(path: Path, text: str) -> None:
    """Put a text in the place of a file at once: a kill leaves the old one or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings and the records of one run."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header, *records = (json.loads(line) for line in lines)
    return header, records


def _line(record: dict[str, Any]) -> str:
    return json.dumps({k: _plain(v) for k, v in record.items()}) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(x) for x in value]
    # JSON has no NaN: a diverged loss is null.
    return None if isinstance(value, float) and not math.isfinite(value) else value
