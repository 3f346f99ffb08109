"Figures and measures of attention: by hand, by other implementations, errors, and facts of the shipped runs"
import base64, io, math

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from matplotlib.colors import to_rgb
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from PIL import Image
from scipy.stats import rankdata
from sagan.agreement import agreement
from sagan.attention import attention_maps, attention_weights, AttentionMap, intervene, SelfAttention
from sagan.curves import label_line_ends, line_style, training_figure
from sagan.data import digits, load_images, to_bytes, to_unit, twin_colours
from sagan.evaluation import nearest_images
from sagan.pages import report_html
from sagan.runs import load_run, shipped
from sagan.statistics import _centers, _colors, _correlation, _ranks, map_statistics
from sagan.visualization import (
    attention_figure, class_rows, effect_figure, grid_image, nearest_figure, POINT_COLOURS, spread_points)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


@pytest.fixture(scope='module')
def runs(): return {name: load_run(shipped(name)) for name in ('digits', 'twins')}


def random_latents(n, seed): return torch.randn(n, 128, generator=torch.Generator().manual_seed(seed))


# Grids of images

def six(): return torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 3, 4, 4)


def test_grid_image():
    "Row by row, with lines of 2 pixels"
    x = six()
    assert grid_image(x, 3).size == (3*6 + 2, 2*6 + 2)
    seen = [grid_image(x, 3).getpixel((2 + 6*i, 2 + 6*j))[0] for j in range(2) for i in range(3)]
    assert seen == to_bytes(x[:, 0, 0, 0]).tolist()


def test_rows_that_are_not_full():
    with pytest.raises(ValueError, match='6 images cannot fill 10 rows'):
        class_rows(six(), list('0123456789'))


def test_nearest_figure():
    "Each real image finds itself"
    real = to_unit(digits().x[:100])
    found, distance = nearest_images(real[:4], digits()[:100], k=2)
    fig = nearest_figure(real[:4], real[found], distance)
    assert [ax.get_xlabel() for ax in fig.axes[4:8]] == ['0.00']*4
    with pytest.raises(ValueError, match='must have a row'): nearest_figure(real[:3], real[found], distance)


# Points and maps

