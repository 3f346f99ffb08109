"The steps, the model, the callback and the learner: what page 06 does not need to show"
import pickle
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch, torch.nn as nn
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import LRFinder, ParamScheduler, SchedCos
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image
from sagan.config import Config, presets, systems
from sagan.data import digits, image_dls
from sagan.losses import ttur
from sagan.machinery import TrainingFigures
from sagan.networks import Discriminator, generate, Generator
from sagan.spectral import spectral_step
from sagan.training import (
    check_images, check_networks, d_step, draw_inputs, ema_update, frozen_weights, g_step, SAGAN,
    sagan_learner, SAGANTrainer, score_together, split_batch, TwoOptimizers)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture(scope='module')
def batch(): return image_dls(digits(), 16).one_batch()                       # (B, 3, 32, 32), (B,)


def tiny_pair(n_classes=10, seed=0, **kw):
    torch.manual_seed(seed)
    G, D = Generator(32, n_classes, 2, (16,), z_dim=8), Discriminator(32, n_classes, 4, (16,), **kw)
    return G, D, *ttur(G, D, 1e-3, 4e-3)


def tiny_learner(seed=0, n_classes=10, **kw):
    images = digits()
    if not n_classes: images.classes = []
    dls = image_dls(images, 16, steps=6, seed=seed)
    return sagan_learner(dls, seed=seed, g_width=2, d_width=4, z_dim=8, **kw)


def fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


def state(net): return {k: v.clone() for k, v in net.state_dict().items()}


def changed(net, before):
    return sorted(k for k, v in net.state_dict().items() if not torch.equal(v, before[k]))


# One step of each player

def test_split_batch():
    (a, none), (b, _) = split_batch(2, torch.arange(4), None)
    assert a.tolist() == [0, 1] and b.tolist() == [2, 3] and none is None
    with pytest.raises(ValueError, match='a batch of 16 cannot be split into 3 equal parts'):
        split_batch(3, torch.zeros(16))


@pytest.mark.parametrize('head, n', [('projection', 2), ('auxiliary', 4)])
def test_real_and_generated_images_are_scored_together(batch, head, n):
    (x, y), (_, D, *_) = batch, tiny_pair(head=head)
    out = score_together(D, x, x[:4], y, y[:4])
    assert [len(s) for s in out] == [16, 4]*(n//2)
    for a, b in zip(out[::2], out[1::2]): assert torch.allclose(a[:4], b, rtol=1e-4, atol=1e-4)


def test_frozen_weights_learn_again_after_an_error():
    _, D, *_ = tiny_pair()
    D.head.linear.bias.requires_grad_(False)
    with pytest.raises(KeyError), frozen_weights(D):
        assert not any(p.requires_grad for p in D.parameters())
        raise KeyError
    assert [n for n, p in D.named_parameters() if not p.requires_grad] == ['head.linear.bias']


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_step_leaves_the_other_player_as_it_is(batch, accumulate):
    "Weights, vectors of spectral norm, batch norm averages and gradients"
    (x, y), (G, D, opt_g, opt_d), z = batch, tiny_pair(), torch.randn(16, 8)
    g, d = state(G), state(D)
    d_step(G, D, opt_d, x, y, z, y, accumulate=accumulate)
    assert changed(G, g) == [] and changed(D, d)
    assert all(p.grad is None for p in G.parameters())
    assert G.bn.num_batches_tracked == 0  # D's step records nothing in G
    d, grads = state(D), [p.grad.clone() for p in D.parameters()]
    g_step(G, D, opt_g, z, y, accumulate=accumulate)
    assert changed(D, d) == [] and changed(G, g)
    for p, b in zip(D.parameters(), grads): assert torch.equal(p.grad, b)
    assert all(p.requires_grad for p in D.parameters())


class ConvolutionBackward(TorchDispatchMode):
    "Notes of which of input, weight and bias each convolution computes the gradient"
    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.convolution_backward.default: self.masks.append(list(args[-1]))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize('changes', [{}, dict(head='auxiliary')])
def test_no_gradient_of_d_is_thrown_away(batch, changes, monkeypatch):
    "In G's step the convolutions of D compute the gradient of their input alone"
    (_, y), (_, D, *_) = batch, tiny_pair(**changes)
    G = nn.Bilinear(8, 10, 3*32*32)                                           # no convolutions
    def draw(z, y): return nn.Bilinear.forward(G, z, y).view(-1, 3, 32, 32).tanh()
    G.forward = lambda z, y: draw(z, nn.functional.one_hot(y, 10).float())
    opt, z = torch.optim.SGD(G.parameters(), 0.), torch.randn(16, 8)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in D.modules())
    with ConvolutionBackward() as seen: g_step(G, D, opt, z, y)
    assert seen.masks == [[True, False, False]]*convolutions
    monkeypatch.setattr('sagan.training.frozen_weights', nullcontext)         # the check can fail
    with ConvolutionBackward() as seen: g_step(G, D, opt, z, y)
    assert [True, True, True] in seen.masks


