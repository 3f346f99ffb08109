"Agreement of twins: cases and errors that page 35 does not hold"
import pytest, torch, torch.nn as nn
from sagan.agreement import agreement, agreement_auc, twin_scores
from sagan.data import to_unit, twin_colours, twins
from sagan.networks import Discriminator


def colors(n, p, seed):
    "Color pairs (n, 2) whose parts are drawn with the probabilities p (6,)"
    g = torch.Generator().manual_seed(seed)
    return torch.multinomial(p, 2*n, True, generator=g).view(n, 2)


def test_images_without_twins_are_left_out():
    "Both twins or none, by chance: that is no agreement"
    n, red = 4000, torch.tensor([.6, .2, .05, .05, .05, .05])
    drawn = torch.stack([colors(n, red, 2), colors(n, red, 3)], 1)
    blank = torch.rand(n, generator=torch.Generator().manual_seed(7)) < .5
    a = agreement(torch.where(blank[:, None, None], -1, drawn), torch.arange(n) % 4)
    assert a.kappa == pytest.approx(0, abs=3*a.kappa_error)


def test_luck_takes_two_images():
    with pytest.raises(ValueError, match='two images of one class'):
        agreement(torch.zeros(1, 2, 2, dtype=torch.int64), torch.tensor([0]))


def test_broken_discriminators():
    "An error leaves the mode as it was"
    D = Discriminator(32, 4, 4, ())
    D.head.linear.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match='not finite'): agreement_auc(D, n=10)
    assert D.training
    with pytest.raises(ValueError, match='at least 2'): agreement_auc(D, n=1)


class Compares(nn.Module):
    "A discriminator that knows the rule, and has no attention"
    def forward(self, x, y=None):
        left, right = twin_colours(x).unbind(1)
        return (left == right).all(1).float()


def test_scores_of_twins():
    real = twins(60)
    c = twin_colours(to_unit(real.x))
    scores = twin_scores(c, real.y, Compares(), 'twins', 32)
    assert scores['d_auc'] == agreement_auc(Compares())[0] and scores['kappa'] == 1
    assert 'd_auc_gamma0' not in scores                           # it has no gamma
    assert 'd_auc' not in twin_scores(c, real.y, None, 'twins', 32)
    assert 'd_auc_gamma0' in twin_scores(c, real.y, Discriminator(32, 4, 4, (16,)).eval(), 'twins', 32)
