"""Whatever is typed at a command, and whatever its files hold: exit status 0, 1 or 2, one sentence instead of
a traceback, and after a refusal nothing new on disk

CI tries 512 examples, always the same. SAGAN_FUZZ=20 tries 20 times as many, others at each start."""
import os, tempfile
os.environ['OMP_NUM_THREADS'] = '1'
os.environ.setdefault('HYPOTHESIS_STORAGE_DIRECTORY', tempfile.gettempdir())  # not in the current folder
import io, json, re, shutil, signal, sys, traceback, warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from fastai.learner import Learner
from forked import save_nothing
from machines import linux
from hypothesis import given, HealthCheck, note, Phase, settings, strategies as st
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sagan import __main__ as main, cli, measuring, references, runner, runs
from sagan.options import make_parser
from sagan.sharing import PretrainedSAGAN
from test_importing import BG, pair, SMALL

resource = pytest.importorskip('resource')  # Windows has none
pytestmark = linux
HUNT = int(os.environ.get('SAGAN_FUZZ', 0))

def examples(n):
    "Settings of a test: the same n examples each time, or HUNT times as many"
    return settings(max_examples=n*(HUNT or 1), derandomize=not HUNT, deadline=None, database=None,
                    phases=[Phase.explicit, Phase.generate, Phase.shrink],
                    suppress_health_check=list(HealthCheck), print_blob=False)

# --- commands in this process ---

SIZE = ['--preset', 'tiny', '--batch', '4', '--z-dim', '4', '--device', 'cpu']
BASE = dict(
    train=['--steps', '4', *SIZE], sample=['--n', '1'], attend=['--n', '1'],
    walk=['--frames', '1', '--out', 'walk.png'], explore=['--out', 'page.html'],
    report=['--out', 'report.html'],
    eval=['--n', '10'], **{'import': ['--out', 'new']},
    experiment=['--out', 'experiment', '--data', 'digits', '--steps', '2', '--seeds', '1', '--samples', '10',
                *SIZE])
WORK = SimpleNamespace(begun=False, hangs=False)  # has the command come to what takes long?

def begin(*_, **__):
    "Stands for work that takes long, of which somebody presses Ctrl-C at once"
    WORK.begun = True
    raise KeyboardInterrupt

def out_of_patience(*_):
    "Nobody waits for ever: long work ends with Ctrl-C"
    begin()

def hangs(*_):
    "Nothing may wait for ever, such as for somebody who writes into a pipe"
    WORK.hangs = True
    raise KeyboardInterrupt

@contextmanager
def time_limits(seconds=3):
    "Within this context seconds of computing end with Ctrl-C, and half a minute of waiting is a failure"
    old = [signal.signal(s, f) for s, f in ((signal.SIGPROF, out_of_patience), (signal.SIGALRM, hangs))]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 30)
    try: yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL): signal.setitimer(timer, 0)
        for s, f in zip((signal.SIGPROF, signal.SIGALRM), old): signal.signal(s, f)

def called(f, encoding='utf-8', seconds=3):
    "Call a function like a program: its exit status, and what it writes on standard error"
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors='strict')
    err, status, WORK.begun = io.TextIOWrapper(io.BytesIO(), encoding, errors='backslashreplace'), 0, False
    WORK.hangs = False
    with redirect_stdout(out), redirect_stderr(err), time_limits(seconds), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: f()
        except SystemExit as e: status = e.code or 0
        except Exception: traceback.print_exc()
    plt.close('all')
    err.flush()
    return status, err.buffer.getvalue().decode()

def command(*argv, **kw):
    "A command with its arguments"
    def call():
        old, sys.argv = sys.argv, ['sagan', *argv]
        try: main.main()
        finally: sys.argv = old
    return called(call, **kw)

def share():
    "What leaves a folder for others"
    def call():
        with cli.plain_errors('share'): PretrainedSAGAN.from_pretrained('run').save_pretrained('shared')
    return called(call)

