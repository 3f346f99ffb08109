"Inputs that do not fit are one sentence, from every public function, before anything is computed"
import math, re

import matplotlib.pyplot as plt, pytest, torch
from sagan.agreement import agreement, agreement_auc
from sagan.attention import attend, attention_maps, attention_weights, intervene, SelfAttention
from sagan.conditioning import AuxiliaryHead, BatchNorm2d, ConditionalBatchNorm2d, ProjectionHead
from sagan.config import preset
from sagan.curves import training_figure
from sagan.data import digits, image_dls
from sagan.distributed import shard
from sagan.evaluation import (
    inception_score, intra_frechet_distance, kernel_distance, nearest_images, precision_recall)
from sagan.losses import d_acgan_loss, d_hinge_loss, g_acgan_loss, g_hinge_loss, ttur
from sagan.networks import (
    DBlock, Discriminator, GBlock, generate, Generator, ResidualBlock, standing_statistics)
from sagan.references import as_images, kept_indices, train_evaluator
from sagan.spectral import power_iteration
from sagan.statistics import map_statistics, statistics_figure
from sagan.training import (
    check_images, check_networks, d_step, ema_update, g_step, SAGAN, sagan_learner, split_batch)
from sagan.visualization import attention_figure, effect_figure, grid_image, spread_points

torch.manual_seed(0)
G, D = Generator(32, 10, 2, (16,), z_dim=8).eval(), Discriminator(32, 10, 4, (16,)).eval()
U = Generator(32, 0, 2, (), z_dim=8).eval()  # unconditional
z, y, x = torch.randn(4, 8), torch.arange(4), 2*torch.rand(4, 3, 32, 32) - 1
_, (m,) = attention_maps(G, z, y)
h, rows = torch.randn(2, 16, 8, 8), torch.randn(2, 16)
layer, cbn = SelfAttention(16), ConditionalBatchNorm2d(16, 3)
projection, auxiliary = ProjectionHead(16, 3), AuxiliaryHead(16, 3)
two = torch.tensor([0, 1])
q, k, v = torch.randn(2, 6, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 3)
f, none = torch.randn(20, 8), torch.zeros(20, dtype=torch.int64)
opts = ttur(G, D)
images = digits()[:12]
colours = torch.zeros(4, 2, 2, dtype=torch.int64)
nan = math.nan
COUNT, LABELS, FLOAT = 'must be a whole number', 'labels must be int64 of shape', 'must be float32, got'

