"""Graphs without a GPU: operations are noted while a function runs, undone, and later run again on the same memory.

What a CUDA graph does: Python is not asked again, numbers are those of the capture, memory stays where it is, and what
asks a tensor for its value, or for how many entries are not zero, raises an error.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")


class RecordedCapture:
    """Stands for the graphs of a device; `captures` counts, `replays` too."""

    def __init__(self, reasons=()):
        self.reasons, self.captures, self.replays = list(reasons), 0, 0

    def streaming(self):
        return nullcontext()

    @contextmanager
    def watching(self):
        yield list(self.reasons)

    def record(self, function):
        drawn = torch.get_rng_state()
        recorder = _Recorder()
        try:
            with recorder:
                results = function()
        finally:
            recorder.undo()
            torch.set_rng_state(drawn)
        self.captures += 1

        def replay():
            self.replays += 1
            recorder.replay()

        return results, replay


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [each for each in _tensors(args[1:]) if each.dtype == torch.bool]
        if func.name().startswith(FORBIDDEN) or (func.name() == "aten::index.Tensor" and masks):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        kwargs = kwargs or {}
        for each in _tensors((args, kwargs)):
            storage = each.untyped_storage()
            if storage.data_ptr() not in self.made | set(self.before):
                self.before[storage.data_ptr()] = (storage, storage.clone())
        results = func(*args, **kwargs)
        self.made |= {each.untyped_storage().data_ptr() for each in _tensors(results)} - set(self.before)
        self.operations.append((func, args, kwargs, results))
        return results

    def undo(self):
        for storage, saved in self.before.values():
            storage.copy_(saved)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, results in self.operations:
            given = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
            if func._schema.is_mutable:
                func(*args, **kwargs)
                continue
            fresh = [each for each in _tensors(results) if each.untyped_storage().data_ptr() not in given]
            if fresh:  # a view shows what its tensor has become
                found = func(*args, **kwargs)
                for place, value in zip(_tensors(results), _tensors(found), strict=True):
                    place.copy_(value)


def _tensors(values):
    return [each for each in _pytree.tree_leaves(values) if isinstance(each, Tensor)]
