"""The attention explorer in a browser

The stand-alone page opened from disk without a network, and the module as anywidget calls it."""
import base64, json, os, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from PIL import Image
from playwright.sync_api import TimeoutError, sync_playwright
from sagan.attention import AttentionMap
from sagan.data import to_unit
from sagan.explorer import AttentionExplorer, generated_maps, latents, named_maps, view

chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(
    chromium is None and not os.environ.get('CI'),
    reason='needs Chromium (apt-get install chromium) to open the explorer in')
S, CELLS = 64, 'canvas[role=application]'

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
    def open(path=None, width=1200, **how):
        if path is None:
            path = tmp_path/'explorer.html'
            explorer.save(path)
        viewport = dict(width=width, height=900)
        context = browser.new_context(viewport=viewport, offline=True, accept_downloads=True, **how)
        contexts.append(context)
        page = context.new_page()
        page.on('pageerror', lambda e: troubles.append(str(e)))
        page.on('console', lambda m: troubles.append(m.text) if m.type == 'error' else None)
        local = 'file:', 'blob:', 'data:'
        page.on('request', lambda r: None if r.url.startswith(local) else troubles.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_selector(CELLS)
        return page
    yield open
    for c in contexts: c.close()
    assert not troubles

def frame(page):
    page.evaluate('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')

def seen(page):
    """The point, and its map as it is drawn

    Weights of the keys and values over the pixels, in [0, 1] of the maximum, and the maximum in multiples of
    uniform."""
    frame(page)
    r = page.evaluate('''() => { const a = document.querySelector('.sagan:has(canvas)').attention()
        return a && { ...a, weights: [...a.weights], values: [...a.values] } }''')
    if not r: return r
    values = torch.tensor(r['values']).reshape(S, S)/255
    return r | dict(weights=torch.tensor(r['weights'])/255, values=values)

def move(page, row, col):
    "The mouse to the middle of a pixel"
    canvas = page.locator(CELLS)
    for _ in range(20):  # a page with a kernel may move under the mouse
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        page.mouse.move(box['x'] + (col + .5)*box['width']/S, box['y'] + (row + .5)*box['height']/S)
        frame(page)
        if canvas.bounding_box() == box: return
    raise AssertionError('the page does not come to rest')

def same_map(r, m, image, row, col, smooth=True):
    "Does the page show what Python computes for this query?"
    exact = m.at(row, col)[image]
    top = exact.max()
    assert r['point'] == [row, col]
    assert (r['weights'].reshape(exact.shape) - exact/top).abs().max() <= 1/254
    assert (r['weights'] == 1).sum() == 1 and r['weights'].argmax() == exact.argmax()
    assert r['max'] == pytest.approx((top*exact.numel()).item(), rel=1e-5)
    if smooth: up = m.on_image(row, col)[image]
    else: up = exact.repeat_interleave(S//m.keys[0], 0).repeat_interleave(S//m.keys[1], 1)
    assert (r['values'] - up/top).abs().max() <= 1/250

def drawn(page, row, col):
    "Colour of the canvas in the middle of a pixel"
    return torch.tensor(page.evaluate('''([row, col, S]) => {
        const c = document.querySelector('canvas[role=application]')
        const x = Math.floor((col + .5)*c.width/S), y = Math.floor((row + .5)*c.height/S)
        return [...c.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3) }''', [row, col, S]))

def status(page): return page.locator('[aria-live]').text_content()

def test_moving_shows_the_map_that_python_computes(opened, maps):
    page = opened()
    assert seen(page) is None
    for row, col in [(0, 0), (63, 63), (20, 41), (33, 2)]:
        move(page, row, col)
        same_map(seen(page), maps['G 32x32'], 0, row, col)
    exact = maps['G 32x32'].at(33, 2)[0]
    i, j = divmod(exact.argmax().item(), 16)
    assert status(page) == (f'From row 33, column 2: max {exact.max()*256:.1f}x uniform at row {i*4+2}, '
                            f'column {j*4+2}')

def raw(explorer): return torch.frombuffer(bytearray(explorer.data), dtype=torch.uint8)

def image_bytes(explorer, i):
    return raw(explorer)[i*3*S*S:(i + 1)*3*S*S].reshape(S, S, 3).float()

def overlaid(explorer, rgb, values):
    "Colours (..., 3) of an image under a map with values in [0, 1]"
    magma, a = raw(explorer)[explorer.header['magma']:][:768].reshape(256, 3).float(), explorer.overlay
    return (1 - a)*((1 - a)*rgb + a*rgb.mean(-1, keepdim=True)/2) + a*magma[(values*255).round().long()]

def test_canvas_holds_the_image_under_the_map(opened, explorer, images, maps):
    page = opened()
    frame(page)
    rgb = image_bytes(explorer, 0)
    cells = [(5, 5), (40, 60), (60, 30), (10, 50)]
    for c in cells: assert (drawn(page, *c) - rgb[c]).abs().max() <= 1        # no point yet: the image itself
    move(page, 30, 10)
    r = seen(page)
    (ty, tx), (y, x) = r['to'], (30, 10)
    # from the line of the arrow
    def far(c): return abs((tx - x)*(c[0] - y) - (ty - y)*(c[1] - x))/((tx - x)**2 + (ty - y)**2)**.5
    clear = [(i, j) for i in range(0, S, 5) for j in range(0, S, 5)
             if far((i, j)) > 5 and max(abs(i - y), abs(j - x)) > 4]
    assert len(clear) > 80
    for c in clear:
        # a value between two colours may be rounded to either
        assert (drawn(page, *c) - overlaid(explorer, rgb[c], r['values'][c])).abs().max() <= 3
    # the point, in the first colour of the figures
    assert tuple(drawn(page, 30, 10).tolist()) == (0xD5, 0x5E, 0x00)

def middle(r): return [int((a + b)/2) for a, b in zip(r['point'], r['to'])]

def coloured(page, row, col):
    "Is the first colour anywhere on this pixel or beside it?"
    return page.evaluate('''([row, col, S]) => {
        const c = document.querySelector('canvas[role=application]'), s = c.width/S
        const d = c.getContext('2d').getImageData((col - 1)*s, (row - 1)*s, 3*s, 3*s).data
        for (let i = 0; i < d.length; i += 4)
            if (d[i] === 0xD5 && d[i + 1] === 0x5E && d[i + 2] === 0) return true
        return false }''', [row, col, S])

def test_arrow_only_where_attention_is_not_alike(opened, maps):
    page = opened()
    drawn_arrows = {}
    for layer in maps:
        page.get_by_role('combobox', name='Layer').select_option(layer)
        move(page, 30, 10)
        r = seen(page)
        i, j = divmod(maps[layer].at(30, 10)[0].argmax().item(), maps[layer].keys[1])
        # the centre of the most attended key, from the corner
        assert r['to'] == [(i + .5)*S/maps[layer].keys[0], (j + .5)*S/maps[layer].keys[1]]
        # far enough to tell the arrow from the point
        assert sum((a - b)**2 for a, b in zip(r['point'], r['to'])) > 15**2
        drawn_arrows[layer] = coloured(page, *middle(r))
    assert drawn_arrows == {'G 8x8': True, 'G 32x32': True, 'D 8x8': False}

def test_layers_classes_and_seeds(opened, maps):
    page = opened()
    move(page, 50, 9)
    for klass, seed, image in [('cat', '4', 1), ('<dog>', '4', 3), ('<dog>', '3', 2)]:
        page.get_by_role('combobox', name='Class').select_option(klass)
        page.get_by_role('combobox', name='Seed').select_option(seed)
        for layer in maps:
            page.get_by_role('combobox', name='Layer').select_option(layer)
            same_map(seen(page), maps[layer], image, 50, 9)
    label = page.locator(CELLS).get_attribute('aria-label')
    assert 'Class <dog>, seed 3, 64 by 64 pixels, with attention of layer D 8x8' in label
    assert status(page).endswith('x uniform, nearly everywhere alike')
    options = page.get_by_role('combobox', name='Layer').locator('option').all()
    assert [s.text_content() for s in options] == list(maps)

def test_smooth_and_overlay(opened, explorer, maps):
    page = opened()
    move(page, 50, 9)
    page.get_by_label('Smooth').uncheck()
    same_map(seen(page), maps['G 32x32'], 0, 50, 9, smooth=False)
    assert (drawn(page, 5, 60) - image_bytes(explorer, 0)[5, 60]).abs().max() > 30
    page.get_by_label('Overlay').fill('0')
    move(page, 51, 20)
    frame(page)
    assert (drawn(page, 5, 60) - image_bytes(explorer, 0)[5, 60]).abs().max() <= 1   # at 0 no map is seen

def test_keys_alone(opened, maps):
    page = opened()
    for _ in range(12):
        page.keyboard.press('Tab')
        if page.evaluate("document.activeElement.getAttribute('role')") == 'application': break
    else: raise AssertionError('the image cannot be reached by Tab')
    page.keyboard.press('ArrowRight')
    same_map(seen(page), maps['G 32x32'], 0, 33, 33)  # begins in the middle: cell (16, 16) of 32x32
    page.keyboard.press('ArrowRight')
    page.keyboard.press('ArrowUp')
    same_map(seen(page), maps['G 32x32'], 0, 31, 35)
    page.keyboard.press('Enter')
    page.keyboard.press('ArrowDown')
    page.keyboard.press(' ')
    assert pins(page) == 2
    for _ in range(40): page.keyboard.press('ArrowLeft')
    same_map(seen(page), maps['G 32x32'], 0, 33, 1)                            # stops at the border
    page.keyboard.press('Escape')
    assert pins(page) == 0
    order = []
    for _ in range(7):
        page.keyboard.press('Tab')
        order.append(page.evaluate("(e => (e.closest('label')?.firstChild ?? "
                                   "e).textContent)(document.activeElement)"))
    # and nothing to clear
    assert order == ['Class', 'Seed', 'Layer', 'Overlay', 'Smooth', 'Save PNG', 'Save HTML']

def pins(page):
    frame(page)
    return page.locator('.pins figure').count() - 1  # the first one is the image

def test_pins_keep_their_colours(opened):
    page = opened()
    colours = []
    for row, col in [(10, 10), (50, 50), (20, 50)]:
        move(page, row, col)
        page.mouse.down()
        page.mouse.up()
    frame(page)
    # its own at once, while the pointer is still there
    assert tuple(drawn(page, 20, 50).tolist()) == (0, 0x72, 0xB2)
    page.mouse.down()
    page.mouse.up()  # and no second point at the same place
    move(page, 60, 5)
    assert pins(page) == 3
    seen_colours = [tuple(drawn(page, *p).tolist()) for p in [(10, 10), (50, 50), (20, 50)]]
    assert seen_colours == [(0xD5, 0x5E, 0), (0, 0x9E, 0x73), (0, 0x72, 0xB2)]
    assert tuple(drawn(page, 60, 5).tolist()) == (0xE6, 0x9F, 0)  # the point that moves has the next one
    assert page.locator('.pins canvas').nth(2).evaluate('c => c.style.borderColor') == 'rgb(0, 158, 115)'
    label = page.locator('.pins canvas').nth(2).get_attribute('aria-label')
    assert 'Point 2. From row 50, column 50: max ' in label
    page.get_by_role('button', name='Clear points').click()
    assert pins(page) == 0

def test_kept_points_have_their_own_maps_and_arrows(opened, explorer, maps):
    page = opened()
    page.get_by_role('combobox', name='Layer').select_option('G 8x8')
    for row, col in [(30, 10), (50, 50)]:
        move(page, row, col)
        page.mouse.down()
        page.mouse.up()
    for image, layer in [(0, 'G 8x8'), (3, 'G 8x8'), (3, 'G 32x32')]:
        if image:
            page.get_by_role('combobox', name='Class').select_option('<dog>')
            page.get_by_role('combobox', name='Seed').select_option('4')
        page.get_by_role('combobox', name='Layer').select_option(layer)
        move(page, 2, 60)
        frame(page)
        canvases = page.evaluate('''() => [...document.querySelectorAll('.pins canvas')].map(c => {
            const d = [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]
            return Array.from({ length: c.height }, (_, r) => Array.from({ length: c.width }, (_, k) =>
                d.slice(4*(r*c.width + k), 4*(r*c.width + k) + 4))) })''')
        shown = [torch.tensor(c)[..., :3].float() for c in canvases]
        assert (shown[0] - image_bytes(explorer, image)).abs().max() <= 1       # the first one has no map
        for (row, col), pixels in zip([(30, 10), (50, 50)], shown[1:], strict=True):
            up = maps[layer].on_image(row, col)[image]/maps[layer].at(row, col)[image].max()   # (S, S)
            # colours of neighbouring values differ by up to 4
            assert (pixels - overlaid(explorer, image_bytes(explorer, image), up)).abs().mean() <= 1
        i, j = divmod(maps[layer].at(30, 10)[image].argmax().item(), maps[layer].keys[1])
        to = [(i + .5)*S/maps[layer].keys[0], (j + .5)*S/maps[layer].keys[1]]
        assert sum((a - b)**2 for a, b in zip((30, 10), to)) > 12**2
        assert coloured(page, *middle(dict(point=(30, 10), to=to)))

def test_arrow_where_the_figures_have_one(opened, tmp_path):
    "Words and arrow go by the number as it is shown, and by the strongest key, however near the next one is"
    q, k = torch.zeros(1, 64, 1), torch.zeros(1, 64, 1)
    q[0, :, 0] = torch.linspace(1.44, 1.5, 64)  # the maxima in multiples of uniform, one for each query
    m = AttentionMap('', q, k, (8, 8), (8, 8), (S, S))
    class Given(AttentionMap):
        def parts(self):
            top = q/64
            rest = (1 - 1.999*top)/62  # (1, 64, 1)
            beta = rest.repeat(1, 1, 64)
            beta[..., 40:41] = .999*top
            beta[..., 41:42] = top
            yield beta
    given = {'G 8x8': Given('', q, k, (8, 8), (8, 8), (S, S))}
    e = AttentionExplorer(*view(torch.zeros(1, 3, S, S), given, [('', 0)]))
    e.save(tmp_path/'e.html')
    page = opened(tmp_path/'e.html')
    for i in (0, 63):
        move(page, i//8*8, i%8*8)
        frame(page)
        arrow = 'at row 44, column 12' if round(q[0, i, 0].item(), 1) >= 1.5 else 'nearly everywhere alike'
        separator = ' ' if 'row' in arrow else ', '
        assert status(page).endswith(f'max {q[0, i, 0]:.1f}x uniform{separator}{arrow}')

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

def test_drag_shows_its_path_and_keeps_no_point(opened, tmp_path):
    page = opened()
    move(page, 10, 5)
    page.mouse.down()
    for col in range(5, 60, 5): move(page, 10, col)
    page.mouse.up()
    move(page, 50, 30)
    assert pins(page) == 0
    on = torch.stack([drawn(page, 10, c) for c in (15, 30, 50)])
    assert (on == torch.tensor([0xD5, 0x5E, 0])).all(1).sum() >= 2             # an arrow may lie over one
    def gone(page):
        seen_colours = torch.stack([drawn(page, 10, c) for c in (15, 30, 50)])
        return not (seen_colours == torch.tensor([0xD5, 0x5E, 0])).all(1).any()
    with page.expect_download() as d: page.get_by_role('button', name='Save HTML').click()
    d.value.save_as(tmp_path/'path.html')
    saved = opened(tmp_path/'path.html')
    frame(saved)
    assert not gone(saved)  # it is part of the view
    saved.get_by_role('button', name='Clear points').click()
    frame(saved)
    assert gone(saved)
    # not on a button that is off now
    assert saved.evaluate("document.activeElement.getAttribute('role')") == 'application'
    page.locator(CELLS).focus()
    page.keyboard.press('Escape')
    frame(page)
    assert gone(page)
    move(page, 10, 5)
    page.mouse.down()
    for way in [(10, 30), (30, 30), (10, 5)]: move(page, *way)
    page.mouse.up()
    assert pins(page) == 0  # back to where it began is no click
    page.get_by_role('combobox', name='Class').select_option('<dog>')
    frame(page)
    assert page.get_by_role('button', name='Clear points').is_disabled()  # another image, no path

def test_touch(opened, maps):
    page = opened(width=390, has_touch=True, is_mobile=True, device_scale_factor=3)
    box = page.locator(CELLS).bounding_box()
    assert box['width'] > 330 and page.evaluate('document.documentElement.scrollWidth') <= 390
    assert page.locator(CELLS).evaluate('c => c.width') == round(box['width']*3)   # sharp
    page.touchscreen.tap(box['x'] + 20.5/S*box['width'], box['y'] + 40.5/S*box['height'])
    same_map(seen(page), maps['G 32x32'], 0, 40, 20)
    assert pins(page) == 1

def contrast(place):
    "Of the text of an element against what is behind it"
    def luminance(rgb):
        linear = [v/12.92 if v <= .03928 else ((v + .055)/1.055)**2.4 for v in (c/255 for c in rgb[:3])]
        return sum(w*v for w, v in zip((.2126, .7152, .0722), linear))
    dark, light = sorted(map(luminance, place.evaluate('''e => {
        const rgb = s => s.match(/[\\d.]+/g).map(Number)
        let b = e
        while (b.parentElement && rgb(getComputedStyle(b).backgroundColor)[3] === 0) b = b.parentElement
        const paper = rgb(getComputedStyle(b).backgroundColor)
        return [rgb(getComputedStyle(e).color), paper[3] === 0 ? [255, 255, 255] : paper] }''')))
    return (light + .05)/(dark + .05)

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_contrast(opened, scheme):
    page = opened(color_scheme=scheme)
    for selector in ('p[aria-live]', 'label span', 'select', 'button:enabled', 'figcaption'):
        assert contrast(page.locator(f'.sagan {selector}').first) >= 4.5, selector

def test_save_png(opened, tmp_path):
    page = opened()
    move(page, 30, 10)
    frame(page)
    colour = drawn(page, 5, 60)
    with page.expect_download() as d: page.get_by_role('button', name='Save PNG').click()
    assert d.value.suggested_filename == 'attention-cat-seed-3-G-32x32.png'
    d.value.save_as(tmp_path/'a.png')
    im = Image.open(tmp_path/'a.png')
    assert im.size == tuple(page.locator(CELLS).evaluate('c => [c.width, c.height]'))
    assert im.getpixel((int(60.5*im.width/S), int(5.5*im.height/S)))[:3] == tuple(colour.tolist())

def test_save_html_and_open_what_was_saved(opened, maps, tmp_path):
    page = opened()
    page.get_by_role('combobox', name='Layer').select_option('G 8x8')
    page.get_by_role('combobox', name='Seed').select_option('4')
    move(page, 30, 10)
    page.mouse.down()
    page.mouse.up()
    move(page, 3, 60)
    frame(page)
    for generation in range(2):  # what was saved can be saved again
        with page.expect_download() as d: page.get_by_role('button', name='Save HTML').click()
        d.value.save_as(tmp_path/f'{generation}.html')
        page = opened(tmp_path/f'{generation}.html')
        same_map(seen(page), maps['G 8x8'], 1, 30, 10)
        assert pins(page) == 1  # on the way to the button the mouse left the image: back to the kept point
    assert (tmp_path/'0.html').read_text(encoding='utf-8') == (tmp_path/'1.html').read_text(encoding='utf-8')

def test_saved_in_the_browser_and_in_python_is_the_same_page(opened, explorer, tmp_path):
    page = opened()
    with page.expect_download() as d: page.get_by_role('button', name='Save HTML').click()
    d.value.save_as(tmp_path/'a.html')
    ours, theirs = explorer.static(), (tmp_path/'a.html').read_text(encoding='utf-8')
    def state(text):
        a, b = text.split('id="sagan-state">', 1)
        s, c = b.split('</script>', 1)
        return a, json.loads(s), c
    assert state(ours) == state(theirs)

def test_module_as_anywidget_calls_it(opened, explorer, maps, tmp_path):
    """With a model like anywidget's: bytes as a DataView at some offset

    What the browser changes is set and saved, what Python changes is shown."""
    state = {k: v for k, v in explorer.get_state().items() if k not in ('data', 'layout')}
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
    chosen = [page.get_by_role('combobox', name=n).input_value() for n in ('Class', 'Layer')]
    assert chosen == ['<dog>', 'D 8x8']
    page.evaluate("model.set('message', 'labels go from 0 to 3 <b>')")
    assert page.get_by_role('alert').text_content() == 'labels go from 0 to 3 <b>'
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
             "print('PYTHON', box.view.point, box.view.pins, box.view.layer)"]
    empty = dict(cell_type='code', execution_count=None, metadata={}, outputs=[])
    cells = [empty | dict(id=f'c{i}', source=c) for i, c in enumerate(cells)]
    kernel = dict(kernelspec=dict(display_name='Python 3', language='python', name='python3'))
    nb = dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)
    (tmp_path/'explorer.ipynb').write_text(json.dumps(nb))
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
    env['PYTHONWARNINGS'] = 'ignore'
    def start(module, *args):
        with open(notebook/'server.log', 'w') as log:
            command = [sys.executable, '-m', module, *args, '--no-browser', f'--port={port}']
            started.append(subprocess.Popen(command, cwd=notebook, env=env, stdout=log, stderr=log,
                                            start_new_session=True))
        for _ in range(1200):
            try:
                socket.create_connection(('127.0.0.1', port), 1).close()
                return at
            except OSError:
                assert started[0].poll() is None, (notebook/'server.log').read_text()
                time.sleep(.25)
        raise AssertionError('the server has not started: ' + (notebook/'server.log').read_text())
    yield start
    for p in started:
        p.terminate()
        try: p.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            p.wait()

def labelled(page, name):
    has_name = "name => document.querySelector('canvas[role=application]').ariaLabel.includes(name)"
    page.wait_for_function(has_name, arg=name)

def changed(page, words):
    "Wait for what changed the image, in words and as a picture"
    page.get_by_text(words).wait_for(timeout=20_000)
    picture = page.get_by_alt_text(words)
    picture.wait_for(timeout=20_000)
    page.wait_for_function('e => e.complete', arg=picture.element_handle())

def choose(page, description, value):
    "Set an ipywidget: a dropdown, or a slider by the number beside it"
    label = page.get_by_text(description, exact=True)
    row = page.locator('.jupyter-widgets.widget-inline-hbox', has=label).last
    if row.locator('select').count(): return row.locator('select').select_option(value)
    if row.locator('input').count():
        box = row.locator('input')
        box.fill(value)
    else:
        box = row.locator('.widget-readout')
        box.fill(value)
    box.press('Enter')

def explore_there(page, tmp_path):
    """Uses all of the explorer with a kernel behind it, by its names

    Compares what it shows with what is computed in this process."""
    space = {}
    exec(SETUP, space)
    model = space['model']
    G = model.ema
    def expected(layer, y, *seeds, t=0., gamma=1.):
        return generated_maps(model, latents(G, seeds[:1], seeds[1:], t), torch.tensor([y]), gamma)[1][layer]
    page.wait_for_selector(CELLS, timeout=60_000)
    page.locator(CELLS).scroll_into_view_if_needed()
    move(page, 20, 9)
    same_map(seen(page), expected('G 16x16', 0, 0), 0, 20, 9)
    page.mouse.down()
    page.mouse.up()
    assert pins(page) == 1
    page.keyboard.press('ArrowDown')
    # the middle of the next cell of 4 pixels: 24 to 27, and of this column: 8 to 11
    same_map(seen(page), expected('G 16x16', 0, 0), 0, 26, 10)
    page.get_by_role('button', name='Next').click()
    labelled(page, 'Class cat, seed 1,')
    same_map(seen(page), expected('G 16x16', 0, 1), 0, 26, 10)
    choose(page, 'Class', 'owl')
    labelled(page, 'Class owl, seed 1,')
    same_map(seen(page), expected('G 16x16', 2, 1), 0, 26, 10)
    choose(page, 'Seed', '5')
    labelled(page, 'Class owl, seed 5,')
    same_map(seen(page), expected('G 16x16', 2, 5), 0, 26, 10)
    for layer in ('D 16x16', 'G 8x8'):
        page.get_by_role('combobox', name='Layer').select_option(layer)
        labelled(page, f'layer {layer}')
        same_map(seen(page), expected(layer, 2, 5), 0, 26, 10)
    choose(page, 'Towards seed', '7')
    choose(page, 'How far', '0.5')
    labelled(page, 'seed 5 towards 7 at 0.5')
    same_map(seen(page), expected('G 8x8', 2, 5, 7, t=.5), 0, 26, 10)
    choose(page, 'Gamma times', '2')
    labelled(page, 'at 0.5, gamma times 2')
    same_map(seen(page), expected('G 8x8', 2, 5, 7, t=.5, gamma=2.), 0, 26, 10)
    changed(page, 'gamma times 2: pixels change by')
    page.get_by_role('button', name='Cut point').click()
    changed(page, '(20, 9) cut in G 8x8: pixels change by')
    page.get_by_role('button', name='Hide region').click()
    page.get_by_text('keep two points first').wait_for(timeout=20_000)
    move(page, 50, 40)
    page.mouse.down()
    page.mouse.up()
    assert pins(page) == 2
    page.get_by_role('button', name='Hide region').click()
    changed(page, 'region hidden in G 8x8: pixels change by')
    before = page.locator(CELLS).get_attribute('aria-label')
    page.get_by_role('button', name='Generate').click()
    is_new = "before => document.querySelector('canvas[role=application]').ariaLabel !== before"
    page.wait_for_function(is_new, arg=before)
    assert ' seed 5 ' not in page.locator(CELLS).get_attribute('aria-label')
    save_there(page, tmp_path)
    x = torch.randint(0, 256, (1, 3, S, S), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(tmp_path/'own.png')
    with page.expect_file_chooser() as chooser: page.get_by_role('button', name='Own images').click()
    chooser.value.set_files(tmp_path/'own.png')
    labelled(page, 'Class owl, image own.png,')
    move(page, 33, 3)
    same_map(seen(page), named_maps(model.D, to_unit(x), torch.tensor([2]))[1]['D 16x16'], 0, 33, 3)
    choose(page, 'Seed', '6')
    labelled(page, 'Class owl, seed 6 towards 7')
    changed(page, 'gamma times 2: pixels change by')
    for c in ('.widget-label', '.jupyter-button'): assert contrast(page.locator(c).first) >= 4.5, c

def save_there(page, tmp_path):
    "Both kinds of file, saved from a page with a kernel; the saved page opened shows the same map"
    move(page, 40, 50)
    r = seen(page)
    with page.expect_download() as d: page.get_by_role('button', name='Save PNG').click()
    d.value.save_as(tmp_path/'a.png')
    size = tuple(page.locator(CELLS).evaluate('c => [c.width, c.height]'))
    assert Image.open(tmp_path/'a.png').size == size
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

@pytest.mark.parametrize('width', [1200, 390])
def test_voila(served, browser, tmp_path, width):
    scheme = 'dark' if width == 390 else 'light'
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    page.goto(served('voila', 'explorer.ipynb'), timeout=90_000)
    explore_there(page, tmp_path)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.close()

def test_jupyterlab(served, browser, tmp_path):
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
    explore_there(page, tmp_path)
    move(page, 26, 10)
    page.mouse.down()
    page.mouse.up()
    frame(page)
    page.locator('.jp-CodeCell .cm-content').nth(1).click()
    page.keyboard.press('Control+Enter')
    printed = page.locator('.jp-OutputArea-output', has_text='PYTHON')
    printed.wait_for()
    # Python knows what was done in the browser
    assert printed.text_content().strip() == 'PYTHON [26, 10] [[20, 9], [50, 40], [26, 10]] D 16x16'
    page.close()
