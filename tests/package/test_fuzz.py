"""Anything at all into all that is public: the documented result, or an error that shows what came."""

import math
import operator
from functools import partial

import numpy as np
import pytest
import torch
from fuzzing import INTEGERS, LAYOUTS, MODES, WAYS, check_all_refused, check_refused, draw_batch, fuzzed, one_of
from hypothesis import strategies as st
from mined import HOWS, check_pairs
from stand_ins import Calling
from strategies import DTYPES, KINDS
from torch import nn

import apinet_head as api
from apinet_head.mutual import MUTUALS
from apinet_head.step_memory import pick_chunk_size, step_memory

WARNINGS = "pairs of the first batch|no image will have another of the same class"
pytestmark = pytest.mark.filterwarnings(f"ignore:.*({WARNINGS})")


def draw_hows(data):
    intra = one_of(data, [*HOWS, None])
    return {"intra": intra, "inter": one_of(data, HOWS if intra is None else [*HOWS, None])}


def draw_keys(data, features, labels):
    """Keys that hold the batch among others, all in any dtype that holds the numbers; or nothing."""
    if len(features) == 0 or data.draw(st.booleans()):
        return {}
    before = data.draw(st.integers(0, min(3, len(features))))
    rows = torch.tensor([*range(before), *range(len(features)), 0])
    keys, key_labels = features.detach()[rows], labels.long()[rows]
    dtype = one_of(data, [dtype for dtype in INTEGERS if torch.equal(key_labels.to(dtype).long(), key_labels)])
    return {
        "keys": keys.to(one_of(data, [keys.dtype, torch.promote_types(keys.dtype, torch.float32)])),
        "key_labels": key_labels.to(dtype),
        "key_offset": one_of(data, [before, None]),
    }


def check_candidates(pairs, features, labels, intra, inter, **keys):
    """Assert that partners are candidates where there are any; which of them is in mining/test_mining.py."""
    any_of_them = {"intra": intra and "random", "inter": inter and "random"}
    check_pairs(pairs, features, labels, **any_of_them, **keys)


@fuzzed
def test_mine_pairs_and_gather_features_of_one_process_take_or_refuse_anything(data):
    features, labels, _ = draw_batch(data)
    if labels.dtype.is_signed:
        labels = labels - data.draw(st.integers(0, 20))
    batch = {"features": features, "labels": labels}
    check_all_refused(api.gather_features, batch)
    assert all(map(operator.is_, api.gather_features(**batch), (features, labels, 0)))
    arguments = {**batch, **draw_hows(data), **draw_keys(data, features, labels)}
    mine = partial(api.mine_pairs, backend=one_of(data, ["auto", "dense", "tiled"]))
    with one_of(data, MODES)():
        check_all_refused(mine, arguments)
        check_candidates(mine(**arguments), **arguments)


@fuzzed
def test_random_pairs_takes_or_refuses_anything(data):
    _, labels, _ = draw_batch(data)
    count = data.draw(st.integers(0, 20))
    if len(labels) == 0:
        return check_refused(lambda: api.random_pairs(labels, count), 0)
    arguments = {"labels": labels, "num_pairs": count, "generator": torch.Generator()}
    check_all_refused(api.random_pairs, arguments, labels=WAYS["labels alone"])
    pairs = api.random_pairs(**arguments)
    assert {field.shape for field in pairs} == {(count,)}
    assert {*pairs.anchor.tolist(), *pairs.partner.tolist()} <= {*range(len(labels))}
    of_anchor, of_partner = labels.long()[pairs.anchor], labels.long()[pairs.partner]
    assert torch.equal(pairs.same_class, (of_anchor == of_partner) & (of_anchor >= 0))
    assert (pairs.anchor != pairs.partner).all() or len(labels) == 1
    assert torch.equal(pairs.valid, (pairs.anchor != pairs.partner) & (of_anchor >= 0) & (of_partner >= 0))


