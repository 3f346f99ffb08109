"""Every page of the docs: directives, pictures, links, and how it looks in a browser.

Without Quarto, pandoc renders a page from what nbdev prepares for Quarto. With SAGAN_SITE=FOLDER, as in the
docs workflow, the page of the built site is tested. What needs neither pandoc nor a browser is tested
without them."""
import base64, io, json, os, posixpath, re, shutil
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import unquote, urldefrag, urlsplit

import docsite, pytest, torch
from forked import forked
from nbdev.config import get_config, nbpath2html
from nbdev.serve import proc_nbs
from PIL import Image
from readme import directives, nb2md
from sagan.curves import training_figure
from sagan.pages import (
    captioned_html, figure_html, frame_html, page_html, player_html, strips_html, wide_html)

root = Path(__file__).resolve().parent.parent
frames = root/'nbs/frames.html'
chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
built = os.environ.get('SAGAN_SITE')
pages = sorted(p.relative_to(root/'nbs').as_posix() for p in (root/'nbs').rglob('*.ipynb'))
# Options of a code cell that Quarto takes, and nbdev's own that it hands on; flags of tests come from
# pyproject.toml
options = ['code-fold', 'code-summary', 'echo', 'eval', 'exec_doc', 'exportd', 'exports', 'fig-alt',
           'fig-cap', 'include', 'label', 'output', 'warning']


