"Batch norm over groups of images and starts of the class tables, in layers, configurations and steps"
import json
from dataclasses import asdict, fields

import pytest, torch, torch.nn as nn, torch.nn.functional as F
import sagan.machinery
from sagan.conditioning import BatchNorm2d, ConditionalBatchNorm2d, frozen_statistics
from sagan.data import digits, image_dls
from sagan.losses import ttur
from sagan.networks import Generator, standing_statistics
from sagan.spectral import spectral_step
from sagan.config import Config, preset, presets
from sagan.training import d_step, g_step, SAGAN, sagan_learner

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def batch(n=6, channels=4):
    "Images whose groups have different means and spreads"
    spread, mean = [torch.linspace(*ends, n)[:, None, None, None] for ends in ((1, 3), (-4, 4))]
    return torch.randn(n, channels, 5, 5)*spread + mean


@pytest.mark.parametrize('group, n', [(2, 6), (3, 6), (6, 6), (1, 3)])
@pytest.mark.parametrize('affine', [True, False])
def test_each_group_is_normalized_as_by_pytorch(group, n, affine):
    "Over two steps: output, gradients of input, weight and bias, and averages, the mean over groups"
    ours = BatchNorm2d(4, group, affine=affine)
    theirs = [nn.BatchNorm2d(4, affine=affine) for _ in range(n//group)]
    shared = [torch.rand(4), torch.randn(4)] if affine else []
    for bn in (ours, *theirs):
        for p, v in zip(bn.parameters(), shared): p.data.copy_(v)
    for _ in range(2):
        x, w = batch(n).requires_grad_(), torch.randn(n, 4, 5, 5)
        out, expected = ours(x), torch.cat([bn(part) for bn, part in zip(theirs, x.split(group))])
        assert torch.allclose(out, expected, atol=1e-5)
        found = torch.autograd.grad((out**2*w).sum(), [x, *ours.parameters()])
        inputs = [x, *[p for bn in theirs for p in bn.parameters()]]
        wanted = torch.autograd.grad((expected**2*w).sum(), inputs)
        assert torch.allclose(found[0], wanted[0], atol=1e-4)
        for i, grad in enumerate(found[1:]):
            assert torch.allclose(grad, sum(wanted[1 + i::2]), rtol=1e-4, atol=1e-3)
    for k in ('running_mean', 'running_var'):
        mean = torch.stack([getattr(bn, k) for bn in theirs]).mean(0)
        assert torch.allclose(getattr(ours, k), mean, rtol=1e-5, atol=1e-6)
    assert ours.num_batches_tracked == 2
    expected = F.batch_norm(x, ours.running_mean, ours.running_var, *ours.parameters())
    assert torch.equal(ours.eval()(x), expected)


def test_without_groups_it_is_pytorchs_to_the_bit():
    x, ours, theirs = batch(), BatchNorm2d(4), nn.BatchNorm2d(4)
    assert torch.equal(ours(x), theirs(x)) and ours.group == 0
    for k, v in theirs.state_dict().items(): assert torch.equal(ours.state_dict()[k], v), k
    # a checkpoint knows nothing of groups
    assert ours.state_dict().keys() == BatchNorm2d(4, 3).state_dict().keys()


def test_groups_in_bfloat16_and_channels_last():
    x, bn = batch().to(memory_format=torch.channels_last), BatchNorm2d(4, 3)
    with torch.autocast('cpu', torch.bfloat16): low = bn(x.bfloat16())
    assert low.dtype == torch.bfloat16 and bn.running_mean.dtype == torch.float32
    exact = bn(x)
    assert torch.allclose(low.float(), exact, atol=.05)
    assert exact.is_contiguous(memory_format=torch.channels_last)


def test_frozen_statistics_of_groups_stay():
    x, cbn = batch(), ConditionalBatchNorm2d(4, 3, group=2)
    y = torch.arange(6) % 3
    before = {k: v.clone() for k, v in cbn.state_dict().items()}
    with frozen_statistics(cbn): frozen = cbn(x, y)
    for k, v in cbn.state_dict().items(): assert torch.equal(v, before[k]), k
    assert torch.equal(cbn(x, y), frozen) and not torch.equal(cbn.bn.running_mean, before['bn.running_mean'])


def test_a_momentum_of_none_is_the_mean_over_all_steps():
    bn, seen = BatchNorm2d(4, 3, momentum=None), []
    for _ in range(3):
        x = batch()
        bn(x)
        seen.append(x.mean((0, 2, 3)))
    assert torch.allclose(bn.running_mean, torch.stack(seen).mean(0), atol=1e-5)


@pytest.mark.parametrize('n_classes', [0, 3])
def test_a_conditional_group_takes_labels_of_its_own_images(n_classes):
    cbn, x = ConditionalBatchNorm2d(4, n_classes, group=3), batch()
    y = torch.arange(6) % 3 if n_classes else None
    for p in cbn.parameters(): nn.init.normal_(p)
    parts = torch.cat([cbn(x[:3], None if y is None else y[:3]), cbn(x[3:], None if y is None else y[3:])])
    assert torch.allclose(cbn(x, y), parts, atol=1e-5)


def test_part_of_a_group_is_refused():
    message = 'groups of 4 images needs a multiple of them, got 6; change bn_group, or set it to 0'
    with pytest.raises(ValueError, match=message): BatchNorm2d(4, 4)(batch())
    BatchNorm2d(4, 4).eval()(batch())                                         # only training knows groups
    cfg = preset('tiny')
    for bad, message in (
            (dict(bn_group=5), 'bn_group must divide the 16 images'),
            (dict(bn_group=-1), 'bn_group must be a whole number'),
            (dict(bn_group=1), 'be at least 2, got 1'),
            (dict(bn_group=16, accumulate=2), 'the 8 images .*a batch of 16, 1 process, accumulate 2'),
            (dict(bn_group=2.), 'whole number'),
            (dict(bn_group=32), 'got 32; 0 makes one group')):
        with pytest.raises(ValueError, match=message): cfg.change(**bad)
    for good in (dict(bn_group=16), dict(bn_group=8, accumulate=2), dict(bn_group=2, accumulate=8)):
        cfg.change(**good)


def test_a_group_lies_within_one_process(monkeypatch):
    monkeypatch.setattr(sagan.machinery, 'world_size', lambda: 2)
    dls = image_dls(digits(), 8, steps=2, world=2)
    assert sagan_learner(dls, 'tiny', bn_group=8).model.cfg.batch == 16
    message = r'the 8 images that go through G at once \(a batch of 16, 2 processes, accumulate 1\)'
    with pytest.raises(ValueError, match=message): sagan_learner(dls, 'tiny', bn_group=16)
    with pytest.raises(ValueError, match=r'the 4 images .* accumulate 2'):
        sagan_learner(dls, 'tiny', bn_group=8, accumulate=2)


def test_the_learner_says_which_batch_a_preset_needs():
    dls = image_dls(digits(), 16, steps=2)
    with pytest.raises(ValueError, match=r'bn_group must divide the 16 images .* got 32'):
        sagan_learner(dls, presets['tiny'].change(batch=32, bn_group=32))


@pytest.mark.parametrize('n_classes', [10, 0])
@pytest.mark.parametrize('group', [0, 4])
def test_with_groups_of_a_part_both_players_see_one_generator(group, n_classes):
    "D's fakes and G's parts are the same images if, and only if, groups divide the parts"
    def run(parts):
        m = SAGAN(presets['tiny'].change(n_classes=n_classes, bn_group=group, accumulate=parts)).train()
        opt_g, opt_d = ttur(m.G, m.D, 0., 0.)
        x, z = torch.zeros(16, 3, 32, 32).uniform_(-1, 1), torch.randn(16, 128)
        y = torch.arange(16) % 10 if n_classes else None
        seen = dict(d=[], g=[])
        steps = dict(d=lambda: d_step(m.G, m.D, opt_d, x, y, z, y, accumulate=parts),
                     g=lambda: g_step(m.G, m.D, opt_g, z, y, accumulate=parts))
        for player, step in steps.items():
            m.G.load_state_dict(m.ema.state_dict())  # both begin with the same vectors of spectral norm
            if player == 'd': spectral_step(m.G)                              # which G's own step moves
            hook = m.G.register_forward_hook(lambda net, given, out: seen[player].append(out.detach()))
            step()
            hook.remove()
        gradient = torch.cat([p.grad.flatten() for p in m.G.parameters()])
        return torch.cat(seen['d']), torch.cat(seen['g']), gradient
    torch.manual_seed(1)
    d_one, g_one, grad_one = run(1)
    torch.manual_seed(1)
    d_four, g_four, grad_four = run(4)
    assert torch.allclose(d_one, g_one, atol=1e-4) and torch.allclose(d_four, d_one, atol=1e-4)
    same = torch.allclose(d_four, g_four, atol=1e-4), (grad_four - grad_one).norm() < 1e-3*grad_one.norm()
    assert same == ((True, True) if group else (False, False))


def test_standing_statistics_take_batches_not_groups():
    G, y = Generator(32, 10, 2, (16,), z_dim=8, bn_group=16), torch.arange(20) % 10
    stand = standing_statistics(G, y, batch=10)
    plain = Generator(32, 10, 2, (16,), z_dim=8)
    plain.load_state_dict(G.state_dict())
    for k, v in standing_statistics(plain, y, batch=10).state_dict().items():
        assert torch.equal(stand.state_dict()[k], v), k
    assert G.bn.group == 16 and stand.bn.num_batches_tracked == 2


def test_every_batch_norm_of_a_model_has_the_group_and_every_table_the_start():
    m = SAGAN(presets['tiny'].change(bn_group=8, class_tables='xavier'))
    groups = [b.group for b in (*m.G.modules(), *m.ema.modules()) if isinstance(b, BatchNorm2d)]
    assert len(groups) == 2*7 and set(groups) == {8}
    def tables_of(G):
        layers = [c for c in G.modules() if isinstance(c, ConditionalBatchNorm2d)]
        return [t.weight for c in layers for t in (c.gain, c.bias)]
    tables = tables_of(m.G)
    assert len(tables) == 12
    for w in tables: assert .8 < w.abs().max()/(6/sum(w.shape))**.5 <= 1
    assert all((w == 0).all() for w in tables_of(SAGAN(presets['tiny']).G))


def test_a_configuration_from_before_the_fields_means_the_same():
    old = {k: v for k, v in asdict(presets['tiny']).items() if k not in ('bn_group', 'class_tables')}
    assert Config().change(**json.loads(json.dumps(old))) == presets['tiny']
    new = {f.name: f.default for f in fields(Config)}
    assert (new['bn_group'], new['class_tables']) == (0, 'zeros')


def test_presets_match_their_sources():
    c, b, o = preset('cifar'), preset('biggan'), preset('official')
    assert (c.lr_g, c.lr_d, c.beta1, c.beta2) == (2e-4, 2e-4, .5, .999)
    assert (c.n_d, c.batch, c.steps) == (5, 64, 500_000)
    assert (c.g_attention, c.d_attention, c.g_width*4, c.d_width*2) == ((16,), (16,), 256, 128)
    assert (c.flip, c.bn_group) == (True, 0)
    assert (b.bn_group, b.class_tables, b.batch, b.beta2) == (32, 'xavier', 256, .999)
    assert (b.ema, b.ema_start) == (.999, 2000)
    assert (o.bn_group, o.class_tables, o.batch) == (64, 'zeros', 256)
    for p in presets.values(): assert not p.bn_group or p.batch % p.bn_group == 0


def test_a_training_with_groups_moves_and_keeps_its_averages_finite():
    learn = sagan_learner(image_dls(digits(), 16, steps=6), 'tiny', bn_group=4, accumulate=2,
                          class_tables='xavier', dtype='float32')
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.model.G.bn.num_batches_tracked == 6
    assert all(v.isfinite().all() for v in learn.model.state_dict().values())


def test_groups_compile_without_a_graph_break():
    G, z, y = Generator(32, 10, 2, (16,), z_dim=8, bn_group=4).train(), torch.randn(8, 8), torch.arange(8)
    assert torch._dynamo.explain(G)(z, y).graph_break_count == 0