def draw_head(data, **fixed):
    gate, hidden_dim = one_of(data, ["pair", "single"]), data.draw(st.integers(1, 5))
    mutual = one_of(data, [name for name in MUTUALS if (gate, name) != ("single", "individual")])
    dropout = one_of(data, [0.0, 0.5, 1.0])
    drawn = {"gate": gate, "mutual": mutual, "hidden_dim": hidden_dim, "dropout": dropout, **draw_hows(data)}
    return drawn | fixed


def is_ordinary(features):
    """Whether products of two features, the most that a mutual vector holds, are far from infinite in their dtype."""
    peak = features.detach().double().abs().amax() if len(features) else torch.tensor(0.0)
    return bool(100 * peak**2 < torch.finfo(features.dtype).max)  # not for NaN either


@fuzzed
def test_head_and_loss_takes_or_refuses_anything(data):
    features, labels, kind = draw_batch(data)
    classes, dtype = max(0, *labels.tolist()) + 1 if len(labels) else 3, features.dtype
    autocast = dtype in (torch.bfloat16, torch.float32) and data.draw(st.booleans())
    settings = draw_head(data, dtype=torch.float32 if autocast else dtype, dim=features.shape[1], num_classes=classes)
    check_all_refused(api.APIHead, {**settings, "memory": 0})
    head = api.APIHead(**settings)
    assert {parameter.dtype for parameter in head.parameters()} <= {settings["dtype"]}
    arguments = {"features": features, "labels": labels, **draw_keys(data, features, labels)}
    if "keys" in arguments:
        arguments["keys"] = arguments["keys"].to(dtype)
    wrong = [torch.float32 if dtype == torch.float64 else torch.float64]
    wrong += [torch.bfloat16 if dtype == torch.float16 else torch.float16]
    ways = {"features": (*WAYS["features of D"], *(lambda x, dtype=dtype: x.to(dtype) for dtype in wrong))}
    with one_of(data, MODES)(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        check_all_refused(head, arguments, **ways, labels=WAYS["labels, if any"])
        assert head(features).shape == (len(features), classes)
        output = head(**arguments)
        pairs, rows = output.pairs, 2 * len(output.pairs.anchor)
        assert [value.shape for value in output[:4]] == [(rows, classes)] * 2 + [(rows,)] * 2
        partner_labels = arguments.get("key_labels", labels).long()
        assert torch.equal(output.labels, torch.cat([labels.long()[pairs.anchor], partner_labels[pairs.partner]]))
        check_candidates(pairs, intra=head.intra, inter=head.inter, **arguments)
        terms, ordinary = api.api_loss_terms(output), is_ordinary(features)
        if ordinary:
            assert torch.equal(output.valid, pairs.valid.repeat(2))
            assert all(term.isfinite() for term in terms)
        if kind == "non-finite":
            assert not terms.total.isfinite()
        if terms.total.requires_grad:
            learning = [value for value in (features, *head.parameters()) if value.requires_grad]
            gradients = torch.autograd.grad(terms.total, learning, materialize_grads=True)
            assert not ordinary or all(gradient.isfinite().all() for gradient in gradients)
        if ordinary and dtype in DTYPES[2:] and not (autocast or head.drop.p):
            criterion = api.APILoss(rows=data.draw(st.none() | st.integers(1, 9)))
            torch.testing.assert_close([*head(**arguments, pairs=pairs, criterion=criterion)], [*terms])


@fuzzed
def test_pairs_of_ones_own_takes_or_refuses_anything(data):
    kinds = (*KINDS, *["unlabelled"] * len(KINDS))
    features, labels, _ = draw_batch(data, dtypes=DTYPES[2:], kinds=kinds, least=1)
    head = api.APIHead(features.shape[1], 50, **draw_head(data, dtype=features.dtype))
    keys = draw_keys(data, features, labels)
    count, rows = data.draw(st.integers(0, 9)), len(keys.get("keys", features))
    fields = {
        "anchor": torch.randint(len(features), (count,)), "partner": torch.randint(rows, (count,)),
        "same_class": torch.zeros(count, dtype=torch.bool), "valid": torch.rand(count) < 0.8,
    }  # fmt: skip
    if count:
        ways = {"partner": [*WAYS["partner"], lambda y: torch.full_like(y, rows)], "same_class": ()}
        check_all_refused(lambda **f: head.gates(features, api.Pairs(**f), keys=keys.get("keys")), fields, **ways)
        check_all_refused(lambda **f: head(features, labels, pairs=api.Pairs(**f), **keys), fields, **ways)
    pairs = api.Pairs(**fields)
    gates = head.gates(features, pairs, keys=keys.get("keys"))
    assert {gate.shape for gate in gates} == {(count, features.shape[1])}
    output = head(features, labels, pairs=pairs, **keys)
    assert output.pairs is pairs
    assert len(output.valid) == 2 * count
    if is_ordinary(features):
        assert all(((gate >= 0) & (gate <= 1)).all() for gate in gates)
        of_both = labels.long()[pairs.anchor], keys.get("key_labels", labels).long()[pairs.partner]
        assert torch.equal(output.valid, (pairs.valid & (torch.stack(of_both) >= 0).all(0)).repeat(2))


@fuzzed
def test_loss_of_any_logits_takes_or_refuses_anything(data):
    rows, classes, dtype = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 6)), one_of(data, DTYPES)
    fields = {
        "logits_self": torch.randn(rows, classes).to(dtype).requires_grad_(data.draw(st.booleans())),
        "logits_other": torch.randn(rows, classes).to(one_of(data, DTYPES)),
        "labels": torch.randint(classes, (rows,)).to(one_of(data, INTEGERS)),
        "valid": torch.rand(rows) < 0.7, "num_rows": one_of(data, [None, torch.tensor(2.5)]),
    }  # fmt: skip
    weights = {name: data.draw(st.floats(-2, 2)) for name in ("margin", "rank_weight")}
    class_weight = one_of(data, [None, (torch.rand(classes) + 0.1).to(dtype)])
    weights |= {"label_smoothing": data.draw(st.floats(0, 1)), "class_weight": class_weight}

    def loss_of(**given):
        return api.api_loss(api.APIOutput(pairs=None, **{name: given.pop(name) for name in fields}), **given)

    bad = 3, [1.0], torch.ones(classes + 1), torch.ones(classes).long(), torch.ones(classes, device="meta")
    check_all_refused(loss_of, fields | weights, class_weight=bad)
    row = data.draw(st.integers(0, rows - 1)) if rows else None
    number, label = (one_of(data, choices) for choices in ([0.0, torch.nan, torch.inf], [0, -1, classes, 10**9]))
    counts = row is not None and bool(fields["valid"][row]) and label >= 0
    if row is not None:  # a row with a bad number, a bad label or both: nothing to the loss, unless the row counts
        fields["logits_self"] = fields["logits_self"].index_fill(0, torch.tensor(row), number)
        fields["labels"] = fields["labels"].long().index_fill(0, torch.tensor(row), label)
    if counts and label:
        return check_refused(lambda: loss_of(**fields, **weights), label)
    loss = loss_of(**fields, **weights)
    assert loss.isfinite() == (number == 0 or not counts)
    if row is not None and not counts:  # whatever it holds, and why ever it is left out
        others = torch.arange(rows) != row
        without = fields | {name: fields[name][others] for name in list(fields)[:4]}
        torch.testing.assert_close(loss, loss_of(**without, **weights))
    if fields["logits_self"].requires_grad and loss.isfinite():
        (gradient,) = torch.autograd.grad(loss, fields["logits_self"])
        assert gradient.isfinite().all()
        assert not gradient[~fields["valid"]].any()


