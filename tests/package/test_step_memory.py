"""Estimates of memory against counts by hand, against what a real step allocates, and choices against brute force."""

import copy
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from releases import on_meta
from stand_ins import Calling
from torch import nn
from torch.profiler import ProfilerActivity, profile

from apinet_head import APIHead, APINet, ChunkedBackbone, _fake_step, api_loss
from apinet_head.step_memory import StepMemory, pick_chunk_size, step_memory

GIB = 2**30
in_both_precisions = pytest.mark.parametrize("amp", [None, torch.bfloat16])


def summed(net, images, labels):
    return net(images).sum()


def make_net(name="test_resnet", classes=5, **arguments):
    with torch.device("meta"):
        return APINet(name, classes, **arguments)


def small(norm=nn.BatchNorm2d, **arguments):
    layers = [nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return APINet(nn.Sequential(*layers), num_classes=5, dim=4, **arguments)


group_norm = partial(nn.GroupNorm, 2)  # for a backbone in which each image is by itself
reading = partial(nn.BatchNorm2d, momentum=None)  # it reads a value, the number of batches


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(8, 300, 100), (5, 7, 11), (64, 16, 1)])
def test_one_linear_layer_by_hand(batch, inputs, outputs, amp):
    weights = 4 * (inputs * outputs + outputs)
    # The peak is at the end of forward: images, labels (int64), output and its sum, and the gradients of before.
    alive = 4 * batch * inputs + 8 * batch + 4 * batch * outputs + 4
    if amp:  # makes copies of images and weights, and halves the output and its sum
        alive += 2 * batch * inputs + weights // 2 - 2 * batch * outputs - 2
    found = step_memory(nn.Linear(inputs, outputs), batch, (inputs,), loss=summed, amp=amp, moments=2)
    assert found == StepMemory(4 * weights + alive, weights, weights, 2 * weights, alive)


def test_what_does_not_learn_has_no_gradient_and_no_moments():
    net = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 1))
    net[0].requires_grad_(False)
    found = step_memory(net, 4, (10,), loss=summed, moments=2)
    learning = 4 * (20 + 20 + 20 + 1)
    assert (found.gradients, found.optimizer) == (learning, 2 * learning)
    assert found.parameters == learning + 4 * (10 * 20 + 20) + 4 * (20 + 20) + 8  # BatchNorm's buffers: two and a count
    assert found.total == sum(found[1:])


