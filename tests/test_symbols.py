"Every public symbol: a docstring that names its errors, a docment on each parameter and return, an example"
import ast, importlib, inspect, json, pkgutil, re
from pathlib import Path

import pytest
import sagan
from notebooks import parsed
from readme import directives

root = Path(__file__).resolve().parent.parent
modules = sorted(m.name for m in pkgutil.iter_modules(sagan.__path__) if not m.name.startswith('_'))
exports = {'export', 'exports', 'exporti', 'exportd', 'default_exp'}
definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def names_in(tree):
    "Names, attributes and imported names of a syntax tree"
    for n in ast.walk(tree):
        if isinstance(n, ast.Name): yield n.id
        if isinstance(n, ast.Attribute): yield n.attr


def code_cells():
    "Name of the page, directives and source of each code cell"
    for path in sorted((root/'nbs').rglob('*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] == 'code': yield path.name, *directives(''.join(cell['source']))


@pytest.fixture(scope='module')
def used():
    "Names that the pages' examples use: cells that run as tests and export nothing"
    cells = [(names, source) for _, names, source in code_cells()]
    examples = [source for names, source in cells if not names.keys() & (exports | {'slow', 'cuda'})]
    return {n for source in examples for n in names_in(parsed(source))}


class Module:
    "A module's source, and the public definitions in it"
    def __init__(self, name):
        self.module = importlib.import_module(f'sagan.{name}')
        self.lines = Path(self.module.__file__).read_text(encoding='utf-8').splitlines()
        tree = ast.parse('\n'.join(self.lines))
        self.top = {n.name: n for n in tree.body if isinstance(n, definitions)}
        self.public = [n for n in self.module.__all__]

    def defined(self):
        "Public functions, classes, and their public methods, by qualified name"
        for name in self.public:
            node = self.top.get(name.split('.')[0])
            if node is None: continue
            yield name, node
            if isinstance(node, ast.ClassDef):
                for n in node.body:
                    if isinstance(n, definitions) and (n.name == '__init__' or not n.name.startswith('_')):
                        yield f'{name}.{n.name}', n

    def comment(self, line):
        "The comment beside a line, or in lines of their own above it"
        if beside := re.search(r'#\s*(\S.*)', self.lines[line - 1]): return beside[1]
        above = []
        while m := re.fullmatch(r'\s*#\s*(\S.*)', self.lines[line - 2]):
            above.insert(0, m[1])
            line -= 1
        return ' '.join(above)


def inherited(module, name):
    "Whether a method's name is one that its class's bases document, such as `forward`"
    cls, _, method = name.partition('.')
    return method and any(method in b.__dict__ for b in getattr(module, cls).__mro__[1:])


def returns_value(f):
    functions = [n for n in ast.walk(f) if isinstance(n, definitions + (ast.Lambda,)) and n is not f]
    inner = {m for n in functions for m in ast.walk(n)}
    return any(isinstance(n, ast.Return) and n.value is not None and n not in inner for n in ast.walk(f))


@pytest.mark.parametrize('name', modules)
def test_docstrings(name):
    "Each has one, and it names each exception that the body raises"
    m, bad = Module(name), []
    for qual, node in m.defined():
        is_class = isinstance(node, ast.ClassDef)
        if qual.endswith('.__init__'): continue
        if is_class and qual in m.public and not inspect.isclass(getattr(m.module, qual)): continue
        doc = ast.get_docstring(node) or ''
        if not doc and not (inherited(m.module, qual) and not qual.endswith('.forward')):
            bad.append(f'{qual}: no docstring')
        if qual.endswith('.forward') and '(' not in doc: bad.append(f'{qual}: no shape')
        if is_class: continue
        calls = [r.exc for r in ast.walk(node) if isinstance(r, ast.Raise) and isinstance(r.exc, ast.Call)]
        raised = {c.func.id for c in calls if isinstance(c.func, ast.Name)}
        missing = [r for r in sorted(raised) if r not in doc]
        bad += [f'{qual}: raises {r}, which its docstring does not say' for r in missing]
    assert not bad


@pytest.mark.parametrize('name', modules)
def test_docments(name):
    "Each parameter, field and return value has a comment beside it, and each tensor's comment has a shape"
    m, bad = Module(name), []
    def check(what, line, annotation):
        c = m.comment(line)
        if not c: return bad.append(f'{what}: no docment')
        is_tensor = annotation is not None and re.search(r'\bTensor\b', ast.unparse(annotation))
        if is_tensor and not re.search(r'\(.*\)|[Ss]calar|shape', c):
            bad.append(f'{what}: no shape')
    for qual, node in m.defined():
        if isinstance(node, ast.ClassDef):
            if any('dataclass' in ast.unparse(d) for d in node.decorator_list):
                for f in node.body:
                    if isinstance(f, ast.AnnAssign): check(f'{qual}.{f.target.id}', f.lineno, f.annotation)
            continue
        if inherited(m.module, qual) and not qual.endswith('__init__'): continue
        a = node.args
        args = a.posonlyargs + a.args + a.kwonlyargs + [x for x in (a.vararg, a.kwarg) if x]
        for p in args:
            if p.arg not in ('self', 'cls'): check(f'{qual}({p.arg})', p.lineno, p.annotation)
        if returns_value(node):
            if node.returns is None: bad.append(f'{qual}: no return annotation')
            else: check(f'{qual} ->', node.returns.end_lineno, node.returns)
    assert not bad


@pytest.mark.parametrize('name', modules)
def test_examples(name, used):
    "An example on some page uses it, and runs at every change"
    assert not [n for n in Module(name).public if n not in used]
