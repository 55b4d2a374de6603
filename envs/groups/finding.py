"""Finding filter groups: which filters of a network can only go together.

One run of the network follows every channel by its label (`label_tracing`): sums tie, concatenations shift, reshapes
and shuffles move, unknown operations fix. What is found is then verified: a group is offered only if the network masked
at the group's consumers and the network cut for real give the same answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...errors import UserError
from ..networks.answers import as_called, as_given, without_say
from ..networks.copying import copied
from ..networks.memory_layout import CONTIGUOUS, arranged
from ..networks.module_kinds import Inputs, is_conv, is_depthwise, is_leaf, is_transposed
from ..networks.unwrapping import is_lazy, is_wrapped, plain_network
from ..surgery.filter_group import SINGLE, Axis, Cut, FilterGroup, GroupPlan, Skipped
from ..surgery.shared_weights import shared_parameters
from ..surgery.slicing import axes_of_parameter, tensor_axis
from .branches import find_branches
from .label_tracing import trace_labels
from .module_rules import Ownership
from .verification import Verifier

TRIALS = 16
LOOKS_AT_DATA = (
    "The network looks at the values of its data, perhaps to choose its path: every group was checked on "
    f"{TRIALS} different inputs, but a path that none of them took is not covered."
)

RANDOM = (
    "The network draws random numbers in evaluation mode ({draws}), so that its accuracy changes from run to run; a "
    "functional dropout needs training=self.training."
)
BATCH_MATTERS = (
    "The network's answer to an image depends on the other images of its batch (statistics of the batch are used in "
    "evaluation mode), so that accuracies change with the batch size."
)
NOT_TRAINED = (
    "The network does not run in training mode on the example alone ({why}): what runs only there was not looked at."
)
SILENT = "it reaches no output that the metric looks at, so nothing would notice its loss (network.output)"
TRAINING_ONLY = "it runs in training mode only, where no mask can be judged"

Key = tuple[str, Axis]
Channels = dict[Key, list[int]]
Signature = tuple[tuple[Key, int], ...]


def find_groups(
    model: nn.Module, example_inputs: Inputs, *, verify: bool = True, whole_blocks: bool = False
) -> GroupPlan:
    """Find the filter groups of `model`, in the order in which their root convolutions run.

    Args:
        model: any network; it is copied, never changed. Groups are named as in the plain network (`plain_network`):
            wrappers such as DataParallel are taken off, lazy modules get their sizes from the example.
        example_inputs: what it runs on: a tensor (B, C, H, W), a tuple of positional or a mapping of keyword arguments.
        verify: check masked == pruned for every group, on random weights and inputs in float64 (`Verifier`).
        whole_blocks: look for residual branches that may vanish (`branches`), each verified as the groups are; their
            groups may then keep nothing.

    All of it runs on the CPU, wherever the network is, so that the groups are the same everywhere.

    Raises UserError if the network cannot be copied or does not run on the example.
    """
    example_inputs = arranged(tree_map_only(Tensor, Tensor.cpu, example_inputs), CONTIGUOUS)  # a `view` takes no other
    silent = without_say(model, example_inputs)
    model, example_inputs = as_given(model), as_called(model, example_inputs)
    if is_wrapped(model) or is_lazy(model):
        model = plain_network(model, example_inputs)[0]
    owners = _trace(model, example_inputs)
    found = _assemble(model, owners)
    notes = _notes(owners)
    refused: dict[str, str] = {}
    verifier = None
    if (verify or whole_blocks) and found:
        trials = TRIALS if owners.reads_values else 1
        hints = _hints(owners, found)
        verifier = Verifier(
            model, example_inputs, trials=trials, draws=owners.draws, hints=hints, trained=owners.trained
        )
        refused = verifier.failures(found) if verify else {}
        notes += [BATCH_MATTERS] if verifier.batch_matters else []
    for group in found:
        if group.n_filters == 1:
            refused.setdefault(group.name, SINGLE)
        if group.cuts[0].module in silent:
            refused.setdefault(group.name, SILENT)
    groups = tuple(group for group in found if group.name not in refused)
    if whole_blocks and verifier is not None:
        groups = _with_branches(model, example_inputs, groups, verifier)
    return GroupPlan(groups, tuple(_skipped(model, owners, groups, _reasons(found, refused))), tuple(notes))


def _with_branches(
    model: nn.Module, inputs: Inputs, groups: tuple[FilterGroup, ...], verifier: Verifier
) -> tuple[FilterGroup, ...]:
    marked = find_branches(model, inputs, groups)
    trusted = verifier.vanishing(marked)
    return tuple(
        group if group.branch is None or group.branch in trusted else replace(group, branch=None, least=1)
        for group in marked
    )


def _notes(owners: Ownership) -> list[str]:
    notes = [LOOKS_AT_DATA] if owners.reads_values else []
    if owners.draws:
        notes.append(RANDOM.format(draws=", ".join(owners.draws[:3])))
    if owners.why_not_trained:
        notes.append(NOT_TRAINED.format(why=owners.why_not_trained))
    return notes


def _hints(owners: Ownership, groups: Iterable[FilterGroup]) -> dict[str, str]:
    """What may be to blame if a group turns out not to be removable, by its name."""
    known = owners.forest.hints
    found: dict[str, str] = {}
    for group in groups if known else ():
        root = group.cuts[0]
        for label in owners.ids[root.module, root.axis][root.channels[:, 0]].tolist():
            if owners.forest.find(label) in known:
                found.setdefault(group.name, known[owners.forest.find(label)])
    return found


def _trace(model: nn.Module, inputs: Inputs) -> Ownership:
    probe = nn.Module.cpu(copied(model)).eval()
    try:
        owners = trace_labels(probe, inputs)
    except Exception as error:
        raise UserError(
            f"The network does not run on the example input ({type(error).__name__}: {error}); "
            "give one that its forward accepts."
        ) from error
    _tie_shared(owners, model)
    return owners


def _tie_shared(owners: Ownership, model: nn.Module) -> None:
    """Layers with one parameter lose the same channels; where their shapes do not say which, they keep all."""
    for places in shared_parameters(model):
        axes = [_axes_by_dimension(owners, model, *place) for place in places]
        for (name, key), (other, _), mine, others in zip(places[1:], places, axes[1:], axes, strict=False):
            for dim in range(max(len(mine), len(others))):
                ids = [owners.ids.get(each[dim]) if dim < len(each) else None for each in (mine, others)]
                both = " and ".join(repr(each) if each else "the network itself" for each in (name, other))
                reason = f"{both} share their {key}, and not all of it can be cut in both"
                if ids[0] is not None and ids[1] is not None and len(ids[0]) == len(ids[1]):
                    owners.forest.unite(ids[0], ids[1], reason)
                else:
                    for each in ids:
                        if each is not None:
                            owners.forest.fix(each, reason)


def _axes_by_dimension(owners: Ownership, model: nn.Module, name: str, key: str) -> list[Key]:
    """The axis that each dimension of a module's parameter is cut along; the inputs of a block are its second one."""
    module = model.get_submodule(name)
    axes = axes_of_parameter(module, key)
    if not axes:
        return [(name, tensor_axis(key, dim)) for dim in range(getattr(module, key).dim())]
    return [(name, axis) for axis in (reversed(axes) if is_transposed(module) else axes)]


