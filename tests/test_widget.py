"The attention explorer without a browser: views, the widget's state, controls, effects and messages"
import base64, io, json, math

import pytest, torch
from PIL import Image
from traitlets import TraitError
from sagan.attention import attention_maps, attention_weights, AttentionMap, intervene
from sagan.data import to_bytes, to_unit, twins
from sagan.explorer import (
    class_view, explore, Explorer, generated_maps, image_view, latents, named_maps, view)
from sagan.networks import Discriminator, Generator
from sagan.runs import load_run, shipped
from sagan.training import SAGAN
from sagan.visualization import spread_points
from sagan.widget import AttentionExplorer, own_images, pack_change


@pytest.fixture
def run(): return load_run(shipped('twins'))


@pytest.fixture
def model(run): return run.model


@pytest.fixture
def classes(run): return run.classes


@pytest.fixture
def drawn(model):
    "Three generated images, one of each of the first classes, and their maps"
    y = torch.tensor([0, 1, 2])
    x, maps = generated_maps(model, latents(model.ema, [0, 1, 2]), y)
    return x, maps, y


real = twins(4)


# Latents and maps

def test_the_arc_between_latents(model):
    assert torch.allclose(latents(model.ema, [3], [4], 1.), latents(model.ema, [4]), rtol=0, atol=1e-6)
    assert torch.equal(latents(model.ema, [3], [3], .5), latents(model.ema, [3]))    # nothing between


def test_looking_changes_nothing(model, drawn):
    x, maps, y = drawn
    assert torch.equal(x, model.ema(latents(model.ema, [0, 1, 2]), y))
    expected = attention_maps(model.D.eval(), x, y)[1][0].beta
    assert torch.allclose(maps['D 16x16'].beta, expected, rtol=0, atol=1e-5)
    model.D.train()
    named_maps(model.D, x, y)
    assert model.D.training


def test_gamma_times_0_takes_the_layer_out(model, drawn):
    x, _, y = drawn
    z, layer = latents(model.ema, [0, 1, 2]), model.ema.attention['16']
    without = generated_maps(model, z, y, gamma=0.)[0]
    with torch.no_grad(): layer.gamma.zero_()
    assert torch.allclose(without, model.ema(z, y), rtol=0, atol=1e-5)
    assert not torch.equal(without, x)


def test_models_that_lack_a_network(run, classes):
    "As imported ones may; two maps of one size have two names"
    only_G, only_D = [SAGAN(run.cfg.change(**{w: ()})).eval() for w in ('d_width', 'g_width')]
    assert [l['name'] for l in class_view(only_G, classes)[0]['layers']] == ['G 16x16']
    assert [l['name'] for l in image_view(only_D, to_unit(real.x), real.y)[0]['layers']] == ['D 16x16']
    assert 'no discriminator' in message(only_G, classes, to_unit(real.x), real.y)
    assert 'no generator' in message(only_D, classes)
    D = Discriminator(32, width=8, attention=(16, 8, '8-2'))
    assert list(named_maps(D, real.x[:1].float())[1]) == ['D 16x16', 'D 8x8', 'D 8x8-2']


# Views

def labeled(classes, y): return [(classes[i], s) for i, s in zip(y, range(3))]


def unpacked(header, data, layer):
    "Queries (B, HW, D) and keys (B, hw, D) of a layer of a view, times the root of their factor"
    layer = next(l for l in header['layers'] if l['name'] == layer)
    B, factors = len(header['images']), torch.tensor(layer['factors'])[:, None, None]
    for grid, start in (layer['queries'], layer['q']), (layer['keys'], layer['k']):
        n = B*math.prod(grid)*layer['depth']
        numbers = torch.frombuffer(bytearray(data), dtype=torch.int16, offset=start, count=n)
        yield numbers.reshape(B, -1, layer['depth'])*factors.sqrt()


def test_a_view_read_back(drawn, classes):
    "Each row of the map is what Python computes, up to rounding; and the images"
    x, maps, y = drawn
    header, data = view(x, maps, labeled(classes, y))
    for name, m in maps.items():
        q, k = unpacked(header, data, name)
        found, exact = attention_weights(q, k), m.beta
        assert ((found - exact).abs() <= .0015*exact.amax(-1, keepdim=True)).all()
        strongest = exact.topk(2).values
        clear = strongest[..., 0] > 1.01*strongest[..., 1]
        assert torch.equal(found.argmax(-1)[clear], exact.argmax(-1)[clear]) and clear.any()
    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8, count=x.numel()).reshape(3, 32, 32, 3)
    assert torch.equal(pixels.permute(0, 3, 1, 2), to_bytes(x))
    assert header['bytes'] == len(data)
    assert header['start'] in [list(p) for p in spread_points(x[0], 8)]