class Tags(HTMLParser):
    "Anchors, link targets and picture sources of a page, and the text that is seen, less its code"
    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.images, self.text, self.hidden = set(), [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if d.get('id'): self.ids.add(d['id'])
        if tag == 'a' and d.get('href'): self.links.append(d['href'])
        if tag == 'img': self.images.append(d.get('src') or '')
        if tag in ('pre', 'script', 'style', 'svg'): self.hidden.append(tag)

    def handle_endtag(self, tag):
        if tag in self.hidden: self.hidden.remove(tag)

    def handle_data(self, data):
        if not self.hidden: self.text.append(data)


def prepare(folder):
    "Let nbdev prepare the notebooks in a folder for Quarto; it runs their exported cells in this process"
    os.chdir(folder)
    proc_nbs(folder/'nbs', n_workers=0)


@pytest.fixture(scope='session')
def prepared(tmp_path_factory):
    "Folder of the notebooks as nbdev prepares them for Quarto, in a fork that has imported what they import"
    tmp = tmp_path_factory.mktemp('site')
    shutil.copy(root/'pyproject.toml', tmp)
    shutil.copytree(root/'nbs', tmp/'nbs', ignore=shutil.ignore_patterns('.*', '_*'))
    p = forked(tmp/'output', 'prepare', tmp, module='test_pages')
    p.join(600)
    assert p.exitcode == 0, p.output.read_text(encoding='utf-8')
    return tmp/'_proc'


@pytest.fixture(scope='session')
def site(request):
    "Each notebook's page: its file, its folder, and its tags"
    res, prepared = {}, None
    if not built:
        pypandoc = pytest.importorskip('pypandoc', reason="needs pip install -e '.[docs]'")
        prepared = request.getfixturevalue('prepared')
    for name in pages:
        path = (prepared or Path(built).resolve())/nbpath2html(name)
        if not built:
            nb = json.loads((prepared/name).read_text(encoding='utf-8'))
            md = nb2md(nb, (prepared/name).with_name(f'{Path(name).stem}_files'))
            css = '../'*name.count('/') + 'styles.css'
            options = ['--standalone', '--mathml', f'--css={css}', f'--include-after-body={frames}',
                       f'--metadata=title:{docsite.title_of(nb)[0]}']
            html = pypandoc.convert_text(md, 'html', 'markdown', extra_args=options)
            path.write_text(docsite.finish_page(html, name), encoding='utf-8')
        res[name] = SimpleNamespace(path=path, dir=path.parent, tags=Tags(path.read_text(encoding='utf-8')))
    return res


@pytest.mark.parametrize('name', pages)
def test_directives(prepared, name):
    "No `#|` line is misspelt, or stands where neither nbdev nor Quarto reads it"
    known = options + get_config(root).tst_flags.split()
    for cell in json.loads((prepared/name).read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            names, source = directives(source)
            assert names.keys() <= set(known)
        assert not re.search(r'^\s*#\s?\|', source, re.M)


@pytest.mark.parametrize('name', pages)
def test_images(site, name):
    "Every picture is a file beside the page, or stands in it; text and pictures have less than 1 MB"
    page = site[name]
    files = [page.dir/unquote(s) for s in page.tags.images if not re.match('data:|https?:', s)]
    assert not [f for f in files if not f.is_file()]
    # Without what Quarto adds, and without the explorers, which a page loads when a reader comes to them
    assert sum(f.stat().st_size for f in {page.path, *files}) < 1_000_000


@pytest.mark.parametrize('name', pages)
def test_links(site, name):
    "Every link into the site leads to a page and a place on it, every link into the repository to a file"
    cfg = get_config(root)
    in_repo = f'{cfg.git_url}/blob/{cfg.branch}/'
    by_html = {nbpath2html(p).as_posix(): p for p in pages}
    def resolves(href):
        if href.startswith(in_repo): return (root/urldefrag(href.removeprefix(in_repo)).url).exists()
        path, anchor = urldefrag(href.removeprefix(cfg.doc_url))
        if re.match('[a-z]+:', path): return True
        from_root = path.startswith('/') or href.startswith(cfg.doc_url)
        if path and not from_root: path = posixpath.join(posixpath.dirname(name), path)
        path = posixpath.normpath(path.lstrip('/')) if path else ''
        target = by_html.get(path, path or name)
        if target in site: return not anchor or unquote(anchor) in site[target].tags.ids
        return (site['index.ipynb'].dir/unquote(target)).is_file()
    assert not [h for h in site[name].tags.links if not resolves(h)]


@pytest.mark.parametrize('name', pages)
def test_text(site, name):
    "No text shows Markdown that was to be a link, or a class as nbdev found it in the notebook"
    text = ''.join(site[name].tags.text)
    assert not re.findall(r'.{0,60}\]\(.{0,60}', text)
    assert not re.findall(r'(?<![\w.])__main__\.\w+', text)


def test_sidebar():
    "Every page is in the sidebar once; both copies of the configuration are the same"
    assert sorted(docsite.pages()) == pages
    assert (root/'_quarto.yml').read_bytes() == (root/'nbs/_quarto.yml').read_bytes()


def check_markdown(site):
    "Each page is in llms.txt, and every link between the pages' Markdown leads to a file"
    cfg = get_config(root)
    listed = re.findall(r'^- \[.+\]\((.*)\): .', (site/'llms.txt').read_text(encoding='utf-8'), re.M)
    assert sorted(listed) == sorted(f'{cfg.doc_url}{docsite.html_name(name)}.md' for name in pages)
    for name in pages:
        page, links = site/f'{docsite.html_name(name)}.md', []
        def find(part): return links.extend(re.findall(r'\]\(([^)\s]+)\)', part)) or part
        docsite.outside_code(find, page.read_text(encoding='utf-8'))
        for link in links:
            path = urldefrag(link.replace(cfg.doc_url, '/')).url
            if path in ('', '/') or re.match('[a-z]+:', path): continue
            at = site/path[1:] if path[0] == '/' else page.parent/path
            assert at.is_file() or (root/'nbs'/at.resolve().relative_to(site)).is_file(), (name, link)


def test_language_models(prepared, tmp_path):
    for name in pages: (tmp_path/nbpath2html(name)).parent.mkdir(exist_ok=True)
    docsite.add_markdown(tmp_path, prepared)
    check_markdown(tmp_path)


def test_finished():
    "Links below the title, the explorer on the home page, no words twice; a page without a title is refused"
    page = '<header id="title-block-header">T</header><p>__main__.Config</p><section id="a"></section>'
    done = docsite.finish_page(page, 'library/21_data.ipynb')
    assert 'blob/main/nbs/library/21_data.ipynb' in done and 'href="21_data.ipynb" download' in done
    assert '<p>Config</p>' in done
    home = docsite.with_explorer(page)
    assert re.search('Config</p><iframe .*src="images/explorer.html".*</iframe><section', home)
    figure = '<figure><img src="a.png"{}><figcaption class="c">A &amp;\nb</figcaption></figure>'
    words = ' alt="A &amp; b"'
    assert docsite.without_repetition(figure.format(words)) == f'<figure><img src="a.png"{words}></figure>'
    assert docsite.without_repetition(figure.format('')) == f'<figure><img{words} src="a.png"></figure>'
    assert docsite.without_repetition(figure.format(' alt="c"')) == figure.format(' alt="c"')
    with pytest.raises(ValueError, match='has no title'): docsite.finish_page('<p>', 'index.ipynb')


@pytest.mark.skipif(not built, reason='needs the site that Quarto built: SAGAN_SITE=_docs')
@pytest.mark.parametrize('name', pages)
def test_built(site, name):
    "What only Quarto adds: sidebar, repository, favicon, card, size; and Colab, by our own tool"
    html = site[name].path.read_text(encoding='utf-8')
    assert len(html) < 1_000_000 and (site[name].dir/Path(name).name).is_file()
    for mark in ('id="quarto-sidebar"', 'rel="icon"', 'property="og:image"', 'class="notebook-links"',
                 f'href="{get_config(root).git_url}"'):
        assert mark in html, mark
    assert 'class="nav-page nav-page-previous"' in html or name == 'index.ipynb'


@pytest.mark.skipif(not built, reason='needs the site that Quarto built: SAGAN_SITE=_docs')
def test_built_as_a_whole():
    "The pages for language models, the explorer on the home page, and a 404 page that works in any folder"
    site = Path(built).resolve()
    images = 'explorer.html', 'photographs.html', 'card.png'
    assert not [f for f in images if not (site/'images'/f).is_file()]
    check_markdown(site)
    assert docsite.FRAME in (site/'index.html').read_text(encoding='utf-8')
    base = urlsplit(get_config(root).doc_url).path
    lost = Tags((site/'404.html').read_text(encoding='utf-8'))
    assert not [link for link in lost.links if not re.match(f'{base}|#|[a-z]+:', link)]


NOTHING = 'window.define = window.require = () => {}'
BADGE = '<svg xmlns="http://www.w3.org/2000/svg" width="90" height="20"/>'

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def served(site):
    "Address of the site on this machine: browsers refuse modules in files that are opened from disk"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site['index.ipynb'].dir)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture(scope='module')
def phone():
    """Opens a page at phone width without a network

    What is asked for elsewhere is answered with next to nothing: a badge, a script that does nothing."""
    playwright = pytest.importorskip('playwright.sync_api', reason="needs pip install -e '.[browser]'")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        context = browser.new_context(viewport=dict(width=390, height=844), has_touch=True)
        def answer(route):
            if urlsplit(route.request.url).hostname == '127.0.0.1': route.fallback()
            elif route.request.resource_type == 'image':
                route.fulfill(content_type='image/svg+xml', body=BADGE)
            else: route.fulfill(content_type='text/javascript', body=NOTHING)
        context.route(re.compile('^https?:'), answer)
        yield context
        browser.close()


# What is wider than the page, and stands in nothing that scrolls by itself
STICKING_OUT = """() => {
    const scrolls = e => /auto|scroll|hidden/.test(getComputedStyle(e).overflowX)
    const inside = e => {
        for (e = e.parentElement; e && e !== document.body; e = e.parentElement) if (scrolls(e)) return true
    }
    const sticks = e => e.getBoundingClientRect().right > 391 && !inside(e)
    return [...document.querySelectorAll('body *')].filter(sticks).map(e => e.outerHTML.slice(0, 200))
}"""


# Code that scrolls sideways although each of its lines has at most 110 characters
SCROLLING = """() => [...document.querySelectorAll('pre.sourceCode')]
    .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1)
    .filter(e => e.textContent.split('\\n').every(line => line.length <= 110))
    .map(e => e.textContent.slice(0, 200))"""
# What Quarto's page leaves of the screen, at least
COLUMN = 'html { font-size: 17px } body { margin: 0 1.5em }'

needs_browser = pytest.mark.skipif(chromium is None and not os.environ.get('CI'), reason='needs Chromium')


@needs_browser
@pytest.mark.parametrize('name', pages)
def test_browser(site, served, phone, name):
    "No error in the console, no font from elsewhere, every picture, no sideways scroll at 390 px or of code"
    page, errors = phone.new_page(), []
    def asked(r):
        outside = not r.url.startswith((served, 'data:', 'about:'))
        if outside and r.resource_type in ('font', 'stylesheet'): errors.append(r.url)
    page.on('request', asked)
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.goto(served + nbpath2html(name).as_posix(), wait_until='load')
    if not built: page.add_style_tag(content=COLUMN)
    broken = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => "
                           "i.outerHTML.slice(0, 200))")
    wide = page.evaluate(STICKING_OUT)
    width = page.evaluate('document.documentElement.scrollWidth')
    page.set_viewport_size(dict(width=1440 if built else 940, height=844))
    scrolling = page.evaluate(SCROLLING)
    page.close()
    assert not errors and not broken
    assert width <= 390, wide[:3]
    assert not scrolling


