"Attention: fused and explicit form, maps and interventions, memory, and what is refused"
import os, subprocess, sys

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from sagan.attention import (
    FORMS, AttentionMap, SelfAttention, _cell_at, _projection, _record_inputs, _visible_keys, attend,
    attention_maps, attention_weights, intervene, resolve_form)
from sagan.kernels import fused_attention


def explicit(q, k, v): return attention_weights(q, k) @ v

def output_and_gradients(f, q, k, v, w):
    "Of one pass; w is an arbitrary direction"
    o = f(q, k, v)
    return [o, *torch.autograd.grad((o*w).sum(), (q, k, v))]

def opened(channels, form='preprint', gamma=1., **kwargs):
    "An attention layer whose gamma is no longer 0"
    layer = SelfAttention(channels, form, **kwargs)
    nn.init.constant_(layer.gamma, gamma)
    return layer


SHAPES = (2, 64, 16, 4, 32), (3, 2100, 2000, 4, 8), (33, 1024, 256, 16, 64)

@pytest.mark.parametrize('B, Nq, Nk, D, Dv', SHAPES)
def test_attend_is_the_explicit_form(B, Nq, Nk, D, Dv):
    "Output and gradients, small and large maps, also with fewer keys than queries"
    torch.manual_seed(0)
    q, k, v = [torch.randn(B, n, d, requires_grad=True) for n, d in [(Nq, D), (Nk, D), (Nk, Dv)]]
    w = torch.randn(B, Nq, Dv)
    for a, b in zip(*[output_and_gradients(f, q, k, v, w) for f in (explicit, attend)]):
        assert (a - b).abs().max() < 2e-5*a.abs().max()


@pytest.mark.parametrize('B, Nq, Nk, D, Dv', [SHAPES[0], (8, 1024, 1024, 2, 4)])
def test_a_map_of_eight_million_entries_keeps_its_bits(B, Nq, Nk, D, Dv):
    "Output and gradients in float32, up to 2**23 entries"
    assert B*Nq*Nk <= 2**23
    torch.manual_seed(0)
    q, k, v = [torch.randn(B, n, d, requires_grad=True) for n, d in [(Nq, D), (Nk, D), (Nk, Dv)]]
    w = torch.randn(B, Nq, Dv)
    for a, b in zip(*[output_and_gradients(f, q, k, v, w) for f in (explicit, attend)]):
        assert torch.equal(a, b)


def test_bfloat16_is_at_least_as_accurate_as_the_explicit_form_under_autocast():
    "Both against float64 from the same rounded inputs"
    torch.manual_seed(0)
    q, k, v, w = [torch.randn(4, 1500, d).bfloat16().requires_grad_() for d in (8, 8, 32, 32)]
    exact = output_and_gradients(explicit, *[t.double() for t in (q, k, v, w)])
    def errors(f):
        with torch.autocast('cpu', torch.bfloat16): got = output_and_gradients(f, q, k, v, w)
        return [((a - b).norm()/a.norm()).item() for a, b in zip(exact, got)]
    assert max(errors(attend)) < 1.5*max(errors(explicit))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_fused_kernel_takes_our_shapes_on_a_gpu_and_stores_no_map():
    q, k, v = [torch.randn(2, 4096, d, device='cuda') for d in (8, 8, 64)]
    o = attention_weights(q, k) @ v
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION): assert_close(attend(q, k, v), o, rtol=0, atol=1e-4)
    # far below the map's own size
    assert torch.cuda.max_memory_allocated() - before < o.numel()*4 + 2*4096**2*4/4


