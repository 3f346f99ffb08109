"The networks by hand, at all sizes and placements; parameters, channels, samples, errors"
from math import sqrt
from unittest.mock import patch

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from sagan.attention import attention_maps
from sagan.kernels import upsample
from sagan.networks import (
    D_CHANNELS, D_DOWN, G_CHANNELS, DBlock, Discriminator, GBlock, Generator, ResidualBlock, generate,
    generate_batches, standing_statistics)
from sagan.spectral import sigmas

forms = 'preprint', 'published', 'released'


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture
def G(): return Generator(32, 10, width=8, attention=(16, 32), z_dim=16).eval()


@pytest.fixture
def D(): return Discriminator(32, 10, width=8, attention=(16, 8), form='released')


def numbers(net): return sum(p.numel() for p in net.parameters())


def block_shapes(net, *inputs):
    "Shape of the output of each block, without the batch"
    seen = []
    def record(block, args, out): seen.append(tuple(out.shape[1:]))
    hooks = [b.register_forward_hook(record) for b in net.blocks]
    net(*inputs)
    for h in hooks: h.remove()
    return seen


# --- blocks ---

def test_weights_start_large_enough_for_gradients_to_count():
    conv, x = DBlock(3, 5).conv1, torch.randn(2, 3, 8, 8)
    grad, = torch.autograd.grad(conv(x).square().sum(), conv.parametrizations.weight.original)
    assert grad.abs().max() > 1


def test_ten_times_the_weight_has_the_same_output_and_a_tenth_of_the_gradient():
    conv, x = DBlock(3, 5).conv1, torch.randn(2, 3, 8, 8)
    weight, results = conv.parametrizations.weight.original, []
    for scale in (1, 10):
        with torch.no_grad(): weight.mul_(scale)
        out = conv(x)
        results.append((out, torch.autograd.grad(out.square().sum(), weight)[0]))
    (out, grad), (out10, grad10) = results
    assert torch.allclose(out10, out, rtol=0, atol=1e-5)
    assert torch.allclose(10*grad10, grad, rtol=0, atol=1e-3)


def test_shortcuts_commute_with_the_change_of_size():
    x, g, d = torch.randn(2, 4, 8, 8), GBlock(4, 6).eval(), DBlock(4, 6)
    assert g(x).shape == (2, 6, 16, 16) and d(x).shape == (2, 6, 4, 4)
    assert torch.allclose(upsample(g.skip(x)), g.skip(upsample(x)), atol=1e-6)
    assert torch.allclose(F.avg_pool2d(d.skip(x), 2), d.skip(F.avg_pool2d(x, 2)), atol=1e-6)


def test_an_in_place_relu_harms_only_the_discriminator_s_later_blocks():
    x, im = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8)
    g, first, d = GBlock(4, 6).eval(), DBlock(3, 6, first=True), DBlock(4, 6)
    h = first.conv2(F.relu(first.conv1(im)))  # the image is not rectified
    assert torch.allclose(first(im), F.avg_pool2d(h, 2) + first.skip(F.avg_pool2d(im, 2)), atol=1e-6)
    h = d.conv2(F.relu(d.conv1(F.relu(x))))
    rectified = F.avg_pool2d(h, 2) + F.avg_pool2d(d.skip(F.relu(x)), 2)
    with patch.object(F, 'relu', torch.relu_), torch.no_grad():  # the same blocks, every ReLU in place
        in_place = [block(t.clone()) for block, t in ((g, x), (first, im), (d, x))]
    assert torch.allclose(in_place[0], g(x), atol=1e-6)
    assert torch.allclose(in_place[1], first(im), atol=1e-6)
    assert torch.allclose(in_place[2], rectified, atol=1e-6)


def test_blocks_leave_their_input_alone():
    x = torch.randn(2, 4, 8, 8)
    before = x.clone()
    GBlock(4, 6).eval()(x)
    DBlock(4, 6)(x)
    assert torch.equal(x, before)  # no ReLU rectifies it in place


def test_g_block_by_hand():
    g, x = GBlock(4, 6).eval(), torch.randn(2, 4, 8, 8)
    def four(t): return t.repeat_interleave(2, 2).repeat_interleave(2, 3)  # each pixel four times
    assert torch.equal(upsample(x), four(x))
    h = g.conv2(F.relu(g.bn2(g.conv1(four(F.relu(g.bn1(x)))))))
    assert torch.allclose(g(x), h + g.skip(four(x)), atol=1e-5)


