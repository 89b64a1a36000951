"""Low-rank optimizer state for dense weights: GaLore and its relatives as one transformation.

`subspace` is a sibling of the loop of `fixed_rank` and no geometry of it, for three reasons. It is linear after the
inner transformation, so it scales gradients like `optax.scale_by_adam` and needs neither parameters nor a learning
rate, while a geometry returns `new - old` and has the learning rate inside. Its bases follow gradients in time, with
schedules, keys and errors of their own, while a frame of a geometry follows from a weight and one gradient. And a leaf
that is projected has another shape for the inner transformation than for the user, without a class of coordinates.
The mathematics of one matrix, `moments`, `axes`, meshes and the guard are shared.
"""

from lowrank_optax.projected import carry as carry
from lowrank_optax.projected import projectors as projectors
from lowrank_optax.projected import refresh as refresh
from lowrank_optax.projected import residuals as residuals
from lowrank_optax.projected.aliases import adarankgrad as adarankgrad
from lowrank_optax.projected.aliases import apollo as apollo
from lowrank_optax.projected.aliases import apollo_mini as apollo_mini
from lowrank_optax.projected.aliases import coap as coap
from lowrank_optax.projected.aliases import dct_adam as dct_adam
from lowrank_optax.projected.aliases import dion as dion
from lowrank_optax.projected.aliases import fira as fira
from lowrank_optax.projected.aliases import flora as flora
from lowrank_optax.projected.aliases import frugal as frugal
from lowrank_optax.projected.aliases import galore as galore
from lowrank_optax.projected.aliases import golore as golore
from lowrank_optax.projected.aliases import ldadam as ldadam
from lowrank_optax.projected.aliases import online_subspace as online_subspace
from lowrank_optax.projected.aliases import q_galore as q_galore
from lowrank_optax.projected.aliases import subtrack as subtrack
from lowrank_optax.projected.aliases import sumo as sumo
from lowrank_optax.projected.aliases import trion as trion
from lowrank_optax.projected.mofasgd import mofasgd as mofasgd
from lowrank_optax.projected.mofasgd import scale_by_factored_momentum as scale_by_factored_momentum
from lowrank_optax.projected.pieces import correct_bias as correct_bias
from lowrank_optax.projected.pieces import delayed_ema as delayed_ema
from lowrank_optax.projected.pieces import newton_schulz as newton_schulz
from lowrank_optax.projected.pieces import normalize_rows as normalize_rows
from lowrank_optax.projected.pieces import polar as polar
from lowrank_optax.projected.pieces import scale_by_plain_adam as scale_by_plain_adam
from lowrank_optax.projected.ranks import energy as energy
from lowrank_optax.projected.resize import resize as resize
from lowrank_optax.projected.snsm import scale_by_subset_norm as scale_by_subset_norm
from lowrank_optax.projected.snsm import snsm as snsm
from lowrank_optax.projected.storage import int4 as int4
from lowrank_optax.projected.transformation import SubspaceState as SubspaceState
from lowrank_optax.projected.transformation import subspace as subspace
