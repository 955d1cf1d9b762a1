"""Damaged and hostile TOML files: read, or refused in a message that names the file or the key.

Every case is one of the files that come with lowline with one to three mutations, drawn from a
seed.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from lowline.errors import LowlineError
from lowline.tools.commands.configs import resolved
from lowline.train.config.load import load_config
from lowline.train.config.shipped import shipped_configs
from lowline.train.config.stages import has_stages, load_stages

VALUES = (
    *("inf", "-inf", "nan", "1e400", "-1", "0", "1.5", "true", "[]", "{}", '""', "'x'", "''"),
    *("9223372036854775807", "9223372036854775808", "1" + "0" * 30, "9" * 5000, "0x" + "f" * 4000),
    *("2026-01-31", "[2026-01-31]", "{a = 2026-01-31T10:00:00Z}", "07:32:00", "[[07:32:00]]"),
    *("[" * 30 + "]" * 30, "[" * 3000 + "]" * 3000, "{a = " * 40 + "1" + "}" * 40, "[1, 'a', {}]"),
    *('"\\u0000"', '"\\U0001F600"', '"\u202e\u0301"', "'" + "x" * 5000 + "'", '"/dev/zero"', '"."'),
    *('"""\na\n"""', "'\\'", "1_000", "0b11", "+5", "1e-400", "-0.0", '["a", "b"]', '"embedded"'),
    *("{q = 1}", '{kind = "yarn"}', '"transfer"', '"muon"', '"all but every 0"', '"0-99999999999"'),
)
LINES = (
    *("base = 5", 'base = "."', 'base = "no.toml"', "base = []", 'base = ["\\u0000"]', "stage = 3"),
    *('[[stage]]\nname = "a"', "[[stage]]", '[[stage]]\nname = ["a"]', "[stage]", "[[model]]"),
    *("model = 3", "data = []", "optimizer = true", "objective = 'x'", "schedule = [1]", "[a.b.c]"),
    *("format = 2", "format = -1", "format = 'x'", "cola = 1", "[mixer]", "lora = {}", "[block]"),
    *("a" + ".a" * 30 + " = 1", "a" + ".a" * 2000 + " = 1", '"" = 1', '"a.b" = 1', '"\\u0000" = 1'),
    *(
        "[mixer]\nname = 'slots'\noptions = {slots = 1e9}",
        "[mixer.options]\nwindow = 9e99",
        "\ufeff",
    ),
    *("source = 3", "output = ['a']", "tokenizer = 0", "[evaluation.data]\ndataset = 1", "=", "]"),
    *("\x00", "\x7f", "\r", "\u2028", "# \u0000", "'''", '"""', "\t= \t", "[training]", "name = 1"),
)


def mutated(rng: random.Random, text: str) -> bytes:
    """Return a file with one mutation, or a few."""
    data = text.encode()
    for _ in range(rng.choice((1, 1, 2, 3))):
        lines = data.split(b"\n")
        at, kind = rng.randrange(len(lines)), rng.randrange(12)
        if kind <= 4:
            with_value = [n for n, line in enumerate(lines) if b"=" in line]
            at = rng.choice(with_value or [0])
            key = lines[at].partition(b"=")[0]
            lines[at] = key + b"= " + rng.choice(VALUES).encode()
        elif kind <= 6:
            lines.insert(at, rng.choice(LINES).encode())
        elif kind == 7:
            lines[at] = rng.choice((lines[at] * 2, b"", lines[at][::-1], lines[at][:-1]))
        elif kind == 8:
            rng.shuffle(lines)
        data = b"\n".join(lines)
        at = rng.randrange(len(data) + 1)
        if kind == 9:
            data = data[:at] + rng.randbytes(rng.choice((1, 2, 8))) + data[at + 1 :]
        elif kind == 10:
            data = data[:at]
        elif kind == 11:
            wide = data.decode("utf-8", "replace")
            data = wide.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32", "utf-7")))
    return data


def answer(path: Path) -> str | None:
    """Return the message with which a file is refused, or None where it can run."""
    try:
        if has_stages(path):
            stages = load_stages(path)
            for number in range(len(stages.names)):
                stages.run(number, teacher="teacher")
        else:
            load_config(path).local_batch_size(1)
    except LowlineError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("seed", "cases"), [(1, 60), pytest.param(2, 1500, marks=pytest.mark.slow)]
)
def test_mutated_files_are_read_or_refused(tmp_path: Path, seed: int, cases: int) -> None:
    rng = random.Random(seed)
    texts = [resolved(path) for path in shipped_configs().values()]
    path, refused = tmp_path / "mutated.toml", 0
    for case in range(cases):
        data = mutated(rng, rng.choice(texts))
        path.write_bytes(data)
        try:
            message = answer(path)
        except Exception as error:
            error.add_note(f"case {case} of seed {seed}: {data!r}")
            raise
        if message is not None:
            refused += 1
            assert re.search(r"mutated\.toml|\.toml: |\w = ", message), (case, message)
            assert len(max(message.splitlines(), key=len)) < 9000, (case, message)
    assert refused > cases / 2
