"""Judging masks: what cut and repaired networks get right, without building one network per mask.

The network is traced once, for all masks. A mask exchanges the layers that it cuts or that are solved again, and runs
through the graph a few images at a time, so that values stay in the processor's cache; the samples of each layer's
regression are taken on the way. On a CPU every mask has one thread, and as many masks run side by side as there are
threads: what a mask gets right depends neither on the other masks nor on the number of threads, and repaired weights
are those of `Reconstruction.cut` with one thread, bit for bit.

Shapes: B images, S samples, K weights per filter, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ..data.objective import Objective, output_of
from ..networks.batch_size import chunks
from ..networks.copying import copied
from ..networks.graph_passes import is_relu, is_sum, only_user
from ..networks.memory_layout import arranged, layout_of
from ..networks.module_kinds import is_leaf
from ..surgery.cutting import KeptRows, cut_channels, kept_rows
from ..surgery.filter_group import FilterGroup, vanished
from ..surgery.shared_weights import sharing_modules
from ..surgery.slicing import slice_axes
from .patches import SampledPlaces, Samples
from .reconstruction import Reconstruction, Site, follow, largest_value, narrowed, put_solution

CHUNK_BYTES = 2**22  # of the largest value that the images of one pass make on a CPU
SIDE_BY_SIDE_BYTES = 2**31  # that masks which run side by side may take together
GPU_STREAMS = 4
Choices = Mapping[FilterGroup, Tensor]
Modules = Mapping[str, nn.Module]
Values = dict[fx.Node, Any]


class Judge:
    """Counts what cut networks get right, repaired like `Reconstruction.cut` does it or not at all.

    Args:
        model: the dense network, untouched.
        groups: the groups that choices will be about.
        images: (B, ...) the reward images, all that will be asked for.
        targets: theirs, (B, ...).
        objective: what answers are scored by.
        reconstruction: the repair; None leaves networks as cut.

    `obstacle` says why it cannot, or is empty: a network that cannot be traced, or whose graph follows from the widths
    of its layers, weights in several places, classes that hold weights of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[FilterGroup],
        images: Tensor,
        targets: Tensor,
        objective: Objective,
        reconstruction: Reconstruction | None,
    ) -> None:
        self.model, self.groups, self.objective = model, tuple(groups), objective
        self.images, self.targets, self.repair = images, targets, reconstruction
        self.layout = layout_of(model, images)
        self.obstacle = ""
        try:
            self._set_up()
        except Exception as error:
            self.obstacle = f"{type(error).__name__}: {error}"

    def _set_up(self) -> None:
        some = arranged(self.images[:2], self.layout)
        traced = self._traced(some)
        self.obstacle = _unsuited(self.model, traced, self.groups) or _varying(self.model, traced, self.groups, some)
        self._graph = _Graph(traced, self.groups)
        self._dense = dict(traced.named_modules())
        if self.obstacle:
            return
        n_bytes = largest_value(traced, some)
        fit = self.images[:0] if self.repair is None else self.repair.images
        on_cpu = self.images.device.type == "cpu"
        self._chunk = max(2, CHUNK_BYTES // n_bytes) if on_cpu else max(len(fit), 1024)
        self._fit = list(chunks(len(fit), self._chunk))
        # Three or so values of all images are alive together.
        room = SIDE_BY_SIDE_BYTES // (4 * n_bytes * max(len(fit), self._chunk))
        self.side_by_side = max(1, min(room, torch.get_num_threads() if on_cpu else GPU_STREAMS))
        self._alone = room < 2  # whatever the number of threads, so that this does not change a mask's result
        if self.repair is not None:
            self._places = SampledPlaces(len(fit))
        self._scoring = Lock()  # a metric of the user's own need not bear several threads

    def _traced(self, some: Tensor) -> fx.GraphModule:
        if self.repair is not None:
            return self.repair.traced
        return follow(copied(self.model).eval().requires_grad_(False), some)

    def points(self, choices: Sequence[Choices], image_indices: Tensor | None = None) -> list[Tensor | None]:
        """Points of the images named, (B',) int64, or of all, under each choice; None where it has to be cut for real.

        That is where a branch vanishes, or where the sums of a regression cannot be factorised.
        """
        images, targets = self.images, self.targets
        if image_indices is not None:
            images, targets = images[image_indices], targets[image_indices]
        images = arranged(images, self.layout)
        if self.repair is not None:
            _ = self._prefix  # before there are threads

        def judged(each: Choices) -> Tensor | None:
            with torch.inference_mode():
                return self._points(each, images, targets)

        if self._alone:
            return [judged(each) for each in choices]
        with _threads(min(self.side_by_side, len(choices)), images.device) as run:
            return list(run(judged, choices))

    def _points(self, choices: Choices, images: Tensor, targets: Tensor) -> Tensor | None:
        if vanished(choices):
            return None
        kept = narrowed(self.model, kept_rows(self.model, choices))
        modules = _cut_modules(self._dense, kept)
        if self.repair is not None and kept and not self._repaired(modules, kept):
            return None
        found = []
        for rows in chunks(len(images), min(self._chunk, 256) if images.device.type == "cpu" else 1024):
            values: Values = {self._graph.images: images[rows]}
            output = self._graph.run(values, modules, self._graph.nodes)
            with self._scoring:
                found.append(self.objective.points(output_of(output), targets[rows]))
        return torch.cat(found).cpu().clone()

    @cached_property
    def _prefix(self) -> list[Values]:
        """What comes before every cut, chunk by chunk of the fit images: the same under all masks."""
        assert self.repair is not None
        found: list[Values] = []
        with torch.inference_mode():
            for rows in self._fit:
                found.append({self._graph.images: self.repair.images[rows]})
                self._graph.run(found[-1], self._dense, self._graph.before_cuts)
        return found

    def _repaired(self, modules: dict[str, nn.Module], kept: KeptRows) -> bool:
        """Solve every layer whose input has changed, in the order of execution; whether that was possible."""
        assert self.repair is not None
        graph, sites, failures = self._graph, self.repair.sites, []
        changed = graph.behind(kept)
        to_solve = [n for n in graph.nodes if n.name in sites and any(each in changed for each in n.all_input_nodes)]
        chunked = [graph.started(values) for values in self._prefix]
        ends = [graph.position[node] for node in to_solve]
        for node, (start, end) in zip(to_solve, pairwise([len(graph.before_cuts), *ends]), strict=True):
            solving = _Solving(self, node, sites[node.name], modules, kept)
            for rows, values in zip(self._fit, chunked, strict=True):
                graph.run(values, modules, graph.nodes[start:end])
                solving.add(values, rows)
            failures.append(solving.solve())
        return not failures or not bool(torch.stack(failures).any())


class _Solving:
    """One layer's regression, from the first chunk of images to its weights."""

    def __init__(self, judge: Judge, node: fx.Node, site: Site, modules: dict[str, nn.Module], kept: KeptRows) -> None:
        assert judge.repair is not None
        self.node, self.site, self.settings = node, site, judge.repair.settings
        for name in filter(None, (site.module, site.norm)):
            modules[name] = modules[name] if name in kept else _twin(modules[name])
        self.module, self.norm = modules[site.module], None if site.norm is None else modules[site.norm]
        self.places, self.n_places, self.n_images = judge._places, judge.repair.places(site), len(judge.repair.images)
        rows = kept.get(site.module, {}).get("out")
        self.keep = slice(None) if rows is None else torch.as_tensor(rows)
        self.wanted, self.partner = judge.repair.wanted[node.name], judge._graph.named.get(site.partner or "")
        self.per_image = len(self.wanted.outputs) // self.n_images
        intercept = self.module.bias is not None or self.norm is not None
        self.samples = Samples(len(self.wanted.outputs), self.module, intercept)

    def add(self, values: Values, rows: slice) -> None:
        """The samples of some images."""
        inputs_SK = self.places.inputs(self.module, values[self.node.all_input_nodes[0]], rows, self.n_places)
        wanted_SO = self._wanted(values, rows)
        if isinstance(self.module.bias, Tensor):
            wanted_SO = wanted_SO - self.module.bias
        self.samples.put(self._own(rows), inputs_SK, wanted_SO)

    def _wanted(self, values: Values, rows: slice) -> Tensor:
        """`Wanted.given`, of some images."""
        now = None
        if self.wanted.partner is not None and self.partner is not None:
            now = self.places.outputs(
                values[self.partner], rows, self.n_places, last=isinstance(self.module, nn.Linear)
            )
        return self.wanted.given(now, self.norm, self.keep, self._own(rows))

    def _own(self, rows: slice) -> slice:
        """The samples of some images among all."""
        return slice(rows.start * self.per_image, rows.stop * self.per_image)

    def solve(self) -> Tensor:
        """Put the weights in place; torch's note whether that failed."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        solved, failed = self.samples.solved(weight.reshape(len(weight), -1).T, self.settings.ridge)
        put_solution(solved, self.module, self.norm)
        return failed


class _Graph:
    """The nodes of a traced network in order, run one by one with modules of one's choice."""

    def __init__(self, traced: fx.GraphModule, groups: Sequence[FilterGroup]) -> None:
        self.traced = traced
        everything = list(traced.graph.nodes)
        (self.images,) = (node for node in everything if node.op == "placeholder")
        self.nodes = [node for node in everything if node.op not in ("placeholder", "output")]
        self.output = everything[-1]
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.named = {node.name: node for node in everything}
        cut = {each.module for group in groups for each in group.cuts}
        first = min((index for index, node in enumerate(self.nodes) if node.target in cut), default=0)
        self.before_cuts = self.nodes[:first]
        self._dead = _dead_after(everything)
        self._writes = {node: source for node in self.nodes if (source := _overwritten(traced, node)) is not None}

    def behind(self, kept: KeptRows) -> set[fx.Node]:
        """The nodes whose value changes when these modules are cut."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            own = node.op == "call_module" and node.target in kept
            if own or any(each in found for each in node.all_input_nodes):
                found.add(node)
        return found

    def started(self, values: Values) -> Values:
        """The values of `before_cuts`, to go on from; what will be written into is copied."""
        written = set(self._writes.values())
        return {n: v.clone() if n in written and isinstance(v, Tensor) else v for n, v in values.items()}

    def run(self, values: Values, modules: Modules, nodes: Sequence[fx.Node]) -> Any:
        """Run some nodes, in place of `values`; returns the network's output once its nodes have run."""
        for node in nodes:
            values[node] = self.value(node, values, modules)
            for dead in self._dead.get(node, ()):
                del values[dead]
        return self._loaded(self.output.args[0], values) if nodes and nodes[-1] is self.nodes[-1] else None

    def value(self, node: fx.Node, values: Values, modules: Modules) -> Any:
        """What one node makes."""
        args, kwargs = self._loaded(node.args, values), self._loaded(node.kwargs, values)
        if node in self._writes:
            return _in_place(args)
        if node.op == "call_module":
            return modules[str(node.target)](*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        found: Any = self.traced
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found

    @staticmethod
    def _loaded(args: Any, values: Values) -> Any:
        return map_arg(args, values.__getitem__)


def _dead_after(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The nodes whose values nothing reads after a node."""
    seen: set[fx.Node] = set()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(nodes):
        for each in (node, *node.all_input_nodes) if node.op != "output" else node.all_input_nodes:
            if each not in seen:
                seen.add(each)
                if node.op != "output":
                    found.setdefault(node, []).append(each)
    return found


def _overwritten(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What a ReLU or a sum may write its result into: the fresh value of a layer, norm or sum that only it reads."""
    sources = node.all_input_nodes
    if is_relu(traced, node) and len(node.args) == 1 and node.kwargs in ({}, {"inplace": False}):
        sources = sources[:1]
    elif not is_sum(node) or len(sources) != 2:
        return None
    for source in sources:
        module = traced.get_submodule(str(source.target)) if source.op == "call_module" else None
        fresh = is_sum(source) or isinstance(module, _ConvNd | nn.Linear | _BatchNorm)
        if fresh and only_user(source) is node:
            return source if source is node.args[0] else None
    return None


def _in_place(args: tuple[Any, ...]) -> Tensor:
    """A ReLU of one value, or the sum of two, in the place of the first."""
    if len(args) == 1:
        return torch.relu_(args[0])
    first, second = args
    alike = isinstance(second, Tensor) and first.shape == second.shape and first.dtype == second.dtype
    found: Tensor = first.add_(second) if alike else first + second
    return found


def _cut_modules(dense: Modules, kept: KeptRows) -> dict[str, nn.Module]:
    """All modules, those that lose channels as copies without them (`cutting.cut_channels`)."""
    found = dict(dense)
    for name, axes in kept.items():
        module = found[name] = _twin(dense[name])
        slice_axes(name, module, axes)
    return found


def _twin(module: nn.Module) -> nn.Module:
    """A copy of one layer with weights of its own; everything else is shared."""
    twin = module.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        own = getattr(module, kind)
        copies = {name: None if value is None else value.detach().clone() for name, value in own.items()}
        if kind == "_parameters":
            copies = {k: v if v is None else nn.Parameter(v, requires_grad=False) for k, v in copies.items()}
        twin.__dict__[kind] = copies
    return twin


def _unsuited(model: nn.Module, traced: fx.GraphModule, groups: Sequence[FilterGroup]) -> str:
    """Why the layers that groups cut cannot be exchanged in the graph, or ""."""
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    modules = dict(traced.named_modules())
    for name in dict.fromkeys(cut.module for group in groups for cut in group.cuts):
        module = modules.get(name)
        if module is None or called.count(name) != 1:
            return f"{name!r} is not called once"
        if not is_leaf(module) or parametrize.is_parametrized(module) or module._modules:
            return f"{name!r} is of a class of its own"
    if any(":" in cut.axis for group in groups for cut in group.cuts):
        return "a group goes with a tensor that is no layer's"
    if sharing_modules(model):
        return "layers share weights"
    known = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    loose = [str(n.target) for n in traced.graph.nodes if n.op == "get_attr" and n.target not in known]
    return f"{loose[0]!r} is made on the way" if loose else ""


def _varying(model: nn.Module, traced: fx.GraphModule, groups: Sequence[FilterGroup], some: Tensor) -> str:
    """Why the graph is not that of a network in which every group lost filters, half of them or all but one; or ""."""
    usual = [_shown(node) for node in traced.graph.nodes]
    for share in (0.5, 0.0):
        choices = {group: torch.arange(group.n_filters) < max(1, int(share * group.n_filters)) for group in groups}
        smaller = cut_channels(model, kept_rows(model, choices)).eval().requires_grad_(False)
        if [_shown(node) for node in follow(smaller, some).graph.nodes] != usual:
            return "its graph follows from the widths of its layers"
    return ""


def _shown(node: fx.Node) -> str:
    return f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}"


Run = Callable[[Callable[[Choices], Tensor | None], Sequence[Choices]], Iterator[Tensor | None]]


@contextmanager
def _threads(count: int, device: torch.device) -> Iterator[Run]:
    """Masks side by side, each with one of torch's threads, or on a GPU with a stream of its own."""
    usual = torch.get_num_threads()
    streams = _Streams(device) if device.type == "cuda" else None

    def begun() -> None:
        torch.set_num_threads(1)

    with ThreadPoolExecutor(count, initializer=None if streams else begun) as pool:
        try:
            yield (lambda call, all_choices: pool.map(streams.within(call) if streams else call, all_choices))
        finally:
            pool.shutdown()
            torch.set_num_threads(usual)  # part of it holds for the whole process


@dataclass
class _Streams:
    """Streams of a GPU that wait for what was queued before."""

    device: torch.device

    def within(self, call: Callable[[Choices], Tensor | None]) -> Callable[[Choices], Tensor | None]:
        """`call` on a stream of its own."""
        current = torch.cuda.current_stream(self.device)

        def run(choices: Choices) -> Tensor | None:
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                found = call(choices)
            stream.synchronize()
            return found

        return run
