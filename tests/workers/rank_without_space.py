"""The training command, in which rank 1 cannot write files of more than 1 MB.

Its part of a checkpoint has 4 MB; the tokenizer, which is saved once before the start, has 0.3.
OF_RANK_1 are arguments that this rank alone is given.
"""

from __future__ import annotations

import os
import resource
import sys

from lowline.train.__main__ import main

if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    sys.argv += os.environ.get("OF_RANK_1", "").split()
sys.exit(main())
