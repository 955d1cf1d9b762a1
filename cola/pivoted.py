"""Linear bottlenecks that store r·(in + out - r) numbers: r outputs are the bottleneck itself.

    z = A·x          y_i = z_j where i is the j-th pivot; the other outputs are B·z

Every product of two factors, rank r, can be written so (Pivoting Factorization, arXiv 2501.19090):
choose r of its rows that are linearly independent, the pivots; they are A, and every other row is a
combination of them. Nothing is lost, and r² numbers are saved: two factors of 576 x 576 are smaller
than the matrix up to rank 287, this form up to rank 575.
"""

from __future__ import annotations

import torch
from torch import nn

from lowline.cola.low_rank import LowRankLinear
from lowline.errors import LowlineError


class PivotedLinear(LowRankLinear):
    """A low-rank layer, `A.weight` (r, in) and `B.weight` (out - r, r), without σ.

    `is_pivot` (out) is 1 where an output is a pivot, else 0: a buffer of the weights' dtype.

    Raises:
        ValueError: a rank that is not from 1 to `out_features` - 1.
    """

    is_pivot: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if not 1 <= rank < out_features:
            raise LowlineError(f"rank = {rank}; with pivots it lies from 1 to {out_features - 1}")
        A = nn.Linear(in_features, rank, bias, device, dtype)
        B = nn.Linear(rank, out_features - rank, bias, device, dtype)
        self._set_factors(A, B, "identity")
        first = (torch.arange(out_features, device=device) < rank).to(A.weight.dtype)
        self.register_buffer("is_pivot", first)
        self.reset_parameters()

    @property
    def out_features(self) -> int:
        return self.rank + self.B.out_features

    def expand(self, z: torch.Tensor, previous: torch.Tensor | None = None) -> torch.Tensor:
        """Return y for a bottleneck z of (..., r)."""
        chosen = self.is_pivot > 0
        place = torch.where(chosen, chosen.cumsum(0) - 1, self.rank - 1 + (~chosen).cumsum(0))
        return torch.cat([z, self.B(z)], dim=-1).index_select(-1, place)


@torch.no_grad()
def pivoted(
    a_RI: torch.Tensor, b_OR: torch.Tensor, bias_O: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of a `PivotedLinear` that computes B·A·x + bias, by their names.

    Pivots are those of an LU decomposition of B's orthonormal basis, which keeps the combinations
    of them small. It is computed in float64; the results have A's dtype.
    """
    rank, b = a_RI.shape[0], b_OR.double()
    basis = torch.linalg.qr(b).Q
    permutation_OO = torch.linalg.lu(basis).P
    chosen = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    chosen[permutation_OO.argmax(dim=0)[:rank]] = True
    rest = torch.linalg.solve(basis[chosen].T, basis[~chosen].T).T
    tensors = {
        "A.weight": b[chosen] @ a_RI.double(),
        "B.weight": rest,
        "is_pivot": chosen,
    }
    if bias_O is not None:
        bias = bias_O.double()
        tensors |= {"A.bias": bias[chosen], "B.bias": bias[~chosen] - rest @ bias[chosen]}
    return {name: tensor.to(a_RI.dtype) for name, tensor in tensors.items()}
