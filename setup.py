"Gives setuptools what stands in settings.ini; the rest stands in pyproject.toml"
import sys
from configparser import ConfigParser
from setuptools import setup

config = ConfigParser(delimiters='=')
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
def lines(key): return cfg[key].strip().splitlines()

scripts = lines('console_scripts')
extras = {name: lines(f'{name}_requirements') for name in ('hub', 'onnx')}
# nbdev 3 calls its command nbdev-test; contributors, who install with -e, may still type its old name
if 'editable_wheel' in sys.argv: scripts.append('nbdev_test=nbdev.test:nbdev_test')

setup(
    author=cfg['author'],
    license_expression=cfg['license'],
    keywords=cfg['keywords'].split(),
    classifiers=lines('classifiers'),
    install_requires=lines('requirements'),
    extras_require=extras | {'dev': lines('dev_requirements') + sum(extras.values(), [])},
    entry_points={'console_scripts': scripts, 'nbdev': ['sagan=sagan._modidx:d']},
)
