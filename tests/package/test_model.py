"""`APINet`: backbone, head, freezing, optimiser groups; what it passes on."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import apinet_head
from apinet_head import APILoss, APINet, api_loss, mine_pairs

IMAGES, LABELS = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1, 2, 2])


def make_net(**arguments):
    torch.manual_seed(0)
    return APINet("test_resnet", 5, **arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: APINet(nn.Flatten(), 5), ValueError, r"Flatten.*no num_features.*dim="),
        (lambda: APINet(nn.Flatten(), 5, dim=12, pretrained=True), ValueError, "go with a timm name"),
        (
            lambda: APINet(timm.create_model("test_resnet", num_classes=9), 5)(IMAGES),
            ValueError,
            r"float32 \[6, 9\].*num_classes=0",
        ),
        (lambda: APINet("resnet19", 4), ValueError, "timm has no model 'resnet19', but .*resnet18"),
        (lambda: APINet("resnet_50.a1_in1k", 4), ValueError, r"no model 'resnet_50\.a1_in1k', but .*resnet50"),
        (lambda: APINet("resnet18.no_tag", 4), ValueError, r"no model 'resnet18\.no_tag', but .*resnet18\."),
        (lambda: APINet("zzzzzz", 4), ValueError, "timm has no model 'zzzzzz'; timm.list_models"),
        (lambda: make_net(hidden_dims=8), TypeError, r"no argument 'hidden_dims'.* mean 'hidden_dim'\?.*mutual, gate"),
        (lambda: make_net(drop_rate=8), TypeError, r"no argument 'drop_rate'.*backbone_args=\{'drop_rate'"),
        (lambda: make_net().freeze_backbone(batch_norm="off"), ValueError, "'train' or 'eval', got 'off'"),
        (lambda: apinet_head.APINet2, AttributeError, "no attribute 'APINet2'"),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_arguments_of_the_loss_are_sent_there():
    of_loss = {*inspect.signature(api_loss).parameters, *inspect.signature(APILoss).parameters} - {"output"}
    assert of_loss >= {"margin", "rank_weight", "label_smoothing", "class_weight", "rows"}
    for name in of_loss:
        with pytest.raises(TypeError, match=rf"{name} is an argument of the loss: api_loss.*{name}=.*APILoss\({name}="):
            make_net(**{name: 0.1})


@pytest.mark.parametrize(("backbone_lr", "expected"), [(None, 0.1), (0.01, 0.01)])
def test_parameter_groups_hold_every_parameter_once(backbone_lr, expected):
    net = make_net()
    groups = net.parameter_groups(0.1, backbone_lr, weight_decay=0.3)
    settings = [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
    assert settings == [("backbone", expected, 0.3), ("head", 0.1, 0.3)]
    parameters = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(parameters) == sorted(map(id, net.parameters()))


def train_step(net, optimizer):
    optimizer.zero_grad()
    api_loss(net(IMAGES, LABELS)).backward()
    optimizer.step()


def test_frozen_backbone_keeps_its_weights_and_its_batch_norm_learns_on():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameter_groups(0.1, weight_decay=0.1), momentum=0.9)
    train_step(net, optimizer)  # so that there are gradients and momentum to clear
    before = copy.deepcopy(net.state_dict())
    assert net.freeze_backbone() is net
    assert all(parameter.grad is None for parameter in net.backbone.parameters())
    train_step(net, optimizer)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name, _ in net.named_buffers()}
    assert changed == statistics | {f"head.{name}" for name, _ in net.head.named_parameters()}

    net.freeze_backbone(False)
    train_step(net, optimizer)
    assert not any(torch.equal(before[name], parameter) for name, parameter in net.named_parameters())


def buffers(net):
    return {name: value.clone() for name, value in net.named_buffers()}


def with_other_statistics(net):
    other = make_net()
    other(2 * IMAGES)
    net.load_state_dict(other.state_dict())
    return net


COPIERS = {
    "itself": lambda net: net,
    "loaded after freezing": with_other_statistics,
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "averaged": AveragedModel,
    "averaged with buffers": lambda net: AveragedModel(net, use_buffers=True),
    "sync": nn.SyncBatchNorm.convert_sync_batchnorm,
}


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_batch_norm_can_be_kept_from_update_bn_and_is_renewed_else(copier):
    net = make_net()
    net(IMAGES)
    net.freeze_backbone(batch_norm="eval").eval()
    copied = copier(net).train()
    before, inner = buffers(net), getattr(copied, "module", copied)
    assert inner.head.training
    if hasattr(copied, "update_parameters"):
        copied.update_parameters(net)
    copied(IMAGES, LABELS)
    update_bn([IMAGES], copied)
    torch.testing.assert_close(buffers(inner), before, rtol=0, atol=0)

    inner.freeze_backbone(batch_norm="train")
    never_frozen = make_net()
    for one in (inner, never_frozen):
        update_bn([IMAGES], one)
    torch.testing.assert_close(buffers(inner), buffers(never_frozen))
    inner.freeze_backbone(False)
    assert all(module.training for module in inner.modules())


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_arguments_of_the_head_pass_through(chunk_size):
    net = make_net(dropout=0.0, chunk_size=chunk_size).eval()
    keys = {"keys": torch.randn(8, net.dim), "key_labels": torch.arange(8) % 3}
    with torch.no_grad():
        features = torch.cat([net.backbone(images) for images in IMAGES.split(chunk_size or 6)])
    found, expected = net(IMAGES, LABELS, **keys), net.head(features, LABELS, **keys)
    torch.testing.assert_close(found.logits_other, expected.logits_other)
    pairs = mine_pairs(features, LABELS, intra="dissimilar")
    assert net(IMAGES, LABELS, pairs=pairs).pairs is pairs


def test_import_leaves_alone_what_takes_long():
    slow = {"timm", "huggingface_hub", "torchvision", "torch._dynamo", "sympy", "pytorch_metric_learning"}
    code = f"import sys, torch; had = {{*sys.modules}}; import apinet_head; print(*({slow} & {{*sys.modules}} - had))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []
    assert set(apinet_head.__all__) <= set(dir(apinet_head))
