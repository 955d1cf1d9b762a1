"""Low-rank auto-encoder layers (CoLA, CoLA-M): modules, ranks, accounting, analysis.

LowRankLinear (`lowline.cola.low_rank`) is the layer; to_cola (`lowline.cola.replace`) puts it where
a model has linear layers.
"""

from lowline._lazy import offer

__getattr__, __dir__ = offer(
    __name__, {"LowRankLinear": "lowline.cola.low_rank", "to_cola": "lowline.cola.replace"}
)
