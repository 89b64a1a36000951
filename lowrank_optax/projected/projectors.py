"""Projectors, the second argument of `subspace`: `lowrank_optax.projectors.svd()` and others."""

from lowrank_optax.projected.base import Projector as Projector
from lowrank_optax.projected.base import Refreshing as Refreshing
from lowrank_optax.projected.dictionaries import blocks as blocks
from lowrank_optax.projected.dictionaries import coordinates as coordinates
from lowrank_optax.projected.dictionaries import dct as dct
from lowrank_optax.projected.dictionaries import rows as rows
from lowrank_optax.projected.moving import coap as coap
from lowrank_optax.projected.moving import dion as dion
from lowrank_optax.projected.moving import grassmann as grassmann
from lowrank_optax.projected.moving import oja as oja
from lowrank_optax.projected.moving import power as power
from lowrank_optax.projected.spans import gaussian as gaussian
from lowrank_optax.projected.spans import orthogonal as orthogonal
from lowrank_optax.projected.spans import randomized as randomized
from lowrank_optax.projected.spans import svd as svd
from lowrank_optax.projected.spans import switch as switch