@pytest.mark.parametrize('n_classes', [10, 0])
def test_a_batch_in_parts(batch, n_classes):
    "The parts change nothing but rounding in D; one power iteration and one recording, however many parts"
    x, y = batch
    labels, z, steps = y if n_classes else None, torch.randn(16, 8), {}
    for parts in (1, 2, 4):
        G, D, opt_g, opt_d = tiny_pair(n_classes)
        scores = {}
        d_loss = d_step(G, D, opt_d, x, labels, z, labels, scores, accumulate=parts)
        grads = torch.cat([p.grad.flatten() for p in D.parameters()])         # (parameters of D,)
        g_step(G, D, opt_g, z, labels, accumulate=parts)
        steps[parts] = dict(d_loss=d_loss, grads=grads, **scores), state(G)
        once = {k for k in state(G) if k.endswith(('.u', '.v', 'num_batches_tracked'))}
        for k in once: assert torch.allclose(state(G)[k].float(), steps[1][1][k].float(), atol=1e-6), k
    assert scores.keys() == {'d_real', 'd_fake'}
    for parts in (2, 4):
        for k, v in steps[1][0].items():
            assert torch.allclose(steps[parts][0][k], v, rtol=1e-5, atol=1e-5), (parts, k)
    assert {steps[4][1][k].item() for k in once if k.endswith('tracked')} == {1}
    with pytest.raises(ValueError, match='a batch of 16 cannot be split into 3 equal parts'):
        d_step(G, D, opt_d, x, labels, z, labels, accumulate=3)


def test_acgan_by_hand(batch):
    "What each step feeds to its optimiser is the gradient of the loss that the page about losses derives"
    (x, y), z = batch, torch.randn(16, 8)
    G, D = Generator(32, 10, 2, (), z_dim=8), Discriminator(32, 10, 4, (), head='auxiliary')
    G_before, G2, D2 = deepcopy(G), deepcopy(G), deepcopy(D)
    d_step(G, D, torch.optim.SGD(D.parameters(), 0.), x, y, z, y)
    g_step(G, D, torch.optim.SGD(G.parameters(), 0.), z, y)
    spectral_step(D2)
    spectral_step(G2)
    with torch.no_grad(): fake = G_before(z, y)  # D's step came before G's power iteration
    (s, c), (s_fake, c_fake) = D2(x, y), D2(fake, y)                          # (B,) each
    d_loss = -s.sigmoid().log().mean() - (1 - s_fake.sigmoid()).log().mean() + c.mean() + c_fake.mean()
    s_fake, c_fake = D2(G2(z, y), y)
    g_loss = -s_fake.sigmoid().log().mean() + c_fake.mean()
    for net, net2, loss in ((D, D2, d_loss), (G, G2, g_loss)):
        expected = torch.autograd.grad(loss, list(net2.parameters()), retain_graph=True)
        for p, g in zip(net.parameters(), expected): assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5)


def test_one_power_iteration_per_step(batch):
    "However many forward passes a step has"
    (x, y), (G, D, opt_g, opt_d) = batch, tiny_pair()
    by_hand = deepcopy(D).train()
    spectral_step(by_hand)
    d_step(G, D, opt_d, x, y, torch.randn(16, 8), y)
    vectors = [k for k in D.state_dict() if k.endswith(('.u', '.v'))]
    assert vectors
    for k in vectors: assert torch.equal(D.state_dict()[k], by_hand.state_dict()[k])


# The average and the model

