"""The attention explorer in a browser

The stand-alone page opened from disk without a network, and the module as anywidget calls it."""
import base64, html, json, math, os, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
from urllib.parse import unquote
import pytest, torch, torch.nn.functional as F
pytest.importorskip('playwright', reason="needs pip install -e '.[browser]'")
from PIL import Image
from playwright.sync_api import TimeoutError, sync_playwright
from sagan.attention import _inside, AttentionMap, intervene
from sagan.config import Config
from sagan.data import to_unit
from sagan.explorer import explore, generated_maps, latents, named_maps, view
from sagan.live import pack_networks
from sagan.reports import _VOILA
from sagan.runs import load_run, shipped
from sagan.training import SAGAN
from sagan.widget import AttentionExplorer

chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
firefox = shutil.which('firefox-esr') or shutil.which('firefox')
pytestmark = pytest.mark.skipif(
    chromium is None and not os.environ.get('CI'),
    reason='needs Chromium (apt-get install chromium) to open the explorer in')
S, CELLS, MAP = 64, 'canvas[role=application]', '.panels canvas[role=img] >> nth=0'

def random_map(name, queries, keys, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = [torch.randn(4, n*n, 8, generator=g) for n in (queries, keys)]
    return AttentionMap(name, q, k, (queries, queries), (keys, keys), (S, S))

@pytest.fixture(scope='module')
def images():
    small = torch.rand(4, 3, 7, 7, generator=torch.Generator().manual_seed(0))*2 - 1
    return F.interpolate(small, S, mode='bicubic').clamp(-1, 1)

@pytest.fixture(scope='module')
def maps():
    "Three layers; the last one is so flat that no cell gets 1.5 times the even share"
    flat = random_map('c', 8, 8, 2)
    flat.q = flat.q*.01
    return {'G 8x8': random_map('a', 8, 4, 0), 'G 32x32': random_map('b', 32, 16, 1), 'D 8x8': flat}

@pytest.fixture(scope='module')
def explorer(images, maps):
    return AttentionExplorer(*view(images, maps, [('cat', 3), ('cat', 4), ('<dog>', 3), ('<dog>', 4)]))

@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield b
        b.close()

@pytest.fixture
def opened(browser, explorer, tmp_path):
    "Opens a page from a file without a network; the test fails if it asks for anything, or throws an error"
    troubles, contexts = [], []
    def open(path=None, width=1200, height=900, **how):
        if path is None:
            path = tmp_path/'explorer.html'
            explorer.save(path)
        viewport = dict(width=width, height=height)
        context = browser.new_context(viewport=viewport, offline=True, accept_downloads=True, **how)
        contexts.append(context)
        page = context.new_page()
        page.on('pageerror', lambda e: troubles.append(str(e)))
        page.on('console', lambda m: troubles.append(m.text) if m.type == 'error' else None)
        local = 'file:', 'blob:', 'data:'
        page.on('request', lambda r: None if r.url.startswith(local) else troubles.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_selector(CELLS)
        unfold(page)
        return page
    yield open
    for c in contexts: c.close()
    assert not troubles

def unfold(page):
    "Show what is needed less often; it is folded at first"
    assert not page.locator('details[open]').count()
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")

def frame(page):
    page.evaluate('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')

def seen(page):
    "The point, and its map as it is drawn: weights of cells and values of pixels, 1 for an even spread"
    frame(page)
    r = page.evaluate('''() => { const a = document.querySelector('.sagan:has(canvas)').attention()
        return a && { ...a, weights: [...a.weights], values: [...a.values] } }''')
    if not r: return r
    return r | dict(weights=torch.tensor(r['weights']), values=torch.tensor(r['values']).reshape(S, S))

def move(page, row, col, canvas=CELLS):
    "The mouse to the middle of a pixel"
    canvas = page.locator(canvas)
    for _ in range(20):  # a page with a kernel may move under the mouse
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        page.mouse.move(box['x'] + (col + .5)*box['width']/S, box['y'] + (row + .5)*box['height']/S)
        frame(page)
        if canvas.bounding_box() == box: return
    raise AssertionError('the page does not come to rest')

def click(page, *pixel):
    move(page, *pixel)
    page.mouse.down()
    page.mouse.up()

def press(page, name): page.get_by_role('button', name=name, exact=True).click()
def choose_layer(page, name):
    network = {'G': 'Generator', 'D': 'Discriminator'}[name[0]]
    page.get_by_role('button', name=f'{network} {name[2:]}').click()

def same_map(r, m, image, row, col, smooth=True, to=False):
    "Does the page show what Python computes for this point?"
    exact = (m.looked_at_from(row, col) if to else m.at(row, col))[image]
    n, top = m.keys[0]*m.keys[1], exact.max()
    assert r['point'] == [row, col]
    assert (r['weights'].reshape(exact.shape)/n - exact).abs().max() <= .0015*top
    assert r['weights'].argmax() == exact.argmax()
    assert r['max'] == pytest.approx((top*n).item(), rel=.0015)
    if smooth: up = F.interpolate(exact[None, None], (S, S), mode='bilinear')[0, 0]
    else: up = exact.repeat_interleave(S//exact.shape[0], 0).repeat_interleave(S//exact.shape[1], 1)
    assert (r['values']/n - up).abs().max() <= .0015*top

def canvas_pixels(page, selector, pixels):
    "Colours of a canvas in the middle of pixels of the image, (n, 3)"
    return torch.tensor(page.locator(selector).evaluate('''(c, [pixels, S]) => pixels.map(([row, col]) => {
        const x = Math.floor((col + .5)*c.width/S), y = Math.floor((row + .5)*c.height/S)
        return [...c.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3) })''', [pixels, S]))

def drawn(page, row, col): return canvas_pixels(page, CELLS, [[row, col]])[0]
def status(page): return page.locator('.status').text_content()

def place(row, col): return f'row {int(row)}, column {int(col)}'

def test_opens_with_a_point_and_moving_shows_the_map_that_python_computes(opened, explorer, maps):
    page = opened()
    m = maps['G 32x32']
    same_map(seen(page), m, 0, *explorer.header['start'])
    assert page.locator('h1').text_content() == 'Attention explorer'
    assert 'Move over the image' in page.locator('.notice').text_content()
    for row, col in [(0, 0), (63, 63), (20, 41), (33, 2)]:
        move(page, row, col)
        same_map(seen(page), m, 0, row, col)
    exact = m.at(33, 2)[0]
    i, j = divmod(exact.argmax().item(), 16)
    strong = exact*256 >= 1.5
    assert status(page) == (
        f'The point at row 33, column 2 looks most at {place(i*4+2, j*4+2)}: {exact.max()*256:.1f} times '
        f'an even spread (its equal share). The outline holds {100*exact[strong].sum():.0f}% of its '
        f'attention, on {100*strong.float().mean():.0f}% of the image.')
    press(page, 'To here')
    move(page, 21, 40)
    same_map(seen(page), m, 0, 21, 40, to=True)
    received = m.looked_at_from(21, 40)[0]
    i, j = divmod(received.argmax().item(), 32)
    assert status(page).startswith(f'Of all points, {place(i*2+1, j*2+1)} looks here most: ')
    assert f'The average of all points is {received.mean()*256:.1f} times.' in status(page)

def raw(explorer): return torch.frombuffer(bytearray(explorer.data), dtype=torch.uint8)

def image_bytes(explorer, i):
    return raw(explorer)[i*3*S*S:(i + 1)*3*S*S].reshape(S, S, 3).float()

def blended(explorer, rgb, values, a):
    "Colours (n, 3) of an image under a map with values in [0, 1]"
    magma = raw(explorer)[explorer.header['magma']:][:768].reshape(256, 3).float()
    return (1 - a)*(90 + (1 - a)**2*(rgb - 90)) + a*magma[(values*255).round().long()]

def test_image_and_map_are_apart_and_blended(opened, explorer):
    page = opened()
    press(page, 'Clear points')
    move(page, 30, 10)
    r = seen(page)
    rgb, values = image_bytes(explorer, 0), r['values']
    (ty, tx), (y, x) = r['to'], (30, 10)
    def line(field, level):  # pixels near a line between values above a level and those below
        strong = (field >= level)[None].float()
        above, below = [F.max_pool2d(v, 5, 1, 2)[0] for v in (strong, 1 - strong)]
        return (above*below).bool()
    # the color of each pixel, blurred, and how far it is from the color in the middle of all
    color = F.avg_pool2d(F.pad(rgb.permute(2, 0, 1), (1,)*4, mode='replicate'), 3, 1)
    away = (color - rgb.flatten(0, 1).median(0).values[:, None, None]).norm(dim=0)
    low, high = away.min(), away.max()
    third = (high - low)/3
    cells = r['weights'].view(16, 16).repeat_interleave(4, 0).repeat_interleave(4, 1)
    lines = {CELLS: line(cells, 1.5), MAP: line(away, low + third) | line(away, high - third)}
    def far(c): return abs((tx - x)*(c[0] - y) - (ty - y)*(c[1] - x))/((tx - x)**2 + (ty - y)**2)**.5
    def clear(c, canvas): return far(c) > 5 and math.dist(c, (30, 10)) > 6 and not lines[canvas][c]
    for overlay in (0, .5, 1):
        page.get_by_role('slider', name='From the image to the map').fill(str(overlay))
        frame(page)
        # a value between two colours may be rounded to either; the map is smoothed on the screen
        for canvas, a, most in (CELLS, overlay, 3), (MAP, 1, 24):
            cells = [(i, j) for i in range(0, S, 3) for j in range(0, S, 3) if clear((i, j), canvas)]
            assert len(cells) > 40
            rows, cols = torch.tensor(cells).T
            expected = blended(explorer, rgb[rows, cols], (values/r['limit'])[rows, cols], a)
            assert (canvas_pixels(page, canvas, cells) - expected).abs().max() <= most
    # where half of the map is mixed in, three quarters of the weight over white do not look like the maximum
    def mixed(light, weight):
        rgb = blended(explorer, torch.full((3,), light), torch.tensor(weight), .5)
        return rgb @ torch.tensor([.3, .59, .11])
    assert mixed(255., .75) < mixed(0., 1.)

def middle(r): return [int((a + b)/2) for a, b in zip(r['point'], r['to'])]

def coloured(page, row, col):
    "Is the first colour anywhere on this pixel or beside it?"
    return page.evaluate('''([row, col, S]) => {
        const c = document.querySelector('canvas[role=application]'), s = c.width/S
        const d = c.getContext('2d').getImageData((col - 1)*s, (row - 1)*s, 3*s, 3*s).data
        for (let i = 0; i < d.length; i += 4)
            if (d[i] === 0xD5 && d[i + 1] === 0x5E && d[i + 2] === 0) return true
        return false }''', [row, col, S])

def test_layers_classes_and_seeds(opened, maps):
    page = opened()
    page.keyboard.press('Escape')
    press(page, 'Clear points')
    arrows = {}
    for klass, seed, image in [('cat', '4', 1), ('<dog>', '4', 3), ('<dog>', '3', 2)]:
        page.get_by_role('combobox', name='Class').select_option(klass)
        page.get_by_role('combobox', name='Seed').select_option(seed)
        for layer in maps:
            choose_layer(page, layer)
            move(page, 30, 10)
            r = seen(page)
            same_map(r, maps[layer], image, 30, 10)
            assert page.locator('.panels h3 >> nth=1').text_content().endswith(layer[2:])
            arrows[layer] = coloured(page, *middle(r))
    assert arrows['G 32x32'] and not arrows['D 8x8']          # no arrow where attention is alike
    assert 'looks nearly everywhere alike, at most 1.' in status(page)
    label = page.locator(CELLS).get_attribute('aria-label')
    assert 'Class <dog>, seed 3, 64 by 64 pixels, with attention of layer D 8x8' in label
    shown = page.locator('.strip:not(.pins) .card').all_text_contents()
    tops = [f'{maps[l].at(30, 10)[2].max()*maps[l].keys[0]**2:.1f}' for l in maps]
    names = 'Generator 8x8', 'Generator 32x32', 'Discriminator 8x8'
    assert shown == [f'{n}, up to {t} times' for n, t in zip(names, tops)]

def test_scale_and_values(opened, maps):
    "The color bar, the value of the cell under the pointer, and one scale for all points"
    page = opened()
    m = maps['G 32x32']
    move(page, 50, 9)
    move(page, 40, 12, MAP)
    point = seen(page)['point']                                   # it has gone back to the kept one
    exact = m.at(*point)[0]
    v = exact[10, 3]*256
    words = f'{v:.3f}' if v < .05 else f'{v:.1f}'
    assert page.locator('figcaption', has_text='At row').text_content() == (
        f'At row 42, column 14: {words} times an even spread.')
    scale = page.locator('.scale').first.text_content()
    assert scale == f'0even spread{exact.max()*256:.1f} times an even spread'
    page.get_by_label('Smooth').uncheck()
    page.get_by_label('Same scale').check()
    same_map(seen(page), m, 0, *point, smooth=False)
    assert seen(page)['limit'] == pytest.approx((m.beta[0].max()*256).item(), rel=.0015)
    choose_layer(page, 'D 8x8')
    page.get_by_label('Same scale').uncheck()
    assert seen(page)['limit'] == 2                               # flat maps are not drawn as strong

def test_keys_alone(opened, maps):
    page = opened()
    m = maps['G 32x32']
    for _ in range(15):
        page.keyboard.press('Tab')
        if page.evaluate("document.activeElement.getAttribute('role')") == 'application': break
    else: raise AssertionError('the image cannot be reached by Tab')
    page.keyboard.press('Escape')
    assert seen(page) is None and pins(page) == 0
    assert 'No point is chosen' in status(page)
    assert page.locator('.panels h3 >> nth=1').text_content() == 'Attention map: Generator 32x32'
    assert not page.get_by_text('Gray lines').is_visible() and not page.locator('.scale').is_visible()
    page.keyboard.press('ArrowRight')
    same_map(seen(page), m, 0, 33, 33)  # begins in the middle: cell (16, 16) of 32x32
    assert page.locator('.panels h3 >> nth=1').text_content() == 'Where this point looks: Generator 32x32'
    assert page.get_by_text('Gray lines').is_visible()
    page.keyboard.press('ArrowRight')
    page.keyboard.press('ArrowUp')
    same_map(seen(page), m, 0, 31, 35)
    page.keyboard.press('Enter')
    page.keyboard.press('ArrowDown')
    page.keyboard.press(' ')
    assert pins(page) == 2
    for _ in range(40): page.keyboard.press('ArrowLeft')
    same_map(seen(page), m, 0, 33, 1)                             # stops at the border
    page.keyboard.press('Delete')                                 # the one kept last
    assert pins(page) == 1 and seen(page)['point'] == [31, 35]
    page.keyboard.press('f')
    same_map(seen(page), m, 0, 31, 35, to=True)
    page.keyboard.press('f')
    page.keyboard.press('l')
    same_map(seen(page), maps['D 8x8'], 0, 31, 35)
    page.keyboard.press('?')
    assert page.get_by_role('dialog').get_by_text('Arrow keys').is_visible()
    page.keyboard.press('Escape')
    assert not page.get_by_role('dialog').count() and pins(page) == 1

def pins(page):
    frame(page)
    return page.locator('.pins .card').count()

def test_kept_points(opened, maps):
    "Each has its color, its map and its way out; the chosen one is what leaving the image goes back to"
    page = opened()
    press(page, 'Clear points')
    assert pins(page) == 0 and seen(page) is None
    assert page.get_by_role('button', name='Clear points').is_disabled()
    # not on a button that is off now
    assert page.evaluate("document.activeElement.getAttribute('role')") == 'application'
    places = [(10, 10), (50, 50), (20, 50)]
    for p in places: click(page, *p)
    page.mouse.down()
    page.mouse.up()  # and no second point at the same place
    move(page, 60, 5)
    assert pins(page) == 3
    colours = [tuple(drawn(page, *p).tolist()) for p in places]
    assert colours == [(0xD5, 0x5E, 0), (0, 0x9E, 0x73), (0, 0x72, 0xB2)]
    assert tuple(drawn(page, 60, 5).tolist()) == (0xE6, 0x9F, 0)  # the point that moves has the next one
    cards = page.locator('.pins .card')
    assert cards.nth(1).locator('canvas').evaluate('c => c.style.borderColor') == 'rgb(0, 158, 115)'
    assert page.get_by_role('button', name='Point 2. The point at row 50, column 50 looks').is_visible()
    shown = torch.tensor(cards.nth(1).locator('canvas').evaluate(
        "c => [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"))
    exact = maps['G 32x32'].at(50, 50)[0]
    strongest = shown[2:].reshape(16, 16, 4)[..., :3].sum(-1)
    assert shown[:2].tolist() == [16, 16] and strongest.argmax() == exact.argmax()
    page.mouse.move(1, 1)
    assert seen(page)['point'] == [20, 50]
    cards.nth(0).get_by_role('button').first.click()
    assert seen(page)['point'] == [10, 10]
    move(page, 60, 5)
    page.mouse.move(1, 1)
    assert seen(page)['point'] == [10, 10]
    page.get_by_role('button', name='Let go of point 2').click()
    assert pins(page) == 2 and seen(page)['point'] == [20, 50]
    assert tuple(drawn(page, 20, 50).tolist()) == (0, 0x9E, 0x73)

def test_arrow_where_the_figures_have_one(opened, tmp_path):
    "Words and arrow go by the number as it is shown"
    q, k = torch.zeros(1, 64, 1), torch.zeros(1, 64, 1)
    k[0, 41] = 1
    tops = torch.linspace(1.44, 1.5, 64)  # the maxima in multiples of uniform, one for each query
    q[0, :, 0] = (tops*63/(64 - tops)).log()
    given = {'G 8x8': AttentionMap('', q, k, (8, 8), (8, 8), (S, S))}
    e = AttentionExplorer(*view(torch.zeros(1, 3, S, S), given, [('', 0)]))
    e.save(tmp_path/'e.html')
    page = opened(tmp_path/'e.html')
    for i in (0, 63):
        move(page, i//8*8, i%8*8)
        frame(page)
        told = 'most at row 44, column 12' if round(tops[i].item(), 1) >= 1.5 else 'everywhere alike'
        assert told in status(page) and f'{tops[i]:.1f} times' in status(page)

def test_a_place_that_all_points_look_at(opened, tmp_path):
    "Serves the whole image; its color is that of the number on the scale; and no point looks elsewhere"
    q, k = torch.full((1, 64, 1), 9.), torch.zeros(1, 64, 1)
    k[0, 41] = 1
    given = {'G 8x8': AttentionMap('', q, k, (8, 8), (8, 8), (S, S))}
    e = AttentionExplorer(*view(torch.zeros(1, 3, S, S), given, [('', 0)]))
    e.save(tmp_path/'e.html')
    page = opened(tmp_path/'e.html')
    page.locator('.term').first.focus()                           # explained where it comes first
    shown = page.locator('.term').first.evaluate("e => getComputedStyle(e, '::after').content")
    assert 'each place would get the same weight' in shown
    move(page, 5, 60)
    assert status(page).endswith('100% of all points look there most, so this place serves the whole image.')
    best = raw(e)[e.header['magma']:][765:768].int()              # an arrow covers the middle itself
    near = canvas_pixels(page, MAP, [[44 + i/8, 11.5 + j/8] for i in range(-6, 3) for j in range(-6, 3)])
    assert (near - best).abs().amax(1).min() <= 30
    press(page, 'To here')
    move(page, 5, 60)
    assert status(page) == 'No point looks at row 5, column 60.'

def test_words_on_a_place_that_few_points_look_at(opened, tmp_path):
    "They are of the points that do, of those that do not, and of the least of them"
    q, k = torch.ones(1, 64, 1), torch.zeros(1, 64, 1)
    k[0, 41], q[0, :32] = .3, -9.
    given = {'G 8x8': AttentionMap('', q, k, (8, 8), (8, 8), (S, S))}
    AttentionExplorer(*view(torch.zeros(1, 3, S, S), given, [('', 0)])).save(tmp_path/'e.html')
    page = opened(tmp_path/'e.html')
    press(page, 'To here')
    move(page, 44, 12)
    assert status(page) == (
        'Some points look at row 44, column 12, but none strongly: at most 1.3 times an even spread '
        '(its equal share).')
    move(page, 60, 60)
    assert status(page) == (
        'All points look at row 60, column 60 nearly alike, at most 1.0 times an even spread '
        '(its equal share).')

def test_drawn_before_the_next_frame(opened, explorer):
    "Movements before the frame are drawn at once, but only one in a frame, and the last one in the end"
    page = opened()
    frame(page)
    points = page.evaluate('''async () => {
        const c = document.querySelector('canvas[role=application]'), b = c.getBoundingClientRect()
        const root = c.closest('.sagan'), seen = []
        await new Promise(requestAnimationFrame)
        await new Promise(done => setTimeout(done))
        const moves = [['pointerrawupdate', 100], ['pointerrawupdate', 200], ['pointermove', 300]]
        for (const [kind, x] of moves) {
            const where = { clientX: b.left + x, clientY: b.top + 50 }
            c.dispatchEvent(new PointerEvent(kind, { ...where, isPrimary: true, bubbles: true }))
            seen.push(root.attention().point[1]) }
        await new Promise(requestAnimationFrame)
        await new Promise(requestAnimationFrame)
        return [...seen, root.attention().point[1], c.clientWidth] }''')
    cols = [int(x*S/points[-1]) for x in (100, 100, 100, 300)]
    assert points[:-1] == cols

def test_touch(opened, maps):
    """A tap keeps a point, also one that slips by 8 pixels; a swipe scrolls; targets are 44 pixels high

    Image, map and the sentence on them are on the first screen."""
    page = opened(width=390, has_touch=True, is_mobile=True, device_scale_factor=3)
    box = page.locator(CELLS).bounding_box()
    assert box['width'] > 170 and page.evaluate('document.documentElement.scrollWidth') <= 390
    for part in (MAP, '.status', '.scale', 'button:text("Hide where")'):
        at = page.locator(part).first.bounding_box() or box           # nobody draws for this page
        assert at['y'] + at['height'] < 844, part
    assert page.locator(CELLS).evaluate('c => c.width') == round(box['width']*3)   # sharp
    assert 'Tap the image' in page.locator('.notice').text_content()
    client = page.context.new_cdp_session(page)
    def touch(*way):
        way = [dict(x=x, y=y) for x, y in way]
        client.send('Input.dispatchTouchEvent', dict(type='touchStart', touchPoints=[way[0]]))
        for p in way[1:]: client.send('Input.dispatchTouchEvent', dict(type='touchMove', touchPoints=[p]))
        client.send('Input.dispatchTouchEvent', dict(type='touchEnd', touchPoints=[]))
        frame(page)
    x, y = box['x'] + 20.5/S*box['width'], box['y'] + 40.5/S*box['height']
    touch((x - 8, y), (x, y))
    same_map(seen(page), maps['G 32x32'], 0, 40, 20)
    assert pins(page) == 2
    there = page.locator(MAP).bounding_box()
    touch((there['x'] + 9, there['y'] + 9))
    assert page.locator('figcaption', has_text='At row').is_visible()   # after the finger, too
    touch((x, y + 40), *[(x, y + 40 - i) for i in range(0, 240, 20)])
    assert page.evaluate('scrollY') > 100 and pins(page) == 2 and seen(page)['point'] == [40, 20]
    low = page.evaluate("""() => [...document.querySelectorAll('.sagan :is(button, select, input, summary)')]
        .filter(e => e.offsetParent && (e.closest('label') ?? e).getBoundingClientRect().height < 43.9)
        .map(e => e.outerHTML.slice(0, 80))""")
    assert not low

def test_a_large_screen_is_used(opened):
    page = opened(width=2560, height=1440)
    for canvas in (CELLS, MAP): assert page.locator(canvas).bounding_box()['width'] > 700

def contrast(place):
    "Of the text of an element against what is behind it"
    def luminance(rgb):
        linear = [v/12.92 if v <= .03928 else ((v + .055)/1.055)**2.4 for v in (c/255 for c in rgb[:3])]
        return sum(w*v for w, v in zip((.2126, .7152, .0722), linear))
    dark, light = sorted(map(luminance, place.evaluate('''e => {
        const rgb = s => s.match(/[\\d.]+/g).map((v, i) => s.startsWith('color(') && i < 3 ? 255*v : +v)
        let b = e
        while (b.parentElement && rgb(getComputedStyle(b).backgroundColor)[3] === 0) b = b.parentElement
        const paper = rgb(getComputedStyle(b).backgroundColor)
        return [rgb(getComputedStyle(e).color), paper[3] === 0 ? [255, 255, 255] : paper] }''')))
    return (light + .05)/(dark + .05)

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_contrast(opened, scheme):
    page = opened(color_scheme=scheme)
    for selector in ('.status', 'label span', 'select', 'button:enabled', 'button[aria-pressed=true]',
                     'figcaption', '.notice', '.scale span'):
        assert contrast(page.locator(f'.sagan {selector} >> visible=true').first) >= 4.5, selector

def test_what_is_saved(opened, explorer, maps, tmp_path):
    "A picture of both panels; a page that shows the same and can be saved again; a link"
    page = opened()
    with page.expect_download() as d: page.get_by_role('button', name='Save HTML').click()
    d.value.save_as(tmp_path/'a.html')
    ours, theirs = explorer.static(), (tmp_path/'a.html').read_text(encoding='utf-8')
    def state(text):
        a, b = text.split('id="sagan-state">', 1)
        s, c = b.split('</script>', 1)
        return a, json.loads(s), c
    assert state(ours) == state(theirs)                   # saved in the browser and in Python
    choose_layer(page, 'G 8x8')
    page.get_by_role('combobox', name='Seed').select_option('4')
    click(page, 30, 10)
    press(page, 'To here')
    frame(page)
    with page.expect_download() as d: page.get_by_role('button', name='Save PNG').click()
    assert d.value.suggested_filename == 'attention-cat-seed-4-G-8x8.png'
    d.value.save_as(tmp_path/'a.png')
    im, (w, h) = Image.open(tmp_path/'a.png'), page.locator(CELLS).evaluate('c => [c.width, c.height]')
    assert im.width > 2*w and im.height > h
    assert im.getpixel((int(60.5*w/S), int(5.5*h/S)))[:3] == tuple(drawn(page, 5, 60).tolist())
    right = canvas_pixels(page, MAP, [[5, 60]])[0]
    assert im.getpixel((im.width - w + int(60.5*w/S), int(5.5*h/S)))[:3] == tuple(right.tolist())
    press(page, 'Copy view')
    link = page.get_by_role('dialog').get_by_label('View').input_value()
    press(page, 'Close')
    with page.expect_download() as d: page.get_by_role('button', name='Save HTML').click()
    d.value.save_as(tmp_path/'b.html')
    for path in ((tmp_path/'b.html').as_uri(), link):
        page.goto('about:blank')
        page.goto(path)
        page.wait_for_selector(CELLS)
        same_map(seen(page), maps['G 8x8'], 1, 30, 10, to=True)
        assert pins(page) == 2

def test_a_frame_is_as_high_as_what_it_shows(opened, explorer, tmp_path):
    "As in a report: nothing scrolls inside of it"
    framed = f'<iframe style="width:100%;height:99px" srcdoc="{html.escape(explorer.static())}"></iframe>'
    head = '<!doctype html><meta name="viewport" content="width=device-width"><canvas role="application">'
    (tmp_path/'report.html').write_text(f'{head}</canvas>{framed}', encoding='utf-8')
    for width in (1200, 390):
        page = opened(tmp_path/'report.html', width)
        inner = page.frames[1]
        inner.wait_for_selector(CELLS)
        fits = """() => document.documentElement.scrollHeight <= innerHeight && innerHeight > 400"""
        inner.wait_for_function(fits)
        page.wait_for_timeout(200)
        assert inner.evaluate(fits) and inner.evaluate('innerHeight') < 2500        # and it has not grown on
        assert not inner.locator('h1').is_visible()                   # the page around it has a title

def test_module_as_anywidget_calls_it(opened, explorer, maps, tmp_path):
    """With a model like anywidget's: bytes as a DataView at some offset

    What the browser changes is set and saved, what Python changes is shown."""
    apart = 'data', 'changed', 'after', 'weights', 'layout'
    state = {k: v for k, v in explorer.get_state().items() if k not in apart}
    state = json.dumps(state).replace('</', '<\\/')
    raw = base64.b64encode(bytes(12) + explorer.data).decode()
    (tmp_path/'widget.html').write_text(f'''<!doctype html><meta charset="utf-8"><div id="here"></div>
<script type="module" id="js">{explorer._esm}
const values = {state}, heard = {{}}, raw = Uint8Array.from(atob("{raw}"), c => c.charCodeAt(0))
values.data = new DataView(raw.buffer, 12)
window.saved = 0
const set = (k, v) => {{ values[k] = v, (heard['change:' + k] ?? []).forEach(f => f()) }}
const on = (e, f) => {{ (heard[e] ??= []).push(f) }}
window.model = {{ get: k => values[k], set, save_changes() {{ window.saved++ }}, on }}
window.leave = render({{ model, el: document.getElementById('here') }})</script>''', encoding='utf-8')
    page = opened(tmp_path/'widget.html')
    move(page, 30, 10)
    same_map(seen(page), maps['G 32x32'], 0, 30, 10)
    assert page.evaluate("[model.get('point'), saved]") == [[30, 10], 1]
    for change in ("'point', [3, 60]", "'layer', 'D 8x8'", "'image', 3"):
        page.evaluate(f'model.set({change})')
    same_map(seen(page), maps['D 8x8'], 3, 3, 60)
    assert page.get_by_role('combobox', name='Class').input_value() == '<dog>'
    before = page.locator(CELLS).bounding_box()
    page.evaluate("model.set('message', 'labels go from 0 to 3 <b>')")
    assert page.get_by_role('alert').text_content() == 'labels go from 0 to 3 <b>'
    assert page.locator(CELLS).bounding_box() == before       # nothing jumps
    page.evaluate("model.set('header', {})")
    frame(page)
    assert not page.locator(CELLS).is_visible() and page.get_by_role('alert').is_visible()
    page.evaluate('leave()')

SETUP = f'''import torch
from sagan.config import Config
from sagan.training import SAGAN
torch.manual_seed(0)
cfg = Config(size={S}, n_classes=3, g_width=4, d_width=8, g_attention=(8, 16), d_attention=(16,),
             form='released', z_dim=16)
model = SAGAN(cfg).eval()
with torch.no_grad():
    for layer in model.ema.attention.values(): layer.gamma.fill_(1.)
'''

@pytest.fixture
def notebook(tmp_path):
    "A folder with a notebook: the explorer of an untrained model, and a cell that prints where the point is"
    cells = [SETUP + "from sagan.explorer import explore\nbox = explore(model, ['cat', 'dog', 'owl'])\nbox",
             "print('PYTHON', box.point, box.pins, box.layer, box.seed)"]
    empty = dict(cell_type='code', execution_count=None, metadata={}, outputs=[])
    cells = [empty | dict(id=f'c{i}', source=c) for i, c in enumerate(cells)]
    kernel = dict(kernelspec=dict(display_name='Python 3', language='python', name='python3'))
    nb = dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)
    (tmp_path/'explorer.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    return tmp_path

@pytest.fixture
def served(notebook):
    "Starts a server in the notebook's folder, in a process group that ends with the test; gives its address"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    at, started = f'http://127.0.0.1:{port}', []
    folders = 'HOME', 'JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR'
    env = os.environ | {k: str(notebook/k.lower()) for k in folders}
    env['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get('PYTHONPATH', '')])
    def start(module, *args):
        with open(notebook/'server.log', 'w', encoding='utf-8') as log:
            command = [sys.executable, '-m', module, *args, '--no-browser', f'--port={port}']
            started.append(subprocess.Popen(command, cwd=notebook, env=env, stdout=log, stderr=log,
                                            start_new_session=True))
        for _ in range(1200):
            try:
                socket.create_connection(('127.0.0.1', port), 1).close()
                return at
            except OSError:
                assert started[0].poll() is None, (notebook/'server.log').read_text(encoding='utf-8')
                time.sleep(.25)
        log = (notebook/'server.log').read_text(encoding='utf-8')
        raise AssertionError(f'the server has not started: {log}')
    yield start
    for p in started:
        p.terminate()
        try: p.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            p.wait()

def labelled(page, name):
    has_name = "name => document.querySelector('canvas[role=application]').ariaLabel.includes(name)"
    page.wait_for_function(has_name, arg=name, timeout=60_000)

def effect(page, words):
    "Wait for what attention causes, in words and as pictures"
    page.get_by_role('status').get_by_text(words).wait_for(timeout=20_000)
    assert page.get_by_role('button', name='After').get_attribute('aria-pressed') == 'true'
    return page.get_by_role('img', name='Difference, amplified').evaluate('''c =>
        [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 0)''')

def choose(page, role, name, value):
    field = page.get_by_role(role, name=name, exact=role != 'slider')
    if role == 'combobox': return field.select_option(value)
    field.fill(value)
    field.press('Enter') if role == 'spinbutton' else field.dispatch_event('change')

@pytest.fixture(scope='module')
def model():
    space = {}
    exec(SETUP, space)
    return space['model']

def explore_there(page, tmp_path, model, kernel=True):
    """Uses all of the explorer that draws, by its names

    Compares what it shows with what is computed in this process."""
    G = model.ema
    def expected(layer, y, *seeds, t=0.):
        return generated_maps(model, latents(G, seeds[:1], seeds[1:], t), torch.tensor([y]))[1][layer]
    page.wait_for_selector(CELLS, timeout=60_000)
    page.locator(CELLS).scroll_into_view_if_needed()
    assert pins(page) == 1
    if kernel: unfold(page)
    click(page, 20, 9)
    same_map(seen(page), expected('G 16x16', 0, 0), 0, 20, 9)
    assert pins(page) == 2
    page.keyboard.press('ArrowDown')
    # the middle of the next cell of 4 pixels: 24 to 27, and of this column: 8 to 11
    same_map(seen(page), expected('G 16x16', 0, 0), 0, 26, 10)
    press(page, 'Next')
    labelled(page, 'Class cat, seed 1,')
    same_map(seen(page), expected('G 16x16', 0, 1), 0, 26, 10)
    choose(page, 'combobox', 'Class', 'owl')
    labelled(page, 'Class owl, seed 1,')
    choose(page, 'spinbutton', 'Seed', '5')
    labelled(page, 'Class owl, seed 5,')
    hide = page.get_by_role('button', name='Hide where it looks')
    def refused(why): return hide.is_disabled() and hide.get_attribute('title') == why and (
        page.locator('.effect').get_by_text(why).is_visible())
    for layer in ('D 16x16', 'G 8x8'):
        choose_layer(page, layer)
        labelled(page, f'layer {layer}')
        same_map(seen(page), expected(layer, 2, 5), 0, 26, 10)
        if layer[0] == 'D':
            assert refused('Choose a layer of the generator: the discriminator does not draw.')
    press(page, 'To here')
    assert refused('Choose "From here": only where a point looks can be hidden.')
    press(page, 'From here')
    assert hide.is_enabled()
    choose(page, 'spinbutton', 'Towards seed', '7')
    choose(page, 'slider', 'How far', '0.5')
    labelled(page, 'seed 5 towards 7 at 0.5')
    same_map(seen(page), expected('G 8x8', 2, 5, 7, t=.5), 0, 26, 10)
    press(page, 'Play')
    labelled(page, 'at 0.56')
    press(page, 'Pause')
    choose(page, 'slider', 'How far', '0')
    labelled(page, 'seed 5,')
    choose(page, 'slider', 'Attention', '2')
    effect(page, 'Attention is multiplied by 2. On average, a pixel changes by')
    press(page, 'Undo changes')
    press(page, 'Hide')
    drag(page, (20, 30), (40, 50))
    x, z, y = G(latents(G, [5]), torch.tensor([2])), latents(G, [5]), torch.tensor([2])
    m = expected('G 8x8', 2, 5)
    def hiding(m):
        with intervene(G, m, hide=(16, 16, 48, 64)): return generated_maps(model, z, y)
    after = hiding(m)[0]
    change = (after - x)[0].abs().mean(0)
    words = ('In Generator 8x8 no point looks at the hidden region. On average, a pixel changes by '
             f'{change.mean()*50:.2g}% of the way from black to white; the one that changes most, by '
             f'{change.max()*50:.2g}%.')
    shown = effect(page, words)
    assert (torch.tensor(shown).reshape(S, S) - change/change.max()*255).abs().max() < 1.5
    most = f'{change.max()*50:.2g}%'
    verdict = f"The image {'hardly changes' if change.max() < .1 else 'changes'}: {change.mean()*50:.2g}%"
    assert page.locator('.verdict').text_content() == (
        f'{verdict} on average, at most {most} at one pixel (100% is from black to white).')
    amplified = float(f'{2/change.max():.2g}')
    told = page.locator('.pictures figcaption').text_content()
    assert told == f'Difference, amplified {amplified:g} times: black is none, white is {most}'
    # the map that is left, also of the discriminator, which looks at the changed image; and the one before
    move(page, 40, 50)
    hidden = torch.zeros(m.keys, dtype=torch.bool)
    hidden[1:3, 1:] = True
    left = m.at(40, 50)[0].masked_fill(hidden, 0)
    assert (seen(page)['weights']/16 - (left/left.sum()).flatten()).abs().max() < 1e-3
    covered = hidden.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert not seen(page)['values'][covered].any()                # also where a map is smooth
    assert status(page).startswith('Now the point at row 40, column 50 looks')
    choose_layer(page, 'D 16x16')
    effect(page, 'In Generator 16x16 no point looks at the hidden region. On average, a pixel')
    move(page, 40, 50)
    same_map(seen(page), hiding(expected('G 16x16', 2, 5))[1]['D 16x16'], 0, 40, 50)
    choose_layer(page, 'G 8x8')
    effect(page, words)
    page.locator(CELLS).press('b')
    move(page, 40, 50)
    same_map(seen(page), m, 0, 40, 50)
    press(page, 'Undo changes')
    page.get_by_role('button', name='Before').wait_for(state='hidden')
    press(page, 'Cut')
    drag(page, (20, 30), (21, 31))
    effect(page, 'In Generator 8x8 the cut region gets nothing from attention. On average, a pixel')
    press(page, 'Look')
    press(page, 'Random')
    other = "() => !document.querySelector('canvas[role=application]').ariaLabel.includes('seed 5,')"
    page.wait_for_function(other)
    for text in ('.verdict', 'button:text("Undo changes")'):      # another image has no region of the former
        page.locator(text).wait_for(state='hidden')
    save_there(page, tmp_path)
    if kernel: look_at_own_images(page, tmp_path, model)
    choose(page, 'spinbutton', 'Seed', '6')
    labelled(page, 'Class owl, seed 6,')
    for c in ('label span', 'button:enabled', '.status'):
        assert contrast(page.locator(f'.sagan {c} >> visible=true').first) >= 4.5, c

def look_at_own_images(page, tmp_path, model):
    x = torch.randint(0, 256, (1, 3, S, S), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(tmp_path/'own.png')
    with page.expect_file_chooser() as chooser: press(page, 'Own images')
    chooser.value.set_files(tmp_path/'own.png')
    labelled(page, 'Class owl, image own.png,')
    move(page, 33, 3)
    same_map(seen(page), named_maps(model.D, to_unit(x), torch.tensor([2]))[1]['D 16x16'], 0, 33, 3)

def drag(page, start, end):
    move(page, *start)
    page.mouse.down()
    move(page, *end)
    page.mouse.up()

def save_there(page, tmp_path):
    "Both kinds of file, saved from a page with a kernel; the saved page opened shows the same map"
    move(page, 40, 50)
    r = seen(page)
    with page.expect_download() as d: page.get_by_role('button', name='Save PNG').click()
    d.value.save_as(tmp_path/'a.png')
    assert Image.open(tmp_path/'a.png').width > 2*page.locator(CELLS).evaluate('c => c.width')
    with page.expect_download() as d: page.get_by_role('button', name='Save HTML').click()
    d.value.save_as(tmp_path/'a.html')
    saved = page.context.browser.new_page()
    saved.goto((tmp_path/'a.html').as_uri())
    saved.wait_for_selector(CELLS)
    assert pins(saved) == 2
    move(saved, 40, 50)
    again = seen(saved)
    saved.close()
    assert again['point'] == r['point'] and again['max'] == r['max']
    assert torch.equal(again['weights'], r['weights'])

# Without a kernel

FORMS = [
    dict(n_classes=3, form='released', g_attention=(8, 16), d_attention=(16, 8)),
    dict(n_classes=0, form='preprint', g_attention=(32,), d_attention=(8, '8-2'), d_relu_skip=True),
    dict(n_classes=2, form='published', g_attention=(), d_attention=(16,), z_dim=20, g_sn=False)]

@pytest.mark.parametrize('values', FORMS, ids=[f['form'] for f in FORMS])
def test_networks_in_the_browser(browser, values):
    "Images and maps, computed in JavaScript, are what PyTorch computes"
    torch.manual_seed(0)
    cfg = Config(**dict(size=32, g_width=4, d_width=8, z_dim=16) | values)
    model = SAGAN(cfg).eval()
    with torch.no_grad():
        for name, p in model.ema.named_parameters():
            if 'bn' in name or 'gamma' in name: p.normal_(1., .3)
        for name, b in model.ema.named_buffers():
            if 'running_var' in name: b.uniform_(.2, 2)
            elif 'running_mean' in name: b.normal_()
        for layer in model.D.attention.values(): layer.gamma.fill_(.5)
    network, weights = pack_networks(model, [f'{i}' for i in range(cfg.n_classes)])
    page = browser.new_page()
    page.add_script_tag(path=Path(__file__).parent.parent/'sagan'/'generator.js')
    for seed, y in (0, 0), (123456, max(0, cfg.n_classes - 1)):
        image, found = page.evaluate('''([network, text, seed, y]) => {
            const bytes = new DataView(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer)
            const layers = openNetwork(network, bytes), z = latent(network, seed, 7, .3)
            const { image, maps } = generate(network, layers, z, y)
            return [[...image], [...maps, ...look(network, layers, image)].map(({ name, q, k, depth }) =>
                [name, depth, [...q], [...k]])] }''', [network, base64.b64encode(weights).decode(), seed, y])
        labels = torch.tensor([y]) if cfg.n_classes else None
        x, maps = generated_maps(model, latents(model.ema, [seed], [7], .3), labels)
        assert x.std() > .1 and [name for name, *_ in found] == list(maps)
        assert (torch.tensor(image).view_as(x) - x).abs().max() < 1e-3
        for name, depth, *qk in found:
            q, k = [torch.tensor(t).view(1, -1, depth) for t in qk]
            assert ((q @ k.mT).softmax(-1) - maps[name].beta).abs().max() < 1e-3
    page.close()

def test_cells_as_boxes(browser):
    "An outline becomes boxes in the browser, which cover its cells there and in Python"
    page, folder = browser.new_page(), Path(__file__).parent.parent/'sagan'
    explorer = (folder/'explorer.js').read_text(encoding='utf-8')
    for script in (folder/'generator.js').read_text(encoding='utf-8'), explorer.replace('export default', ''):
        page.add_script_tag(content=script)
    for grid, size in ((8, 8), (32, 32)), ((5, 7), (32, 33)), ((16, 16), (16, 16)):
        cells = (torch.rand(grid, generator=torch.Generator().manual_seed(0)) > .6).flatten().tolist()
        found, back = page.evaluate("""([cells, grid, size]) => {
            const found = boxes(cells, grid, size)
            return [found, covered(found, grid, size)] }""", [cells, grid, size])
        assert back == cells == _inside(found, grid, size).tolist()
    page.close()

def said(page): return page.locator('p[role=status]').text_content()

def test_page_that_draws(opened, model, tmp_path):
    "A file, opened without a network; saved, opened again, and by its link it shows the same"
    e = explore(model, ['cat', 'dog', 'owl'])
    e.save(tmp_path/'e.html')
    page = opened(tmp_path/'e.html')
    about = page.locator('.about')
    assert about.text_content() == 'This is a model of ImageNet at 64x64 pixels in 3 classes.'
    assert page.locator('h1').bounding_box()['x'] == about.bounding_box()['x']
    explore_there(page, tmp_path, model, kernel=False)
    choose(page, 'slider', 'attention', '0.5')
    press(page, 'Hide where it looks')
    words = said(page)
    press(page, 'Copy view')
    link = page.get_by_role('dialog').get_by_label('View').input_value()
    press(page, 'Close')
    given = json.loads(unquote(link.split('#view=')[1]))
    e.restore(given)
    assert words == e.effect['words'] and 'looks at the hidden region' in words and words[-1] == '.'
    with page.expect_download() as d: press(page, 'Save HTML')
    d.value.save_as(tmp_path/'b.html')
    for path in (tmp_path/'b.html').as_uri(), link:
        page.goto('about:blank')
        page.goto(path)
        labelled(page, 'Class owl, seed 6,')
        assert said(page) == words
        press(page, 'Undo changes')
        assert said(page) == '' and page.locator('.effect').get_by_text('draws the image again').is_visible()
    unfold(page)
    choose(page, 'slider', 'attention', '0')
    press(page, 'Next')
    labelled(page, 'Class owl, seed 7,')
    assert status(page) == 'Attention is off (strength 0), so this map is not used.'
    e.hide, e.cut, e.gamma, e.seed = None, None, 0., 7
    assert said(page) == e.effect['words']

def test_a_cut_region_has_the_colors_of_the_scale_on_the_map(opened):
    "As it can be looked at; in the image it is darker"
    page = opened(Path(__file__).parent.parent/'nbs/images/explorer.html')
    choose(page, 'spinbutton', 'Seed', '2')
    around = [[r, c] for r in range(16, 24) for c in range(8, 16)]   # where the first point looks
    def bright():
        move(page, 31, 55)
        red, green, blue = canvas_pixels(page, MAP, around).T
        return ((red > 200) & (green > 120) & (blue > 60) & (blue < 200)).sum()
    before = bright()
    press(page, 'Cut')
    drag(page, (17, 9), (23, 15))
    effect(page, 'In Generator 16x16 the cut region gets nothing from attention.')
    assert bright() > .8*before > 2

def test_page_of_a_large_model(opened, model, tmp_path, monkeypatch):
    "It shows what is stored, the effect of a change included, and says why it cannot draw"
    monkeypatch.setattr('sagan.live.MOST_NUMBERS', 1000)
    e = explore(model, ['cat', 'dog', 'owl'])
    e.gamma = 2.
    e.save(tmp_path/'e.html')
    page = opened(tmp_path/'e.html')
    effect(page, 'Attention is multiplied by 2. On average, a pixel changes by')
    assert 'stored in the page. It cannot draw others: the model has 0.1 million' in page.content()
    assert not page.get_by_role('button', name='Next').is_visible()
    same_map(seen(page), e._maps['G 16x16'], 0, *e.point)

class Firefox:
    "Firefox without a window, by the protocol that it speaks itself (Marionette); call it with a command"
    def __init__(self, profile):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        (profile/'user.js').write_text(f'user_pref("marionette.port", {port});', encoding='utf-8')
        command = [firefox, '--headless', '--marionette', '--no-remote', '--profile', profile]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, **quiet)
        for _ in range(480):
            try:
                self.socket = socket.create_connection(('127.0.0.1', port), 1)
                break
            except OSError: time.sleep(.25)
        self.socket.settimeout(120)
        self.file = self.socket.makefile('rb')
        self.read()                                               # it says hello
        self('NewSession')

    def read(self):
        size = b''
        while not size.endswith(b':'): size += self.file.read(1)
        return json.loads(self.file.read(int(size[:-1])))

    def __call__(self, command, **args):
        message = json.dumps([0, 1, f'WebDriver:{command}', args])
        self.socket.sendall(f'{len(message)}:{message}'.encode())
        _, _, error, value = self.read()
        assert not error, error
        return value

    def run(self, script): return self('ExecuteScript', script=script, args=[])['value']

    def close(self):
        self.file.close()
        self.socket.close()
        self.process.terminate()
        self.process.wait()

@pytest.mark.skipif(firefox is None, reason='needs Firefox (apt-get install firefox-esr)')
def test_firefox(model, tmp_path):
    "The page from disk draws, and shows the map and the effect of hiding, as Python does"
    e = explore(model, ['cat', 'dog', 'owl'])
    e.save(tmp_path/'e.html')
    (tmp_path/'profile').mkdir()
    browser = Firefox(tmp_path/'profile')
    try:
        browser('Navigate', url=(tmp_path/'e.html').as_uri())
        def click(name): browser.run(
            f"[...document.querySelectorAll('button')].find(b => b.textContent === '{name}').click()")
        click('Next')
        label = browser.run("return document.querySelector('canvas[role=application]').ariaLabel")
        assert 'Class cat, seed 1,' in label
        r = browser.run("""const a = document.querySelector('.sagan').attention()
            return { ...a, weights: [...a.weights], values: [...a.values] }""")
        r |= dict(weights=torch.tensor(r['weights']), values=torch.tensor(r['values']).reshape(S, S))
        maps = generated_maps(model, latents(model.ema, [1]), torch.tensor([0]))[1]
        same_map(r, maps['G 16x16'], 0, *r['point'])
        click('Hide where it looks')
        words = browser.run("return document.querySelector('p[role=status]').textContent")
        click('Copy view')
        link = browser.run("return document.querySelector('dialog textarea').value")
        e.restore(unquote(link.split('#view=')[1]))
        assert words == e.effect['words'] and 'hidden region' in words
    finally: browser.close()

@pytest.mark.parametrize('file, name', [('explorer', 'twins'), ('photographs', 'photographs')])
def test_explorers_of_the_docs(file, name):
    "What the docs show is the explorer of today; if not, run the cell of 09_explorer that saves it"
    e = explore(load_run(shipped(name)))
    page = (Path(__file__).parent.parent/f'nbs/images/{file}.html').read_text(encoding='utf-8')
    script = re.compile(r'<script type="[^"]*" id="sagan-(\w+)">(.*?)</script>', re.S)
    def parts(text): return dict(script.findall(text))
    ours, theirs = parts(e.static()), parts(page)
    weights = [torch.frombuffer(bytearray(base64.b64decode(p['weights'])), dtype=torch.float32)
               for p in (ours, theirs)]
    assert ours['js'] == theirs['js'] and torch.allclose(*weights, rtol=1e-5, atol=1e-6)
    assert json.loads(ours['state'])['network'] == json.loads(theirs['state'])['network']
    assert len(page) < 2.5e6

def test_voila(served, browser, tmp_path, model):
    """On a phone's screen, dark; JupyterLab below is wide and light

    Leaving the page ends its kernel, also by a reload."""
    page, at = browser.new_page(viewport=dict(width=390, height=900), color_scheme='dark'), []
    page.on('request', lambda r: at.append(r.url) if '/api/kernels/' in r.url else None)
    page.on('websocket', lambda w: at.append(w.url))
    address = served('voila', 'explorer.ipynb', *_VOILA)
    page.goto(address, timeout=90_000)
    explore_there(page, tmp_path, model)
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    kernel, = {re.search('api/kernels/([^/?]+)', url)[1] for url in at}
    def runs(): return page.request.get(f'{address}/api/kernels/{kernel}').ok
    assert runs()
    page.goto('about:blank')
    end = time.monotonic() + 30
    while runs():
        assert time.monotonic() < end
        time.sleep(.2)
    page.close()

def test_jupyterlab(served, browser, tmp_path, model):
    at = served('jupyterlab', '--allow-root', '--IdentityProvider.token=', '--ServerApp.password=')
    page = browser.new_page(viewport=dict(width=1200, height=1000))
    page.goto(f'{at}/doc/tree/explorer.ipynb', timeout=90_000)
    for _ in range(12):  # what is asked of it before there is a kernel is lost
        # a slow machine is asked for a kernel
        if (ask := page.locator('.jp-Dialog .jp-mod-accept')).count(): ask.first.click()
        page.locator('.jp-CodeCell .cm-content').first.click()
        page.keyboard.press('Control+Enter')
        try:
            page.wait_for_function("() => !document.querySelector('.jp-CodeCell "
                                   ".jp-InputPrompt').textContent.includes('[ ]')", timeout=5000)
            break
        except TimeoutError: pass
    else: raise AssertionError('JupyterLab has not run the cell')
    explore_there(page, tmp_path, model)
    click(page, 26, 10)
    frame(page)
    page.locator('.jp-CodeCell .cm-content').nth(1).click()
    page.keyboard.press('Control+Enter')
    printed = page.locator('.jp-OutputArea-output', has_text='PYTHON [')
    printed.wait_for()
    # Python knows what was done in the browser
    outputs = ' '.join(page.locator('.jp-OutputArea').all_text_contents())
    assert 'PYTHON' in outputs and 'Warning' not in outputs
    words = r'PYTHON \[26, 10\] \[\[\d+, \d+\], \[20, 9\], \[26, 10\]\] D 16x16 6'
    assert re.fullmatch(words, printed.text_content().strip())
    page.close()