def grown(setup, *codes, **env):
    "MB by which a process, after `setup`, grows at most while it runs each of the codes"
    script = f'''
from pathlib import Path
def mb(what): return int(Path("/proc/self/status").read_text().split(what)[1].split()[0])/1e3
{setup}
for code in {codes!r}:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = mb("VmRSS:")
    exec(code)
    print(mb("VmHWM:") - before)'''
    env = os.environ | (env or dict(MALLOC_MMAP_THRESHOLD_='100000'))  # what is freed is given back
    command = [sys.executable, '-c', script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return [float(line) for line in done.stdout.split()]

linux = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')

@linux
def test_memory_grows_with_the_locations_and_not_with_their_square():
    "One forward and backward pass of one image with 64 channels"
    cases = [('explicit', 2048), ('explicit', 4096), ('attend', 3072), ('attend', 6144), ('attend', 12288)]
    mb = dict(zip(cases, grown('''
import torch
from sagan.attention import attend, attention_weights
def explicit(q, k, v): return attention_weights(q, k) @ v
def both(f, n):
    q, k, v = [torch.randn(1, n, d, requires_grad=True) for d in (8, 8, 64)]
    o = f(q, k, v)
    torch.autograd.grad(o, (q, k, v), o)
both(explicit, 64)  # what PyTorch loads at first use
both(attend, 3000)''', *[f'both({f}, {n})' for f, n in cases])))
    assert mb['attend', 12288] < 2.2*mb['attend', 6144] and mb['attend', 6144] < 2.2*mb['attend', 3072]
    assert 3 < mb['explicit', 4096]/mb['explicit', 2048] < 5  # and at 12,288 nine times the second

@linux
def test_blocks_of_the_map_leave_no_holes_in_the_heap():
    "The map has 134 million entries; memory that is kept, as in training, is used again by the next block"
    mb = grown('''
import torch
from sagan.kernels import blockwise_attention, keep_freed_memory
keep_freed_memory()
q, v = torch.randn(1, 16384, 8), torch.randn(1, 16384, 64)
blockwise_attention(q[:, :600], q, v)''', 'blockwise_attention(q[:, :8192], q, v)', OMP_NUM_THREADS='2')
    assert mb[0] < 60, mb

@linux
def test_looking_at_a_large_map_takes_a_part_of_it_at_a_time():
    "Sixteen images with 4,096 queries and as many keys: the whole map would be 1.07 GB"
    mb, = grown('''
import torch
from sagan.attention import AttentionMap
q, k = [torch.randn(16, 4096, 16) for _ in range(2)]
m = AttentionMap('large', q, k, (64, 64), (64, 64), (128, 128))
''', '''
seen = m.looked_at_from(127, 127)
assert torch.allclose(seen[:, 63, 62], m.at(127, 125)[:, 63, 63])''')
    assert mb < 300


def layouts(x):
    "The same kind of features as users give them"
    return dict(contiguous=x, channels_last=x.contiguous(memory_format=torch.channels_last), transposed=x.mT,
                every_other_channel=torch.cat([x, x], 1)[:, ::2],
                crop=F.pad(x, (1, 1, 1, 1))[..., 1:-1, 1:-1],
                expanded=x[:1].expand(3, -1, -1, -1))

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('channels', [8, 64])
def test_no_layout_or_dtype_makes_the_layer_store_its_map(form, channels):
    "On a CPU; without the one kernel that stores none this is an error. Values against the explicit form"
    torch.manual_seed(0)
    tolerances = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: .03, torch.half: .01}
    for dtype, atol in tolerances.items():
        layer, x = opened(channels, form).to(dtype), torch.randn(2, channels, 6, 4).to(dtype)
        for what, features in layouts(x).items():
            qkv = layer.qkv(features.requires_grad_(what != 'expanded'))
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION): o = fused_attention(*qkv)
            assert_close(o.double(), explicit(*[t.double() for t in qkv]), rtol=0, atol=atol)

@pytest.mark.parametrize('form', FORMS)
def test_a_large_map_by_hand_in_every_layout(form, monkeypatch):
    "Output and gradients of a layer that takes the fused way, on a map that is not square"
    monkeypatch.setattr('sagan.attention.attend', fused_attention)
    torch.manual_seed(0)
    layer = opened(16, form, .5).double()
    for features in layouts(torch.randn(2, 16, 6, 10).double()).values():
        x = features.detach().requires_grad_()
        o = explicit(*layer.qkv(x)).mT.unflatten(2, x.shape[2:])               # (B, Cv, H, W)
        outs = layer(x), layer.gamma*layer.out(o) + x
        assert_close(*outs)
        w = torch.randn_like(x)
        grads = [torch.autograd.grad((out*w).sum(), [x, *layer.parameters()]) for out in outs]
        for a, b in zip(*grads): assert_close(a, b)

