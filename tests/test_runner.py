"The runner: one network and seed, a whole experiment here, and the command, killed and started again"
import csv
import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from machines import posix
from forked import command, forked, leave_nothing_running, PROCESSES
from sagan import agreement, measuring, runner
from sagan.cli import sagan_experiment
from sagan.config import presets
from sagan.data import digits, Images, twins
from sagan.references import Classifier, Evaluator, reference, train_evaluator
from sagan.experiments import load_experiment
from sagan.outcomes import format_score, strips_figure, table
from sagan.runner import experiment_run, Plan, run_experiment, train_variant
from sagan.measuring import load_or_train_evaluator, read_settings
from sagan.storage import file_lock, MappedImages

FILES = {'.lock', 'curves.png', 'evaluator.pt', 'experiment.json', 'reference.safetensors', 'report.html',
         'samples.png', 'table.csv', 'table.md'}
TINY = presets['tiny'].change(steps=4, z_dim=8, batch=8, data='twins')

# Few samples make an inexact FID, and a warning that says so
pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module', autouse=True)
def quick_measurements():
    "In this process the small classifier trains for 50 steps, not 500, and 20 images test D, not 1,000"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(measuring, 'train_evaluator', partial(train_evaluator, steps=50))
        m.setattr(agreement, 'agreement_auc', partial(agreement.agreement_auc, n=20))
        yield


# One network, one seed

ONE = presets['tiny'].change(steps=6, z_dim=8, data='digits', batch=16)


@pytest.fixture(scope='module')
def plan():
    images = digits()
    evaluator = train_evaluator(images, 50)
    return Plan(2, 50, evaluator, reference(images[:200], evaluator), images, 'cpu')


def timeless(records):
    return [{k: v for k, v in r.items() if k not in ('seconds', 'images_per_s')} for r in records]


def test_a_stopped_training_goes_on(tmp_path, plan):
    whole = list(train_variant(tmp_path/'whole', ONE, plan))
    part = train_variant(tmp_path/'part', ONE, plan)
    next(part)
    part.close()
    part = list(train_variant(tmp_path/'part', ONE, plan))
    assert timeless(part) == timeless(whole)
    assert [r['step'] for r in part] == [2, 4, 6]
    left = sorted(f.name for f in (tmp_path/'part').iterdir())
    assert left == ['config.json', 'records.json', 'samples', 'weights.safetensors']
    before = (tmp_path/'part'/'records.json').stat().st_mtime_ns
    assert list(train_variant(tmp_path/'part', ONE, plan)) == part
    assert (tmp_path/'part'/'records.json').stat().st_mtime_ns == before


@pytest.mark.parametrize('settings', [
    dict(lr_g=1e30, lr_d=1e30), dict(lr_g=1e6, g_sn=False), dict(lr_g=1e17)])
def test_rates_far_too_high_end_a_training_at_its_first_measurement(tmp_path, plan, settings):
    "Be it in D or G, with or without spectral norm"
    records = list(train_variant(tmp_path/'run', ONE.change(**settings), plan))
    assert [r['diverged'] for r in records] == [True]


# A whole experiment in this process

def experiment(folder, tell=lambda text: None, **kw):
    return run_experiment('table2', twins(200), TINY, folder, seeds=2, every=2, samples=40, tell=tell, **kw)


def untimed(results):
    return [{k: v for k, v in row.items() if k != 'seconds_per_step'} for row in table(results)]


@pytest.fixture(scope='module')
def once(tmp_path_factory):
    "Folder and results of table 2 at the smallest size"
    folder = tmp_path_factory.mktemp('runner')/'once'
    return folder, experiment(folder)


