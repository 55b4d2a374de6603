"""Latency meter: predicted time of a pruned network by filters kept per group, fitted to a `LatencyProfile`.

Nothing is timed here. A network's time is taken for a constant plus a sum over its layers, each a sum of products of a
function of its input width and one of its output width: ramps (arithmetic and memory grow with the width, quickly at
first or from some width on) and steps at multiples of 4, 8, 16 and 32, to which a runtime pads, or beside which it
takes a slower way. Their coefficients are at least 0 and fitted to the times of whole pruned networks (ridge
regression; Lawson and Hanson 1974, chapter 23, by coordinate descent): some belong to all layers, the others to layers
of equal shape. So what fuses, what stays in a cache and what a runtime adds is in what is measured, and not modelled.

Shapes: N measured networks, G groups, S layers, H functions of a width, T products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .filter_group import FilterGroup
from .latency_profile import LatencyProfile, LayerShape, Sample

KNOTS = (1 / 8, 1 / 4, 1 / 2)
MULTIPLES = (4, 8, 16, 32)
ONE, WIDTH = 0, 1
RAMPS = range(2, 2 + 2 * len(KNOTS))
MISSES = range(RAMPS.stop, RAMPS.stop + len(MULTIPLES))
PADDED = range(MISSES.stop, MISSES.stop + len(MULTIPLES))
RIDGE = 1e-4  # of what all layers share
OWN_RIDGE = 4.4e-3  # of what layers of a shape have for themselves: noise of 2 %, straying by a third
SWEEPS, SETTLED = 200, 1e-7
TIE = 0.005  # of the time: of multiples that are as fast the largest counts
FREE = 0.25  # of what a filter of the group costs on average: less than that is nothing
Array = NDArray[Any]


class LatencyMeter:
    """Seconds of a pass (whole batch) by filters kept per group; a `cost` takes some tens of microseconds.

    Args:
        model: the network the groups were found in; its layers must be those that were measured.
        groups: groups that may be pruned, any of those of the profile; the others keep all their filters.
        profile: measured times of this network.
        runtime: of which of its tables; None takes the first that fits.
        batch_size: likewise.

    Attributes:
        whole: seconds of the dense network.

    Raises UserError for a profile of another network, or without such a table.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[FilterGroup],
        profile: LatencyProfile,
        runtime: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        profile.check_network(model, groups)
        self.groups = tuple(groups)
        self.table = profile.table(runtime, batch_size)
        self.whole = self.table.dense_seconds
        self.fit = LatencyFit(profile, self.table.samples)
        places = {name: place for place, (name, _) in enumerate(profile.groups)}
        self._places = np.array([places[group.name] for group in groups], dtype=np.int64)
        self._full = np.array([n for _, n in profile.groups], dtype=np.float64)

    def cost(self, kept: Sequence[int]) -> float:
        """Seconds when the group at position i keeps `kept[i]` filters or, where that is faster, some more.

        Never less for more filters: 17 channels cost what 24 do where those take less time. `seconds` is the time at
        exactly these widths.
        """
        return self.whole * self.fit.fraction(self._counts(kept), at_least=True)

    def seconds(self, kept: Sequence[int]) -> float:
        """Seconds when the group at position i keeps exactly `kept[i]` filters."""
        return self.whole * self.fit.fraction(self._counts(kept))

    def _counts(self, kept: Sequence[int]) -> Array:
        counts = self._full.copy()
        counts[self._places] = kept
        return counts

    def round_multiple(self) -> int:
        """The multiple of channels that this device and runtime reward: rounded up to it, widths take the least time.

        1 where rounding up to none of 4, 8, 16 and 32 is as fast as leaving widths as they are.
        """
        full = self._full[self._places]
        fractions = np.linspace(0.1, 1.0, 37)[:, None]
        wanted = np.maximum(1, np.round(fractions * full))
        times = {}
        for multiple in (1, *MULTIPLES):
            rounded = np.minimum(full, np.ceil(wanted / multiple) * multiple)
            times[multiple] = np.mean([self.seconds(kept) for kept in rounded])
        enough = min(times[1], min(times.values()) + TIE * times[1])
        return max(multiple for multiple, time in times.items() if time <= enough)

    def free_widths(self, group: FilterGroup) -> list[int]:
        """Numbers of filters that cost nothing more than one filter fewer, ascending.

        Args:
            group: one of `groups`; the others are taken at full width.
        """
        place, full = self.groups.index(group), [each.n_filters for each in self.groups]
        times = [self.cost([*full[:place], n, *full[place + 1 :]]) for n in range(1, group.n_filters + 1)]
        nothing = FREE * (times[-1] - times[0]) / max(1, group.n_filters - 1)
        return [n for n in range(2, group.n_filters + 1) if times[n - 1] - times[n - 2] <= nothing]


