"""Documents in, packed token rows out.

`sources` opens documents, `order` deals them to lanes, `packing` makes rows of them, `loader`
batches the rows and keeps the place; `stored` batches hidden states that were made of them.
`tokenizer` and `embedded`, which are also commands, give a tokenizer and text without a download;
import them by their own names.
"""

from lowline.train.data.loader import LaneDataLoader, check_saved_lanes, lane_config
from lowline.train.data.packing import IGNORE_INDEX, EvaluationBatches, Rows, evaluation_rows
from lowline.train.data.sources import ListSource, SourceConfig, open_source

__all__ = [
    "IGNORE_INDEX",
    "EvaluationBatches",
    "LaneDataLoader",
    "ListSource",
    "Rows",
    "SourceConfig",
    "check_saved_lanes",
    "evaluation_rows",
    "lane_config",
    "open_source",
]
