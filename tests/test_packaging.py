"The sdist and the wheel built from it: what they hold, and that the wheel works with its requirements alone"
import email, os, re, shutil, subprocess, sys, tarfile, venv, zipfile
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest, yaml
from nbdev.config import nbpath2html
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from release import NAME, TINY, execute, quick_start
from sagan.storage import file_lock

root = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def dist(tmp_path_factory):
    "Both archives and the wheel's metadata; pytest's processes share them, as building writes into the tree"
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'dist'
    lock = out.with_suffix('.lock')
    lock.mkdir(exist_ok=True)
    with file_lock(lock, wait=True):
        if not out.exists():
            build = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, root]
            subprocess.run(build, check=True)
    wheel, = out.glob('*.whl')
    sdist, = out.glob('*.tar.gz')
    with zipfile.ZipFile(wheel) as z:
        files = {n: z.read(n).decode() for n in z.namelist() if '.dist-info/' in n}
    info = {Path(n).name: text for n, text in files.items()}
    metadata = email.message_from_string(info['METADATA'])
    return SimpleNamespace(wheel=wheel, sdist=sdist, info=info, metadata=metadata)


def needed(lines, extras=(), seen=None):
    "Names of the distributions that these requirements bring, as they are installed here"
    seen = set() if seen is None else seen
    for r in map(Requirement, lines):
        key = canonicalize_name(r.name), frozenset(r.extras)
        if key in seen or r.marker and not any(r.marker.evaluate({'extra': e}) for e in extras or ['']):
            continue
        seen.add(key)
        needed(distribution(r.name).requires or [], r.extras, seen)
    return {name for name, _ in seen}


@pytest.fixture(scope='session')
def alone(dist, tmp_path_factory):
    "The programs of an environment with the wheel and, as links to what is installed here, its requirements"
    if os.name != 'posix': pytest.skip('makes links')
    home = tmp_path_factory.mktemp('alone')
    venv.create(home)
    site, = home.glob('lib/python*/site-packages')
    for name in needed(dist.metadata.get_all('Requires-Dist')):
        d = distribution(name)
        for top in {f.parts[0] for f in d.files} - {'..', '__pycache__'}:
            if not (site/top).exists(): (site/top).symlink_to(d.locate_file(top))
    install = ['install', '-q', '--no-deps', '--ignore-installed', dist.wheel]
    subprocess.run([sys.executable, '-m', 'pip', '--python', home/'bin/python', *install], check=True)
    return home/'bin'


def run(alone, code):
    "What Python code prints in the wheel's environment"
    result = subprocess.run([alone/'python', '-Ic', code], check=True, capture_output=True, text=True)
    return result.stdout.split()


