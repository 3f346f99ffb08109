"Gradients in float16: what is an error, and what only a reason for a smaller scale"
import pytest, torch
from sagan.data import digits, image_dls
from sagan.diagnostics import NonFinite
from sagan.losses import ttur
from sagan.networks import Discriminator, Generator
from sagan.devices import fastest_dtype
from sagan.precision import autocast_dtype, LossScaler, no_autocast
from sagan.training import d_step


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def multiply_gradient(D, factor):
    "Multiply the gradient in front of a convolution"
    def hook(m, grad_in, grad_out): return tuple(g*factor for g in grad_in)
    D.blocks[1].conv1.register_full_backward_hook(hook)


SPOILS = {
    'overflow': lambda D: multiply_gradient(D, torch.inf),
    'square overflows': lambda D: multiply_gradient(D, 1e25),  # finite, but its square is not
    'NaN in a weight': lambda D: D.blocks[1].conv1.bias.data[0].fill_(torch.nan),
    'nothing': lambda D: None,
}


# with a scale of 4 and of 2 the step is left out, with 1 an overflow is an error
@pytest.mark.parametrize('spoil, expected', [
    ('overflow', (2, 'backward')), ('square overflows', (2, 'backward')), ('NaN in a weight', (0, 'forward')),
    ('nothing', None)])
def test_the_scale_comes_down_to_1_before_a_gradient_is_an_error(spoil, expected):
    G, D = Generator(32, 10, 2, (16,), z_dim=8), Discriminator(32, 10, 4, (16,))
    opt = ttur(G, D, 1e-3, 4e-3)[1]
    x, y = image_dls(digits(), 16).one_batch()                                # (B, 3, 32, 32), (B,)
    z, scaler = torch.randn(16, 8), LossScaler(4.)                            # (B, z_dim)
    SPOILS[spoil](D)
    before, found = {k: p.detach().clone() for k, p in D.named_parameters()}, None
    for n in range(5):
        try: d_step(G, D, opt, x, y, z, y, scale=scaler)
        except NonFinite as e:
            found = n, e.report['where']
            assert all(torch.equal(p.nan_to_num(), before[k].nan_to_num()) for k, p in D.named_parameters())
            break
    assert found == expected


def test_scale_of_a_loss():
    w, scaler = torch.ones(3, requires_grad=True), LossScaler(8.)
    with torch.autocast('cpu', torch.bfloat16): loss = (w*2).sum()
    scaler.backward(loss)
    assert w.grad.tolist() == [16, 16, 16]
    scaler.unscale([w.grad])
    assert w.grad.tolist() == [2, 2, 2]


def test_the_scale_is_halved_at_once_and_doubled_after_many_good_steps():
    s, scales = LossScaler(8., growth_interval=3), []
    for fine in (True, True, False, True, True, True, True):
        s.update(fine)
        scales.append(s.scale)
    assert scales == [8, 8, 4, 4, 4, 8, 8]


def test_autocast_dtype():
    x = torch.zeros(1)
    assert autocast_dtype(x) == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        assert autocast_dtype(x) == torch.bfloat16
        with no_autocast(x): assert autocast_dtype(x) == torch.float32


def test_a_device_without_instructions_for_it_takes_float32():
    assert fastest_dtype('meta') == 'float32' and fastest_dtype('cpu') in ('float32', 'bfloat16')
