r"""Adapters: small trained changes of frozen kernels, :math:`W = f(W_0, \delta)`.

**Two trees.** `params, delta = init(key, params, rank, kind=...)` leaves the parameters as they are and makes a tree
`delta` with one change for each chosen kernel. Gradients are taken with respect to `delta`, and the optimizer gets
`delta`: nothing of the base can reach it, neither a gradient nor a moment nor a copy. The base may be in bfloat16 or
another form; a layer computes :math:`x W_0 + x D` part by part and never forms :math:`W_0 + D`.

**Four functions make a kind** (`Change`): `make` draws a change, `apply` multiplies a layer's input with it, `dense`
says which kernel it stands for, `labels` which of its arrays are trained. `apply` sees the layer as a function of its
kernel, so one kind runs in every layer of Flax, in `lowrank_optax.einsum` and in `x @ W`.

**Four independent axes.**

| kind | W | trained numbers |
|---|---|---|
| `"lowrank"` | `W0 + s U S V^T`, kept on its manifold by the optimizers of this package | `r (m + n + r)` |
| `"lora"` | `W0 + s A B` | `r (m + n)` |
| `"dora"`, `magnitude(kind)` | columns `m_j V_j / norm(V_j)` with `V = W0 + s A B` | `r (m + n) + n` |
| `"allora"` | `W0 + s A B`, gradients shrink for outputs that have moved | `r (m + n)` |
| `"adalora"` | `W0 + s A diag(E) B`, for `optimizer(..., rank=budget(...))` | `r (m + n + 1)` |
| `"delora"` | `W0 + lam / r diag(w) A diag(1 / (norm(a) norm(b))) B`, w the row norms of W0 | `r (m + n) + 1` |
| `"core"` | `W0 + s U C V^T`, U and V frozen singular vectors of W0 (LoRA-XS, LoRA-SB) | `r^2` |
| `"svfit"` | `We + U diag(sigma) V^T`, the r largest singular values of W0 | `r` |
| `"shira"` | `W0 + S`, S with `r (m + n)` entries at fixed positions | `r (m + n)` |
| `"rosa"` | `W0 + s A B + S`, S with k such entries | `r (m + n) + k` |
| `"vera"` | `W0 + A diag(d) B^T diag(b)`, A and B random and shared by all layers | `n + r` |
| `"randlora"` | `W0 + s sum_k lam_k b_k (a_k o gamma_k)^T`, random and shared, l = min(m, n) | `(r + l) l / r` |
| `"vblora"` | `W0 + A B` of mixtures of h trained vectors of length b, a bank | `h (m + n) r / b`, `h b` once |
| `"nola"` | `W0 + s A B`, A and B combinations of k random matrices, shared | `2 k` |
| `"loha"` | `W0 + s (A1 B1) o (A2 B2)` | `2 r (m + n)` |
| `"hira"` | `W0 + s W0 o (A B)` | `r (m + n)` |
| `"lokr"` | `W0 + s kron(C, A B)` | `m1 n1 + r (m2 + n2)` |
| `"loretta"` | `W0 + s A B`, tensor trains, `m = m1 m2`, `n = n1 n2` | `r (m1 + r m2 + r n1 + n2)` |
| `"gralora"` | `W0 + s D`, D a k x k grid of pairs of rank `r / k` | `r (m + n)` |
| `"miss"` | `W0 + s E` with the r rows of E again and again | `r n` |
| `"c3a"` | `W0 + D`, D of circulant r x r blocks | `m n / r` |
| `"fourier"` | `W0 + s Re ifft2(F)` with r entries in F | `r` |
| `"hra"` | `H_r ... H_1 W0`, reflections of the inputs | `r m` |
| `"oft"`, `"oft_neumann"` | `diag(R_1, R_2, ...) W0`, r x r rotations by Cayley's map or a series | `m (r - 1) / 2` |
| `"boft"` | `B_f ... B_1 W0 diag(s)`, block rotations between butterfly permutations | `f m r + n` |

`variant(kind, ...)` sets what a kind has beside its rank. Starts: `"zero"`, `"pissa"`, `"olora"`, `"orthogonal"`,
`gradient(grads)`, `activation(inputs)`, and `sign_step(grads)` of `"core"`. Scales: `"alpha/r"`, `"alpha/sqrt(r)"`,
`"none"`; the scale is an array in `delta` that is not trained, so that a rank may change and the function does not.
Rules of `optimizer`: `"plain"`, `"plus"`, `"precondition"`, `"pro"`, `"frozen_a"`, `"muon"`, `"rite"`, `"manifold"`.
Between steps: `restart`, `forget`, `switch`.
"""

from lowrank_optax.adapters import names
from lowrank_optax.adapters.allocate import Allocation, budget
from lowrank_optax.adapters.allora import ALLoRA
from lowrank_optax.adapters.blockwise import C3A, GraLoRA, MiSS
from lowrank_optax.adapters.butterfly import BOFT, OFT, NeumannOFT
from lowrank_optax.adapters.change import Adapted, Change
from lowrank_optax.adapters.components import Components, DeLoRA, orthogonality
from lowrank_optax.adapters.core import Core, SingularValues
from lowrank_optax.adapters.create import init, magnitude, variant
from lowrank_optax.adapters.files import export, load
from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.lowrank import LowRankChange
from lowrank_optax.adapters.magnitude import Magnitude
from lowrank_optax.adapters.muon import scale_by_muon
from lowrank_optax.adapters.nola import NOLA, RandomBases
from lowrank_optax.adapters.quantized import GroupQuantized, Quantized, quantize
from lowrank_optax.adapters.randlora import RandLoRA, RandomPairs
from lowrank_optax.adapters.request import Request
from lowrank_optax.adapters.restart import forget, restart, restarts, switch
from lowrank_optax.adapters.rite import scale_by_rite
from lowrank_optax.adapters.rotation import Householder
from lowrank_optax.adapters.rules import optimizer
from lowrank_optax.adapters.shared import Bank, VeRA
from lowrank_optax.adapters.sparse import Entries, Sparse
from lowrank_optax.adapters.starts import activation, gradient, sign_step
from lowrank_optax.adapters.structured import Fourier, HiRA, LoHa, LoKr
from lowrank_optax.adapters.tensor_train import TensorTrain
from lowrank_optax.adapters.trees import add, as_lora, attach, labels, merge, unmerge
from lowrank_optax.adapters.vblora import VBLoRA, VectorBank

__all__ = [
    "BOFT",
    "C3A",
    "NOLA",
    "OFT",
    "ALLoRA",
    "Adapted",
    "Allocation",
    "Bank",
    "Change",
    "Components",
    "Core",
    "DeLoRA",
    "Entries",
    "Fourier",
    "GraLoRA",
    "GroupQuantized",
    "HiRA",
    "Householder",
    "LoHa",
    "LoKr",
    "LoRA",
    "LowRankChange",
    "Magnitude",
    "MiSS",
    "NeumannOFT",
    "Quantized",
    "RandLoRA",
    "RandomBases",
    "RandomPairs",
    "Request",
    "SingularValues",
    "Sparse",
    "TensorTrain",
    "VBLoRA",
    "VeRA",
    "VectorBank",
    "activation",
    "add",
    "as_lora",
    "attach",
    "budget",
    "export",
    "forget",
    "gradient",
    "init",
    "labels",
    "load",
    "magnitude",
    "merge",
    "names",
    "optimizer",
    "orthogonality",
    "quantize",
    "restart",
    "restarts",
    "scale_by_muon",
    "scale_by_rite",
    "sign_step",
    "switch",
    "unmerge",
    "variant",
]
