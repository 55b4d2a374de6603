"""Hooks on the modules of a network, removed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(model: nn.Module, hooks: Callable[[str, nn.Module], Iterable[RemovableHandle]]) -> Iterator[None]:
    """Inside, every module has the hooks that `hooks` registers, given its qualified name and the module."""
    handles: list[RemovableHandle] = []
    try:
        for name, module in nn.Module.named_modules(model):
            handles.extend(hooks(name, module))
        yield
    finally:
        for handle in handles:
            handle.remove()
