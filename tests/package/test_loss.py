"""`api_loss` against torch's own losses, and some rows of logits at a time against all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from fuzzing import NO_COUNT, check_all_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import hooked, scaled, with_own_forward
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from watching import Made

from apinet_head import APILoss, APIOutput, api_loss

DIM, HIDDEN, CLASSES = 11, 13, 9
BOTH = pytest.mark.parametrize("kind", ["linear", "mlp"])  # gradients in the forward pass, and by recomputation
CALLED = "mlp", weight_norm, hooked, scaled, with_own_forward  # whose weights may not be read


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


def make_classifier(kind, dtype=torch.float64, classes=CLASSES):
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, classes)).to(dtype)
    linear = nn.Linear(DIM, classes, bias=kind != "no bias", dtype=dtype)
    return kind(linear) if callable(kind) else linear


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
    if class_weight is not None and not class_weight.any():  # torch's own is 0 / 0
        cross_entropy = 0 * own.sum()
    p_own, p_other = (F.softmax(logits, 1)[torch.arange(len(labels)), labels] for logits in (own, other))
    ranking = F.margin_ranking_loss(p_own, p_other, torch.ones_like(p_own), margin)
    if output.num_rows is not None:  # which divides the sums; those with class weights are of their sum
        cross_entropy = cross_entropy * len(labels) / (output.num_rows if class_weight is None else len(labels))
        ranking = ranking * len(labels) / output.num_rows
    return cross_entropy + rank_weight * ranking, cross_entropy, ranking


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_terms_and_gradients_are_those_of_all_logits_and_of_torchs_losses(data):
    def one_of(*choices):
        return data.draw(st.sampled_from(choices))

    case = Case(torch.float64, one_of("pair", "single"), one_of(1, 3, 14), one_of(0.0, 0.7, 1.0), one_of(*range(99)))
    kind, num_rows = one_of("linear", "no bias", *CALLED), one_of(None, None, 5.5)
    classifier, class_weight = make_classifier(kind), one_of(case.class_weight, torch.zeros_like(case.class_weight))
    num_rows = None if num_rows is None else torch.tensor(num_rows, dtype=torch.float64)
    weights = {"margin": data.draw(st.floats(0, 0.5)), "rank_weight": data.draw(st.floats(0, 2))}
    weights |= {"label_smoothing": one_of(0.0, 0.1, 1.0), "class_weight": one_of(None, class_weight)}
    for tensor in case.learning(classifier):
        tensor.requires_grad_(one_of(True, True, True, False))
    loss = APILoss(**weights, rows=one_of(None, 1, 3, 8, 1000))
    terms, gradients = check(case, loss, classifier, num_rows)
    assert terms.ranking.requires_grad == (terms.total.requires_grad and (kind in CALLED or loss.rows is None))
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


def test_class_weight_is_a_buffer_as_in_cross_entropy_loss():
    loss = APILoss(class_weight=torch.rand(5))
    assert [*loss.state_dict(), *loss.parameters()] == ["class_weight"]
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


def test_the_loss_of_a_linear_classifier_is_for_one_backward_pass():
    case = Case()
    total = case.rows(APILoss(rows=4), make_classifier("linear")).total
    message = r"one backward pass: with retain_graph or create_graph use APILoss\(rows=None\)"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(total, case.features, create_graph=True)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=message):
        total.backward()


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


def test_float16_keeps_gradients_of_unlikely_classes():
    case, classifier = Case(torch.float32, size=40), make_classifier("linear", torch.float32, classes=20_000)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            total = case.rows(APILoss(rows=8), classifier).total
        found.append(torch.autograd.grad(total, classifier.parameters()))
    for half, full in zip(*found, strict=True):
        assert (half - full).norm() / full.norm() < 2e-3
        assert (half[1000:] - full[1000:]).norm() / full[1000:].norm() < 1e-2


def test_weight_gradient_is_one_buffer():
    """Autograd takes it for .grad as it is, without a copy."""
    case, classifier = Case(torch.float32, size=64), make_classifier("linear", torch.float32, classes=4096)
    big = {classifier.weight.data_ptr()}

    def note(tensor):
        if tensor.numel() >= classifier.weight.numel():
            big.add(tensor.untyped_storage().data_ptr())

    with Made(note):
        case.rows(APILoss(rows=8), classifier).total.backward()
    assert big == {classifier.weight.data_ptr(), classifier.weight.grad.data_ptr()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
def test_lower_precision_stays_near_and_its_logits_are_summed_in_float32(dtype, tolerance):
    case, classifier = Case(dtype), make_classifier("linear", dtype)
    terms, _ = check(case, APILoss(rows=6), classifier, tolerance=tolerance)
    assert terms.total.dtype == torch.float32
    output = case.output(classifier)
    exact = output._replace(logits_self=output.logits_self.double(), logits_other=output.logits_other.double())
    torch.testing.assert_close(api_loss(output), api_loss(exact).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@BOTH
@pytest.mark.parametrize("rows", [None, 6])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_loss_equals_eager(kind, rows, backend):
    case = Case()
    loss = APILoss(label_smoothing=0.1, class_weight=case.class_weight, rows=rows)
    loss.of_features = torch.compile(loss.of_features, fullgraph=True, backend=backend)
    check(case, loss, make_classifier(kind))


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


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(DIM), spectral_norm(nn.Linear(DIM, CLASSES))])
@pytest.mark.parametrize("alone", [True, False])
def test_a_classifier_that_changes_as_it_runs_is_an_error(layer, alone):
    """Each part, and its second run, would see another classifier."""
    case, classifier = Case(torch.float32), layer if alone else nn.Sequential(layer, nn.Tanh())
    classifier.train()
    with pytest.raises(ValueError, match=r"changes its buffers each time.*use APILoss\(rows=None\)"):
        case.rows(APILoss(rows=4), classifier)
    assert case.rows(APILoss(), classifier).total.isfinite()
    assert case.rows(APILoss(rows=4), classifier.eval()).total.isfinite()


def test_settings_are_checked_as_the_module_is_made():
    arguments = {"margin": 0.05, "rank_weight": 1.0, "label_smoothing": 0.1, "class_weight": torch.ones(5), "rows": 4}
    no_weight = [1.0, 2.0], torch.ones(5, 1), torch.ones(5).long()
    check_all_refused(APILoss, arguments, class_weight=no_weight, rows=NO_COUNT)