def _assemble(model: nn.Module, owners: Ownership) -> list[FilterGroup]:
    """Classes of labels with the same modules behind them are one group; it is named after its first convolution."""
    classes: dict[int, Channels] = {}
    for key, ids in owners.ids.items():
        for channel, label in enumerate(ids.tolist()):
            if owners.forest.reason(label) is None:
                classes.setdefault(owners.forest.find(label), {}).setdefault(key, []).append(channel)
    alike: dict[Signature, list[Channels]] = {}
    for channels in classes.values():
        alike.setdefault(tuple((key, len(rows)) for key, rows in channels.items()), []).append(channels)
    groups: list[FilterGroup] = []
    for members in alike.values():
        group = _group(model, owners, members, {each.name for each in groups})
        if group is not None:
            groups.append(group)
    return sorted(groups, key=lambda group: list(owners.ids).index((group.name.partition("[")[0], "out")))


def _group(model: nn.Module, owners: Ownership, members: list[Channels], taken: set[str]) -> FilterGroup | None:
    made = [key for key in members[0] if owners.kinds[key] == "producer"]
    roots = [key for key in made if is_conv(model.get_submodule(key[0])) and key[0] not in owners.training_only]
    # A linear layer that runs at several positions is a convolution of size 1; one that sees the whole image is none.
    roots = roots or [key for key in made if key[0] in owners.at_positions]
    if not roots or not any(owners.kinds[key] == "consumer" for key in members[0]):
        return None
    free = [key for key in roots if key[0] not in taken]
    root = free[0] if free else roots[0]
    members = sorted(members, key=lambda channels: channels[root])
    name = root[0] if free else f"{root[0]}[{members[0][root][0]}]"
    keys = [root, *(key for key in members[0] if key != root)]
    return FilterGroup(name, len(members), tuple(_cut(owners, key, members) for key in keys))


def _cut(owners: Ownership, key: Key, members: Iterable[Channels]) -> Cut:
    channels = np.array([sorted(rows[key]) for rows in members], dtype=np.int64)
    return Cut(key[0], key[1], channels, owners.kinds[key])


def _reasons(found: Iterable[FilterGroup], refused: Mapping[str, str]) -> dict[str, str]:
    """Why each convolution of the refused groups is left alone."""
    reasons: dict[str, str] = {}
    for group in found:
        if group.name in refused:
            for cut in group.producers:
                partner = "" if cut is group.cuts[0] else f"it goes together with {group.name!r}: "
                reasons.setdefault(cut.module, partner + refused[group.name])
    return reasons


def _skipped(
    model: nn.Module, owners: Ownership, groups: Iterable[FilterGroup], reasons: Mapping[str, str]
) -> Iterable[Skipped]:
    """Every convolution that makes filters and is in no group, with the most frequent reason of its filters."""
    covered = {cut.module for group in groups for cut in group.producers}
    ran = {name for name, axis in owners.ids if axis == "out"}
    for name, module in model.named_modules():
        if not is_conv(module) or is_depthwise(module) or name in covered:
            continue
        if name in owners.training_only:
            yield Skipped(name, TRAINING_ONLY)
            continue
        if name not in ran:
            plain = "it does not run on the example input (in evaluation mode)"
            yield Skipped(
                name, plain if is_leaf(module) else f"{type(module).__name__} makes its weight in its own way"
            )
            continue
        found = [owners.forest.reason(label) for label in owners.ids[name, "out"].tolist()]
        known = Counter(reason for reason in found if reason)
        common = known.most_common(1)[0][0] if known else "nothing that can be cut reads its filters"
        yield Skipped(name, reasons.get(name, common))
