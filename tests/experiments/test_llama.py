"""`experiments.llama` and `smollm2`: the decoder is Llama, with and without its cache, and reads its files right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from experiments import llama, smollm2
from experiments.labelled import installed
from experiments.task import DataError

SMALL = llama.LlamaConfig(d=24, layers=2, heads=6, kv_heads=2, hidden=40, vocabulary=50, theta=100.0)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 9))

pytestmark = pytest.mark.usefixtures("settings_of_a_user")


@pytest.fixture(scope="module")
def params(settings_of_a_user: None) -> dict:
    """Weights large enough that attention looks somewhere."""
    shapes = jax.eval_shape(llama.Llama(SMALL).init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(x.ndim == 1, 0.3, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def logits(params: dict) -> np.ndarray:
    return np.asarray(jax.jit(llama.Llama(SMALL).apply)({"params": params}, TOKENS))


def reference(params: dict, tokens: np.ndarray) -> np.ndarray:
    """Llama's logits of one text, query by query in float64, each pair of a head turned as a complex number."""
    c, size = SMALL, SMALL.head
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.epsilon) * scale

    def turned(x: np.ndarray, place: int) -> np.ndarray:
        pairs = x[: size // 2] + 1j * x[size // 2 :]
        pairs = pairs * np.exp(1j * place * c.theta ** (-2 * np.arange(size // 2) / size))
        return np.concatenate([pairs.real, pairs.imag])

    x = w["embed_tokens"]["embedding"][tokens]
    for i in range(c.layers):
        layer = w[f"layers_{i}"]
        kernel = {name: leaf["kernel"] for name, leaf in {**layer["self_attn"], **layer["mlp"]}.items()}
        y = norm(x, layer["input_layernorm"]["scale"])
        q, k, v = (y @ kernel[f"{name}_proj"] for name in "qkv")
        out = np.zeros_like(q)
        for head in range(c.heads):
            mine = slice(head * size, (head + 1) * size)
            shared = head * c.kv_heads // c.heads
            theirs = slice(shared * size, (shared + 1) * size)
            for t in range(len(tokens)):
                at = turned(q[t, mine], t)
                scores = np.array([at @ turned(k[s, theirs], s) for s in range(t + 1)]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                out[t, mine] = weights / weights.sum() @ v[: t + 1, theirs]
        x = x + out @ kernel["o_proj"]
        y = norm(x, layer["post_attention_layernorm"]["scale"])
        gate = y @ kernel["gate_proj"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ kernel["up_proj"])) @ kernel["down_proj"]
    return norm(x, w["norm"]["scale"]) @ w["embed_tokens"]["embedding"].T


def test_the_decoder_is_llama(params: dict, logits: np.ndarray) -> None:
    for tokens, row in zip(TOKENS, logits, strict=True):
        np.testing.assert_allclose(row, reference(params, tokens), rtol=1e-3, atol=1e-3)


def test_the_past_does_not_see_the_future(params: dict, logits: np.ndarray) -> None:
    changed = TOKENS.copy()
    changed[:, 5:] = (changed[:, 5:] + 7) % 50
    other = jax.jit(llama.Llama(SMALL).apply)({"params": params}, changed)
    np.testing.assert_allclose(other[:, :5], logits[:, :5], atol=1e-4)
    assert np.abs(other[:, 5:] - logits[:, 5:]).max(-1).min() > 1e-2


def test_a_cache_changes_no_logits(params: dict, logits: np.ndarray) -> None:
    """A start of four tokens at once, then one by one, with room left at the end."""
    model = llama.Llama(SMALL, cache=12)
    step = jax.jit(lambda variables, x, start: model.apply(variables, x, start, mutable=["cache"]))
    found, kept = step({"params": params}, TOKENS[:, :4], 0)
    np.testing.assert_allclose(found, logits[:, :4], atol=1e-4)
    for t in range(4, TOKENS.shape[1]):
        found, kept = step({"params": params, **kept}, TOKENS[:, t : t + 1], t)
        np.testing.assert_allclose(found[:, 0], logits[:, t], atol=1e-4)


def test_generation_takes_the_likeliest_token_also_with_an_adapter(params: dict) -> None:
    where = llama.is_layer_kernel
    base, delta = lro.adapters.init(jax.random.key(0), params, 2, kind="lora", where=where)
    delta = jax.tree.map(lambda x: x + 0.1, delta)
    model = llama.Llama(SMALL, cache=12)
    apply = lro.linen.apply(model)
    new = jax.jit(lambda v, x: llama.generate(apply, v, x, 3))({"params": base, "adapters": delta}, TOKENS[:, :5])
    tokens = np.concatenate([TOKENS[:, :5], new], 1)
    merged = lro.adapters.merge(base, delta)
    whole = jax.jit(llama.Llama(SMALL).apply)({"params": merged}, tokens)
    np.testing.assert_array_equal(new, whole[:, 4:-1].argmax(-1))


def test_rows_that_turn_together_are_put_half_a_head_apart(params: dict) -> None:
    """A file written as GGUF has it gives the parameters that it was written from."""
    config = SMALL

    def interleaved(kernel: np.ndarray, heads: int) -> np.ndarray:
        rows = np.asarray(kernel.T).reshape(heads, config.head, -1)
        half = config.head // 2
        return np.stack([rows[:, :half], rows[:, half:]], axis=2).reshape(-1, rows.shape[-1])

    file = {"token_embd.weight": params["embed_tokens"]["embedding"], "output_norm.weight": params["norm"]["scale"]}
    for i in range(config.layers):
        for path, theirs in smollm2.NAMES.items():
            leaf = params[f"layers_{i}"]
            for name in path:
                leaf = leaf[name]
            heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(path[-1])
            weight = leaf["scale"] if "scale" in leaf else leaf["kernel"].T
            file[f"blk.{i}.{theirs}.weight"] = interleaved(leaf["kernel"], heads) if heads else weight
    read = smollm2.decoder(lambda name: np.asarray(file[name]), config)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_names_of_layers_are_those_of_hugging_face() -> None:
    assert llama.module_name("layers_11/self_attn/q_proj/kernel", ()) == "model.layers.11.self_attn.q_proj"


@pytest.mark.slow
def test_smollm2_expects_english() -> None:
    """On text 2.7 nats a token; with the rows of queries and keys as in the file 4.6."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    try:
        installed(smollm2.PACKAGE)
    except DataError as error:
        pytest.skip(str(error))
    file, config = smollm2.installed_file(), llama.LlamaConfig()
    sentence = "The capital of France is Paris, a city on the river Seine, which is known for its museums and its food."
    tokenizer = smollm2.tokenizer(file)
    tokens = tokenizer.encode(sentence).ids
    assert tokenizer.decode(tokens) == sentence and len(tokens) < 30
    logits = jax.jit(llama.Llama(config).apply)({"params": smollm2.load(file, config)}, np.array([tokens[:-1]]))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits[0], jnp.array(tokens[1:])).mean()
    assert 1.5 < loss < 3.0
