"""Pretrained Transformers to linear attention and hybrids: mixers, conversion, generation.

convert and save are in `lowline.linearize.convert`; Mixer is the base class of what stands in for
softmax attention, and register_mixer gives a class of your own a name that convert takes.
"""

from lowline._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "convert": "lowline.linearize.convert",  # a module that can be called as its function
        "save": "lowline.linearize.convert",
        "Mixer": "lowline.linearize.mixers.base",
        "register_mixer": "lowline.linearize.mixers",
    },
)
