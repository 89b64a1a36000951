"""Strict settings for the whole suite; they must hold before the first JAX computation."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when JAX is imported

from collections.abc import Iterator

import hypothesis
import jax
import pytest

# Read by the first computation. The suite compiles far more than it computes: without LLVM's optimisations it takes
# half the time, and a quarter with the older emitters, which the versions from 0.12 on no longer have. The older ones
# also take a fifth less for a program in one piece than for one in 32 pieces.
older = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
flags = "--xla_backend_optimization_level=0" + (older if jax.__version_info__ < (0, 12) else "")
os.environ.setdefault("XLA_FLAGS", flags)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A first example compiles, so no deadline; in CI every run draws the same examples.
hypothesis.settings.register_profile("suite", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="module")
def settings_of_a_user() -> Iterator[None]:
    """JAX as it is outside the suite: single precision, ranks promoted."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_modules() -> Iterator[None]:
    """Compiled programs of hundreds of tests in one process crashed the compiler of jax 0.12."""
    yield
    if len(jax.devices()[0].client.live_executables()) > 500:  # Fewer may serve the next module too.
        jax.clear_caches()
