"""`ChunkedBackbone` in the company of what else touches a step: autocast, scaling, compilers, checkpointing."""

import copy

import pytest
import timm
import torch
from chunks import assert_same_gradients, assert_same_statistics, batch, chunked_and_plain, one_after_the_other, small
from torch import nn

from apinet_head import APINet, ChunkedBackbone, api_loss


@pytest.fixture(params=[0, 1, 2], ids="keep {}".format)
def keep(request):
    return request.param


def test_autocast_is_replayed(keep):
    backbone = small().float()
    plain = copy.deepcopy(backbone)
    images = batch(8).float()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = one_after_the_other(plain, images, 4)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ChunkedBackbone(backbone, 4, keep=keep)(images)
    assert torch.equal(found, expected)
    found.float().sum().backward()
    expected.float().sum().backward()
    for one, other in zip(backbone.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "vmap of grad"])
def test_functional_transforms_give_the_gradients_of_the_chunks(transform):
    # In train mode, torch refuses to update BatchNorm's statistics in a transform, with and without chunks.
    chunked, reference, plain = chunked_and_plain(small().eval())
    images = batch(10)

    def loss(parameters, images):
        return torch.func.functional_call(chunked, parameters, (images,)).square().sum()

    parameters = {name: value.detach() for name, value in chunked.named_parameters()}
    if transform == "grad":
        found = torch.func.grad(loss)(parameters, images)
    elif transform == "vjp":
        found = torch.func.vjp(lambda parameters: loss(parameters, images), parameters)[1](torch.tensor(1.0).double())[
            0
        ]
    elif transform == "jacrev":
        found = torch.func.jacrev(loss)(parameters, images)
    else:
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images[None])
        found = {name: value[0] for name, value in found.items()}
    reference(images).square().sum().backward()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(found[f"backbone.{name}"], value.grad)


def test_gradients_of_exchanged_parameters_are_those_of_the_forward_pass():
    chunked = ChunkedBackbone(small(nn.Identity).eval(), 4)
    exchanged = [{n: (2 * p).detach().requires_grad_() for n, p in chunked.named_parameters()} for _ in range(2)]
    torch.func.functional_call(chunked, exchanged[0], (batch(10),)).square().sum().backward()
    whole = {name.removeprefix("backbone."): value for name, value in exchanged[1].items()}
    torch.func.functional_call(chunked.backbone, whole, (batch(10),)).square().sum().backward()
    for name, value in exchanged[1].items():
        torch.testing.assert_close(exchanged[0][name].grad, value.grad)


def test_gradients_accumulate_over_steps(keep):
    plain = small()
    chunked = ChunkedBackbone(copy.deepcopy(plain), 3, keep=keep)
    for size in (6, 9):
        torch.manual_seed(size)
        one_after_the_other(plain, batch(size), 3).sum().backward()
        torch.manual_seed(size)
        chunked(batch(size)).sum().backward()
    for one, other in zip(plain.parameters(), chunked.backbone.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_scaled_gradients_in_float16(keep):
    chunked, reference, plain = chunked_and_plain(small().float(), keep=keep)
    images = batch(10).float()
    stepped = []
    for run, module in ((chunked, chunked), (reference, plain)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1)  # too large: the first is skipped
        torch.manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = run(images).square().sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        stepped.append((scaler.get_scale(), [parameter.detach().clone() for parameter in module.parameters()]))
    (scale, found), (expected_scale, expected) = stepped
    assert scale == expected_scale != 2.0**20
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert_same_statistics(chunked, plain)


def test_channels_last_stays():
    seen = []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small().to(memory_format=torch.channels_last)

        def forward(self, images):
            seen.append(images.is_contiguous(memory_format=torch.channels_last))
            return self.net(images)

    chunked, reference, plain = chunked_and_plain(Watching(), keep=0)
    images = batch(10).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    reference(images).sum().backward()
    torch.manual_seed(1)
    chunked(images).sum().backward()
    assert len(seen) == 9
    assert all(seen)
    assert_same_gradients(chunked, plain)


# Before that, hooks on saved tensors reach into the compiler.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_backbone(backend, keep):
    torch._dynamo.reset()
    backbone = timm.create_model("test_resnet", num_classes=0).double()
    chunked, reference, plain = chunked_and_plain(backbone, keep=keep)
    chunked.backbone = torch.compile(backbone, backend=backend)
    for size in (8, 10):  # of the second, the last chunk has another size
        reference(batch(size)).sum().backward()
        chunked(batch(size)).sum().backward()
    for one, other in zip(backbone.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(backbone.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_last_chunk_of_another_size_needs_no_second_graph(keep):
    torch._dynamo.reset()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    chunked = ChunkedBackbone(torch.compile(small(), backend=backend), 4, keep=keep)
    chunked(batch(10)).sum().backward()
    assert len(made) == 1


@pytest.mark.parametrize("compile_backbone", [False, True])
def test_compiled_net_leaves_its_chunks_as_they_are(compile_backbone):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = APINet("test_resnet", 4, dropout=0.0, chunk_size=4)
    plain = copy.deepcopy(net)
    if compile_backbone:
        net.backbone.compile(backend="aot_eager")
    images, labels = batch(8).float(), torch.arange(8) % 4
    api_loss(torch.compile(net, backend="aot_eager")(images, labels)).backward()
    api_loss(plain(images, labels)).backward()
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


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