def test_shortcuts_of_the_d_block():
    d, x = DBlock(4, 6, relu_skip=True), torch.randn(2, 4, 8, 8)
    h = d.conv2(F.relu(d.conv1(F.relu(x))))
    assert torch.allclose(d(x), F.avg_pool2d(h, 2) + F.avg_pool2d(d.skip(F.relu(x)), 2), atol=1e-6)
    assert type(DBlock(4, 4, down=False).skip) is nn.Identity


def test_residual_block_by_hand():
    block, x = ResidualBlock(8), torch.randn(1, 8, 9, 9)
    with torch.no_grad(): block.gamma.fill_(1.)
    assert torch.allclose(block(x) - x, block.conv2(F.relu(block.conv1(F.relu(x)))), atol=1e-5)


# --- channels and places ---

def test_channel_tables():
    for s in (64, 128, 256): assert D_CHANNELS[s] == G_CHANNELS[s][::-1]
    # the size of D's last feature maps, and how many blocks keep it
    assert {s: s >> D_DOWN[s] for s in D_DOWN} == {32: 8, 64: 4, 128: 4, 256: 4}
    assert {s: len(D_CHANNELS[s]) - D_DOWN[s] for s in D_DOWN} == {32: 2, 64: 1, 128: 1, 256: 1}


def test_channels_of_the_table_times_the_width():
    with torch.device('meta'): G = Generator(128, width=64, attention=())
    assert [b.conv1.in_channels for b in G.blocks] + [G.conv.in_channels] == [1024, 1024, 512, 256, 128, 64]


def test_own_channels_and_another_number_of_halvings():
    G = Generator(32, width=(8, 5, 6, 7), attention=(), z_dim=4)
    D = Discriminator(64, width=(3, 4, 5, 6, 7), attention=(), down=5)
    blocks = Discriminator(32, width=(3, 4, 5, 6), attention=()).blocks
    assert [b.conv1.out_channels for b in blocks] == [3, 4, 5, 6]
    assert [c for c, _, _ in block_shapes(G, torch.randn(2, 4))] == [5, 6, 7]
    expected = [(3, 32, 32), (4, 16, 16), (5, 8, 8), (6, 4, 4), (7, 2, 2)]
    assert block_shapes(D, torch.randn(2, 3, 64, 64)) == expected


def test_attention_has_the_channels_of_its_place():
    D = Discriminator(32, width=(8, 24, 16, 32), attention=(16, '8-2'))
    assert {p: layer.query.in_channels for p, layer in D.attention.items()} == {'16': 8, '8-2': 16}


# --- whole networks ---

def test_shapes_at_32_pixels():
    G, D = Generator(32, 10, 8, (16,)), Discriminator(32, 10, 16, (16,))
    y = torch.tensor([3])
    assert block_shapes(G.eval(), torch.randn(1, 128), y) == [(32, 8, 8), (32, 16, 16), (32, 32, 32)]
    assert block_shapes(D, torch.randn(1, 3, 32, 32), y) == [(32, 16, 16), *[(32, 8, 8)]*3]


def test_all_classes_start_alike(G):
    z, y = torch.randn(2, 16).repeat(3, 1), torch.arange(3).repeat_interleave(2)
    with torch.no_grad(): x = G(z, y)  # two latents for each of three classes
    assert torch.allclose(x[:2], x[2:4], atol=1e-6)
    assert torch.allclose(x[:2], x[4:], atol=1e-6)


@pytest.mark.parametrize('size', (32, 64, 128, 256))
@pytest.mark.parametrize('n_classes', (0, 3))
def test_all_sizes_with_and_without_labels(size, n_classes):
    y = torch.tensor([0, 2]) if n_classes else None
    G = Generator(size, n_classes, width=8, attention=(16,), z_dim=4)
    D = Discriminator(size, n_classes, width=8, attention=(16,))
    x = G(torch.randn(2, 4), y)
    assert x.shape == (2, 3, size, size) and x.abs().max() <= 1
    assert D(x, y).shape == (2,)


def test_the_paper_s_size():
    with torch.device('meta'):
        G, D = Generator(128, 0, attention=(32,)), Discriminator(128, 0, attention=(32,))
        assert G(torch.empty(1, 128)).shape == (1, 3, 128, 128)
        assert block_shapes(D, torch.empty(1, 3, 128, 128))[-1] == (1024, 4, 4)


