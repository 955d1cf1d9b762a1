"""lowline: low-rank pretraining and linear attention for Llama-class language models.

Low-rank layers (CoLA, y = B·σ(A·x)):

    LowRankLinear(in_features, out_features, rank)    a layer in the place of nn.Linear
    to_cola(model, rank=...)                          its projections become low-rank layers

Pretrained Transformers to linear attention:

    convert(model, mixer="lolcats", layers="all but every 4")
    save(model, tokenizer, directory)                 a directory that from_pretrained loads
    Mixer, register_mixer                             a mixer of your own

Training, as `lowline train` does it, and measuring:

    load_config("my.toml")                            a checked configuration
    train(config)                                     steps, losses, checkpoint and metrics
    evaluate(("model",), tasks=("perplexity",))       scores beside teacher and windows
    inspect_rank("model")                             effective rank of activations

Kernels are in lowline.kernels. Mistakes in what is given raise LowlineError, a ValueError.

Importing lowline makes "cola_llama" and the linearized models known to transformers' `Auto*`
classes. It imports nothing else: every name above is imported when it is first used.
"""

from lowline._lazy import offer
from lowline._register import register_with_transformers
from lowline.errors import LowlineError as LowlineError

__version__ = "0.1.0"

_NAMES = {
    "LowRankLinear": "lowline.cola.low_rank",
    "to_cola": "lowline.cola.replace",
    "convert": "lowline.linearize.convert",
    "save": "lowline.linearize.convert",
    "Mixer": "lowline.linearize.mixers.base",
    "register_mixer": "lowline.linearize.mixers",
    "train": "lowline.train",
    "load_config": "lowline.train.api",
    "evaluate": "lowline.tools.commands.evaluate",
    "inspect_rank": "lowline.tools.commands.inspect_rank",
    "cola": "lowline.cola",
    "kernels": "lowline.kernels",
    "linearize": "lowline.linearize",
    "tools": "lowline.tools",
}

__getattr__, __dir__ = offer(__name__, _NAMES)

register_with_transformers("lowline.cola.hf", "lowline.linearize.body.hf")
