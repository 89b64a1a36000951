"""Bytes or tokens to train on: the running Python's standard library, or any text file or folder."""

import dataclasses
import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from experiments.task import DataError

HOLD_OUT = 20  # every 20th file, or the last 20th of too few files, is validation
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two disjoint strings of bytes or tokens and the place they came from."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    unit: str = "bytes"


def load(path: str | None = None) -> Corpus:
    """Read `path`, a text file or a folder of them; None is the standard library's `*.py`."""
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        return _split(f"standard library of Python {platform.python_version()}", _read_folder(root, ".py", EXCLUDED))
    root = Path(path).expanduser()
    if root.is_dir():
        files = _read_folder(root)
    elif root.exists():
        files = [_read(root)]
    else:
        raise DataError(f"--data {path}: no such file or folder")
    return _split(path, files)


def tokenised(corpus: Corpus, tokenizer: Any) -> Corpus:
    """The bytes of a corpus as the tokens of a tokenizer of the package `tokenizers`."""
    texts = (part.tobytes().decode(errors="replace") for part in (corpus.train, corpus.validation))
    return Corpus(corpus.name, *(np.array(tokenizer.encode(text).ids, np.int32) for text in texts), unit="tokens")


def batch(data: np.ndarray, seed: int, step: int, size: int, context: int) -> np.ndarray:
    """Random windows, (size, context + 1) bytes or tokens: a function of seed and step alone."""
    starts = np.random.default_rng([seed, step]).integers(0, len(data) - context, size)
    return data[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def validation_windows(corpus: Corpus, count: int, context: int) -> np.ndarray:
    """Evenly spaced windows of the validation part, the same for every run."""
    data = corpus.validation
    starts = np.linspace(0, len(data) - context - 1, count).astype(np.int64)
    return data[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def check_length(corpus: Corpus, context: int) -> None:
    """Refuse a corpus that does not hold one window in each part."""
    shortest = min(len(corpus.train), len(corpus.validation))
    if shortest < context + 1:
        raise DataError(
            f"--data {corpus.name}: {len(corpus.train)} {corpus.unit} to train and "
            f"{len(corpus.validation)} to validate, but a window is {context + 1}"
        )


def _read_folder(root: Path, suffix: str = "", excluded: set[str] = frozenset()) -> list[bytes]:
    """Contents of all text files below `root`, sorted by path; hidden and binary ones left out."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in excluded and not f.startswith(".")]
        paths += [Path(folder, n) for n in names if n.endswith(suffix) and not n.startswith(".")]
    paths.sort(key=lambda p: p.relative_to(root).as_posix())
    contents = [_read(path) for path in paths if path.is_file()]
    return [text for text in contents if text and b"\0" not in text]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"--data {path}: {error.strerror or error}") from None


def _split(name: str, files: list[bytes]) -> Corpus:
    if not any(files):
        raise DataError(f"--data {name}: no text found there")
    if any(b"\0" in text for text in files):
        raise DataError(f"--data {name}: not a text file (it holds NUL bytes)")
    if len(files) >= HOLD_OUT:
        held = files[HOLD_OUT - 1 :: HOLD_OUT]
        kept = [text for i, text in enumerate(files) if i % HOLD_OUT != HOLD_OUT - 1]
        train, validation = b"\n".join(kept), b"\n".join(held)
    else:
        whole = b"\n".join(files)
        cut = len(whole) - len(whole) // HOLD_OUT
        train, validation = whole[:cut], whole[cut:]
    return Corpus(name, np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8))
