from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutput

from recon.basics.trees import map_tensors, tensors_in

Pair = namedtuple("Pair", "left right")


@dataclass
class Opaque:
    tensor: torch.Tensor


def test_tensors_in_nested_containers_come_in_order() -> None:
    a, b, c, d = (torch.ones(size) for size in range(1, 5))
    tree = {"x": [a, (b, None)], "y": c, "name": "text", "z": defaultdict(dict, {0: {"step": d}})}
    assert [id(one) for one in tensors_in(tree)] == [id(one) for one in (a, b, c, d)]
    assert tensors_in(a) == [a]
    assert tensors_in(None) == []


def test_every_tensor_is_converted_and_nothing_else() -> None:
    x = torch.ones(2)
    other = Opaque(x)
    tree = {"a": (x, [x, 1]), "b": Pair(x, "text"), "c": OrderedDict(d=None), "e": other}
    found = map_tensors(tree, lambda one: one.shape)
    assert found == {"a": (x.shape, [x.shape, 1]), "b": Pair(x.shape, "text"), "c": OrderedDict(d=None), "e": other}
    assert found["e"] is other
    assert tree["b"].left is x


def test_an_output_of_a_model_keeps_its_class() -> None:
    output = BaseModelOutput(last_hidden_state=torch.ones(1, 2, 3), hidden_states=(torch.ones(1),))
    found = map_tensors(output, lambda one: one * 2)
    assert type(found) is BaseModelOutput
    assert found.last_hidden_state.eq(2).all()
    assert len(tensors_in(found)) == 2


def test_a_tensor_that_is_shared_may_stay_shared() -> None:
    x = torch.ones(2)
    done: dict[int, torch.Tensor] = {}
    found = map_tensors([x, {"again": x}], lambda one: done.setdefault(id(one), one + 1))
    assert found[0] is found[1]["again"]
