"""Mixers that begin from the teacher's keys: set before a run's first step.

So many steps' text goes through softmax attention of the run's own weights, as in a transfer; each
mixer that asks for it (`Mixer.calibrate`) gets its layer's keys before the rotary embedding. The
text is that of the first steps, which train on it afterwards as if it had not been read.

Keys are taken evenly from all ranks and steps, `KEYS` in all, without those of the first `SINKS`
tokens of documents, which are unlike all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torchtitan.components.loss import IGNORE_INDEX

from lowline.cola.sharded import set_full_tensor
from lowline.linearize.mixers.base import Mixer
from lowline.linearize.titan import Transfer

if TYPE_CHECKING:
    from lowline.train.engine.trainer import Trainer

KEYS = 16_384
SINKS = 4


@torch.no_grad()
def calibrate(trainer: Trainer, steps: int) -> None:
    """Set the mixers' parameters; on all ranks at once.

    Raises:
        ValueError: a mixer got too few keys.
    """
    model, loader = trainer.model_parts[0], trainer.dataloader
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    taken: list[torch.Tensor] = []  # of every batch and layer
    training, ranks, group = trainer.config.training, 1, None
    if trainer.parallel_dims.dp_enabled:  # ranks of tensor parallelism have the same rows
        group = trainer.parallel_dims.get_mesh("batch").get_group()
        ranks = dist.get_world_size(group)
    of_row = min(training.seq_len, max(1, KEYS // (steps * training.global_batch_size)))
    position, seen = loader.state_dict(), trainer.ntokens_seen
    try:
        batches = steps * trainer.gradient_accumulation_steps
        for _, (inputs, labels) in zip(range(batches), loader, strict=False):
            inputs = {name: x.to(trainer.device) for name, x in inputs.items()}
            counted_BL = labels.to(trainer.device) != IGNORE_INDEX
            places = evenly(counted_BL & (inputs["positions"] >= SINKS), of_row)
            tokens, _, extra = trainer.post_dataloading_process(inputs, labels)

            def take(k_BLNH: torch.Tensor, places: torch.Tensor = places) -> None:
                taken.append(k_BLNH.flatten(0, 1)[places].float())

            with trainer.train_context():
                model(tokens, **extra, transfer=Transfer(counted_BL, take_keys=take))
    finally:
        loader.load_state_dict(position)
        trainer.ntokens_seen = seen
    for i, mixer in enumerate(mixers):
        keys = torch.cat(taken[i :: len(mixers)])
        if ranks > 1:
            everywhere = [torch.empty_like(keys) for _ in range(ranks)]
            dist.all_gather(everywhere, keys, group=group)
            by_step = [part.unflatten(0, (steps, -1)) for part in everywhere]
            keys = torch.cat(by_step, 1).flatten(0, 1)  # in the order that one rank has
        for parameter, value in mixer.calibrate(keys).items():
            set_full_tensor(mixer.get_parameter(parameter), value)
    trainer.metrics_processor.say(f"calibrated {len(mixers)} mixers on {len(keys):,} keys each")


def evenly(wanted_BL: torch.Tensor, n: int) -> torch.Tensor:
    """(B * n,) places in the flattened batch: n of each row's tokens that are wanted.

    They lie at even distances, some more than once where a row has fewer; a row without any gives
    its first token.
    """
    length = wanted_BL.shape[1]
    places = []
    for row, wanted_L in enumerate(wanted_BL):
        found = wanted_L.nonzero()[:, 0]
        if not len(found):
            found = torch.zeros(1, dtype=torch.int64, device=found.device)
        even = torch.arange(n, device=found.device) * len(found) // n
        places.append(row * length + found[even])
    return torch.cat(places)