def test_ema_averages_weights_and_copies_unit_vectors():
    a, b = tiny_pair(seed=0)[0], tiny_pair(seed=1)[0]
    before, new = state(a), state(b)
    ema_update(a, b, .9)
    for k, v in a.state_dict().items():
        copied = k.endswith(('.u', '.v', 'num_batches_tracked'))
        # not the other way round
        expected = new[k] if copied else .9*before[k] + .1*new[k]
        assert torch.allclose(v.float(), expected.float(), atol=1e-6), k


def test_model_of_a_configuration():
    cfg = presets['small'].change(g_width=2, d_width=4, z_dim=8, batch=16)
    a, b = SAGAN(cfg), SAGAN(cfg)
    assert changed(a, state(b)) == []  # the seed decides the weights
    assert changed(a, state(SAGAN(cfg.change(seed=1)))) and not a.train().ema.training
    with pytest.raises(ValueError, match='it has 8, 16, 32'): SAGAN(cfg.change(g_attention=(64,)))
    half = SAGAN(cfg.change(d_width=()))
    assert (half.D, half.train().ema.training) == (None, False)
    assert SAGAN(cfg.change(g_width=())).ema is None


def test_a_network_stays_in_its_mode_when_it_is_checked():
    G, D, *_ = tiny_pair()
    cfg = presets['tiny'].change(z_dim=8)
    check_networks(G.train(), D.eval(), cfg)
    assert G.training and not D.training
    with pytest.raises(ValueError, match='must have the attribute z_dim = 9'):
        check_networks(G, D, cfg.change(z_dim=9))


# The callback

def test_two_optimizers_keep_what_adam_remembers(batch):
    (x, y), (G, D, *opts), z = batch, tiny_pair(), torch.randn(16, 8)
    both = TwoOptimizers(*opts)
    d_step(G, D, both.opt_d, x, y, z, y)
    g_step(G, D, both.opt_g, z, y)
    again = TwoOptimizers(*ttur(G, D))
    again.load_state_dict(both.state_dict())
    for a, b in zip(both.opt_d.state.values(), again.opt_d.state.values()):
        assert torch.equal(a['exp_avg_sq'], b['exp_avg_sq'])
    assert [g['lr'] for g in again.param_groups] == [1e-3, 1e-3, 4e-3, 4e-3]


def test_names_of_the_figures():
    G, D, *_ = tiny_pair()
    numbers = TrainingFigures(Config())
    numbers.learn = SimpleNamespace(model=SimpleNamespace(G=G, D=D))
    assert list(numbers.figures()) == ['step', 'd_loss', 'g_loss', 'gamma G16', 'gamma D16', 'images_per_s']


def test_images_are_checked(batch):
    x, _ = batch
    check_images(x)
    shape = r'a batch of images must have shape \(B, 3, S, S\), got \(16, 1, 32, 32\)'
    with pytest.raises(ValueError, match=shape): check_images(x[:, :1])
    with pytest.raises(ValueError, match='got values from 0 to 1'): check_images((x + 1)/2)
    with pytest.raises(ValueError, match='got values from nan to nan'): check_images(x*torch.nan)


def test_drawn_inputs():
    "Normal latents, and labels as frequent as in the batch"
    rng, rare = torch.Generator().manual_seed(0), torch.tensor([7, 7, 7, 2]).repeat(500)
    z, y = draw_inputs(rare, Config(), rng)
    assert (z.shape, y.shape) == ((2000, 128), (2000,))
    assert abs(z.mean()) < .01 and abs(z.std() - 1) < .01
    assert set(y.tolist()) == {7, 2} and .22 < (y == 2).float().mean() < .28
    assert draw_inputs(rare, Config(n_classes=0), rng)[1] is None


# The learner

def test_a_fixed_seed_gives_the_same_weights_twice():
    a, b, c = [state(fit(tiny_learner(seed)).model) for seed in (0, 0, 1)]
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert not torch.equal(a['G.linear.bias'], c['G.linear.bias'])


def test_the_recorder_has_each_step():
    learn = fit(tiny_learner(), 2)
    assert (len(learn.recorder.losses), learn.sagan_trainer.step) == (12, 12)


