"""`ChunkedBackbone` in the company of what else touches a step: autocast, scaling, compilers, checkpointing."""

import copy

import pytest
import timm
import torch
from chunks import (
    assert_near,
    assert_same_gradients,
    assert_same_statistics,
    batch,
    chunked_and_plain,
    one_after_the_other,
    small,
)
from torch import nn

from apinet_head import APINet, ChunkedBackbone, api_loss

LAST = torch.channels_last


@pytest.fixture(params=[0, 1, 2], ids="keep {}".format)
def keep(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_replayed(dtype, keep):
    chunked, reference, plain = chunked_and_plain(small().float(), keep=keep)
    found = []
    for run in (chunked, reference):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=dtype):
            found.append(run(batch(8).float()))
        found[-1].float().sum().backward()
    assert torch.equal(*found)
    assert_same_gradients(chunked, plain)
    assert_same_statistics(chunked, plain)


TRANSFORMS = {
    "grad": torch.func.grad,
    "vjp": lambda loss: lambda *args: torch.func.vjp(loss, *args)[1](torch.tensor(1.0).double())[0],
    "jacrev": torch.func.jacrev,
    "vmap of grad": lambda loss: torch.func.vmap(torch.func.grad(loss), (None, 0)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms_give_the_gradients_of_the_chunks(transform):
    # In train mode, torch refuses to update BatchNorm's statistics in a transform, with and without chunks.
    chunked, reference, plain = chunked_and_plain(small().eval())
    images = batch(10)

    def loss(parameters, images):
        return torch.func.functional_call(chunked, parameters, (images,)).square().sum()

    parameters = {name: value.detach() for name, value in chunked.named_parameters()}
    gradients = TRANSFORMS[transform](loss)(parameters, images[None] if "vmap" in transform else images)
    reference(images).square().sum().backward()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(gradients[f"backbone.{name}"].view_as(value), value.grad)


def test_gradients_of_exchanged_parameters_are_those_of_the_forward_pass():
    chunked = ChunkedBackbone(small(nn.Identity).eval(), 4)
    exchanged = [{n: (2 * p).detach().requires_grad_() for n, p in chunked.named_parameters()} for _ in range(2)]
    torch.func.functional_call(chunked, exchanged[0], (batch(10),)).square().sum().backward()
    whole = {name.removeprefix("backbone."): value for name, value in exchanged[1].items()}
    torch.func.functional_call(chunked.backbone, whole, (batch(10),)).square().sum().backward()
    for name, value in exchanged[1].items():
        torch.testing.assert_close(exchanged[0][name].grad, value.grad)


def test_channels_last_stays():
    seen, backbone = [], small().to(memory_format=LAST)
    backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous(memory_format=LAST)))
    ChunkedBackbone(backbone, 4, keep=0)(batch(10).to(memory_format=LAST)).sum().backward()
    assert seen == [True] * 6


# Before that, hooks on saved tensors reach into the compiler.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_backbone(backend, keep):
    backbone = timm.create_model("test_resnet", num_classes=0).double()
    chunked, reference, plain = chunked_and_plain(backbone, keep=keep)
    chunked.backbone = torch.compile(backbone, backend=backend)
    for size in (8, 10):  # of the second, the last chunk has another size
        reference(batch(size)).sum().backward()
        chunked(batch(size)).sum().backward()
    assert_near(backbone, plain)


def test_a_last_chunk_of_another_size_needs_no_second_graph(keep):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    chunked = ChunkedBackbone(torch.compile(small(), backend=backend), 4, keep=keep)
    chunked(batch(10)).sum().backward()
    assert len(made) == 1


@pytest.mark.parametrize("compile_backbone", [False, True])
def test_compiled_net_leaves_its_chunks_as_they_are(compile_backbone):
    torch.manual_seed(0)
    net = APINet("test_resnet", 4, dropout=0.0, chunk_size=4)
    plain = copy.deepcopy(net)
    if compile_backbone:
        net.backbone.compile(backend="aot_eager")
    images, labels = batch(8).float(), torch.arange(8) % 4
    api_loss(torch.compile(net, backend="aot_eager")(images, labels)).backward()
    api_loss(plain(images, labels)).backward()
    assert_near(net, plain)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_checkpointing_of_the_backbones_own(name, keep):
    size = {"img_size": 32} if name == "test_vit" else {}
    backbone = timm.create_model(name, num_classes=0, drop_path_rate=0.3, **size).double().train()
    without = copy.deepcopy(backbone)
    backbone.set_grad_checkpointing()
    chunked, reference, plain = chunked_and_plain(backbone, keep=keep)
    for run in (reference, chunked, lambda images: one_after_the_other(without, images, 4)):
        torch.manual_seed(1)
        run(batch(10)).sum().backward()
    assert_same_gradients(chunked, plain)
    assert_same_gradients(chunked, without)
    assert_same_statistics(chunked, plain)  # which count twice in both