@pytest.mark.parametrize('size, keys', [(32, 16), (64, 32)])
def test_a_view_is_small_and_exact(size, keys):
    "Also for images with an odd number of bytes, and for large logits, such as 60"
    q, k = torch.randn(1, size*size, 16)*2, torch.randn(1, keys*keys, 16)*2 + 5
    m = AttentionMap('', q, k, (size, size), (keys, keys), (127, 127))
    header, data = view(torch.zeros(1, 3, 127, 127), {'G': m}, [('', 0)])
    assert len(data) < 3*127**2 + 2 + 768 + 170e3
    q2, k2 = unpacked(header, data, 'G')
    exact, found = m.beta, attention_weights(q2, k2)
    assert ((found - exact).abs()/exact.amax(-1, keepdim=True)).max() < .005


def test_what_cannot_be_viewed(drawn):
    x, maps, _ = drawn
    with pytest.raises(ValueError, match='do not belong'): view(x[:2], maps, [('', 0)]*2)
    with pytest.raises(ValueError, match='got 1'): view(x, maps, [('', 0)])
    with pytest.raises(ValueError, match='the model has diverged'): view(x*math.nan, maps, [('', 0)]*3)


def test_views_of_a_model(model, classes):
    header, _ = class_view(model, classes, labels=[1, 3], seeds=[5, 6])
    names = [(i['class'], i['seed']) for i in header['images']]
    assert names == [(classes[c], s) for c in (1, 3) for s in ('5', '6')]
    assert image_view(model, to_unit(real.x), real.y, classes)[0]['numbered'] == 'image'


