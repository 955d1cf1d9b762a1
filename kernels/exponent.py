"""Exponentials by powers of two.

torch's exp on a CPU takes 9 times as long where its result is 0, and up to 70 times where it is
denormal, which masks and strong decays bring about; exp2 takes the same time for all
(docs/dev/log.md).
"""

import math

LOG2_E = 1 / math.log(2)
"""e^x = 2^(x · LOG2_E)."""
