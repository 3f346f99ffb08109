"The losses at chosen scores, and what the two optimizers hold"
import pytest, torch, torch.nn as nn, torch.nn.functional as F
from torch.testing import assert_close
from sagan.conditioning import ConditionalBatchNorm2d
from sagan.losses import d_acgan_loss, d_hinge_loss, g_acgan_loss, g_hinge_loss, ttur


def test_hinge_losses_of_three_scores():
    real, fake = torch.tensor([2., .5, -1.]), torch.tensor([-2., -.5, 1.])
    assert_close(d_hinge_loss(real, fake), torch.tensor((0 + .5 + 2)/3 + (0 + .5 + 2)/3))
    assert_close(g_hinge_loss(fake), torch.tensor((2 + .5 - 1)/3))


@pytest.mark.parametrize('scale', [.1, 1., 10.])
def test_equal_scores_cost_at_least_2(scale):
    same = scale*torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert d_hinge_loss(same, same) >= 2 - 1e-6


def test_the_generator_of_acgan_against_the_probabilities():
    torch.manual_seed(0)
    fake, logits, y = torch.randn(4), torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    class_loss = F.cross_entropy(logits, y, reduction='none')
    by_hand = -(fake.sigmoid().log().mean() + logits.softmax(1)[range(4), y].log().mean())
    assert_close(g_acgan_loss(fake, class_loss), by_hand, rtol=0, atol=1e-5)


def test_the_generator_of_acgan_does_not_saturate():
    "A fake that D has seen through is pushed; in the literal form it is hardly pushed at all"
    bad = torch.tensor([-6.], requires_grad=True)
    def slope(loss): return torch.autograd.grad(loss, bad)[0].item()
    assert slope(g_acgan_loss(bad, torch.zeros(1))) < -.99
    assert -.01 < slope(-F.softplus(bad).mean()) < 0


def test_acgan_losses_take_class_losses_by_name():
    score, class_loss = torch.zeros(2), torch.ones(2)
    named = d_acgan_loss(score, score, class_loss_real=class_loss, class_loss_fake=2*class_loss)
    assert_close(named, 2*torch.tensor(2.).log() + 3)
    assert_close(g_acgan_loss(score, class_loss_fake=class_loss), torch.tensor(2.).log() + 1)


def test_each_optimizer_holds_its_own_network():
    G, D = nn.Linear(3, 3), nn.Linear(3, 3)
    opt_g, opt_d = ttur(G, D)
    assert [o.defaults['betas'] for o in (opt_g, opt_d)] == [(0., .9)]*2
    of_g, of_d = [{id(p) for g in o.param_groups for p in g['params']} for o in (opt_g, opt_d)]
    assert not of_g & of_d
    assert [[p.shape for p in g['params']] for g in opt_g.param_groups] == [[(3, 3)], [(3,)]]


def test_only_bias_vectors_get_the_rate_of_biases():
    rates = [[g['lr'] for g in o.param_groups] for o in ttur(nn.Linear(3, 3), nn.Linear(3, 3), bias_lr=.5)]
    assert rates == [[1e-4, 5e-5], [4e-4, 2e-4]]
    opt_g, _ = ttur(ConditionalBatchNorm2d(4, 10), nn.Linear(3, 3))
    assert [[p.shape for p in g['params']] for g in opt_g.param_groups] == [[(10, 4), (10, 4)], []]
    half, _ = ttur(ConditionalBatchNorm2d(4, 10), nn.Linear(3, 3), bias_lr=.5)
    assert [g['lr'] for g in half.param_groups] == [1e-4, 5e-5]
