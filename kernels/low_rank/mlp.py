"""CoLA's MLP as one op (arXiv 2502.10940, equation 3 three times).

    z_g = A_g x,   z_u = A_u x,   inner = σ_m(B_g σ(z_g)) ⊙ B_u σ(z_u)
    z_d = A_d inner,   y = B_d σ(z_d)

σ_m is the MLP's own activation: "silu" as in SwiGLU, or "identity", the published form from 350M
parameters on. `save` says what the backward pass finds beside x and the three z's:

    "all"         B_g σ(z_g) and B_u σ(z_u) too (CoLA)
    "bottleneck"  nothing (CoLA-M); those two GEMMs are run again

At d = 512, ffn = 1376, r = 128 that is 3648 and 896 elements a token.

On a CPU tokens go in blocks of 512, whose wide activations stay in the cache from one GEMM to the
next. The elementwise work between the GEMMs is torch's or, `fused`, one pass of
`kernels/cpu/low_rank.cpp`; torch.compile fuses torch's by itself and is given that.

Left out: biases, and several dtypes in one call.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lowline.kernels.backends import Backend, choose
from lowline.kernels.cpu import load
from lowline.kernels.low_rank.activations import activate, activate_backward, check_activation
from lowline.kernels.low_rank.bottleneck import check_pair, stack, type_reason
from lowline.kernels.low_rank.grouped import grouped_linear

NAME = "low_rank_mlp"
BLOCK = 512
Pair = tuple[torch.Tensor, torch.Tensor]


def low_rank_mlp(
    x: torch.Tensor,
    gate: Pair,
    up: Pair,
    down: Pair,
    *,
    activation: str = "silu",
    mlp_activation: str = "identity",
    save: Literal["bottleneck", "all"] = "bottleneck",
    backend: Backend = "auto",
) -> torch.Tensor:
    """down(σ_m(gate(x)) ⊙ up(x)), each B·σ(A·x); differentiable in every tensor.

    Args:
        x: (..., d).
        gate, up: A of (rank, d), B of (ffn, rank); their ranks may differ.
        down: A of (rank, ffn), B of (out, rank).
        activation: σ, a name from `lowline.kernels.low_rank.activations`.
        mlp_activation: σ_m, likewise.
        save: what is kept for the backward pass, see the module's table; of no effect on
            "reference", which keeps what autograd does.
        backend: see `lowline.kernels.backends`. "cpu" takes fp32 and bf16 with silu or identity
            for σ_m; "triton" fp32 and bf16.

    Returns:
        (..., out).

    Raises:
        ValueError: shapes or types that do not fit, an unknown activation or `save`, or a backend
            that does not cover the call.
    """
    check_activation(NAME, activation)
    check_activation(NAME, mlp_activation, "mlp_activation")
    if save not in ("bottleneck", "all"):
        raise ValueError(f"{NAME}: save = {save!r}; choose from 'bottleneck', 'all'")
    check_pair(NAME, x, *gate)
    check_pair(NAME, x, *up)
    if gate[1].shape[0] != up[1].shape[0] or down[0].shape[-1] != up[1].shape[0]:
        raise ValueError(
            f"{NAME}: gate makes {gate[1].shape[0]} features, up {up[1].shape[0]}, and down takes "
            f"{down[0].shape[-1]}; they are one width"
        )
    check_pair(NAME, up[1].t(), *down)
    cpu = type_reason(x)
    if mlp_activation not in ("silu", "identity"):
        cpu = f"mlp_activation = {mlp_activation!r}; it takes 'silu' and 'identity'"
    which = choose(NAME, backend, x.device, cpu=cpu, triton=type_reason(x), module="low_rank")
    if which == "reference":
        g, u = (F.linear(activate(activation, F.linear(x, A)), B) for A, B in (gate, up))
        z_down = F.linear(activate(mlp_activation, g) * u, down[0])
        return F.linear(activate(activation, z_down), down[1])
    if which == "triton":
        return _on_triton(x, gate, up, down, activation, mlp_activation, save)
    fused = which == "cpu" and not torch.compiler.is_compiling()
    return _Mlp.apply(x, *gate, *up, *down, activation, mlp_activation, save == "all", fused)


def _on_triton(
    x: torch.Tensor,
    gate: Pair,
    up: Pair,
    down: Pair,
    activation: str,
    mlp_activation: str,
    save: str,
) -> torch.Tensor:
    """The MLP out of GEMMs that apply σ to what they read and keep z alone."""
    from lowline.kernels.low_rank.triton_kernels import activated_linear

    def inner(z_g: torch.Tensor, z_u: torch.Tensor) -> torch.Tensor:
        g = activated_linear(z_g, gate[1], activation=activation)
        u = activated_linear(z_u, up[1], activation=activation)
        return F.linear(activate(mlp_activation, g) * u, down[0])

    z = grouped_linear(x, (gate[0], up[0]), (None, None))
    zs = z.split([gate[0].shape[0], up[0].shape[0]], -1)
    if save == "bottleneck" and torch.is_grad_enabled():
        z_d = checkpoint(inner, *zs, use_reentrant=False, preserve_rng_state=False)
    else:
        z_d = inner(*zs)
    return activated_linear(z_d, down[1], activation=activation)


class _Mlp(torch.autograd.Function):
    """Names: s for σ(z), g and u for gate's and up's outputs, `_M` for the rows of a block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        A_g: torch.Tensor,
        B_g: torch.Tensor,
        A_u: torch.Tensor,
        B_u: torch.Tensor,
        A_d: torch.Tensor,
        B_d: torch.Tensor,
        activation: str,
        mlp_activation: str,
        save_all: bool,
        fused: bool,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        n, block = rows.shape[0], _block(rows)
        z = rows @ stack([A_g, A_u]).t()
        z_d, y = rows.new_empty(n, A_d.shape[0]), rows.new_empty(n, B_d.shape[0])
        keep = save_all and any(ctx.needs_input_grad)
        g_all, u_all = (rows.new_empty(n if keep else block, B_g.shape[0]) for _ in range(2))
        inner = rows.new_empty(block, B_g.shape[0])
        for i in range(0, n, block):
            here = slice(i, min(i + block, n))
            m = here.stop - i
            g_M, u_M = (t[here] if keep else t[:m] for t in (g_all, u_all))
            s_g, s_u = activate(activation, z[here]).split([A_g.shape[0], A_u.shape[0]], 1)
            torch.mm(s_g, B_g.t(), out=g_M)
            torch.mm(s_u, B_u.t(), out=u_M)
            _gated_(g_M, u_M, inner[:m], mlp_activation, fused)
            torch.mm(inner[:m], A_d.t(), out=z_d[here])
            torch.mm(activate(activation, z_d[here]), B_d.t(), out=y[here])
        ctx.save_for_backward(
            *(x, z, z_d, A_g, B_g, A_u, B_u, A_d, B_d), *((g_all, u_all) if keep else ())
        )
        ctx.settings = activation, mlp_activation, fused
        return y.view(*x.shape[:-1], B_d.shape[0])

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, z, z_d, A_g, B_g, A_u, B_u, A_d, B_d, *kept = ctx.saved_tensors
        activation, mlp_activation, fused = ctx.settings
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        n, block = rows.shape[0], _block(rows)
        ranks = [A_g.shape[0], A_u.shape[0]]
        # Sums over blocks are fp32: rounded to bf16 after each they would lose their last bits.
        kind = torch.promote_types(x.dtype, torch.float32)
        # dB_g and dB_u are transposed: a tall product is slower than a wide one.
        sums = [
            torch.zeros(w.shape, dtype=kind, device=x.device) for w in (B_g.t(), B_u.t(), A_d, B_d)
        ]
        dB_g, dB_u, dA_d, dB_d = sums
        dz = torch.empty_like(z)
        wide = [rows.new_empty(block, B_g.shape[0]) for _ in range(3)]
        for i in range(0, n, block):
            here = slice(i, min(i + block, n))
            dg, du, d = (t[: here.stop - i] for t in wide)
            s_g, s_u = activate(activation, z[here]).split(ranks, 1)
            if kept:
                g, u = (t[here] for t in kept)
            else:
                g, u = torch.mm(s_g, B_g.t(), out=dg), torch.mm(s_u, B_u.t(), out=du)
            dz_d = activate_backward(activation, dy[here] @ B_d, z_d[here])
            _add_product_(dB_d, dy[here].t(), activate(activation, z_d[here]))
            torch.mm(dz_d, A_d, out=d)
            inner = _gated_backward_(g, u, d, dg, du, mlp_activation, fused)
            _add_product_(dA_d, dz_d.t(), inner)
            _add_product_(dB_g, s_g.t(), dg)
            _add_product_(dB_u, s_u.t(), du)
            ds = torch.cat([dg @ B_g, du @ B_u], 1)
            dz[here] = activate_backward(activation, ds, z[here])
        dx = (dz @ stack([A_g, A_u])).view(x.shape) if ctx.needs_input_grad[0] else None
        dA_g, dA_u = (dz.t() @ rows).split(ranks)
        dB_g, dB_u, dA_d, dB_d = (t.to(x.dtype) for t in sums)
        dB_g, dB_u = dB_g.t().contiguous(), dB_u.t().contiguous()
        return dx, dA_g, dB_g, dA_u, dB_u, dA_d, dB_d, None, None, None, None