def test_what_an_experiment_leaves(once):
    folder, results = once
    assert {f.name for f in folder.iterdir() if f.is_file()} == FILES
    fig = strips_figure(folder, results, 1)
    assert len(fig.axes) == 3*2  # three networks, two measurements
    fid = results[0][1][1][0]['fid']
    assert fig.axes[0].get_title() == f'AC-GAN: step 2, FID {fid:.1f}'
    page = (folder/'report.html').read_text(encoding='utf-8')
    assert '<h1>Table 2 on twins</h1><p>'.replace('><', '>\n<') in page and 'FID none' not in page
    for row, measured in zip(table(results), ('AC-GAN', 'SNGAN-projection', 'SAGAN')):
        assert f'<th scope="col">{measured}</th>' in page and row['row'] == measured
    scores = ''.join(f'<td>{format_score(r, "fid")}</td>'.replace(' ', '\u00a0') for r in table(results))
    assert f'<th scope="row">FID</th>{scores}' in page and 'FID: distance from real images' in page
    assert page.count('<h2>Samples</h2>') == 1 and 'The paper computed scores with * from' in page


def test_an_interrupted_experiment_goes_on_and_is_not_done_twice(tmp_path, once):
    folder, whole = once
    evaluator, messages = load_or_train_evaluator(folder/'evaluator.pt', twins(200)), []
    def interrupt(text):
        messages.append(text)
        if len(messages) == 4: raise KeyboardInterrupt  # in the middle of the second network
    with pytest.raises(KeyboardInterrupt): experiment(tmp_path/'cut', interrupt, evaluator=evaluator)
    with pytest.raises(FileNotFoundError, match='is not finished: AC-GAN with seed 1 is missing'):
        load_experiment(tmp_path/'cut')
    assert untimed(experiment(tmp_path/'cut', evaluator=evaluator)) == untimed(whole)
    files = [f for kind in ('json', 'safetensors') for f in (tmp_path/'cut').glob(f'*/seed*/*.{kind}')]
    written = {f: f.stat().st_mtime_ns for f in files}
    assert len(written) == 3*2*3
    assert untimed(experiment(tmp_path/'cut', evaluator=evaluator)) == untimed(whole)
    assert {f: f.stat().st_mtime_ns for f in written} == written  # only the table is written again


@pytest.mark.parametrize('experiment, images, changes, options, message', [
    ('table1', twins(200), {}, dict(samples=3), 'samples must be a whole number, at least 10, got 3'),
    ('table1', twins(200), {}, dict(every=0), 'every must be a whole number, at least 1, got 0'),
    ('table1', twins(200), {}, dict(seeds='3'), "seeds must be a whole number, at least 1, got '3'"),
    ('table1', twins(200), {}, dict(seeds=10**9), 'seeds must be at most 1,000'),
    ('table1', twins(200), {}, dict(jobs=10**9), 'jobs must be at most 1,000'),
    ('table1', twins(200), {}, dict(samples=10**12), 'measuring 1,000,000,000,000 samples needs'),
    ('table1', twins(200), {}, dict(device='meta'), "device 'meta' is not available"),
    ('table1', twins(200), dict(g_width=4096), {}, 'memory'),
    ('table1', twins(200).x, {}, {}, 'images must be of type'),
    ('table1', twins(1), dict(batch=2), {}, 'training needs at least 2 images, got 1'),
    ('table1', twins(20), dict(batch=64), {}, 'batch must be from 2 to 20, .* --batch'),
    ('table2', Images(twins(200).x, twins(200).y, [], 'unlabelled'), {}, {},
     'table2 includes AC-GAN, which needs images of at least 2 classes')])
def test_settings_that_cannot_work(tmp_path, experiment, images, changes, options, message):
    with pytest.raises((ValueError, MemoryError), match=message):
        run_experiment(experiment, images, TINY.change(**changes), tmp_path/'new', **options)
    assert not (tmp_path/'new').exists()


def test_folders_of_something_else(tmp_path, once):
    folder, _ = once
    evaluator = load_or_train_evaluator(folder/'evaluator.pt', twins(200))
    with pytest.raises(ValueError, match='holds another experiment: z_dim is 8 there, 16 here'):
        run_experiment('table2', twins(200), TINY.change(z_dim=16), folder, 2, 2, 40, evaluator)
    with pytest.raises(ValueError, match='holds other files'):
        run_experiment('table1', twins(200), TINY, folder.parent)
    with file_lock(folder), pytest.raises(BlockingIOError, match='in use by another process'):
        experiment(folder)
    with pytest.raises(FileNotFoundError, match='not hold an experiment'): load_experiment(tmp_path/'nowhere')
    shutil.copytree(folder, tmp_path/'damaged')
    (tmp_path/'damaged'/'table2-sagan'/'seed0'/'records.json').write_text('[{"st', encoding='utf-8')
    with pytest.raises(ValueError, match='records.json is damaged'): load_experiment(tmp_path/'damaged')