def tree():
    "All files and folders here, with what is in them"
    return {p: p.read_bytes() if p.is_file() else None for p in Path('.').rglob('*')}

def check(call, *args, **kw):
    "What every call must keep to"
    before = tree()
    status, said = call(*args, **kw)
    note(f'{args}, {kw}: status {status}: {said}')
    assert not WORK.hangs and 'Traceback' not in said, said
    assert status in (0, 1, 2), (status, said)
    after = tree()
    assert not [p for p in after if p.name.endswith('.new')]
    if status == 1:
        *_, sentence = re.split(r'^(?:sagan-\w+|share): ', said.strip(), flags=re.M)
        assert 10 < len(sentence) <= 1300 or WORK.begun, said
    if status and not WORK.begun:
        changed = {str(p) for p in before.keys() | after.keys() if before.get(p, 0) != after.get(p, 0)}
        assert not changed, (changed, said)

# --- a place with everything that commands read ---

def draw_pictures(folder):
    "Two classes of eight small pictures"
    for c in 'ab':
        (folder/c).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.RandomState(i).randint(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder/c/f'{i}.png')

def make_everything():
    "In the current folder: runs, an experiment, files of another project, pictures"
    draw_pictures(Path('pictures'))
    for name, t in zip(('G_ema', 'D'), pair(BG, 0, **SMALL, tables='plain')): torch.save(t, f'{name}.pth')
    for argv in (['train', *BASE['train'], '--out', 'run', '--measure-every', '2', '--samples', '10'],
                 ['train', *BASE['train'], '--out', 'other', '--data', 'pictures', '--z-dim', '5'],
                 ['eval', 'run', *BASE['eval']],
                 ['experiment', 'local', *BASE['experiment']],
                 ['import', 'G_ema.pth', 'D.pth', '--out', 'imported']):
        status, said = command(*argv, seconds=60)
        assert status == 0, said
    Path('names.txt').write_text('one\ntwo\nthree\n', encoding='utf-8')
    Path('text').write_text('no picture, no weights', encoding='utf-8')
    # a page of 2 MB that nobody reads is only in the way
    for name in ('run', 'other', 'experiment'): Path(name, 'report.html').write_bytes(b'whole')

def few_steps(images, steps=1, seed=0): return _train_evaluator(images, 1, seed)
_train_evaluator = references.train_evaluator

@pytest.fixture(scope='module')
def origin(tmp_path_factory):
    "A folder with everything, in memory where there is such a place"
    shm = Path('/dev/shm')
    base = tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else tmp_path_factory.getbasetemp())
    folder, here = Path(base.name)/'origin', Path.cwd()
    folder.mkdir()
    with pytest.MonkeyPatch.context() as m, base:
        for name in ('XDG_CACHE_HOME', 'TORCH_HOME'): m.setenv(name, name.lower())
        m.setattr(measuring, 'train_evaluator', few_steps)
        os.chdir(folder)
        make_everything()
        # from here on nothing trains, opens a notebook, starts processes or goes to the network
        m.setattr(Learner, 'fit', begin)
        m.setattr(runs, 'open_notebook', begin)
        m.setattr(runner, 'ProcessPoolExecutor', begin)
        m.setattr(references, '_fetch', begin)
        if not HUNT: m.setattr(Figure, 'savefig', save_nothing)  # figures are made, but not drawn
        old = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path('/proc/self/statm').read_text(encoding='utf-8').split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages*resource.getpagesize() + 3*2**30, old[1]))
        try: yield folder
        finally:
            resource.setrlimit(resource.RLIMIT_AS, old)
            os.chdir(here)

@contextmanager
def copied(origin, *names):
    "Within this context the current folder is a copy of some of it"
    here = origin.parent/'here'
    here.mkdir()
    for name in names:
        source = origin/name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, here/name)
    os.chdir(here)
    try: yield here
    finally:
        os.chdir(origin)
        shutil.rmtree(here)

# --- A: options ---

