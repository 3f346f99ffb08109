"Runs in Python: what the page of runs does not show; errors are exceptions, and only `tell` is told"
import json, os, pkgutil, re, signal, subprocess, sys, threading, time
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest, sagan, sagan.all, torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from machines import posix
from sagan.checkpoints import best_record, read_config, states
from sagan.config import few_images, presets
from sagan.data import digits, to_unit
from sagan.diagnostics import NonFinite
from sagan.names import quote_path
from sagan.recording import Interrupted
from sagan.reports import explorer_page
from sagan.runs import (
    _pace, _resumed_config, attend_run, class_numbers, evaluate_run, explore_run, import_run, load_run,
    OPTIONS, report_run, resume_run, shipped, train_run)
from sagan.sampling import sample_run
from sagan.sampling import sample_picture
from sagan.storage import read_json
from sagan.visualization import grid_image

TINY = dict(steps=20, batch=16, g_width=2, d_width=4, device='cpu')
pytestmark = pytest.mark.filterwarnings(r'ignore:\d+ images are too few', 'ignore:.*the intra-FID comes out')

def silent(text): pass


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished tiny run on digits"
    return train_run(out=tmp_path_factory.mktemp('runs')/'run', tell=silent, **TINY)


def test_only_tell_is_told(tmp_path, capsys):
    "A line to begin, a warning, a line for each checkpoint, one in the end; and nothing is printed"
    lines = []
    run = train_run('twins', tmp_path/'my run', 'tiny', steps=4, batch=8, device='cpu', tell=lines.append)
    assert capsys.readouterr().out == '' and len(lines) == 7
    assert lines[0].startswith(
        '4,000 images of twins, 4 classes; 4 steps of 8, 0.008 passes over the images, on cpu')
    assert lines[1].startswith('step 0: the run sees 32 images, 0.01 of one pass over the 4,000')
    assert [l.split()[:2] for l in lines[2:6]] == [['step', str(i)] for i in range(1, 5)]
    assert lines[6].startswith('4 steps in ') and str(tmp_path/'my run/report.html') in lines[6]
    assert lines[6].endswith(f'sagan-eval {quote_path(run.folder)}')  # to be copied, with the space
    assert (run.step, run.folder, run.cfg.data) == (4, tmp_path/'my run', 'twins')
    assert 'SAGAN(' not in repr(run)  # short enough for a notebook


SMALL = dict(g_width=1, d_width=2, z_dim=8, g_attention=(), d_attention=(), batch=4, device='cpu')


@pytest.fixture
def pictures(tmp_path):
    "Two classes of four pictures"
    for i in range(8):
        file = tmp_path/'pictures'/'ab'[i % 2]/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 32), (40*i, 0, 90)).save(file)
    return tmp_path/'pictures'


def test_a_folder_gets_the_preset_of_photographs(pictures, tmp_path):
    "Few images are augmented; named fields stay; a run that goes on keeps what it began with"
    lines = []
    run = train_run(pictures, tmp_path/'run', steps=2, tell=lines.append, **SMALL)
    assert run.cfg == presets['photos'].change(
        data=str(pictures), n_classes=2, steps=2, **few_images,
        **{k: v for k, v in SMALL.items() if k != 'device'})
    assert lines[0].endswith('; for these images diffaug=translation,cutout')
    assert '2 steps of 4, 1 pass over the images, on cpu' in lines[0]
    more = resume_run(run, preset='photos', steps=3, device='cpu', tell=silent, **{k: SMALL[k] for k in (
        'g_width', 'd_width', 'z_dim', 'g_attention', 'd_attention', 'batch')})
    assert more.cfg == run.cfg.change(steps=3)
    with pytest.raises(ValueError, match='ema is 0.5 in'):
        _resumed_config('run', presets['photos'].change(ema=.5), 'photos', {})
    two = SMALL | dict(batch=2)
    flat = train_run(pictures/'a', tmp_path/'flat', steps=2, tell=silent, diffaug='', **two)
    assert (flat.cfg.n_d, flat.cfg.diffaug, flat.cfg.n_classes) == (1, '', 0)
    unnamed = {k: v for k, v in SMALL.items() if k != 'batch'}
    few = train_run(pictures, tmp_path/'few', steps=1, tell=(told := []).append, **unnamed)
    assert few.cfg.batch == 8 and '; 1 step of 8, 1 pass over' in told[0]
    assert told[-1].startswith('1 step in ')
    assert train_run(pictures, tmp_path/'small', 'small', steps=1, tell=silent, **SMALL).cfg.diffaug == ''