class LatencyFit:
    """Time as a fraction of the dense network's, by filters kept of all groups of a profile.

    Args:
        profile: its layers and groups.
        samples: measured networks to fit to; the dense one is added.
    """

    def __init__(self, profile: LatencyProfile, samples: Sequence[Sample]) -> None:
        self._layers = layers = _Layers(profile.layers, profile.groups)
        kept = np.array([[n for _, n in profile.groups], *(each.kept for each in samples)], dtype=np.float64)
        times = np.array([1.0, *(each.fraction for each in samples)])
        shared, own = layers.features(kept)
        features = np.concatenate([shared, own.reshape(len(kept), -1)], 1) / times[:, None]
        ridge = np.repeat([RIDGE, OWN_RIDGE], [shared.shape[1], features.shape[1] - shared.shape[1]])
        found = _non_negative(features, np.ones(len(times)), ridge)
        self._constant, self._per_layer = found[0], found[1] / max(len(profile.layers), 1)
        self._exact, self._enveloped = layers.tables(found[: shared.shape[1]], found[shared.shape[1] :])
        self._scale = 1.0
        self._scale = 1.0 / self.fraction(kept[0])

    def fraction(self, kept: Array, *, at_least: bool = False) -> float:
        """For (G,) filters kept; with `at_least` of the fastest widths that are no smaller, layer by layer."""
        return float(self._scale * (self._constant + self._by_layer(kept, at_least).sum()))

    def layer_fractions(self, kept: Sequence[int]) -> dict[str, float]:
        """Each layer's part of it; what is missing from the sum is the same whatever is kept."""
        values = (self._scale * self._by_layer(np.array(kept, dtype=np.float64), False)).tolist()
        return dict(zip((each.module for each in self._layers.shapes), values, strict=True))

    def errors(self, checks: Sequence[Sample]) -> list[float]:
        """Relative errors, predicted / measured - 1."""
        return [self.fraction(np.array(each.kept, dtype=np.float64)) / each.fraction - 1 for each in checks]

    def _by_layer(self, kept: Array, at_least: bool) -> Array:
        there, places = self._layers.places(kept)
        return there * (self._per_layer + (self._enveloped if at_least else self._exact)[places])


class _Layers:
    """The layers of a network as arrays, and the functions that their times are made of."""

    def __init__(self, shapes: Sequence[LayerShape], groups: Sequence[tuple[str, int]]) -> None:
        self.shapes = tuple(shapes)
        sizes = np.array([n for _, n in groups], dtype=np.float64)
        self._matrix = np.zeros((2, len(shapes), len(groups)))
        self._gone_with = np.zeros((len(shapes), len(groups)), dtype=bool)
        for row, shape in enumerate(shapes):
            self._gone_with[row, list(shape.gone_with)] = True
            for side, shares in enumerate((shape.into, shape.out)):
                for position, n in shares:
                    self._matrix[side, row, position] += n
        self._full = np.array([shape.widths for shape in shapes], dtype=np.float64).reshape(-1, 2).T
        self._offset = self._full - self._matrix @ sizes
        alike = [(shape.signature, shape.macs, shape.elements, shape.widths) for shape in shapes]
        self._examples = [alike.index(each) for each in dict.fromkeys(alike)]
        self._kind = np.array([list(dict.fromkeys(alike)).index(each) for each in alike], dtype=np.int64)
        macs, elements = (_shares([getattr(shape, key) for shape in shapes]) for key in ("macs", "elements"))
        self._terms, self._amounts = _shared_terms(macs, elements, [shape.signature for shape in shapes])
        self._own_terms, self._weights = _own_terms(), (macs + elements) / 2
        # Of every kind a table by width, of input and output; a width that changes in none of its layers has one row.
        moved = np.asarray(self._matrix.any(-1))
        kinds = range(len(self._examples))
        moves = np.stack([moved[:, self._kind == kind].any(1) for kind in kinds], 1)
        rows = np.where(moves, self._full[:, self._examples] + 1, 1).astype(np.int64)
        self._rows = rows
        starts = np.concatenate([[0], np.cumsum(rows[0] * rows[1])])
        self._start, self._stride = starts[self._kind], rows[1][self._kind]
        self._moves = moves[:, self._kind]

    def _widths(self, kept: Array) -> Array:
        return np.einsum("xsg,...g->...xs", self._matrix, kept) + self._offset

    def _there(self, kept: Array) -> Array:
        return ~(self._gone_with & (kept[..., None, :] == 0)).any(-1)

    def places(self, kept: Array) -> tuple[Array, Array]:
        """(S,) whether a layer is there, and where its time stands in the tables, for (G,) filters kept."""
        into, out = np.rint(self._matrix @ kept + self._offset).astype(np.int64) * self._moves
        return self._there(kept), self._start + into * self._stride + out

    def features(self, kept: Array) -> tuple[Array, Array]:
        """Of networks, (N, 2 + T) of what all layers share and (N, kinds, T) of what those of a kind share."""
        there, widths = self._there(kept), self._widths(kept)
        into, out = (_functions(widths[:, side], self._full[side]) for side in (0, 1))
        shared = _products(into, out, self._terms) * there[..., None] * self._amounts
        own = _products(into, out, self._own_terms) * (there * self._weights)[..., None]
        kinds = [own[:, self._kind == kind].sum(1) for kind in range(len(self._examples))]
        ones = [np.ones((len(kept), 1)), there.mean(-1, keepdims=True)]
        return np.concatenate([*ones, shared.sum(1)], 1), np.stack(kinds, 1)

    def tables(self, shared: Array, own: Array) -> tuple[Array, Array]:
        """Times of every kind by both widths, flat, one after the other: at exactly these, and at no smaller ones."""
        exact, enveloped = [], []
        for row, rows, factors in zip(self._examples, self._rows.T, own.reshape(len(self._examples), -1), strict=True):
            coefficients = np.zeros((PADDED.stop, PADDED.stop))
            np.add.at(coefficients, tuple(self._terms.T), shared[2:] * self._amounts[row])
            np.add.at(coefficients, tuple(self._own_terms.T), factors * self._weights[row])
            sides = zip(rows, self._full[:, row], strict=True)
            into, out = (_functions(np.arange(n) if n > 1 else full[None], full) for n, full in sides)
            times = (into @ coefficients @ out.T).astype(np.float32)
            exact.append(times.ravel())
            for axis in (0, 1):
                times = np.flip(np.minimum.accumulate(np.flip(times, axis), axis), axis)
            enveloped.append(times.ravel())
        return np.concatenate(exact), np.concatenate(enveloped)


