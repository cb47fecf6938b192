"""`APILoss.of_features`: the loss some rows of logits at a time, against that of all logits at once."""

import itertools

import pytest
import torch
from stand_ins import hooked, scaled, with_own_forward
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from watching import Made

from apinet_head import APILoss, APIOutput

N, DIM, HIDDEN, CLASSES = 14, 11, 13, 9
BOTH = pytest.mark.parametrize("kind", ["linear", "mlp"])  # gradients in the forward pass, and by recomputation


class Case:
    """Gated features of N rows, and what a head would give beside them."""

    def __init__(self, dtype=torch.float64, gate="pair", seed=0, valid_share=0.7):
        generator = torch.Generator().manual_seed(seed)
        self.own, other = torch.randn(2, N, DIM, generator=generator, dtype=torch.float64).mul(2).to(dtype).unbind()
        self.other = self.own if gate == "single" else other
        for features in (self.own, self.other):
            features.requires_grad_()
        self.labels = torch.randint(CLASSES, (N,), generator=generator)
        self.labels[2] = -100
        self.valid = torch.rand(N, generator=generator) < valid_share
        self.class_weight = torch.rand(CLASSES, generator=generator, dtype=dtype)

    def rows(self, loss, classifier, num_rows=None):
        return loss.of_features(self.gated(), self.labels, self.valid, num_rows, classifier)

    def features(self):
        return [self.own] if self.own is self.other else [self.own, self.other]

    def gated(self):
        return torch.stack(self.features())

    def at_once(self, loss, classifier, num_rows=None):
        logits = classifier(self.own), classifier(self.other)
        return loss.terms(APIOutput(*logits, self.labels, self.valid & (self.labels >= 0), None, num_rows))

    def learning(self, classifier):
        return [*self.features(), *classifier.parameters()]


def make_classifier(kind, dtype=torch.float64):
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).to(dtype)
    linear = nn.Linear(DIM, CLASSES, bias=kind != "no bias", dtype=dtype)
    return weight_norm(linear) if kind == "weight_norm" else linear


def gradients(loss, inputs, **options):
    return torch.autograd.grad(loss, inputs, **options)


def assert_same(found, expected, tolerance=1e-12):
    torch.testing.assert_close([*found], [*expected], rtol=tolerance, atol=tolerance)


def check(case, loss, classifier, num_rows=None, tolerance=1e-12):
    """Assert that terms and gradients of a few rows at a time are those of all logits; the terms."""
    found, expected = (way(loss, classifier, num_rows) for way in (case.rows, case.at_once))
    assert_same(found, expected, tolerance)
    learning = [tensor for tensor in case.learning(classifier) if tensor.requires_grad]
    assert found.total.requires_grad == bool(learning)
    if learning:
        assert_same(*(gradients(3.5 * terms.total, learning) for terms in (found, expected)), tolerance)
    return found