@linux
def test_the_layer_alone_is_as_lean_as_in_a_network():
    "As users build it, not channels_last, in training and in evaluation; the map is 59 MB"
    passes = "net.train()(x).sum().backward()", "net.eval()(x.detach())", "net(x.half().float().mT)"
    mb = grown('''
import torch, torch.nn as nn
from sagan.attention import SelfAttention
net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), SelfAttention(64), nn.Conv2d(64, 3, 3, padding=1))
x = torch.randn(1, 3, 60, 64, requires_grad=True)
net(x[..., :16, :16]).sum().backward()''', *passes)
    assert max(mb) < 30, mb


def test_maps_and_interventions_that_are_not_square():
    "Grids, pixels and boxes know both sides"
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), opened(16, 'released')), torch.randn(2, 3, 16, 24)
    out, (m,) = attention_maps(net, x)
    assert (m.queries, m.keys, m.image) == ((8, 12), (4, 6), (8, 12))  # the output is the image here
    assert m.at(7, 11).shape == (2, 4, 6) and m.on_image(7, 11).shape == (2, 8, 12)
    assert_close(m.at(7, 11).flatten(1), m.beta[:, -1])
    assert m.looked_at_from(0, 11).shape == (2, 8, 12)
    assert_close(m.looked_at_from(0, 11).flatten(1), m.beta[:, :, 5])
    with intervene(net, m, cut=(7, 11)): cut = net(x)
    assert_close(cut[..., 7, 11], net[0](x)[..., 7, 11])
    with intervene(net, m, hide=(0, 0, 8, 10)): hidden = net(x)  # all keys but the last column
    layer, h = net[1], net[0](x)
    q, k, v = layer.qkv(h)
    last = torch.arange(24) % 6 == 5
    o = explicit(q, k[:, last], v[:, last]).mT.unflatten(2, (8, 12))
    assert_close(hidden, layer.out(o) + h, rtol=0, atol=1e-5)


def test_a_projection_is_a_matrix():
    torch.manual_seed(0)
    x, conv = torch.randn(2, 16, 8, 8), _projection(16, 2, False)
    assert_close(conv(x).flatten(2), conv.weight[:, :, 0, 0] @ x.flatten(2), rtol=0, atol=1e-6)


def test_the_published_form_by_hand():
    torch.manual_seed(0)
    layer, x = opened(16, 'published', .5), torch.randn(2, 16, 8, 8)
    X = x.flatten(2)                                                           # (B, C, N)
    projections = layer.query, layer.key, layer.value, layer.out
    Wg, Wf, Wh, Wv = [m.weight[:, :, 0, 0] for m in projections]
    assert [tuple(W.shape) for W in (Wg, Wf, Wh, Wv)] == [(2, 16), (2, 16), (2, 16), (16, 2)]
    s = torch.einsum('bci,bcj->bij', Wf@X, Wg@X)                               # (B, N keys, N queries)
    beta = s.exp()/s.exp().sum(1, keepdim=True)                                # (B, N keys, N queries)
    o = Wv @ torch.einsum('bij,bci->bcj', beta, Wh@X)                          # (B, C, N)
    assert_close(layer(x), (.5*o + X).unflatten(2, (8, 8)), rtol=0, atol=1e-5)
    assert_close(attention_weights(*layer.qkv(x)[:2]), beta.mT, rtol=0, atol=1e-6)


def test_the_released_form_by_hand():
    "Pool, attend, project; its map has a quarter of the keys"
    torch.manual_seed(0)
    layer, x = opened(16, 'released', .5), torch.randn(2, 16, 8, 8)
    q = layer.query(x).flatten(2)                                              # (B, C/8, N)
    k = F.max_pool2d(layer.key(x), 2).flatten(2)                               # (B, C/8, N/4)
    v = F.max_pool2d(layer.value(x), 2).flatten(2)                             # (B, C/2, N/4)
    beta = torch.einsum('bcj,bci->bji', q, k).softmax(-1)                      # (B, N, N/4)
    o = torch.einsum('bji,bci->bcj', beta, v).unflatten(2, (8, 8))             # (B, C/2, H, W)
    weights = attention_weights(*layer.qkv(x)[:2])
    assert_close(layer(x), .5*layer.out(o) + x, rtol=0, atol=1e-5)
    assert_close(weights, beta, rtol=0, atol=1e-6)
    assert beta.shape == (2, 64, 16)
    assert_close(weights.sum(-1), torch.ones(2, 64), rtol=0, atol=1e-5)


