"""The `lowline` command: one word a task, each a plain function, imported when it is called."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from functools import partial

# words of the command -> (function, one line about it)
COMMANDS = {
    "train": ("lowline.train.__main__:main", "train a model from a TOML file (one process)"),
    "configs": (
        "lowline.tools.commands.configs:configs",
        "list the configurations that come with lowline",
    ),
    "export": ("lowline.tools.commands.hf_commands:export", "checkpoint -> Hugging Face directory"),
    "import": (
        "lowline.tools.commands.hf_commands:import_tables",
        "print the TOML under which a Hugging Face checkpoint trains",
    ),
    "linearize": (
        "lowline.tools.commands.linearize:linearize",
        "a pretrained Transformer becomes a linear-attention model, in stages",
    ),
    "plan blockwise": (
        "lowline.tools.commands.plan:plan_blockwise",
        "disk, time and GPUs of blockwise attention transfer",
    ),
    "generate": ("lowline.tools.commands.hf_commands:generate", "continue a prompt"),
    "evaluate": (
        "lowline.tools.commands.evaluate:evaluate",
        "score converted models beside their teacher and windows without training",
    ),
    "inspect cost": (
        "lowline.tools.commands.inspect_cost:inspect_cost",
        "parameters, FLOPs and memory: dense, CoLA, CoLA-M, checkpointing",
    ),
    "inspect rank": (
        "lowline.tools.commands.inspect_rank:inspect_rank",
        "effective rank of a model's activations, with a plot",
    ),
    "bench pretrain": (
        "lowline.tools.bench.pretrain:bench_pretrain",
        "time CoLA's blocks and the trainer against their limits",
    ),
    "bench decode": (
        "lowline.tools.bench.decode:bench_decode",
        "tokens/s, memory and prefill of a converted model beside its teacher",
    ),
    "bench linearize": (
        "lowline.tools.bench.linearize:bench_linearize",
        "time a step of each stage against the teacher's forward pass",
    ),
    "bench kernels": (
        "lowline.tools.bench.kernels.run:bench_kernels",
        "time and memory of the kernels against attention and their limits",
    ),
    "demo": (
        "lowline.tools.commands.demo:demo",
        "pretrain dense, CoLA and CoLA-M and compare them",
    ),
    "demo linearize": (
        "lowline.tools.commands.demo_linearize:demo_linearize",
        "convert SmolLM2-135M, evaluate it, decode beside its teacher",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lowline WORDS...`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for words in (" ".join(arguments[:2]), " ".join(arguments[:1])):
        if words in COMMANDS:
            return _call(words, arguments[len(words.split()) :])
    print("usage: lowline COMMAND [options]; `lowline COMMAND --help` for a command's options\n")
    for words, (_, about) in COMMANDS.items():
        print(f"  {words:16} {about}")
    return 0 if not arguments or arguments[0] in ("-h", "--help") else 2


def _call(words: str, arguments: list[str]) -> int:
    module, _, name = COMMANDS[words][0].partition(":")
    function = getattr(importlib.import_module(module), name)
    if words in ("train", "linearize"):  # their options are the keys of the configuration
        return function(arguments)
    import tyro

    if words in ("inspect cost", "bench linearize"):  # keys of the configuration beside options
        keys = [a for a in arguments if re.match(r"--[\w.-]+\.[\w.-]+=", a)]
        arguments = [a for a in arguments if a not in keys]
        function = partial(function, overrides=tuple(keys))
    try:
        result = tyro.cli(
            function,
            prog=f"lowline {words}",
            args=arguments,
            config=(tyro.conf.PositionalRequiredArgs,),
        )
    except (ValueError, OSError) as error:
        print(f"lowline {words}: {error}", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
