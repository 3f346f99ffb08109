"Labels, batch norm and the heads: what is refused, and what the pages do not show"
import pytest, torch, torch.nn as nn
from torch.testing import assert_close
from sagan.conditioning import (
    AuxiliaryHead, BatchNorm2d, ConditionalBatchNorm2d, ProjectionHead, check_labels, frozen_statistics)


def test_labels_that_do_not_fit_are_refused():
    check_labels(torch.tensor([0, 9]), 10, 2)
    check_labels(None, 0, 2)
    with pytest.raises(ValueError, match='from 0 to 9, got values from 0 to 10'):
        check_labels(torch.tensor([0, 10]), 10, 2)
    with pytest.raises(ValueError, match='needs labels'): check_labels(None, 10, 2)
    with pytest.raises(ValueError, match='takes no labels'): check_labels(torch.tensor([0]), 0, 1)
    with pytest.raises(ValueError, match='must be int64 of shape'):
        check_labels(torch.tensor([0., 1.]), 10, 2)


def test_groups_are_pytorchs_layer_on_each_of_them():
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    x[3:] += 2
    bn, alone = BatchNorm2d(4, group=3), [nn.BatchNorm2d(4) for _ in range(2)]
    assert_close(bn(x), torch.cat([layer(part) for layer, part in zip(alone, x.split(3))]), rtol=0, atol=1e-6)
    for k in ('running_mean', 'running_var'):
        assert_close(getattr(bn, k), (getattr(alone[0], k) + getattr(alone[1], k))/2, rtol=0, atol=1e-6)


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='needs a multiple of them, got 4'):
        BatchNorm2d(4, group=3)(torch.zeros(4, 4, 5, 5))
    with pytest.raises(ValueError, match='group must be .* at least 0, got -2'): BatchNorm2d(4, group=-2)


def test_names_of_parameters_and_states():
    plain, conditional = ConditionalBatchNorm2d(4), ConditionalBatchNorm2d(4, 3)
    assert [n for n, _ in plain.named_parameters()] == ['bn.weight', 'bn.bias']
    states = ['bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked']
    assert list(conditional.state_dict()) == [*states, 'gain.weight', 'bias.weight']


def test_the_start_of_the_tables():
    with pytest.raises(ValueError, match="tables must be 'zeros' or 'xavier', got 'ones'"):
        ConditionalBatchNorm2d(4, 3, tables='ones')
    torch.manual_seed(0)
    start = ConditionalBatchNorm2d(1024, 1000, tables='xavier')
    for table in (start.gain, start.bias): assert .053 < table.weight.abs().max() < (6/2024)**.5


def test_frozen_statistics_do_not_move():
    torch.manual_seed(0)
    cbn, x, y = ConditionalBatchNorm2d(4, 3), torch.randn(6, 4, 5, 5)*3 + 1, torch.tensor([0, 1, 2]*2)
    before = {k: v.clone() for k, v in cbn.state_dict().items()}
    with frozen_statistics(cbn): frozen = cbn(x, y)
    for k, v in cbn.state_dict().items(): assert torch.equal(v, before[k]), k
    assert torch.equal(frozen, cbn(x, y))
    assert not torch.equal(cbn.bn.running_mean, before['bn.running_mean'])


def test_of_two_softmaxes_the_label_sees_one_inner_product():
    "The best score's dependence on the label: log p(y|x)/q(y|x) between two labels is linear in h"
    torch.manual_seed(0)
    a, b, h = torch.randn(3, 8), torch.randn(3, 8), torch.randn(6, 8)
    ratio = (h@a.T).log_softmax(1) - (h@b.T).log_softmax(1)
    assert_close(ratio[:, 0] - ratio[:, 1], h@((a - b)[0] - (a - b)[1]), rtol=0, atol=1e-5)


def test_projection_head_with_and_without_labels():
    torch.manual_seed(0)
    head, h, y = ProjectionHead(8, 3), torch.randn(6, 8), torch.tensor([0, 1, 2]*2)
    assert not torch.equal(head(h, y), head(h, (y+1)%3))  # the label matters
    plain = ProjectionHead(8)
    assert_close(plain(h), h@plain.linear.weight[0] + plain.linear.bias, rtol=0, atol=1e-5)


def test_auxiliary_head_gives_probabilities():
    torch.manual_seed(0)
    head, h = AuxiliaryHead(8, 3), torch.randn(6, 8)
    losses = [head(h, torch.full((6,), c))[1] for c in range(3)]
    assert_close(torch.stack(losses).neg().exp().sum(0), torch.ones(6), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match='at least 2 classes'): AuxiliaryHead(8, 1)
