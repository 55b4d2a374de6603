"""Reconstruction: a cut network repaired in closed form, every layer behind a cut regressed on its present inputs.

Layer after layer, in the order of execution, the weights are solved for what the DENSE network's layer put out, given
what the cut network, already repaired up to there, feeds it. That is the least-squares reconstruction of He et al. 2017
(arXiv 1707.06168, eq. 5), and at the end of a residual branch their section 3.3: the branch also has to make up for
what its shortcut lost. Ours: a ridge towards the weights as cut, an intercept, and every layer behind the first cut is
solved, not only those that read pruned channels. One pass over a few hundred images; no gradient, no label.

Shapes: B images, S samples, K weights per filter, O outputs.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import UserError
from ...ranges import COUNT, IMAGES, POSITIVE, check_numbers
from ..networks.copying import copied
from ..networks.graph_passes import functionalise, only_user
from ..networks.hooks import removed_after
from ..networks.memory_layout import arranged, layout_of
from ..networks.modes import evaluating
from ..networks.module_kinds import is_leaf
from ..networks.sized_tracing import traced as trace
from ..surgery.cutting import KeptRows, cut_channels, kept_rows
from ..surgery.filter_group import Branch, FilterGroup, vanished
from ..surgery.shared_weights import SHARES, sharing_modules
from ..surgery.slicing import Rows, width
from ..surgery.whole_blocks import Vanished, find_module
from .patches import chosen_ridge, inputs_at, obstacle, outputs_at, regress

VALUE_BYTES = 3 * 2**30  # that values of all images may take together
SAMPLE_BYTES = 2 * 2**30  # that outputs of the dense network may take which layers are regressed on
FEWEST_IMAGES = 32
_SUMS = {operator.add, operator.iadd, torch.add}


@dataclass(frozen=True)
class ReconstructionSettings:
    """How a cut network is repaired.

    Args:
        images: number of images of the fit split; they are in memory together, as activations of one layer.
        places: sampled positions per image and layer.
        ridge: pull towards the weights as cut, relative to the mean energy of an input; stronger where a layer has few
            samples per weight (`patches.chosen_ridge`).
        max_inputs: layers with more weights per filter stay as cut (the system grows with the square).
        per_weight: samples per weight of a filter that are enough: layers with few weights are read at fewer places.
            None: at `places`, all of them.
    """

    images: int = 1000
    places: int = 32
    ridge: float = 1e-3
    max_inputs: int = 4608
    per_weight: float | None = None

    def __post_init__(self) -> None:
        if min(self.images, self.places, self.max_inputs) < 1 or not self.ridge > 0:
            raise UserError(
                f"The reconstruction has images={self.images}, places={self.places}, ridge={self.ridge}, "
                f"max_inputs={self.max_inputs}; expected all of them above 0."
            )
        check_numbers(self, images=IMAGES, places=COUNT, ridge=POSITIVE, max_inputs=COUNT, per_weight=POSITIVE)

    def places_of(self, n_weights: int, n_images: int) -> int:
        """Sampled positions per image of a layer with so many weights per filter."""
        if self.per_weight is None:
            return self.places
        return min(self.places, math.ceil(self.per_weight * n_weights / n_images))


@dataclass(frozen=True)
class Site:
    """A layer that can be solved.

    Attributes:
        module: its name.
        norm: the batch norm right behind it, which takes the intercept.
        partner: the graph node that is added to its output (behind the norm) and is known before it runs.
        n_weights: of one of its filters, in the dense network.
    """

    module: str
    norm: str | None
    partner: str | None
    n_weights: int


@dataclass(frozen=True)
class Wanted:
    """What the dense network did at a site: outputs (S, O), and its sum partner's (S, O) if there is one."""

    outputs: Tensor
    partner: Tensor | None

    def given(self, now: Tensor | None, norm: nn.Module | None, keep: Tensor | slice, samples: slice) -> Tensor:
        """What is wanted of a cut layer: its outputs, and what its sum partner has lost.

        Args:
            now: what the partner makes in the cut network, if there is one.
            norm: the batch norm behind the layer.
            keep: outputs that are left.
            samples: which of them.
        """
        outputs = self.outputs[samples][:, keep]
        if self.partner is None or now is None or now.shape != outputs.shape:
            return outputs
        lost = self.partner[samples][:, keep] - now
        return outputs + (lost if norm is None else lost / _norm_scale(norm))


