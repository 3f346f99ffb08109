"Spectral norm against exact decompositions, PyTorch's own and autograd; caching, memory order, errors, time"
import time
from copy import deepcopy

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from torch.nn.utils import parametrizations
from sagan.precision import no_autocast
from sagan.spectral import (
    SpectralNorm, cached_spectral_norm, power_iteration, sigmas, spectral_layers, spectral_norm,
    spectral_step)

# name: (the layer, whether it then has the channels-last memory order)
layers = {
    'linear': (lambda: nn.Linear(5, 4), False),
    'conv': (lambda: nn.Conv2d(3, 4, 3), False),
    'channels_last': (lambda: nn.Conv2d(3, 4, 3), True),
    'transposed': (lambda: nn.ConvTranspose2d(4, 3, 3), False),
    'embedding': (lambda: nn.Embedding(6, 4), False)}


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture(params=layers)
def layer(request):
    make, last = layers[request.param]
    return make().to(memory_format=torch.channels_last) if last else make()


@pytest.fixture
def conv(): return spectral_norm(nn.Conv2d(3, 4, 3))


def parts(layer):
    "The parametrization and the original weight of a normalized layer"
    (_, sn, weight), = spectral_layers(layer)
    return sn, weight


# --- power iteration ---

def test_power_iteration_finds_the_first_singular_vectors_at_the_expected_rate():
    torch.manual_seed(1)
    W = torch.randn(64, 300, dtype=torch.float64)
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    u, errors = torch.randn(64, dtype=torch.float64), []
    for _ in range(400):
        u, v = power_iteration(W, u)
        errors.append((S[0] - u@W@v).item())
    assert all(e >= -1e-9 for e in errors)  # an estimate from unit vectors never exceeds sigma
    assert abs((u@U[:, 0]).abs() - 1) < 1e-4  # the first left singular vector, up to its sign
    assert abs((errors[399]/errors[199])**(1/200) - (S[1]/S[0])**4) < 1e-3


def test_rounds_add_up():
    W, u = torch.randn(6, 9), torch.randn(6)
    once, _ = power_iteration(W, u)
    assert torch.equal(power_iteration(W, u, 2)[0], power_iteration(W, once)[0])


def test_power_iteration_refuses_what_is_no_matrix_and_no_round():
    u = torch.randn(2)
    with pytest.raises(ValueError, match='takes a matrix'): power_iteration(torch.randn(2, 3, 4), u)
    with pytest.raises(ValueError, match='at least 1, got 0'): power_iteration(torch.randn(2, 3), u, 0)


def test_no_autocast_keeps_float32():
    W, u = torch.randn(64, 300), F.normalize(torch.randn(64), dim=0)
    with torch.autocast('cpu', torch.bfloat16):
        low = u @ W
        with no_autocast(W): full = u @ W
        vectors = power_iteration(W, u)
    assert (low.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(full, u @ W)
    assert all(torch.equal(a, b) for a, b in zip(vectors, power_iteration(W, u)))


# --- the parametrization ---

def test_calls_agree_and_the_norm_becomes_one():
    W = torch.randn(16, 8, 3, 3)
    sn = SpectralNorm(W)
    assert torch.equal(sn(W), sn(W))
    for _ in range(300): sn.step(W)
    assert abs(torch.linalg.matrix_norm(sn(W).flatten(1), 2) - 1) < 1e-4


def test_spectral_norm_refuses_other_layers_and_a_second_time(conv):
    with pytest.raises(TypeError, match='got ReLU'): spectral_norm(nn.ReLU())
    with pytest.raises(ValueError, match='already parametrized'): spectral_norm(conv)


def test_only_a_step_in_training_mode_moves_the_vectors(conv):
    x, sn = torch.randn(2, 3, 8, 8), parts(conv)[0]
    start = sn.u.clone()
    for mode in (True, False):
        conv.train(mode)
        for _ in range(3): conv(x)
        assert torch.equal(sn.u, start)
    spectral_step(conv)
    assert torch.equal(sn.u, start)
    spectral_step(conv.train())
    assert not torch.equal(sn.u, start)


def test_gradient_equals_that_of_autograd(layer):
    layer = spectral_norm(layer.double())
    sn, W = parts(layer)
    for _ in range(3): spectral_step(layer)
    G = torch.randn_like(W)  # dL/dW_hat of the loss L = <G, W_hat>
    ours, = torch.autograd.grad((layer.weight*G).sum(), W)
    # a gradient in another memory order
    other, = torch.autograd.grad(layer.weight, W, G.contiguous())
    # sigma is u . W v, u and v are constants
    autograd, = torch.autograd.grad((W/sn.sigma(W)*G).sum(), W)
    for a, b in ((other, ours), (ours, autograd), (layer.weight, W/sn.sigma(W))):
        assert (a - b).abs().max() < 1e-12
    if not sn.dim: assert ours.stride() == W.stride()  # an optimizer reads both in one pass


def test_memory_order_makes_no_difference():
    a = spectral_norm(nn.Conv2d(3, 4, 3))
    b = deepcopy(a).to(memory_format=torch.channels_last)
    for _ in range(3):
        for net in (a, b): spectral_step(net)
    assert torch.allclose(a.weight, b.weight, atol=1e-6)
    for name, t in a.state_dict().items(): assert torch.allclose(t, b.state_dict()[name], atol=1e-6), name
    assert sigmas(a)[''] == pytest.approx(sigmas(b)[''])


def test_same_weight_and_gradient_as_pytorch(layer):
    theirs = parametrizations.spectral_norm(deepcopy(layer)).eval().parametrizations.weight
    ours = spectral_norm(layer).parametrizations.weight
    ours[0].u.copy_(theirs[0]._u)
    ours[0].v.copy_(theirs[0]._v)
    assert torch.allclose(ours(), theirs(), atol=1e-6)
    for p in (ours, theirs): p().square().sin().sum().backward()
    assert torch.allclose(ours.original.grad, theirs.original.grad, atol=1e-5)


def test_a_gradient_through_the_iteration_is_ours_once_the_vectors_have_settled():
    "As in the released code: after 1 round from a random start they differ, after 300 no more"
    def plain(W, u, v): return W/torch.dot(u.detach(), W @ v.detach())  # (out, in)
    def through(W, u):
        v = F.normalize(W.mT @ u, dim=0)
        return W/(F.normalize(W @ v, dim=0) @ W @ v)  # (out, in), nothing is constant
    W, _, G = torch.randn(8, 20, requires_grad=True), torch.randn(8), torch.randn(8, 20)
    start, gaps = torch.randn(8), []
    for n in (1, 300):
        u, _ = power_iteration(W.detach(), start, n)
        a, = torch.autograd.grad(through(W, u), W, G)
        b, = torch.autograd.grad(plain(W, *power_iteration(W.detach(), u)), W, G)
        gaps.append(((a - b).norm()/b.norm()).item())
    assert gaps[0] > .01 and gaps[1] < 1e-4


def test_a_loaded_network_divides_by_the_same_norm():
    a, b = [nn.Sequential(spectral_norm(nn.Linear(6, 6))) for _ in range(2)]
    for _ in range(3): spectral_step(a)
    assert not torch.equal(a[0].weight, b[0].weight)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a[0].weight, b[0].weight)
    parts = ['bias', 'parametrizations.weight.original', 'parametrizations.weight.0.u',
             'parametrizations.weight.0.v']
    assert list(a.state_dict()) == [f'0.{part}' for part in parts]