@pytest.mark.parametrize('name', systems(presets['tiny']))
def test_every_system_of_the_paper_trains(name):
    cfg = systems(presets['tiny'].change(z_dim=8))[name]
    learn = sagan_learner(image_dls(digits(), 8, steps=2*cfg.n_d), cfg)
    before = state(learn.model)
    fit(learn)
    assert all(np.isfinite(v) for v in learn.sagan_trainer.figures().values())
    # both networks and the average have moved
    assert {k[0] for k in changed(learn.model, before)} == {'G', 'D', 'e'}


def test_fewer_steps_of_the_generator():
    learn = fit(tiny_learner(n_d=3))
    def steps(opt): return {int(s['step']) for s in opt.state.values()}
    both = learn.opt.opt
    assert (steps(both.opt_d), steps(both.opt_g)) == ({6}, {2})


class LogRates(Callback):
    "Notes the learning rate of each group"
    order, run_valid = SAGANTrainer.order + 1, False
    def __init__(self, seen): self.seen = seen
    def after_batch(self): self.seen.append([h['lr'] for h in self.opt.hypers])


def test_fastais_callbacks_and_schedules_work(tmp_path):
    "A cosine schedule takes every group from its own rate to zero, so that the ratios of the rates stay"
    def squares(learn):
        "Adam's v"
        opts = learn.opt.opt.opt_g, learn.opt.opt.opt_d
        return torch.cat([s['exp_avg_sq'].flatten() for o in opts for s in o.state.values()])
    learn, seen = tiny_learner(), []
    learn.path, rates = Path(tmp_path), np.array(learn.lr)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=[CSVLogger(), ParamScheduler({'lr': SchedCos(rates, 0*rates)}), LogRates(seen)])
    lines = (tmp_path/'history.csv').read_text(encoding='utf-8').splitlines()
    assert len(lines) == 3 and lines[0] == 'epoch,train_loss,g_loss,images_per_s,time'
    assert np.allclose(seen[0], rates, atol=1e-5)
    assert seen[-1][0] < .1*rates[0]
    assert np.allclose(np.array(seen[-1])/rates, seen[-1][0]/rates[0], atol=1e-5)
    learn.save('both')
    before = state(learn.model), squares(learn)
    fit(learn)
    assert changed(learn.model, before[0]) and not torch.equal(squares(learn), before[1])
    learn.load('both')
    assert changed(learn.model, before[0]) == []
    assert torch.equal(squares(learn), before[1])  # fastai's save and load, optimisers included


def test_a_model_cannot_be_pickled():
    "Which is what `learn.export` would have to do"
    with pytest.raises(RuntimeError, match='only supported through state_dict'):
        pickle.dumps(tiny_learner().model)


def test_fastais_methods_that_a_gan_does_not_have(tmp_path, batch):
    "Each says so and names what to use; nothing is written, and the training goes on as if none was called"
    learn, other = tiny_learner(), tiny_learner()
    learn.path = Path(tmp_path)
    for call, instead in (
            (lambda: learn.predict(batch[0][0]), 'generate'), (learn.get_preds, 'evaluation'),
            (learn.validate, 'evaluation'), (learn.tta, 'generate'), (learn.export, 'learn.save'),
            (lambda: learn.get_preds(dl=learn.dls.train), 'generate'), (learn.freeze, 'learn.fit'),
            (lambda: learn.freeze_to(-2), 'learn.fit'), (lambda: learn.fine_tune(1), 'learn.fit'),
            (learn.summary, 'print')):
        with pytest.raises(ValueError, match=f'makes no sense for a GAN; .*{instead}'): call()
    learn.unfreeze()
    assert not list(tmp_path.iterdir())
    assert changed(fit(learn).model, state(fit(other).model)) == []


def test_a_trial_of_rates_leaves_no_trace(tmp_path):
    "Weights, optimisers, counts, chance and the loader's order; also when it ends with infinite numbers"
    learn, other = [tiny_learner(ema_start=1) for _ in range(2)]
    learn.path = Path(tmp_path)
    def find(): learn.lr_find(num_it=9, show_plot=False)
    def diverge(): learn.fit(1, cbs=LRFinder(1e-3, 1e30, 6, stop_div=False))
    for trial in (find, diverge):
        fit(learn)
        fit(other)
        before = learn.sagan_trainer.figures()
        with learn.no_bar(), learn.no_logging(): trial()
        after = learn.sagan_trainer.figures()
        assert before.pop('images_per_s') and after.pop('images_per_s') and after == before
        assert changed(learn.model, state(other.model)) == []
    assert changed(fit(learn).model, state(fit(other).model)) == []
    assert learn.sagan_trainer.step == other.sagan_trainer.step == 18