def _block(rows: torch.Tensor) -> int:
    """Rows that go together: few on a CPU, whose caches hold few, and all on other devices.

    torch.compile is given all, so that its graph does not grow with them.
    """
    whole = rows.device.type != "cpu" or torch.compiler.is_compiling()
    return max(rows.shape[0], 1) if whole else BLOCK


def _gated_(
    g: torch.Tensor, u: torch.Tensor, out: torch.Tensor, mlp_activation: str, fused: bool
) -> None:
    """out = σ_m(g) ⊙ u."""
    if fused:
        load("low_rank").gated(g, u, out, mlp_activation == "silu")
    else:
        torch.mul(activate(mlp_activation, g), u, out=out)


def _gated_backward_(
    g: torch.Tensor,
    u: torch.Tensor,
    d: torch.Tensor,
    dg: torch.Tensor,
    du: torch.Tensor,
    mlp_activation: str,
    fused: bool,
) -> torch.Tensor:
    """dg and du from d, the gradient of σ_m(g) ⊙ u, which is returned, in d's place.

    dg and du may be g and u.
    """
    if fused:
        load("low_rank").gated_backward(g, u, d, dg, du, mlp_activation == "silu")
        return d
    a = activate(mlp_activation, g)
    inner, d_a, d_u = a * u, d * u, d * a
    dg.copy_(activate_backward(mlp_activation, d_a, g))
    du.copy_(d_u)
    return d.copy_(inner)


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, for a total that may be of a wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