NUMBERS = ['0', '1', '2', '3', '7', '-1', '1000000000', '99999999999999999999', '1e9', '.5', '1e400',
           '1e-400', 'nan', 'inf', '-inf', '0x10', '１']
WORDS = ['', ' ', '-', 'none', 'small', 'inception', 'tiny', 'cpu', 'cuda', 'meta', 'rollback', 'auxiliary',
         'float16', 'residual', '16', '16,16', '8-2', ',', '1,2;3', '8,8', '$x_$', '<b>', 'א', '\udcff',
         'two\nlines', 'x'*300, 'x'*5000]
PLACES = ['run', 'other', 'imported', 'experiment', 'digits', 'twins', 'pictures', 'pictures/a', 'nowhere',
          '.', 'nowhere/deep/new', 'new', 'text', 'pipe',
          'dangling', 'run/config.json', 'G_ema.pth', 'names.txt',
          'run/weights.safetensors', 'run/states', 'new.png', 'text/new', 'run/new.png']

def options_of(name):
    "All options of a command that take a value, and those that take none"
    parser = make_parser(getattr(cli, f'sagan_{name}'))
    left_out = 'help', 'compile'  # which takes a minute
    known = [a for a in parser._actions if a.dest not in left_out]
    return [(s, a.nargs != 0, a.type) for a in known for s in a.option_strings]

OPTIONS = {name: options_of(name) for name in main.COMMANDS}
FIRST = dict(sample=PLACES, attend=PLACES, walk=PLACES, explore=PLACES, eval=PLACES, report=PLACES,
             experiment=['local', 'figure3', 'table2', 'claim', 'run', ''])

@st.composite
def option(draw, name):
    "An option of a command with a value that may fit"
    flag, takes, kind = draw(st.sampled_from(OPTIONS[name]))
    if not takes: return [flag]
    likely, values = (NUMBERS if kind in (int, float) else [*PLACES, *WORDS]), [*NUMBERS, *WORDS, *PLACES]
    value = draw(st.sampled_from(likely) | st.sampled_from(values) | st.text(max_size=20).map(as_argument))
    return draw(st.sampled_from([[flag, value], [f'{flag}={value}']]))

def as_argument(text):
    "Text as a shell can pass it on"
    return text.replace('\0', '').encode('utf-8', 'replace').decode()

@st.composite
def arguments(draw):
    "A command with arguments that work, and one to three more"
    name = draw(st.sampled_from([*main.COMMANDS]*2 + ['train', 'train']))
    first = [draw(st.sampled_from(FIRST[name][:1]*6 + FIRST[name]))] if name in FIRST else []
    base = BASE[name]
    if name == 'train' and draw(st.booleans()): base = ['--resume', draw(st.sampled_from(['run']*6 + PLACES))]
    if name == 'import': first = draw(st.lists(st.sampled_from(['G_ema.pth', 'D.pth', *PLACES]), max_size=3))
    more = draw(st.lists(option(name), min_size=1, max_size=3))
    if name == 'explore' and not draw(st.integers(0, 9)): base = []
    return [name, *first, *base, *sum(more, [])]

@examples(362)
@given(arguments(), st.sampled_from(['utf-8', 'utf-8', 'ascii']))
def test_options(origin, argv, encoding):
    with copied(origin, *(p.name for p in origin.iterdir())):
        os.mkfifo('pipe')
        Path('dangling').symlink_to('nothing')
        check(command, *argv, encoding=encoding)

# --- B: files ---

DEEP, NAN, INF = '\0deep', '\0nan', '\0inf'  # replaced in the text, as `json` cannot write them
VALUES = [None, True, False, 0, 1, -1, 2, 3, 1.5, -0., 1e308, 10**12, 10**30, '', 'x', '0', 'digits',
          'pictures', 'x'*5000, '$x_$', '\ud800', '\n',
          [], [1]*3, ['x'], {}, {'x': 1}, [[1, 2]], DEEP, NAN, INF]

