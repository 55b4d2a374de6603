"""The adapter: which output counts, what a network is called with, and the way back to the user's class."""

import re
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from keepdrop import UserError, find_groups
from keepdrop.envs.data.packing import packed_batch
from keepdrop.envs.evaluation.masked_network import MaskedNetwork
from keepdrop.envs.networks.answers import adapt, adapter_of, as_called, as_given, ready_network
from keepdrop.envs.networks.checkpoint import hash_state
from keepdrop.envs.networks.copying import copied
from keepdrop.envs.networks.cost import count_cost
from torch import nn

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Named = namedtuple("Named", "first logits")


@dataclass
class Answer:
    loss: torch.Tensor | None
    hidden: torch.Tensor
    logits: torch.Tensor


FORMS = {
    "dict": lambda a, b: {"out": a, "aux": b},
    "logits first": lambda a, b: {"out": b, "logits": a},
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, [b]],
    "named tuple": lambda a, b: Named(b, a),
    "object": lambda a, b: Answer(None, b, a),
    "alone": lambda a, b: {"logits": a},
}


class Tasks(nn.Module):
    """Two heads, the second one behind a convolution of its own."""

    def __init__(self, form=FORMS["tuple"]):
        super().__init__()
        self.form = form
        self.conv, self.own = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 5, 3)
        self.one, self.two = nn.Linear(6, 4), nn.Linear(5, 2)

    def forward(self, x):
        maps = self.conv(x).relu()
        return self.form(self.one(maps.mean((2, 3))), self.two(self.own(maps).relu().mean((2, 3))))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.kinds, self.head = nn.Conv2d(1, 6, 3), nn.Embedding(5, 3), nn.Linear(15, 2)

    def forward(self, left, right, *, kind=None):
        left, right = (self.conv(each).relu().mean((2, 3)) for each in (left, right))
        return self.head(torch.cat([left, right, self.kinds(kind)], 1))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_usual_output_counts_and_is_named_where_there_are_several(form):
    given = Tasks(form).eval()
    network, notes = ready_network(given, IMAGES)
    expected = given.one(given.conv(IMAGES).relu().mean((2, 3)))
    assert torch.equal(network(IMAGES), expected)
    assert len(notes) == (form is not FORMS["alone"])
    if notes:
        assert "metric and loss take " in notes[0] and "network.output=NAME" in notes[0]
    assert isinstance(network.train()(IMAGES), type(given(IMAGES)))  # auxiliary heads are trained
    assert type(as_given(network)) is Tasks and isinstance(network, Tasks) and repr(network) == repr(given)


def test_a_network_with_one_tensor_stays_what_it_is():
    network, notes = ready_network(nn.Sequential(nn.Conv2d(1, 2, 3)), IMAGES)
    assert type(network) is nn.Sequential and adapter_of(network) is None and notes == ()
    assert as_given(network) is network and as_called(network, IMAGES) is IMAGES


@pytest.mark.parametrize(
    ("form", "output", "which"),
    [
        ("dict", "aux", "two"),
        ("tuple", 1, "two"),
        ("list", "1.0", "two"),
        ("object", "hidden", "two"),
        ("list", 0, "one"),
    ],
)
def test_the_user_may_say_which_output_counts(form, output, which):
    network, notes = ready_network(Tasks(FORMS[form]).eval(), IMAGES, output)
    width = {"one": 4, "two": 2}[which]
    assert network(IMAGES).shape == (3, width) and notes == ()
    assert network.train()(IMAGES).shape == (3, width)  # and then it alone is trained


def test_several_outputs_are_put_side_by_side():
    given = Tasks().eval()
    network, _ = ready_network(given, IMAGES, [1, 0])
    assert torch.equal(network(IMAGES), torch.cat(given(IMAGES)[::-1], 1))


def test_an_output_that_is_not_there_is_a_sentence_with_those_that_are():
    text = "The network's answer has no tensor 'head'; it holds out (3, 4), aux (3, 2); name one of these:"
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        ready_network(Tasks(FORMS["dict"]), IMAGES, "head")
    assert "network.output=NAME" in caught.value.typed and "Settings(output=NAME)" in str(caught.value)
    with pytest.raises(UserError, match="has no tensor '5'"):
        ready_network(Tasks(), IMAGES, 5)


INPUTS = {"left": IMAGES, "right": IMAGES.flip(0), "kind": torch.tensor([1, 4, 0])}


def test_several_inputs_are_one_tensor_to_the_adapted_network():
    packed, packing = packed_batch(INPUTS)
    given = Pair().eval()
    network, _ = ready_network(given, packed, None, packing)
    assert torch.equal(network(packed), given(**INPUTS))
    assert torch.equal(as_given(network)(**as_called(network, packed)), given(**INPUTS))
    assert count_cost(network, packed).macs == count_cost(given, INPUTS).macs
    assert [group.name for group in find_groups(network, packed).groups] == ["conv"]
    again = copied(network)
    assert torch.equal(again(packed), network(packed)) and hash_state(again) == hash_state(given)


@pytest.mark.parametrize("several", [False, True])
def test_masks_run_behind_a_cached_part(several):
    torch.manual_seed(0)
    images, packing = packed_batch(INPUTS) if several else (IMAGES, None)
    network, _ = ready_network(Pair().eval() if several else Tasks(FORMS["object"]).eval(), images, None, packing)
    groups = find_groups(network, images).groups
    masked = MaskedNetwork(network, groups, images)
    assert masked.method == "split", masked.why_whole
    keep = torch.tensor([[True, False, True, True, False, True]])
    with masked.masked({"conv": keep}, 0) as run, torch.no_grad():
        got = run(masked.prefix(images))
        module = network.get_submodule("conv")
        handle = module.register_forward_hook(lambda _module, _inputs, output: output * keep[0].view(-1, 1, 1))
        expected = network(images)
        handle.remove()
    assert torch.allclose(got, expected, atol=1e-5)


def test_layers_that_no_metric_looks_at_are_skipped_and_other_outputs_kept_whole():
    for form in ("dict", "tuple", "object"):
        network, _ = ready_network(Tasks(FORMS[form]).eval(), IMAGES)
        plan = find_groups(network, IMAGES)
        assert [group.name for group in plan.groups] == ["conv"]
        assert {cut.module for cut in plan.groups[0].consumers} == {"one", "own"}
        assert [each.name for each in plan.skipped] == ["own"] and "no output that the metric looks at" in plan.skipped[
            0
        ].reason
    both, _ = ready_network(Tasks().eval(), IMAGES, [0, 1])
    assert [group.name for group in find_groups(both, IMAGES).groups] == ["conv", "own"]


def test_a_forward_of_the_object_itself_is_kept():
    given = Tasks(FORMS["dict"]).eval()
    first = given.forward
    given.forward = lambda x: {"out": first(x)["aux"] * 2, "aux": first(x)["out"]}
    network, _ = ready_network(given, IMAGES)
    assert torch.equal(network(IMAGES), given(IMAGES)["out"])
    assert torch.equal(as_given(network)(IMAGES)["aux"], given(IMAGES)["aux"])


def test_a_network_that_fails_is_left_for_others_to_explain():
    network = Tasks().eval()
    assert adapt(network, torch.rand(2, 3, 8, 8)) == () and type(network) is Tasks