def test_the_center_of_a_map_depends_on_every_location():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 32, 32, requires_grad=True)
    opened(8)(x)[0, :, 16, 16].sum().backward()
    assert (x.grad[0].abs().sum(0) > 0).all()


def test_forms_have_today_s_names():
    assert [resolve_form(f) for f in ('paper', 'official')] == ['preprint', 'released']
    assert [resolve_form(f) for f in FORMS] == list(FORMS)


def test_the_cell_that_covers_a_pixel():
    pixels = (0, 0), (0, 15), (14, 2), (15, 3)
    assert [_cell_at((8, 8), (16, 16), *pixel) for pixel in pixels] == [0, 7, 7*8 + 1, 7*8 + 1]
    with pytest.raises(IndexError, match='rows go from 0 to 15'): _cell_at((8, 8), (16, 16), 16, 0)


def test_inputs_are_recorded_and_hooks_removed():
    net, image = nn.Sequential(nn.Conv2d(3, 16, 1), SelfAttention(16)), torch.randn(1, 3, 4, 4)
    with _record_inputs(net, ['1']) as records: net(image)
    [(name, layer, h)] = records
    assert (name, layer) == ('1', net[1]) and torch.equal(h, net[0](image))
    assert not net[1]._forward_hooks


@pytest.fixture
def miniature():
    "A network with 8x8 queries and 4x4 keys, its input, its output and its map"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), opened(16, 'released'),
                        nn.Upsample(scale_factor=2), nn.Conv2d(16, 3, 3, 1, 1))
    x = torch.randn(2, 3, 16, 16)
    out, (m,) = attention_maps(net, x)
    return net, x, out, m

def test_maps_of_some_layers_and_of_a_compiled_network(miniature):
    net, x, *_ = miniature
    assert [len(attention_maps(net, x, layers=l)[1]) for l in (None, ['1'], '1', [])] == [1, 1, 1, 0]
    compiled = nn.Sequential(*net)
    compiled.compile(backend='eager')
    compiled(x)
    assert len(attention_maps(compiled, x)[1]) == 1  # its compiled code is left alone

def test_parts_and_resolution_of_a_map(miniature):
    *_, m = miniature
    assert_close(torch.cat(list(m.parts()), 1), m.beta, rtol=0, atol=1e-6)
    assert m.on_image(14, 2).shape == (2, 16, 16)

def test_a_key_s_column_and_the_weights_on_the_image_by_hand(miniature):
    "Pixel (5, 9) has the key in row 1, column 2 of 4x4, and is 1/8 of a cell above and left of its center"
    *_, m = miniature
    assert_close(m.looked_at_from(5, 9), m.beta[:, :, 1*4+2].reshape(2, 8, 8), rtol=0, atol=1e-6)
    a, on = m.at(14, 2), m.on_image(14, 2)                                     # (B, 4, 4), (B, 16, 16)
    near = .875**2*a[:, 1, 2] + .875*.125*(a[:, 0, 2] + a[:, 1, 1]) + .125**2*a[:, 0, 1]  # (B,)
    assert_close(on[:, 5, 9], near, rtol=0, atol=1e-6)

def test_each_intervention_by_hand(miniature):
    net, x, out, m = miniature
    h = net[0](x)                                                              # (B, C, H, W)
    layer, v = net[1], net[1].qkv(h)[2]                                        # v: (B, Nk, C/2)
    def draw(**how):
        with intervene(net, m, **how): return net(x)
    def drawn(o): return net[3](net[2](layer.out(o) + h))                      # from o, (B, C/2, H, W)
    def mixed(beta): return (beta @ v).mT.unflatten(2, (8, 8))                 # (B, C/2, H, W)
    def close(a, b): assert_close(a, b, rtol=0, atol=1e-5)
    assert torch.equal(draw(), out)
    assert_close(draw(gamma=0.), net[3](net[2](h)), rtol=0, atol=1e-6)         # no attention at all
    without = layer.out(mixed(m.beta)) + h
    without[:, :, 7, 1] = h[:, :, 7, 1]                                        # the query of pixel (14, 2)
    close(draw(cut=(14, 2)), net[3](net[2](without)))
    left = m.beta.unflatten(2, (4, 4)).clone()
    left[..., :2] = 0  # the left half of the image holds the keys of columns 0 and 1
    left = left.flatten(2)/left.flatten(2).sum(-1, keepdim=True)
    close(draw(hide=(0, 0, 16, 8)), drawn(mixed(left)))
    # the mean of all values, at every location
    close(draw(uniform=True), drawn(mixed(torch.full_like(m.beta, 1/16))))

