"The same numbers, faster: against the plain forms, in every memory order, dtype and gradient; memory"
import platform, subprocess, sys
from copy import deepcopy

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from sagan.kernels import (
    BFLOAT16_POSITIONS, blockwise_attention, compile_networks, conv_pool, flatten_weight,
    from_memory_order, fused_attention, fused_quotient, is_4x4_faster, is_blockwise_faster,
    lean_attention, to_memory_order, up_conv, upsample)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def close(a, b, rtol): return (a - b).norm() <= rtol*b.norm()


# --- the quotient ---

@pytest.mark.parametrize('shape', ((4, 3), (4, 3, 1, 1), (4, 3, 3, 2), (1, 3, 3, 3), (4, 1, 3, 3)))
def test_memory_order(shape):
    "A view, not a copy, in either order, and a permutation of the right vector that fits"
    W = torch.randn(shape)
    for weight in (W, W.to(memory_format=torch.channels_last)) if W.ndim == 4 else (W,):
        v = torch.randn(W[0].numel())
        assert flatten_weight(weight).data_ptr() == weight.data_ptr()
        product = flatten_weight(weight) @ to_memory_order(v, weight)
        assert torch.allclose(product, W.flatten(1) @ v, atol=1e-5)
        assert torch.equal(from_memory_order(to_memory_order(v, weight), weight), v)


@pytest.mark.parametrize('last', (False, True))
def test_blocks_of_rows_change_nothing(last):
    "More than one block of rows on a CPU: 2**18 entries in each"
    W = torch.randn(64, 512, 5, 5, dtype=torch.float64)
    if last: W = W.to(memory_format=torch.channels_last)
    W.requires_grad_()
    u, v = [F.normalize(torch.randn(n, dtype=torch.float64), dim=0) for n in (64, 512*25)]
    fused, plain = fused_quotient(W, u, v, W.dtype), W/torch.dot(u, W.flatten(1) @ v)
    assert close(fused, plain, 1e-12)
    G = torch.randn_like(W)
    a, b = [torch.autograd.grad(out, W, G)[0] for out in (fused, plain)]
    assert close(a, b, 1e-12)


def test_the_memory_of_an_earlier_result_is_used_where_it_fits():
    W = torch.randn(4, 3, 3, 3)
    u, v = F.normalize(torch.randn(4), dim=0), F.normalize(torch.randn(27), dim=0)
    first = fused_quotient(W, u, v, W.dtype)
    plain = first.clone()
    assert fused_quotient(2*W, u, v, W.dtype, first).data_ptr() == first.data_ptr()
    for weight, dtype in ((W, torch.bfloat16), (W.to(memory_format=torch.channels_last), W.dtype)):
        out = fused_quotient(weight, u, v, dtype, first)
        assert out.data_ptr() != first.data_ptr() and out.dtype == dtype and out.stride() == weight.stride()
        assert close(out.float(), plain, 5e-3)


def test_the_quotient_is_computed_in_float32_under_autocast():
    W = torch.randn(8, 30, requires_grad=True)
    u, v = F.normalize(torch.randn(8), dim=0), F.normalize(torch.randn(30), dim=0)
    with torch.autocast('cpu', torch.bfloat16): out = fused_quotient(W, u, v, torch.float32)
    assert torch.equal(out, fused_quotient(W, u, v, torch.float32))


# --- convolutions ---

@pytest.mark.parametrize('last', (False, True))
@pytest.mark.parametrize('B,C,H,W', ((2, 4, 32, 32), (64, 2, 4, 4), (2, 3, 33, 31), (2, 64, 2, 2)))
def test_4x4_forms(B, C, H, W, last):
    conv, x = nn.Conv2d(C, 5, 3, padding=1), torch.randn(B, C, H, W, requires_grad=True)
    if last: conv, x = [t.to(memory_format=torch.channels_last) for t in (conv, x)]
    big = upsample(x)
    for fast, plain in ((up_conv(conv, x), conv(big)), (conv_pool(conv, big), F.avg_pool2d(conv(big), 2))):
        assert fast.shape == plain.shape and close(fast, plain, 1e-5)
        G = torch.randn_like(fast)
        grads = [torch.autograd.grad(o, (x, *conv.parameters()), G, retain_graph=True) for o in (fast, plain)]
        for a, b in zip(*grads): assert close(a, b, 1e-5)


def test_where_the_4x4_form_runs():
    for dtype, n in ((torch.float32, 1024), (torch.bfloat16, BFLOAT16_POSITIONS)):
        assert is_4x4_faster(torch.empty(1, 2, 1, n), dtype)
        assert not is_4x4_faster(torch.empty(1, 2, 1, n - 1), dtype)
    assert not is_4x4_faster(torch.empty(64, 2, 32, 32, device='meta'), torch.float32)  # a CPU alone


# --- attention ---

@pytest.mark.parametrize('Nq,Nk,D,Dv', ((64, 16, 8, 32), (64, 64, 16, 4), (9, 5, 3, 7), (1, 1, 1, 1),
                                        (5, 2**19, 1, 2)))
@pytest.mark.parametrize('attention', (fused_attention, blockwise_attention, lean_attention))
def test_attention_without_the_map(attention, Nq, Nk, D, Dv):
    q, k, v = qkv = [torch.randn(s, requires_grad=True) for s in ((2, Nq, D), (2, Nk, D), (2, Nk, Dv))]
    fused, plain = attention(q, k, v), (q @ k.mT).softmax(-1) @ v
    assert fused.shape == plain.shape and torch.allclose(fused, plain, atol=1e-5)
    G = torch.randn_like(plain)
    grads = [torch.autograd.grad(out, qkv, G) for out in (fused, plain)]
    for a, b in zip(*grads): assert torch.allclose(a, b, atol=1e-4)


def test_which_lean_attention_runs(monkeypatch):
    for name in ('blockwise', 'fused'):
        monkeypatch.setattr(f'sagan.kernels.{name}_attention', lambda *_, name=name: name)
    def taken(D, Dv, dtype=torch.float32, device='cpu'):
        q, v = [torch.empty(1, 4, n, dtype=dtype, device=device) for n in (D, Dv)]
        assert is_blockwise_faster(q, v) == (lean_attention(q, q, v) == 'blockwise')
        return lean_attention(q, q, v)
    half = torch.bfloat16
    assert taken(16, 17, half) == taken(4, 32, half) == 'blockwise'
    assert taken(16, 128) == taken(16, 16, half) == taken(16, 128, half, 'meta') == 'fused'
    with torch.autocast('cpu', torch.bfloat16): assert taken(4, 32) == 'blockwise'


# --- memory and compilation ---

memory = '''
import resource, sys, torch
from sagan.kernels import keep_freed_memory

def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == 'keep': keep_freed_memory()
torch.ones(25_000_000)
before = faults()
torch.ones(10_000_000)
print(faults() - before)
'''

def page_faults(how):
    "Memory pages cleared for a tensor of 40 MB, after one of 100 MB was freed, in a separate process"
    command = [sys.executable, '-c', memory, how]
    return int(subprocess.run(command, text=True, check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a setting of glibc')
def test_kept_memory_is_not_cleared_again():
    assert page_faults('keep') < page_faults('give back')/10


def test_compile_networks_changes_g_and_d_alone():
    pair = nn.ModuleDict(dict(G=nn.Linear(4, 3), D=nn.Linear(3, 1), ema=nn.Linear(4, 3)))
    plain = deepcopy(pair)
    compile_networks(pair)
    assert [n for n, m in pair.items() if m._compiled_call_impl] == ['G', 'D']
    assert pair.state_dict().keys() == plain.state_dict().keys()
