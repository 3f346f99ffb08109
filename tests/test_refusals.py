"""A refusal changes nothing: after each of these calls all files are what they were, and none is new

What runs out of memory, or fails before its first step, leaves no folder in the way of the corrected call"""
import shutil
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sagan import checks, recording, runs, training
from sagan.checkpoints import best_record, read_config, read_log
from sagan.checks import TooLarge
from sagan.data import digits, folder, ImageFiles, to_unit
from sagan.importing import import_run
from sagan.references import reference, train_evaluator
from sagan.runner import experiment_run
from sagan.runner import experiment_run
from sagan.runs import attend_run, evaluate_run, explore_run, load_run, report_run, resume_run, train_run
from sagan.sampling import nearest_run, sample_run
from sagan.storage import file_lock
from sagan.visualization import grid_image
from sagan.walks import walk_run

pytestmark = pytest.mark.filterwarnings(r'ignore:\d+ images are too few', 'ignore:.*intra[-_](FID|fid)')
SMALLEST = dict(preset='tiny', steps=2, batch=4, g_width=2, d_width=4, z_dim=4, device='cpu')
MEASURED = dict(measure_every=1, samples=10)

def silent(text): pass
train = partial(train_run, tell=silent, **SMALLEST)
resume = partial(resume_run, device='cpu', tell=silent)


