"Every page of the docs, as nbdev prepares it for Quarto and pandoc renders it: directives, pictures and links"
import json, re, shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urldefrag

import pypandoc, pytest
from nbdev.config import get_config, nbpath2html
from nbdev.serve import proc_nbs
from readme import directives, nb2md

root = Path(__file__).resolve().parent.parent
pages = sorted(p.name for p in (root/'nbs').glob('*.ipynb'))
# Options of a code cell that Quarto takes, and nbdev's own that it hands on; flags of tests come from pyproject.toml
options = ['code-fold', 'code-summary', 'echo', 'eval', 'exec_doc', 'exportd', 'exports', 'fig-alt', 'fig-cap', 'include',
           'label', 'output', 'warning']


class Tags(HTMLParser):
    "Anchors, link targets and picture sources of a page"
    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.images = set(), [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if d.get('id'): self.ids.add(d['id'])
        if tag == 'a' and d.get('href'): self.links.append(d['href'])
        if tag == 'img': self.images.append(d.get('src') or '')


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "Each notebook's name, and its page after nbdev and pandoc; `dir` is the folder that the pages stand in"
    tmp = tmp_path_factory.mktemp('site')
    shutil.copy(root/'pyproject.toml', tmp)
    shutil.copytree(root/'nbs', tmp/'nbs', ignore=shutil.ignore_patterns('.*', '_*'))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp)
        dir = proc_nbs(tmp/'nbs', n_workers=2)
    res = {}
    for name in pages:
        nb = json.loads((dir/name).read_text(encoding='utf-8'))
        md = nb2md(nb, dir/f'{Path(name).stem}_files')
        html = pypandoc.convert_text(md, 'html', 'markdown', extra_args=['--mathml'])
        res[name] = SimpleNamespace(dir=dir, nb=nb, tags=Tags(html))
    return res


@pytest.mark.parametrize('name', pages)
def test_directives(site, name):
    "No `#|` line is misspelt, or stands where neither nbdev nor Quarto reads it"
    known = options + get_config(root).tst_flags.split()
    for cell in site[name].nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            names, source = directives(source)
            assert names.keys() <= set(known)
        assert not re.search(r'^\s*#\s?\|', source, re.M)


@pytest.mark.parametrize('name', pages)
def test_images(site, name):
    "Every picture of the page is a file beside it, or stands in the page"
    page = site[name]
    assert not [s for s in page.tags.images if not s.startswith('data:') and not (page.dir/unquote(s)).is_file()]


@pytest.mark.parametrize('name', pages)
def test_links(site, name):
    "Every link into the site leads to a page and a place on it, every link into the repository to a file"
    cfg = get_config(root)
    in_repo = f'{cfg.git_url}/blob/{cfg.branch}/'
    by_html = {nbpath2html(p).name: p for p in pages}
    def resolves(href):
        if href.startswith(in_repo): return (root/urldefrag(href.removeprefix(in_repo)).url).exists()
        path, anchor = urldefrag(href.removeprefix(cfg.doc_url))
        if re.match('[a-z]+:', path): return True
        target = by_html.get(path, path or name)
        if target in site: return not anchor or unquote(anchor) in site[target].tags.ids
        return (site[name].dir/unquote(target)).is_file()
    assert not [h for h in site[name].tags.links if not resolves(h)]