def test_both_networks_by_hand():
    G = Generator(32, 3, width=8, attention=(16,), z_dim=4).eval()
    D = Discriminator(32, 3, width=8, attention=(16,))
    for net in (G, D):
        with torch.no_grad(): net.attention['16'].gamma.fill_(1.)
    z, y = torch.randn(2, 4), torch.tensor([0, 2])
    h = G.linear(z).reshape(2, 32, 4, 4)
    h = G.attention['16'](G.blocks[1](G.blocks[0](h, y), y))
    x = torch.tanh(G.conv(F.relu(G.bn(G.blocks[2](h, y)))))
    assert torch.allclose(G(z, y), x, atol=1e-5)
    f = D.attention['16'](D.blocks[0](x))
    for block in D.blocks[1:]: f = block(f)
    # a sum over the locations, not a mean
    assert torch.allclose(D(x, y), D.head(F.relu(f).flatten(2).sum(2), y), atol=1e-4)
    for net, inputs in ((G, (z, y)), (D, (x, y))):  # and attention matters: without it another result
        out = net(*inputs)
        with torch.no_grad(): net.attention['16'].gamma.zero_()
        assert (net(*inputs) - out).abs().max() > 1e-3


def test_weights_are_normalized_and_start_as_xavier(G, D):
    "All convolutions, linear layers and D's embedding; not G's class tables"
    for net in (G, D):
        names = [n for n, _ in net.named_parameters() if 'parametrizations' in n]
        rest = [n for n, p in net.named_parameters() if 'parametrizations' not in n and p.ndim > 1]
        assert {n.removesuffix('.parametrizations.weight.original') for n in names} == set(sigmas(net))
        assert all('.gain' in n or '.bias' in n for n in rest)
        for n in names:
            w = net.get_parameter(n)
            bound = sqrt(6/sum(nn.init._calculate_fan_in_and_fan_out(w)))
            assert .8*bound < w.abs().max() <= bound, n
    assert not rest  # D, the last of them, has no other


@pytest.mark.parametrize('net', (Generator, Discriminator))
@pytest.mark.parametrize('at', ((), (8,), (16,), (32,), (64,)))
def test_table_1_s_control_has_as_many_parameters_as_attention(net, at):
    assert numbers(net(128, 10, 8, attention=at, form='residual')) == numbers(net(128, 10, 8, attention=at))


def test_a_generator_without_spectral_norm():
    bare, normalized = [Generator(32, 10, width=8, attention=(16,), z_dim=16, sn=sn) for sn in (False, True)]
    assert sigmas(bare) == {}
    assert numbers(bare) == numbers(normalized)


def test_acgan_s_discriminator_scores_without_the_label():
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    D = Discriminator(32, 10, width=8, attention=(), head='auxiliary')
    (score, surprise), (other, _) = D(x, y), D(x, y + 1)
    assert score.shape == surprise.shape == (4,)
    assert torch.equal(score, other)


def test_a_group_s_images_are_those_of_the_group_alone():
    G = Generator(32, 10, width=8, attention=(16,), z_dim=16, bn_group=4)
    z, y = torch.randn(8, 16), torch.arange(8)
    with torch.no_grad():
        whole, alone = G(z, y), torch.cat([G(z[:4], y[:4]), G(z[4:], y[4:])])
        other = G(torch.cat([z[:4], -z[4:]]), y)
    assert torch.allclose(whole, alone, atol=1e-5)
    assert torch.allclose(other[:4], whole[:4], atol=1e-5)


# --- attention maps ---

def beta(layer, h):
    "Equation 1 by hand, (B, queries, keys), from the features h (B, C, H, W) that enter the layer"
    f, g = layer.key(h), layer.query(h)
    if layer.form == 'released': f = F.max_pool2d(f, 2)
    s = torch.einsum('bci,bcj->bij', f.flatten(2), g.flatten(2))  # s_ij, (B, keys, queries)
    return (s.exp()/s.exp().sum(1, keepdim=True)).mT


@pytest.mark.parametrize('form', forms)
@pytest.mark.parametrize('at', ((8,), (16,), (8, 16)))
def test_maps_are_equation_1_of_what_the_layer_was_given(form, at):
    nets = Generator(32, 10, 4, at, form, z_dim=8).eval(), Discriminator(32, 10, 8, at, form).eval()
    for net, x in zip(nets, (torch.randn(2, 8), torch.randn(2, 3, 32, 32))):
        entered, y = {}, torch.tensor([0, 9])
        for name, layer in net.attention.items():
            def keep(_, args, name=name): entered[f'attention.{name}'] = args[0]
            layer.register_forward_pre_hook(keep)
        plain = net(x, y)
        out, maps = attention_maps(net, x, y)
        assert torch.equal(out, plain)
        assert [m.name for m in maps] == list(entered)
        for m in maps:
            assert torch.allclose(m.beta, beta(net.get_submodule(m.name), entered[m.name]), atol=1e-6)


