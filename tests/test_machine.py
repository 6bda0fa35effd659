"""What the machine says of itself."""

import sys
from types import SimpleNamespace

import torch

from opsin.machine import joules

GPU = torch.device("cuda", 1)


class NVMLError(Exception):
    pass


def nvml(energy: int | None) -> SimpleNamespace:
    def consumption(handle: str) -> int:
        assert handle == "handle of GPU-1234"
        if energy is None:
            raise NVMLError
        return energy

    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: f"handle of {name}",
        nvmlDeviceGetTotalEnergyConsumption=consumption,
        NVMLError=NVMLError,
    )


def test_energy_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml(1_500_000))
    assert joules(GPU) == 1500
    monkeypatch.setitem(sys.modules, "pynvml", nvml(None))  # an old GPU has no counter
    assert joules(GPU) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert joules(GPU) is None
    assert joules(torch.device("cpu")) is None
