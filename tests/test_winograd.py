"Winograd's convolution against PyTorch's: numbers, gradients, layouts, and where it runs"
from copy import deepcopy

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from sagan.networks import Discriminator, Generator
from sagan.spectral import spectral_norm
from sagan.winograd import Conv3x3, is_winograd_faster, winograd_conv


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def close(a, b, rtol): return (a - b).norm() <= rtol*b.norm()


def plain_conv(x, w): return F.conv2d(x, w, padding=1)


@pytest.mark.parametrize('dtype,rtol', ((torch.float64, 1e-13), (torch.float32, 1e-5)))
@pytest.mark.parametrize('layout', (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize('B,C,out,H,W', ((2, 3, 5, 8, 8), (3, 5, 3, 4, 12), (1, 1, 1, 4, 4), (0, 2, 3, 8, 8),
                                         (2, 2, 2, 128, 96), (17, 2, 3, 16, 16), (1100, 1, 2, 4, 4)))
def test_output_and_gradients(B, C, out, H, W, layout, dtype, rtol):
    "Also with no image, with more tiles in an image than a part has, and with a last part that is smaller"
    x, w = torch.randn(B, C, H, W, dtype=dtype), torch.randn(out, C, 3, 3, dtype=dtype)
    x, w = [t.to(memory_format=layout).requires_grad_() for t in (x, w)]
    y, exact = winograd_conv(x, w), plain_conv(x, w)
    assert y.shape == exact.shape and close(y, exact, rtol)
    assert y.is_contiguous(memory_format=torch.channels_last)
    g = torch.randn_like(exact)
    for a, b in zip(*[torch.autograd.grad(o, (x, w), g) for o in (y, exact)]):
        assert a.shape == b.shape and close(a, b, rtol)


def test_gradients_by_finite_differences():
    x, w = torch.randn(2, 2, 4, 8, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    x, w = [t.requires_grad_() for t in (x, w)]
    assert torch.autograd.gradcheck(winograd_conv, (x, w))
    assert torch.autograd.gradgradcheck(winograd_conv, (x, w))


def test_no_gradient_is_computed_that_nobody_wants(monkeypatch):
    "Frozen weights, as in G's step, and images that need no gradient"
    def refuse(*_): raise AssertionError('computed for nobody')
    x, w = torch.randn(1, 2, 8, 8), torch.randn(2, 2, 3, 3)
    with monkeypatch.context() as m:
        m.setattr('sagan.winograd._weight_gradient', refuse)
        winograd_conv(x.requires_grad_(), w).sum().backward()
    assert x.grad is not None and w.grad is None
    y = winograd_conv(x.detach(), w.requires_grad_())
    monkeypatch.setattr('sagan.winograd._convolve', refuse)
    y.sum().backward()
    assert w.grad is not None


def test_where_it_runs():
    x = torch.empty(1, 128, 32, 32)  # 64 tiles
    assert is_winograd_faster(x, 128)
    for other, c_out in ((x, 127), (x[:, :127], 128), (x[:, :, :28], 128), (x[:0], 128), (x.double(), 128),
                         (x.bfloat16(), 128), (x.to('meta'), 128), (torch.empty(2, 128, 30, 32), 128)):
        assert not is_winograd_faster(other, c_out)
    with torch.autocast('cpu', torch.bfloat16): assert not is_winograd_faster(x, 128)


@pytest.mark.parametrize('bias', (True, False))
def test_a_layer_in_both_forms(bias):
    "The same weights and names as PyTorch's layer; the same bits where the plain form runs"
    ours, plain = Conv3x3(128, 128, bias), nn.Conv2d(128, 128, 3, padding=1, bias=bias)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(4, 128, 16, 16)
    assert close(ours(x), plain(x), 1e-5) and not torch.equal(ours(x), plain(x))
    assert torch.equal(ours(x[:3]), plain(x[:3]))  # 48 tiles
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(ours(x), plain(x))


def test_compiled_and_exported_layers_keep_the_plain_form(monkeypatch):
    def refuse(*_): raise AssertionError('traced')
    monkeypatch.setattr('sagan.winograd.winograd_conv', refuse)
    conv, x = Conv3x3(128, 128), torch.randn(4, 128, 16, 16)
    assert 'conv2d' in str(torch.export.export(conv, (x,)).graph)
    assert torch.equal(torch.compile(conv, backend='eager')(x), nn.Conv2d.forward(conv, x))


def test_whole_networks_are_as_exact_as_with_the_plain_form(monkeypatch):
    "Images and all gradients of wide networks with spectral norm, against float64"
    kinds, used = dict(size=32, n_classes=3, attention=(16,)), []
    nets = Generator(width=32, **kinds), Discriminator(width=64, **kinds)  # 128 channels each
    z, y = torch.randn(8, 128), torch.arange(8) % 3
    def run(dtype):
        G, D = [deepcopy(net).to(dtype).eval() for net in nets]
        x = G(z.to(dtype), y)
        D(x.to(dtype), y).sum().backward()
        grads = torch.cat([p.grad.flatten() for net in (G, D) for p in net.parameters()])
        return x.detach(), grads
    monkeypatch.setattr('sagan.winograd.winograd_conv', lambda x, w: used.append(1) or winograd_conv(x, w))
    exact, fast = run(torch.float64), run(torch.float32)
    assert len(used) >= 4
    monkeypatch.setattr('sagan.winograd.is_winograd_faster', lambda *_: False)
    plain = run(torch.float32)
    for truth, a, b, bound in zip(exact, fast, plain, (1e-5, 1e-3)):
        ours, theirs = [((t - truth).norm()/truth.norm()).item() for t in (a, b)]
        assert ours < max(bound, 5*theirs), (ours, theirs)


def test_the_weight_is_divided_once_per_pass():
    conv, calls = spectral_norm(Conv3x3(128, 128)), []
    conv.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    conv(torch.randn(4, 128, 16, 16))
    assert len(calls) == 1