def json_bytes(value):
    "JSON with what a strict reader refuses"
    text = json.dumps(value, allow_nan=True)
    for mark, is_in_place in ((DEEP, '['*100_000 + ']'*100_000), (NAN, 'NaN'), (INF, '-Infinity')):
        text = text.replace(json.dumps(mark), is_in_place)
    return text.encode()

def places(tree, at=()):
    "Paths to everything in nested dictionaries and lists"
    yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for k, v in items: yield from places(v, (*at, k))

def changed(tree, at, change):
    "A copy of nested dictionaries and lists, in which one value is what `change` makes of it"
    if not at: return change(tree)
    new = tree.copy()
    new[at[0]] = changed(new[at[0]], at[1:], change)
    return new

def more_or_less(tree, at, draw):
    "A copy with a key or an item less, once more, or one that nobody knows"
    def change(v):
        if isinstance(v, dict):
            if v and draw(st.booleans()): return {k: w for k, w in v.items() if k != draw_key(v, draw)}
            return v | {draw(st.sampled_from(['extra', '', 'step', 'x'*300])): draw(st.sampled_from(VALUES))}
        if isinstance(v, list): return draw(st.sampled_from([v[:-1], v + v[-1:], v*2, v[::-1], []]))
        return draw(st.sampled_from(VALUES))
    return changed(tree, at, change)

def draw_key(v, draw): return draw(st.sampled_from(sorted(v, key=str)))

def mutated(tree, draw, values=VALUES):
    "Nested dictionaries and lists with one to three changes"
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(places(tree))))
        if draw(st.booleans()): tree = changed(tree, at, lambda v: draw(st.sampled_from(values)))
        else: tree = more_or_less(tree, at, draw)
    return tree

def mutate_json(file, draw): file.write_bytes(json_bytes(mutated(json.loads(file.read_bytes()), draw)))

def mutate_log(file, draw):
    "Lines of JSON: one changed, or lines less, twice or in another order"
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    lines = mutated(lines, draw)
    lines = lines if isinstance(lines, list) else [lines]
    file.write_bytes(b''.join(json_bytes(r) + b'\n' for r in lines))

TENSORS = [torch.zeros(()), torch.zeros(0), torch.full((3,), torch.nan), torch.ones(2, 3, dtype=torch.int64),
           torch.zeros(5056, dtype=torch.uint8), torch.zeros(2, dtype=torch.float16), torch.ones(1).bool()]

def mutate_tensor(t, draw):
    "A tensor with other contents, of another shape, or of another kind"
    t = t.clone()
    changes = [lambda: t.flatten(), lambda: t[None],
               lambda: t.double() if t.is_floating_point() else t.float(),
               lambda: t.fill_(torch.nan) if t.is_floating_point() else t.fill_(-1), lambda: t*0,
               lambda: t.fill_(torch.iinfo(torch.int64).max) if t.dtype == torch.int64 else t.float()*1e38]
    return draw(st.sampled_from(changes))()

def mutate_state(file, draw):
    "What `torch.save` wrote"
    tree = torch.load(file, weights_only=True)
    tensors = [at for at in places(tree) if isinstance(at_path(tree, at), torch.Tensor)]
    if draw(st.booleans()) and tensors:
        tree = changed(tree, draw(st.sampled_from(tensors)), lambda t: mutate_tensor(t, draw))
    else: tree = mutated(tree, draw, [v for v in VALUES if v not in (DEEP, NAN, INF)] + [np.nan] + TENSORS)
    torch.save(tree, file)

def at_path(tree, at):
    for k in at: tree = tree[k]
    return tree

