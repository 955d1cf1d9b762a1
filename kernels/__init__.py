"""Functions only: each op with its reference and its fast forms, one signature.

    from lowline.kernels import gla, gated_delta_rule, ssd, window_attention

Methods by name (`linear_attention`, `retention`, `ssd`, `gla`, `gated_delta_rule`, `kda`) are calls
of `gated_linear_recurrence`; `window_attention`, `memory_attention` and `row_memory_attention` are
softmax windows with a summary of what is older. Each op over time has a `..._step` for one token,
and all but the last two a `..._verify` and an `..._advance` for speculative decoding.

Names are imported when first used: `import lowline.kernels` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowline._lazy import offer

if TYPE_CHECKING:
    from lowline.kernels.conv import (
        causal_conv,
        causal_conv_advance,
        causal_conv_step,
        causal_conv_verify,
    )
    from lowline.kernels.feature_map import hedgehog
    from lowline.kernels.low_rank import grouped_linear
    from lowline.kernels.memory import row_memory_attention, row_memory_step
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
_NAMES = {  # public name: module, and its name there where that is another
    **dict.fromkeys(("linear_attention", "retention", "ssd"), "methods"),
    **dict.fromkeys(("gla", "gated_delta_rule", "kda"), "methods"),
    "gated_linear_recurrence": "recurrence",
    **{f"recurrence{form}": "recurrence" for form in _FORMS[1:]},
    "window_attention": "window:window_linear_attention",
    **{f"window{form}": f"window:window_linear{form}" for form in _FORMS[1:]},
    "memory_attention": "slots:slot_window_attention",
    "memory_step": "slots:slot_window_step",
    **dict.fromkeys(("row_memory_attention", "row_memory_step"), "memory"),
    **{f"selective_scan{form}": "scan" for form in _FORMS},
    **{f"causal_conv{form}": "conv" for form in _FORMS},
    "hedgehog": "feature_map",
    "grouped_linear": "low_rank",
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
    "row_memory_attention",
    "row_memory_step",
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

__getattr__, __dir__ = offer(__name__, {n: f"{__name__}.{path}" for n, path in _NAMES.items()})