def pictures(path, first=0, n=12):
    "A folder of pictures of digits, in two classes"
    for i, x in enumerate(digits().x[first:first+n]):
        (path/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        grid_image(to_unit(x[None]), 1).save(path/'ab'[i % 2]/f'{i}.png')


@pytest.fixture(scope='module', autouse=True)
def quickly():
    "The small evaluator is hardly trained, and no report is drawn"
    with patch('sagan.measuring.train_evaluator', partial(train_evaluator, steps=2)):
        def report(run, images, best): (run.folder/'report.html').write_text('', encoding='utf-8')
        with patch('sagan.runs.write_report', report): yield


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a measured run, pictures, other pictures, and things that are in the way"
    root = tmp_path_factory.mktemp('made')
    pictures(root/'pics')
    pictures(root/'others', 100)
    (root/'file').write_text('no folder', encoding='utf-8')
    with suppress(OSError): (root/'link').symlink_to(root/'nowhere')  # Windows may allow no links
    train(root/'pics', root/'run', **MEASURED)
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    "A copy of it, in which we are"
    root = shutil.copytree(made, tmp_path/'here', symlinks=True)
    monkeypatch.chdir(root)
    return root


def snapshot(root):
    "All that is in a folder: files with their bytes and times, folders, links"
    def what(f):
        if f.is_symlink(): return f.readlink()
        return (f.read_bytes(), f.stat().st_mtime_ns) if f.is_file() else 'folder'
    return {f.relative_to(root): what(f) for f in root.rglob('*')}


def refusals():
    "(name, part of the message, call)"
    for device in ('meta', 'xla', 'cuda:99', 'warp', 'x'*5000):  # mps exists on a Mac: test_devices.py
        yield f'train on {device[:9]}', 'is not available', partial(train, 'pics', device=device)
    for f in (resume_run, sample_run, attend_run, explore_run, evaluate_run, report_run):
        yield f'{f.__name__} on meta', 'is not available', partial(f, 'run', device='meta')
    for name, message, change in [
        ('no such data', 'no folder nowhere', dict(data='nowhere')),
        ('data in a file', 'no folder file', dict(data='file')),
        ('batch', 'batch must be from 2 to 12, .* --batch', dict(batch=16)),
        ('parts', 'accumulate must divide', dict(accumulate=3)),
        ('classes', 'n_classes must be 2', dict(n_classes=3)),
        ('keep', 'keep must be a whole number, at least 1', dict(keep=0)),
        ('on_nan', 'on_nan must be', dict(on_nan='go on')),
        ('tell', 'tell must be', dict(tell=None)),
        ('no weights', 'no Inception weights at nowhere', dict(weights='nowhere')),
        ('no weights to measure', 'no Inception weights at nowhere', dict(weights='nowhere', **MEASURED)),
        ('other weights', 'not a file of torch-fidelity', dict(weights='file', **MEASURED)),
        ('evaluator', 'evaluator must be', dict(evaluator='me')),
        ('cache', 'file is not a folder', dict(cache='file')),
        ('samples', 'measuring 1000000000000 images needs', dict(measure_every=1, samples=10**12)),
        ('too wide', 'needs at least .* GB of memory', dict(g_width=4096)),
        ('empty name', 'cannot be empty', dict(data='')),
        ('no such place', 'no 64x64 feature map', dict(data='nowhere', d_attention=(64,))),
        ('out among the data', 'is inside pics', dict(out='pics/new')),
        ('out is a file', 'file is not a folder', dict(out='file')),
        ('out in a file', 'file is not a folder', dict(out='file/a/b')),
        ('out is a link', 'link is not a folder', dict(out='link')),
        ('out is a run', 'already holds a run', dict(out='run')),
        ('out holds files', 'already holds other files', dict(out='pics')),
        ('long name', 'choose a shorter', dict(out='a/b/' + 'x'*300)),
        ('no name', 'choose a shorter', dict(out='a/b\0c'))]:
        yield f'train: {name}', message, partial(train, **dict(data='pics', out='a/b/new') | change)
    for name, message, change in [
        ('finished', 'is finished', dict(steps=2)),
        ('other rate of decay', 'beta2 is', dict(beta2=.5)),
        ('no rate', 'lr_g must be positive', dict(lr_g=-1.)),
        ('of the package', 'digits comes with the package, .*--init-from', dict(folder='digits')),
        ('other batch', 'batch is 4', dict(batch=6)),
        ('other data', 'trained on different data', dict(data='others')),
        ('other classes', 'the run has classes a, b', dict(data='digits')),
        ('no such data', 'no folder .*nowhere', dict(data='nowhere')),
        ('no weights', 'no Inception weights at nowhere', dict(weights='nowhere')),
        ('other weights', 'not a file of torch-fidelity', dict(weights='file')),
        ('cache', 'file is not a folder', dict(cache='file')),
        ('keep', 'keep must be a whole number, at least 1', dict(keep=0)),
        ('tell', 'tell must be', dict(tell=None)),
        ('samples', 'measuring 1000000000000 images needs', dict(samples=10**12))]:
        yield f'resume: {name}', message, partial(resume, **dict(folder='run', steps=4) | change)
    one = partial(sample_run, 'run', device='cpu')
    yield 'sample: class', 'no class c', partial(one, classes='c')
    yield 'sample: n', 'n must be a whole number, at least 1', partial(one, n=0)
    yield 'sample: too many', '2,000,000,000 images of 32 pixels do not fit', partial(one, n=10**9)
    yield 'sample: beyond numbers', 'images of 32 pixels do not fit', partial(one, n=10**30)
    yield 'sample: seed', 'seed must be below 2', partial(one, seed=2**64)
    yield 'sample: folder', 'no folder a', partial(one, out='a/b.png')
    yield 'sample: over a folder', 'already holds files', partial(one, out='pics')
    among = partial(experiment_run, 'claim', 'pics', 'pics/runs')
    yield 'experiment: among the data', 'is inside pics', among
    yield 'sample: among files', 'file is not a folder', partial(one, out='file')
    yield 'sample: ending', 'name a picture', partial(one, out='a.jpg')
    yield 'sample: empty name', 'cannot be empty', partial(one, out='')
    yield 'sample: too large', 'GB are free', partial(one, n=10**12, out='a.npz')
    yield 'sample: endless', 'GB are free', partial(one, n=10**30, out='new/')
    yield 'sample: truncation', 'number, above 0, got 0', partial(one, truncation=0)
    yield 'sample: negative', 'number, above 0, got -1.0', partial(one, truncation=-1., out='new/')
    near = partial(nearest_run, 'run', device='cpu')
    yield 'nearest: class', 'no class c', partial(near, label='c')
    yield 'nearest: too many', 'n must be at most 40', partial(near, n=41)
    yield 'nearest: data', 'no folder nowhere', partial(near, data='nowhere')
    yield 'nearest: folder', 'no folder a', partial(near, out='a/b.png')
    yield 'nearest: evaluator', 'evaluator must be', partial(near, evaluator='me')
    yield 'nearest: truncation', 'number, above 0, got 0', partial(near, truncation=0)
    walk = partial(walk_run, 'run', device='cpu')
    yield 'walk: class', 'no class c', partial(walk, classes='c')
    yield 'walk: seed', 'seed must be', partial(walk, seeds=['0', '1'])
    yield 'walk: one stop', 'two different stops', partial(walk, seeds=1)
    yield 'walk: other numbers', '3 seeds and 2 classes', partial(walk, seeds=range(3), classes=['a', 'b'])
    yield 'walk: frames', 'frames must be a whole number', partial(walk, frames=0)
    yield 'walk: too long', 'are too many', partial(walk, frames=10**9)
    yield 'walk: too wide', 'are too many', partial(walk, frames=100, out='a.png')
    yield 'walk: layer', 'no attention at 8x8', partial(walk, layer=8)
    yield 'walk: point', 'rows go from', partial(walk, point=(99, 99))
    yield 'walk: no point', 'point must be a pair', partial(walk, point=(1, 2, 3))
    yield 'walk: video', 'ffmpeg', partial(walk, out='a.mp4')
    yield 'walk: ending', 'must end in', partial(walk, out='a')
    yield 'walk: empty name', 'cannot be empty', partial(walk, out='')
    yield 'walk: folder', 'no folder a', partial(walk, out='a/b.gif')
    yield 'walk: no run', 'not a run folder', partial(walk_run, 'pics')
    yield 'sample: no run', 'not a run folder', partial(sample_run, 'pics')
    look = partial(attend_run, 'run', device='cpu')
    yield 'attend: layer', 'no attention at 8x8', partial(look, layer=8)
    yield 'attend: point', 'rows go from', partial(look, points=[(99, 99)])
    yield 'attend: too many', 'n must be at most 300', partial(look, n=10**9)
    yield 'attend: folder', 'no folder a', partial(look, out='a/b.png')
    yield 'explore: images', 'nowhere', partial(explore_run, 'run', images='nowhere', out='page.html')
    yield 'explore: folder', 'no folder a', partial(explore_run, 'run', out='a/page.html')
    measure = partial(evaluate_run, 'run', device='cpu')
    yield 'eval: n', 'n must be a whole number, at least 10', partial(measure, n=5)
    yield 'eval: too many', 'measuring 1000000000000 images needs', partial(measure, n=10**12)
    yield 'eval: standing', 'standing must be a whole number, at least 0', partial(measure, standing=-1)
    yield 'eval: data', 'no folder nowhere', partial(measure, data='nowhere')
    yield 'eval: classes', 'are not those of the run', partial(measure, data='digits')
    yield 'eval: weights', 'no Inception weights', partial(measure, weights='nowhere')
    for name in ('data', 'weights', 'reference', 'out'):
        yield f'eval: empty {name}', 'cannot be empty', partial(measure, **{name: ''})
    for name in ('data', 'out', 'weights'):
        yield f'experiment: empty {name}', 'cannot be empty', partial(experiment_run, 'local', **{name: ''})
    yield 'eval: evaluator', 'evaluator must be', partial(measure, evaluator='me')
    yield 'eval: weights as reference', 'other tensors than reference statistics', partial(
        measure, n=10, reference='run/weights.safetensors')
    yield 'eval: folder as reference', 'not a file of reference', partial(measure, n=10, reference='pics')
    yield 'eval: reference', 'no folder a', partial(measure, reference='a/reference.safetensors')
    again = partial(report_run, 'run', device='cpu')
    yield 'report: classes', 'the run has classes a, b', partial(again, data='digits')
    yield 'import: file', 'nowhere', partial(import_run, 'nowhere', out='a/new')


@pytest.mark.parametrize('name, message, call', list(refusals()), ids=[name for name, _, _ in refusals()])
def test_a_refusal_changes_nothing(here, name, message, call):
    if name == 'train: out is a link' and not Path('link').is_symlink(): pytest.skip('makes links')
    before = snapshot(here)
    with pytest.raises((ValueError, OSError, MemoryError), match=message): call()
    assert snapshot(here) == before


@pytest.mark.parametrize('call', [resume, report_run])
def test_a_run_in_use(here, call):
    before = snapshot(here)
    with file_lock('run'), pytest.raises(BlockingIOError, match='in use'): call('run', device='cpu')
    assert snapshot(here) == before


FAILURES = {
    'no memory on a GPU': (training, 'd_step', torch.OutOfMemoryError(
        'CUDA out of memory. Tried to allocate 2 GiB')),
    'no memory': (training, 'd_step', RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096000 bytes")),
    'no memory to measure': (runs, 'real_statistics', MemoryError()),
    'no statistics': (runs, 'real_statistics', ValueError('no such features')),
    'no room for a state': (recording, 'save_state', OSError('no space left')),
    'a bug': (recording, 'save_weights', KeyError('bug'))}


@pytest.mark.parametrize('name', FAILURES)
def test_a_run_that_fails_before_its_first_step(here, name):
    "A new one is removed, with the folders around it; one that goes on keeps what it had"
    module, function, error = FAILURES[name]
    before = snapshot(here)
    wanted = TooLarge if 'memory' in name else type(error)
    with patch.object(module, function, side_effect=error):
        with pytest.raises(wanted, match='lower --batch' if 'memory' in name else error.args[0]):
            train('pics', 'a/new', **MEASURED)
        assert snapshot(here) == before
        if module is runs:
            with pytest.raises(wanted, match='memory use of other' if 'memory' in name else error.args[0]):
                resume('run', steps=4)
            assert snapshot(here) == before


def test_no_room_on_the_disk(here):
    before = snapshot(here)
    with patch('shutil.disk_usage', return_value=shutil._ntuple_diskusage(10**9, 10**9, 1000)):
        for call in (partial(train, 'pics', 'a/new'), partial(resume, 'run', steps=4)):
            with pytest.raises(OSError, match='a checkpoint needs .* where 0.0 MB are free'): call()
    assert snapshot(here) == before


def test_memory_is_known_before_anything_is_built(here):
    "What weights, gradients, moments and a batch need at least; nothing of it is allocated"
    before = snapshot(here)
    with patch.object(checks, 'free_memory', return_value=2e8):
        with pytest.raises(TooLarge, match='on 12 images at a time needs at least .* 0.2 GB are free'):
            train('pics', 'a/new', batch=12, size=256, g_width=16)
    assert snapshot(here) == before


def test_a_run_killed_before_its_first_checkpoint(here):
    "Its folder is no run yet: the corrected command begins in it"
    killed = patch.object(runs, '_set_up', side_effect=KeyboardInterrupt)
    with killed, patch.object(runs, 'removed_on_error', return_value=nullcontext()):
        with pytest.raises(KeyboardInterrupt): train('pics', 'new', **MEASURED)
    (here/'new/evaluator.pt').write_bytes(b'of other pictures')
    assert train('pics', 'new', keep=1).step == 2 and read_config('new')[2]['keep'] == 1
    assert not (here/'new/evaluator.pt').exists()


# Data are what they contain

def test_a_folder_that_was_moved(here):
    "Its new place is remembered, the best state stays the best, and a kept evaluator goes on"
    (here/'pics').rename(here/'moved')
    resume('run', steps=3, data='moved')
    assert read_config('run')[0].data == str(here/'moved')
    run = resume('run', steps=4)
    assert [r['step'] for r in run.records if 'fid' in r] == [1, 2, 3, 4]
    assert len({r['digest'] for r in run.records}) == 1 and len({r['evaluator'] for r in run.records}) == 1
    assert best_record(run.records)['fid'] == min(r['fid'] for r in run.records)
    assert load_run('run', best=True).step == best_record(run.records)['step']
    scores = evaluate_run('run', n=12, data=here/'moved', device='cpu')
    assert scores['digest'] == run.records[0]['digest']


def test_records_of_an_earlier_version(here):
    "Have no digest; their text says where the images were"
    def record(i, where):
        by = f'small CNN trained on 10 images of {where} at seed 0 (weights ab)'
        against = f'12 images of {where} (all, 32 px, interpolation: none)'
        return dict(step=i, fid=float(i), samples=10, evaluator=by, reference=against)
    records = [record(0, 'pics'), record(1, '/home (2)/pics')]
    assert best_record(records)['step'] == 0
    records[1]['digest'] = 'new'
    assert best_record(records)['step'] == 0
    records[0]['digest'] = 'old'
    assert best_record(records)['step'] == 1


def test_statistics_of_other_pictures(here):
    "Neither under the same name, nor in a file without a digest; those of the same ones from anywhere"
    evaluator = train_evaluator(folder('pics', 32), 2)
    ours = reference(folder('pics', 32), evaluator, file='r.safetensors')
    assert ImageFiles('pics', 32).digest == folder(here/'pics', 32).digest == ours.digest
    assert ImageFiles('others', 32).digest != ours.digest
    again = reference(ImageFiles(here/'pics', 32), evaluator, file='r.safetensors')
    assert torch.equal(again.mu, ours.mu)
    with safe_open('r.safetensors', 'pt') as f: facts = f.metadata() | dict(data='elsewhere')
    del facts['digest']
    save_file(load_file('r.safetensors'), 'old', facts)
    assert reference(folder('pics', 32), evaluator, file='old').digest == ours.digest
    (here/'pics').rename(here/'kept')
    (here/'others').rename(here/'pics')
    for file in ('r.safetensors', 'old'):
        with pytest.raises(ValueError, match='its digest of the images is'):
            reference(folder('pics', 32), evaluator, file=file)
    with pytest.raises(ValueError, match='trained on different data'): resume('run', steps=4, data='pics')


def test_an_evaluator_of_other_pictures(here):
    shutil.copy('run/evaluator.pt', 'kept.pt')
    train('others', 'new')
    shutil.copy('kept.pt', 'new/evaluator.pt')
    before = snapshot(here)
    with pytest.raises(ValueError, match='evaluator.pt was not trained on'):
        resume('new', steps=4, **MEASURED)
    (here/'new/evaluator.pt').write_bytes(b'damaged')
    with pytest.raises(ValueError, match='evaluator.pt is damaged'): resume('new', steps=4, **MEASURED)
    (here/'new/evaluator.pt').write_bytes((here/'kept.pt').read_bytes())
    assert {k: v if k.name != 'evaluator.pt' else v[0] for k, v in snapshot(here).items()} == {
        k: v if k.name != 'evaluator.pt' else v[0] for k, v in before.items()}
    assert [r['step'] for r in read_log('new')] == [1, 2]
