"""Published methods as optimizers: `subspace` with the options and the defaults of each paper.

All return an Optax transformation with the learning rate inside. Other options go to
`subspace`, which documents them: `where`, `side`, `projector`, `basis_dtype`, `ordinary`, `seed` and others. The
default `refresh` and `rank` suit the authors' language models; short runs need a shorter period.
"""

from lowrank_optax.projected.adam_and_rest import apollo as apollo
from lowrank_optax.projected.adam_and_rest import apollo_mini as apollo_mini
from lowrank_optax.projected.adam_and_rest import dct_adam as dct_adam
from lowrank_optax.projected.adam_and_rest import fira as fira
from lowrank_optax.projected.adam_and_rest import frugal as frugal
from lowrank_optax.projected.adam_and_rest import ldadam as ldadam
from lowrank_optax.projected.adam_and_rest import subtrack as subtrack
from lowrank_optax.projected.adam_inside import adarankgrad as adarankgrad
from lowrank_optax.projected.adam_inside import coap as coap
from lowrank_optax.projected.adam_inside import galore as galore
from lowrank_optax.projected.adam_inside import golore as golore
from lowrank_optax.projected.adam_inside import online_subspace as online_subspace
from lowrank_optax.projected.adam_inside import q_galore as q_galore
from lowrank_optax.projected.momentum_inside import dion as dion
from lowrank_optax.projected.momentum_inside import flora as flora
from lowrank_optax.projected.momentum_inside import sumo as sumo
from lowrank_optax.projected.momentum_inside import trion as trion