def test_minutes(pictures, tmp_path):
    "The steps fill the time; the first line says how long it takes"
    lines = []
    with patch('sagan.runs.seconds_per_step', return_value=20.) as measured:
        run = train_run(pictures, tmp_path/'run', minutes=1.1, tell=lines.append, **SMALL)
        assert run.step == run.cfg.steps == 3 and '1.5 passes over the images (about 60 s), on' in lines[0]
        assert train_run(pictures, tmp_path/'short', minutes=.001, n_d=2, tell=silent, **SMALL).step == 2
        for many in (1e12, 1e308):
            with pytest.raises(ValueError, match='minutes must be at most 715,827,883, as a step takes 20 s'):
                train_run(pictures, tmp_path/'no', minutes=many, tell=silent, **SMALL)
        measured.side_effect = NonFinite('broken', {})
        with pytest.raises(NonFinite): train_run(pictures, tmp_path/'no', minutes=1, tell=silent, **SMALL)
    for bad in (0, -1, float('nan'), float('inf'), True, '5'):
        with pytest.raises(ValueError, match='minutes must be a finite number, at least 0.001'):
            train_run(pictures, tmp_path/'no', minutes=bad, **SMALL)
    with pytest.raises(ValueError, match='minutes=5 and steps=2 both say how long to train'):
        train_run(pictures, tmp_path/'no', minutes=5, steps=2, **SMALL)
    assert not (tmp_path/'no').exists()


def test_expected_time_of_a_run_that_is_long_enough():
    "A short run starts without a trial; one that breaks in the trial starts, and says so itself"
    images, cfg = digits(), presets['tiny'].change(**{k: v for k, v in SMALL.items() if k != 'device'})
    assert _pace(images, cfg.change(steps=100), 'cpu') is None
    assert _pace(images, cfg.change(steps=101, compile=True), 'cpu') is None
    assert 0 < _pace(images, cfg.change(steps=101), 'cpu') < 60
    assert 0 < _pace(images, cfg, 'cpu', minutes=1) < 60
    with patch('sagan.runs.seconds_per_step', side_effect=NonFinite('broken', {})):
        assert _pace(images, cfg.change(steps=101), 'cpu') is None


def test_files_and_records(run):
    "What the default options leave"
    files = {'attention.png', 'config.json', 'log.jsonl', 'report.html', 'weights.safetensors'}
    assert files <= {f.name for f in run.folder.iterdir()}
    # a record every 10 steps, and at every checkpoint
    assert [r['step'] for r in run.records] == list(range(2, 21, 2))
    named = {'d_loss', 'g_loss', 'gamma G16', 'gamma D16', 'lr_g', 'lr_d', 'seconds', 'images_per_s'}
    assert named <= run.records[0].keys() and any(k.startswith('sigma G') for k in run.records[0])
    assert read_config(run.folder)[2] == OPTIONS
    report = (run.folder/'report.html').read_text(encoding='utf-8')
    assert report.count('data:image/png') >= 5 and '://' not in report


def test_a_loaded_run_and_its_folder_are_the_same(run, tmp_path):
    for n, given in enumerate((run, run.folder, str(run.folder))):
        sample_run(given, n=2, classes=[3, '7'], out=tmp_path/f'{n}.png')
    assert len({(tmp_path/f'{n}.png').read_bytes() for n in range(3)}) == 1
    named, plain = Image.open(tmp_path/'0.png'), sample_picture(run.model.ema, [3, 7], n=2)
    assert plain.size == (2*34 + 2, 2*34 + 2) and named.height == plain.height
    images = named.crop((named.width - plain.width, 0, *named.size))  # behind the names of the classes
    assert images.convert('RGB').tobytes() == plain.convert('RGB').tobytes()
    assert sample_run(run, classes=[3, '7']).name == 'samples-seed0-classes3,7.png'
    for zero in (0, '0'): assert sample_run(run, classes=zero).name == 'samples-seed0-classes0.png'
    file = attend_run(run, label=0, n=1, points=[(8, 8), (20, 16)])
    assert file.name == 'attention-seed0-label0-n1-points8,8;20,16.png'


def test_scores_are_returned_and_kept(run):
    scores = evaluate_run(run, n=60, device='cpu')
    kept = json.loads((run.folder/'eval-n60.json').read_text(encoding='utf-8'))
    assert kept == {k: v for k, v in scores.items() if k != 'nearest'}
    assert scores['nearest'] == run.folder/'nearest-n60.png'
    assert kept['intra_fid'] > 0 and (kept['samples'], kept['step']) == (60, 20)
    assert kept['reference'] == '1797 images of digits (all, 32 px, interpolation: bicubic)'
    assert Image.open(scores['nearest']).size[0] > 500


