"""The head's call in training: a criterion, images without a class, the look at the first batch, functorch, devices."""

import copy

import numpy as np
import pytest
import torch
from footprint import saved_bytes
from strategies import make_batch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from watching import no_waiting, no_warnings

from apinet_head import APIHead, APINet, LossTerms, Pairs, api_loss, api_loss_terms, mine_pairs, random_pairs
from apinet_head.loss import APILoss
from apinet_head.mutual import MUTUALS

DIM, CLASSES = 9, 5


def make_case(size=12, dtype=torch.float64, **head_args):
    torch.manual_seed(0)
    head_args = {"hidden_dim": 6, "dropout": 0.0, "dtype": dtype, **head_args}
    features = torch.randn(size, DIM, dtype=dtype, requires_grad=True)
    return APIHead(DIM, CLASSES, **head_args), features, torch.arange(size) % CLASSES


def gradients(loss, head, features):
    return torch.autograd.grad(loss, [*head.parameters(), features])


@pytest.mark.parametrize("gate", ["pair", "single"])
@pytest.mark.parametrize("given", [False, True])
def test_the_classifier_is_called_once_on_all_rows(gate, given):
    head, features, labels = make_case(gate=gate)
    expected, calls = head(features, labels), []
    head.classifier.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    output = head(features, labels, classifier=head.classifier if given else None)
    assert calls == [96 if gate == "pair" else 48]
    torch.testing.assert_close(output[:2], expected[:2])


@pytest.mark.parametrize(
    ("classifier", "got"),
    [(nn.Unflatten(0, (2, 48)), r"\[2, 48, 9\]"), (lambda rows: rows.view(-1, 2 * DIM), r"\[48, 18\]")],
)
def test_a_classifier_that_drops_rows_is_named(classifier, got):
    head, features, labels = make_case()
    with pytest.raises(ValueError, match=rf"classifier must map \[N, D\] to \[N, C\], got float64 {got}.*N=96"):
        head(features, labels, classifier=classifier)


# With a criterion.


@pytest.mark.parametrize("rows", [None, 1, 7, 1000])
@pytest.mark.parametrize("gate", ["pair", "single"])
@pytest.mark.parametrize("own", [False, True])
def test_a_criterion_gives_the_terms_of_the_loss(rows, gate, own):
    head, features, labels = make_case(gate=gate)
    labels[3] = 4  # class 3 has an image less, and one of class 4 more
    arguments = {"classifier": nn.Sequential(nn.Linear(DIM, 7, dtype=torch.float64), nn.Tanh())} if own else {}
    weight = torch.rand(7 if own else CLASSES, dtype=torch.float64)
    settings = {"margin": 0.2, "rank_weight": 0.7, "label_smoothing": 0.1, "class_weight": weight}
    terms = head(features, labels, criterion=APILoss(rows=rows, **settings), **arguments)
    expected = api_loss_terms(head(features, labels, **arguments), **settings)
    assert isinstance(terms, LossTerms)
    torch.testing.assert_close(torch.stack(terms), torch.stack(expected), rtol=0, atol=1e-12)
    inputs = [features, *head.mutual.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(terms.total, inputs), torch.autograd.grad(expected.total, inputs), rtol=0, atol=1e-12
    )


def test_a_criterion_through_apinet_and_compiled():
    net = APINet(nn.Flatten(), CLASSES, dim=DIM, hidden_dim=6, dropout=0.0)
    images, labels = torch.randn(12, DIM, 1, 1), torch.arange(12) % CLASSES
    expected = api_loss(net(images, labels))
    torch.testing.assert_close(net(images, labels, criterion=APILoss(rows=8)).total, expected)
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(compiled(images, labels, criterion=APILoss()).total, expected)


def test_dropout_is_before_the_classifier_of_a_criterion():
    head, features, labels = make_case(dropout=0.9)
    head.mutual.drop.p = 0.0
    torch.manual_seed(1)
    found = head(features, labels, criterion=APILoss()).total
    torch.manual_seed(1)
    torch.testing.assert_close(found, api_loss(head(features, labels)))
    torch.manual_seed(2)
    assert head(features, labels, criterion=APILoss()).total != found


def test_a_criterion_needs_labels_and_classes():
    head, features, labels = make_case()
    with pytest.raises(ValueError, match="need labels, got labels=None"):
        head(features, criterion=APILoss())
    with pytest.raises(TypeError, match="criterion must be an APILoss, got CrossEntropyLoss"):
        head(features, labels, criterion=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"no classifier.*num_classes=.*classifier="):
        APIHead(DIM, dtype=torch.float64)(features, labels, criterion=APILoss())