@fuzzed
def test_feature_memory_takes_or_refuses_anything(data):
    sizes = {"size": data.draw(st.integers(1, 9)), "dim": data.draw(st.integers(1, 4)), "dtype": one_of(data, DTYPES)}
    check_all_refused(api.FeatureMemory, sizes)
    memory, pushed = api.FeatureMemory(**sizes), []
    for _ in range(data.draw(st.integers(1, 4))):
        features, labels, _ = draw_batch(data)
        batch = {"features": features[:, [0] * memory.dim], "labels": labels}
        with one_of(data, MODES)():
            check_all_refused(memory.push, batch, features=WAYS["features of D"])
            memory.push(**batch)
        assert not memory.features.requires_grad
        pushed += zip(batch["features"].detach().to(memory.features.dtype), labels.tolist(), strict=True)
    rows, row_labels = torch.full_like(memory.features, math.nan), [-1] * memory.size
    for place, (row, label) in enumerate(pushed):
        rows[place % memory.size], row_labels[place % memory.size] = row, label
    assert memory.labels.tolist() == row_labels, "what was refused has left a trace"
    torch.testing.assert_close(memory.features, rows, rtol=0, atol=0, equal_nan=True)
    assert int(memory.filled) == min(len(pushed), memory.size)


@fuzzed
def test_head_with_a_memory_takes_or_refuses_anything(data):
    """Loss and gradients are those with the batch and the past as keys."""
    size, dim = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    settings = draw_head(data, dropout=0.0, intra=one_of(data, HOWS[:2]), inter=one_of(data, HOWS[:2]))
    head, plain = (api.APIHead(dim, 50, **settings, memory=memory) for memory in (size, 0))
    plain.load_state_dict({name: value for name, value in head.state_dict().items() if "memory" not in name})
    past = api.FeatureMemory(size, dim)
    for _ in range(data.draw(st.integers(1, 4))):
        features, labels, _ = draw_batch(data, dtypes=[torch.float32], kinds=("normal", "ties", "non-finite"))
        features, labels = features[:, [0] * dim], labels.long() - data.draw(st.sampled_from([0, 6]))  # or no class
        keys, key_labels = torch.cat([features, past.features]), torch.cat([labels, past.labels])
        check_refused(partial(head, features, labels[:, None]), labels[:, None])
        output = head(features, labels)
        expected = plain(features, labels, keys=keys, key_labels=key_labels, key_offset=0)
        assert output.num_rows is None
        past.push(features, labels)
        torch.testing.assert_close([*output[:4], *output.pairs], [*expected[:4], *expected.pairs], equal_nan=True)
        losses = api.api_loss(output), api.api_loss(expected)
        learning = ([*net.parameters(), *([features] * features.requires_grad)] for net in (head, plain))
        gradients = map(partial(torch.autograd.grad, materialize_grads=True), losses, learning)
        torch.testing.assert_close(*gradients, equal_nan=True)
        torch.testing.assert_close(*losses, equal_nan=True)
    torch.testing.assert_close([*head.memory.buffers()], [*past.buffers()], rtol=0, atol=0, equal_nan=True)