def every_file(folder):
    return {f: f.read_bytes() for f in folder.rglob('*') if f.is_file() and f.name != '.lock'}


def test_data_are_told_by_what_is_in_them(tmp_path, once):
    "Not by their path or name; and a refusal changes nothing"
    folder, whole = once
    before = every_file(folder)
    with pytest.raises(ValueError, match='another experiment: the digest of the images is'):
        run_experiment('table2', twins(200, seed=1), TINY, folder, 2, 2, 40)
    with pytest.raises(ValueError, match="another experiment: evaluator is 'small CNN"):
        run_experiment('table2', twins(200), TINY, folder, 3, 2, 40, Evaluator(Classifier(4), 'another'))
    assert every_file(folder) == before
    moved = dataclasses.replace(twins(200), name='../moved')
    again = run_experiment('table2', moved, TINY.change(data='../moved'), folder, 2, 2, 40, tell=str)
    assert untimed(again) == untimed(whole)
    assert read_settings(folder)['base']['data'] == '../moved'
    # a folder of an earlier version has no digest, and knows the path alone
    old = tmp_path/'old'
    shutil.copytree(folder, old)
    settings = {k: v for k, v in read_settings(folder).items() if k != 'digest'}
    (old/'experiment.json').write_text(json.dumps(settings), encoding='utf-8')
    with pytest.raises(ValueError, match="data is '../moved' there, 'twins' here"):
        run_experiment('table2', twins(200), TINY, old, 2, 2, 40)


def test_a_kill_while_an_experiment_is_set_up(tmp_path, once):
    "At any moment: the settings come first, and the same call goes on; an evaluator alone is of other data"
    folder, _ = once
    first, second = 'experiment.json', 'evaluator.pt'
    for i, left in enumerate([(first,), (first, second), (second,)]):
        out = tmp_path/str(i)
        out.mkdir()
        for name in left: shutil.copy(folder/name, out)
        if left == (first,):
            settings = read_settings(folder) | dict(evaluator=None)
            (out/'experiment.json').write_text(json.dumps(settings), encoding='utf-8')
        def stop(text): raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): experiment(out, stop)
        settings, there = read_settings(out), read_settings(folder)
        for k in ('experiment', 'evaluator', 'digest', 'samples'): assert settings[k] == there[k]
        assert {f.name for f in out.iterdir()} == {'.lock', first, second, 'reference.safetensors'}


DEEP = '['*100_000

OTHERS = {
    'experiment.json': ['[]', '{}', DEEP, None, dict(seeds=-1), dict(seeds=True), dict(base=3),
                        dict(evaluator=5), dict(base=dict(g_width='wide'))],
    'records.json': ['[]', '{"a": 1}', DEEP, None, '[null]', [dict(fid='low')], [dict(step=1.5)],
                     [dict(diverged=0)], [dict(seconds='x')]],
    'evaluator.pt': [{}, dict(net={}, name=5, held_out='x'), None],
    'reference.safetensors': ['{}', None],
    'samples.png': [None]}

@pytest.mark.parametrize('name, content', [(name, c) for name, others in OTHERS.items() for c in others])
@posix
def test_files_that_hold_something_else(tmp_path, once, name, content):
    "A sentence that names the file; None is a pipe, which would hang"
    folder, _ = once
    bad = tmp_path/'bad'
    shutil.copytree(folder, bad)
    file = bad/'table2-sagan/seed0/records.json' if name == 'records.json' else bad/name
    text = file.read_bytes()
    file.unlink()
    if content is None: os.mkfifo(file)
    elif name == 'evaluator.pt': torch.save(content, file)
    elif isinstance(content, str): file.write_text(content, encoding='utf-8')
    elif isinstance(content, dict): file.write_text(json.dumps(json.loads(text) | content), encoding='utf-8')
    else: file.write_text(json.dumps([json.loads(text)[0] | content[0]]), encoding='utf-8')
    names = {f for f in bad.rglob('*')}
    with pytest.raises((ValueError, OSError), match=name): experiment(bad)
    assert {f for f in bad.rglob('*')} == names
    if name in ('records.json', 'experiment.json'):
        with pytest.raises(ValueError, match=name): load_experiment(bad)


