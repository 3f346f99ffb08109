"""Killed at any moment, or out of room, at whatever it does: the same command goes on, and what it leaves is
bit for bit that of one that was never stopped, with no temporary file and no process left

CI tries a few moments, always the same. SAGAN_KILLS=100 tries 100 of each kind, and disks of 20 sizes."""
import csv, json, os, random, shutil, subprocess, time
import pytest, torch
from forked import die_at, forked, leave_nothing_running, running
from machines import linux
from safetensors import safe_open
from sagan import cli, measuring, references
from sagan.checkpoints import file_step, states
from sagan.recording import RunWriter
from sagan.runs import load_run, report_run
from sagan.sharing import PretrainedSAGAN
from sagan.storage import file_lock
from test_importing import BG, pair, SMALL

pytestmark = linux

HUNT = int(os.environ.get('SAGAN_KILLS', 0))
TINY = dict(preset='tiny', batch=4, z_dim=4, device='cpu')

# --- what is done, each in a process of its own that leaves the folder `here/'made'` ---

def quick_evaluator(images, steps=1, seed=0, train=references.train_evaluator): return train(images, 1, seed)

def finished(here):
    "Is it all there? Then a hidden folder may be left, which goes when somebody writes there next, as now"
    if not (here/'made').exists() or not load_run(here/'made'): return False
    with file_lock(here): return True

def train(here, **options):
    "A training that measures; begun, or gone on with if it has begun"
    measuring.train_evaluator = quick_evaluator
    run = here/'made'
    if (run/'report.html').exists() and finished(here): return
    if (run/'config.json').exists(): cli.sagan_train(resume=str(run))
    else: cli.sagan_train(out=str(run), **dict(steps=3, measure_every=2, samples=10) | TINY | options)

def experiment(here, **options):
    "An experiment of three networks"
    measuring.train_evaluator = quick_evaluator
    options = dict(steps=2, every=1, seeds=1, samples=10) | TINY | options
    cli.sagan_experiment('local', 'digits', str(here/'made'), **options)

def import_weights(here):
    "The weights of another project; nothing if they are there"
    if finished(here): return
    cli.sagan_import(str(here/'G_ema.pth'), str(here/'D.pth'), out=str(here/'made'))

def share(here):
    "A folder for others; nothing if it is there"
    if finished(here): return
    with cli.plain_errors('share'): PretrainedSAGAN.from_pretrained(here/'run').save_pretrained(here/'made')

def report(here):
    "The report of a finished run"
    with cli.plain_errors('report'): report_run(here/'made')

def evaluate(here):
    "The scores of a finished run"
    measuring.train_evaluator = quick_evaluator
    cli.sagan_eval(str(here/'made'), n=10)

ACTIONS = [train, experiment, import_weights, share, report, evaluate]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "What each of them leaves that is not stopped: {name: (folder, calls that change something, seconds)}"
    base, found = tmp_path_factory.mktemp('whole'), {}
    G, D, *_ = pair(BG, 0, **SMALL, tables='plain')
    for f in ACTIONS:
        here = base/f.__name__
        here.mkdir()
        if f is import_weights:
            torch.save(G, here/'G_ema.pth')
            torch.save(D, here/'D.pth')
        if f is share: shutil.copytree(base/'train'/'made', here/'run')
        if f in (report, evaluate): shutil.copytree(base/'train'/'made', here/'made')
        begun = base/f'{f.__name__}-begun'
        shutil.copytree(here, begun)
        p, start = forked(base/'output', f.__name__, here, module='test_kills', folder=here), time.time()
        ended(p)
        calls = int((base/'output.calls').read_text(encoding='utf-8'))
        found[f.__name__] = begun, here/'made', calls, time.time() - start
    return found

def ended(p, *statuses):
    "The messages of a process that must end with a sentence"
    p.join(300)
    said = p.output.read_text(encoding='utf-8')
    assert p.exitcode in (statuses or (0,)) and 'Traceback' not in said, (p.exitcode, said)
    return said

# --- what is compared ---

TIMES = 'seconds', 'images_per_s', 'seconds_per_step'
DIFFERENT = 'report.html', 'table.md'  # tell seconds

def timeless(v):
    "The same without the time it took"
    if isinstance(v, dict): return {k: timeless(w) for k, w in v.items() if k not in TIMES}
    return [timeless(w) for w in v] if isinstance(v, (list, tuple)) else v

def content(file):
    "What is to be the same in two files of that name"
    if file.name in DIFFERENT or file.is_dir(): return None
    if file.suffix == '.safetensors':
        with safe_open(file, 'pt') as f: return f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    if file.suffix == '.pt': return timeless(torch.load(file, weights_only=True))
    if file.suffix == '.json': return timeless(json.loads(file.read_bytes()))
    if file.suffix == '.jsonl': return [timeless(json.loads(line)) for line in file.read_bytes().splitlines()]
    if file.suffix == '.csv': return [timeless(r) for r in csv.DictReader(file.open(encoding='utf-8'))]
    return file.read_bytes()

def same(a, b):
    "Are they equal, bit for bit where they hold tensors?"
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b

def files(folder): return {p.relative_to(folder) for p in folder.rglob('*') if p.name != '.lock'}