def switch(page, mode):
    "What the site's switch between light and dark does"
    other = 'light' if mode == 'dark' else 'dark'
    page.evaluate("([on, off]) => { document.body.classList.remove(off); document.body.classList.add(on) }",
                  [f'quarto-{mode}', f'quarto-{other}'])


@needs_browser
def test_frame(served, phone):
    "The explorer on its page follows the site's switch, not the system's, and is as high as what it shows"
    context = phone.browser.new_context(color_scheme='null')  # any other is forced upon frames, too
    page = context.new_page()
    page.goto(served + 'explorer.html', wait_until='load')
    frame = page.frames[1]
    dark = "matchMedia('(prefers-color-scheme: dark)').matches"
    for mode in ('dark', 'light'):
        switch(page, mode)
        frame.wait_for_function(f"{dark} === {json.dumps(mode == 'dark')}")
    shown = frame.evaluate('Math.ceil(document.documentElement.getBoundingClientRect().height)')
    page.wait_for_function(f"document.querySelector('iframe').clientHeight === {shown}")
    context.close()


@needs_browser
@pytest.mark.parametrize('system', ['light', 'dark'])
def test_diagram(served, phone, system):
    "A diagram follows the site's switch, too, by the color of its ground"
    context = phone.browser.new_context(color_scheme=system)
    page = context.new_page()
    page.goto(served + 'start.html', wait_until='load')
    diagram, grounds = page.locator('img[src$="game.svg"]'), []
    for mode in ('dark', 'light', 'dark'):
        switch(page, mode)
        picture = Image.open(io.BytesIO(diagram.screenshot())).convert('L')
        grounds.append(picture.getpixel((picture.width//2, 8)))
    context.close()
    assert [ground > 128 for ground in grounds] == [False, True, False]


# A report in the same browser

@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "A page as a report has it: samples, a player beside curves, and a page in the page"
    x = torch.rand(8, 3, 32, 32)*2 - 1
    frames = [(s, f'Step {s}', {'': Image.new('RGB', (274, 70), (s, s, s))}) for s in (0, 50, 100)]
    log = [dict(step=s, d_loss=2 - s/100, g_loss=s/100) for s in range(0, 101, 5)]
    curve = figure_html(training_figure(log, 'losses'), 'Losses', cursor=True)
    inner = '<!doctype html><title>inner</title><style>body{margin:0;height:1065px}</style>'
    file = tmp_path_factory.mktemp('page')/'report.html'
    pair = f'<div class="pair"><div>{player_html(frames, 32, ["cat", "d"*99])}</div><div>{curve}</div></div>'
    maps = captioned_html(wide_html('<div style="width:28rem">maps</div>', 'maps'), 'Lower --lr-d.')
    attention = f'<div class="attention"><div>{frame_html(inner)}</div>{maps}</div>'
    page = page_html('A report', 'x'*300, strips_html([('cat', x)]), pair, attention)
    file.write_text(page, encoding='utf-8')
    return file


@pytest.fixture
def show(phone, report):
    "Opens the report; the test fails if it throws an error or asks for anything"
    contexts, troubles = [], []
    def show(width=390, **how):
        context = phone.browser.new_context(viewport=dict(width=width, height=844), offline=True, **how)
        contexts.append(context)
        page = context.new_page()
        page.add_init_script("""window.waits = []
            const wait = setInterval
            window.setInterval = (f, ms) => { waits.push(ms); return wait(f, 1) }""")
        page.on('pageerror', lambda e: troubles.append(str(e)))
        page.on('console', lambda m: troubles.append(m.text) if m.type == 'error' else None)
        page.on('request', lambda r: None if r.url.startswith(('file:', 'data:')) else troubles.append(r.url))
        page.goto(report.as_uri())
        return page
    yield show
    for c in contexts: c.close()
    assert not troubles


def shown(page):
    "Which frame is seen, and what is said"
    images = page.locator('.stack img')
    seen = [i for i in range(images.count()) if images.nth(i).is_visible()]
    return seen, page.locator('.controls output').text_content()


@needs_browser
def test_player(show):
    "By keys and by its button; the curve beside it shows the step"
    page = show()
    slider, button = page.locator('input[type=range]'), page.locator('button')
    assert shown(page) == ([2], 'Step 100') and button.bounding_box()['height'] >= 44
    slider.focus()
    page.keyboard.press('ArrowLeft')
    assert shown(page) == ([1], 'Step 50') and slider.get_attribute('aria-valuetext') == 'Step 50'
    axis = json.loads(page.locator('svg').get_attribute('data-cursor'))
    assert float(page.locator('.cursor').get_attribute('x1')) == pytest.approx(sum(axis['x'])/2, abs=.5)
    page.keyboard.press('Home')
    assert shown(page) == ([0], 'Step 0')
    page.keyboard.press(' ')
    page.wait_for_function("document.querySelector('button').textContent === 'Play'")
    assert shown(page) == ([2], 'Step 100')  # played to its end
    button.click()
    assert page.evaluate('waits') == [500, 500]


@needs_browser
def test_player_for_whom_motion_is_too_much_and_without_javascript(show):
    page = show(reduced_motion='reduce')
    assert page.evaluate('waits') == []  # nothing moves by itself
    page.locator('button').click()
    assert page.evaluate('waits') == [1500]
    still = show(java_script_enabled=False)
    assert [i for i in range(3) if still.locator('.stack img').nth(i).is_visible()] == [2]
    assert not still.locator('.controls').is_visible()


@needs_browser
def test_report_on_a_phone_and_on_a_wide_screen(show):
    "No sideways scroll; the page in the page is as high as it is; two columns, and dark if the reader likes"
    page = show()
    page.wait_for_function("document.querySelector('iframe').clientHeight === 1065")
    assert page.evaluate('document.documentElement.scrollWidth') == 390, page.evaluate(STICKING_OUT)
    def tops(page): return [e['y'] for e in map(lambda e: e.bounding_box(), page.locator('.pair > *').all())]
    def ground(page): return page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert tops(page)[0] < tops(page)[1]
    wide = show(1440, color_scheme='dark')
    assert tops(wide)[0] == tops(wide)[1] and ground(wide) != ground(page)
    # the explorer beside the figure, which scrolls by itself where it is too wide, and a line says so
    beside = [[e.bounding_box() for e in p.locator('.attention > *').all()] for p in (page, wide)]
    assert beside[0][0]['y'] < beside[0][1]['y'] and beside[1][0]['y'] == beside[1][1]['y']
    assert beside[1][1]['x'] > beside[1][0]['x'] + beside[1][0]['width']
    more = [p.get_by_text('sideways for all maps.') for p in (page, wide)]
    assert more[0].is_visible() and not more[1].is_visible()
    label = wide.locator('svg text').first.evaluate('e => getComputedStyle(e).fill')
    assert label == wide.evaluate('getComputedStyle(document.body).color')


def test_lines_of_a_grid_are_clear():
    "Between its images it has the color of the page, dark or light; a picture that is no grid stays whole"
    def opened(size):
        html = player_html([(0, 'Step 0', {'': Image.new('RGB', size, 'white')})], 32)
        with Image.open(io.BytesIO(base64.b64decode(html.split('base64,')[1].split('"')[0]))) as im:
            return im.convert('RGBA').getchannel('A')
    grid = opened((70, 36))
    lines, images = [(1, 18), (18, 0), (34, 18), (69, 18)], [(2, 2), (33, 33)]
    assert [grid.getpixel(p) for p in lines + images] == [0]*4 + [255]*2
    assert opened((71, 36)).getextrema() == (255, 255)
