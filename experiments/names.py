"""The names of the methods with the step size at which a search begins, and the names of the geometries.

Settings are checked against these names; `methods` defines the methods.
"""

LEARNING_RATES: dict[str, float] = {
    "full": 3e-3,
    "full_muon": 2e-2,
    "full_heavy_ball": 0.3,
    "galore": 1e-2,
    "subspace_galore": 1e-2,
    "fira": 1e-2,
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