# Images without a class.


@pytest.mark.parametrize("label", [-1, -100])
def test_images_without_a_class_are_masked_out(label):
    head, features, labels = make_case()
    labels[[2, 7]] = label
    output = head(features, labels)
    has_class = labels >= 0
    known = torch.arange(12)[has_class]
    pairs = output.pairs
    assert torch.equal(pairs.valid, has_class[pairs.anchor] & (pairs.partner != pairs.anchor))
    assert has_class[pairs.partner[pairs.valid]].all()
    expected = head(features[known], labels[known])
    loss, right = api_loss(output), api_loss(expected)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(gradients(loss, head, features), gradients(right, head, features))
    terms = head(features, labels, criterion=APILoss(rows=4))
    torch.testing.assert_close(terms.total, right)


def test_given_pairs_with_an_image_without_a_class_are_not_valid():
    head, features, labels = make_case()
    labels[[2, 7]] = -100
    anchor, partner = torch.tensor([0, 2, 1, 7, 3]), torch.tensor([1, 3, 7, 2, 4])
    pairs = Pairs(anchor, partner, labels[anchor] == labels[partner], torch.ones(5, dtype=torch.bool))
    output = head(features, labels, pairs=pairs)
    assert output.valid.tolist() == [True, False, False, False, True] * 2
    assert output.pairs is pairs
    some = Pairs(*(field[[0, 4]] for field in pairs))
    torch.testing.assert_close(api_loss(output), api_loss(head(features, labels, pairs=some)))
    of_keys = head(features, labels.abs(), pairs=pairs, keys=features.detach(), key_labels=labels)
    assert of_keys.valid.tolist() == [True, True, False, False, True] * 2


# The look at the first batch.

MIXED = {
    "shuffled": torch.arange(32),
    "one class": torch.zeros(8, dtype=torch.long),
    "one image": torch.zeros(1, dtype=torch.long),
    "two classes of one image": torch.arange(2),
}


@pytest.mark.parametrize("kind", MIXED)
def test_a_first_batch_with_few_pairs_warns_once(kind):
    labels, head = MIXED[kind], APIHead(DIM, 40)
    size, classes = len(labels), len(labels.unique())
    numbers = rf"{size if size > 1 else 2} of the {2 * size} pairs.*{size} images, of {classes} different classes"
    with pytest.warns(UserWarning, match=rf"{numbers}.*batch_sampler=BalancedBatchSampler") as caught:
        head(torch.randn(size, DIM), labels)
    ours = [one.filename for one in caught if one.category is UserWarning]
    assert ours == [__file__], "it points at whoever called the head"
    with no_warnings():
        head(torch.randn(size, DIM), labels)
        copy.deepcopy(head)(torch.randn(size, DIM), labels)


SHUFFLED, BALANCED = torch.arange(32), torch.arange(32) // 4


@pytest.mark.parametrize(
    "call",
    [
        lambda head, x: head(x, BALANCED),
        lambda head, x: head(x, BALANCED * (SHUFFLED >= 4)),  # 8 images of one class
        lambda head, x: head(x, torch.where(SHUFFLED % 2 == 0, BALANCED, -1)),  # half of them without a class
        lambda head, x: head(x),
        lambda head, x: head(x * torch.nan, BALANCED),  # no lack of images: the loss shows it
        lambda head, x: head.eval()(x, SHUFFLED),
        lambda head, x: head(x, SHUFFLED, pairs=random_pairs(SHUFFLED, 5)),
        lambda head, x: head(x, SHUFFLED, keys=x, key_labels=SHUFFLED, key_offset=0),
        lambda head, x: head(x[:0], BALANCED[:0]),
        lambda head, x: torch.no_grad()(head)(x, SHUFFLED),
        lambda head, x: APIHead(DIM, 40, memory=64)(x, SHUFFLED),
        lambda head, x: (head(x, BALANCED), head(x, SHUFFLED)),  # a good first batch ends the looking
    ],
)
def test_nothing_is_said_where_nothing_is_amiss(call):
    with no_warnings():
        call(APIHead(DIM, 40), torch.randn(32, DIM))


