"The runner: one network and seed, a whole experiment here, and the command, killed and started again"
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import forked, leave_nothing_running
from sagan.config import presets
from sagan.data import digits, Images, twins
from sagan.references import reference, train_evaluator
from sagan.experiments import load_experiment, strips_figure, table
from sagan.runner import experiment_run, Plan, run_experiment, train_variant
from sagan.measuring import load_or_train_evaluator
from sagan.storage import file_lock

FILES = {'.lock', 'curves.png', 'evaluator.pt', 'experiment.json', 'reference.safetensors', 'report.html',
         'samples.png', 'table.csv', 'table.md'}
TINY = presets['tiny'].change(steps=4, z_dim=8, batch=8, data='twins')

# Few samples make an inexact FID, and a warning that says so
pytestmark = pytest.mark.filterwarnings('ignore')


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
    ('table1', twins(200), {}, dict(samples=3), 'samples must be at least 10, got 3'),
    ('table1', twins(200), {}, dict(every=0), 'every must be at least 1, got 0'),
    ('table1', twins(200), {}, dict(seeds='3'), "seeds must be a whole number, got '3'"),
    ('table1', twins(20), dict(batch=64), {}, 'batch size must be from 1 to 20'),
    ('table2', Images(twins(200).x, twins(200).y, [], 'unlabelled'), {}, {},
     'table2 includes AC-GAN, which needs images of at least 2 classes')])
def test_settings_that_cannot_work(tmp_path, experiment, images, changes, options, message):
    with pytest.raises(ValueError, match=message):
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
    with pytest.raises(FileNotFoundError, match='holds no experiment'): load_experiment(tmp_path/'nowhere')
    shutil.copytree(folder, tmp_path/'damaged')
    (tmp_path/'damaged'/'table2-sagan'/'seed0'/'records.json').write_text('[{"st')
    with pytest.raises(ValueError, match='records.json is damaged'): load_experiment(tmp_path/'damaged')


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
    ('where attention is placed is what the rows', 'table1', dict(g_attention=(16,))),
    ("evaluator is 'small' or 'inception', got 'vgg'", 'table1', dict(evaluator='vgg')),
    ('tell is called with each line of text, got None', 'table1', dict(tell=None)),
    ('there are no Inception weights at', 'table1', dict(weights='nowhere.pt'))])
def test_an_experiment_that_cannot_be(tmp_path, message, experiment, options):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        experiment_run(experiment, out=tmp_path/'new', preset='tiny', **options)
    assert not list(tmp_path.iterdir())


# The command as a process

ASKED = dict(data='twins', preset='tiny', steps=8, batch=8, seeds=1, every=4, samples=100)


def start(out, **more):
    "sagan-experiment as a process, whose output goes to a file beside its folder"
    options = ASKED | dict(device='cpu', out=str(out)) | more
    return forked(out.with_suffix('.log'), 'sagan_experiment', 'table1', **options)


def wait_until(p, condition):
    for _ in range(6000):
        if condition(): return
        assert p.is_alive(), p.output.read_text()
        time.sleep(.05)
    raise AssertionError('it did not happen')


def rows(out):
    assert {p.name for p in out.iterdir() if p.is_file()} == FILES
    with (out/'table.csv').open() as f:
        return [{k: v for k, v in r.items() if k != 'seconds_per_step'} for r in csv.DictReader(f)]


def finished(out, **more):
    p = start(out, **more)
    p.join(500)
    assert p.exitcode == 0, p.output.read_text()
    return rows(out)


def failed(p):
    p.join(60)
    output = p.output.read_text()
    assert p.exitcode == 1 and 'Traceback' not in output, output
    return output


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The command in a shell, in one go"
    out = tmp_path_factory.mktemp('experiment')/'whole'
    options = ASKED | dict(device='cpu', out=out)
    args = [a for k, v in options.items() for a in (f'--{k}', str(v))]
    command = [Path(sys.executable).parent/'sagan-experiment', 'table1', *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return out


def begun(out, whole, **changes):
    "The folder of an experiment stopped before its first step: the evaluator is there, nothing is trained"
    out.mkdir()
    for f in ('evaluator.pt', 'reference.safetensors'): shutil.copy(whole/f, out)
    settings = json.loads((whole/'experiment.json').read_text())
    settings['base'] |= {k: v for k, v in changes.items() if k in settings['base']}
    settings |= {k: v for k, v in changes.items() if k in settings}
    (out/'experiment.json').write_text(json.dumps(settings))
    return out


def test_the_command_leaves_a_table(whole):
    "`tests/test_kills.py` kills it, and starts it again"
    table = rows(whole)
    assert [r['row'] for r in table] == ['no attention', 'SAGAN feat8, feat16, feat32', 'SAGAN feat64',
                                         'Residual feat8, feat16, feat32', 'Residual feat64']
    assert all(float(r['fid']) > 0 and r['samples'] == '100' for r in table)
    assert all('small CNN' in r['evaluator'] and 'twins' in r['reference'] for r in table)
    text = (whole/'table.md').read_text()
    assert "paper's FID" in text and 'SAGAN feat8, feat16, feat32 at 8x8' in text and 'small CNN' in text


def test_two_at_once_give_the_table_of_one_by_one(tmp_path, whole):
    assert finished(begun(tmp_path/'two', whole), jobs=2) == rows(whole)


LONG = dict(steps=100_000, every=50_000)


def test_two_at_once_stop_together(tmp_path, whole):
    out = begun(tmp_path/'jobs', whole, **LONG)
    p = start(out, jobs=2, **LONG)
    wait_until(p, (out/'table1-none/seed0').exists)
    os.kill(p.pid, signal.SIGINT)
    assert 'interrupted' in failed(p)


def test_a_killed_worker_ends_the_command_with_a_message(tmp_path, whole):
    out = begun(tmp_path/'jobs', whole, **LONG)
    p = start(out, jobs=2, **LONG)
    wait_until(p, (out/'table1-none/seed0').exists)
    command = ['pgrep', '-f', '-P', str(p.pid), 'spawn_main']
    workers = subprocess.run(command, capture_output=True, text=True).stdout.split()
    for worker in workers: os.kill(int(worker), signal.SIGKILL)
    assert 'was killed' in failed(p)
