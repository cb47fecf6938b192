"""The net at test time, in everything that serves a model: timm, export, ONNX, TorchScript, compile, half precision."""

from functools import partial

import pytest
import timm
import torch
from stand_ins import LoRA, scaled, with_own_forward
from torch import nn
from torch.nn.utils import parametrizations, prune

from apinet_head import APIHead, APINet

MODELS = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"]
# torch.onnx's own imports and deepcopies warn of what is to come in PyTorch.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


def make_case(model="test_resnet", **arguments):
    """A net whose BatchNorm has seen images, in eval mode, and images of its size."""
    torch.manual_seed(0)
    net = APINet(model, num_classes=5, **arguments)
    config = getattr(net.backbone, "default_cfg", {"input_size": (3, 8, 8)})
    images = torch.randn(3, arguments.get("backbone_args", {}).get("in_chans", 3), *config["input_size"][1:])
    net(images)
    return net.eval(), images


OWN = nn.Sequential(nn.Conv2d(3, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
CASES = {
    **{model: partial(make_case, model) for model in timm.list_models("test_*")},
    "other pooling and channels": partial(make_case, backbone_args={"global_pool": "max", "in_chans": 1}),
    "bfloat16": lambda: tuple(value.bfloat16() for value in make_case()),
    "other backbone": partial(make_case, OWN, dim=12),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_deployed_is_a_copy_in_eval_mode_with_the_same_logits_bit_for_bit(make):
    net, images = make()
    expected = net(images)
    model = net.train().to_deploy()
    assert net.training
    assert not any(module.training for module in model.modules())
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model(images), expected)
    assert {parameter.dtype for parameter in model.parameters()} == {images.dtype}


compiled = partial(torch.compile, backend="eager")


def compile_parts(net):
    net.backbone.layer2 = compiled(net.backbone.layer2)
    net.head.classifier = compiled(net.head.classifier)
    net.backbone, net.head = compiled(net.backbone), compiled(net.head)


def parametrise(net):
    parametrizations.weight_norm(net.head.classifier)
    parametrizations.spectral_norm(net.backbone.conv1[0])
    with torch.no_grad():
        net.head.classifier.parametrizations.weight.original0.mul_(3)


@pytest.mark.parametrize(
    "change",
    [compile_parts, parametrise, lambda net: setattr(net.head, "classifier", nn.Linear(net.dim, 5, bias=False))],
)
def test_what_was_put_around_layers_is_computed_into_the_plain_model(change):
    net, images = make_case()
    change(net)
    expected, model = net.eval()(images), net.to_deploy()
    served = timm.create_model("test_resnet", num_classes=5).eval()
    served.load_state_dict(model.state_dict())
    for one in (model, served, net):  # the net itself is as it was
        assert torch.equal(one(images), expected)


class Normalised(APIHead):
    def forward(self, features, *args, **kwargs):
        return super().forward(nn.functional.normalize(features), *args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.reset_classifier(0),
        lambda net: setattr(net, "head", Normalised(net.dim, 5)),
        lambda net: net.head.register_forward_hook(lambda module, args, output: 2 * output),
        lambda net: nn.utils.weight_norm(net.head.classifier),
        lambda net: prune.l1_unstructured(net.head.classifier, "weight", 0.5),
        lambda net: setattr(net.head, "classifier", LoRA(net.head.classifier)),
        lambda net: setattr(net.head, "classifier", scaled(net.head.classifier)),
        lambda net: with_own_forward(net.head.classifier),
    ],
)
def test_what_a_plain_model_cannot_compute_is_refused(change):
    net, images = make_case()
    change(net)
    net.eval()(images)
    with pytest.raises(ValueError, match=r"linear classifier, got .*num_classes.*deploy nn.Sequential"):
        net.to_deploy()


@pytest.mark.parametrize(("model", "deployed"), [(MODELS[0], False), *((model, True) for model in MODELS[2:])])
def test_exported_program_takes_any_batch_size(model, deployed):  # of the other models, by way of ONNX
    net, images = make_case(model)
    exported, shapes = net.to_deploy() if deployed else net, ({0: torch.export.Dim("batch", min=2)},)
    program, more = torch.export.export(exported, (images,), dynamic_shapes=shapes), images.repeat(3, 1, 1, 1)
    torch.testing.assert_close(program.module()(more), net(more))


@pytest.mark.parametrize("model", [*MODELS[:2], *(pytest.param(model, marks=pytest.mark.slow) for model in MODELS[2:])])
def test_onnx_model_takes_any_batch_size(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, images = make_case(model)
    file = tmp_path / "net.onnx"
    torch.onnx.export(
        net.to_deploy(), (images,), file, dynamo=True, input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):
        some = torch.randn(batch, *images.shape[1:])
        (found,) = session.run(["logits"], {"images": some.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), net(some).detach(), rtol=1e-3, atol=1e-4)