MISSING = dict(
    long=[[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
    medium=[[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]])


@pytest.mark.parametrize('cone', MISSING)
def test_points_stay_apart_for_color_blind_readers(cone):
    "By the linear map of linear RGB of Machado and others (2009); red and green of the same lightness do not"
    def closest(colors, M):
        linear = torch.tensor([to_rgb(c) for c in colors])**2.2
        return torch.pdist(linear @ torch.tensor(M).T).min().item()
    everything = torch.eye(3).tolist()
    def kept(colors): return closest(colors, MISSING[cone])/closest(colors, everything)
    assert kept(POINT_COLOURS[:3]) > .5
    assert kept([line_style(i)['color'] for i in range(4)]) > .4
    assert kept(('#d62728', '#4f8f00')) <= .5
    assert kept([f'C{i}' for i in range(4)]) < .2  # Matplotlib's own


def test_spread_points():
    "First the white square, then others; different, and not at the border"
    x = torch.full((3, 32, 32), -1.)
    x[:, 8:12, 8:12] = 1.
    x[:, 20:30, 18:28] = .5
    points = spread_points(x, 4)
    assert 8 <= points[0][0] < 12 and 8 <= points[0][1] < 12
    assert sum(x[0, r, c] > -1 for r, c in points) >= 2           # not only empty corners
    assert len(set(points)) == 4
    assert all(0 < r < 31 and 0 < c < 31 for r, c in points)


def test_a_known_map_is_drawn_where_it_looks():
    q, k = torch.ones(1, 64, 1), torch.full((1, 64, 1), -100.)
    k[:, 2*8 + 5] = 0.                                            # all queries look at cell (2, 5)
    known = AttentionMap('by hand', q, k, (8, 8), (8, 8), (32, 32))
    fig = attention_figure(torch.zeros(1, 3, 32, 32), known, [(4, 4), (28, 16)])
    row, column = divmod(int(fig.axes[1].images[0].get_array().argmax()), 32)
    assert row//4 == 2
    assert column//4 == 5
    assert [l.get_text() for l in fig.axes[3].get_yticklabels()] == ['', 'even spread', '64.0 times']
    (arrow,) = fig.axes[1].texts                                  # one head, with a white outline
    assert isinstance(arrow.arrow_patch.get_path_effects()[0], withStroke)


def test_maps_of_other_images(runs):
    x, maps = attention_maps(runs['digits'].model.ema, random_latents(3, 0), torch.tensor([0, 2, 3]))
    with pytest.raises(ValueError, match='do not belong'): attention_figure(x[:2], maps[-1])
    with pytest.raises(IndexError, match='outside the image'): attention_figure(x, maps[-1], [(40, 3)])


def test_dots_on_color_look_at_few_places(runs):
    "And a dot on plain gray everywhere alike"
    torch.manual_seed(0)
    x, maps = attention_maps(runs['twins'].model.ema, torch.randn(3, 128)[:2], torch.arange(2))
    for r, c in spread_points(x[0]):
        colorful = (x[0, :, r, c].max() - x[0, :, r, c].min()).item()
        weights = maps[-1].at(r, c)[0]
        assert (colorful > 1) == (weights.max()*weights.numel() > 2)


# Measures

def test_ranks_and_correlation():
    "Ranks 1.5, 3, 1.5, 4, less their mean; only the order counts"
    assert torch.equal(_ranks(torch.tensor([5., 7., 5., 9.])), 2*torch.tensor([-1., .5, -1., 1.5]))
    a = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert _correlation(_ranks(a), _ranks(a.exp())).item() == pytest.approx(1)
    assert _correlation(_ranks(a), _ranks(torch.ones(20))).isnan()


def test_centers_and_colors():
    assert torch.equal(_centers((1, 2), 'cpu'), torch.tensor([[.5, .25], [.5, .75]]))
    x = torch.arange(4.).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert torch.allclose(_colors(x, (1, 2))[0, :, 0], torch.tensor([1., 2.]))    # columns 0, 2 and 1, 3


class Small(AttentionMap):
    "A map in parts of five queries"
    def parts(self): return (attention_weights(q, self.k) for q in self.q.split(5, 1))


def measures(w, d, alike):
    "By NumPy and SciPy; what nearness explains is taken out by linear regression"
    ranks = [rankdata(v) for v in (w, alike, -d.round(6))]
    fit = np.stack([ranks[2], np.ones(16)], 1)
    left = [r - fit @ np.linalg.lstsq(fit, r, rcond=None)[0] for r in ranks[:2]]
    with np.errstate(invalid='ignore'):
        correlations = [np.corrcoef(ranks[0], t)[0, 1] for t in ranks[1:]]
        partial = np.corrcoef(*left)[0, 1]
    entropy = -(w*np.log(w)).sum()/np.log(16)
    return [(w*d).sum(), entropy, w[d <= .25].sum(), w.max()*16 >= 3, *correlations, partial]


def test_measures_by_hand():
    "For pooled keys, and a map that comes in several parts"
    torch.manual_seed(0)
    x, q, k = torch.rand(2, 3, 16, 16)*2 - 1, torch.randn(2, 64, 4), torch.randn(2, 16, 4)
    one = Small('pooled', q, k, (8, 8), (4, 4), (16, 16))
    ours = map_statistics(x, one)
    def cells(n): return x.unflatten(3, (n, -1)).unflatten(2, (n, -1)).mean((3, 5)).flatten(2).mT.numpy()
    def centers(n): return np.array([((r + .5)/n, (c + .5)/n) for r in range(n) for c in range(n)])
    rows = {'attention': [], 'window': [], 'same': []}
    for b in range(2):
        for j in range(64):
            d = np.linalg.norm(centers(4) - centers(8)[j], axis=1)
            alike = -np.linalg.norm(cells(4)[b] - cells(8)[b, j], axis=1)
            window = np.exp(-(d/.125)**2/2)
            weights = dict(attention=one.beta[b, j].numpy(), window=window/window.sum(),
                           same=one.beta[b].mean(0).numpy())
            for kind, w in weights.items(): rows[kind].append(measures(w, d, alike))
    for kind, last in dict(attention=7, same=7, window=6).items():
        assert list(ours[kind].values())[:last] == pytest.approx(np.mean(rows[kind], 0)[:last], abs=1e-4)
    undefined = (('window', 'colour, held'), ('uniform', 'colour'), ('uniform', 'nearness'))
    assert all(math.isnan(ours[kind][name]) for kind, name in undefined)


def test_maps_that_follow_one_thing():
    "q = (2 f, -1), k = (f, |f|^2) give the scores -|f_i - f_j|^2 for colors or places f"
    torch.manual_seed(0)
    x = torch.rand(2, 3, 16, 16)*2 - 1
    def following(f):
        q = torch.cat([2*f, -torch.ones_like(f[..., :1])], -1)
        k = torch.cat([f, f.square().sum(-1, keepdim=True)], -1)
        return map_statistics(x, AttentionMap('made', q, k, (8, 8), (8, 8), (16, 16)))['attention']
    by_color = following(_colors(x, (8, 8)))
    by_place = following(_centers((8, 8), 'cpu').expand(2, -1, -1))
    scores = by_color['colour'], by_color['colour, held'], by_place['nearness']
    assert scores == pytest.approx((1, 1, 1), abs=1e-3)
    assert abs(by_color['nearness']) < .2 and abs(by_place['colour']) < .2


def test_measures_of_the_shipped_generators(runs):
    "They look around themselves no more than even weights do; color is near what one map for all queries has"
    for name, r in runs.items():
        y = load_images(name, 32).y[:60]
        torch.manual_seed(0)
        g = map_statistics(*attention_maps_of(r.model.ema, torch.randn(60, 128), y))
        assert g['attention']['within 1/4'] < .25*g['window']['within 1/4']
        assert g['attention']['within 1/4'] - g['uniform']['within 1/4'] < .05
        assert abs(g['attention']['colour'] - g['same']['colour']) < .2


def attention_maps_of(G, z, y):
    x, (m,) = attention_maps(G, z, y)
    return x, m


def test_neighbors_may_look_elsewhere(runs):
    "In twins some neighbors' maps have nothing in common"
    _, m = attention_maps_of(runs['twins'].model.ema, random_latents(60, 0), torch.arange(60) % 4)
    grid = m.beta.unflatten(1, m.queries)
    assert ((grid[:, :, 1:] - grid[:, :, :-1]).abs().sum(-1)/2).max() > .95


# What attention causes in the shipped runs

def test_last_record_of_twins(runs):
    "D's agreement AUC is at chance without its attention"
    assert abs(runs['twins'].records[-1]['d_auc_gamma0'] - .5) < .01


@pytest.mark.parametrize('name, seed, label', [('digits', 3, 2), ('twins', 2, 0)])
def test_effects_on_one_image(runs, name, seed, label):
    "Nothing changed, nothing changes; more gamma taken away changes more"
    G, y = runs[name].model.ema, torch.tensor([label])
    z = random_latents(1, seed)
    x, m = attention_maps_of(G, z, y)
    def draw(**how):
        with torch.no_grad(), intervene(G, m, **how): return G(z, y)[0]
    assert torch.equal(draw(), x[0])
    change = {k: (draw(**how) - x[0]).abs().mean().item()
              for k, how in dict(none=dict(gamma=0.), half=dict(gamma=.5), cut=dict(cut=(26, 24))).items()}
    assert change['none'] > change['half'] > 0 and 0 < change['cut'] < change['none']
    fig = effect_figure({'as trained': x[0], 'none': draw(gamma=0.)})
    assert fig.axes[3].get_xlabel() == f"mean {100*change['none']/2:.2g}%"


def test_effects_on_many_images(runs):
    "Agreement of twins hangs on attention; in digits little does, and less on where it looks"
    y, z = torch.arange(1000) % 4, random_latents(1000, 0)
    changes = {'gamma x 0.5': dict(gamma=.5), 'gamma x 0': dict(gamma=0.),
               'even weights': dict(uniform=True), 'left half hidden': dict(hide=(0, 0, 32, 16))}
    moved, found = {}, {}
    for name, r in runs.items():
        x, m = attention_maps_of(r.model.ema, z, y)
        if name == 'twins': found['as trained'] = agreement(twin_colours(x), y)
        for caption in ('even weights', 'gamma x 0') if name == 'digits' else changes:
            with torch.no_grad(), intervene(r.model.ema, m, **changes[caption]): changed = r.model.ema(z, y)
            moved[name, caption] = (changed - x).abs().mean().item()/2
            if name == 'twins': found[caption] = agreement(twin_colours(changed), y)
    trained, without = found['as trained'], found['gamma x 0']
    assert trained.kappa > .15
    assert abs(without.kappa) < 2*without.kappa_error
    assert found['even weights'].kappa < .6*trained.kappa
    for same in ('gamma x 0.5', 'left half hidden'):
        assert abs(found[same].kappa - trained.kappa) < 2*found[same].kappa_error
    assert .001 < moved['digits', 'even weights'] < .5*moved['digits', 'gamma x 0']


def test_at_first_only_gamma_has_a_gradient():
    "From the second step on all weights of the layer learn"
    layer, features = SelfAttention(32), torch.randn(2, 32, 8, 8)
    def with_gradient():
        layer.zero_grad()
        layer(features).square().sum().backward()
        return {name.split('.')[0] for name, p in layer.named_parameters() if p.grad.abs().max() > 0}
    assert with_gradient() == {'gamma'}
    with torch.no_grad(): layer.gamma.fill_(1e-4)  # after a step
    assert with_gradient() == {n.split('.')[0] for n, _ in layer.named_parameters()}


def test_gamma_moves_by_a_learning_rate_per_step(runs):
    for r in runs.values():
        assert (r.cfg.lr_g, r.cfg.lr_d) == (10*1e-4, 5*4e-4)      # ours and, after the factors, the paper's
        for k in (k for k in r.records[0] if k.startswith('gamma')):
            rate = r.cfg.lr_g if k[6] == 'G' else r.cfg.lr_d
            pairs = list(zip(r.records, r.records[1:]))
            assert max(abs(b[k] - a[k])/(b['step'] - a['step']) for a, b in pairs) < 2*rate


# A run as a picture

def records():
    return [{'step': s, 'd_loss': 2 - s/100, 'g_loss': s/100, 'gamma G16': s/1000, 'sigma G.linear': 1 + s/50}
            for s in range(0, 100, 5)]


def test_training_figure():
    fig = training_figure(records())
    assert [len(a.lines) for a in fig.axes] == [5, 1, 1]  # each loss, its mean, and the level of no knowledge
    assert fig.axes[1].lines[0].get_ydata()[-1] == .095
    written = [t.get_text() for a in fig.axes for t in a.texts]
    assert written == ['G', 'D', 'D knows nothing', 'G16', 'G.linear']
    assert not any(a.get_legend() for a in fig.axes)


def test_lines_of_training_differ_without_color_and_one_peak_does_not_flatten_them():
    spoiled = [dict(r, step=i, g_loss=i % 2) for i, r in enumerate(records()*100)]
    spoiled[500]['g_loss'] = 1e6
    ax, = training_figure(spoiled, 'losses').axes
    named = [l for l in ax.lines if not l.get_label().startswith('_')]
    assert len(named) == len({str(l.get_linestyle()) for l in named}) == 3
    assert ax.get_ylim()[1] < 1e5
    assert len(ax.lines[0].get_xdata()) <= 1000  # of any number of records


def test_a_network_has_one_look_in_all_panels():
    log = [dict(r) | {'gamma D16': 0., 'sigma D.linear': 2., 'sigma G.last': 2.5} for r in records()]
    looks = {}
    for ax in training_figure(log).axes:
        for line in (l for l in ax.lines if l.get_label() in 'G D G16 D16 G.linear D.linear'.split()):
            looks.setdefault(line.get_label()[0], set()).add((line.get_color(), line.get_linestyle()))
        drawn = [(l.get_color(), str(l._dash_pattern)) for l in ax.lines if not l.get_label().startswith('_')]
        assert len(set(drawn)) == len(drawn)
    assert [len(looks[k]) for k in 'GD'] == [1, 1] and looks['G'] != looks['D']


def test_labels_at_line_ends_do_not_touch():
    fig, ax = plt.subplots()
    for i in range(6): ax.plot([0, 1], [0, i/1000], label=f'line {i}')
    ax.plot([0, .5], [0, 1], label='short')
    label_line_ends(ax)
    fig.canvas.draw()
    boxes = [Text.get_window_extent(t) for t in ax.texts]  # without their leaders
    assert not any(a.overlaps(b) for a in boxes for b in boxes if a is not b)
    right, middle = [ax.bbox.x0 + part*ax.bbox.width for part in (.95, .6)]
    assert all(b.x0 > right for b in boxes[:6]) and boxes[6].x0 < middle


def test_arrows_stay_in_their_map_and_marks_do_not_touch():
    q, k = torch.ones(1, 64, 1), torch.zeros(1, 64, 1)
    k[:, 61] = 2.2  # all queries look at a cell of the last row, 8 times as much as evenly
    m = AttentionMap('by hand', q, k, (8, 8), (8, 8), (32, 32))
    fig = attention_figure(torch.zeros(1, 3, 32, 32), m, [(31, 20)])
    arrow, = [t.arrow_patch for t in fig.axes[1].texts]
    assert torch.tensor(arrow.clipbox.extents).allclose(torch.tensor(fig.axes[1].bbox.extents))
    assert [t.get_text() for t in fig.axes[2].get_yticklabels()][:2] == ['', 'even spread']


def test_report_html():
    "No network; the pictures are really in there"
    x = six()
    pictures = [('curves', training_figure(records())), ('samples', grid_image(x))]
    page = report_html('A <run>', 'Two pictures.', pictures, {'lr_g': 1e-3})
    assert page.count('data:image/png;base64,') == 1 and page.count('<svg') == 1
    assert '<h1>A &lt;run&gt;</h1>' in page and '://' not in page
    inside = [base64.b64decode(s.split('"')[0]) for s in page.split('base64,')[1:]]
    assert Image.open(io.BytesIO(inside[0])).size == grid_image(x).size