@pytest.mark.parametrize('how', ['fit_one_cycle', 'fit_flat_cos', 'fit_sgdr'])
def test_fastais_ways_to_fit_work(how):
    learn = tiny_learner()
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(*dict(fit_sgdr=(1, 1)).get(how, (1,)))
    assert learn.sagan_trainer.step == 6


def test_other_peoples_loaders(batch, tmp_path):
    "fastai's `ImageDataLoaders`, and PyTorch's `DataLoader` with a torchvision data set"
    for i, (im, c) in enumerate(zip(*batch)):
        file = tmp_path/str(c.item())/f'{i}.png'
        file.parent.mkdir(exist_ok=True)
        save_image(im*.5 + .5, file)
    half = [.5]*3
    fastais = ImageDataLoaders.from_folder(
        tmp_path, valid_pct=.1, seed=0, bs=4, num_workers=0, item_tfms=Resize(32),
        batch_tfms=Normalize.from_stats(half, half))
    to_unit = transforms.Compose([transforms.ToTensor(), transforms.Normalize(half, half)])
    data = ImageFolder(tmp_path, to_unit)
    torchs = DataLoaders(DataLoader(data, 4, drop_last=True), device='cpu')
    for dls, n in ((fastais, len(fastais.vocab)), (torchs, len(data.classes))):
        learn = fit(sagan_learner(dls, n_classes=n, g_width=2, d_width=4, z_dim=8))
        assert (learn.sagan_trainer.step, learn.model.cfg.n_classes) == (len(dls.train), n)


def test_without_labels():
    learn = fit(tiny_learner(n_classes=0))
    assert (learn.model.cfg.n_classes, learn.model.D.head.embed) == (0, None)
    assert generate(learn.model.ema, n=2).shape == (2, 3, 32, 32)


def test_a_configuration_takes_over_what_the_data_decide():
    cfg = sagan_learner(image_dls(digits(), 16, steps=6), 'paper', g_width=2, d_width=4).model.cfg
    found = cfg.size, cfg.n_classes, cfg.batch, cfg.steps, cfg.data, cfg.flip
    assert found == (32, 10, 16, 6, 'digits', False)


class OneBatch:
    "A loader of one batch"
    def __init__(self, x, y=0): self.dataset, self.y = [x], torch.full((16,), y)
    def __iter__(self): yield self.dataset[0], self.y
    def __len__(self): return 1


def test_a_batch_that_does_not_fit_is_rejected(batch):
    def train(x, y=0):
        dls = DataLoaders(OneBatch(x, y), device='cpu')
        fit(sagan_learner(dls, n_classes=10, g_width=2, d_width=4))
    with pytest.raises(ValueError, match=r'images must be in \[-1, 1\], got values from 0 to 255'):
        train(torch.randint(256, (16, 3, 32, 32)).float())
    with pytest.raises(ValueError, match='got values from 0 to 1'):
        train(torch.arange(16*3*32*32).view(16, 3, 32, 32)/49151)
    with pytest.raises(ValueError, match='labels must be from 0 to 9, got values from 11 to 11'):
        train(batch[0], 11)


def test_a_configuration_that_does_not_fit_is_rejected():
    dls = image_dls(digits(), 16)
    with pytest.raises(ValueError, match="there is no preset 'huge'; did you mean one of paper, official"):
        sagan_learner(dls, 'huge')
    with pytest.raises(ValueError, match='did you mean'): sagan_learner(dls, learning_rate=1.)
    with pytest.raises(ValueError, match='it has 8, 16'): sagan_learner(dls, d_attention=(32,))
    with pytest.raises(ValueError, match='has no generator; give it a width'):
        sagan_learner(dls, presets['small'].change(g_width=()))


def test_a_loader_of_another_process_is_rejected():
    with pytest.raises(ValueError, match='this is process 0 of 1, but its loader is for process 1 of 2'):
        sagan_learner(image_dls(digits(), 16, rank=1, world=2))
