"""`api_loss` against torch's own losses, and some rows of logits at a time against all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import hooked, scaled, with_own_forward
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from watching import Made

from apinet_head import APILoss, APIOutput, api_loss

DIM, HIDDEN, CLASSES = 11, 13, 9
BOTH = pytest.mark.parametrize("kind", ["linear", "mlp"])  # gradients in the forward pass, and by recomputation


class Case:
    """Gated features of some rows, and what a head would give beside them; an eighth of the rows have no class."""

    def __init__(self, dtype=torch.float64, gate="pair", size=14, share=0.7, seed=0):
        generator = torch.Generator().manual_seed(seed)
        own, other = torch.randn(2, size, DIM, generator=generator, dtype=torch.float64).mul(2).to(dtype).unbind()
        self.features = [row.requires_grad_() for row in ([own] if gate == "single" else [own, other])]
        self.labels = torch.randint(CLASSES, (size,), generator=generator)
        self.labels[2::8] = -100
        self.valid = torch.rand(size, generator=generator) < share
        self.class_weight = torch.rand(CLASSES, generator=generator, dtype=dtype)

    def rows(self, loss, classifier, num_rows=None):
        return loss.of_features(torch.stack(self.features), self.labels, self.valid, num_rows, classifier)

    def output(self, classifier, num_rows=None):
        logits = classifier(self.features[0]), classifier(self.features[-1])
        return APIOutput(*logits, self.labels, self.valid & (self.labels >= 0), None, num_rows)

    def learning(self, classifier):
        return [*self.features, *classifier.parameters()]


def make_classifier(kind, dtype=torch.float64):
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).to(dtype)
    linear = nn.Linear(DIM, CLASSES, bias=kind != "no bias", dtype=dtype)
    return weight_norm(linear) if kind == "weight_norm" else linear


def assert_same(found, expected, tolerance=1e-12):
    torch.testing.assert_close([*found], [*expected], rtol=tolerance, atol=tolerance)


def check(case, loss, classifier, num_rows=None, tolerance=1e-12):
    """Assert that terms and gradients of a few rows at a time are those of all logits; the terms and gradients."""
    found, expected = case.rows(loss, classifier, num_rows), loss.terms(case.output(classifier, num_rows))
    assert_same(found, expected, tolerance)
    learning = [tensor for tensor in case.learning(classifier) if tensor.requires_grad]
    assert found.total.requires_grad == bool(learning)
    gradients = [torch.autograd.grad(3.5 * terms.total, learning) if learning else [] for terms in (found, expected)]
    assert_same(*gradients, tolerance)
    with torch.no_grad():
        without = case.rows(loss, classifier, num_rows)
    assert_same(without, found, tolerance)
    assert not without.total.requires_grad
    return found, gradients[0]


def published(output, margin, rank_weight, label_smoothing, class_weight):
    """The published training loop's losses, on the valid rows alone."""
    own, other, labels = (value[output.valid] for value in output[:3])
    weights = {"weight": class_weight, "label_smoothing": label_smoothing}
    cross_entropy = F.cross_entropy(torch.cat([own, other]), torch.cat([labels, labels]), **weights)
    p_own, p_other = (F.softmax(logits, 1)[torch.arange(len(labels)), labels] for logits in (own, other))
    ranking = F.margin_ranking_loss(p_own, p_other, torch.ones_like(p_own), margin)
    if output.num_rows is not None:  # which divides the sums; those with class weights are of their sum
        cross_entropy = cross_entropy * len(labels) / (output.num_rows if class_weight is None else len(labels))
        ranking = ranking * len(labels) / output.num_rows
    return cross_entropy + rank_weight * ranking, cross_entropy, ranking


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_terms_and_gradients_are_those_of_all_logits_and_of_torchs_losses(data):
    def one_of(*choices):
        return data.draw(st.sampled_from(choices))

    case = Case(torch.float64, one_of("pair", "single"), one_of(1, 3, 14), one_of(0.0, 0.7, 1.0), one_of(*range(99)))
    classifier, num_rows = make_classifier(one_of("linear", "no bias", "mlp", "weight_norm")), one_of(None, None, 5.5)
    num_rows = None if num_rows is None else torch.tensor(num_rows, dtype=torch.float64)
    weights = {"margin": data.draw(st.floats(0, 0.5)), "rank_weight": data.draw(st.floats(0, 2))}
    weights |= {"label_smoothing": one_of(0.0, 0.1, 1.0), "class_weight": one_of(None, case.class_weight)}
    for tensor in case.learning(classifier):
        tensor.requires_grad_(one_of(True, True, True, False))
    loss = APILoss(**weights, rows=one_of(None, 1, 3, 8, 1000))
    terms, gradients = check(case, loss, classifier, num_rows)
    output = case.output(classifier, num_rows)
    assert torch.equal(api_loss(output, **weights), loss(output))
    if not output.valid.any():
        assert not any(value.any() for value in (*terms, *gradients))
    else:
        expected = published(output, **weights)
        torch.testing.assert_close([*terms], [*expected])
        learning = [tensor for tensor in case.learning(classifier) if tensor.requires_grad]
        of_total = torch.autograd.grad(3.5 * expected[0], learning, materialize_grads=True) if learning else ()
        torch.testing.assert_close(of_total, tuple(gradients))


