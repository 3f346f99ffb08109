"What a release is checked for before anything is built, and the oldest versions that the tests run with"
import os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest, release
from oldest import oldest
from release import NAME, check, check_name, sections

root = Path(__file__).resolve().parent.parent
changelog = """# Changelog

About it.

## 0.10.0 (2026-11-21)

- New.
- Newer.

## 0.9.1 (2026-01-02)

- Old.
"""


def test_check_accepts_what_fits():
    check('v0.10.0', '0.10.0', changelog)


@pytest.mark.parametrize('tag, version, text, message', [
    ('0.10.0', '0.10.0', changelog, 'vMAJOR.MINOR.PATCH'),
    ('v0.10', '0.10', changelog, 'vMAJOR.MINOR.PATCH'),
    ('v0.010.0', '0.010.0', changelog, 'vMAJOR.MINOR.PATCH'),
    ('v0.10.0', '0.9.1', changelog, "sagan.__version__ is '0.9.1'"),
    ('v0.9.1', '0.9.1', changelog, 'begins with 0.10.0'),
    ('v0.10.0', '0.10.0', '# Changelog\n', 'begins with nothing'),
    ('v0.10.0', '0.10.0', changelog.replace('2026-11-21', 'unreleased'), 'write its date'),
    ('v0.10.0', '0.10.0', changelog.replace('- New.\n- Newer.\n', ''), 'says nothing'),
    ('v0.10.0', '0.10.0', changelog.replace('0.9.1', '0.11.0'), 'not newer than 0.11.0'),
])
def test_check_refuses(tag, version, text, message):
    with pytest.raises(ValueError, match=message): check(tag, version, text)


def test_name():
    "Ours is free or names this repository on the index; another project's, or another name, is refused"
    project = (root/'pyproject.toml').read_text(encoding='utf-8')
    ours = {'info': {'project_urls': {'Repository': 'https://github.com/sagan-gan/sagan/'}}}
    check_name(project, None)
    check_name(project, ours)
    for urls in (None, {}, {'Homepage': 'https://github.com/someone/else'}):
        with pytest.raises(ValueError, match=f'{NAME} belongs to another project'):
            check_name(project, {'info': {'project_urls': urls}})
    with pytest.raises(ValueError, match=f"names the distribution 'sagan'; it is '{NAME}'"):
        check_name(project.replace(f'name = "{NAME}"', 'name = "sagan"'), None)


def test_changelog():
    "Ours has a section for each version, the current one first, and `notes` prints it"
    import sagan
    text = (root/'CHANGELOG.md').read_text(encoding='utf-8')
    assert next(iter(sections(text))) == sagan.__version__
    def release(*args):
        command = [sys.executable, root/'tools/release.py', *args]
        return subprocess.run(command, capture_output=True, text=True)
    notes = release('notes', f'v{sagan.__version__}')
    assert notes.returncode == 0 and notes.stdout.startswith('- ')
    assert '## ' not in notes.stdout and notes.stdout.strip() in text
    wrong = release('check', 'v999.0.0')
    assert wrong.returncode == 1 and wrong.stderr.count('\n') == 1
    assert wrong.stderr.startswith('release.py: the tag is v999.0.0')


def test_oldest():
    settings = ('[DEFAULT]\nrequirements =\n    a>=1.2\n    b-c>=3\ndev_requirements =\n    '
                'd~=3\nbrowser_requirements =\n    f>=1\nx_requirements =\n    a>=1.2\n    e>=0.1\n')
    assert oldest(settings) == ['a==1.2', 'b-c==3', 'e==0.1']
    with pytest.raises(ValueError, match='a has two minimums: 1.2 and 1.3'):
        oldest(settings.replace('a>=1.2\n    e', 'a>=1.3\n    e'))
    with pytest.raises(ValueError, match="write 'b-c' as name>=version"):
        oldest(settings.replace('b-c>=3', 'b-c'))


def test_every_requirement_has_a_minimum():
    found = oldest((root/'settings.ini').read_text(encoding='utf-8'))
    assert {'torch', 'fastai', 'numpy', 'onnx'} <= {line.split('==')[0] for line in found}


@pytest.mark.parametrize('system, folder', [('posix', 'bin'), ('nt', 'Scripts')])
def test_programs_of_an_environment(monkeypatch, system, folder):
    "The wheel is installed and used by the programs of the new environment, wherever they lie in it"
    def create(home, with_pip):
        (home/folder).mkdir(parents=True)
        for name in ('pip', 'python', 'sagan-train'):
            (home/folder/(name + '.exe'*(os.name == 'nt'))).touch(0o755)
    called = []
    monkeypatch.setattr(release, 'os', SimpleNamespace(name=system, environ=os.environ))
    monkeypatch.setattr(release.venv, 'create', create)
    monkeypatch.setattr(release.subprocess, 'run', lambda command, **_: called.append(Path(command[0])))
    release.try_wheel('sagan.whl')
    assert [p.stem for p in called] == ['pip', 'python', 'sagan-train']
    assert {p.parent.name for p in called} == {folder}
