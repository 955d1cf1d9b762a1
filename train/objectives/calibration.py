"""What mixers begin with that is not their constructors': set before a run's first step.

So many steps' text goes through softmax attention of the run's own weights, as in a transfer. A
mixer that begins from the teacher's keys (`Mixer.calibrate`) gets its layer's, before the rotary
embedding; one that is fitted to the teacher's outputs (`Mixer.fit`) gets those of the first batch.
With `objective.calibration_epochs` the new layers then train one by one on all of the text
(`layer_start`). It is that of the first steps, which train on it afterwards as if it had not been
read. Layers whose mixer came with the initial weights stay as they are.

Keys are taken evenly from all ranks and steps, `KEYS` in all, without those of the first `SINKS`
tokens of documents, which are unlike all others. Fitted are rank 0's outputs, and layers train on
rank 0's text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torchtitan.components.loss import IGNORE_INDEX

from lowline.cola.sharded import set_full_tensor
from lowline.linearize.mixers.fitting import Sample
from lowline.linearize.titan import MixerAttention, Transfer
from lowline.train.hf.config import resolved_mixers
from lowline.train.objectives.layer_start import Text, train_alone

if TYPE_CHECKING:
    from lowline.train.config.run import MixerConfig
    from lowline.train.engine.trainer import Trainer

KEYS = 16_384
SINKS = 4


@torch.no_grad()
def begin_mixers(trainer: Trainer, before: MixerConfig | None) -> None:
    """Set what the mixers begin with that this run is the first to have; on all ranks at once.

    Args:
        before: the mixer that came with the initial weights, if one did.

    Raises:
        ValueError: a mixer got too few keys.
    """
    run = trainer.config.run
    held = resolved_mixers(before, run.model.n_layers)
    modules = trainer.model_parts[0].modules()
    layers = [module for module in modules if isinstance(module, MixerAttention)]
    new = [layer for layer in layers if layer.config.layer not in held]
    for layer in new:
        if getattr(layer.mixer.options, "start", None) == "random":
            layer.draw_projections()
    steps = run.objective.calibration_steps
    if steps and not new:
        trainer.metrics_processor.say("mixers go on as they came: they are not calibrated")
    elif steps:
        calibrate(trainer, steps, layers, new)


def calibrate(
    trainer: Trainer, steps: int, layers: list[MixerAttention], new: list[MixerAttention]
) -> None:
    """Set the parameters of the mixers in the layers `new`, among all that have one."""
    run = trainer.config.run
    fits, epochs = run.mixer_options().fits, run.objective.calibration_epochs
    fitted: list[dict[str, torch.Tensor]] = []  # of every layer
    texts: list[list[Text]] = []  # of every batch, at every layer
    model, loader = trainer.model_parts[0], trainer.dataloader
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

            texts.append([])

            def fit(sample: Sample, here: list[Text] = texts[-1]) -> None:
                layer = layers[len(here)]
                if len(texts) == 1:
                    fitted.append(layer.fitted(sample) if layer in new else {})
                here.append(Text.of(layer, sample, here[0] if here else None))

            given: Any = {"take_sample": fit} if fits else {"take_keys": take}
            with trainer.train_context():
                model(tokens, **extra, transfer=Transfer(counted_BL, **given))
            if fits and not epochs:
                break
    finally:
        loader.load_state_dict(position)
        trainer.ntokens_seen = seen
    for i, layer in enumerate(layers):
        if layer not in new:
            continue
        if fits:
            values = fitted[i]
            if ranks > 1:
                for value in values.values():
                    dist.broadcast(value, group=group, group_src=0)
        else:
            keys = torch.cat(taken[i :: len(layers)])
            if ranks > 1:
                everywhere = [torch.empty_like(keys) for _ in range(ranks)]
                dist.all_gather(everywhere, keys, group=group)
                by_step = [part.unflatten(0, (steps, -1)) for part in everywhere]
                keys = torch.cat(by_step, 1).flatten(0, 1)  # in the order that one rank has
            values = layer.mixer.calibrate(keys)
        for parameter, value in values.items():
            set_full_tensor(layer.mixer.get_parameter(parameter), value)
    of = "a batch" if fits else f"{len(keys):,} keys each"
    say = trainer.metrics_processor.say
    say(f"calibrated {len(new)} mixers on {of}")
    for i, layer in enumerate(layers):
        if not epochs or layer not in new:
            continue
        number = layer.config.layer
        values, error = train_alone(
            layer,
            [at_layers[i] for at_layers in texts],
            epochs=epochs,
            lr=run.objective.calibration_lr,
            seed=run.training.seed + number,
        )
        for parameter, value in values.items():
            if ranks > 1:
                dist.broadcast(value, group=group, group_src=0)
            set_full_tensor(layer.get_parameter(parameter), value)
        say(f"layer {number} alone: relative error {error:.4f} in the last of {epochs} passes")


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