def test_a_residual_block_reaches_its_bound():
    "The branch stretches one direction d only, by 3 before it is normalized"
    f, d = spectral_norm(nn.Linear(8, 8, bias=False)), F.normalize(torch.ones(8), dim=0)  # d: (8,)
    f.parametrizations.weight.original.data = 3*torch.outer(d, d)                         # (8, 8)
    spectral_step(f)
    assert abs(f(d).norm() - 1) < 1e-5
    assert abs((d + f(d)).norm() - 2) < 1e-5


# --- one quotient for all passes of a step ---

def test_an_error_within_the_block_leaves_the_gradient_alone(conv):
    x, W = torch.randn(2, 3, 8, 8), parts(conv)[1]
    conv(x).square().mean().backward()
    before = W.grad.clone()
    with pytest.raises(ZeroDivisionError), cached_spectral_norm(conv):
        conv(x).sum().backward()
        1/0
    assert torch.equal(before, W.grad)
    assert conv.weight is not conv.weight  # divided at each call again


def test_under_autocast_the_quotient_is_the_rounded_one(conv):
    with torch.autocast('cpu', torch.bfloat16), cached_spectral_norm(conv): rounded = conv.weight
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, conv.weight.bfloat16())


def test_a_quotient_keeps_its_memory_from_step_to_step(conv):
    sn, W = parts(conv)
    with cached_spectral_norm(conv): place = conv.weight.data_ptr()
    spectral_step(conv)
    with cached_spectral_norm(conv):
        assert conv.weight.data_ptr() == place
        assert torch.equal(conv.weight, sn.quotient(W, W.dtype))


def test_all_quotients_of_a_network_keep_their_memory():
    kinds = (nn.Conv2d(4, 8, 1), nn.Conv2d(1, 8, 3), nn.Conv2d(4, 1, 3), nn.ConvTranspose2d(4, 8, 3),
             nn.Linear(3, 4))
    net = nn.Sequential(*map(spectral_norm, kinds)).to(memory_format=torch.channels_last)
    places = []
    for _ in range(2):
        with cached_spectral_norm(net): places.append([layer.weight.data_ptr() for layer in net])
    assert places[0] == places[1]


def test_a_quotient_is_right_after_a_change_of_memory_order_or_dtype(layer):
    "Memory of another order or dtype is not used again"
    spectral_norm(layer)
    with cached_spectral_norm(layer): pass
    layer.to(memory_format=torch.channels_last)
    with torch.no_grad(): parts(layer)[1][0].mul_(3.)
    with cached_spectral_norm(layer):
        assert torch.allclose(layer.weight, parts(layer)[1]/sigmas(layer)[''], atol=1e-6)
    layer.double()
    with cached_spectral_norm(layer): assert layer.weight.dtype == torch.float64


# --- the cost ---

def test_a_step_is_cheap_next_to_the_decomposition_and_the_convolution():
    def seconds(f, n):
        times = []
        for _ in range(n):
            start = time.perf_counter()
            f()
            times.append(time.perf_counter() - start)
        return min(times)
    W, x = torch.randn(256, 256, 3, 3), torch.randn(16, 256, 16, 16)
    sn = SpectralNorm(W)
    step = seconds(lambda: sn.step(W), 20)
    exact = seconds(lambda: torch.linalg.svdvals(W.flatten(1)), 2)
    conv = seconds(lambda: F.conv2d(x, W, padding=1), 3)
    assert step < exact/5 and step < conv and exact > conv/5
