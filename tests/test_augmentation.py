"DiffAugment: what it does to pixels and gradients, chance that is part of the state, and a training with it"
from functools import partial

import pytest, torch
from sagan import augmentation
from sagan.augmentation import AUGMENTATIONS, check_diffaug, diff_augment
from sagan.config import preset
from sagan.data import digits, image_dls
from sagan.losses import ttur
from sagan.networks import Discriminator, Generator
from sagan.recording import RunWriter, fit_run, resume
from sagan.checkpoints import create_run, load_weights
from sagan.training import d_step, g_step, sagan_learner

ALL = 'color,translation,cutout'


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def images(n=6, h=16, w=24):
    return torch.rand(n, 3, h, w, dtype=torch.float64, generator=seeded(1))*2 - 1


@pytest.mark.parametrize('names', [*AUGMENTATIONS, ALL, 'cutout,color'])
def test_gradient_equals_finite_differences(names):
    x = images(2, 8, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: diff_augment(t, names, seeded()), x)


@pytest.mark.parametrize('names', [*AUGMENTATIONS, ALL])
def test_the_change_depends_on_chance_alone(names):
    "Real and generated images are changed alike: for the same draw every change is affine in the pixels"
    a, b = images(), images().flip(0)*.5
    change = partial(diff_augment, names=names)
    zero = change(torch.zeros_like(a), rng=seeded())
    both = change((a + b)/2, rng=seeded())
    assert torch.allclose(both, (change(a, rng=seeded()) + change(b, rng=seeded()))/2)
    assert torch.allclose(change(a, rng=seeded()) - zero, 2*(change(a/2, rng=seeded()) - zero))
    assert not torch.equal(change(a, rng=seeded(1)), change(a, rng=seeded(2)))


def test_color_keeps_its_bounds():
    x = images(400, 4, 4)
    y = diff_augment(x, 'color', seeded())
    brightness = y.mean((1, 2, 3)) - x.mean((1, 2, 3))  # saturation and contrast keep the mean
    assert -.5 <= brightness.min() < -.4 and .4 < brightness.max() < .5
    gray = lambda t: t.mean(1) - t.mean((1, 2, 3), keepdim=True)[:, 0]
    contrast = (gray(y).std((1, 2))/gray(x).std((1, 2)))
    assert .5 <= contrast.min() < .55 and 1.45 < contrast.max() < 1.5
    hue = lambda t: t - t.mean(1, keepdim=True)
    saturation = hue(y).std((1, 2, 3))/hue(x).std((1, 2, 3))/contrast
    assert 0 <= saturation.min() < .1 and 1.9 < saturation.max() < 2


def test_translation_moves_by_whole_pixels_up_to_an_eighth():
    "Every image is a shifted copy of itself; shifts reach both ends, and nothing beyond"
    x = images(300)
    y = diff_augment(x, 'translation', seeded())
    found = []
    for a, b in zip(x, y):
        padded = torch.nn.functional.pad(a, (3, 3, 2, 2))
        at = [(r, c) for r in range(5) for c in range(7) if torch.equal(padded[:, r:r+16, c:c+24], b)]
        assert len(at) == 1
        found += at
    assert {r for r, c in found} == set(range(5)) and {c for r, c in found} == set(range(7))


def test_cutout_is_one_gray_rectangle_of_half_the_sides():
    x = images(200)
    gone = (diff_augment(x, 'cutout', seeded()) == 0).all(1)  # (n, 16, 24)
    heights, widths = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(gone.sum((1, 2)), heights*widths)  # a rectangle
    assert heights.max() == 8 and widths.max() == 12 and heights.min() >= 4 and widths.min() >= 6
    assert gone.any(0).all()  # every place may be covered


def test_processes_share_one_draw(monkeypatch):
    x = images(8)
    whole = diff_augment(x, ALL, seeded())
    for rank in range(2):
        monkeypatch.setattr(augmentation, 'world_size', lambda: 2)
        monkeypatch.setattr(augmentation, 'shard', lambda n: slice(rank*n//2, (rank + 1)*n//2))
        assert torch.equal(diff_augment(x[4*rank:4*rank + 4], ALL, seeded()), whole[4*rank:4*rank + 4])


@pytest.mark.parametrize('names', ['colour', 'color,', 'color,color', 'color translation', None, 3])
def test_unknown_kinds_are_refused(names):
    kinds = "color, translation, cutout, each at most once, or '' for none"
    with pytest.raises(ValueError, match=kinds): check_diffaug(names)
    with pytest.raises(ValueError, match='color, translation, cutout'): preset('tiny').change(diffaug=names)


def test_a_training_goes_on_to_the_same_bits(tmp_path):
    cfg = preset('tiny').change(batch=4, diffaug=ALL)
    def train(name, *steps):
        for i, n in enumerate(steps):
            learn = sagan_learner(image_dls(digits(), 4, n), cfg)
            if i: resume(tmp_path/name, learn)
            else: create_run(tmp_path/name, learn.model.cfg, learn.dls.vocab)
            learn.add_cb(RunWriter(tmp_path/name))
            with learn.no_bar(), learn.no_logging(): fit_run(learn)
        return load_weights(tmp_path/name/'weights.safetensors')[0].state_dict()
    whole, halves = train('whole', 6), train('halves', 3, 6)
    assert all(torch.equal(v, halves[k]) for k, v in whole.items())
    cfg = cfg.change(diffaug='')
    assert not all(torch.equal(v, whole[k]) for k, v in train('without', 6).items())


def test_both_steps_change_what_d_sees():
    "D's step changes real and generated images, G's step its own, with a gradient that reaches G"
    torch.manual_seed(0)
    G, D = Generator(32, 10, 2, (16,), z_dim=8), Discriminator(32, 10, 4, (16,))
    opt_g, opt_d = ttur(G, D, 1e-3, 4e-3)
    x, y, z, changed, seen = torch.rand(4, 3, 32, 32)*2 - 1, torch.arange(4), torch.randn(4, 8), [], []
    def augment(images):
        changed.append(images.detach().clone())
        return images*.5
    D.blocks[0].register_forward_pre_hook(lambda net, args: seen.append(args[0].detach().clone()))
    d_step(G, D, opt_d, x, y, z, y, augment=augment)
    real, fake = changed
    assert torch.equal(real, x) and not torch.equal(fake, x)
    assert torch.equal(torch.cat(seen), torch.cat([real, fake])*.5)  # and D sees nothing else
    changed.clear()
    seen.clear()
    g_step(G, D, opt_g, z, y, augment=augment)
    own, = changed
    assert own.shape == x.shape and torch.equal(torch.cat(seen), own*.5)
    assert all(p.grad.norm() > 0 for p in G.blocks[0].conv1.parameters())