@fuzzed
def test_sampler_and_its_state_take_or_refuse_anything(data):
    """Labels come in any container. What batches are made of is in test_sampler.py."""
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    labels = [7 * label for label, count in enumerate(counts) for _ in range(count)]
    container = one_of(data, [list, tuple, np.array, torch.tensor, lambda rows: torch.tensor(rows, dtype=torch.int8)])
    world_size = one_of(data, [size for size in (1, 2, 3) if size <= len(counts)])
    arguments = {
        "labels": container(labels), "n_classes": world_size * data.draw(st.integers(1, len(counts) // world_size)),
        "n_samples": data.draw(st.integers(1, 4)), "n_batches": data.draw(st.none() | st.integers(1, 4)),
        "seed": data.draw(st.integers(-5, 5)), "rank": data.draw(st.integers(0, world_size - 1)),
        "world_size": world_size,
    }  # fmt: skip
    no_labels = [way(torch.tensor(labels)) for way in (*WAYS["labels alone"][1:], lambda y: y.to("meta"))]
    no_labels += [[*labels[:-1], last] for last in (math.nan, None, [1])]
    no_labels += [np.array(labels, dtype=float), [*map(str, labels)], None, 3]
    check_all_refused(api.BalancedBatchSampler, arguments, labels=no_labels)
    sampler = api.BalancedBatchSampler(**arguments)
    other = api.BalancedBatchSampler(**arguments | {"labels": labels})
    first, done = list(sampler), data.draw(st.integers(0, len(sampler)))
    sampler.set_epoch(data.draw(st.integers(0, 9)))
    state = sampler.state_dict(done)
    rubbish = math.nan, -77, 0.5, None, "1", True, [1], torch.ones(2), 10**9
    ways = {name: rubbish[:-1] if name == "epoch" else rubbish for name in state}
    check_all_refused(lambda **given: other.load_state_dict(given), state, **ways)
    for wrong in ([], None, 3, "state", {}, {"epoch": 1}, sampler):
        with pytest.raises((ValueError, TypeError), match="state"):
            other.load_state_dict(wrong)
    assert list(other) == first, "a refused state is to change nothing"
    other.load_state_dict(state)
    assert list(other) == list(sampler)[done:]
    check_refused(partial(sampler.set_epoch, -1), -1)
    check_refused(partial(sampler.state_dict, 0.5), 0.5)


@fuzzed
def test_chunked_backbone_and_apinet_take_or_refuse_anything(data):
    images, labels, kind = draw_batch(data, dtypes=DTYPES[2:], kinds=("normal", "ties", "non-finite"))
    dim, classes = data.draw(st.integers(1, 5)), int(labels.long().max()) + 1 if len(labels) else 2
    backbone, chunk_size = nn.Linear(images.shape[1], dim, dtype=images.dtype), data.draw(st.integers(1, 10))
    arguments = {"backbone": backbone, "chunk_size": chunk_size}
    ways = {name: (*WAYS[name], wrong) for name, wrong in (("backbone", "resnet18"), ("chunk_size", None))}
    check_all_refused(api.ChunkedBackbone, arguments, **ways)
    chunked = api.ChunkedBackbone(**arguments)
    arguments["chunk_size"] = one_of(data, [chunk_size, None])
    arguments |= {"num_classes": classes, "dim": dim, "hidden_dim": 3}
    check_all_refused(api.APINet, arguments)
    net = api.APINet(**arguments, dropout=0.0, dtype=images.dtype)
    rates = {"lr": 0.1, "backbone_lr": 0.0, "weight_decay": 0.0}
    check_all_refused(net.parameter_groups, rates)
    assert len(net.parameter_groups(**rates)) == 2
    for wrong in (None, [images], 3, torch.tensor(1.0), {"images": images}):
        check_refused(partial(chunked, wrong), wrong)
    with one_of(data, MODES)():
        expected = torch.cat([backbone(chunk) for chunk in images.split(chunk_size)])
        torch.testing.assert_close(chunked(images), expected, rtol=0, atol=0, equal_nan=True)
        check_all_refused(partial(net, images), {"labels": labels}, labels=WAYS["labels, if any"])
        loss = api.api_loss(net(images, labels))
        assert loss.isfinite() == (kind != "non-finite")
        terms = net(images, labels, criterion=api.APILoss(rows=data.draw(st.integers(1, 9))))
        torch.testing.assert_close(terms.total, loss, equal_nan=True)
    if loss.requires_grad and loss.isfinite():
        gradients = torch.autograd.grad(loss, [*net.parameters()], materialize_grads=True)
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert net.eval()(images).shape == net.to_deploy()(images).shape == (len(images), classes)


@fuzzed
def test_explain_pair_takes_or_refuses_anything(data):
    dtype, top_k = one_of(data, DTYPES[2:]), data.draw(st.integers(1, 4))
    sides = [data.draw(st.integers(1, 7)) for _ in range(2)]
    images = one_of(data, LAYOUTS[:2])(torch.randn(2, 3, *sides, dtype=dtype))
    conv = nn.Conv2d(3, 4, 1, dtype=dtype)
    backbone = Calling(lambda x: conv(x).mean((2, 3)), forward_features=conv, num_features=4)
    net = api.APINet(backbone, 3, hidden_dim=2, dtype=dtype)
    arguments = {"net": net, "images": images, "top_k": top_k}
    with one_of(data, MODES)():
        check_all_refused(api.explain_pair, arguments)
        seen = api.explain_pair(**arguments)
    assert isinstance(seen, api.PairExplanation)
    assert ((seen.gates > 0) & (seen.gates < 1)).all()
    for channels, maps in ((seen.channels, seen.heatmaps), (seen.plain_channels, seen.plain_heatmaps)):
        assert maps.shape == (2, top_k, *sides)
        assert ((maps >= 0) & (maps <= 1)).all()
        assert all(len({*row}) == top_k and {*row} <= {0, 1, 2, 3} for row in channels.tolist())
    assert seen.similarity.abs() <= 1 + 1e-5


# Where nothing is drawn.

HEAD = api.APIHead(8, 3, hidden_dim=4)
X, Y = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1])