def test_own_images(classes, tmp_path):
    for i in range(4):
        folder = tmp_path/classes[real.y[i]]
        folder.mkdir(exist_ok=True)
        Image.fromarray(real.x[i].permute(1, 2, 0).numpy()).save(folder/f'{i}.png')
    x, y = own_images(tmp_path, 32, classes)
    def key(x, c): return c.item(), x.sum().item()
    assert sorted(map(key, x, y)) == sorted(map(key, to_unit(real.x), real.y))
    assert own_images(tmp_path, 32, classes, most=2)[1].tolist() == [y[0], y[-1]]
    assert own_images(tmp_path, 32)[1] is None
    with pytest.raises(ValueError, match='which is no class of the model; it has cat, dog'):
        own_images(tmp_path, 32, ['cat', 'dog'])
    with pytest.raises(ValueError, match='put the images into subfolders'): own_images(folder, 32, classes)
    (folder/'x.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=rf'{folder.name}/x.png \(UnidentifiedImageError'):
        own_images(tmp_path, 32, classes)


# The widget

@pytest.fixture
def widget(model, classes):
    e = AttentionExplorer(*class_view(model, classes, [0, 1], [0, 1]))
    e.point, e.layer, e.pins, e.direction = [12, 10], 'D 16x16', [[0, 0], [31, 31]], 'to'
    return e


def test_first_layer_and_image(model, classes):
    given = class_view(model, classes, [0, 1], [0, 1])
    start = given[0]['start']
    e = AttentionExplorer(*given)
    assert (e.layer, e.image, e.point, e.pins) == ('G 16x16', 0, start, [start])
    e.point, e.pins, e.image = None, [], 3
    e.show(*class_view(model, classes, [0], [7]))
    assert (e.image, e.point, e.pins) == (0, None, [])              # what was let go of stays away
    assert AttentionExplorer(*given, point=[3, 4]).point == [3, 4]


def test_the_page_holds_it_all(widget, tmp_path):
    "State, bytes and module, and nothing to load"
    page = widget.static()
    for asks in ('://', 'src=', '@import', 'url(', 'import(', 'fetch('): assert asks not in page, asks
    state = json.loads(page.split('id="sagan-state">')[1].split('</script>')[0])
    expected = dict(layer='D 16x16', direction='to', pins=[[0, 0], [31, 31]], point=[12, 10],
                    header=widget.header)
    assert {k: state[k] for k in expected} == expected
    assert base64.b64decode(page.split('id="sagan-data">')[1].split('</script>')[0]) == widget.data
    assert '_esm' in widget.get_state(drop_defaults=True)
    widget.save(tmp_path/'a.html')
    assert (tmp_path/'a.html').read_text(encoding='utf-8') == page


def test_settings(widget, model, classes):
    "What one explorer shows, another one shows after `restore`; of its own, or as JSON from the browser"
    other = AttentionExplorer(widget.header, widget.data)
    other.restore(widget.settings)
    assert other.settings == widget.settings and other.layer == 'D 16x16'
    live = explore(model, classes)
    live.restore(json.dumps(dict(label=2, seed=5, gamma=2., hide=[0, 0, 16, 32], point=[1, 2])))
    assert (live.header['images'][0], live.point) == ({'class': classes[2], 'seed': '5'}, [1, 2])
    said = 'Attention is multiplied by 2, and in Generator 16x16 no point looks at the hidden region. On'
    assert live.effect['words'].startswith(said)
    for wrong in ('[1]', '{"colour": 1}', dict(sed=1)):
        with pytest.raises(ValueError, match='settings are a dictionary with some of layer'):
            widget.restore(wrong)
    with pytest.raises(IndexError, match='rows go from 0 to 31'): widget.restore(dict(point=[40, 0]))


def test_a_class_name_cannot_end_the_script(widget):
    m = AttentionMap('by hand', torch.zeros(1, 4, 1), torch.zeros(1, 4, 1), (2, 2), (2, 2), (8, 8))
    named = AttentionExplorer(*view(torch.zeros(1, 3, 8, 8), {'G 2x2': m}, [('</script><!--<script>', 0)]))
    assert named.static().count('</script>') == widget.static().count('</script>')


def test_values_that_do_not_exist(widget):
    with pytest.raises(ValueError, match="no layer 'G 8x8' here; there are 'G 16x16', 'D 16x16'"):
        widget.layer = 'G 8x8'
    with pytest.raises(IndexError, match='they go from 0 to 3'): widget.image = 4
    with pytest.raises(IndexError, match='rows go from 0 to 31'): widget.point = [32, 0]
    with pytest.raises(IndexError, match='columns from 0 to 31'): widget.pins = [[0, 0], [0, 32]]
    assert (widget.layer, widget.image) == ('D 16x16', 0)
    assert (widget.point, widget.pins) == ([12, 10], [[0, 0], [31, 31]])


def test_a_message_goes_with_its_state(widget):
    widget.message = 'something is wrong'
    assert 'something is wrong' not in widget.static()              # with a view beside it that is not
    widget.point = [12, 11]
    assert widget.message == ''


# Drawing

@pytest.fixture
def box(run): return explore(run, layer='D 16x16')


def shown(box):
    pixels = torch.frombuffer(bytearray(box.data), dtype=torch.uint8, count=32*32*3)
    return pixels.reshape(32, 32, 3).permute(2, 0, 1)


def drawing(model, label, *latent):
    return to_bytes(model.ema(latents(model.ema, *latent), torch.tensor([label])))[0]


def in_words(before, after):
    change = (after - before)[0].abs().mean(0)*50                   # (32, 32) in percent
    assert change.max() > 0
    return (f'On average, a pixel changes by {change.mean():.2g}% of the way from black to white; the one '
            f'that changes most, by {change.max():.2g}%.')


def test_traits_draw(box, model, classes):
    assert isinstance(box, Explorer) and box.view is box
    assert (box.layer, box.message, box.effect) == ('D 16x16', '', {})
    assert box.drawing == dict(classes=list(classes), attention=True, own=True)
    assert torch.equal(shown(box), drawing(model, 0, [0]))
    box.label = 2
    box.seed += 1
    assert torch.equal(shown(box), drawing(model, 2, [1]))
    assert box.header['images'] == [{'class': classes[2], 'seed': '1'}]
    box.towards, box.far = 7, .5
    assert torch.equal(shown(box), drawing(model, 2, [1], [7], .5))
    assert box.header['images'][0]['seed'] == '1 towards 7 at 0.5'
    assert box.layer == 'D 16x16'
    for name, wrong in dict(seed=-1, far=2., gamma=3.).items():
        with pytest.raises(TraitError): setattr(box, name, wrong)
    for wrong in ([0, 0, 33, 16], [8, 8, 8, 16], [1, 2], [], [0, 0, 8, 8, 1]):
        with pytest.raises(ValueError, match='hide is a region .* of 32x32 pixels'): box.hide = wrong


def test_effects(box, model):
    "What the words say is what `intervene` does; the image in view stays as trained"
    box.label, box.seed = 2, 5
    z, y = latents(model.ema, [5]), torch.tensor([2])
    x, (m,) = attention_maps(model.ema, z, y)
    def expected(**how):
        with torch.no_grad(), intervene(model.ema, m, **how): return model.ema(z, y)
    box.gamma = 2.
    after = expected(gamma=2.)
    assert box.effect['words'] == f'Attention is multiplied by 2. {in_words(x, after)}'
    assert box.changed == b''.join(pack_change('', x[0], after[0])[1:])
    assert torch.equal(shown(box), to_bytes(x)[0])
    picture = torch.frombuffer(bytearray(box.changed), dtype=torch.uint8)
    assert box.after[:3072] == bytes(to_bytes(after)[0].permute(1, 2, 0).flatten().tolist())
    apart = (after - x)[0].abs().mean(0)
    assert torch.equal(picture.reshape(32, 32), (apart/apart.max()*255).round().to(torch.uint8))
    box.gamma, box.cut = 1., [24, 24, 28, 26]
    said = 'In Generator 16x16 the cut region gets nothing from attention'       # though D's layer is in view
    assert box.effect['words'] == f'{said}. {in_words(x, expected(cut=(24, 24, 28, 26)))}'
    assert torch.equal(expected(cut=(24, 24, 26, 26)), expected(cut=(25, 25)))     # one query's cell
    box.cut, box.hide = None, [0, 0, 16, 16, 0, 16, 16, 32]         # two boxes, as an outline has
    several = box.effect
    altered = to_bytes(expected(hide=(0, 0, 16, 32)))[0].permute(1, 2, 0).flatten()
    assert box.after[:3072] == bytes(altered.tolist()) and len(box.after) == several['view']['bytes']
    box.hide = [0, 0, 16, 32]
    assert box.effect == several
    said = ('In Generator 16x16 no point looks at the hidden region. '
            f'{in_words(x, expected(hide=(0, 0, 16, 32)))}')
    assert box.effect['words'] == said
    box.seed = 6
    assert box.effect['words'].startswith('In Generator 16x16 no point looks') and box.effect['words'] != said
    box.hide = [0, 0, 32, 32]
    assert 'hides all keys' in box.message and (box.effect, box.changed, box.after) == ({}, b'', b'')
    box.hide = None
    assert (box.effect, box.changed, box.message) == ({}, b'', '')


def upload(name, content): return dict(name=name, content=memoryview(content))


def test_uploads(box, model, classes):
    "The discriminator looks at them as images of the chosen class"
    out = io.BytesIO()
    Image.fromarray(real.x[0].permute(1, 2, 0).numpy()).save(out, 'png')
    png = out.getvalue()
    box.hide, box.uploads = [0, 0, 16, 32], [upload('mine.png', png)]
    assert torch.equal(shown(box), real.x[0])
    assert (box.layer, box.header['numbered'], box.effect, box.uploads) == ('D 16x16', 'image', {}, [])
    assert box.header['images'] == [{'class': classes[0], 'seed': 'mine.png'}]
    box.label = 1
    assert torch.equal(shown(box), real.x[0])
    expected = image_view(model, to_unit(real.x[:1]), torch.tensor([1]), classes, ['mine.png'])[1]
    assert box.data == expected
    box.gamma = 2.
    assert 'has not drawn this image' in box.message
    box.uploads = [upload('notes.txt', b'no image')]
    assert 'no image that can be read: notes.txt (UnidentifiedImageError' in box.message
    assert "'0'" not in box.message and 'sagan-uploads' not in box.message
    assert torch.equal(shown(box), real.x[0]) and box.uploads == []
    box.uploads = [upload('a', png)]*25
    assert 'at most 24 images at once, got 25' in box.message
    box.seed, box.label = 1, 3                                      # the seed draws again
    assert torch.equal(shown(box), drawing(model, 3, [1])) and box.message == ''
    assert box.effect['words'].startswith('Attention is multiplied by 2, and in')


def test_messages_come_and_go(box, model, classes):
    "The view before an error stays, and the next good choice clears the message"
    before = box.data
    box.message = 'something is wrong'
    box.seed += 1
    assert box.message == ''
    assert box.data != before
    model.ema.n_classes, before = 0, box.data                       # now it takes no labels
    box.seed += 1
    assert 'takes no labels' in box.message
    assert box.data == before
    model.ema.n_classes = len(classes)
    box.seed += 1
    assert box.message == ''
    assert box.data != before


# What `explore` refuses

def message(*args, **kw): return explore(*args, **kw).message


@pytest.mark.parametrize('words, args', {
    'no SelfAttention layer': lambda m, c: [Generator(32, width=2, attention=(), z_dim=8)],
    'the model has 4 classes, got 0 names': lambda m, c: [m],
    'a generator cannot look at images': lambda m, c: [m.ema, c, to_unit(real.x), real.y],
    'at least one': lambda m, c: [m.D, c, to_unit(real.x[:0]), real.y[:0]],
    'got ndarray': lambda m, c: [m.D, c, real.x.numpy()],
    "no layer 'G 64x64' here": lambda m, c: [m, c, None, None, 'G 64x64'],
    'draws nothing': lambda m, c: [m.D],
    'must have shape (B, 3, 32, 32)': lambda m, c: [m.D, c, torch.zeros(1, 3, 64, 64)],
    'conditional and': lambda m, c: [m.D, c, to_unit(real.x)],
    'from 0 to 3, got': lambda m, c: [m.D, c, to_unit(real.x), real.y + 9],
}.items())
def test_errors_become_messages(model, classes, words, args):
    assert words in message(*args(model, classes))


def test_explore(run, model, classes):
    assert message(model.D, classes, to_unit(real.x), real.y) == ''
    assert explore(run).static() == explore(model, classes).static()
    with pytest.raises(TypeError, match='a run from load_run, got str'): explore('twins')
