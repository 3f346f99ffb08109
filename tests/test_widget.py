"The attention explorer without a browser: views, the widget's state, controls, effects and messages"
import base64, io, json, math, random
from datetime import datetime, timezone

import pytest, torch
from PIL import Image
from sagan.attention import attention_maps, AttentionMap, intervene
from sagan.data import to_bytes, to_unit, twins
from sagan.explorer import (
    _quantize, AttentionExplorer, class_view, explore, Explorer, generated_maps, image_view, latents,
    named_maps, own_images, view)
from sagan.networks import Discriminator, Generator
from sagan.runs import load_run, shipped
from sagan.training import SAGAN


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

def test_rounding_makes_no_second_maximum():
    rows, maxima = _quantize(torch.tensor([[[.5, .4999, .0001, 0.]]]))
    assert rows[0, 0].tolist() == [255, 254, 0, 0]
    assert torch.equal(maxima, torch.tensor([[2.]]))                # .5 is twice the even share


def labeled(classes, y): return [(classes[i], s) for i, s in zip(y, range(3))]


def test_a_view_read_back(drawn, classes):
    "What `at` gives for a pixel in the cell of the query, up to rounding; and the images"
    x, maps, y = drawn
    header, data = view(x, maps, labeled(classes, y))
    def weights(layer, image, row, col):
        (H, W), (h, w), (S, _) = layer['queries'], layer['keys'], header['size']
        q = image*H*W + row*H//S*W + col*W//S
        rows = torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=layer['maps'] + q*h*w, count=h*w)
        top = torch.frombuffer(bytearray(data), dtype=torch.float32, offset=layer['maxima'] + 4*q, count=1)
        return rows.reshape(h, w).float()/255 * top/(h*w)
    for layer in header['layers']:
        m = maps[layer['name']]
        for b, r, c in [(0, 0, 0), (1, 13, 30), (2, 31, 31), (2, 17, 2)]:
            exact, found = m.at(r, c)[b], weights(layer, b, r, c)
            assert (found - exact).abs().max() <= exact.max()/254
            assert (found == found.max()).sum() == 1
            assert found.argmax() == exact.argmax()
    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8, count=x.numel()).reshape(3, 32, 32, 3)
    assert torch.equal(pixels.permute(0, 3, 1, 2), to_bytes(x))
    assert len(data) == header['layers'][-1]['maxima'] + 4*3*16*16


def test_size_of_a_view():
    q, k = torch.randn(1, 32*32, 16), torch.randn(1, 16*16, 16)
    m = AttentionMap('', q, k, (32, 32), (16, 16), (128, 128))
    assert len(view(torch.zeros(1, 3, 128, 128), {'G 32x32': m}, [('', 0)])[1]) < 317e3


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
    e.point, e.layer, e.pins, e.path = [12, 10], 'D 16x16', [[0, 0], [31, 31]], [[3, 3], [3, 4]]
    return e


def test_first_layer_and_image(model, classes):
    e = AttentionExplorer(*class_view(model, classes, [0, 1], [0, 1]), point=[3, 4])
    assert (e.layer, e.image, e.point) == ('G 16x16', 0, [3, 4])


def test_the_page_holds_it_all(widget, tmp_path):
    "State, bytes and module, and nothing to load"
    page = widget.static()
    for asks in ('://', 'src=', '@import', 'url(', 'import(', 'fetch('): assert asks not in page, asks
    state = json.loads(page.split('id="sagan-state">')[1].split('</script>')[0])
    expected = dict(layer='D 16x16', path=[[3, 3], [3, 4]], pins=[[0, 0], [31, 31]], point=[12, 10],
                    header=widget.header)
    assert {k: state[k] for k in expected} == expected
    assert base64.b64decode(page.split('id="sagan-data">')[1].split('</script>')[0]) == widget.data
    assert '_esm' in widget.get_state(drop_defaults=True)
    widget.save(tmp_path/'a.html')
    assert (tmp_path/'a.html').read_text() == page


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


# Controls

class Controls:
    "The explorer of a run, its controls by name"
    def __init__(self, run):
        self.box = explore(run.model, run.classes, layer='D 16x16')
        controls, self.e, self.effects = self.box.children
        names = 'label seed another following towards far gamma own'.split()
        for name, widget in zip(names, controls.children, strict=True): setattr(self, name, widget)
        row, self.picture = self.effects.children
        self.cut, self.hide, self.words = row.children

    def shown(self):
        pixels = torch.frombuffer(bytearray(self.e.data), dtype=torch.uint8, count=32*32*3)
        return pixels.reshape(32, 32, 3).permute(2, 0, 1)


@pytest.fixture
def box(run): return Controls(run)


def drawing(model, label, *latent):
    return to_bytes(model.ema(latents(model.ema, *latent), torch.tensor([label])))[0]


def in_words(before, after):
    change = (after - before)[0].abs().mean(0)*50                   # (32, 32) in percent
    assert change.max() > 0
    return (f'pixels change by {change.mean():.2g}% of the range from black to white in the mean, '
            f'{change.max():.2g}% at most')