def allocated(net, batch, size, amp):
    """Bytes at the peak of a real step, from torch's profiler, with the parameters and buffers."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) // 4
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp is not None):
            loss = api_loss(net(images, labels))
        for parameter in net.parameters():
            parameter.grad = None
        loss.backward()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    fixed = sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
    return max(accumulate((event.nbytes() for event in changes), initial=fixed))


@in_both_precisions
@pytest.mark.parametrize("chunks", [{"chunk_size": None}, {"chunk_size": 5}, {"chunk_size": 5, "keep_chunks": 2}])
@pytest.mark.parametrize(("name", "size"), [("test_vit", 160), ("test_efficientnet", 64)])
def test_it_is_what_a_real_step_allocates(name, size, chunks, amp):
    net = APINet(name, 20, **chunks)
    found = step_memory(net, 13, size, **chunks, amp=amp, moments=0).total
    # Kernels for a CPU allocate scratch memory of their own, in bfloat16 more than in float32.
    tolerance = 0.03 if amp else 0.01
    if amp and name == "test_efficientnet" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        tolerance = 0.1  # convolutions of a CPU that lacks the instructions
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of which each has its own
    real = allocated(net, 13, size, amp)
    torch.set_num_threads(threads)
    assert found == pytest.approx(real, rel=tolerance)


@in_both_precisions
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group_norm])
@pytest.mark.parametrize(
    ("batch", "chunk_size", "keep"),
    [(24, 24, 1), (24, 13, 0), (24, 8, 0), (24, 8, 1), (24, 6, 3), (27, 8, 1), (27, 8, 2), (27, 8, 9)],
)
def test_chunks_left_out_would_have_changed_nothing(norm, batch, chunk_size, keep, amp, monkeypatch):
    net = small(norm)
    found = step_memory(net, batch, 160, chunk_size=chunk_size, keep_chunks=keep, amp=amp).total
    monkeypatch.setattr(_fake_step, "_LastChunks", lambda backbone, *_: backbone)
    features = 4 * batch * net.dim  # their gradient is whole only where all chunks ran
    whole = step_memory(net, batch, 160, chunk_size=chunk_size, keep_chunks=keep, amp=amp).total
    # What the chunks left out would have kept beside (copies of buffers, sums of gradients) is below 1 %.
    assert -0.01 * whole <= found - whole <= features


def test_a_frozen_backbone_keeps_nothing():
    """Then nothing is recomputed, and forward has the peak."""
    net = make_net().freeze_backbone()
    whole, chunked = (step_memory(net, 24, 160, chunk_size=size).activations for size in (None, 4))
    images = 4 * 24 * 3 * 160**2
    assert images < chunked < images + (whole - images) / 4


@pytest.mark.parametrize(
    ("chunk_size", "amp", "most"), [(15, None, 8), pytest.param(8, torch.bfloat16, 3, marks=pytest.mark.slow)]
)
def test_resnet101_at_448_pixels_in_chunks(chunk_size, amp, most):
    found = {
        batch: step_memory(make_net("resnet101", 200), batch, 448, chunk_size=chunk_size, amp=amp).total
        for batch in (120, 240)
    }
    assert found[120] <= most * GIB
    images_and_features = 120 * (4 * 3 * 448**2 + 4 * 2048)
    assert found[240] - found[120] <= 1.1 * images_and_features  # and the head beside the chunk that is kept


SOFTMAXES = [partial(softmax, dim=1) for softmax in (torch.softmax, F.softmax, torch.Tensor.log_softmax)]


@pytest.mark.parametrize("last", [nn.LayerNorm(1000), nn.GroupNorm(2, 1000), nn.Softmax(1), *map(Calling, SOFTMAXES)])
def test_norms_and_softmax_take_float32_in_mixed_precision_as_on_cuda(last):
    if isinstance(last, nn.GroupNorm) and torch.__version__ < "2.10":
        pytest.skip("its decomposition has 0.1 % more at the peak")
    found = step_memory(nn.Sequential(nn.Linear(1, 1000), last), 500, (1,), loss=summed, amp=torch.bfloat16)
    one = 500 * 1000  # elements; input and output are there at once, and by the CPU's rules would take half of that
    assert 2 * 4 * one < found.activations < 3 * 4 * one


def by_hand(batch, chunk_size, keep):
    """What is to be least: chunks below 8 images, images recomputed, chunks."""
    sizes = [len(chunk) for chunk in torch.arange(batch).split(chunk_size)]
    return chunk_size < 8, sum(sizes[: len(sizes) - keep]), len(sizes)


SLOW = [pytest.param(*case, None, marks=pytest.mark.slow) for case in ((14, nn.BatchNorm2d), (18, group_norm))]
GIVEN = [(24, group_norm, chunk_size) for chunk_size in (5, 8, 24, 30)]


@pytest.mark.parametrize(("batch", "norm", "given"), [(15, nn.BatchNorm2d, None), (9, group_norm, None), *SLOW, *GIVEN])
def test_it_picks_what_brute_force_picks(batch, norm, given):
    """The chunk size and how many are kept, or of a given size only these."""
    net = small(norm)
    pick = partial(pick_chunk_size, net, batch, 32, chunk_size=given, margin=0)
    needed = {
        (size, keep): step_memory(net, batch, 32, chunk_size=size, keep_chunks=keep).total
        for size in ([given] if given else {-(-batch // count) for count in range(2, batch + 1)})
        if norm is group_norm or (batch % size or size) > 1
        for keep in range(1, -(-batch // size) + 1)
    }
    smallest = min(needed)
    least, whole = needed[smallest], step_memory(net, batch, 32).total
    for budget in needed.values() if given else range(least, whole, (whole - least) // 5):
        fitting = [chunks for chunks, need in needed.items() if need <= budget]
        expected = min(fitting, key=lambda chunks: by_hand(batch, *chunks))
        choice = pick(memory=budget)
        found = choice.chunk_size, choice.keep_chunks
        assert by_hand(batch, *found)[:2] == by_hand(batch, *expected)[:2]
        assert choice.needed[found] == needed[found] <= choice.budget == budget
        assert choice.recomputed == by_hand(batch, *found)[1] / batch
        assert choice.time == 1 + choice.recomputed / 3
    assert pick(memory=whole).chunk_size == given
    with pytest.raises(ValueError, match=rf"batch of {batch} into .*chunks? of (up to )?{smallest[0]} \((1|all) kept"):
        pick(memory=least - 1)


def test_a_few_estimates_are_enough_and_the_choice_says_why():
    choice = pick_chunk_size(make_net("resnet18", 200), 120, 448, amp=torch.bfloat16, memory=3.3 * GIB)
    assert (choice.chunk_size, choice.keep_chunks) == (14, 4)
    assert len(choice.needed) <= 4
    assert choice.budget == int(0.85 * 3.3 * GIB)
    text = str(choice)
    price = "58% recomputed in about 1.19 times the time of the whole batch: 2.6"
    assert text.startswith(f"9 chunks of up to 14 (4 kept) for a batch of 120, {price}")
    assert "GiB by estimate, of 2.80 GiB to be used (3.30 GiB less the margin); the whole batch: 5.7" in text
    assert "; 15 chunks of 8 (1 kept): 0.7" in text
    alone = pick_chunk_size(make_net(), 1, 64, memory=GIB)
    assert str(alone).startswith("the whole batch for a batch of 1: ")


def test_the_net_stays_as_it_is():
    net = APINet("test_resnet", 5, chunk_size=3).eval()
    before = copy.deepcopy((net.state_dict(), torch.get_rng_state()))
    in_eval_mode = step_memory(net, 8, 32, chunk_size=2, amp=torch.bfloat16)
    torch.testing.assert_close((net.state_dict(), torch.get_rng_state()), before, rtol=0, atol=0)
    assert net.chunk_size == 3
    assert not any(module.training for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert in_eval_mode == step_memory(net.train(), 8, 32, chunk_size=2, amp=torch.bfloat16)


def test_batch_norm_counts_as_it_is_in_training():
    net = small().freeze_backbone(batch_norm="eval")
    net.backbone.requires_grad_()
    needed = step_memory(net, 9, 32, chunk_size=1).total
    assert pick_chunk_size(net, 9, 32, memory=needed, margin=0).chunk_size == 1
    net.freeze_backbone(False).eval()
    with pytest.raises(ValueError, match="no chunk size"):
        pick_chunk_size(net, 9, 32, memory=needed, margin=0)


def test_a_chunked_backbone_in_a_net_of_ones_own():
    net = nn.ModuleList([ChunkedBackbone(small().backbone, 7), APIHead(dim=4, num_classes=5)])

    def loss(net, images, labels):
        return api_loss(net[1](net[0](images), labels))

    for size in (None, 4):
        assert step_memory(net, 12, 32, chunk_size=size, loss=loss) == step_memory(small(), 12, 32, chunk_size=size)


class Attention(nn.Module):
    """Attention alone, with all that may send the CPU to its own way of computing it."""

    BATCH, LENGTH, DIM, HEADS = 3, 640, 32, 2

    def __init__(self, drop=0.0, biased=False, masked=False):
        super().__init__()
        self.drop, self.masked = drop, masked
        self.qkv = nn.Linear(self.DIM, 3 * self.DIM)
        self.bias = nn.Parameter(torch.zeros(1, self.HEADS, self.LENGTH, self.LENGTH)) if biased else None

    def forward(self, tokens):
        parts = self.qkv(tokens).unflatten(2, (3, self.HEADS, -1)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(self.LENGTH, self.LENGTH, dtype=torch.bool) if self.masked else self.bias
        attended = F.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=self.drop)
        return attended.transpose(1, 2).flatten(2)

    def activations(self, amp=None):
        return step_memory(self, self.BATCH, (self.LENGTH, self.DIM), loss=summed, amp=amp).activations


TOKENS, MATRIX = 4 * Attention.BATCH * Attention.LENGTH * Attention.DIM, Attention.HEADS * Attention.LENGTH**2


@in_both_precisions
@pytest.mark.parametrize(("drop", "masked"), [(0.0, False), (0.1, False), (0.0, True), (0.1, True)])
def test_attention_keeps_no_matrix_of_all_pairs_of_tokens(drop, masked, amp):
    found = Attention(drop, masked=masked).activations(amp)
    # As on CUDA: tokens, their projections, what is attended, and their gradients. A matrix is 20 times as much.
    assert found < 16 * TOKENS + 4 * Attention.LENGTH**2
    assert found < 2 * Attention.BATCH * MATRIX


def test_gradients_of_a_bias_of_attention_are_there_in_the_backward_pass_alone():
    # The kernel gives a gradient for each image. Weights that were kept would come beside it, twice.
    found = Attention(biased=True).activations()
    assert Attention.BATCH * 4 * MATRIX < found < (Attention.BATCH + 1.5) * 4 * MATRIX + 16 * TOKENS


@on_meta
@pytest.mark.parametrize("dropout", [{}, {"attn_drop_rate": 0.1}], ids=["", "dropout"])
def test_vit_large_takes_what_its_formula_says(dropout):
    batch, tokens, dim, depth, heads = 16, 197, 1024, 24, 16
    found = step_memory(make_net("vit_large_patch16_224", 200, backbone_args=dropout), batch, 224, moments=0)
    # Per token: input of both norms, of qkv and of the MLP, q, k and v, attended; hidden layer before and after GELU.
    block = batch * tokens * (4 * dim + 3 * dim + dim + 2 * 4 * dim) * 4 + 4 * batch * tokens * (heads + 4)
    assert found.activations == pytest.approx(depth * block, rel=0.05)


def test_other_ranks_are_not_asked(monkeypatch):
    gathering = nn.Linear(4, 4)
    gathering.gather = True
    gathering.register_forward_pre_hook(lambda module, _: pytest.fail("would wait") if module.gather else None)
    step_memory(gathering, 4, (4,), loss=summed)
    assert gathering.gather
    monkeypatch.setattr("apinet_head.head.gather_checked", None)  # it would read values, which fake tensors don't have
    assert step_memory(small(memory=8), 4, 32).total > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_memory(make_net(), 0, 32), "batch_size must be at least 1, got 0"),
        (lambda: step_memory(make_net(), 4, 32, moments=-1), "moments must be at least 0, got -1"),
        (lambda: step_memory(make_net(), 4, 32, chunk_size=0), "chunk_size must be at least 1, got 0"),
        (lambda: step_memory(make_net(), 4, 32, amp=torch.float32), r"amp must be .*, got torch.float32"),
        (lambda: step_memory(make_net(), 4, 32, chunk_size=3), "leaves a chunk of one image"),
        (
            lambda: step_memory(nn.Linear(4, 4), 4, (4,), chunk_size=2, loss=summed),
            r"chunk_size=2 is for an APINet, or .*: Linear has neither",
        ),
        (lambda: step_memory(small(), 4, 32, loss=lambda net, *batch: batch[0].sum().item()), "reads values of its"),
        (lambda: step_memory(small(reading), 4, 32), "reads values of its tensors"),
        (lambda: step_memory(small(reading), 4, 32, chunk_size=2), "reads values of its tensors"),
        (lambda: pick_chunk_size(small(), 4, 32, memory=GIB, margin=1), r"share in \[0, 1\), got 1"),
        (
            lambda: pick_chunk_size(make_net(), 4, 32, memory=2**20),
            r"into 0.85 MiB \(1.00 MiB less .*the whole batch: .*2 chunks of 2 .*amp",
        ),
    ],
)
def test_errors_show_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_free_memory_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="without a CUDA device memory must be given, in bytes"):
        pick_chunk_size(small(), 8, 32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: GIB // 2)
    choice = pick_chunk_size(small(), 8, 32)
    assert (choice.memory, choice.budget) == (int(5.5 * GIB), int(0.85 * 5.5 * GIB))