def test_wheel(dist):
    "Only the package and its metadata, and all of the package, with the mark that it is typed"
    names = zipfile.ZipFile(dist.wheel).namelist()
    folders = {n.split('/')[0].removesuffix('.dist-info') for n in names}
    assert folders == {'sagan', dist.wheel.name.removesuffix('-py3-none-any.whl')}
    files = [p for p in (root/'sagan').rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    assert {n for n in names if n.startswith('sagan/')} == {p.relative_to(root).as_posix() for p in files}
    assert 'sagan/py.typed' in names and 'LICENSE' in dist.info


def test_sdist(dist):
    "Every file of the repository, so that whoever unpacks it can run pages and tests"
    if not (root/'.git').exists(): pytest.skip('this is an unpacked sdist')
    ls_files = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(ls_files, cwd=root, check=True, capture_output=True, text=True)
    tracked = listed.stdout.splitlines()
    with tarfile.open(dist.sdist) as t:
        names = {m.name.split('/', 1)[1] for m in t.getmembers() if not m.isdir()}
    info = f"{NAME.replace('-', '_')}.egg-info/"
    made = {n for n in names if n in ('PKG-INFO', 'setup.cfg') or n.startswith(info)}
    assert names - made == set(tracked)


def test_metadata(dist):
    "The version is the package's, and the Pythons are those that the test workflow runs"
    import sagan
    m = dist.metadata
    assert (m['Name'], m['Version']) == (NAME, sagan.__version__)
    assert m['License-Expression'] == 'Apache-2.0' and m['Requires-Python'] == '>=3.10'
    workflow = yaml.safe_load((root/'.github/workflows/test.yml').read_text(encoding='utf-8'))
    pythons = workflow['jobs']['test']['strategy']['matrix']['python']
    classifiers = m.get_all('Classifier')
    assert [c.split(' :: ')[-1] for c in classifiers if re.search(r':: 3\.\d+$', c)] == pythons
    assert 'Typing :: Typed' in classifiers
    assert set(m.get_all('Provides-Extra')) == {'hub', 'onnx', 'dev', 'docs', 'browser'}
    citation = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    urls = dict(u.split(', ') for u in m.get_all('Project-URL'))
    assert citation['license'] == m['License-Expression']
    assert (citation['repository-code'], citation['url']) == (urls['Repository'], urls['Documentation'])


def test_readme_elsewhere(dist):
    "On a package index README.md's links lead to files that this version has and to pages of the docs"
    import sagan
    urls = dict(u.split(', ') for u in dist.metadata.get_all('Project-URL'))
    html = {nbpath2html(p.relative_to(root/'nbs')).as_posix() for p in (root/'nbs').rglob('*.ipynb')}
    text, readme = dist.metadata.get_payload(), (root/'README.md').read_text(encoding='utf-8')
    def is_picture(m): return bool(re.search(r'!\[[^][]*$', text[:m.start()]))
    links = [(is_picture(m), m[1]) for m in re.finditer(r'\]\(([^)\s]+)\)', text)]
    assert len(links) == readme.count('](') == text.count('](')
    headings = {re.sub(r'\W+', '-', h.lower()) for h in re.findall('^#+ (.*)', text, re.M)}
    for picture, link in links:
        rest = link.removeprefix(f"{urls['Repository']}/{'raw' if picture else 'blob'}/v{sagan.__version__}/")
        if rest != link: assert (root/rest).is_file(), link
        elif link.startswith(urls['Documentation']):
            page = link.removeprefix(urls['Documentation']).split('#')[0]
            assert page in html | {''} or (root/'nbs'/page).is_file(), link
        elif link[0] == '#': assert link[1:] in headings
        else: assert link.startswith('https://') and (not picture or link.endswith('.svg')), link  # badges
    assert quick_start(text) == quick_start(readme)


def test_entry_points(dist, alone):
    "The commands of settings.ini, no alias of ours for someone else's, and each leads to a function"
    points, settings = ConfigParser(delimiters='='), ConfigParser(delimiters='=')
    points.read_string(dist.info['entry_points.txt'])
    settings.read(root/'settings.ini')
    wanted = dict(l.split('=') for l in settings['DEFAULT']['console_scripts'].split())
    assert dict(points['console_scripts']) == wanted
    targets = [t.split(':') for t in wanted.values()]
    code = '\n'.join(f'from {m} import {f}\nprint(callable({f}))' for m, f in targets)
    assert run(alone, code) == ['True'] * len(targets)


def test_light_import(alone):
    "Attention alone needs torch and nothing that takes seconds to load"
    heavy = {'fastai', 'fastcore', 'matplotlib', 'torchvision'}
    loaded = set(run(alone, 'import sys, sagan.attention; print(*sys.modules)'))
    assert 'torch' in loaded and not heavy & loaded


def test_alone(alone, tmp_path):
    """README's quick start of at most 20 lines, and a tiny run, without the developers' packages

    The quick start is part of the overview, which runs below."""
    installed = run(alone, 'import pkgutil\nprint(*(m.name for m in pkgutil.iter_modules()))')
    assert not {'nbdev', 'pytest', 'huggingface_hub', 'onnx'} & set(installed)
    lines = quick_start((root/'README.md').read_text(encoding='utf-8')).splitlines()
    assert 0 < len([l for l in lines if l.strip()]) <= 20
    execute(TINY, alone, tmp_path)
    assert (tmp_path/'runs/digits/report.html').exists()


RUN_ALL = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in json.load(open(sys.argv[1], encoding='utf-8'))['cells']:
    if cell['cell_type'] == 'code': shell.run_cell(''.join(cell['source'])).raise_error()
"""

@pytest.mark.parametrize('page', ['index', '01_spectral', 'library/63_outcomes'])
def test_page_alone(alone, tmp_path, page):
    """"Run all" of a page that lies alone in a folder, as on Colab, where only the package is installed

    The last page clones the repository, which is played by a link."""
    shutil.copy(root/f'nbs/{page}.ipynb', tmp_path/'page.ipynb')
    git = tmp_path/'bin/git'
    git.parent.mkdir()
    git.write_text(f'#!/bin/sh\nln -s "{root}" "$6"\n', encoding='utf-8')
    git.chmod(0o755)
    env = os.environ | {'MPLBACKEND': 'agg', 'IPYTHONDIR': str(tmp_path/'ipython'),
                        'PATH': f"{git.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [alone/'python', '-Ic', RUN_ALL, 'page.ipynb']
    subprocess.run(command, check=True, cwd=tmp_path, env=env, capture_output=True)
    assert (tmp_path/'sagan-pages').exists() == (page == 'library/63_outcomes')