REFUSED = {
    # shapes and dtypes of features
    r'k must have shape \(2, Nk, 4\), got': [
        lambda: attention_weights(q, k[..., :2]), lambda: attention_weights(q, k[:1]),
        lambda: attend(q, k[0], v)],
    r'v must have shape \(2, 5, Dv\), got': [lambda: attend(q, k, v[:, :2]), lambda: attend(q, k, v[:1])],
    r'x must have shape \(B, 16, H, W\), got': [
        lambda: layer(h[:, :8]), lambda: layer(h[0]), lambda: layer(h.tolist()), lambda: cbn(h[0], two),
        lambda: ResidualBlock(16)(h[:, :8]), lambda: DBlock(16, 4)(h[:, :8]),
        lambda: GBlock(16, 4)(h[:, :8])],
    'pools keys over 2x2 locations .* got 1x1': [lambda: SelfAttention(16, 'released')(h[:, :, :1, :1])],
    r'z must have shape \(B, 8\), got': [
        lambda: G(z[:, :3], y), lambda: G(z[0], y), lambda: G(None, y),
        lambda: d_step(G, D, opts[1], x, y, x, y)],
    r'x must have shape \(B, 3, 32, 32\), got': [
        lambda: D(x[..., :16], y), lambda: D(x[:, :, :16], y), lambda: D(x[:, :1], y),
        lambda: D(x.numpy(), y)],
    r'h must have shape \(B, 16\), got': [lambda: projection(rows[:, :3], two), lambda: auxiliary(h, two)],
    FLOAT: [
        lambda: layer(h.double()), lambda: layer(h.long()), lambda: G(z.double(), y),
        lambda: D(x.double(), y), lambda: attend(q, k.double(), v), lambda: projection(rows.double(), two)],
    'scale images of bytes with `to_unit`': [
        lambda: D(x.byte(), y), lambda: check_images(x.byte()), lambda: grid_image(x.byte())],
    'x is on meta, but the weights are on cpu': [lambda: D(x.to('meta'), y), lambda: layer(h.to('meta'))],
    r'W must|u must have shape \(3,\)|takes a matrix': [
        lambda: power_iteration(torch.randn(3, 4), torch.randn(4)), lambda: power_iteration(h, q)],
    # labels
    LABELS: [
        lambda: G(z, y.float()), lambda: G(z, y[:2]), lambda: G(z, y.tolist()), lambda: D(x, y.int()),
        lambda: cbn(h, two[:1]), lambda: cbn(h, [0, 1]), lambda: projection(rows, two[:1]),
        lambda: projection(rows, two[:, None]), lambda: auxiliary(rows, two.float()),
        lambda: generate(G, [1, 2]), lambda: generate(G, y.float()), lambda: generate(G, y, n=3),
        lambda: standing_statistics(G, y[None])],
    'labels must be from 0 to': [
        lambda: G(z, y + 7), lambda: D(x, y - 1), lambda: cbn(h, two + 2), lambda: cbn(h, -two),
        lambda: projection(rows, two + 2), lambda: auxiliary(rows, two - 1), lambda: generate(G, y - 1),
        lambda: g_step(G, D, opts[0], z, y + 7)],
    'is conditional and needs labels': [
        lambda: G(z), lambda: D(x), lambda: cbn(h), lambda: projection(rows), lambda: generate(G, n=3)],
    'takes no labels': [lambda: U(z, y), lambda: generate(U, y)],
    # numbers
    COUNT: [
        lambda: generate(U, n=0), lambda: generate(U, n=-1), lambda: generate(U, n=2.5),
        lambda: generate(U, n='3'), lambda: generate(U, n=3, batch=0), lambda: generate(U, n=3, seed='a'),
        lambda: generate(G, y[:0]), lambda: standing_statistics(U, n=1), lambda: shard(-1),
        lambda: SelfAttention('16'), lambda: BatchNorm2d(0), lambda: BatchNorm2d(4, group='2'),
        lambda: ConditionalBatchNorm2d(4, -1), lambda: AuxiliaryHead(8, '3'), lambda: ProjectionHead(8, -3),
        lambda: GBlock(0, 3), lambda: DBlock(4, -3), lambda: ResidualBlock('16'), lambda: Generator(32, -1),
        lambda: Generator(32, '10'), lambda: Generator(32, 0, 2.5), lambda: Generator(32, 0, '8'),
        lambda: Generator(32, 0, 2, (), z_dim=0), lambda: Discriminator(32, 0, 2, (), down=-1),
        lambda: power_iteration(torch.randn(3, 4), torch.randn(3), '1'), lambda: list(split_batch(0, x)),
        lambda: m.at('a', 0), lambda: m.at(1.5, 2), lambda: inception_score(f.softmax(1), 0),
        lambda: kernel_distance(f, f, subsets=0), lambda: kernel_distance(f, f, size=1),
        lambda: precision_recall(f, f, 0), lambda: nearest_images(x, images, k='a'),
        lambda: train_evaluator(images, 0), lambda: kept_indices(-1), lambda: grid_image(x[:0]),
        lambda: grid_image(x, 0), lambda: spread_points(x[0], 0), lambda: agreement_auc(D, n=1),
        lambda: intra_frechet_distance(f[:0], none[:0], f, none)],
    'must be a finite number, at least 0': [
        lambda: ttur(G, D, lr_g=-1.), lambda: ttur(G, D, '1'), lambda: ttur(G, D, bias_lr=-1),
        lambda: ttur(G, D, lr_d=nan), lambda: ttur(G, D, betas=(0, 1)), lambda: ema_update(G, G, 2.),
        lambda: ema_update(G, G, nan)],
    'betas must be a pair': [lambda: ttur(G, D, betas=.9), lambda: ttur(G, D, betas=(.9,))],
    # networks that do not exist
    'size must be one of 32, 64, 128, 256': [
        lambda: Generator('32'), lambda: Generator([32]), lambda: Discriminator(32.)],
    'attention must be a tuple of map sizes': [
        lambda: Generator(32, 0, 2, 16), lambda: Generator(32, 0, 2, '16'),
        lambda: Discriminator(32, 0, 2, None)],
    'form must be': [lambda: Generator(32, 0, 2, (), 'ours'), lambda: SelfAttention(16, 3)],
    # the wrong things
    'at least one score': [
        lambda: d_hinge_loss(f[:0], f), lambda: d_hinge_loss((f, f), f), lambda: d_hinge_loss(y, y),
        lambda: g_hinge_loss(None), lambda: d_acgan_loss(f, f, f, y), lambda: g_acgan_loss(f, 1.)],
    'must be a generator, such as model.ema, got': [lambda: generate(D, y), lambda: generate('G', y)],
    'SAGAN takes a Config': [lambda: SAGAN('small'), lambda: SAGAN(None)],
    'sagan_learner takes DataLoaders': [
        lambda: sagan_learner(None), lambda: sagan_learner('digits'),
        lambda: sagan_learner(image_dls(images, 4), cfg=5)],
    'G and D must be modules': [lambda: sagan_learner(image_dls(images, 4), 'tiny', G=3)],
    'ema must have the architecture': [lambda: ema_update(G, U, .9)],
    'the attribute z_dim = 128': [lambda: check_networks(G, D, preset('tiny'))],
    'at least one image, square': [lambda: check_images(x[:0]), lambda: check_images(x[..., :16])],
    r'images must have shape \(B, 3, S, S\), got': [
        lambda: as_images(x[0]), lambda: as_images('x'), lambda: as_images(x[..., :8]),
        lambda: nearest_images(x[..., :8], images)],
    'images must be Images': [lambda: nearest_images(x, 'digits')],
    'has no attention layer': [
        lambda: attention_maps(G, z, y, layers=16), lambda: attention_maps(G, z, y, layers='16')],
    'cut must be a pixel': [lambda: intervene(G, m, cut=3).__enter__()],
    'hide must be a box': [lambda: intervene(G, m, hide=(1, 2)).__enter__()],
    'a point must be a pair': [lambda: attention_figure(x, m, [3])],
    'NaN or infini': [lambda: map_statistics(x*nan, m), lambda: kernel_distance(f*nan, f)],
    'needs at least one map|has no records yet|needs images': [
        lambda: statistics_figure({}), lambda: training_figure([]), lambda: effect_figure({}),
        lambda: effect_figure(dict(a=x[0], b=x[0, :, :8]))],
    'colours must be|y must hold|needs two images|name a set of twins': [
        lambda: agreement(x, y), lambda: agreement(colours, -y), lambda: agreement(colours, y[:2]),
        lambda: agreement(colours[:1], y[:1]), lambda: agreement_auc(D, 'digits')],
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_does_not_fit_is_a_sentence(message):
    before = plt.get_fignums()
    for call in REFUSED[message]:
        with pytest.raises(ValueError) as e: call()
        assert re.search(message, str(e.value)), str(e.value)
        assert len(str(e.value)) < 300 and '\n' not in str(e.value)
    assert plt.get_fignums() == before


def test_networks_take_what_they_took():
    "Batches of none, autocast, float64 and half precision, and fastai's tensors"
    from fastai.torch_core import TensorImage
    with torch.no_grad():
        assert G(z[:0], y[:0]).shape == (0, 3, 32, 32) and D(x[:0], y[:0]).shape == (0,)
        plain = D(x, y)
        assert torch.equal(D(TensorImage(x), y), plain)
        with torch.autocast('cpu', torch.bfloat16):
            assert D(x, y).dtype == torch.float32 and G(z, y).dtype == torch.float32
        for dtype in (torch.float64, torch.bfloat16):
            d = Discriminator(32, 10, 4, (16,)).eval()
            d.load_state_dict(D.state_dict())
            assert torch.allclose(d.to(dtype)(x.to(dtype), y).float(), plain, atol=.2, rtol=.2)


def test_values_are_read_on_a_cpu_alone(monkeypatch):
    "A check on the way of a training step asks no other device for a value: it has none"
    with torch.device('meta'):
        g, d = Generator(32, 10, 2, (16,), z_dim=8), Discriminator(32, 10, 4, (16,))
        labels = torch.zeros(4, dtype=torch.int64)
        assert d(g(torch.empty(4, 8), labels), labels).shape == (4,)
        assert d_hinge_loss(torch.empty(4), torch.empty(4)).shape == ()
