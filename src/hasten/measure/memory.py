"""Memory: bytes that the weights hold, and the most that a call holds beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes.

    Attributes:
        weights: of parameters and buffers, each storage once.
        activations: the most that was live during the call, above what was live when it began.
    """

    weights: int
    activations: int

    @property
    def total(self) -> int:
        """Weights and activations."""
        return self.weights + self.activations

    def to_dict(self) -> dict[str, int]:
        """Plain data for JSON."""
        return {**asdict(self), "total": self.total}


def peak(call: Callable[[], object], modules: Iterable[nn.Module]) -> Peak:
    """Runs `call` once and tells the peak of its memory beside the weights of `modules`.

    On CUDA, where a module lies there: `torch.cuda.max_memory_allocated`, per device, summed (this resets torch's peak
    counter). Else the events of torch's CPU allocator, as its profiler records them, summed in the order of time:
    exact to the byte for whatever torch allocates, in eager and in compiled code. Not seen: scratch space that a
    library (oneDNN, OpenMP) takes from the system by itself, other threads, and the freeing of what was there
    before the call. A call that compiles at this moment counts what compiling allocates: warm up first.
    """
    modules = list(modules)
    devices = {t.device for m in modules for t in _tensors(m) if t.device.type == "cuda"}
    live = _cuda_peak(call, devices) if devices else _cpu_peak(call)
    return Peak(weight_bytes(modules), live)


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the parameters and buffers of `modules`, each storage once however many tensors share it; a view counts
    its whole storage, which is what it keeps alive. Tensors on `meta` hold nothing."""
    storages: dict[tuple[object, int], int] = {}
    for module in modules:
        for tensor in _tensors(module):
            if tensor.is_mkldnn:  # packed by oneDNN: it has no storage to ask, and shares none
                storages["packed", id(tensor)] = tensor.numel() * tensor.element_size()
            elif tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _cuda_peak(call: Callable[[], object], devices: set[torch.device]) -> int:
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = {d: torch.cuda.memory_allocated(d) for d in devices}
    call()
    return sum(torch.cuda.max_memory_allocated(d) - start[d] for d in devices)


def _cpu_peak(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    live = highest = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):  # stable: equal times keep their order
        live += nbytes
        highest = max(highest, live)
    return highest