@posix
def test_pictures_of_samples_that_are_none(tmp_path, once):
    folder, results = once
    shutil.copytree(folder, tmp_path/'bad')
    samples = tmp_path/'bad/table2-acgan/seed1/samples'
    (samples/'step-junk.png').write_text('no step', encoding='utf-8')
    (samples/'step-0000002.png').unlink()
    os.mkfifo(samples/'step-0000002.png')
    assert len([ax for ax in strips_figure(tmp_path/'bad', results, 1).axes if ax.get_title()]) == 5
    (samples/'step-0000004.png').write_text('no picture', encoding='utf-8')
    with pytest.raises(ValueError, match='step-0000004.png is damaged'):
        strips_figure(tmp_path/'bad', results, 1)


def test_a_state_that_a_kill_left_behind_is_removed(tmp_path, plan):
    part = train_variant(tmp_path, ONE, plan)
    next(part)
    part.close()
    state = (tmp_path/'state.pt').read_bytes()
    whole = list(train_variant(tmp_path, ONE, plan))
    (tmp_path/'state.pt').write_bytes(state)
    assert list(train_variant(tmp_path, ONE, plan)) == whole and not (tmp_path/'state.pt').exists()


def test_images_in_a_file_reach_the_workers(tmp_path, monkeypatch):
    "By the name of their file"
    monkeypatch.setattr(runner, 'get_context', lambda how: PROCESSES)  # they need not import PyTorch
    images = dataclasses.replace(twins(40), name='drawn')
    (tmp_path/'images').write_bytes(images.x.numpy().tobytes())
    mapped = dataclasses.replace(images, x=MappedImages(tmp_path/'images', 32))
    assert len(pickle.dumps(mapped)) < 3000 and mapped.digest == images.digest
    evaluator = Evaluator(Classifier(4), 'random')
    results = run_experiment('local', mapped, TINY, tmp_path/'out', 1, 4, 20, evaluator, 2, tell=str)
    assert [s[0][-1]['step'] for _, s in results] == [4, 4, 4]
    assert not list((tmp_path/'out').glob('.plan*'))


def test_an_experiment_by_name(tmp_path, capsys):
    "What `sagan-experiment` does, in Python: returns the folder, and only `tell` is told"
    lines = []
    folder = experiment_run('figure3', 'digits', tmp_path/'out', 'tiny', 1, 2, 40, device='cpu', steps=2,
                            batch=8, z_dim=8, tell=lines.append)
    assert folder == tmp_path/'out' and {f.name for f in folder.iterdir() if f.is_file()} == FILES
    assert capsys.readouterr().out == ''
    assert lines[0].endswith('images of digits (all, 32 px, interpolation: bicubic)')
    with pytest.raises(ValueError, match='holds another experiment: batch is 8 there, 4 here'):
        experiment_run('figure3', 'digits', folder, 'tiny', 1, 2, 40, device='cpu', steps=2, batch=4, z_dim=8)


@pytest.mark.parametrize('message, experiment, options', [
    ("there is no experiment 'table3'", 'table3', {}),
    ('the rows of an experiment set the places of attention', 'table1', dict(g_attention=(16,))),
    ("evaluator must be 'small' or 'inception', got 'vgg'", 'table1', dict(evaluator='vgg')),
    ('tell must be a function of a line of text, got None', 'table1', dict(tell=None)),
    ('there are no Inception weights at', 'table1', dict(weights='nowhere.pt'))])
def test_an_experiment_that_cannot_be(tmp_path, message, experiment, options):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        experiment_run(experiment, out=tmp_path/'new', preset='tiny', **options)
    assert not list(tmp_path.iterdir())


# The command as a process

