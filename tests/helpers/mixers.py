"""Small mixers of every kind, away from where they begin, and what goes into them."""

from __future__ import annotations

from typing import Any

import torch

from lowline.linearize.mixers import HeadShape, Mixer, build_mixer

WINDOW, SINKS = 5, 2
LIGER = ("liger_gla", "liger_hgrn2", "liger_gsa")
DELTA = ("gated_deltanet", "kda")
MAMBA = ("mamba1", "mamba2")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sink_window": ("sink_window", dict(window=WINDOW, sinks=SINKS)),
    "window only": ("sink_window", dict(window=WINDOW, sinks=0)),
    "lolcats": ("lolcats", dict(window=WINDOW)),
    "lolcats, both, few features": (
        "lolcats",
        dict(window=WINDOW, mixing="both", features=16, state_heads="kv"),
    ),
    "lolcats, linear, sinks": (
        "lolcats",
        dict(window=WINDOW, sinks=SINKS, mixing="linear", mixing_init=0.3),
    ),
    "hedgehog": ("hedgehog", {}),
    "hedgehog, shared": ("hedgehog", dict(state_heads="kv", features=16)),
    "t2r": ("t2r", {}),
    "t2r, shared": ("t2r", dict(state_heads="kv", features=32)),
    **{name: (name, dict(window=WINDOW)) for name in LIGER},
    "liger_gla, sinks": ("liger_gla", dict(window=WINDOW, sinks=SINKS)),
    "slots": ("slots", dict(window=WINDOW, sinks=SINKS, slots=4)),
    "memory": ("memory", dict(window=WINDOW, sinks=SINKS, exact=2, merged=3, block=2, horizon=6)),
    "memory, eviction": (
        "memory",
        dict(window=WINDOW, sinks=0, exact=4, merged=0, block=1, horizon=0),
    ),
    "memory, budget": (
        "memory",
        dict(
            sinks=SINKS,
            merged=1,
            block=2,
            horizon=6,
            budget=f"{WINDOW}+3, {WINDOW - 1}; 300, 64+192",
        ),  # fmt: skip
    ),
    "memory, int8": (
        "memory",
        dict(sinks=SINKS, block=2, horizon=6, budget="6+3, 4; 3, 5", cache_dtype="int8"),
    ),
    "liger_gsa, no window": ("liger_gsa", dict(window=0)),
    "retention": ("retention", dict(window=WINDOW, sinks=SINKS, share_init=0.3)),
    "retention, no window, shared": ("retention", dict(window=0, sinks=0, state_heads="kv")),
    **{name: (name, dict(window=WINDOW, sinks=SINKS, share_init=0.3)) for name in DELTA},
    "kda, conv, shared": (
        "kda",
        dict(window=WINDOW, conv=4, state_heads="kv", rotary=False, share_init=0.3),
    ),
    "mamba1": ("mamba1", {}),
    "mamba1, four states": ("mamba1", dict(states=4, conv=2)),
    "mamba2": ("mamba2", {}),
    "gated_deltanet, conv, no window": ("gated_deltanet", dict(window=0, sinks=0, conv=3)),
}
SHAPES = {
    "shared, 24": HeadShape(hidden_size=40, n_heads=4, n_kv_heads=2, head_dim=24),
    "one each, 16": HeadShape(hidden_size=32, n_heads=2, n_kv_heads=2, head_dim=16),
    "shared by three, 64": HeadShape(hidden_size=48, n_heads=3, n_kv_heads=1, head_dim=64),
}
SHARED = SHAPES["shared, 24"]


def made(case: str, shape: HeadShape = SHARED, dtype=torch.float32, backend="reference") -> Mixer:
    """Return a mixer whose parameters are away from where they begin."""
    name, options = CASES[case]
    torch.manual_seed(0)
    mixer = build_mixer(name, options | {"backend": backend}, shape).to(dtype).eval()
    with torch.no_grad():
        for weight in mixer.parameters():
            weight += 0.2 * torch.randn(weight.shape).to(dtype)
    return mixer


def inputs(shape: HeadShape, T: int, B: int = 2, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    heads = {"q": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads}
    made = {
        name: torch.randn(B, T, n, shape.head_dim, generator=generator, dtype=torch.float64)
        for name, n in heads.items()
    }
    made["x"] = torch.randn(B, T, shape.hidden_size, generator=generator, dtype=torch.float64)
    rate = 10.0 ** -torch.linspace(0, 2, shape.head_dim // 2, dtype=torch.float64)
    angle = (torch.arange(T, dtype=torch.float64)[:, None] * rate).repeat(1, 2)[None]
    made |= {"cos": angle.cos(), "sin": angle.sin()}
    return {name: t.to(dtype) for name, t in made.items()}


def run(mixer: Mixer, given: dict[str, torch.Tensor], span=slice(None), **how):
    q, k, v, x, cos, sin = (t[:, span] for t in given.values())
    return mixer(q, k, v, rope=(cos, sin), x_BTE=x, **how)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.std() > 1e-2
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def plain(name: str, **options: Any) -> Mixer:
    return build_mixer(name, {"window": WINDOW, "backend": "torch"} | options, SHARED)
