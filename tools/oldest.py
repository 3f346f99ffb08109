"""The oldest supported version of each requirement, as pip's constraints:

    python tools/oldest.py > oldest.txt && pip install -c oldest.txt '.[hub,onnx]'"""
import re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
DEVELOPERS = 'dev', 'docs', 'browser'  # extras of no user, so their oldest versions need no test


def oldest(settings):
    """Lines `name==version` for the minimum of each requirement in settings.ini, except the developers'.

    Raises ValueError for a requirement without a minimum, or with two."""
    config, found = ConfigParser(delimiters='='), {}
    config.read_string(settings)
    for key, lines in config['DEFAULT'].items():
        if not key.endswith('requirements') or key.split('_')[0] in DEVELOPERS: continue
        for line in lines.strip().splitlines():
            m = re.fullmatch(r'([\w.-]+)>=([\d.]+)', line)
            if not m:
                raise ValueError(f"{key}: write {line!r} as name>=version, so that its oldest version can be "
                                 "tested")
            name, version = m.groups()
            if found.setdefault(name, version) != version:
                raise ValueError(f"{name} has two minimums: {found[name]} and {version}")
    return [f'{name}=={version}' for name, version in found.items()]


if __name__ == '__main__': print(*oldest((root/'settings.ini').read_text(encoding='utf-8')), sep='\n')
