"""Functions only: each op with its reference and its fast forms, one signature.

    from lowline.kernels import gla, gated_delta_rule, ssd, window_attention

Methods by name (`linear_attention`, `retention`, `ssd`, `gla`, `gated_delta_rule`, `kda`) are calls
of `gated_linear_recurrence`; `window_attention` and `memory_attention` are the two softmax windows
with a summary of what is older. Each op over time has a `..._step` for one token, and all but
`memory_attention` a `..._verify` and an `..._advance` for speculative decoding.

Names are imported when first used: `import lowline.kernels` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowline.kernels.conv import (
        causal_conv,
        causal_conv_advance,
        causal_conv_step,
        causal_conv_verify,
    )
    from lowline.kernels.feature_map import hedgehog
    from lowline.kernels.low_rank import grouped_linear
    from lowline.kernels.methods import (
        gated_delta_rule,
        gla,
        kda,
        linear_attention,
        retention,
        ssd,
    )
    from lowline.kernels.recurrence import (
        gated_linear_recurrence,
        recurrence_advance,
        recurrence_step,
        recurrence_verify,
    )
    from lowline.kernels.scan import (
        selective_scan,
        selective_scan_advance,
        selective_scan_step,
        selective_scan_verify,
    )
    from lowline.kernels.slots import slot_window_attention as memory_attention
    from lowline.kernels.slots import slot_window_step as memory_step
    from lowline.kernels.window import window_linear_advance as window_advance
    from lowline.kernels.window import window_linear_attention as window_attention
    from lowline.kernels.window import window_linear_step as window_step
    from lowline.kernels.window import window_linear_verify as window_verify

_FORMS = ("", "_step", "_verify", "_advance")
_DOORS = {  # public name: module, name there
    **{
        name: ("methods", name)
        for name in ("linear_attention", "retention", "ssd", "gla", "gated_delta_rule", "kda")
    },
    "gated_linear_recurrence": ("recurrence", "gated_linear_recurrence"),
    **{f"recurrence{form}": ("recurrence", f"recurrence{form}") for form in _FORMS[1:]},
    "window_attention": ("window", "window_linear_attention"),
    **{f"window{form}": ("window", f"window_linear{form}") for form in _FORMS[1:]},
    "memory_attention": ("slots", "slot_window_attention"),
    "memory_step": ("slots", "slot_window_step"),
    **{f"selective_scan{form}": ("scan", f"selective_scan{form}") for form in _FORMS},
    **{f"causal_conv{form}": ("conv", f"causal_conv{form}") for form in _FORMS},
    "hedgehog": ("feature_map", "hedgehog"),
    "grouped_linear": ("low_rank", "grouped_linear"),
}

__all__ = [
    "causal_conv",
    "causal_conv_advance",
    "causal_conv_step",
    "causal_conv_verify",
    "gated_delta_rule",
    "gated_linear_recurrence",
    "gla",
    "grouped_linear",
    "hedgehog",
    "kda",
    "linear_attention",
    "memory_attention",
    "memory_step",
    "recurrence_advance",
    "recurrence_step",
    "recurrence_verify",
    "retention",
    "selective_scan",
    "selective_scan_advance",
    "selective_scan_step",
    "selective_scan_verify",
    "ssd",
    "window_advance",
    "window_attention",
    "window_step",
    "window_verify",
]


def __getattr__(name: str) -> object:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = _DOORS[name]
    found = getattr(import_module(f"{__name__}.{module}"), there)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
