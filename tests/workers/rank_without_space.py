"""The training command, in which rank 1 cannot write files of more than 100 kB."""

from __future__ import annotations

import os
import resource
import sys

from lowline.train.__main__ import main

if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
sys.exit(main())
