"""Configurations that runs have written: config.toml, stage.toml, done.toml.

They say in which `format` they are. A key that a later version adds has its default in an earlier
file; a file of a later format is refused. Files of version 0.1 have no `format`, and list the keys
of every variant of a table, whatever the table's own is.
"""

from __future__ import annotations

from typing import Any

from lowline.train.config.tables import VARIANTS, ConfigError

FORMAT = 1

# What files of version 0.1 have beside the keys of their own variant, with the defaults of then.
_OF_OTHERS: dict[str, dict[str, Any]] = {
    "objective": {
        "temperature": 1.0,
        "next_token_weight": 0.0,
        "top_k": 256,
        "attention_weight": 0.0,
    },
    "optimizer": {"muon_lr": 0.02, "muon_momentum": 0.95},
    "schedule": {"decay_fraction": 0.2, "min_lr_fraction": 0.1},
}


def upgraded(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a file's tables as this version has them, without `format`.

    Args:
        where: the file, for the message.

    Raises:
        ConfigError: a format that this version does not know.
    """
    tree = dict(tree)
    found = tree.pop("format", None)
    data = tree.get("data")
    if isinstance(data, dict) and data.get("dataset") == "embedded" and "streaming" in data:
        # As runs list it. Earlier versions took a text_key here, which nothing read.
        tree["data"] = {key: value for key, value in data.items() if key != "text_key"}
    if found is None:
        return {name: _without_others(name, table) for name, table in tree.items()}
    if type(found) is not int or found < 1:
        raise ConfigError(
            f"{where}: format = {found!r}: must be an integer > 0; it is written by runs, so leave "
            "it out of a file of your own"
        )
    if found > FORMAT:
        raise ConfigError(
            f"{where}: format = {found}: a later version of lowline wrote this file, and this one "
            f"reads formats up to {FORMAT}; install the later version, or give another output"
        )
    return tree


def _without_others(name: str, table: Any) -> Any:
    """Return a table without the keys of other variants, if it lists them all, as 0.1 did."""
    others = _OF_OTHERS.get(name, {})
    if not others or not isinstance(table, dict) or not others.keys() <= table.keys():
        return table
    value = VARIANTS[name].value_of(table)
    if value not in VARIANTS[name].sections:
        return table
    known = VARIANTS[name].keys_of(value)
    return {k: v for k, v in table.items() if k in known or others.get(k) != v}
