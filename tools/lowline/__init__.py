"""lowline: low-rank pretraining and linear attention for Llama-class language models.

Importing it makes "cola_llama" and the linearized models known to transformers' `Auto*` classes,
and costs nothing else.
"""

from lowline._register import register_with_transformers
from lowline.errors import LowlineError as LowlineError

__version__ = "0.1.0"

register_with_transformers("lowline.cola.hf", "lowline.linearize.body.hf")