def test_class_numbers():
    with pytest.raises(ValueError, match='no class 12; the classes are 0, 1'):
        class_numbers([str(i) for i in range(10)], ['12'])
    with pytest.raises(ValueError, match='no class 3'): class_numbers(['3', '4'], [3])  # a number, not a name
    with pytest.raises(ValueError, match='unconditional'): class_numbers([], ['3'])
    ten = [str(i) for i in range(10)]
    assert [class_numbers(ten, one) for one in (3, '3', [3], ('3',))] == 4*[[3]]
    for wrong in ('12', 3.5, [None]):
        with pytest.raises(ValueError, match='there is no class'): class_numbers(ten, wrong)
    with pytest.raises(ValueError, match='is empty; leave it out'): class_numbers(ten, [])


def test_report_again(tmp_path):
    "The same page as the training made"
    run = train_run(out=tmp_path/'run', tell=silent, **TINY | dict(steps=3))
    page = (run.folder/'report.html').read_bytes()
    for f in ('report.html', 'attention.png'): (run.folder/f).unlink()
    assert report_run(run.folder, device='cpu').read_bytes() == page and (run.folder/'attention.png').exists()
    assert report_run(run).read_bytes() == page


def test_a_run_that_comes_with_the_package(tmp_path, monkeypatch):
    "Its name is enough, a folder of that name goes before it, and nothing is written into the package"
    monkeypatch.chdir(tmp_path)
    before = sorted(shipped('digits').rglob('*'))
    sample_run('twins', n=1, classes='disc')
    sample_run(load_run('digits'), n=1)
    attend_run('digits', n=1)
    assert evaluate_run(shipped('digits'), n=60, device='cpu')['nearest'] == Path('digits-nearest-n60.png')
    assert report_run('digits', device='cpu') == Path('digits-report.html')
    assert {f.name for f in tmp_path.iterdir()} == {
        'twins-samples-seed0-n1-classesdisc.png', 'digits-samples-seed0-n1.png', 'digits-eval-n60.json',
        'digits-attention-seed0-n1.png', 'digits-nearest-n60.png', 'digits-report.html',
        'digits-attention.png'}
    with pytest.raises(ValueError, match='comes with the package'): resume_run(load_run('digits'), steps=2000)
    assert sorted(shipped('digits').rglob('*')) == before
    (tmp_path/'digits').mkdir()
    with pytest.raises(FileNotFoundError, match='digits is not a run folder'): load_run('digits')
    for call in (load_run, sample_run, attend_run, evaluate_run, resume_run, report_run):
        with pytest.raises(FileNotFoundError, match='cats is not a run folder'): call('cats')


def test_too_short_for_a_generator_step(tmp_path):
    run = train_run(out=tmp_path/'short', n_d=5, tell=silent, **TINY | dict(steps=3))
    assert [r['g_loss'] for r in run.records] == 3*[None]
    page = (tmp_path/'short/report.html').read_text(encoding='utf-8')
    words = re.sub(r'<(script|style|svg|iframe).*?</\1>|<[^>]+>', ' ', page, flags=re.DOTALL)
    assert 'Steps' in words and not re.search(r'\b(None|nan|null)\b', words)  # a loss that is not there


def test_measured_as_it_goes(tmp_path):
    "The best state is kept and in the report; what the run was asked for is remembered, and may change"
    short = TINY | dict(steps=8)
    run = train_run(out=tmp_path/'run', measure_every=2, samples=50, n_classes=0, tell=silent, **short)
    assert best_record(run.records)['step'] in {2, 4, 6, 8}
    run = resume_run(run, steps=13, samples=60, device='cpu', tell=silent)
    assert [r['samples'] for r in run.records if 'fid' in r] == [50, 50, 50, 50, 60, 60, 60]  # the end, too
    assert read_config(tmp_path/'run')[2] == OPTIONS | dict(measure_every=2, samples=60)
    page = (tmp_path/'run/report.html').read_text(encoding='utf-8')
    assert 'FID, lower is better' in page and f"{best_record(run.records)['fid']:.2f}" in page
    best = best_record(run.records)['step']
    assert {best, 12, 13} == {int(f.stem[5:]) for f in states(tmp_path/'run')}
    assert load_run(tmp_path/'run', best=True).step == best


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder of 20 pictures without classes"
    folder = tmp_path_factory.mktemp('photos')
    for i in range(20): grid_image(to_unit(digits().x[i:i+4]), 2).save(folder/f'{i}.png')
    return folder