def check_same(made, whole):
    "The same files with the same contents"
    assert files(made) == files(whole), files(made) ^ files(whole)
    different = [str(f) for f in files(whole) if not same(content(made/f), content(whole/f))]
    assert not different, different

# --- killed ---

def killed_and_again(name, whole, here, n=0, seconds=None):
    "Do something, be killed before its n-th change or after some seconds, and do it again"
    begun, made, *_ = whole[name]
    shutil.copytree(begun, here)
    p = forked(here.parent/'first', name, here, module='test_kills', kill_at=n, folder=here)
    if seconds is not None:
        p.join(seconds)
        p.kill()
    p.join()
    assert not running(p)
    again = forked(here.parent/'second', name, here, module='test_kills')
    ended(again)
    assert not running(again)
    check_same(here/'made', made)
    assert not [f for f in here.parent.rglob('*') if f.name.endswith('.new')]

def moments(whole):
    "Changes before which to be killed, (name, number): in the hunt all of them, otherwise one or two of each"
    changes = [(name, range(1, calls + 1)) for name, (_, _, calls, _) in whole.items()]
    if HUNT: return [(name, n) for name, numbers in changes for n in numbers]
    return [(name, n) for name, numbers in changes
            for n in random.Random(name).sample(numbers, 1 + (name in ('train', 'experiment')))]

def test_killed_before_a_change(whole, tmp_path):
    for name, n in moments(whole): killed_and_again(name, whole, tmp_path/f'{name}{n}', n)

def test_killed_at_random(whole, tmp_path):
    rng = random.Random(0)
    for i in range(HUNT or 2):
        name = rng.choice(list(whole))
        killed_and_again(name, whole, tmp_path/f'{name}{i}', seconds=rng.random()*whole[name][3])

# --- every change of one checkpoint ---

def train_and_fork(here):
    "A training whose second checkpoint is killed before each of its changes, each time in another copy"
    checkpoint = RunWriter.checkpoint
    def killed(writer, measure):
        for n in range(1, 1000*(writer.sagan_trainer.step == 2)):
            copy = here/f'killed{n}'
            shutil.copytree(here/'made', copy)
            if not (child := os.fork()):
                writer.folder = copy
                die_at(n, copy)
                checkpoint(writer, measure)
                os._exit(0)
            if not os.waitpid(child, 0)[1]: os._exit(0)  # it has come to the end of the checkpoint
        checkpoint(writer, measure)
    RunWriter.checkpoint = killed
    train(here)

def test_killed_at_every_change_of_a_checkpoint(whole, tmp_path):
    "Weights and state are both those of the step before, or both those of this one"
    p = forked(tmp_path/'output', 'train_and_fork', tmp_path, module='test_kills')
    ended(p)
    made, folders = whole['train'][1], sorted(tmp_path.glob('killed*'), key=lambda f: int(f.name[6:]))
    assert len(folders) > 20
    before, steps = content(tmp_path/'killed1'/'weights.safetensors')[1], []
    for folder in folders:
        newest = states(folder)[-1]
        steps.append(file_step(newest))
        run = load_run(folder)
        assert run.step == steps[-1]
        if run.step == 2: assert same(content(newest), content(made/'states'/newest.name))
        assert same(dict(run.model.state_dict()), content(newest)['model'])
        assert not same(dict(run.model.state_dict()), before) or run.step == 1
    assert steps == sorted(steps) and set(steps) == {1, 2}
    for folder in folders[:-1] if HUNT else folders[len(folders)//2:][:1]:
        again = forked(tmp_path/'again', 'sagan_train', resume=str(folder))
        ended(again)
        check_same(folder, made)

# --- no room ---

def mounted(disk, size, *more):
    "Is there a small disk of this size, or has its size been changed?"
    disk.mkdir(exist_ok=True)
    mount = 'mount', '-t', 'tmpfs', '-o', ','.join((*more, f'size={size}k')), 'none', disk
    return not subprocess.run(mount, capture_output=True).returncode

def test_disks_that_are_too_small(whole, tmp_path):
    "It ends with a sentence, and goes on when there is room"
    disk, rng = tmp_path/'disk', random.Random(0)
    for i in range(20 if HUNT else 3):
        name = [train, experiment, import_weights, share][i % 4 if HUNT else i].__name__
        begun, made, *_ = whole[name]
        size = sum(f.stat().st_size for f in made.rglob('*'))//1000
        if not mounted(disk, int(size*(.1 + .8*rng.random()))): pytest.skip('only root may mount a disk')
        try:
            here = disk/name
            if name in ('import_weights', 'share'):  # what they read lies elsewhere
                here.mkdir()
                for f in begun.iterdir(): (here/f.name).symlink_to(f)
            else: shutil.copytree(begun, here)
            p = forked(tmp_path/'first', name, here, module='test_kills')
            said = ended(p, 1)
            assert 'MB are free' in said, said
            assert mounted(disk, 30_000, 'remount')
            p = forked(tmp_path/'second', name, here, module='test_kills')
            ended(p)
            check_same(here/'made', made)
            assert not [f for f in disk.rglob('*') if f.name.endswith('.new')]
        finally: subprocess.run(['umount', '-l', disk])