def test_nothing_is_looked_at_while_tracing():
    x, labels, head = torch.randn(32, DIM), SHUFFLED, APIHead(DIM, 40)
    with no_warnings(UserWarning):
        torch.compile(head, fullgraph=True, backend="eager")(x, labels)
        torch.export.export(head, (x, labels))
        with FakeTensorMode():
            APIHead(DIM, 40)(torch.randn(32, DIM), torch.zeros(32, dtype=torch.long))
        APIHead(DIM, 40, device="meta")(x.to("meta"), labels.to("meta"))
    with pytest.warns(UserWarning, match="32 of the 64 pairs"):  # and afterwards it is the first batch still
        head(x, labels)


@pytest.mark.gpu
def test_only_the_first_batch_waits_for_the_device():
    head, features, labels = APIHead(DIM, 40).cuda(), torch.randn(32, DIM).cuda(), torch.arange(32).cuda()
    with pytest.warns(UserWarning, match="32 of the 64 pairs"):
        head(features, labels)
    with no_waiting():
        head(features, labels)
    fresh = APIHead(DIM, 40, dropout=0.0).cuda()
    with no_warnings(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fresh(features, labels)


# functorch, devices, numbers.


@pytest.mark.parametrize("mutual", MUTUALS)
def test_grad_of_torch_func_is_that_of_autograd(mutual):
    head, features, labels = make_case(mutual=mutual)
    names = [name for name, _ in head.named_parameters()]

    def loss(parameters, features):
        return api_loss(torch.func.functional_call(head, parameters, (features, labels)))

    expected = gradients(api_loss(head(features, labels)), head, features)
    parameters = {name: parameter.detach() for name, parameter in head.named_parameters()}
    found, of_features = torch.func.grad(loss, argnums=(0, 1))(parameters, features.detach())
    torch.testing.assert_close([*(found[name] for name in names), of_features], [*expected])
    of_features, value = torch.func.grad_and_value(lambda x: loss(parameters, x))(features.detach())
    torch.testing.assert_close(of_features, expected[-1])
    torch.testing.assert_close(value, api_loss(head(features, labels)).detach())


@pytest.mark.filterwarnings("ignore:.* pairs of the first batch")
@pytest.mark.parametrize("mutual", MUTUALS)
@pytest.mark.parametrize("memory", [0, 8])
def test_the_default_device_may_be_another(mutual, memory):
    head, features, labels = make_case(mutual=mutual, memory=memory, dropout=0.5)
    with torch.device("meta"):
        there = APIHead(DIM, CLASSES, mutual=mutual, memory=memory)
        assert api_loss(there(torch.randn(12, DIM), torch.zeros(12, dtype=torch.long))).device.type == "meta"
        api_loss(head(features, labels)).backward()
        assert head(features).device.type == "cpu"
        gates = head.gates(features, random_pairs(labels, 5))
    assert features.grad.isfinite().all()
    assert gates[0].isfinite().all()


def test_numpy_numbers_become_plain_ones():
    head = APIHead(np.int64(9), np.int32(5), hidden_dim=np.int16(6), dropout=np.float32(0.25), memory=np.int64(8))
    numbers = [head.dim, head.num_classes, head.mutual.drop.p, head.drop.p, head.memory.size, head.memory.dim]
    assert [repr(number) for number in numbers] == ["9", "5", "0.25", "0.25", "8", "9"]


def test_a_dynamic_batch_size_is_compiled_once():
    head, _, _ = make_case(dtype=torch.float32)
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (12, 20, 31):
        features, labels = make_batch(size, size, DIM, 2, torch.float32, "normal")
        torch.testing.assert_close(
            compiled(features, labels % CLASSES).logits_other, head(features, labels % CLASSES).logits_other
        )


def test_the_head_keeps_five_numbers_a_channel_of_each_pair():
    # The mutual vector, and the four gated features as the classifier takes them; nn.Dropout adds its masks. What the
    # published head keeps is fifteen: benchmarks/head.py compares. The features are kept once, in place of those given.
    size, dim, classes = 40, 1024, 8
    head = APIHead(dim, classes, hidden_dim=32, dropout=0.0)
    features, labels = torch.randn(size, dim, requires_grad=True), torch.arange(size) // 4
    pairs = mine_pairs(features, labels)
    found, loss = saved_bytes(
        lambda: api_loss(head(features, labels % classes, pairs=pairs)), [features, *head.parameters()]
    )
    assert found <= 1.05 * (5 * 2 + 1) * size * dim * 4
    loss.backward()