def test_features_that_are_all_nan_give_a_loss_that_is():
    # No pair is left; a loss of 0 would hide gradients that aren't finite.
    assert api.api_loss(HEAD(torch.full_like(X, torch.nan), Y)).isnan()
    assert api.api_loss(HEAD(torch.full((2, 8), torch.nan), torch.zeros(2, dtype=torch.long))).isnan()


BACKBONE = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)
OTHER_IMAGES = {"keys": torch.cat([X + 1, X]), "key_labels": torch.cat([Y + 5, Y]), "key_offset": 0}
IN_AUTOCAST = r"float32 or of autocast's dtype, got float16 \[4, 8\].*float32"
OFFSET = "row 0 of keys is query 0, but key_labels has 5 there, and labels 0"
MUTUAL = r"mutual must map two \[P, D\] to \[P, D\], got"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AUTOCAST(HEAD)(X.half(), Y), ValueError, IN_AUTOCAST),
        (lambda: api.APIHead(8, mutual=Calling(lambda a, b: None))(X, Y), ValueError, MUTUAL),
        (lambda: api.APIHead(8, mutual=Calling(lambda a, b: a[:1]))(X, Y), ValueError, MUTUAL),
        (lambda: api.APIHead(8, mutual=Calling(lambda a, b: [a]))(X, Y), ValueError, MUTUAL),
        (lambda: api.APIHead(8, mutual=Calling(lambda a, b: [].pop()))(X, Y), IndexError, "pop from"),  # its own
        (lambda: api.mine_pairs(X, Y, **OTHER_IMAGES), ValueError, OFFSET),
        (lambda: HEAD(X, Y, pairs=(*api.mine_pairs(X, Y),)), TypeError, "pairs must be a Pairs, got tuple"),
        (lambda: HEAD(X, classifier=(BACKBONE,) * 2), TypeError, r"\[N, 8\].*got tuple; of a model with"),
        (lambda: api.ChunkedBackbone([BACKBONE], 4), TypeError, r"got list: nn\.Sequential\(\*backbone"),
        (lambda: api.api_loss((X, X, Y)), TypeError, "APIOutput, got tuple"),
        (lambda: step_memory(BACKBONE, 4.0, 4), TypeError, r"batch_size must be an int, got 4\.0"),
        (lambda: step_memory([BACKBONE], 4, 4), TypeError, "net must be a module, got list"),
        (lambda: step_memory(BACKBONE, 4, 0), ValueError, "image_size must be at least 1, got 0"),
        (lambda: step_memory(BACKBONE, 4, (3, 0, 4)), ValueError, "image_size must be at least 1, got 0"),
        (lambda: pick_chunk_size(BACKBONE, 4, 4, memory=math.nan), ValueError, r"must be in \[0, inf\), got nan"),
        (lambda: api.BalancedBatchSampler([], 2, 1), ValueError, "n_classes=2 classes: labels have 0"),
        (lambda: api.BalancedBatchSampler(Y, 2).state_dict(2), ValueError, r"batches_done must be in \[0, 1\], got 2"),
        (lambda: api.FeatureMemory(9, 8, device="meta").push(X, Y), ValueError, "features and the memory .*cpu"),
    ],
)
def test_wrong_arguments_are_an_error_that_shows_them(call, error, message):
    with pytest.raises(error, match=message):
        call()