def test_visible_keys(miniature):
    *_, m = miniature
    # the left half of the image: the keys of columns 0 and 1
    left = _visible_keys(m, (0, 0, 16, 8)).view(4, 4)
    assert left.tolist() == [[False, False, True, True]]*4
    with pytest.raises(ValueError, match='all keys'): _visible_keys(m, (0, 0, 16, 16))
    with pytest.raises(ValueError, match='hides no key; choose another: a key covers 4x4 of 16x16 pixels'):
        _visible_keys(m, (4, 4, 5, 5))

def test_the_layer_is_itself_again_after_an_intervention(miniature):
    net, x, out, m = miniature
    with pytest.raises(ZeroDivisionError), intervene(net, m, gamma=0.): 1/0
    assert 'forward' not in vars(net[1]) and torch.equal(net(x), out)

@pytest.mark.parametrize('form', ['preprint', 'published'])
def test_intervening_where_keys_are_as_many_as_queries(form):
    torch.manual_seed(0)
    net, h = nn.Sequential(opened(16, form), nn.Conv2d(16, 3, 3, 1, 1)), torch.randn(2, 16, 8, 8)
    _, (m,) = attention_maps(net, h)
    assert m.keys == (8, 8)
    o = (m.beta @ net[0].qkv(h)[2]).mT.unflatten(2, (8, 8))                    # (B, Cv, H, W)
    half = h + .5*net[0].out(o)                                                # (B, C, H, W)
    with intervene(net, m, gamma=.5): assert_close(net(h), net[1](half), rtol=0, atol=1e-5)


def test_channels_and_forms_that_are_refused():
    with pytest.raises(ValueError, match='divisible by 8'): SelfAttention(12)
    with pytest.raises(ValueError, match='divisible by 8'): SelfAttention(12, 'published')
    with pytest.raises(ValueError, match='got 4'): SelfAttention(4, 'released')
    with pytest.raises(ValueError, match="'preprint' or 'published' or 'released', got 'ours'"):
        SelfAttention(16, 'ours')
    # rounded down, as in the released code
    layer = SelfAttention(12, 'released')
    widths = [getattr(layer, n).out_channels for n in ('query', 'key', 'value', 'out')]
    assert widths == [1, 1, 6, 12]

def test_maps_and_interventions_that_are_refused(miniature):
    net, x, _, m = miniature
    with pytest.raises(ValueError, match='no SelfAttention layer'):
        attention_maps(nn.Conv2d(3, 3, 1), x)
    with pytest.raises(ValueError, match="no attention layer '0'; it has '1'"):
        attention_maps(net, x, layers=['0'])
    with pytest.raises(IndexError, match='rows go from 0 to 15'): m.at(16, 0)
    with pytest.raises(IndexError, match='columns from 0 to 15'): m.looked_at_from(0, -1)
    with pytest.raises(ValueError, match='already altered'), intervene(net, m), intervene(net, m): pass
    with pytest.raises(ValueError, match="no attention layer 1; it has '1'"): attention_maps(net, x, layers=1)
    with pytest.raises(ValueError, match=r'q must have shape \(2, 25, 2\), got \(2, 64, 2\)'):
        AttentionMap('1', m.q, m.k, (5, 5), (4, 4), (16, 16))
    with pytest.raises(ValueError, match='map of 1 must have shape'), intervene(net, m, hide=(0, 0, 16, 8)):
        net(x[..., :8])
    other = nn.Sequential(SelfAttention(16), nn.Conv2d(16, 3, 3, 1, 1))
    with pytest.raises(ValueError, match="no attention layer '1'"), intervene(other, m): pass
