"""What stands in for one of the head's Linears is called, never read: against plain concatenation in float64."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from heads import make_case
from stand_ins import LoRA, StoredIn8Bits, hooked, prehooked, scaled, with_own_forward, with_own_tensor
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from apinet_head import api_loss, mine_pairs

PLACES = ["mutual.fc1", "mutual.fc2", "classifier"]


def plainly(head, features, labels):
    """Logits of the pairs' images under their own gates [2P,C], and these; every layer called as the paper says."""
    pairs = mine_pairs(features, labels)
    images = features[pairs.anchor], features[pairs.partner]
    mutual = head.mutual.fc2(head.mutual.fc1(torch.cat(images, 1)))
    gates = tuple(torch.sigmoid(mutual * image) for image in images)
    return head.classifier(torch.cat([image + image * gate for image, gate in zip(images, gates, strict=True)])), gates


STAND_INS = {
    "LoRA": LoRA,
    "subclass": scaled,
    "no bias": lambda layer: nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=layer.weight.dtype),
    "forward of its own": with_own_forward,
    "tensor of its own": with_own_tensor,
    "forward hook": hooked,
    "forward pre-hook": prehooked,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": old_spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", STAND_INS)
def test_what_stands_in_for_a_linear_is_called(name, place):
    head, features, labels = make_case()
    head.set_submodule(place, STAND_INS[name](head.get_submodule(place)))
    for part in head.modules():  # spectral_norm changes its vectors with every call in train mode
        part.training = "spectral" not in name
    learning = [parameter for parameter in head.parameters() if parameter.requires_grad]
    for _ in range(2):  # weight_norm and prune make the weight anew in every step
        found, (expected, gates) = head(features, labels).logits_self, plainly(head, features, labels)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(head.gates(features, mine_pairs(features, labels)), gates)
        gradients = [torch.autograd.grad(logits.square().sum(), learning) for logits in (found, expected)]
        torch.testing.assert_close(*gradients)
        assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
        with torch.no_grad():
            for parameter in learning:
                parameter.add_(0.1)


@pytest.mark.parametrize("place", ["mutual", "mutual.drop", *PLACES])
def test_hooks_of_any_kind_fire(place):
    head, features, labels = make_case()
    fired, kinds = [], ["forward_pre", "forward", "full_backward_pre", "full_backward"]
    for kind in kinds:
        register = getattr(head.get_submodule(place), f"register_{kind}_hook")
        register(lambda *_, kind=kind: fired.append(kind))
    api_loss(head(features, labels)).backward()
    assert fired == kinds


def test_the_quick_way_is_taken_where_the_layers_are_what_they_seem_and_no_hook_is_for_all_modules():
    head, features, labels = make_case()
    called = set()
    with nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module)):
        head(features, labels)
    assert called == {*head.modules()}
    with mock.patch.object(F, "linear", wraps=F.linear) as linear:
        head(features, labels)
    assert linear.call_args_list[0].args[0].shape == features.shape, "the images are projected, not the pairs"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_integer_weights_say_nothing_about_the_features(dtype):
    head, features, labels = make_case(dtype=torch.float32)
    for place in PLACES:
        head.set_submodule(place, StoredIn8Bits(head.get_submodule(place)))
    assert torch.isfinite(api_loss(head(features.to(dtype), labels)))
    assert head(features.to(dtype)).dtype == dtype


def test_an_adapter_in_float32_on_a_head_in_half_precision():
    head, features, labels = make_case(dtype=torch.bfloat16)
    head.mutual.fc1 = LoRA(head.mutual.fc1, torch.float32)
    api_loss(head(features, labels)).backward()
    assert head.mutual.fc1.lora_b.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="one dtype outside autocast"):
        head(features.float(), labels)


@pytest.mark.parametrize("own", [scaled, hooked, StoredIn8Bits, LoRA, lambda layer: nn.Sequential(layer, nn.Tanh())])
def test_a_classifier_of_ones_own_is_called(own):
    (head, features, labels), classifier = make_case(), own(nn.Linear(9, 4, dtype=torch.float64))
    found = head(features, labels, classifier=classifier).logits_self, head(features, classifier=classifier)
    head.classifier = nn.Identity()
    expected = classifier(head(features, labels).logits_self), classifier(features)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("stand_in", ["LoRA", "weight_norm"])
def test_stand_ins_are_called_when_compiled_and_exported(stand_in):
    head, features, labels = make_case()
    head.mutual.fc1 = STAND_INS[stand_in](head.mutual.fc1)
    expected = head(features, labels).logits_self
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, labels).logits_self, expected)
    torch.testing.assert_close(torch.export.export(head, (features, labels)).module()(features, labels)[0], expected)


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_called():
    head, features, labels = make_case(dtype=torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(head), {nn.Linear}, dtype=torch.qint8)
    assert list(quantised.parameters()) == []
    pairs = mine_pairs(features, labels)
    torch.testing.assert_close(quantised.gates(features, pairs), head.gates(features, pairs), rtol=0.1, atol=0.1)
    torch.testing.assert_close(quantised.eval()(features), head.eval()(features), rtol=0.1, atol=0.1)
