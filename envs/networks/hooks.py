"""Hooks on the modules of a network, removed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def removed_after(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside, the hooks are there that `handles` registers one by one; those before one that fails are removed, too."""
    registered: list[RemovableHandle] = []
    try:
        for handle in handles:
            registered.append(handle)
        yield
    finally:
        for handle in registered:
            handle.remove()


def hooked(
    model: nn.Module, hooks: Callable[[str, nn.Module], Iterable[RemovableHandle]]
) -> AbstractContextManager[None]:
    """Inside, every module has the hooks that `hooks` registers, given its qualified name and the module."""
    return removed_after(each for name, module in nn.Module.named_modules(model) for each in hooks(name, module))
