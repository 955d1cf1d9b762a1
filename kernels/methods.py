"""Methods of linear attention by their papers' names: thin calls of `gated_linear_recurrence`.

Each returns (outputs, state) and takes the same keyword options: `scale` of the outputs,
`initial_state`, `cu_seqlens` of packed sequences and `backend`, all as in
`lowline.kernels.recurrence.gated_linear_recurrence`, which also documents the state. Decoding
token by token is `recurrence_step` with the same keys, values and gates.

Shapes: B batch, T time, Q query heads, H state heads (Q a multiple of H), K key and V value
features. The gates g are logarithms of decays, at most 0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowline.kernels.recurrence.op import gated_linear_recurrence

Result = tuple[Tensor, Tensor]


def linear_attention(
    q_BTQK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, *, normalize: bool = True, **options: Any
) -> Result:
    """Compute linear attention, o_t = Σ_{j≤t} (q_t·k_j) v_j / Σ_{j≤t} q_t·k_j.

    "Transformers are RNNs", arXiv 2006.16236, equation 9. The queries and keys passed in are
    feature maps, which are not negative (`hedgehog`, softmax, elu + 1).

    Args:
        normalize: divide by the sum of weights; the state then has one column more, Σ k_j.
    """
    return gated_linear_recurrence(q_BTQK, k_BTHK, v_BTHV, normalize=normalize, **options)


def retention(
    q_BTQK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_gamma_H: Tensor, **options: Any
) -> Result:
    """Compute retention, S_t = γ S_{t-1} + k_t v_tᵀ, o_t = q_tᵀ S_t, with γ constant per head.

    RetNet, arXiv 2307.08621, equation 6; Lightning attention, arXiv 2401.04658, is the same sum.

    Args:
        log_gamma_H: log γ of each state head, (H,).
    """
    g_BTH = log_gamma_H.expand(*k_BTHK.shape[:2], -1)
    return gated_linear_recurrence(q_BTQK, k_BTHK, v_BTHV, g_BTH, **options)


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None = None,
    **options: Any,
) -> Result:
    """Compute Mamba2's state space duality, S_t = e^{dt A} S_{t-1} + B_t (dt x_t)ᵀ, y_t = S_tᵀ C_t.

    Mamba2, arXiv 2405.21060, section 6. Discretization is the caller's: dt is positive, after
    softplus and bias.

    Args:
        x_BTHP: values, (B, T, heads, P).
        dt_BTH: step sizes.
        A_H: the rate of each head, at most 0 (-e^{A_log}).
        B_BTGN, C_BTGN: input and output projections of G groups, N states; G divides H.
        D_H: adds D x where given.

    Returns:
        y of (B, T, H, P); the state, (B, H, N, P).
    """
    H, G = x_BTHP.shape[2], C_BTGN.shape[2]
    C_BTHN = C_BTGN if G == H else C_BTGN.repeat_interleave(H // G, 2)
    dt_BTH1 = dt_BTH[..., None].to(x_BTHP.dtype)
    y, state = gated_linear_recurrence(C_BTHN, B_BTGN, dt_BTH1 * x_BTHP, A_H * dt_BTH, **options)
    return (y if D_H is None else y + D_H[:, None].to(y.dtype) * x_BTHP), state


def gla(q_BTQK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTHK: Tensor, **options: Any) -> Result:
    """Compute gated linear attention, S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ, o_t = q_tᵀ S_t.

    GLA, arXiv 2312.06635, section 4. HGRN2 (arXiv 2404.07904) is k = 1 - e^g. Pass scale=K**-0.5
    as GLA does.
    """
    return gated_linear_recurrence(q_BTQK, k_BTHK, v_BTHV, g_BTHK, **options)


def gated_delta_rule(
    q_BTQK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor | None,
    beta_BTH: Tensor,
    **options: Any,
) -> Result:
    """Compute the gated delta rule with one decay per head, S̃ = e^{g_t} S_{t-1}.

        S_t = S̃ + β_t k_t (v_t - S̃ᵀ k_t)ᵀ,   o_t = q_tᵀ S_t

    Gated DeltaNet, arXiv 2412.06464, equation 10; without g DeltaNet, arXiv 2406.06484. Keys have
    length one.

    Args:
        g_BTH: None for no decay.
        beta_BTH: the step size of each token, between 0 and 1 (2 for negative eigenvalues).
    """
    return gated_linear_recurrence(q_BTQK, k_BTHK, v_BTHV, g_BTH, beta_BTH, **options)


def kda(
    q_BTQK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTHK: Tensor, beta_BTH: Tensor, **options: Any
) -> Result:
    """Compute Kimi delta attention: the delta rule with a decay per key feature, S̃ = diag(e^g) S.

    Kimi Linear, arXiv 2510.26692, section 3. Otherwise as `gated_delta_rule`.
    """
    return gated_linear_recurrence(q_BTQK, k_BTHK, v_BTHV, g_BTHK, beta_BTH, **options)
