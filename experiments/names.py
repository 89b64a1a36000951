"""The names of the methods with the step size at which a search begins, and the names of the geometries.

Settings are checked against these names; `methods` defines the methods.
"""

LEARNING_RATES: dict[str, float] = {
    "full": 3e-3,
    "full_muon": 2e-2,
    "full_heavy_ball": 0.3,
    "galore": 1e-2,
    "subspace_galore": 2e-2,
    "fira": 2e-2,
    "apollo": 1e-2,
    "apollo_mini": 1e-2,
    "frugal": 3e-3,
    "ldadam": 3e-3,
    "adarankgrad": 1e-2,
    "lora": 3e-3,
    "lora_muon": 2e-2,
    "factors": 1.5e-3,
    "factors_muon": 2e-2,
    "factors_heavy_ball": 0.3,
    "naive": 3e-3,
    "naive_heavy_ball": 0.3,
    "lowrank_adam": 6e-3,
    "lowrank_heavy_ball": 0.3,
    "lowrank_muon": 2e-2,
    "adapter": 3e-3,
}

GEOMETRIES = ("balanced", "tangent", "coefficient", "galerkin")

# The methods on the manifold, each with its geometry unless a run names another.
DEFAULT_GEOMETRY: dict[str, str] = {
    "lowrank_adam": "balanced",
    "lowrank_heavy_ball": "tangent",
    "lowrank_muon": "balanced",
    "adapter": "tangent",
}

# The methods in words, for pictures.
WORDS: dict[str, str] = {
    "full": "dense AdamW",
    "full_muon": "dense Muon",
    "full_heavy_ball": "dense heavy ball",
    "galore": "optax.contrib.galore",
    "subspace_galore": "GaLore",
    "fira": "Fira",
    "apollo": "APOLLO",
    "apollo_mini": "APOLLO-Mini",
    "frugal": "FRUGAL",
    "ldadam": "LDAdam",
    "adarankgrad": "AdaRankGrad",
    "adapter": "adapter",
    "lora": "LoRA, AdamW",
    "lora_muon": "LoRA, Muon",
    "factors": "plain A B, AdamW",
    "factors_muon": "plain A B, Muon",
    "factors_heavy_ball": "plain A B, heavy ball",
    "naive": "plain U S V, AdamW",
    "naive_heavy_ball": "plain U S V, heavy ball",
    "lowrank_adam": "low-rank Adam",
    "lowrank_heavy_ball": "low-rank heavy ball",
    "lowrank_muon": "low-rank Muon",
}

ADAPTERS: dict[str, str] = {
    "adapter:kind=core": "LoRA-XS",
    "adapter:kind=dora": "DoRA",
    "adapter:kind=lora:rule=plus": "LoRA+",
    "adapter:kind=lora:start=pissa": "PiSSA",
    "adapter:kind=lora:alpha=16:scale=alpha/sqrt(r)": "rank-stabilised LoRA",
}


def in_words(label: str) -> str:
    """A method with settings, as `lowrank_adam:blocks=16`, in words, without step sizes and scales of the start."""
    if label in ADAPTERS:
        return ADAPTERS[label]
    method, *settings = label.split(":")
    words = {"blocks": "{0} x {0} blocks", "d": "width {0}", "geometry": "{0}", "max_rank": "at most {0} columns"}
    pairs = [pair.split("=") for pair in settings]
    rest = [words.get(name, f"{name.replace('_', ' ')} {{0}}").format(x) for name, x in pairs if name not in UNSEEN]
    return ", ".join([WORDS.get(method, method), *rest])


UNSEEN = ("lr", "init_scale", "dense_scale")
