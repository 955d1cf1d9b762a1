"""What holds for every launch of a Triton kernel, on the device of its tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowline.kernels.triton_tools import launch as launching
from lowline.kernels.triton_tools.launch import Options, candidates, launch, recording


def kernel_of_nothing(x: Any, bias: Any) -> None: ...


class Kernel:
    """Stands for a compiled kernel and keeps what it is launched with."""

    arg_names = ("x", "bias")
    fn = staticmethod(kernel_of_nothing)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.devices: list[int] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda **given: self.launches.append((grid, given, list(self.devices)))


def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            kernel.devices.append(self.device.index)

        def __exit__(self, *_: object) -> None:
            kernel.devices.pop()

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    launching._capability.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, device="cuda:1")
        launch(kernel, (2,), x=x, bias=x, unknown=3)
        with pytest.raises(ValueError, match=r"\['cuda:0', 'cuda:1'\]; use one device"):
            launch(kernel, (2,), x=x, bias=torch.empty(4, device="cuda:0"))
    launching._capability.cache_clear()
    ((grid, given, devices),) = kernel.launches
    assert grid == (2,) and devices == [1]
    assert set(given) == {"x", "bias", "num_warps", "num_stages"}


def test_vectors_are_made_contiguous_and_nothing_else() -> None:
    matrix = torch.zeros(4, 6).T
    with recording() as launches:
        launch(Kernel(), (1,), x=matrix, bias=torch.arange(6)[::2])
        launch(Kernel(), (1,), x=matrix, bias=torch.ones(1).expand(3))
    assert all(made.arguments["x"] is matrix for made in launches)
    assert [made.arguments["bias"].stride() for made in launches] == [(1,), (1,)]
    assert launches[0].arguments["bias"].tolist() == [0, 2, 4]


def test_hopper_has_options_of_its_own() -> None:
    assert candidates("recurrence.outputs_kernel", 90, True)[0].num_warps == 4
    assert candidates("recurrence.outputs_kernel", 90, False) == (Options(8, 2),)
    assert candidates("recurrence.outputs_kernel", 80, True) == (Options(8, 2),)
    assert candidates("conv._forward_kernel", 90, True) == (Options(8, 2),)