def _functions(widths: Array, full: Array) -> Array:
    """(..., H): 1, the width as a fraction, ramps to and from each knot, the width where it misses a multiple, and
    the width rounded up to each."""
    part = widths / full
    ramps = [np.minimum(part / knot, 1.0) for knot in KNOTS]
    ramps += [np.maximum(part - knot, 0.0) / (1 - knot) for knot in KNOTS]
    misses = [part * (np.rint(widths) % multiple != 0) for multiple in MULTIPLES]
    padded = [_padded(widths, multiple) / _padded(full, multiple) for multiple in MULTIPLES]
    return np.stack([np.ones_like(part), part, *ramps, *misses, *padded], -1)


def _padded(widths: Array, multiple: int) -> Array:
    return np.ceil(np.rint(widths) / multiple) * multiple


def _products(into: Array, out: Array, terms: Array) -> Array:
    return into[..., terms[:, 0]] * out[..., terms[:, 1]]


def _shared_terms(macs: Array, elements: Array, signatures: Sequence[str]) -> tuple[Array, Array]:
    """(T, 2) functions of input and output width whose product counts, and (S, T) how much of it is in a layer."""
    operators = [each.split(" ")[0] for each in signatures]
    terms = [(WIDTH, WIDTH, macs * [name == each for name in operators]) for each in sorted(set(operators))]
    terms += [(WIDTH, WIDTH, macs), (ONE, WIDTH, elements), (WIDTH, ONE, elements)]
    for step in (*MISSES, *PADDED):
        terms += [(WIDTH, step, macs), (step, WIDTH, macs), (ONE, step, elements), (step, ONE, elements)]
    return np.array([term[:2] for term in terms]), np.stack([term[2] for term in terms], -1)


def _own_terms() -> Array:
    pairs = [(ONE, WIDTH), (WIDTH, ONE), (WIDTH, WIDTH)]
    for ramp in RAMPS:
        pairs += [(ONE, ramp), (WIDTH, ramp), (ramp, ONE), (ramp, WIDTH)]
    return np.array(pairs)


def _shares(amounts: Sequence[int]) -> Array:
    return np.array(amounts, dtype=np.float64) / max(sum(amounts), 1)


def _non_negative(features: Array, wanted: Array, ridge: Array) -> Array:
    """Coefficients of at least 0 with the least squared error and ridge penalty, by coordinate descent."""
    gram = features.T @ features + np.diag(ridge)
    found, slope = np.zeros(len(gram)), -(features.T @ wanted)
    for _ in range(SWEEPS):
        largest = 0.0
        for place in range(len(gram)):
            change = max(-found[place], -slope[place] / gram[place, place])
            if change:
                slope += gram[place] * change
                found[place] += change
                largest = max(largest, abs(change))
        if largest < SETTLED:
            break
    return found
