"""Documents in, packed token rows out.

`sources` opens documents, `order` deals them to lanes, `packing` makes rows of them, `loader`
batches the rows and keeps the place; `stored` batches hidden states that were made of them.
`tokenizer` and `embedded`, which are also commands, give a tokenizer and text without a download;
import them by their own names.

Names are imported when first used: chat templates (`template`) are used without torchtitan, too.
"""

from typing import TYPE_CHECKING

from lowline._lazy import offer

if TYPE_CHECKING:
    from lowline.train.data.loader import LaneDataLoader, check_saved_lanes, lane_config
    from lowline.train.data.packing import IGNORE_INDEX, EvaluationBatches, Rows, evaluation_rows
    from lowline.train.data.sources import ListSource, SourceConfig, open_source

_MODULES = {
    "loader": ("LaneDataLoader", "check_saved_lanes", "lane_config"),
    "packing": ("IGNORE_INDEX", "EvaluationBatches", "Rows", "evaluation_rows"),
    "sources": ("ListSource", "SourceConfig", "open_source"),
}
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
__getattr__, __dir__ = offer(
    __name__, {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
)
