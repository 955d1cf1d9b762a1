"""Counts the bytes of floating-point tensors that are alive, on any device, without an allocator.

A dispatch mode sees every tensor that an operator returns and remembers its storage weakly; views
share their storage and are counted once. It measures what `lowline.cola.accounting` predicts: what
is alive after a forward pass is what the backward pass was left, and the peak of a step is what a
device must hold. Left out: the scratch space inside one operator, and integer tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context manager: `now()`, and `peak`, the most that any operator left alive.

    Args:
        count: tensors made earlier that belong to the sum, such as parameters.
        ignore: tensors made earlier that do not, nor do their views.
    """

    def __init__(
        self, count: Iterable[torch.Tensor] = (), ignore: Iterable[torch.Tensor] = ()
    ) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        self._ignored = [_storage(tensor) for tensor in ignore]  # held: their keys stay theirs
        self._ignored_keys = {storage._cdata for storage in self._ignored}
        for tensor in count:
            self._add(tensor)

    def now(self) -> int:
        """Return bytes alive at this moment."""
        total, dead = 0, []
        for key, reference in self._storages.items():
            storage = reference()
            if storage is None:
                dead.append(key)
            else:
                total += storage.nbytes()  # FSDP frees by resizing to 0
        for key in dead:
            del self._storages[key]
        return total

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor comes back with the local tensors
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self._add(leaf)
        self.peak = max(self.peak, self.now())
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        fake = storage.device.type == "meta"  # what DTensor works out shapes with
        if not fake and storage._cdata not in self._ignored_keys:
            self._storages[storage._cdata] = weakref.ref(storage)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