def test_controls_draw(box, model, classes):
    assert isinstance(box.box, Explorer)
    assert (box.box.view, box.box.static()) == (box.e, box.e.static())
    assert (box.e.layer, box.e.message) == ('D 16x16', '')
    assert torch.equal(box.shown(), drawing(model, 0, [0]))
    box.label.value = 2
    box.following.click()
    assert torch.equal(box.shown(), drawing(model, 2, [1]))
    assert box.e.header['images'] == [{'class': classes[2], 'seed': '1'}]
    box.towards.value, box.far.value = 7, .5
    assert torch.equal(box.shown(), drawing(model, 2, [1], [7], .5))
    assert box.e.header['images'][0]['seed'] == '1 towards 7 at 0.5'
    random.seed(0)
    box.another.click()
    assert box.seed.value not in (0, 1, 2)
    assert box.e.layer == 'D 16x16'


def test_controls_change_gamma(box, model):
    box.label.value, box.gamma.value = 2, 2.
    z, y = latents(model.ema, [0]), torch.tensor([2])
    before, after = [generated_maps(model, z, y, g)[0] for g in (1., 2.)]
    assert torch.equal(box.shown(), to_bytes(after)[0])
    assert not torch.equal(box.shown(), drawing(model, 2, [0]))
    assert box.e.header['images'][0]['seed'] == '0, gamma times 2'
    assert f'gamma times 2: {in_words(before, after)}' in box.words.value
    assert 'gamma times 2' in box.picture.value
    box.gamma.value = 1.
    assert (box.words.value, box.picture.value) == ('', '')


def test_effects(box, model):
    "What the words say is what `intervene` does"
    def expected(**how):
        z, y = latents(model.ema, [box.seed.value]), torch.tensor([box.label.value])
        x, (m,) = attention_maps(model.ema, z, y)
        with torch.no_grad(), intervene(model.ema, m, **how): return in_words(x, model.ema(z, y))
    box.label.value, box.seed.value = 2, 5
    box.cut.click()
    assert 'keep the point first' in box.e.message
    box.e.pins = [[26, 24]]
    assert box.e.message == ''
    box.cut.click()
    assert 'D 16x16 draws nothing; choose a layer of the generator: G 16x16' in box.e.message
    box.e.layer = 'G 16x16'
    box.cut.click()
    assert f'(26, 24) cut in G 16x16: {expected(cut=(26, 24))}' in box.words.value
    assert expected(cut=(26, 24)) != expected(cut=(3, 3))
    box.hide.click()
    assert 'keep two points' in box.e.message
    box.e.pins = [[15, 31], [0, 0]]
    box.hide.click()
    assert f'region hidden in G 16x16: {expected(hide=(0, 0, 16, 32))}' in box.words.value
    assert box.e.message == ''
    assert 'alt="region hidden' in box.picture.value
    box.e.pins = [[0, 0], [31, 31]]
    box.hide.click()
    assert 'hides all keys' in box.e.message
    assert (box.words.value, box.picture.value) == ('', '')
    box.e.pins, box.e.layer = [], 'D 16x16'
    box.gamma.value = .5
    assert 'gamma times 0.5' in box.words.value
    box.gamma.value = 1.
    assert (box.words.value, box.picture.value) == ('', '')         # another image: the words are gone


def upload(name, content):
    return dict(name=name, type='image/png', size=len(content), content=memoryview(content),
                last_modified=datetime.now(timezone.utc))


def test_uploads(box, model, classes):
    "The discriminator looks at them as images of the chosen class"
    out = io.BytesIO()
    Image.fromarray(real.x[0].permute(1, 2, 0).numpy()).save(out, 'png')
    png = out.getvalue()
    box.label.value, box.own.value = 0, (upload('mine.png', png),)
    assert torch.equal(box.shown(), real.x[0])
    assert (box.e.layer, box.e.header['numbered']) == ('D 16x16', 'image')
    assert box.e.header['images'] == [{'class': classes[0], 'seed': 'mine.png'}]
    box.label.value = 1
    assert torch.equal(box.shown(), real.x[0])
    expected = image_view(model, to_unit(real.x[:1]), torch.tensor([1]), classes, ['mine.png'])[1]
    assert box.e.data == expected
    box.e.pins = [[26, 24]]
    box.cut.click()
    assert 'has not drawn this image' in box.e.message
    box.own.value = (upload('notes.txt', b'no image'),)
    assert 'no image that can be read: notes.txt (UnidentifiedImageError' in box.e.message
    assert torch.equal(box.shown(), real.x[0]) and box.own.value == ()
    box.own.value = (upload('a', png),)*25
    assert 'at most 24 images at once, got 25' in box.e.message
    box.label.value = 3                                             # the class draws again
    assert torch.equal(box.shown(), drawing(model, 3, [0])) and box.e.message == ''


def test_messages_come_and_go(box, model, classes):
    "The view before an error stays, and the next good choice clears the message"
    before = box.e.data
    box.e.message = 'something is wrong'
    box.following.click()
    assert box.e.message == ''
    assert box.e.data != before
    model.ema.n_classes, before = 0, box.e.data                     # now it takes no labels
    box.following.click()
    assert 'takes no labels' in box.e.message
    assert box.e.data == before
    model.ema.n_classes = len(classes)
    box.following.click()
    assert box.e.message == ''
    assert box.e.data != before


# What `explore` refuses

def message(*args, **kw): return explore(*args, **kw).view.message


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
