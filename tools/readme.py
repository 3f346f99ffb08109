"Writes README.md from nbs/index.ipynb without Quarto: `python tools/readme.py`"
import base64, json, posixpath, re, shutil
from pathlib import Path

root = Path(__file__).resolve().parent.parent
hidden = {'hide', 'export', 'exporti', 'default_exp'}  # what nbdev, too, keeps off a page


def directives(source):
    "The `#|` lines that open a cell, as names and values, and the cell without them"
    lines = source.splitlines()
    n = next((i for i, l in enumerate(lines) if not l.startswith('#|')), len(lines))
    found = [re.match(r'#\|\s*([^\s:]*)[\s:]*(.*)', l).groups() for l in lines[:n]]
    return dict(found), '\n'.join(lines[n:]).strip()


def fenced(text, lang=''):
    return f'```{lang}\n{text.rstrip()}\n```'


def output2md(output, image, alt):
    "Markdown of one output; `image` is the file, less its ending, that its picture, if any, is written to"
    if 'text' in output: return fenced(''.join(output['text']))
    data = output.get('data', {})
    for kind in ('png', 'jpeg'):
        if f'image/{kind}' not in data: continue
        image.parent.mkdir(parents=True, exist_ok=True)
        image.with_suffix(f'.{kind}').write_bytes(base64.b64decode(''.join(data[f'image/{kind}'])))
        return f'![{alt}]({image.parent.name}/{image.name}.{kind})'
    for kind in ('text/markdown', 'text/html'):
        if kind in data: return ''.join(data[kind]).strip()
    if 'text/plain' in data: return fenced(''.join(data['text/plain']))


def nb2md(nb, images):
    "Markdown of a notebook; pictures among its outputs are written to the folder `images`"
    parts = []
    for cell in nb['cells']:
        names, source = directives(''.join(cell['source']))
        if cell['cell_type'] == 'markdown': parts.append(source)
        if cell['cell_type'] != 'code' or names.keys() & hidden: continue
        if source and names.get('echo') != 'false': parts.append(fenced(source, 'python'))
        for i, o in enumerate(cell['outputs']):
            parts.append(output2md(o, images/f"{cell['id']}-{i}", names.get('fig-alt', '').strip('"')))
    return '\n\n'.join(o for o in parts if o) + '\n'


def outside_code(change, md):
    "Markdown with `change` applied to all but its code"
    parts = re.split(r'(```.*?```|`[^`\n]*`)', md, flags=re.S)
    parts[::2] = map(change, parts[::2])
    return ''.join(parts)


def from_root(md):
    "Relative links of a page in nbs/ as seen from the folder above, code left alone"
    def link(m): return m[1] + posixpath.normpath('nbs/' + m[2])
    relative = r'(\]\(|src="|href=")(?![a-z]+:|[#/]|index_files/)([^)"\s]+)'
    return outside_code(lambda part: re.sub(relative, link, part), md)


if __name__ == '__main__':
    shutil.rmtree(root/'index_files', ignore_errors=True)
    nb = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))
    (root/'README.md').write_text(from_root(nb2md(nb, root/'index_files')), encoding='utf-8')
