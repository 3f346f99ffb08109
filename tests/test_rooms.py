"The rule of the house: what each module may know, how long it may be, and that no imports form a circle"
import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import style

root = Path(__file__).resolve().parent.parent
modules = {p.stem: p for p in sorted((root/'sagan').glob('*.py')) if p.stem not in ('__init__', '_modidx')}
# know nothing of GANs
GROUND = {
    'devices', 'distributed', 'images', 'inputs', 'names', 'precision', 'progress', 'quiet', 'storage',
    'deprecated', 'winograd'}


def imported(path):
    "Modules of ours that a module imports, wherever in its code"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            package = node.level == 1 or (node.module or '').split('.')[0] == 'sagan'
            name = (node.module or '').removeprefix('sagan').lstrip('.')
            if package: found |= {name.split('.')[0]} if name else {a.name for a in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split('.')[1] for a in node.names if a.name.startswith('sagan.')}
    return found & modules.keys() - {path.stem}


imports = {name: imported(path) for name, path in modules.items()}


def known(name):
    "Modules that a module imports, and those that these import"
    found, todo = set(), list(imports[name])
    while todo:
        m = todo.pop()
        if m not in found:
            found.add(m)
            todo += imports[m]
    return found


def test_no_circle():
    "There is an order in which each module comes after all that it imports"
    order = list(TopologicalSorter(imports).static_order())
    assert set(order) == modules.keys()


@pytest.mark.parametrize('name', sorted(GROUND))
def test_ground(name):
    "Rooms on the ground import nothing of ours but each other"
    assert imports[name] <= GROUND


@pytest.mark.parametrize('name, unknown', [
    ('kernels', {'training', 'config', 'runs', 'networks', 'attention', 'spectral'}),
    ('training', {'checkpoints', 'recording', 'runs'}),
    ('recording', {'runs'}),
    ('diagnostics', {'training', 'recording', 'runs'})])
def test_unknown(name, unknown):
    "A room knows only what stands under it"
    assert not known(name) & (unknown | {'cli', 'experiments'})


def test_cli_on_top():
    "Nothing imports the command line, but what starts it"
    assert {name for name in modules if 'cli' in imports[name]} <= {'__main__'}


@pytest.mark.parametrize('name', modules)
def test_length(name):
    "No module is longer than 650 lines, the command line not longer than 300"
    lines = len(modules[name].read_text(encoding='utf-8').splitlines())
    assert lines <= (300 if name == 'cli' else 650)


def test_style_sees_faults(tmp_path, monkeypatch):
    "The check of form finds a long line, two statements in one, and an f that does nothing"
    monkeypatch.setattr(style, 'root', tmp_path)
    file = tmp_path/'tests.py'
    strings = """d = (f'{c}, {{}}' f"{c:{a}}" rf'{{'\n     f'idle')\n"""
    file.write_text("a = 1; b = 2\nc = ';'\n# " + 'x'*109 + '\n' + strings, encoding='utf-8')
    found = list(style.faults(file))
    assert len(found) == 3
    assert 'line 3: 111 characters, 110 are allowed' in found[0] and 'line 1: several statements' in found[1]
    assert 'line 5: f-string without braces' in found[2]