@BOTH
def test_class_weights_of_zero_give_zero_with_zero_gradients(kind):
    loss = APILoss(rank_weight=0, label_smoothing=0.1, class_weight=torch.zeros(CLASSES).double(), rows=4)
    (total, cross_entropy, _), gradients = check(Case(), loss, make_classifier(kind))
    assert not any(value.any() for value in (total, cross_entropy, *gradients))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    output = Case().output(make_classifier("linear"))
    half = [logits.to(dtype) for logits in output[:2]]
    expected = api_loss(APIOutput(*(logits.double() for logits in half), *output[2:]))
    torch.testing.assert_close(api_loss(APIOutput(*half, *output[2:])), expected.float(), rtol=1e-5, atol=1e-6)


def test_class_weight_is_a_buffer_as_in_cross_entropy_loss():
    loss = APILoss(class_weight=torch.rand(5))
    assert [*loss.state_dict(), *loss.parameters()] == ["class_weight"]
    assert loss.double().class_weight.dtype == torch.float64
    assert list(APILoss().state_dict()) == []


@BOTH
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("gate", ["pair", "single"])
def test_never_more_rows_of_logits_than_asked_for(kind, rows, gate):
    case, classifier, shapes = Case(gate=gate), make_classifier(kind), []
    with Made(lambda tensor: shapes.append(tensor.shape)):
        case.rows(APILoss(rows=rows), classifier).total.backward()
    logits = [shape for shape in shapes if len(shape) > 1 and shape[-1] == CLASSES and shape[0] not in (DIM, HIDDEN)]
    assert 0 < max(shape[:-1].numel() for shape in logits) <= max(rows, len(case.features))


def test_the_loss_of_a_linear_classifier_is_for_one_backward_pass_from_the_total():
    terms, case = Case().rows(APILoss(rows=4), make_classifier("linear")), Case()
    assert [term.requires_grad for term in terms] == [True, False, False]
    terms.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"one backward pass.*use APILoss\(rows=None\)"):
        terms.total.backward()
    total = case.rows(APILoss(rows=4), make_classifier("linear")).total
    with pytest.raises(RuntimeError, match=r"create_graph.*use APILoss\(rows=None\)"):
        torch.autograd.grad(total, case.features, create_graph=True)


@BOTH
def test_nan_features_give_a_nan_loss(kind):
    case = Case(share=1.0)
    with torch.no_grad():
        case.features[0][5, 0] = torch.nan
    assert all(term.isnan() for term in case.rows(APILoss(rows=4), make_classifier(kind)))


def test_large_logits_stay_finite():
    classifier = make_classifier("linear")
    with torch.no_grad():
        classifier.weight *= 1e5
    assert check(Case(), APILoss(rows=4), classifier)[0].total.isfinite()


@pytest.mark.parametrize("stand_in", [hooked, scaled, with_own_forward, lambda layer: lambda x: 2 * layer(x)])
def test_a_linear_that_is_not_just_one_is_called(stand_in):
    case, classifier, loss = Case(), make_classifier("linear"), APILoss(rows=4)
    call = stand_in(classifier)
    learning = case.learning(call if isinstance(call, nn.Module) else classifier)
    terms = case.rows(loss, call), loss.terms(case.output(call))
    assert_same(*terms)
    for both in zip(*terms, strict=True):  # they have gradients of their own
        assert_same(*(torch.autograd.grad(term, learning, retain_graph=True) for term in both))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_terms_and_gradients_under_autocast_are_float32_and_near(kind, dtype):
    case, classifier, loss = Case(torch.float32), make_classifier(kind, torch.float32), APILoss(rows=4)
    with torch.autocast("cpu", dtype=dtype):
        terms = case.rows(loss, classifier), loss.terms(case.output(classifier))
    assert_same(*terms, 1e-5)  # of the very same logits
    gradients = [torch.autograd.grad(both.total, case.learning(classifier)) for both in terms]
    assert {value.dtype for value in (*terms[0], *gradients[0])} == {torch.float32}
    assert_same(*gradients, 4e-3 if dtype == torch.float16 else 3e-2)


