"""Effective rank of activations: the observation that CoLA stands on, as a measurement.

Let X be the n x d matrix of one activation over n tokens, with singular values σ_1 ≥ σ_2 ≥ ... Then

    r(α) = min { k : Σ_{i≤k} σ_i² / Σ_i σ_i² ≥ α },          α = 0.95 unless told otherwise

is the number of directions that hold the fraction α of its energy (CoLA, arXiv 2502.10940,
section 3.1). σ_i² are the eigenvalues of the d x d Gram matrix XᵀX, which is summed in float64
batch by batch: X is never held, and the ranks of a data-parallel group add up to the same sum.

Left out: X is not centred, so a large constant component counts as one direction, and n tokens show
at most n directions: take several times d of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor

from lowline.cola.low_rank import LowRankLinear
from lowline.errors import LowlineError

Which = Literal["bottleneck", "input", "output"]

_WRAPPERS = re.compile(r"(?:_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")
_IN_A_LAYER = re.compile(r"(?:^|\.)\d+\.")  # a numbered layer: neither embedding nor head


def effective_rank(gram: torch.Tensor, alpha: float = 0.95) -> int:
    """r(α) of the activations X whose Gram matrix XᵀX (d, d) is given; 0 where X is zero.

    Raises:
        ValueError: `gram` is not square or not finite, or α is not in (0, 1).
    """
    if not 0.0 < alpha < 1.0:
        raise LowlineError(f"alpha = {alpha}; the fraction of energy to keep lies between 0 and 1")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise LowlineError(f"the Gram matrix XᵀX is square; this one is {tuple(gram.shape)}")
    if not gram.isfinite().all():
        raise LowlineError("the activations overflowed: their Gram matrix holds inf or nan")
    energy = torch.linalg.eigvalsh(gram.double()).clamp(min=0).flip(0).cumsum(0)
    if energy[-1] == 0:
        return 0
    return int((energy < alpha * energy[-1]).sum()) + 1


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear map inside a numbered layer of any decoder, a low-rank one as one.

    Names are the model's own, without the wrappers of checkpointing and compilation.
    """
    found: dict[str, nn.Module] = {}
    factors: set[nn.Module] = set()
    for name, module in model.named_modules():  # a parent comes before its children
        if not _IN_A_LAYER.search(name) or module in factors:
            continue
        if isinstance(module, LowRankLinear):
            factors |= {module.A, module.B}
        elif not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            continue
        found[_WRAPPERS.sub("", name)] = module
    return found


class ActivationRanks:
    """Watches a model's activations while it runs and tells their effective ranks.

        with torch.no_grad(), ActivationRanks(model) as seen:
            model(batch)
        seen.ranks()  # {"layers.0.attention.qkv_linear.wq": 57, ...}

    Any number of batches may run inside; compiled blocks run eagerly meanwhile. Memory: d² float64
    numbers for each watched activation.

    Args:
        model: the training body, a Hugging Face model, or any other.
        which: "bottleneck" is z = A·x of the low-rank layers, before σ. "input" and "output" are
            those of every projection, low-rank or dense.
        names: the projections to watch, by their names in `projections(model)`; default: all.

    Raises:
        ValueError: an unknown `which` or name, or nothing to watch.
    """

    def __init__(
        self, model: nn.Module, which: Which = "bottleneck", names: Iterable[str] | None = None
    ) -> None:
        if which not in ("bottleneck", "input", "output"):
            raise LowlineError(f"which = {which!r}; choose from bottleneck, input, output")
        known = projections(model)
        if which == "bottleneck":
            known = {n: m for n, m in known.items() if isinstance(m, LowRankLinear)}
        if not known:
            raise LowlineError(
                f'which = "{which}": the model has nothing to watch. Low-rank layers have all '
                'three, dense ones "input" and "output"'
            )
        names = list(known if names is None else names)
        if unknown := [name for name in names if name not in known]:
            raise LowlineError(f"no projection {unknown[0]!r}; there are {list(known)}")
        self.which = which
        self.grams: dict[str, torch.Tensor] = {}
        self._watched = {name: known[name] for name in names}
        self._undo: list[Callable[[], None]] = []
        self._stance: Any = None

    def __enter__(self) -> ActivationRanks:
        self._stance = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        for name, module in self._watched.items():
            self._watch(name, module)
        return self

    def __exit__(self, *error: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._stance.__exit__(*error)

    def ranks(self, alpha: float = 0.95, group: dist.ProcessGroup | None = None) -> dict[str, int]:
        """Return the effective rank of each watched activation over all that ran.

        Args:
            alpha: the fraction of energy to hold.
            group: data-parallel processes whose tokens count together; all must call.

        Raises:
            ValueError: a projection that never ran, or `alpha` outside (0, 1).
        """
        if silent := [name for name in self._watched if name not in self.grams]:
            raise LowlineError(
                f"{silent[0]} (one of {len(silent)}): its {self.which} never appeared while "
                "watched. Run a batch inside the with block; where A matrices run as one GEMM "
                '(cola.grouped), inputs do not pass their layers: use "bottleneck" or "output"'
            )
        ranks = {}
        for name, gram in self.grams.items():
            if group is not None:
                gram = gram.clone()
                dist.all_reduce(gram, group=group)
            ranks[name] = effective_rank(gram, alpha)
        return ranks

    def widths(self) -> dict[str, int]:
        """Return the full dimension d of each watched activation: the largest rank it could
        have.
        """
        return {name: gram.shape[0] for name, gram in self.grams.items()}

    def _watch(self, name: str, module: nn.Module) -> None:
        if self.which == "input":
            entry = module.A if isinstance(module, LowRankLinear) else module
            handle = entry.register_forward_pre_hook(lambda _, args: self._add(name, args[0]))
            self._undo.append(handle.remove)
        elif isinstance(module, LowRankLinear):
            # A block may run A and B itself, A's as one GEMM; all go through `expand`.
            expand = module.expand

            def watched_expand(z: torch.Tensor, *previous: torch.Tensor) -> torch.Tensor:
                y = expand(z, *previous)
                self._add(name, z if self.which == "bottleneck" else y)
                return y

            module.expand = watched_expand  # type: ignore[method-assign, assignment]
            self._undo.append(lambda: delattr(module, "expand"))
        else:
            handle = module.register_forward_hook(lambda _, args, y: self._add(name, y))
            self._undo.append(handle.remove)

    @torch.no_grad()
    def _add(self, name: str, activation: torch.Tensor) -> None:
        x_ND = _whole_rows(activation).flatten(0, -2).double()
        if name not in self.grams:
            width = x_ND.shape[1]
            self.grams[name] = torch.zeros(width, width, dtype=x_ND.dtype, device=x_ND.device)
        self.grams[name].addmm_(x_ND.T, x_ND)


def _whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the local tokens of an activation, each with all of its features.

    Processes that hold the same tokens scale the Gram matrix, which leaves the rank as it is.
    """
    if not isinstance(x, DTensor):
        return x
    split = any(p.is_partial() or p.is_shard(x.ndim - 1) for p in x.placements)
    return x.full_tensor() if split else x.to_local()
