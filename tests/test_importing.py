"""Checkpoints of other projects: the golden ones where they are at hand, and small ones made here by networks
written from the description of the layouts alone"""
import math, os, pickle, re, zipfile
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from safetensors.torch import load_file
from machines import posix
from sagan.attention import attention_maps
from sagan.checkpoints import load_weights, read_config, save_weights
from sagan.runs import load_run
from sagan.cli import sagan_import
from sagan.importing import import_checkpoint, import_run
from sagan.sharing import PretrainedSAGAN

GOLDEN = Path(os.environ.get('SAGAN_GOLDEN') or Path(__file__).parent.parent.parent/'shared/golden')
CASES = sorted(p.parent.name for p in GOLDEN.glob('*/expected.safetensors'))

# --- the golden files, made by the projects' own code ---

@pytest.mark.skipif(not CASES, reason='no golden checkpoints; set SAGAN_GOLDEN to their folder')
@pytest.mark.parametrize('case', CASES)
def test_golden(case, tmp_path):
    files, e = sorted(map(str, (GOLDEN/case).glob('*.pth'))), load_file(GOLDEN/case/'expected.safetensors')
    sagan_import(*files, out=str(tmp_path/'run'))
    model = load_run(tmp_path/'run').model
    y = e['y'] if model.cfg.n_classes else None
    for ending, G in (('', model.G), ('_ema', model.ema)):
        images, scores, maps = f'images{ending}', f'scores{ending}', f'attn_g{ending}'
        if images not in e: continue
        with torch.no_grad():
            x = G(e['z'], y)
            s = model.D(x, y)
        assert_close(x[:len(e[images])], e[images], 1e-4)
        assert_close(s, e[scores], 1e-3)
        check_maps(e, maps, G, e['z'], y)
    x = e['images'][:2]
    if len(x) == 2: check_maps(e, 'attn_d', model.D, x, None if y is None else y[:2])

def check_maps(e, name, net, *inputs):
    for i in range(9):
        if f'{name}{i}' not in e: return
        with torch.no_grad(): beta = attention_maps(net, *inputs)[1][i].beta
        rows = e.get(f'{name}{i}_queries', torch.arange(beta.shape[1]))
        assert_close(beta[:len(e[f'{name}{i}']), rows], e[f'{name}{i}'], 1e-5)

def assert_close(a, b, atol): assert a.shape == b.shape and (a - b).abs().max() <= atol, (a - b).abs().max()

# --- the same networks, written naively ---

