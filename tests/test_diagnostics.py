"Numbers that are not finite are traced to their layer, and no weight moves"
import math, re
import pytest, torch
from sagan.config import preset
from sagan.data import digits, image_dls
from sagan.diagnostics import (
    few_passes, format_passes, idle_attention, NonFinite, rate_travel, signs_of_collapse, SIGNS_WINDOW)
from sagan.losses import ttur
from sagan.networks import Discriminator, Generator
from sagan.training import d_step, g_step


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture(scope='module')
def batch(): return image_dls(digits(), 16).one_batch()                       # (B, 3, 32, 32), (B,)


def nan_in(p): p.data.flatten()[0] = torch.nan


def multiply_gradient(D, factor):
    "Multiply the gradient in front of a convolution"
    def hook(m, grad_in, grad_out): return tuple(g*factor for g in grad_in)
    D.blocks[1].conv1.register_full_backward_hook(hook)


def report_of(spoil, batch, player='D', accumulate=1, head='projection'):
    "The report of a step whose networks are spoiled first; no weight may have moved"
    x, y = batch
    G, D = Generator(32, 10, 2, (16,), z_dim=8), Discriminator(32, 10, 4, (16,), head=head)
    opt_g, opt_d = ttur(G, D, 1e-3, 4e-3)
    z = torch.randn(16, 8)
    spoil(G, D)
    before = [{n: p.detach().clone() for n, p in net.named_parameters()} for net in (G, D)]
    with pytest.raises(NonFinite) as e:
        if player == 'D': d_step(G, D, opt_d, x, y, z, y, accumulate=accumulate)
        else: g_step(G, D, opt_g, z, y, accumulate=accumulate)
    for net, old in zip((G, D), before):
        assert all(torch.equal(p.nan_to_num(), old[n].nan_to_num()) for n, p in net.named_parameters())
    assert all(p.requires_grad for p in D.parameters())
    assert e.value.report['message'] == str(e.value)
    return e.value.report


@pytest.mark.parametrize('accumulate', [1, 4])
@pytest.mark.parametrize('spoil, player, layer', [
    (lambda G, D: nan_in(D.blocks[1].conv1.bias), 'D', 'D.blocks.1.conv1'),
    (lambda G, D: nan_in(G.blocks[1].conv2.bias), 'D', 'G.blocks.1.conv2'),
    (lambda G, D: nan_in(G.blocks[1].conv2.bias), 'G', 'G.blocks.1.conv2'),
    (lambda G, D: nan_in(D.head.linear.bias), 'G', 'D.head.linear'),
    (lambda G, D: nan_in(G.linear.parametrizations.weight.original), 'G', 'G.linear')])
def test_a_weight_is_found_whichever_network_steps(batch, spoil, player, layer, accumulate):
    r = report_of(spoil, batch, player, accumulate)
    assert (r['network'], r['where'], r['layer']) == (player, 'forward', layer)
    assert f"{player}'s step is not finite: first in the output of {layer}" in r['message']


def test_the_bad_weight_comes_first_in_the_report(batch):
    r = report_of(lambda G, D: nan_in(D.head.linear.bias), batch, 'G')
    assert next(iter(r['largest_weights'])) == 'D.head.linear.bias'
    rest = list(r['largest_weights'].values())[1:]
    assert rest == sorted(rest, reverse=True)
    assert r['learning_rates'] == [1e-3, 1e-3]


def test_a_bad_image_is_found(batch):
    x, y = batch
    r = report_of(lambda G, D: None, (x*torch.nan, y))
    assert (r['where'], r['layer']) == ('data', 'the batch of real images')


@pytest.mark.parametrize('head', ['projection', 'auxiliary'])
def test_an_overflow_of_the_backward_pass_is_found(batch, head):
    r = report_of(lambda G, D: multiply_gradient(D, torch.inf), batch, head=head)
    # the layer in front of that convolution
    assert (r['where'], r['layer']) == ('backward', 'D.attention.16')
    norms = r['gradient_norms']
    assert norms['D.head.linear.weight'] < 1e3
    assert not math.isfinite(norms['D.blocks.0.conv1.weight'])


def test_a_gradient_whose_square_overflows_is_found(batch):
    assert report_of(lambda G, D: multiply_gradient(D, 1e25), batch)['where'] == 'backward'