def test_a_folder_without_classes_at_64_pixels(photos, tmp_path):
    more = dict(size=64, g_attention=(8, 16), d_attention=(), form='released', flip=True)
    r = train_run(photos, tmp_path/'run', tell=silent, **TINY | dict(steps=4), **more)
    assert (r.cfg.size, r.cfg.n_classes, r.cfg.g_attention, r.cfg.d_attention) == (64, 0, (8, 16), ())
    assert (r.cfg.flip, r.cfg.data) == (True, str(photos.resolve()))
    assert Image.open(sample_run(r, n=5)).size[1] == 66 + 2 and attend_run(r, layer=8).exists()
    assert evaluate_run(r, n=20, device='cpu')['accuracy'] is None


def test_inception_keeps_its_statistics(photos, tmp_path):
    "With random weights, as true ones cannot be fetched by a test"
    fetch = 'torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url'
    with patch.object(FeatureExtractorInceptionV3, 'load_state_dict'), patch(fetch):
        torch.save(FeatureExtractorInceptionV3('random', ['2048']).state_dict(), tmp_path/'random.pth')
    run = train_run(photos, tmp_path/'run', tell=silent, **TINY | dict(batch=8, steps=2))
    scores = evaluate_run(run, n=10, weights=tmp_path/'random.pth', device='cpu')
    assert (run.folder/'reference-inception.safetensors').exists()
    assert 'Inception-v3 of torch-fidelity' in scores['evaluator']
    assert (run.folder/'eval-inception-n10-weightsrandom.json').exists()


def test_standing_statistics(run):
    "They are measured on a copy: the run that was given stays as it is"
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    scores = evaluate_run(run, n=50, seed=1, standing=64, device='cpu')
    assert scores['batch_norm'] == 'standing statistics of 64 images'
    assert (run.folder/'eval-n50-seed1-standing64.json').exists()
    assert all(v.equal(before[k]) for k, v in run.model.state_dict().items())


def test_exploring(run, tmp_path):
    "A page of drawn images, one of one's own, and a program that opens a notebook"
    with patch('sagan.live.MOST_NUMBERS', 0):                       # too large a model to draw in a page
        stored = explore_run(run, out=tmp_path/'page.html').read_text(encoding='utf-8')
    assert stored.count('"class"') == 20 and 'million numbers' in stored
    (tmp_path/'own/7').mkdir(parents=True)
    Image.new('RGB', (50, 40), 'red').save(tmp_path/'own/7/a.png')
    page = explore_run(run.folder, images=tmp_path/'own', out=tmp_path/'own.html').read_text(encoding='utf-8')
    assert '"images": [{"class": "7", "seed": "0"}]' in page
    with pytest.raises(ValueError, match='subfolder 7, which is no class of the model; it has square, disc'):
        explore_run('twins', images=tmp_path/'own')
    opened = []
    def serve(module, file, port, browser):
        opened.append(read_json(file)['cells'][1]['source'])
        return 0
    with patch('sagan.reports._serve', serve): assert explore_run('digits', tell=silent) is None
    assert str(shipped('digits').resolve()) in opened[0]
    failed = patch('sagan.reports._serve', lambda *args: 3)
    with failed, pytest.raises(OSError, match='ended with status 3'): explore_run('digits', tell=silent)
    page = explorer_page(load_run(shipped('twins')))
    assert page.weights and len(page.header['images']) == 1