def test_maps_leave_the_output_alone_and_know_their_grids(G, D):
    z, x, y = torch.randn(4, 16), torch.randn(4, 3, 32, 32), torch.arange(4)
    assert torch.equal(attention_maps(G, z, y)[0], G(z, y))
    assert [(m.queries, m.keys) for m in attention_maps(D, x, y)[1]] == [((16, 16), (8, 8)), ((8, 8), (4, 4))]


def test_a_further_map_of_the_same_size():
    D, entered = Discriminator(32, 10, width=8, attention=('8-3', 16), form='released'), []
    D.blocks[3].register_forward_hook(lambda block, args, out: entered.append(out))
    maps = attention_maps(D, torch.randn(4, 3, 32, 32), torch.arange(4))[1]
    assert [m.name for m in maps] == ['attention.16', 'attention.8-3']
    assert torch.allclose(maps[1].beta, beta(D.attention['8-3'], entered[0]), atol=1e-6)


# --- samples ---

def test_samples(G):
    y = torch.arange(10)
    shapes = [x.shape for x in generate_batches(G.train(), y, batch=4)]
    assert shapes == [(4, 3, 32, 32), (4, 3, 32, 32), (2, 3, 32, 32)]
    assert G.training  # in the mode in which it was
    x = generate(G, y, seed=3)
    assert x.shape == (10, 3, 32, 32)
    assert torch.allclose(x, generate(G, y, seed=3, batch=4), atol=1e-5)
    part = torch.cat(list(generate_batches(G, y, seed=3, part=slice(2, 7))))
    assert torch.allclose(part, x[2:7], atol=1e-5)
    assert (x - generate(G, y, seed=4)).abs().max() > .01
    assert generate(Generator(32, width=8), n=3).shape == (3, 3, 32, 32)


def test_standing_statistics(G):
    y, before = torch.arange(20) % 10, {k: v.clone() for k, v in G.state_dict().items()}
    stand = standing_statistics(G, y, seed=3, batch=5)
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
    assert not stand.training and stand.bn.num_batches_tracked == 4
    # the same latents; the variance of the first batch norm by hand, from 4 batches (5, C, 4, 4)
    z = torch.randn(20, 16, generator=torch.Generator().manual_seed(3))
    h = G.linear(z).unflatten(1, (-1, 4, 4)).split(5)
    var = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in h]).mean(0)
    assert torch.allclose(stand.blocks[0].bn1.bn.running_var, var, atol=1e-5)
    # 10 and 10, not 19 and 1
    assert standing_statistics(G, y, batch=19).bn.num_batches_tracked == 2


# --- errors ---

@pytest.mark.parametrize('make,message', (
    (lambda: Generator(48), 'one of 32, 64, 128, 256'),
    (lambda: Generator(32, attention=(64,)), 'no 64x64 feature map for attention; it has 8, 16, 32'),
    (lambda: Generator(32, width=(4, 4)), 'the 4 numbers of channels of a network for 32 pixels, got (4, 4)'),
    (lambda: Generator(32, width=0), 'width must be a whole number, at least 1'),
    (lambda: Generator(128, width=4, attention=(128,)), 'divisible by 8'),
    (lambda: ResidualBlock(12), 'divisible by 8'),
    (lambda: Discriminator(32, attention=(32,)), 'it has 8, 16, 8-2, 8-3'),
    (lambda: Discriminator(32, attention=('8-4',)), 'no 8-4 feature map'),
    (lambda: Discriminator(32, attention=(), down=5), 'down must be at most 4'),
    (lambda: Discriminator(32, head='concat'), "head must be 'projection' or 'auxiliary'"),
    (lambda: Discriminator(32, attention=(), head='auxiliary'), 'at least 2 classes')))
def test_networks_that_cannot_be_built(make, message):
    with pytest.raises(ValueError) as e: make()
    assert message in str(e.value)


@pytest.mark.parametrize('use,message', (
    (lambda G, D: G(torch.randn(4, 17), torch.arange(4)), 'shape (B, 16)'),
    (lambda G, D: G(torch.randn(4, 16), torch.arange(4) + 7), 'from 0 to 9'),
    (lambda G, D: D(torch.randn(4, 3, 64, 64), torch.arange(4)), '(B, 3, 32, 32)'),
    (lambda G, D: generate(G, n=3), 'needs labels'),
    (lambda G, D: generate(G), 'the number of images is missing'),
    (lambda G, D: standing_statistics(G, torch.arange(20) % 10, batch=1), 'at least 2, got 1')))
def test_inputs_that_do_not_fit(G, D, use, message):
    with pytest.raises(ValueError) as e: use(G, D)
    assert message in str(e.value)