def test_autocast_does_not_keep_a_weight_that_lacks_its_graph():
    case, classifier = Case(torch.float32), make_classifier("linear", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.rows(APILoss(rows=4), classifier).total.backward()
        classifier.weight.grad = None
        classifier(case.features[0].detach()).sum().backward()
    assert classifier.weight.grad is not None


def many_classes(rows, dim, classes):
    torch.manual_seed(0)
    classifier, valid = nn.Linear(dim, classes), torch.ones(rows, dtype=torch.bool)
    arguments = torch.randn(2, rows, dim), torch.arange(rows) * 7, valid, None, classifier
    return classifier, lambda: APILoss(rows=8).of_features(*arguments).total


def test_float16_keeps_gradients_of_unlikely_classes():
    classifier, total = many_classes(40, DIM, 20_000)
    full = torch.autograd.grad(total(), classifier.parameters())
    with torch.autocast("cpu", dtype=torch.float16):
        half = torch.autograd.grad(total(), classifier.parameters())
    for one, other in zip(half, full, strict=True):
        assert (one - other).norm() / other.norm() < 2e-3
        assert (one[1000:] - other[1000:]).norm() / other[1000:].norm() < 2e-2


def test_weight_gradient_is_one_buffer():
    """Autograd takes it for .grad as it is, without a copy."""
    classifier, total = many_classes(64, 64, 4096)
    big = {classifier.weight.data_ptr()}

    def note(tensor):
        if tensor.numel() >= classifier.weight.numel():
            big.add(tensor.untyped_storage().data_ptr())

    with Made(note):
        total().backward()
    assert big == {classifier.weight.data_ptr(), classifier.weight.grad.data_ptr()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_single_and_half_precision_stay_near(dtype, tolerance):
    terms, _ = check(Case(dtype), APILoss(rows=6), make_classifier("linear", dtype), tolerance=tolerance)
    assert terms.total.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@BOTH
@pytest.mark.parametrize("rows", [None, 6])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_loss_equals_eager(kind, rows, backend):
    case, classifier = Case(), make_classifier(kind)
    loss = APILoss(label_smoothing=0.1, class_weight=case.class_weight, rows=rows)
    expected = loss.terms(case.output(classifier))
    loss.of_features = torch.compile(loss.of_features, fullgraph=True, backend=backend)
    found = case.rows(loss, classifier)
    assert_same(found, expected)
    assert_same(*(torch.autograd.grad(terms.total, case.learning(classifier)) for terms in (found, expected)))


@BOTH
def test_func_grad_equals_autograd(kind):
    case, classifier, loss = Case(), make_classifier(kind), APILoss(rows=4)
    targets = case.labels, case.valid, None, classifier
    found = torch.func.grad(lambda gated: loss.of_features(gated, *targets).total)(torch.stack(case.features).detach())
    assert_same(found, torch.autograd.grad(loss.terms(case.output(classifier)).total, case.features))


@BOTH
@pytest.mark.parametrize("rows", [None, 4])
def test_labels_and_weights_of_other_classes_are_an_error(kind, rows):
    case, classifier = Case(), make_classifier(kind)
    with pytest.raises(ValueError, match=rf"class_weight must be \[{CLASSES}\].*\[12\]"):
        case.rows(APILoss(rows=rows, class_weight=torch.ones(12)), classifier)
    case.labels[int(case.valid.nonzero()[-1])] = CLASSES
    for weight in (None, case.class_weight):
        with pytest.raises(ValueError, match=rf"labels of valid rows must be in \[0, {CLASSES}\).*got {CLASSES}"):
            case.rows(APILoss(rows=rows, class_weight=weight), classifier)


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


# What is no number, share or weight in `api_loss` is in test_fuzz.py.
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_weight": [1.0, 2.0]}, TypeError, r"class_weight must be a tensor \[C\].*\[1.0, 2.0\]"),
        ({"class_weight": torch.ones(5, 1)}, ValueError, r"must be \[C\].*float32 \[5, 1\]"),
        ({"margin": "0.05"}, TypeError, r"margin must be a number"),
        ({"label_smoothing": 1.1}, ValueError, r"\[0, 1\], got 1.1"),
        ({"rows": 0}, ValueError, "rows must be at least 1, got 0"),
        ({"rows": 2.5}, TypeError, "rows must be an int, got 2.5"),
        ({"rows": True}, TypeError, "rows must be an int, got True"),
    ],
)
def test_settings_are_checked_as_the_module_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        APILoss(**arguments)