def test_errors_are_exceptions_and_leave_nothing(run, tmp_path):
    new = tmp_path/'new'
    for error, message, call in [
        (ValueError, 'Config has no field .ema_begin.; did you', lambda: train_run(out=new, ema_begin=5)),
        (ValueError, 'no preset .bigan.; did you mean biggan', lambda: train_run(out=new, preset='bigan')),
        (ValueError, 'names no data', lambda: train_run(out=new, preset='cifar')),
        (ValueError, 'n_classes must be 10', lambda: train_run(out=new, n_classes=7)),
        (ValueError, 'keep must be a whole number, at least 1', lambda: train_run(out=new, keep=0)),
        (ValueError, 'the device .warp.', lambda: train_run(out=new, device='warp')),
        (FileNotFoundError, 'no folder', lambda: train_run(tmp_path/'nowhere', new)),
        (FileExistsError, 'already holds a run', lambda: train_run(out=run.folder, **TINY)),
        (FileNotFoundError, 'is not a run folder', lambda: resume_run(tmp_path/'nowhere')),
        (ValueError, 'is finished', lambda: resume_run(run.folder, device='cpu', tell=silent)),
        (ValueError, 'batch is 16 in .*, but 8 was', lambda: resume_run(run.folder, steps=40, batch=8)),
        (ValueError, 'n must be a whole number, at least 1', lambda: sample_run(run, n=0)),
        (ValueError, 'standing must be a whole number, at least 0', lambda: evaluate_run(run, standing=-1)),
        (ValueError, "n must be a whole number, at least .*, got '2'", lambda: sample_run(run, n='2')),
        (ValueError, "keep must be a whole number, at least .*, got '3'",
         lambda: train_run(out=new, keep='3')),
        (ValueError, 'samples must be a whole number.*, got 1000.0', lambda: train_run(out=new, samples=1e3)),
        (ValueError, r"points must be pairs \(row, column\) .*'8,8'", lambda: attend_run(run, points='8,8')),
        (ValueError, r'points must be pairs', lambda: attend_run(run, points=(8, 8))),
        (ValueError, 'the run has classes 0, 1.*, but twins has', lambda: report_run(run, data='twins')),
        (ValueError, 'has classes 0, 1.*, but twins', lambda: resume_run(run, steps=40, data='twins')),
        (ValueError, 'no attention at 8x8', lambda: attend_run(run, layer=8)),
        (FileNotFoundError, 'no file', lambda: import_run(tmp_path/'G.pth', out=new)),
    ]:
        with pytest.raises(error, match=message): call()
    assert not list(tmp_path.iterdir())
    imported = tmp_path/'imported'
    imported.mkdir()
    for f in ('config.json', 'weights.safetensors'): (imported/f).write_bytes((run.folder/f).read_bytes())
    with pytest.raises(ValueError, match='has no log to report on, because it was stopped before the first'):
        report_run(imported)


def test_a_diverged_training(tmp_path):
    "Raises, and keeps the checkpoint from before"
    with pytest.raises(NonFinite, match='details in .*nan-report.json'):
        train_run(out=tmp_path/'run', lr_g=1e30, lr_d=1e30, tell=silent, **TINY)
    assert load_run(tmp_path/'run').step < 20


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
@posix
def test_a_signal_is_an_exception(tmp_path, name, capsys):
    "In the main thread; the run goes on from that step"
    if threading.current_thread() is not threading.main_thread(): pytest.skip('no signal comes here')
    def stop():
        log = tmp_path/'run/log.jsonl'
        while not log.exists() or not log.stat().st_size: time.sleep(.01)
        os.kill(os.getpid(), signal.Signals[name])
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    threading.Thread(target=stop, daemon=True).start()
    long = TINY | dict(steps=100_000)
    with pytest.raises(Interrupted) as e: train_run(out=tmp_path/'run', tell=silent, **long)
    assert e.value.signal == name and e.value.folder == tmp_path/'run' and 0 < e.value.step < 100_000
    assert f'at step {e.value.step:,} of 100,000' in str(e.value)
    assert str(Interrupted(name, 1, 2, Path('my run'))).endswith(f'--resume {quote_path("my run")}')
    assert 'stopping after this step' in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    step = e.value.step
    assert load_run(tmp_path/'run').step == step
    assert resume_run(tmp_path/'run', steps=step + 2, device='cpu', tell=silent).step == step + 2


def test_all_is_complete():
    "Every module but the commands and older names is in `sagan.all`, and no name means two things"
    others = {'all', 'cli', 'deprecated', 'options', '__main__', '_modidx'}
    names = {m.name for m in pkgutil.iter_modules(sagan.__path__)} - others
    objects = {}
    for name in names:
        module = import_module(f'sagan.{name}')
        for n in module.__all__:
            assert objects.setdefault(n, getattr(module, n)) is getattr(module, n), n
    assert set(sagan.all.__all__) == objects.keys()
    assert all(getattr(sagan.all, n) is o for n, o in objects.items())
    assert {'SelfAttention', 'sagan_learner', 'train_run'} <= objects.keys()


def test_nothing_imports_the_command_line():
    code = 'import sys, sagan.all; print(*[m for m in sys.modules if m in ("sagan.cli", "sagan.__main__")])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '' and not done.returncode
    assert 'torch.jit.script' not in done.stderr


def test_options_that_a_run_remembers_are_those_of_train_run():
    from inspect import signature
    known = signature(train_run).parameters
    assert {k: known[k].default for k in OPTIONS} == OPTIONS
    assert not OPTIONS.keys() & {f.name for f in fields(load_run(shipped('digits')).cfg)}
    assert OPTIONS.keys() <= signature(resume_run).parameters.keys()
