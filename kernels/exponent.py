"""Exponentials by powers of two.

On a CPU torch's exp takes 9 times as long where its result is 0, and up to 70 times where it is
denormal, as masks and strong decays make it; exp2 takes the same time for every argument
(docs/dev/log.md).
"""

import math

LOG2_E = 1 / math.log(2)
"""e^x = 2^(x · LOG2_E)."""