class Reconstruction:
    """Cuts a dense network and repairs it; the dense network is run once, here.

    Args:
        model: the dense network, untouched.
        images: (B, ...) of the fit split; the first ones are taken where not all fit into memory.
        settings: how.

    `sites` are the layers that can be solved, by graph node; `skipped` the others, with the reason. Raises UserError
    for a network that `torch.fx` cannot trace.
    """

    def __init__(self, model: nn.Module, images: Tensor, settings: ReconstructionSettings | None = None) -> None:
        self.settings = settings or ReconstructionSettings()
        self.model = model
        self.images = arranged(images, layout_of(model, images))
        self.traced = follow(copied(model).eval().requires_grad_(False), self.images[:2])
        self.sites, self.skipped = find_sites(self.traced, self.settings.max_inputs)
        self._spare_memory()
        recorder = _Recorder(self.traced, self.sites, self.places)
        with torch.no_grad():
            recorder.run(self.images)
        self.wanted = recorder.wanted
        self._means: dict[str, Tensor] = {}

    def _spare_memory(self) -> None:
        """Take fewer images, at more places each, where values of all would not fit; fewer places, where samples."""
        asked, settings = len(self.images), self.settings
        n_images = min(asked, max(FEWEST_IMAGES, VALUE_BYTES // (3 * largest_value(self.traced, self.images[:2]))))
        places = math.ceil(settings.places * asked / n_images)
        per_sample = sum(self._sample_bytes(site) for site in self.sites.values())
        places = min(places, max(1, SAMPLE_BYTES // max(1, per_sample * n_images)))
        if n_images < asked:
            self.images = self.images[:n_images].clone()  # a part of the others would keep them all
        self.settings = replace(settings, places=places)

    def _sample_bytes(self, site: Site) -> int:
        weight = _tensor(self.traced.get_submodule(site.module), "weight")
        return len(weight) * weight.element_size() * (1 if site.partner is None else 2)

    def cut(self, choices: Mapping[FilterGroup, Tensor]) -> nn.Module:
        """`prune(model, choices)`, repaired; the same choices always give the same network.

        Layers that see nothing of what was removed keep their weights, bit for bit. Raises UserError as `prune` does.
        """
        kept, branches = narrowed(self.model, kept_rows(self.model, choices)), vanished(choices)
        pruned = cut_channels(self.model, kept, branches)
        if not kept and not branches:
            return pruned
        working = copied(pruned).eval().requires_grad_(False)
        with torch.no_grad():
            # The graph's modules are the working copy's own: what is solved in the graph is solved there.
            _Repair(follow(working, self.images[:2]), self, kept, branches).run(self.images)
        pruned.load_state_dict(working.state_dict())
        return pruned

    def places(self, site: Site) -> int:
        """Sampled positions per image of a layer."""
        return self.settings.places_of(site.n_weights, len(self.images))

    def branch_means(self, branches: Sequence[Branch]) -> dict[str, Tensor]:
        """What each branch adds in the dense network, the mean of a channel (K,), by its last module."""
        unknown = [branch for branch in branches if branch.tail not in self._means]
        if unknown:
            hooks = (
                find_module(self.model, branch.tail).register_forward_hook(self._noting(branch)) for branch in unknown
            )
            with removed_after(hooks), evaluating(self.model), torch.no_grad():
                self.model(self.images)
        return {branch.tail: self._means[branch.tail] for branch in branches}

    def _noting(self, branch: Branch) -> Callable[..., None]:
        last = isinstance(find_module(self.model, branch.chain[0]), nn.Linear)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._means[branch.tail] = output.movedim(-1 if last else 1, 0).flatten(1).mean(1)

        return hook


def narrowed(model: nn.Module, kept: KeptRows) -> KeptRows:
    """Only the modules that lose channels: a group that is kept in full touches none of its own."""
    return {
        name: axes
        for name, axes in kept.items()
        if any(len(rows) < width(find_module(model, name), axis) for axis, rows in axes.items())
    }


def find_sites(traced: fx.GraphModule, max_inputs: int) -> tuple[dict[str, Site], dict[str, str]]:
    """The sites by graph node, and the layers that are left as cut, by name, with the reason."""
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    sites, skipped, sharing = {}, {}, sharing_modules(traced)
    for node in traced.graph.nodes:
        if not _is_layer(traced, node):
            continue
        module = traced.get_submodule(node.target)
        why = obstacle(module, max_inputs) if is_leaf(module) else "a class of its own"
        why = "it is called more than once" if calls[node.target] > 1 else why
        why = f"it {SHARES}" if node.target in sharing else why
        if why:
            skipped[node.target] = why
            continue
        norm = _norm_behind(traced, node, calls)
        partner = _partner(norm or node)
        known = partner is not None and order[partner] < order[node]
        name = partner.name if partner is not None and known else None
        n_weights = math.prod(_tensor(module, "weight").shape[1:])
        sites[node.name] = Site(str(node.target), None if norm is None else str(norm.target), name, n_weights)
    return sites, skipped


def shortcuts_first(traced: fx.GraphModule) -> None:
    """Reorder the graph so that what is added to a layer's output is computed before the layer, where it can be."""
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        if _is_layer(traced, node):
            partner = _partner(_norm_behind(traced, node, calls) or node)
            if partner is not None:
                _move_before(node, partner)
    traced.recompile()


def _is_layer(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = traced.get_submodule(str(node.target))
    if isinstance(module, Vanished):
        return module.value is not None
    return isinstance(getattr(module, "weight", None), torch.Tensor) and not isinstance(module, _BatchNorm)


def _norm_behind(traced: fx.GraphModule, node: fx.Node, calls: Counter[Any]) -> fx.Node | None:
    user = only_user(node)
    if user is None or user.op != "call_module" or calls[user.target] > 1:
        return None
    module = traced.get_submodule(str(user.target))
    return user if isinstance(module, _BatchNorm) and module.running_mean is not None else None


def _partner(tail: fx.Node) -> fx.Node | None:
    """What is added to the value of `tail`, if that is all that happens to it."""
    total = only_user(tail)
    if total is None or total.target not in _SUMS or total.kwargs or len(total.all_input_nodes) != 2:
        return None
    return next(each for each in total.all_input_nodes if each is not tail)


def _move_before(node: fx.Node, wanted: fx.Node) -> None:
    """Put `wanted`, and what it needs, before `node`; nothing happens if it depends on `node` itself."""
    order: Mapping[fx.Node, int] = {each: position for position, each in enumerate(node.graph.nodes)}
    needed: set[fx.Node] = set()
    stack = [wanted]
    while stack:
        each = stack.pop()
        if each is node:
            return
        if order[each] > order[node] and each not in needed:
            needed.add(each)
            stack.extend(each.all_input_nodes)
    for each in sorted(needed, key=lambda each: order[each]):
        node.prepend(each)


def follow(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """The graph of `model` in the order in which its layers are solved; UserError where `torch.fx` cannot trace it."""
    try:
        traced = trace(model, images)
        functionalise(traced)
    except Exception as error:
        raise UserError(
            f"The network cannot be traced ({error}), so it cannot be repaired layer by layer; prune it without repair."
        ) from error
    shortcuts_first(traced)
    return traced


def largest_value(traced: fx.GraphModule, some: Tensor) -> int:
    """Bytes per image of the largest value of a pass."""
    sizes = [some.numel() * some.element_size()]

    class Sizing(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                sizes.append(value.numel() * value.element_size())
            return value

    with torch.no_grad():
        Sizing(traced).run(some)
    return max(1, max(sizes) // len(some))


class _Recorder(fx.Interpreter):
    """Runs the dense network and notes what it puts out at every site."""

    def __init__(self, traced: fx.GraphModule, sites: Mapping[str, Site], places: Callable[[Site], int]) -> None:
        super().__init__(traced)
        self.sites, self.places = sites, places
        self.wanted: dict[str, Wanted] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run and note."""
        value = super().run_node(n)
        site = self.sites.get(n.name)
        if site is not None:
            module = self.submodules[site.module]
            count = self.places(site)
            outputs = _rows(module, value, count)
            partner = None if site.partner is None else _rows(module, _value(self, site.partner), count)
            same = partner is not None and partner.shape == outputs.shape
            self.wanted[n.name] = Wanted(outputs, partner if same else None)
        return value


class _Repair(fx.Interpreter):
    """Runs the cut network, and solves every layer whose input has changed just before it runs."""

    def __init__(
        self, traced: fx.GraphModule, reconstruction: Reconstruction, kept: KeptRows, branches: Sequence[Branch] = ()
    ) -> None:
        super().__init__(traced)
        self.source, self.kept = reconstruction, kept
        self.touched: set[fx.Node] = set()
        self.branches = {branch.tail: branch for branch in branches}
        self.means = reconstruction.branch_means(branches)

    def run_node(self, n: fx.Node) -> Any:
        """Solve if needed, then run."""
        changed = any(each in self.touched for each in n.all_input_nodes)
        module = self.submodules[str(n.target)] if n.op == "call_module" else None
        if isinstance(module, Vanished) and n.target in self.branches:
            self._solve_constant(str(n.target), module)
            self.touched.add(n)
            return super().run_node(n)
        site = self.source.sites.get(n.name)
        if changed and site is not None and site.module == n.target and not isinstance(module, Vanished):
            self._solve(n, site)
        if changed or (n.op == "call_module" and n.target in self.kept):
            self.touched.add(n)
        return super().run_node(n)

    def _solve(self, node: fx.Node, site: Site) -> None:
        settings = self.source.settings
        module = self.submodules[site.module]
        norm = None if site.norm is None else self.submodules[site.norm]
        inputs_SK = inputs_at(module, _value(self, node.all_input_nodes[0].name), self.source.places(site))
        wanted_SO = self._wanted(node.name, site, self.kept.get(site.module, {}).get("out"), norm)
        weight, bias = _tensor(module, "weight"), module.bias
        intercept = bias is not None or norm is not None
        prior_KO = weight.reshape(len(weight), -1).T
        if isinstance(bias, Tensor):
            wanted_SO = wanted_SO - bias
        ridge = chosen_ridge(inputs_SK, wanted_SO, prior_KO, settings.ridge, intercept)
        solved = regress(inputs_SK, wanted_SO, prior_KO, ridge, intercept)
        put_solution(solved, module, norm)

    def _solve_constant(self, place: str, module: Vanished) -> None:
        """The best constant: the mean of what the branch added, and of what its shortcut has lost since."""
        assert module.value is not None
        branch = self.branches[place]
        found = (self.kept.get(name, {}).get("out") for name in reversed(branch.chain))
        rows = next((rows for rows in found if rows is not None), None)
        keep = slice(None) if rows is None else torch.as_tensor(rows)
        mean = self.means[branch.tail][keep]
        for name, site in self.source.sites.items():
            wanted = self.source.wanted[name]
            if branch.tail in (site.module, site.norm) and wanted.partner is not None and site.partner is not None:
                now = outputs_at(_value(self, site.partner), self.source.places(site), last=module.last)
                if now.shape[1] == mean.shape[0]:
                    mean = mean + wanted.partner[:, keep].mean(0) - now.mean(0)
        module.value.copy_(mean)

    def _wanted(self, name: str, site: Site, rows: Rows | None, norm: nn.Module | None) -> Tensor:
        wanted = self.source.wanted[name]
        keep = slice(None) if rows is None else torch.as_tensor(rows)
        now = None
        if wanted.partner is not None and site.partner is not None:
            now = _rows(self.submodules[site.module], _value(self, site.partner), self.source.places(site))
        return wanted.given(now, norm, keep, slice(None))


def put_solution(solved: Tensor, module: nn.Module, norm: nn.Module | None) -> None:
    """Put solved weights (K, O) in place, and the intercept, a last row, into the bias or the mean of the norm."""
    weight, bias = _tensor(module, "weight"), module.bias
    if isinstance(bias, Tensor):
        bias += solved[-1].to(bias)
    elif isinstance(norm, _BatchNorm):
        _tensor(norm, "running_mean").sub_(solved[-1].to(weight))
    intercept = bias is not None or norm is not None
    weight.copy_((solved[:-1] if intercept else solved).T.reshape(weight.shape))


def _rows(module: nn.Module, value: Tensor, places: int) -> Tensor:
    """Rows (S, O) of what `module` puts out, or of what is added to it."""
    return outputs_at(value, places, last=isinstance(module, nn.Linear))


def _norm_scale(norm: nn.Module) -> Tensor:
    """What a batch norm multiplies its input with, kept away from 0."""
    variance, gain = _tensor(norm, "running_var"), norm.weight
    scale = torch.rsqrt(variance + float(norm.eps))  # type: ignore[arg-type]
    scale = scale * gain if isinstance(gain, Tensor) else scale
    tiny = 1e-2 * scale.abs().mean().clamp_min(1e-12)
    return torch.where(scale.abs() < tiny, torch.full_like(scale, torch.inf), scale)


def _tensor(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value


def _value(interpreter: fx.Interpreter, name: str) -> Tensor:
    value = next(value for node, value in interpreter.env.items() if node.name == name)
    assert isinstance(value, Tensor)
    return value