def mutate_weights(file, draw):
    "Tensors, or the header, of a safetensors file"
    with safe_open(file, 'pt') as f: header, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    name = draw_key(tensors, draw)
    how = draw(st.sampled_from(['tensor', 'less', 'more', 'header', 'step', 'config']))
    if how == 'tensor': tensors[name] = mutate_tensor(tensors[name], draw)
    if how == 'less': del tensors[name]
    if how == 'more': tensors['extra'] = torch.zeros(1)
    if how == 'header': header.pop(draw_key(header, draw), None)
    if how == 'step': header['step'] = draw(st.sampled_from(['', 'x', '-1', '1e9', '9'*30, '9'*5000, '1.5']))
    if how == 'config' and 'config' in header:
        header['config'] = json_bytes(mutated(json.loads(header['config']), draw)).decode()
    save_file(tensors, file, header or None)

def mutate_bytes(file, draw):
    "A file that is cut, has other bytes in it, is empty, or no file at all"
    content = bytearray(file.read_bytes())
    k, n = draw(st.integers(0, len(content) - 1)), draw(st.integers(1, 40))
    no_file = dict(folder=Path.mkdir, pipe=os.mkfifo, link=lambda file: file.symlink_to('no'))
    how = draw(st.sampled_from(['cut', 'flip', 'nul', 'insert', 'doubled', 'empty', *no_file]))
    if how in no_file:
        file.unlink()
        return no_file[how](file)
    if how == 'cut': del content[k:]
    if how == 'flip': content[k] ^= 1 << draw(st.integers(0, 7))
    if how == 'nul': content[k:k+n] = bytes(n)
    if how == 'insert': content[k:k] = draw(st.binary(min_size=1, max_size=n))
    file.write_bytes(dict(doubled=content*2, empty=b'').get(how, content))

def mutate(file, draw, other=None):
    "Change a file, by what it holds or by its bytes; or put another of its kind into its place"
    kinds = {'.json': mutate_json, '.jsonl': mutate_log, '.pt': mutate_state, '.pth': mutate_state,
             '.safetensors': mutate_weights}
    ways = [mutate_bytes] + 3*[kinds.get(file.suffix, mutate_bytes)]
    if other and other.exists(): ways.append(lambda file, draw: shutil.copy(other, file))
    draw(st.sampled_from(ways))(file, draw)

READERS = [
    ['sample', 'run', '--n', '1'], ['attend', 'run', '--n', '1'], ['explore', 'run', '--out', 'page.html'],
    ['eval', 'run', '--n', '10'], ['train', '--resume', 'run', '--steps', '5'], ['train', '--resume', 'run']]
FILES = ['config.json', 'log.jsonl', 'weights.safetensors', 'states/step-0000004.pt', 'evaluator.pt',
         'eval-n10.json']

@examples(110)
@given(st.data())
def test_files_of_a_run(origin, data):
    names = data.draw(st.lists(st.sampled_from(FILES[:4]*3 + FILES[4:]), min_size=1, max_size=2, unique=True))
    with copied(origin, 'run', 'pictures'):
        for name in names: mutate(Path('run', name), data.draw, origin/'other'/name)
        argv = data.draw(st.sampled_from([*READERS, READERS[4], None]))
        if argv == READERS[5]: Path('run/report.html').unlink()
        if argv: check(command, *argv)
        else: check(share)

@examples(10)
@given(st.data())
def test_files_of_an_experiment(origin, data):
    with copied(origin, 'experiment'):
        found = sorted(Path('experiment').rglob('*'))
        files = [p for p in found if p.suffix in ('.json', '.pt', '.safetensors')]
        small = [f for f in files if f.name in ('experiment.json', 'records.json', 'config.json')]
        file = data.draw(st.sampled_from(small*3 + files))
        mutate(file, data.draw)
        check(command, 'experiment', 'local', *BASE['experiment'])

@examples(30)
@given(st.data())
def test_files_of_other_projects(origin, data):
    with copied(origin, 'G_ema.pth', 'D.pth', 'names.txt'):
        file = data.draw(st.sampled_from(['G_ema.pth', 'D.pth', 'names.txt']))
        mutate(Path(file), data.draw)
        check(command, 'import', 'G_ema.pth', 'D.pth', '--classes', 'names.txt', '--out', 'new')
