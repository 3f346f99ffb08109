"Gives setuptools what settings.ini holds, and README.md for a package index; the rest is in pyproject.toml"
import re, sys
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

config = ConfigParser(delimiters='=')
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
def lines(key): return cfg[key].strip().splitlines()
def text(name): return Path(name).read_text(encoding='utf-8')

scripts = lines('console_scripts')
extras = {name: lines(f'{name}_requirements') for name in ('hub', 'onnx', 'docs', 'browser')}
# nbdev 3 calls its command nbdev-test; contributors, who install with -e, may still type its old name
if 'editable_wheel' in sys.argv: scripts.append('nbdev_test=nbdev.test:nbdev_test')

url = dict(re.findall(r'^(\w+) = "(https:.*?)/?"$', text('pyproject.toml'), re.M))
tag = 'v' + re.search(r'__version__ = "(.*)"', text('sagan/__init__.py'))[1]
def absolute(link):
    """A link of README.md from elsewhere.

    Pages lead to the docs, pictures and other files to the repository as of this version."""
    picture, words, path = link.groups()
    if page := re.fullmatch(r'nbs/(library/)?(?:\d+_)?(\w+)\.ipynb(#.*)?', path):
        folder, name, place = [p or '' for p in page.groups()]
        return f"{words}({url['Documentation']}/{folder}{name}.html{place})"
    return f"{picture}{words}({url['Repository']}/{'raw' if picture else 'blob'}/{tag}/{path})"

setup(
    author=cfg['author'],
    license_expression=cfg['license'],
    keywords=cfg['keywords'].split(),
    classifiers=lines('classifiers'),
    long_description=re.sub(r'(!?)(\[[^][]*\])\((?![a-z]+:|#)([^)\s]+)\)', absolute, text('README.md')),
    long_description_content_type='text/markdown',
    install_requires=lines('requirements'),
    extras_require=extras | {'dev': lines('dev_requirements') + extras['hub'] + extras['onnx']},
    entry_points={'console_scripts': scripts, 'nbdev': ['sagan=sagan._modidx:d']},
)
