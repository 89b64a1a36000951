"""Names of layers in the models of transformers, for `module=` of `export` and `load`.

A map reads the number of the block and the layer's own name off the path of a kernel, in the names of Flax models that
are in use, and gives the one exact name of the layer in torch. A path that it does not know is refused.

- `bert`: `BertForSequenceClassification` and its relatives
- `llama`: `LlamaForCausalLM`, and others with its layers: Mistral, Qwen2, SmolLM
- `gpt2`: `GPT2LMHeadModel`
- `vit`, `vit_4`: `ViTForImageClassification` of transformers 5 and 4

Example:
  >>> import lowrank_optax as lro
  >>> lro.adapters.names.bert("encoder/layer_3/output/kernel")
  'bert.encoder.layer.3.attention.output.dense'
  >>> lro.adapters.names.llama("layers/attention/q/kernel", (7,))
  'model.layers.7.self_attn.q_proj'
"""

from __future__ import annotations

import dataclasses
import re

Layers = dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Names:
    """A callable of the path of a kernel and its index in a stack that returns the name of the layer.

    Attributes:
      model: what it is for, in messages.
      prefix: the name of the blocks, whose number follows.
      layers: for each name below a block the last parts of paths that mean it.
      why: what to add to the refusal of other paths.
    """

    model: str
    prefix: str
    layers: Layers
    why: str = ""

    def __call__(self, path: str, index: tuple[int, ...] = ()) -> str:
        """The name.

        Raises:
          ValueError: for a path without exactly one number of a block, or of no layer of the model.
        """
        parts = path.removesuffix("/kernel").split("/")
        known = [(len(end), end, name) for name, ends in self.layers.items() for end in map(_parts, ends)]
        found = [(n, name) for n, end, name in known if tuple(parts[-n:]) == end]
        if not found:
            ends = sorted(end for ends in self.layers.values() for end in ends)
            message = f"{path!r} is no layer of {self.model}, whose paths end in {', '.join(ends)}. {self.why}"
            raise ValueError(message.rstrip())
        length, name = max(found)
        numbers = [match[1] for part in parts[:-length] if (match := re.fullmatch(r"\D*?(\d+)", part))]
        numbers += [str(i) for i in index]
        if len(numbers) != 1:
            raise ValueError(f"{path!r} {index or ''} has {len(numbers)} numbers; one is needed, the block's")
        return f"{self.prefix}.{numbers[0]}.{name}"

    def below(self, prefix: str) -> Names:
        """The same names in a model that has its blocks elsewhere.

        Args:
          prefix: the name of the blocks without their number, `"encoder.layer"` for a bare `BertModel`, say.

        Returns:
          The map.

        Example:
          >>> import lowrank_optax as lro
          >>> lro.adapters.names.bert.below("encoder.layer")("encoder/layer_3/query/kernel")
          'encoder.layer.3.attention.self.query'
        """
        return dataclasses.replace(self, prefix=prefix)


def _parts(end: str) -> tuple[str, ...]:
    return tuple(end.split("/"))


_QKV = {name: (name, name[0], f"{name[0]}_proj") for name in ("query", "key", "value")}
_OUT, _UP, _DOWN = ("output", "out", "o", "o_proj"), ("up", "fc1", "up_proj"), ("down", "fc2", "down_proj")

bert = Names(
    "BERT",
    "bert.encoder.layer",
    {
        **{f"attention.self.{name}": ends for name, ends in _QKV.items()},
        "attention.output.dense": ("attention/output/dense", *_OUT),
        "intermediate.dense": ("intermediate/dense", *_UP),
        "output.dense": ("output/dense", *_DOWN),
    },
)

vit = Names(
    "ViT",
    "vit.layers",
    {
        **{f"attention.{name[0]}_proj": ends for name, ends in _QKV.items()},
        "attention.o_proj": ("attention/output/dense", *_OUT),
        "mlp.fc1": ("intermediate/dense", *_UP),
        "mlp.fc2": ("output/dense", *_DOWN),
    },
)

vit_4 = Names(
    "ViT in transformers 4",
    "vit.encoder.layer",
    {
        **{f"attention.attention.{name}": ends for name, ends in _QKV.items()},
        "attention.output.dense": ("attention/output/dense", *_OUT),
        "intermediate.dense": ("intermediate/dense", *_UP),
        "output.dense": ("output/dense", *_DOWN),
    },
)

llama = Names(
    "Llama",
    "model.layers",
    {
        **{f"self_attn.{name[0]}_proj": ends for name, ends in _QKV.items()},
        "self_attn.o_proj": _OUT,
        "mlp.gate_proj": ("gate_proj", "gate"),
        "mlp.up_proj": _UP,
        "mlp.down_proj": _DOWN,
    },
)

gpt2 = Names(
    "GPT-2",
    "transformer.h",
    {
        "attn.c_attn": ("c_attn", "qkv"),
        "attn.c_proj": ("attn/c_proj", *_OUT),
        "mlp.c_fc": ("c_fc", *_UP),
        "mlp.c_proj": ("mlp/c_proj", *_DOWN),
    },
    "It keeps query, key and value in one kernel c_attn, so changes of three kernels have no name.",
)
