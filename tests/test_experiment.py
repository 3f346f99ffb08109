"An experiment as a process: killed in the middle and started again, it ends with the same table"
import csv, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from forked import forked, leave_nothing_running

ASKED = dict(data='twins', preset='tiny', steps=8, batch=8, seeds=1, every=4, samples=100)
FILES = {'.lock', 'curves.png', 'evaluator.pt', 'experiment.json', 'reference.safetensors', 'report.html', 'samples.png', 'table.csv', 'table.md'}

def start(out, **more):
    "sagan-experiment as a process of its own, whose output goes to a file beside its folder"
    return forked(out.with_suffix('.said'), 'sagan_experiment', 'table1', **ASKED | dict(device='cpu', out=str(out)) | more)

def until(p, condition):
    for _ in range(6000):
        if condition(): return
        assert p.is_alive(), p.said.read_text()
        time.sleep(.05)
    raise AssertionError('it did not happen')

def rows(out):
    assert {p.name for p in out.iterdir() if p.is_file()} == FILES
    return [{k: v for k, v in r.items() if k != 'seconds_per_step'} for r in csv.DictReader((out/'table.csv').open())]

def finished(out, **more):
    p = start(out, **more)
    p.join(500)
    assert p.exitcode == 0, p.said.read_text()
    return rows(out)

def failed(p):
    p.join(60)
    said = p.said.read_text()
    assert p.exitcode == 1 and 'Traceback' not in said, said
    return said

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The command in a shell, in one go"
    out = tmp_path_factory.mktemp('experiment')/'whole'
    args = [a for k, v in ASKED.items() for a in (f'--{k}', str(v))]
    done = subprocess.run([Path(sys.executable).parent/'sagan-experiment', 'table1', *args, '--device', 'cpu', '--out', out], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return out

def begun(out, whole, **changes):
    "The folder of an experiment that was stopped before its first step: the judge is there, and nothing is trained"
    out.mkdir()
    for f in ('evaluator.pt', 'reference.safetensors'): shutil.copy(whole/f, out)
    asked = json.loads((whole/'experiment.json').read_text())
    asked['base'] |= {k: v for k, v in changes.items() if k in asked['base']}
    (out/'experiment.json').write_text(json.dumps(asked | {k: v for k, v in changes.items() if k in asked}))
    return out

def test_killed_and_started_again(tmp_path, whole):
    table = rows(whole)
    assert [r['row'] for r in table] == ['no attention', 'SAGAN feat8, feat16, feat32', 'SAGAN feat64', 'Residual feat8, feat16, feat32', 'Residual feat64']
    assert all(float(r['fid']) > 0 and r['samples'] == '100' and 'small CNN' in r['evaluator'] and 'twins' in r['reference'] for r in table)
    cut = tmp_path/'cut'
    p = start(cut)
    until(p, (cut/'table1-feat8/seed0/state.pt').exists)  # the second network has been measured once
    p.kill()
    p.join()
    assert not (cut/'table.md').exists() and (cut/'table1-none/seed0/records.json').exists()
    assert finished(cut) == table

def test_two_at_once_give_the_table_of_one_by_one(tmp_path, whole):
    assert finished(begun(tmp_path/'two', whole), jobs=2) == rows(whole)

LONG = dict(steps=100_000, every=50_000)

def test_two_at_once_stop_together(tmp_path, whole):
    out = begun(tmp_path/'jobs', whole, **LONG)
    p = start(out, jobs=2, **LONG)
    until(p, (out/'table1-none/seed0').exists)
    os.kill(p.pid, signal.SIGINT)
    assert 'interrupted' in failed(p)

def test_a_killed_worker_ends_the_command_with_a_message(tmp_path, whole):
    out = begun(tmp_path/'jobs', whole, **LONG)
    p = start(out, jobs=2, **LONG)
    until(p, (out/'table1-none/seed0').exists)
    for child in subprocess.run(['pgrep', '-f', '-P', str(p.pid), 'spawn_main'], capture_output=True, text=True).stdout.split():
        os.kill(int(child), signal.SIGKILL)
    assert 'was killed' in failed(p)
