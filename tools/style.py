"""Checks the form of all code: `python tools/style.py` names each long line, each line with two statements,
each f-string that has nothing to fill in, and each text file that is opened without an encoding.

Pages of the first floor (nbs/00 to nbs/10) have at most 100 characters a line, everything else 110."""
import ast, io, json, re, sys, tokenize
from pathlib import Path

root = Path(__file__).resolve().parent.parent
FIRST_FLOOR, ELSEWHERE = 100, 110
# Calls that take an encoding, and its place among their arguments; and those that only look like them
ENCODING = dict(open=3, fdopen=3, read_text=0, write_text=1)
NO_TEXT = 'archive.open', 'Image.open', 'os.open', 'tarfile.open'


def limit(path):
    "Characters that a line of this file may have"
    return FIRST_FLOOR if path.parent == root/'nbs' and path.name[0].isdigit() else ELSEWHERE


def sources(path):
    "Each piece of Python in a file, with a name for it"
    if path.suffix == '.py':
        yield str(path.relative_to(root)), path.read_text(encoding='utf-8')
        return
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    for cell in cells:
        if cell['cell_type'] != 'code': continue
        source = ''.join(cell['source'])
        # a figure's words stand in one line, as Quarto reads them; IPython's own lines are no Python
        lines = ['' if line.startswith('#|') else re.sub(r'^( *)[%!](?! ).*', r'\1pass', line)
                 for line in source.split('\n')]
        yield f"{path.relative_to(root)} #{cell['id']}", '\n'.join(lines)


def semicolons(source):
    "Numbers of the lines with a semicolon between statements"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP and token.string == ';': yield token.start[0]


def idle_f_strings(source):
    "Numbers of the lines on which an f-string, or a piece of one, without braces begins"
    start, depth, braces = 0, 0, False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == 'STRING' and re.match('f|rf', token.string, re.I):  # one token before Python 3.12
            if not re.search('[{}]', token.string): yield token.start[0]
        elif kind == 'FSTRING_START':
            depth += 1
            if depth == 1: start, braces = token.start[0], False
        elif kind == 'FSTRING_END':
            depth -= 1
            if depth == 0 and not braces: yield start
        elif depth and (token.string == '{' or kind == 'FSTRING_MIDDLE' and re.search('[{}]', token.string)):
            braces = True


def unnamed_encodings(source):
    "Numbers of the lines that read or write text in the machine's own encoding, on Windows often cp1252"
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or ast.unparse(call.func) in NO_TEXT: continue
        owner, _, name = ast.unparse(call.func).rpartition('.')
        if len(call.args) > ENCODING.get(name, -1): continue
        named = {k.arg: ast.unparse(k.value) for k in call.keywords}
        first = 0 if owner and name == 'open' else 1  # a path opens itself: path.open('rb')
        mode = named.get('mode', ''.join(map(ast.unparse, call.args[first:first + 1])))
        if 'encoding' not in named and 'b' not in mode: yield call.lineno


def faults(path):
    "The faults of a file, each with its place"
    for where, source in sources(path):
        for i, line in enumerate(source.split('\n'), 1):
            if len(line) > limit(path):
                fault = f'{len(line)} characters, {limit(path)} are allowed'
                yield f'{where}, line {i}: {fault}: {line.strip()[:60]}'
        for i in semicolons(source):
            yield f'{where}, line {i}: several statements: {source.splitlines()[i - 1].strip()[:60]}'
        for i in idle_f_strings(source):
            yield f'{where}, line {i}: f-string without braces: {source.splitlines()[i - 1].strip()[:60]}'
        for i in unnamed_encodings(source):
            yield f'{where}, line {i}: no encoding is named: {source.splitlines()[i - 1].strip()[:60]}'


def files():
    "Every file with hand-written Python"
    yield from sorted((root/'nbs').rglob('*.ipynb'))
    for folder in ('tests', 'tests/old', 'tools', 'benchmarks'): yield from sorted((root/folder).glob('*.py'))
    yield root/'setup.py'


if __name__ == '__main__':
    found = [f for path in files() if '.ipynb_checkpoints' not in path.parts for f in faults(path)]
    print(*found, sep='\n')
    print(f'{len(found)} faults of style in {len(list(files()))} files')
    sys.exit(bool(found))
