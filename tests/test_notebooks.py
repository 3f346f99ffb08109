"The notebooks' form: a page's place, its exercises, the size of its cells and file, words for every figure"
import ast, json, re
from pathlib import Path
from statistics import median

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.config import get_config
from notebooks import complete, install_code, linked_pictures
from readme import directives

root = Path(__file__).resolve().parent.parent
first_floor = sorted((root/'nbs').glob('[0-9]*.ipynb'))
library = sorted((root/'nbs/library').glob('[0-9]*.ipynb'))
paths = first_floor + library
ids = [p.stem for p in paths]


def cells(path):
    "Kind, directives, source and outputs of each cell"
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        names, source = {}, ''.join(c['source'])
        if c['cell_type'] == 'code': names, source = directives(source)
        yield c['cell_type'], names, source, c.get('outputs', [])


def exported(path):
    kinds = {'export', 'exports', 'exporti'}
    return [source.count('\n') + 1 for _, names, source, _ in cells(path) if names.keys() & kinds]


@pytest.mark.parametrize('path', paths, ids=ids)
def test_place(path):
    "A page opens with its place in the data flow: what comes in, from which page, and what goes out"
    opening = [source for kind, _, source, _ in list(cells(path))[:3] if kind == 'markdown']
    assert re.search(r'^\*\*In the data flow\.\*\* .*\.ipynb', '\n'.join(opening), re.M)


def exercises(path):
    "Number of the cell in which a page's exercises begin, None if it has none"
    for i, (kind, _, text, _) in enumerate(cells(path)):
        if kind == 'markdown' and re.match('## Exercises?$', text, re.M): return i


with_exercises = [p for p in paths if p in first_floor or exercises(p) is not None]


@pytest.mark.parametrize('path', with_exercises, ids=[p.stem for p in with_exercises])
def test_exercises(path):
    """Each has a folded solution, and after it a cell that fails without an answer

    Three on a page of the first floor; a page of the library may have some."""
    page, start = list(cells(path)), exercises(path)
    texts = '\n'.join(text for kind, _, text, _ in page[start:] if kind == 'markdown')
    wanted = len(re.findall(r'^\*\*\d+\. ', texts, re.M))
    found = 0
    for (kind, _, text, _), solution, check in zip(page[start:], page[start+1:], page[start+2:]):
        if kind != 'markdown' or not re.search(rf'^\*\*{found + 1}\. ', text, re.M): continue
        found += 1
        assert solution[1].get('code-fold') == 'true' and solution[1].get('code-summary') == '"Solution"'
        assert re.search(r'\bassert\b|\btest_\w+\(|\bexpect_fail\(', check[2])
        assert not check[1].keys() & {'slow', 'cuda', 'hide'}
        nodes = list(ast.walk(ast.parse(solution[2])))
        answer = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        answer |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert answer & {n.id for n in ast.walk(ast.parse(check[2])) if isinstance(n, ast.Name)}
    assert found == wanted == 3 if path in first_floor else found == wanted >= 1


@pytest.mark.parametrize('path', paths + [root/'nbs/index.ipynb'], ids=ids + ['index'])
def test_alt_text(path):
    "Each figure says in words what it shows, for those who do not see it"
    for kind, names, source, outputs in cells(path):
        data = [o.get('data', {}) for o in outputs]
        if any(k.startswith('image/') for d in data for k in d):
            assert len(names.get('fig-alt', '').strip('"')) > 30, source
        html = source if kind == 'markdown' else ''.join(''.join(d.get('text/html', '')) for d in data)
        for img in re.findall(r'<img\b[^>]*>', html): assert re.search(r'\balt="[^"]{30,}"', img), img[:200]
        if kind == 'markdown': assert not re.search(r'!\[.{0,30}\]\(', source)


@pytest.mark.parametrize('path', paths + [root/'nbs/index.ipynb'], ids=ids + ['index'])
def test_size(path):
    "A page is under 500 KB, and no exported cell longer than 45 lines"
    assert path.stat().st_size < 500_000
    assert max(exported(path), default=0) <= 45


def test_median_cell():
    "Half of the exported cells have at most 12 lines"
    assert median(n for p in paths for n in exported(p)) <= 12


# What all notebooks have in common

def code(source): return dict(cell_type='code', source=[source], outputs=[])


@pytest.mark.parametrize('cells, folder, asked', [
    ([code('import torch')], '', ['pip']),
    ([code('#| export\nprint("experiments/x")'), code('%cd ..')], 'library', ['pip']),
    ([code('from datasets import Dataset'), code('import tensorboard')], '', ['pip', 'pip']),
    ([code("load('../experiments/claim')")], 'library', ['pip', 'git', 'cd'])])
def test_first_cell(monkeypatch, tmp_path, cells, folder, asked):
    "It asks for what is missing, and for nothing where all is there"
    source, found = TransformerManager().transform_cell(install_code(cells, folder)), []
    class Shell:
        def run_line_magic(self, name, line): found.append(name)
        def system(self, line): found.append(line.split()[0])
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as m:
        m.setattr('importlib.util.find_spec', lambda name: None)
        exec(source, {'get_ipython': Shell})
    assert found == asked
    monkeypatch.chdir(root/'nbs'/folder)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: name)
    exec(source, {'get_ipython': Shell})
    assert found == asked


@pytest.mark.parametrize('text, done', [
    ('![A b](a/b.svg)', '[![A b](a/b.svg)]({site}library/a/b.svg)'),
    ('<img src="../a.svg" alt="x">', '<a href="{site}a.svg"><img src="../a.svg" alt="x"></a>'),
    ('![A](https://a.svg) [![A](b.svg)](c)', '![A](https://a.svg) [![A](b.svg)](c)')])
def test_linked_pictures(text, done):
    "A picture that is a file leads to the same file on the site; a link stays as it is"
    done = done.format(site=get_config(root).doc_url)
    assert linked_pictures(text, 'library') == linked_pictures(done, 'library') == done


def test_complete():
    "A notebook gets its first cell and loses nbdev and links in links; what is complete stays as it is"
    class Symbols:
        def doc(self, name): return name == 'load_run'
    text = '# T\n\n[`load_run`](a.ipynb), [`load_run()` here](b.ipynb), [`runs/`](c.ipynb), `load_run`'
    nb = dict(cells=[dict(cell_type='markdown', source=[text]), code('#| hide\nimport nbdev, shutil'),
                     code('#| hide\nimport nbdev'), code('#| hide\nnbdev.nbdev_export()')])
    done = complete(nb, 'library/21_data.ipynb', Symbols())['cells']
    title, first, last = [''.join(c['source']) for c in done]
    assert title == '# T\n\n[load_run](a.ipynb), [load_run() here](b.ipynb), [`runs/`](c.ipynb), `load_run`'
    assert "find_spec('sagan')" in first and last == '#| hide\nimport shutil'
    before = json.dumps(nb)
    assert json.dumps(complete(nb, 'library/21_data.ipynb', Symbols())) == before