ASKED = dict(data='digits', preset='tiny', steps=4, batch=8, seeds=1, every=4, samples=100)


def start(out, name='sagan_experiment', module='sagan.cli', **more):
    "sagan-experiment as a process, whose output goes to a file beside its folder"
    options = ASKED | dict(device='cpu', out=str(out)) | more
    return forked(out.with_suffix('.log'), name, 'table1', module=module, **options)


def with_forks(experiment, **options):
    "sagan-experiment whose workers are forks, which need not import PyTorch"
    runner.get_context = lambda how: get_context('fork')
    sagan_experiment(experiment, **options)


def wait_until(p, condition):
    for _ in range(6000):
        if condition(): return
        assert p.is_alive(), p.output.read_text(encoding='utf-8')
        time.sleep(.05)
    raise AssertionError('it did not happen')


def rows(out):
    assert {p.name for p in out.iterdir() if p.is_file()} == FILES
    with (out/'table.csv').open(encoding='utf-8') as f:
        return [{k: v for k, v in r.items() if k != 'seconds_per_step'} for r in csv.DictReader(f)]


def finished(out, **more):
    p = start(out, **more)
    p.join(500)
    assert p.exitcode == 0, p.output.read_text(encoding='utf-8')
    return rows(out)


def failed(p):
    p.join(60)
    output = p.output.read_text(encoding='utf-8')
    assert p.exitcode == 1 and 'Traceback' not in output, output
    return output


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The installed command, in one go"
    out = tmp_path_factory.mktemp('experiment')/'whole'
    options = ASKED | dict(device='cpu', out=out)
    args = [a for k, v in options.items() for a in (f'--{k}', v)]
    done = command('sagan-experiment', 'table1', *args, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


def begun(out, whole, **changes):
    "The folder of an experiment stopped before its first step: the evaluator is there, nothing is trained"
    out.mkdir()
    for f in ('evaluator.pt', 'reference.safetensors'): shutil.copy(whole/f, out)
    settings = json.loads((whole/'experiment.json').read_text(encoding='utf-8'))
    settings['base'] |= {k: v for k, v in changes.items() if k in settings['base']}
    settings |= {k: v for k, v in changes.items() if k in settings}
    (out/'experiment.json').write_text(json.dumps(settings), encoding='utf-8')
    return out


def test_the_command_leaves_a_table(whole):
    "`tests/test_kills.py` kills it, and starts it again"
    table = rows(whole)
    assert [r['row'] for r in table] == ['no attention', 'SAGAN feat8, feat16, feat32', 'SAGAN feat64',
                                         'Residual feat8, feat16, feat32', 'Residual feat64']
    assert all(float(r['fid']) > 0 and r['samples'] == '100' for r in table)
    assert all('small CNN' in r['evaluator'] and 'digits' in r['reference'] for r in table)
    text = (whole/'table.md').read_text(encoding='utf-8')
    assert "paper's FID" in text and 'SAGAN feat8, feat16, feat32 at 8x8' in text and 'small CNN' in text


def test_two_at_once_give_the_table_of_one_by_one(tmp_path, whole):
    assert finished(begun(tmp_path/'two', whole), jobs=2) == rows(whole)


LONG = dict(steps=100_000, every=50_000)


@posix
def test_two_at_once_stop_together(tmp_path, whole):
    out = begun(tmp_path/'jobs', whole, **LONG)
    p = start(out, 'with_forks', 'test_runner', jobs=2, **LONG)
    wait_until(p, (out/'table1-none/seed0').exists)
    os.kill(p.pid, signal.SIGINT)
    assert 'interrupted' in failed(p)


@posix
def test_a_killed_worker_ends_the_command_with_a_message(tmp_path, whole):
    out = begun(tmp_path/'jobs', whole, **LONG)
    p = start(out, 'with_forks', 'test_runner', jobs=2, **LONG)
    wait_until(p, (out/'table1-none/seed0').exists)
    workers = subprocess.run(['pgrep', '-P', str(p.pid)], capture_output=True, text=True).stdout.split()
    for worker in workers: os.kill(int(worker), signal.SIGKILL)
    assert 'was killed' in failed(p)