def test_a_loss_that_is_infinite_alone(batch):
    r = report_of(lambda G, D: D.head.linear.bias.data.fill_(3e38), batch)
    assert (r['where'], r['layer']) == ('loss', 'the loss')


def test_the_error_is_an_arithmetic_error_with_a_report():
    e = NonFinite("a number in D's step is not finite", dict(network='D'))
    assert isinstance(e, ArithmeticError) and e.report == dict(message=str(e), network='D')


@pytest.mark.parametrize('lead, expected', [(.049, ['lead']), (-1., ['lead']), (.051, [])])
def test_the_lead_takes_thirty_records(lead, expected):
    "And is not reported beside a dead D"
    window = [dict(d_loss=2., d_real=lead + i%2, d_fake=float(i%2)) for i in range(SIGNS_WINDOW)]
    assert list(signs_of_collapse(1., window)) == expected
    assert signs_of_collapse(1., window[1:]) == {}
    dead = [dict(d_loss=2., d_real=0., d_fake=0.)]*SIGNS_WINDOW
    assert list(signs_of_collapse(1., dead)) == ['difference']


@pytest.mark.parametrize('real, fake, says', [
    (8.74, 39.65, 'D scores generated images higher than real ones'), (.1, .16, 'higher than real ones'),
    (.1, .14, 'D does not tell them apart'), (.14, .1, 'D does not tell them apart')])
def test_a_lead_below_zero_is_not_called_a_tie(real, fake, says):
    sentence = signs_of_collapse(None, [dict(d_loss=2., d_real=real, d_fake=fake)]*SIGNS_WINDOW)['lead']
    assert '--lr-d, and more --steps if the run is finished' in sentence
    assert says in sentence and f'{real:.2f} for real and {fake:.2f} for generated' in sentence


@pytest.mark.parametrize('change, expected', [
    ({}, ['gamma G16', 'gamma D8-2']),
    ({'gamma G16': -.02}, ['gamma D8-2']),
    (dict(step=249), []),
    (dict(lr_g=1e-4), ['gamma D8-2'])], ids=str)
def test_idle_attention(change, expected):
    "Ten records below the bound, after steps in which gamma could have gone from 0 to 0.5"
    idle = {'step': 500, 'lr_g': 1e-3, 'lr_d': 2e-3, 'gamma G16': -.009, 'gamma D8-2': .001} | change
    assert list(idle_attention([idle]*10)) == expected
    assert idle_attention([idle]*9) == {}
    assert 'gamma G16' not in idle_attention([idle]*10, n_d=2)
    assert idle_attention([idle]*9 + [idle | {'gamma G16': .02, 'gamma D8-2': .02}]) == {}


def test_a_run_with_few_steps_of_g_can_show_idle_attention():
    "G's 3,600 steps of 2e-4; and rates of former steps count as they were"
    cfg = preset('photos').change(n_d=5, steps=18_000)
    idle = {'lr_g': cfg.lr_g, 'lr_d': cfg.lr_d, 'gamma G16': .001}
    log = [dict(step=s) | idle for s in range(10, cfg.steps, 10)]
    assert list(idle_attention(log[-10:], cfg.n_d, rate_travel(log))) == ['gamma G16']
    slow = [r | dict(lr_g=r['lr_g']/10) if r['step'] <= 9000 else r for r in log]
    assert idle_attention(slow[-10:], cfg.n_d, rate_travel(slow)) == {}
    assert idle_attention(slow[-10:], cfg.n_d) and rate_travel([dict(step=5, lr_g=None)])['lr_g'] == 0


@pytest.mark.parametrize('images, said', [
    (5761, '28,800 images, 5.0 passes over the 5,761'),
    (28_801, '28,800 images, 1.00 of one pass'), (50_000, '0.58 of one pass over the 50,000 (bound 5)')])
def test_few_passes(images, said):
    "The steps that it names are enough, and one less is not"
    sign = few_passes(images, 1800, 16)
    assert said in sign['passes']
    enough = int(re.search(r'--steps (\d+) makes', sign['passes'])[1])
    assert few_passes(images, enough, 16) == {} and few_passes(images, enough - 1, 16)


def test_passes_are_shown_without_exponents():
    texts = '0', 'under 0.001', '0.58', '99.6', '12,800'
    assert tuple(map(format_passes, (0, 2e-5, .58, 99.6, 12_800.))) == texts