class Maker:
    "Random tensors under a project's names, made when they are first asked for, and the layers that use them"
    def __init__(self, seed, form):
        self.t, self.form, self.rng = {}, form, torch.Generator().manual_seed(seed)
    def rand(self, *shape): return torch.randn(*shape, generator=self.rng)
    def get(self, name, make):
        if name not in self.t: self.t[name] = make()
        return self.t[name].float()

    def weight(self, p, *shape, form=None):
        form, n = form or self.form, shape[0]
        if form == 'T':
            M = self.get(f'{p}.weight_orig', lambda: self.rand(*shape)).reshape(n, -1)
            def near(t):
                # not converged
                return F.normalize(F.normalize(t, dim=0) + .3*F.normalize(self.rand(len(t)), dim=0), dim=0)
            u = self.get(f'{p}.weight_u', lambda: near(M @ (M.T @ self.rand(n))))
            v = self.get(f'{p}.weight_v', lambda: near(M.T @ u))
            return (M/(u @ (M @ v))).reshape(shape)
        W = self.get(f'{p}.weight', lambda: self.rand(*shape)/torch.tensor(shape[1:]).prod().sqrt())
        if form == 'plain': return W
        M, u = W.reshape(n, -1), self.get(f'{p}.u0', lambda: .5*F.normalize(self.rand(1, n), dim=1))
        self.get(f'{p}.sv0', lambda: self.rand(1).abs() + 1)
        v = (u @ M)/(u @ M).norm()
        u = (v @ M.T)/(v @ M.T).norm()
        return W/(v @ M.T @ u.T).squeeze()

    def conv(self, p, x, c, size, bias=True, form=None):
        b = self.get(f'{p}.bias', lambda: .1*self.rand(c)) if bias else None
        return F.conv2d(x, self.weight(p, c, x.shape[1], size, size, form=form), b, padding=size//2)

    def attention(self, p, names, x, maps, form=None):
        theta, phi, g, o, gamma = [f'{p}.{n}' for n in names]
        B, C, H, W = x.shape
        q = self.conv(theta, x, C//8, 1, False, form).reshape(B, C//8, H*W)
        k = F.max_pool2d(self.conv(phi, x, C//8, 1, False, form), 2).reshape(B, C//8, H*W//4)
        v = F.max_pool2d(self.conv(g, x, C//2, 1, False, form), 2).reshape(B, C//2, H*W//4)
        beta = torch.softmax(torch.einsum('bcq,bck->bqk', q, k), 2)
        maps.append(beta)
        out = torch.einsum('bck,bqk->bcq', v, beta).reshape(B, C//2, H, W)
        shape = (1,) if gamma.endswith('sigma') else ()
        return x + self.get(gamma, lambda: torch.full(shape, .7))*self.conv(o, out, C, 1, False, form)

def statistics(m, p, x, eps, word, tracked):
    "Standardised x by the running averages under p"
    C = x.shape[1]
    mean = m.get(f'{p}.{word}_mean', lambda: .3*m.rand(C))
    var = m.get(f'{p}.{word}_var', lambda: m.rand(C).abs() + .3)
    if tracked: m.get(f'{p}.num_batches_tracked', lambda: torch.tensor(7))
    return (x - mean[:, None, None])/(var[:, None, None] + eps).sqrt()

BG = dict(
    name='BG', form='A', first='linear', block='blocks.{i}.0', attention='blocks.{i}.1',
    convs=('conv1', 'conv2', 'conv_sc'), norms=('bn1', 'bn2'), att=('theta', 'phi', 'g', 'o', 'gamma'),
    last=('output_layer.0', 'output_layer.2'), head=('linear', 'embed'),
    stats=('', 'stored'), eps=1e-5, relu=False)
ST = dict(
    name='ST', form='T', first='linear0', block='blocks.{j}.0', attention='blocks.{j}.0',
    convs=('conv2d1', 'conv2d2', 'conv2d0'), norms=('bn1', 'bn2'),
    att=('conv1x1_theta', 'conv1x1_phi', 'conv1x1_g', 'conv1x1_attn', 'sigma'),
    last=('bn4', 'conv2d5'), head=('linear1', 'embedding'),
    stats=('.bn', 'running'), eps=1e-4, relu=True)
MM = dict(
    name='MM', form='T', first='noise2feat', block='conv_blocks.{j}', attention='conv_blocks.{j}',
    convs=('conv_1.conv', 'conv_2.conv', 'shortcut.conv'), norms=('norm_1', 'norm_2'),
    att=('theta.conv', 'phi.conv', 'g.conv', 'o.conv', 'gamma'),
    last=('to_rgb.bn', 'to_rgb.conv'), head=('decision', 'proj_y'),
    stats=('.norm', 'running'), eps=1e-4, relu=False)

def cbn(m, P, p, x, y, n, tables, eps):
    "Conditional batch norm with the tables in one of the forms in which the projects keep them"
    C, (sub, word) = x.shape[1], P['stats']
    if tables == 'none':
        h = statistics(m, p, x, eps, 'running', True)
        scale = m.get(f'{p}.weight', lambda: 1 + .2*m.rand(C))
        shift = m.get(f'{p}.bias', lambda: .2*m.rand(C))
        return h*scale[:, None, None] + shift[:, None, None]
    h = statistics(m, p + sub, x, eps, word, word == 'running')
    plain, rows = ('gain', 'bias'), ('embed0', 'embed1')
    if P['name'] == 'MM': plain = rows = 'weight_embedding', 'bias_embedding'
    if tables == 'plain': gain, bias = [m.weight(f'{p}.{k}', n, C, form='plain') for k in plain]
    if tables == 'rows': gain, bias = [m.weight(f'{p}.{k}', n, C) for k in rows]
    if tables == 'columns': gain, bias = [m.weight(f'{p}.{k}', C, n).T for k in ('gain', 'bias')]
    if tables == 'shared':
        shared = m.get('shared.weight', lambda: m.rand(n, 6))
        gain, bias = [shared @ m.weight(f'{p}.{k}', C, 6).T for k in ('gain', 'bias')]
    return h*(1 + gain[y])[:, :, None, None] + bias[y][:, :, None, None]

def run_G(m, P, z, y, ch, at, n, tables, eps=None, out_eps=None):
    """Images and attention maps of a generator of project P

    ch: channels at 4x4 and after each block; at: blocks that attention follows"""
    maps, j, eps = [], 0, eps or P['eps']
    def twice(t): return t.repeat_interleave(2, 2).repeat_interleave(2, 3)
    W = m.weight(P['first'], 16*ch[0], z.shape[1])
    x = F.linear(z, W, m.get(f'{P["first"]}.bias', lambda: .1*m.rand(16*ch[0]))).reshape(-1, ch[0], 4, 4)
    for i, c in enumerate(ch[1:]):
        p, (c1, c2, sc), (n1, n2) = P['block'].format(i=i, j=j), P['convs'], P['norms']
        h = twice(torch.relu(cbn(m, P, f'{p}.{n1}', x, y, n, tables, eps)))
        h = torch.relu(cbn(m, P, f'{p}.{n2}', m.conv(f'{p}.{c1}', h, c, 3), y, n, tables, eps))
        x = m.conv(f'{p}.{c2}', h, c, 3) + m.conv(f'{p}.{sc}', twice(x), c, 1)
        j += 1
        if i in at:
            x = m.attention(P['attention'].format(i=i, j=j), P['att'], x, maps)
            j += 1
    bn, conv = P['last']
    sub, word = P['stats'] if P['name'] == 'BG' else ('', 'running')
    h = statistics(m, bn + sub, x, out_eps or (1e-5 if P['name'] == 'BG' else eps), word, word == 'running')
    C, gain = x.shape[1], 'gain' if P['name'] == 'BG' else 'weight'
    scale, shift = m.get(f'{bn}.{gain}', lambda: 1 + .2*m.rand(C)), m.get(f'{bn}.bias', lambda: .2*m.rand(C))
    return torch.tanh(m.conv(conv, torch.relu(h*scale[:, None, None] + shift[:, None, None]), 3, 3)), maps

def run_D(m, P, x, y, ch, down, at, n, relu=None, att_form=None):
    "Scores and attention maps of a discriminator; down: which blocks pool"
    maps, j, relu, (c1, c2, sc) = [], 0, P['relu'] if relu is None else relu, P['convs']
    for i, (c, pool) in enumerate(zip(ch, down)):
        p = 'from_rgb' if P['name'] == 'MM' and i == 0 else P['block'].format(i=i, j=j)
        half = (lambda t: F.avg_pool2d(t, 2)) if pool else (lambda t: t)
        if i == 0:
            h = half(m.conv(f'{p}.{c2}', torch.relu(m.conv(f'{p}.{c1}', x, c, 3)), c, 3))
            x = h + m.conv(f'{p}.{sc}', half(x), c, 1)
        else:
            start = torch.relu(x) if relu else x
            skip = half(m.conv(f'{p}.{sc}', start, c, 1)) if pool or c != x.shape[1] else start
            x = half(m.conv(f'{p}.{c2}', torch.relu(m.conv(f'{p}.{c1}', torch.relu(x), c, 3)), c, 3)) + skip
        if P['name'] != 'MM' or i: j += 1
        if i in at:
            x = m.attention(P['attention'].format(i=i, j=j), P['att'], x, maps, att_form if i else None)
            j += 1
    h, (linear, embed) = torch.relu(x).sum((2, 3)), P['head']
    s = F.linear(h, m.weight(linear, 1, len(h[0])), m.get(f'{linear}.bias', lambda: m.rand(1)))[:, 0]
    return (s if not n else s + (m.weight(embed, n, len(h[0]))[y]*h).sum(1)), maps

DOWN = {32: [1, 1, 0, 0], 64: [1]*4 + [0], 128: [1]*5 + [0], 256: [1]*6 + [0]}

def pair(P, seed, size, g, d, g_at, d_at, n, tables, z_dim=5, g_form=None, **kw):
    "G and D of a project with random numbers, their inputs and what they give"
    G, D = Maker(seed, g_form or P['form']), Maker(seed + 1, g_form or P['form'])
    z = torch.randn(2, z_dim, generator=torch.Generator().manual_seed(seed))
    y = torch.tensor([0, max(n - 1, 0)])
    down = [1]*5 if P['name'] == 'MM' and size == 64 else DOWN[size]
    x, g_maps = run_G(G, P, z, y, g, g_at, n, tables, kw.get('eps'), kw.get('out_eps'))
    s, d_maps = run_D(D, P, x, y, d, down, d_at, n, kw.get('relu'), kw.get('att_form'))
    return G.t, D.t, z, (y if n else None), x, s, g_maps, d_maps

def check(model, G, z, y, x, s=None, g_maps=(), d_maps=()):
    with torch.no_grad():
        out, maps = attention_maps(G, z, y) if g_maps else (G(z, y), [])
        assert x.std() > .05 and x.abs().median() < .99  # not saturated, so that mistakes show
        assert_close(out, x, 1e-4)
        assert len(maps) == len(g_maps)
        for m, beta in zip(maps, g_maps): assert_close(m.beta, beta, 1e-5)
        if s is None: return
        score, maps = attention_maps(model.D, x, y) if d_maps else (model.D(x, y), [])
        assert_close(score, s, 1e-4*s.abs().max().item() + 1e-4)
        assert len(maps) == len(d_maps)
        for m, beta in zip(maps, d_maps): assert_close(m.beta, beta, 1e-5)

@pytest.mark.parametrize('seed, size, g, d, g_at, d_at, tables, stats', [
    (0, 32, (8, 8, 12, 9), (8, 10, 8, 8), (0, 1, 2), (0, 1, 2, 3), 'plain', ('', 'stored')),
    (1, 64, (16, 16, 8, 8, 3), (4, 8, 12, 8, 8), (0, 2), (1, 4), 'shared', ('', 'stored')),
    (2, 32, (8, 6, 8, 5), (5, 5, 8, 8), (1,), (2, 3), 'plain', ('.bn', 'running')),      # cross_replica
    (3, 32, (8, 6, 8, 5), (5, 5, 8, 8), (), (), 'shared', ('.bn', 'stored')),            # mybn
    (4, 128, (6, 6, 8, 6, 4, 2), (8, 8, 6, 6, 4, 4), (1,), (0, 1), 'plain', ('', 'stored')),
    (5, 256, (6, 6, 8, 6, 4, 3, 2), (2, 3, 8, 6, 4, 4, 4), (1,), (2,), 'plain', ('', 'stored'))])
def test_biggan_pytorch(tmp_path, seed, size, g, d, g_at, d_at, tables, stats):
    G, D, z, y, *expected = pair(BG | dict(stats=stats), seed, size, g, d, g_at, d_at, 3, tables)
    if stats == ('.bn', 'stored'):
        means = [k for k in G if k.endswith('stored_mean')]
        G |= {k.replace('stored_mean', 'accumulation_counter'): torch.zeros(1) for k in means}
    torch.save(G, tmp_path/'G.pth')
    torch.save(D, tmp_path/'D.pth')
    model, _ = import_checkpoint(tmp_path/'G.pth', tmp_path/'D.pth')
    check(model, model.G, z, y, *expected)
    check(model, model.ema, z, y, expected[0])

SMALL = dict(size=32, g=(8, 6, 8, 5), d=(5, 8, 8, 8), g_at=(1,), d_at=(1,), n=3)

def test_biggan_pytorch_average_bookkeeping_and_order_of_files(tmp_path):
    G, D, z, y, *expected = pair(BG, 10, **SMALL, tables='plain')
    E, _, z2, _, x2, *_ = pair(BG, 20, **SMALL, tables='plain')
    bookkeeping = dict(itr=1234, epoch=5, save_num=0, save_best_num=1, best_IS=7.5, best_FID=20.5,
                       config=dict(G_ch=2, G_activation=torch.nn.ReLU()))
    for name, t in dict(G=G, D=D, G_ema_best0=E, state_dict=bookkeeping).items():
        torch.save(t, tmp_path/f'{name}.pth')
    model, about = import_checkpoint(*[tmp_path/f'{n}.pth' for n in ('state_dict', 'G_ema_best0', 'D', 'G')])
    assert about['step'] == 1234
    check(model, model.G, z, y, *expected)
    check(model, model.ema, z2, y, x2)
    model, _ = import_checkpoint(tmp_path/'G_ema_best0.pth')
    assert model.D is None
    check(model, model.G, z2, y, x2)
    check(model, model.ema, z2, y, x2)
    model, _ = import_checkpoint(tmp_path/'D.pth')
    assert model.G is None and model.ema is None
    with torch.no_grad():
        assert_close(model.D(expected[0], y), expected[1], 1e-4*expected[1].abs().max().item() + 1e-4)

def test_biggan_pytorch_accumulated_statistics_are_sums(tmp_path):
    G, D, z, y, *expected = pair(BG | dict(stats=('.bn', 'stored')), 11, **SMALL, tables='plain')
    for k in [k for k in G if '.stored_' in k]:
        G[k] = 4*G[k]
        G[k.rpartition('.')[0] + '.accumulation_counter'] = torch.tensor([4.])
    torch.save(G, tmp_path/'G.pth')
    model, _ = import_checkpoint(tmp_path/'G.pth')
    check(model, model.G, z, y, expected[0])

def test_eps_is_of_the_conditional_norms_only_in_biggan_pytorch(tmp_path):
    G, _, z, y, x, *_ = pair(BG, 12, **SMALL, tables='plain', eps=.05)
    torch.save(G, tmp_path/'G.pth')
    model, _ = import_checkpoint(tmp_path/'G.pth', eps=.05)
    check(model, model.G, z, y, x)
    model, _ = import_checkpoint(tmp_path/'G.pth')
    with torch.no_grad(): assert (model.G(z, y) - x).abs().max() > 1e-3

def test_weights_without_spectral_norm_are_used_as_they_are(tmp_path):
    G, D, z, y, *expected = pair(BG, 13, **SMALL, tables='plain', g_form='plain')
    torch.save(G, tmp_path/'G.pth')
    torch.save(D, tmp_path/'D.pth')
    model, _ = import_checkpoint(tmp_path/'G.pth', tmp_path/'D.pth')
    assert not model.cfg.g_sn
    check(model, model.G, z, y, *expected)

@pytest.mark.parametrize('seed, size, g, d, g_at, d_at, n, tables', [
    (30, 32, (8, 10, 8, 8), (8, 8, 8, 8), (1,), (0,), 3, 'columns'),
    (31, 64, (16, 8, 12, 8, 3), (3, 8, 8, 12, 6), (1, 2), (1, 3), 4, 'columns'),
    (32, 32, (8, 10, 8, 8), (8, 8, 9, 8), (0, 1), (2, 3), 3, 'rows'),                     # legacy
    (33, 64, (16, 8, 8, 8, 3), (3, 8, 8, 12, 6), (2,), (), 3, 'shared'),                # interim
    (34, 32, (8, 10, 8, 8), (8, 8, 8, 8), (1,), (0,), 0, 'none'),                       # unconditional
    (35, 128, (6, 6, 8, 8, 4, 2), (2, 4, 8, 8, 6, 6), (1, 2), (2,), 0, 'none'),
    (36, 256, (6, 6, 8, 6, 4, 3, 2), (2, 3, 8, 6, 4, 4, 4), (1,), (2,), 2, 'columns')])
def test_studiogan(tmp_path, seed, size, g, d, g_at, d_at, n, tables):
    G, D, z, y, *expected = pair(ST, seed, size, g, d, g_at, d_at, n, tables)
    files = [tmp_path/f'model={k}-best-weights-step=1000.pth' for k in 'GD']
    optimizer = dict(state={}, param_groups=[])
    torch.save(dict(state_dict=G, optimizer=optimizer), files[0])
    torch.save(dict(state_dict=D, optimizer=optimizer, step=1000, epoch=2, best_fid=np.float64(20.5),
                    lecam_emas=None), files[1])
    model, about = import_checkpoint(*files)
    assert about['step'] == 1000 and model.cfg.n_classes == n
    check(model, model.G, z, y, *expected)

@pytest.mark.parametrize('seed, size, g, d, g_at, d_at, n, tables, more', [
    (50, 32, (8, 8, 9, 8), (8, 8, 8, 8), (1,), (0,), 3, 'plain', {}),
    (51, 64, (16, 8, 8, 8, 4), (4, 8, 8, 10, 12), (0, 2), (1, 4), 3, 'plain', {}),       # D's last map is 2x2
    (52, 64, (16, 8, 8, 8, 4), (8, 8, 8, 10, 12), (), (0, 2), 3, 'rows', dict(att_form='A')),
    (53, 128, (8, 6, 8, 8, 4, 2), (8, 4, 6, 6, 6, 6), (2,), (0,), 4, 'plain', {}),
    (54, 32, (8, 8, 9, 8), (8, 8, 8, 8), (1,), (0, 1), 3, 'rows', dict(relu=True))])
def test_mmgeneration(tmp_path, seed, size, g, d, g_at, d_at, n, tables, more):
    eps, bgr = 1e-5 if tables == 'plain' else 1e-4, seed != 54
    G, D, z, y, *expected = pair(MM | dict(eps=eps), seed, size, g, d, g_at, d_at, n, tables, **more)
    E, _, z2, _, x2, *_ = pair(MM | dict(eps=eps), seed + 9, size, g, d, g_at, d_at, n, tables)
    saved = {f'generator.{k}': t for k, t in G.items()} | {f'discriminator.{k}': t for k, t in D.items()}
    if seed != 54:
        several = seed % 2  # as of several GPUs
        saved |= {f'generator_ema.{"module."*several}{k}': t for k, t in E.items()}
        if several: saved['generator_ema.steps'] = torch.tensor(9)
    torch.save(dict(state_dict=saved, meta=dict(iter=826000, mmgen_version='0.7.3')), tmp_path/'sagan.pth')
    given = dict(relu_skip=more.get('relu'), bgr=None if bgr else False)
    model, about = import_checkpoint(tmp_path/'sagan.pth', **given)
    assert about['step'] == 826000
    if bgr:  # the file's networks put out and take blue, green, red
        expected[0], x2 = expected[0].flip(1), x2.flip(1)
    check(model, model.G, z, y, *expected)
    if seed != 54: check(model, model.ema, z2, y, x2)

# --- round trip and refusals ---

@pytest.fixture
def files(tmp_path):
    "{name: state dict} of a small BigGAN-PyTorch pair, and a function that writes them and tries to import"
    G, D, *_ = pair(BG, 70, **SMALL, tables='plain')
    def attempt(**changed):
        for k, t in (dict(G=G, D=D) | changed).items(): torch.save(t, tmp_path/f'{k}.pth')
        return sagan_import(str(tmp_path/'G.pth'), str(tmp_path/'D.pth'), out=str(tmp_path/'run'))
    return G, D, attempt, tmp_path

def test_our_format_and_back_is_exact(files):
    G, D, attempt, tmp = files
    (tmp/'names.txt').write_text('cat\ndog\nhorse\n', encoding='utf-8')
    torch.save(G, tmp/'G.pth')
    torch.save(D, tmp/'D.pth')
    sagan_import(str(tmp/'G.pth'), str(tmp/'D.pth'), out=str(tmp/'run'), classes=str(tmp/'names.txt'))
    model, _ = import_checkpoint(tmp/'G.pth', tmp/'D.pth')
    run = load_run(tmp/'run')
    assert run.classes == ['cat', 'dog', 'horse'] and run.cfg == model.cfg and run.cfg.g_width == (8, 6, 8, 5)
    assert read_config(tmp/'run')[2] == dict(
        imported_from=['G.pth', 'D.pth'], project='BigGAN-PyTorch', eps=None, bgr=False, relu_skip=False)
    card = PretrainedSAGAN.from_pretrained(tmp/'run').generate_model_card()
    assert 'BigGAN-PyTorch: G.pth, D.pth' in str(card), card
    for k, t in model.state_dict().items(): assert torch.equal(t, run.model.state_dict()[k]), k
    save_weights(tmp/'again.safetensors', run.model, 0)
    for k, t in load_weights(tmp/'again.safetensors')[0].state_dict().items():
        assert torch.equal(t, model.state_dict()[k]), k

@pytest.fixture
def refused(files, capsys):
    "Function that imports changed files, or calls `by`, and expects a message with these words and no run"
    *_, attempt, tmp = files
    def refused(*words, by=attempt, **changed):
        with pytest.raises(SystemExit) as e: by(**changed)
        message = capsys.readouterr().err
        assert e.value.code == 1 and not (tmp/'run').exists()
        for w in words: assert w in message, message
    return refused

def of_each_kind(names):
    "The first and the last of names that differ in numbers alone"
    kinds = {}
    for name in names: kinds.setdefault(re.sub(r'\d+', '', name), []).append(name)
    return sorted({name for found in kinds.values() for name in (found[0], found[-1])})

def test_any_missing_extra_or_misshapen_tensor_is_refused_by_name(files, refused):
    G, D, attempt, tmp = files
    def without(own, *names): return {k: t for k, t in own.items() if k not in names}
    for name, own in dict(G=G, D=D).items():
        for k in of_each_kind(own): refused(f'{name}.pth: {k} is missing', **{name: without(own, k)})
        for k in list(own)[::7]:
            t = own[k]
            wrong = torch.cat([t, t]) if t.ndim else t.repeat(2)
            refused(f'{name}.pth', 'has shape', 'expected', **{name: own | {k: wrong}})
        for k in ('blocks.0.0.conv3.weight', 'linear.weight_u', 'blocks.9.0.conv1.weight',
                  'blocks.0.0.bn1.more', 'extra'):
            refused(f'{name}.pth', **{name: own | {k: torch.zeros(3)}})
    bias, var = 'blocks.1.0.conv2.bias', 'blocks.0.0.bn1.stored_var'
    refused(f'{bias} is missing', G=without(G, bias))
    refused(f'{bias} has shape (4,), expected (8,)', G=G | {bias: torch.zeros(4)})
    refused('extra does not belong', G=G | {'extra': torch.zeros(4)})
    refused(f'{var} has numbers that are not finite', G=G | {var: torch.full((8,), torch.nan)})
    refused(f'{var} has negative variances', G=G | {var: -G[var]})
    refused(f'{bias} is not a plain tensor of numbers', G=G | {bias: torch.zeros(8).to_sparse()})

def test_other_models_are_refused(files, refused):
    G, D, attempt, tmp = files
    shared = pair(BG, 71, **SMALL, tables='shared')[0]
    def is_table(k): return '.gain.weight' in k or '.bn1.bias.weight' in k
    hier = {k: torch.cat([t, t[:, :2]], 1) if is_table(k) else t for k, t in shared.items()}
    refused('bn1.gain.weight has shape (8, 8), expected (8, 6)', 'BigGAN', G=hier)
    deep = {k.replace('blocks.0.0', 'blocks.0.1'): t for k, t in G.items() if 'blocks.0.0' in k}
    refused('conv3.weight does not belong', G=G | deep | {'blocks.0.0.conv3.weight': torch.zeros(8, 8, 3, 3)})
    resnet = {'conv1.weight': torch.zeros(64, 3, 7, 7), 'fc.bias': torch.zeros(10)}
    refused("it begins with 'conv1.weight'", G=resnet)
    refused('not a SAGAN of BigGAN-PyTorch, PyTorch-StudioGAN, mmgeneration', G=resnet)
    style = {'generator.mapping.weight': torch.zeros(3)}
    refused('generator.mapping.weight does not belong to a SAGAN', G=style)
    refused('state of an optimizer', G=dict(state={}, param_groups=[dict(lr=1e-4)]))
    refused('both hold a generator', D=G)
    refused('n_classes is 4', D=pair(BG, 72, **SMALL | dict(n=4), tables='plain')[1])
    refused('expected a dictionary', G=[torch.zeros(3)])
    small = {k: t for k, t in G.items() if not k.startswith('blocks.2')}
    refused('blocks make a generator for 16 pixels', G=small)

def test_what_classes_share_is_missing(tmp_path):
    wide = SMALL | dict(g=(8, 8, 8, 8), d=(8, 8, 8, 8))
    for project, tables in ((BG, 'shared'), (ST, 'shared')):
        G, D, *_ = pair(project, 73, **wide, tables=tables, z_dim=6)
        del G['shared.weight']
        torch.save(G, tmp_path/'G.pth')
        torch.save(D, tmp_path/'D.pth')
        for files in (['G'], ['G', 'D']):
            alone = project is BG or len(files) == 1
            with pytest.raises(ValueError, match='shared.weight is missing' if alone else 'n_classes is'):
                import_checkpoint(*[tmp_path/f'{f}.pth' for f in files])

def test_networks_of_two_projects_and_half_a_spectral_norm(files, refused):
    G, D, attempt, tmp = files
    def without_norm(own, p): return {k: t for k, t in own.items() if k not in (f'{p}.u0', f'{p}.sv0')}
    studio = pair(ST, 74, **SMALL, tables='columns')[1]
    refused("it comes from PyTorch-StudioGAN, the other from BigGAN-PyTorch", D=studio)
    refused('blocks.1.0.conv1.u0 is missing', G=without_norm(G, 'blocks.1.0.conv1'))
    twice = G['linear.weight'].repeat(2, 1)
    refused('linear.u0 has shape', 'beside linear.weight of shape', G=G | {'linear.weight': twice})
    refused('is 0 everywhere', D=without_norm(D, 'embed') | {'embed.weight': 0*D['embed.weight']})

def test_of_several_gpus(files):
    G, D, attempt, tmp = files
    torch.save(dict(model={f'module.{k}': t for k, t in G.items()}), tmp/'G.pth')
    torch.save(D, tmp/'D.pth')
    torch.save(G, tmp/'plain.pth')
    a, b = [import_checkpoint(tmp/f, tmp/'D.pth')[0].state_dict() for f in ('G.pth', 'plain.pth')]
    assert all(torch.equal(a[k], b[k]) for k in b)

class Code:
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.system, (f'touch {self.file}',)

def test_files_that_are_not_whole_or_hold_code_are_refused(files, refused):
    G, D, attempt, tmp = files
    refused('system', 'could execute code', G=G | {'meta': Code(tmp/'made')})
    module = dict(itr=3, config=torch.nn.Sequential())
    refused('torch.nn.modules.container.Sequential', 'could execute code', G=module)
    def damaged(data, *words):
        (tmp/'G.pth').write_bytes(data)
        refused(*words, by=lambda: sagan_import(str(tmp/'G.pth'), out=str(tmp/'run')))
    damaged(pickle.dumps(Code(tmp/'made')), 'not a complete', 'nothing in it was executed')
    damaged(pickle.dumps(Code(tmp/'made'), protocol=2), 'G.pth', 'could execute code')
    for legacy in (True, False):
        torch.save(G, tmp/'whole.pth', _use_new_zipfile_serialization=not legacy)
        whole = (tmp/'whole.pth').read_bytes()
        for n in (0, 10, 300, len(whole)//2, len(whole) - 5):
            damaged(whole[:n], 'G.pth is not a complete PyTorch file')
        assert import_checkpoint(tmp/'whole.pth')[0].G is not None
    at = whole.index(G['linear.bias'].numpy().tobytes()[:16])
    damaged(whole[:at] + b'\0' + whole[at+1:], 'not a complete')   # one byte of a weight
    damaged(b'no pickle at all', 'not a complete')
    assert not (tmp/'made').exists()

@posix
def test_command_line_refusals_leave_nothing(files, refused):
    G, D, attempt, tmp = files
    (tmp/'two.txt').write_text('a\nb\n', encoding='utf-8')
    torch.save(G, tmp/'G.pth')
    file, out = str(tmp/'G.pth'), str(tmp/'run')
    refused('--out', by=lambda: sagan_import(file))
    refused('3 classes', by=lambda: sagan_import(file, out=out, classes=str(tmp/'two.txt')))
    (tmp/'twice.txt').write_text('a\nb\na\n', encoding='utf-8')
    (tmp/'latin.txt').write_bytes(b'caf\xe9\nb\nc\n')
    os.mkfifo(tmp/'pipe')
    for name, words in {'twice.txt': "twice.txt has the name 'a' twice", 'pipe': 'no file',
                        'latin.txt': 'latin.txt is not text in UTF-8'}.items():
        refused(words, by=lambda: sagan_import(file, out=out, classes=str(tmp/name)))
    refused('no file', by=lambda: sagan_import(str(tmp/'pipe'), out=out))
    refused('no file nowhere', by=lambda: sagan_import('nowhere', out=out))
    (tmp/'run').mkdir()
    (tmp/'run/mine').touch()
    with pytest.raises(SystemExit): attempt()
    assert [f.name for f in (tmp/'run').iterdir() if not f.name.startswith('.')] == ['mine']

def test_a_disk_that_is_full_leaves_nothing(files, refused, monkeypatch):
    _, _, attempt, tmp = files
    def full(*_): raise OSError('no space left on device')
    monkeypatch.setattr('sagan.importing.write_config', full)
    refused('run cannot be created: no space left')
    assert not [f for f in tmp.iterdir() if f.is_dir()]


def test_arguments_and_names_of_files(files):
    G, D, attempt, tmp = files
    studio = pair(ST, 75, **SMALL, tables='columns')
    for name, t in dict(G=studio[0], D=studio[1]).items(): torch.save(t, tmp/f'{name}.pth')
    with pytest.raises(ValueError, match='eps must be finite'): import_checkpoint(tmp/'G.pth', eps=math.inf)
    mm = pair(MM, 76, **SMALL, tables='plain')
    saved = {f'generator.{k}': t for k, t in mm[0].items()}
    saved |= {f'discriminator.{k}': t for k, t in mm[1].items()}
    for name, bgr, relu_skip in (('sagan_32', True, False), ('sagan_32_convert-studio-rgb', False, True),
                                 ('sagan_32_wReLUinplace', True, True)):
        torch.save(dict(state_dict=saved), tmp/f'{name}.pth')
        about = import_checkpoint(tmp/f'{name}.pth')[1]
        assert (about['bgr'], about['relu_skip']) == (bgr, relu_skip)


def test_numbers_that_would_not_be_finite_and_shapes_without_numbers(files, refused):
    "Also in float32 only, or after the division; and what would take all memory is not allocated"
    G, D, attempt, tmp = files
    bias, conv, gain = 'blocks.1.0.conv2.bias', 'blocks.1.0.conv1.weight', 'blocks.0.0.bn1.gain.weight'
    refused(f'{bias} has numbers that are not finite', G=G | {bias: G[bias].double()*1e300})
    refused(f'{conv} would be divided by', G=G | {conv: G[conv]*1e-42})
    refused(f'{conv} would be divided by', G=G | {conv: G[conv]*1e37})
    refused(f'{gain} has shape (1000000000, 0) and holds no numbers', G=G | {gain: torch.zeros(10**9, 0)})
    wide = {k: torch.zeros(1, 1).expand(10**9, 1) for k in ('linear.weight',)}
    refused('linear.weight is not a plain tensor', G=G | wide)
    rows = 60_000  # each alone is small, but our network of these widths would take terabytes
    wide = {f'blocks.{i}.0.conv1.weight': torch.ones(rows, 1, 1, 1) for i in range(3)}
    refused('has shape', 'expected', G=G | wide)
    evil = 'blocks.9\x1b[31m' + 'x'*1000
    refused(r"G.pth: 'blocks.9\x1b[31mxxx", by=lambda: attempt(G=G | {evil: torch.zeros(3)}))


def test_an_archive_that_holds_more_than_its_size(files, refused):
    G, _, _, tmp = files
    with zipfile.ZipFile(tmp/'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('a/data.pkl', bytes(10**7))
    assert (tmp/'bomb.pth').stat().st_size < 20_000
    refused('bomb.pth is not a complete', by=lambda: sagan_import(str(tmp/'bomb.pth'), out=str(tmp/'run')))


@pytest.mark.parametrize('text', [
    b'cat\ndog\nhorse', b'\xef\xbb\xbfcat\r\ndog\r\n\r\nhorse\r\n', 'cat\ndog\x1c\u2028s\nhorse\n'.encode()])
def test_names_of_classes(files, text):
    "With the mark of Windows's editors, its ends of lines, and separators within a name"
    G, _, _, tmp = files
    torch.save(G, tmp/'G.pth')
    (tmp/'names.txt').write_bytes(text)
    run = load_run(import_run(tmp/'G.pth', out=tmp/'run', classes=tmp/'names.txt', tell=lambda text: None))
    assert (run.classes[0], run.classes[2], len(run.classes)) == ('cat', 'horse', 3)


@pytest.mark.parametrize('arguments, message', [
    (dict(classes=[1, 2, 3]), 'names must be strings, got 1'), (dict(classes=3), 'classes must be a list'),
    (dict(eps='small'), "eps must be finite and not negative, got 'small'"), (dict(eps=math.nan), 'eps must'),
    (dict(bgr='no'), "bgr must be a bool or None, got 'no'")])
def test_arguments_of_the_wrong_kind(files, arguments, message):
    G, _, _, tmp = files
    torch.save(G, tmp/'G.pth')
    with pytest.raises(ValueError, match=message): import_run(tmp/'G.pth', out=tmp/'run', **arguments)
    assert [f.name for f in tmp.iterdir()] == ['G.pth']


@pytest.mark.parametrize('there', [False, True])
@posix
def test_an_import_that_is_killed_can_be_repeated(files, there):
    "At any moment: there is no run or a whole one, and nothing is left beside it in the end"
    G, _, _, tmp = files
    torch.save(G, tmp/'G.pth')
    out = tmp/'made'/'run'
    if there: out.mkdir(parents=True)
    def attempt(): return import_run(tmp/'G.pth', out=out, tell=lambda text: None)
    for function in ('_fsync', 'os.replace', 'os.rename', '_move_files'):
        if not (pid := os.fork()):
            with pytest.MonkeyPatch.context() as m:
                m.setattr(f'sagan.storage.{function}', lambda *_: os._exit(9))
                attempt()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] in (9 << 8, 0)
        assert not (out/'config.json').exists() or load_run(out)
        if not there: assert not out.exists() or load_run(out)
        if (out/'config.json').exists(): break
    else: attempt()
    assert load_run(out).classes == ['0', '1', '2']
    assert {f.name for f in out.iterdir()} == {'config.json', 'weights.safetensors'}
    assert {f.name for f in tmp.iterdir()} == {'G.pth', 'made'}
    assert [f.name for f in (tmp/'made').iterdir()] == ['run']


def test_an_import_cut_off_by_an_earlier_version(files):
    "It left a configuration without weights"
    G, _, _, tmp = files
    torch.save(G, tmp/'G.pth')
    def attempt(): return import_run(tmp/'G.pth', out=tmp/'run', tell=lambda text: None)
    weights = attempt()/'weights.safetensors'
    kept = load_file(weights)
    weights.unlink()
    (tmp/'run/.lock').touch()
    with pytest.raises(FileNotFoundError, match='its import was interrupted; run the same sagan-import'):
        load_run(tmp/'run')
    attempt()
    again = load_file(weights)
    assert load_run(tmp/'run') and again.keys() == kept.keys() and all(again[k].equal(kept[k]) for k in kept)
    with pytest.raises(FileExistsError, match='already holds a run'): attempt()
