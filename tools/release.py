"""The steps of a release that need more than a line, for .github/workflows/release.yml:

    python tools/release.py check v0.1.0      # reject a tag that does not match version and changelog
    python tools/release.py name PyPI         # reject a name that is not ours on the package index
    python tools/release.py notes v0.1.0      # print the changelog's text about it
    python tools/release.py try dist/*.whl    # the wheel alone: quick start and a tiny run"""
import json, os, re, shutil, subprocess, sys, tempfile, venv
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

root = Path(__file__).resolve().parent.parent
# What pip installs, as `sagan` belongs to another project on PyPI. The package is imported as sagan
NAME = 'self-attention-gan'
INDEXES = {'PyPI': 'https://pypi.org', 'TestPyPI': 'https://test.pypi.org'}


def sections(changelog):
    "Versions, the rest of their headings, and the text below, newest first"
    parts = re.split(r'^## (\S+)(.*)\n', changelog, flags=re.M)[1:]
    releases = zip(parts[::3], parts[1::3], parts[2::3])
    return {version: (rest.strip(), body.strip()) for version, rest, body in releases}


def check(tag, version, changelog):
    "Raises ValueError unless `tag` names `version`, and the changelog begins with it, a date, and some text"
    if not re.fullmatch(r'v(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}', tag):
        raise ValueError(f"a release is tagged vMAJOR.MINOR.PATCH, such as v0.1.0; got {tag!r}")
    if tag != f'v{version}':
        raise ValueError(f"the tag is {tag}, but sagan.__version__ is {version!r}: set it in "
                         "sagan/__init__.py, or move the tag")
    found = sections(changelog)
    if next(iter(found), None) != version:
        raise ValueError(f"CHANGELOG.md begins with {next(iter(found), 'nothing')}, not with {version}: say "
                         "there what changes")
    date, body = found[version]
    if not re.fullmatch(r'\(\d{4}-\d{2}-\d{2}\)', date):
        raise ValueError(f"CHANGELOG.md's heading is {version} {date}; write its date as {version} "
                         "(YYYY-MM-DD)")
    if not body: raise ValueError(f"CHANGELOG.md says nothing about {version}")
    key = lambda v: [int(n) for n in v.split('.')]
    older = [v for v in found if v != version]
    if older and key(older[0]) >= key(version): raise ValueError(f"{version} is not newer than {older[0]}")


def check_name(project, published):
    """Raises ValueError unless we may release under the name in pyproject.toml

    `project` is the text of pyproject.toml; `published` what the index says about the name, None if it is
    free."""
    name, repository = [re.search(rf'^{key} = "(.*)"$', project, re.M)[1] for key in ('name', 'Repository')]
    if name != NAME: raise ValueError(f"pyproject.toml names the distribution {name!r}; it is {NAME!r}")
    if published is None: return
    urls = {url.rstrip('/') for url in (published['info'].get('project_urls') or {}).values()}
    if repository not in urls:
        raise ValueError(f"{name} belongs to another project on the index, which does not name {repository}; "
                         "choose a free name, and set it here and in pyproject.toml")


def look_up(index, name):
    "An index's facts about a name, None if it has no such project"
    try:
        with urlopen(f'{INDEXES[index]}/pypi/{name}/json', timeout=60) as answer: return json.load(answer)
    except HTTPError as e:
        if e.code == 404: return None
        raise


def quick_start(readme):
    "The Python code of README.md"
    return '\n'.join(re.findall(r'^```python\n(.*?)^```', readme, re.S | re.M))


def execute(command, bin, where):
    "Run a command with the programs in `bin`, in the folder `where`"
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'MPLBACKEND': 'agg'}
    program, *args = command.split()
    subprocess.run([shutil.which(program, path=bin), *args], cwd=where, env=env, check=True)


TINY = 'sagan-train --steps 20 --batch 16 --g-width 2 --d-width 4'  # the smallest main job


def try_wheel(wheel):
    "Install only a wheel into an empty environment, and use it there"
    with tempfile.TemporaryDirectory() as tmp:
        home, where = Path(tmp, 'venv'), Path(tmp, 'work')
        where.mkdir()
        venv.create(home, with_pip=True)
        bin = home/('Scripts' if os.name == 'nt' else 'bin')
        subprocess.run([shutil.which('pip', path=bin), 'install', '-q', wheel], check=True)
        code = quick_start((root/'README.md').read_text(encoding='utf-8'))
        (where/'quick.py').write_text(code, encoding='utf-8')
        for command in ('python quick.py', TINY): execute(command, bin, where)


if __name__ == '__main__':
    step, given = sys.argv[1:]
    changelog = (root/'CHANGELOG.md').read_text(encoding='utf-8')
    version = re.search(r'__version__ = "(.*)"', (root/'sagan/__init__.py').read_text(encoding='utf-8'))[1]
    try:
        if step == 'check': check(given, version, changelog)
        elif step == 'name':
            check_name((root/'pyproject.toml').read_text(encoding='utf-8'), look_up(given, NAME))
        elif step == 'notes': print(sections(changelog)[given.removeprefix('v')][1])
        elif step == 'try': try_wheel(given)
        else: raise ValueError(f"check, name, notes or try; got {step!r}")
    except ValueError as e: sys.exit(f'release.py: {e}')
