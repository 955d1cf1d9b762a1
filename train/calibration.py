"""Mixers that begin from the teacher's keys: set before a run's first step.

So many steps' text goes through softmax attention of the run's own weights, as in a transfer; each
mixer that asks for it (`Mixer.calibrate`) gets its layer's keys before the rotary embedding. The
text is that of the first steps, which train on it afterwards as if it had not been read.

Keys are taken evenly from all ranks and steps, `KEYS` in all, without those of the first `SINKS`
tokens of documents, which are unlike all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torchtitan.components.loss import IGNORE_INDEX

from lowline.cola.titan import drawn_whole
from lowline.linearize.mixers.base import Mixer
from lowline.linearize.titan import Transfer

if TYPE_CHECKING:
    from lowline.train.trainer import Trainer

KEYS = 16_384
SINKS = 4


@torch.no_grad()
def calibrate(trainer: Trainer, steps: int) -> None:
    """Set the mixers' parameters; on all ranks at once.

    Raises:
        ValueError: a mixer got too few keys.
    """
    model, loader = trainer.model_parts[0], trainer.dataloader
    mixers = {n: m for n, m in model.named_modules() if isinstance(m, Mixer) and m.calibrates}
    taken: dict[str, list[torch.Tensor]] = {name: [] for name in mixers}
    ranks = dist.get_world_size()
    local = trainer.config.training.local_batch_size * trainer.config.training.seq_len
    batches = steps * trainer.gradient_accumulation_steps
    wanted = min(local, max(1, KEYS // (batches * ranks)))
    rows = torch.empty(0)

    def take(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: Any) -> None:
            taken[name].append(args[1].flatten(0, 1)[rows].float())

        return hook

    handles = [m.register_forward_pre_hook(take(n), with_kwargs=True) for n, m in mixers.items()]
    place, seen = loader.state_dict(), trainer.ntokens_seen
    try:
        for _, (inputs, labels) in zip(range(batches), loader, strict=False):
            inputs = {name: x.to(trainer.device) for name, x in inputs.items()}
            counted = (labels.to(trainer.device) != IGNORE_INDEX) & (inputs["positions"] >= SINKS)
            rows = counted.flatten().nonzero()[:, 0]
            if len(rows):  # the same number on every rank
                rows = rows[torch.arange(wanted, device=rows.device) * len(rows) // wanted]
            else:
                rows = torch.zeros(wanted, dtype=torch.int64, device=counted.device)
            tokens, _, extra = trainer.post_dataloading_process(inputs, labels)
            with trainer.train_context():
                model(tokens, **extra, transfer=Transfer(counted, learns=False))
    finally:
        for handle in handles:
            handle.remove()
        loader.load_state_dict(place)
        trainer.ntokens_seen = seen
    for name, mixer in mixers.items():
        keys = torch.cat(taken[name])
        if ranks > 1:
            everywhere = [torch.empty_like(keys) for _ in range(ranks)]
            dist.all_gather(everywhere, keys)
            parts = [part.unflatten(0, (-1, wanted)) for part in everywhere]
            keys = torch.stack(parts, 1).flatten(0, 2)  # a step's ranks one after another
        for parameter, value in mixer.calibrate(keys).items():
            drawn_whole(_copying(value))(mixer.get_parameter(parameter))
    trainer.metrics_processor.say(
        f"calibrated {len(mixers)} mixers on {batches * ranks * wanted:,} keys each"
    )


def _copying(value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda whole: whole.copy_(value)
