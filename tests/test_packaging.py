"The wheel, as built from the sdist: what is in it, and what importing it loads"
import subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, root], check=True)
    return next(out.glob('*.whl'))


@pytest.fixture(scope='session')
def run(wheel, tmp_path_factory):
    "Runs code where only the wheel's own `sagan` can be imported, and gives what it prints"
    target = tmp_path_factory.mktemp('target')
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', target, wheel], check=True)
    def run(code):
        code = f'import sys; sys.path.insert(0, {str(target)!r}); import sagan; assert {str(target)!r} in sagan.__file__; {code}'
        return subprocess.run([sys.executable, '-c', code], cwd=target, check=True, capture_output=True, text=True).stdout.split()
    return run


def test_files(wheel):
    "Only the package and its metadata, and all of the package"
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split('/')[0].removesuffix('.dist-info') for n in names} == {'sagan', wheel.name.removesuffix('-py3-none-any.whl')}
    assert {n for n in names if n.startswith('sagan/')} == {p.relative_to(root).as_posix() for p in (root/'sagan').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert any(n.endswith('/LICENSE') for n in names)


def test_entry_points(wheel, run):
    "The commands of settings.ini, no alias of ours for someone else's, and each leads to a function"
    points, settings = ConfigParser(delimiters='='), ConfigParser(delimiters='=')
    with zipfile.ZipFile(wheel) as z:
        points.read_string(z.read(next(n for n in z.namelist() if n.endswith('entry_points.txt'))).decode())
    settings.read(root/'settings.ini')
    wanted = dict(l.split('=') for l in settings['DEFAULT']['console_scripts'].split())
    assert dict(points['console_scripts']) == wanted
    targets = [t.split(':') for t in wanted.values()]
    assert run(';'.join(f'from {m} import {f}; print(callable({f}))' for m, f in targets)) == ['True'] * len(targets)


def test_light_import(run):
    "Attention alone needs torch and nothing that takes seconds to load"
    heavy = {'fastai', 'fastcore', 'matplotlib', 'torchvision'}
    loaded = set(run('import sagan.attention; print(*sys.modules)'))
    assert 'torch' in loaded and not heavy & loaded
