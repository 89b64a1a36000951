"""The layout of trees for the mathematics of one matrix: groups, batches, fusion, meshes."""

from lowrank_optax.layout.groups import Layout as Layout
from lowrank_optax.layout.kernels import map_coordinates as map_coordinates
from lowrank_optax.layout.kernels import map_kernel as map_kernel
from lowrank_optax.layout.kernels import map_matrices as map_matrices
from lowrank_optax.layout.kernels import map_numbers as map_numbers
from lowrank_optax.layout.kernels import map_replicated as map_replicated
