"""Give every notebook the parts that all share: `python tools/notebooks.py` changes those that lack them.

- Its first cell installs what is missing, as on Colab and Kaggle. A page that reads files of the repository
  gets these, too.
- No cell imports nbdev, which readers lack; the command `nbdev-export` exports.
- No link has the name of a public symbol in backticks: nbdev would make it a second link inside the first.
- A picture is a link to itself on the site. Colab and Kaggle take no pictures along, but show the link."""
import ast, json, posixpath, re
from pathlib import Path
from zlib import crc32

from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

root = Path(__file__).resolve().parent.parent
REPOSITORY = 'https://github.com/sagan-gan/sagan'
MARK = '# Where something is missing, as on Colab and Kaggle, this cell installs it'
# What some pages import beyond the requirements of the package
EXTRAS = 'datasets', 'huggingface_hub', 'onnx', 'onnxruntime', 'onnxscript', 'tensorboard'
# How a page's code reaches for stored experiments, benchmarks and other pages
READS = re.compile(r"""['"](\.\./)*(experiments|benchmarks)\b|Path\('\.|['"]\S+\.ipynb['"]""")

# A picture that is a file, and no link yet
PICTURE = re.compile(r'(?<!\[)!\[[^][]*\]\((?![a-z]+:)([^)]+)\)|(?<!">)<img src="(?![a-z]+:)([^"]+)"[^>]*>')


def source(cell): return ''.join(cell['source'])
def is_code(cell): return cell['cell_type'] == 'code'
def is_install(cell): return is_code(cell) and MARK in source(cell)


def parsed(code):
    "Syntax tree of a cell, without the lines for IPython"
    return ast.parse(re.sub(r'^( *)[%!].*', r'\1pass', code, flags=re.M))


def imported(cells):
    "Top-level modules that code cells import"
    for node in (n for cell in cells if is_code(cell) for n in ast.walk(parsed(source(cell)))):
        if isinstance(node, ast.Import): yield from (alias.name.split('.')[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module: yield node.module.split('.')[0]


def install_code(cells, folder):
    "Code of the first cell of a page in nbs/`folder`"
    extras = sorted({*imported(cells)} & {*EXTRAS})
    examples = [source(c) for c in cells if is_code(c) and not source(c).startswith('#| export')]
    reads = any(map(READS.search, examples))
    lines = ['#| hide', MARK, 'from importlib.util import find_spec']
    if reads: lines.append('from pathlib import Path')
    lines += ["if not find_spec('sagan'):", f'    %pip install -q git+{REPOSITORY}']
    if extras: lines += [f'if not all(map(find_spec, {extras})):', f"    %pip install -q {' '.join(extras)}"]
    if reads:
        up, down = ('../', f'/{folder}') if folder else ('', '')
        lines += [f"if not Path('{up}experiments').is_dir():  # stored results, and the other pages",
                  f'    !git clone -q --depth 1 {REPOSITORY} sagan-pages',
                  f'    %cd -q sagan-pages/nbs{down}']
    return '\n'.join(lines)


def without_nbdev(code):
    "Code without the import and the call of nbdev; empty if there was nothing else"
    code = re.sub(r'^import nbdev$\n?|^nbdev\.nbdev_export\(\)$\n?', '', code, flags=re.M)
    code = re.sub(r'^(import .*?)(?:, nbdev\b|\bnbdev, )', r'\1', code, flags=re.M)
    return '' if code.strip() == '#| hide' else code.rstrip('\n')


def plain_links(text, symbols):
    "Markdown whose links have no backticks around the names of symbols, which nbdev makes links"
    def name(m): return m[1] if symbols.doc(m[1].removesuffix('()')) else m[0]
    def link(m): return re.sub(r'`([^`\s]+)`', name, m[0])
    return re.sub(r'\[[^][]*\]\((?![^)]*\.(?:png|svg|webp))', link, text)


def linked_pictures(text, folder):
    "Markdown of a page in nbs/`folder` whose pictures are links to themselves on the site"
    def link(m):
        url = get_config(root).doc_url + posixpath.normpath(f'{folder}/{m[1] or m[2]}').lstrip('/')
        return f'[{m[0]}]({url})' if m[1] else f'<a href="{url}">{m[0]}</a>'
    return PICTURE.sub(link, text)


def as_lines(text): return text.splitlines(keepends=True)


def complete(nb, name, symbols):
    "A notebook, `name` in nbs/, with the parts that all share; changes `nb`"
    cells, folder = [c for c in nb['cells'] if not is_install(c)], Path(name).parent.name
    for cell in cells:
        if is_code(cell): cell['source'] = as_lines(without_nbdev(source(cell)))
        else: cell['source'] = as_lines(linked_pictures(plain_links(source(cell), symbols), folder))
    cells = [c for c in cells if c['source']]
    install = dict(cell_type='code', execution_count=None, id=f'{crc32(name.encode()):08x}', metadata={},
                   outputs=[], source=as_lines(install_code(cells, folder)))
    nb['cells'] = [cells[0], install, *cells[1:]]
    return nb


def as_json(nb): return json.dumps(nb, indent=1, ensure_ascii=False) + '\n'


if __name__ == '__main__':
    symbols = NbdevLookup()
    for path in sorted((root/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        nb = json.loads(path.read_text(encoding='utf-8'))
        text = as_json(complete(nb, path.relative_to(root/'nbs').as_posix(), symbols))
        if text != path.read_text(encoding='utf-8'):
            path.write_text(text, encoding='utf-8', newline='\n')
            print(path.relative_to(root))