@pytest.mark.parametrize("kind", ["linear", "no bias", "mlp", "weight_norm"])
@pytest.mark.parametrize("gate", ["pair", "single"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rows", [None, 1, 3, 8, 1000])
def test_terms_and_all_gradients_are_those_of_all_logits(kind, gate, weighted, smoothing, rows):
    case, classifier = Case(gate=gate), make_classifier(kind)
    weight = case.class_weight if weighted else None
    loss = APILoss(margin=0.2, rank_weight=1.7, label_smoothing=smoothing, class_weight=weight, rows=rows)
    check(case, loss, classifier)


@BOTH
def test_num_rows_divides_the_sums(kind):
    check(Case(), APILoss(rows=4), make_classifier(kind), torch.tensor(5.5, dtype=torch.float64))


@BOTH
def test_no_row_that_counts_gives_zero_with_zero_gradients(kind):
    case = Case(valid_share=0)
    terms = check(case, APILoss(label_smoothing=0.1, class_weight=case.class_weight, rows=4), make_classifier(kind))
    assert [term.item() for term in terms] == [0, 0, 0]


@BOTH
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("gate", ["pair", "single"])
def test_never_more_rows_of_logits_than_asked_for(kind, rows, gate):
    case, classifier = Case(gate=gate), make_classifier(kind)
    shapes = []
    with Made(lambda tensor: shapes.append(tensor.shape)):
        case.rows(APILoss(rows=rows), classifier).total.backward()
    logits = [shape for shape in shapes if len(shape) > 1 and shape[-1] == CLASSES and shape[0] not in (DIM, HIDDEN)]
    seen = [shape[:-1].numel() for shape in logits]
    assert seen
    assert max(seen) <= max(rows, 2 if gate == "pair" else 1)


def test_only_the_total_of_a_linear_classifier_has_a_gradient():
    terms = Case().rows(APILoss(rows=4), make_classifier("linear"))
    assert [term.requires_grad for term in terms] == [True, False, False]


def test_a_second_backward_pass_is_an_error():
    total = Case().rows(APILoss(rows=4), make_classifier("linear")).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"one backward pass.*use APILoss\(rows=None\)"):
        total.backward()


def test_double_backward_is_an_error():
    case = Case()
    total = case.rows(APILoss(rows=4), make_classifier("linear")).total
    with pytest.raises(RuntimeError, match=r"create_graph.*use APILoss\(rows=None\)"):
        gradients(total, [case.own], create_graph=True)


@pytest.mark.parametrize("frozen", ["weight", "bias", "features", "all"])
def test_what_does_not_learn_gets_no_gradient(frozen):
    case, classifier = Case(), make_classifier("linear")
    off = {"weight": [classifier.weight], "bias": [classifier.bias], "features": [case.own, case.other]}
    for tensor in itertools.chain(*off.values()) if frozen == "all" else off[frozen]:
        tensor.requires_grad_(False)
    check(case, APILoss(rows=4), classifier)


@BOTH
def test_without_gradients_the_terms_are_the_same(kind):
    case, classifier = Case(), make_classifier(kind)
    with torch.no_grad():
        found = case.rows(APILoss(rows=4), classifier)
    assert_same(found, case.at_once(APILoss(), classifier))
    assert not found.total.requires_grad


@BOTH
def test_nan_features_give_a_nan_loss(kind):
    case = Case(valid_share=1)
    with torch.no_grad():
        case.own[5, 0] = torch.nan
    assert all(term.isnan() for term in case.rows(APILoss(rows=4), make_classifier(kind)))


def test_large_logits_stay_finite():
    case, classifier = Case(), make_classifier("linear")
    with torch.no_grad():
        classifier.weight *= 1e5
    assert check(case, APILoss(rows=4), classifier).total.isfinite()


@pytest.mark.parametrize("stand_in", [hooked, scaled, with_own_forward, lambda layer: lambda x: 2 * layer(x)])
def test_a_linear_that_is_not_just_one_is_called(stand_in):
    case, classifier = Case(), make_classifier("linear")
    call = stand_in(classifier)
    classifier = call if isinstance(call, nn.Module) else classifier
    loss = APILoss(rows=4)
    found, expected = case.rows(loss, call), case.at_once(loss, call)
    assert_same(found, expected)
    learning = case.learning(classifier)
    for one, other in zip(found, expected, strict=True):  # they have gradients of their own
        assert_same(*(gradients(term, learning, retain_graph=True) for term in (one, other)))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_terms_and_gradients_under_autocast_are_float32_and_near(kind, dtype):
    case, classifier = Case(torch.float32), make_classifier(kind, torch.float32)
    loss, learning = APILoss(rows=4, label_smoothing=0.1), case.learning(classifier)
    with torch.autocast("cpu", dtype=dtype):
        found, expected = case.rows(loss, classifier), case.at_once(loss, classifier)
    assert {term.dtype for term in found} == {torch.float32}
    assert_same(found, expected, 1e-5)  # of the very same logits
    found, expected = gradients(found.total, learning), gradients(expected.total, learning)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    assert_same(found, expected, 4e-3 if dtype == torch.float16 else 3e-2)


def test_autocast_does_not_keep_a_weight_that_lacks_its_graph():
    case, classifier = Case(torch.float32), make_classifier("linear", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.rows(APILoss(rows=4), classifier).total.backward()
        classifier.weight.grad = None
        classifier(case.own.detach()).sum().backward()
    assert classifier.weight.grad is not None


def test_float16_keeps_gradients_of_unlikely_classes():
    torch.manual_seed(0)
    classifier = nn.Linear(DIM, 20_000)
    gated = torch.randn(2, 40, DIM)
    labels, valid = torch.arange(40) * 7, torch.ones(40, dtype=torch.bool)
    found = []
    for dtype in (torch.float16, torch.float32):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.float16):
            total = APILoss(rows=16).of_features(gated, labels, valid, None, classifier).total
        found += gradients(total, [classifier.bias, classifier.weight])
    for half, full in (found[::2], found[1::2]):
        assert (half - full).norm() / full.norm() < 2e-3
    rest = found[1][1000:], found[3][1000:]
    assert (rest[0] - rest[1]).norm() / rest[1].norm() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision_stay_near(dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    found = check(Case(dtype), APILoss(rows=6), make_classifier("linear", dtype), tolerance=tolerance)
    assert found.total.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@BOTH
@pytest.mark.parametrize("rows", [None, 6])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_loss_equals_eager(kind, rows, backend):
    case, classifier = Case(), make_classifier(kind)
    loss = APILoss(label_smoothing=0.1, class_weight=case.class_weight, rows=rows)
    compiled = torch.compile(loss.of_features, fullgraph=True, backend=backend)
    found = compiled(case.gated(), case.labels, case.valid, None, classifier)
    expected = case.at_once(loss, classifier)
    assert_same(found, expected)
    learning = case.learning(classifier)
    assert_same(gradients(found.total, learning), gradients(expected.total, learning))


@BOTH
def test_func_grad_equals_autograd(kind):
    case, classifier = Case(), make_classifier(kind)
    loss = APILoss(rows=4)
    found = torch.func.grad(
        lambda own: loss.of_features(torch.stack([own, case.other]), case.labels, case.valid, None, classifier).total
    )(case.own.detach())
    (expected,) = gradients(case.at_once(loss, classifier).total, [case.own])
    assert_same([found], [expected])


@BOTH
def test_a_label_beyond_the_classes_is_an_error(kind):
    case = Case()
    case.labels[int(case.valid.nonzero()[-1])] = CLASSES
    for weight in (None, case.class_weight):
        with pytest.raises(ValueError, match=rf"labels of valid rows must be in \[0, {CLASSES}\).*got {CLASSES}"):
            case.rows(APILoss(rows=4, class_weight=weight), make_classifier(kind))


@BOTH
@pytest.mark.parametrize("rows", [None, 4])
def test_class_weight_must_have_an_entry_per_class(kind, rows):
    with pytest.raises(ValueError, match=rf"class_weight must be \[{CLASSES}\].*\[12\]"):
        Case().rows(APILoss(rows=rows, class_weight=torch.ones(12)), make_classifier(kind))


@pytest.mark.parametrize("kind", ["batch_norm", "spectral_norm", "linear spectral_norm"])
def test_a_classifier_that_changes_as_it_runs_is_an_error(kind):
    """Each part, and its second run, would see another classifier."""
    case, linear = Case(), nn.Linear(DIM, CLASSES, dtype=torch.float64)
    changing = nn.BatchNorm1d(DIM, dtype=torch.float64) if kind == "batch_norm" else spectral_norm(linear)
    classifier = changing if kind == "linear spectral_norm" else nn.Sequential(changing, nn.Tanh())
    with pytest.raises(ValueError, match=r"changes its buffers each time.*use APILoss\(rows=None\)"):
        case.rows(APILoss(rows=4), classifier)
    assert case.rows(APILoss(), classifier).total.isfinite()
    assert case.rows(APILoss(rows=4), classifier.eval()).total.isfinite()


def test_weight_gradient_is_one_buffer():
    """Autograd takes it for .grad as it is, without a copy."""
    torch.manual_seed(0)
    classifier = nn.Linear(64, 4096)
    gated = torch.randn(2, 64, 64)
    labels, valid = torch.arange(64), torch.ones(64, dtype=torch.bool)
    big = {classifier.weight.data_ptr()}

    def note(tensor):
        if tensor.numel() >= classifier.weight.numel():
            big.add(tensor.untyped_storage().data_ptr())

    with Made(note):
        APILoss(rows=8).of_features(gated, labels, valid, None, classifier).total.backward()
    assert big == {classifier.weight.data_ptr(), classifier.weight.grad.data_ptr()}
