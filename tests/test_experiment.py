"An experiment as a process: killed in the middle and started again, it ends with the same table"
import csv, os, signal, subprocess, sys, time
from pathlib import Path
import pytest

BIN = Path(sys.executable).parent
ARGS = ['table1', '--data', 'twins', '--preset', 'tiny', '--steps', '12', '--batch', '8', '--seeds', '1', '--every', '4', '--samples', '100']

STARTED = []

@pytest.fixture(autouse=True)
def leave_nothing_running():
    yield
    for p in STARTED: p.kill(); p.wait()

def start(out, *more):
    STARTED.append(subprocess.Popen([BIN/'sagan-experiment', *ARGS, '--out', str(out), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1')))
    return STARTED[-1]

def finished(out, *more):
    p = start(out, *more); _, err = p.communicate(timeout=500)
    assert p.returncode == 0, err
    rows = list(csv.DictReader((out/'table.csv').open()))
    assert {p.name for p in out.iterdir() if p.is_file()} == {'.lock', 'curves.png', 'evaluator.pt', 'experiment.json', 'reference.safetensors', 'report.html', 'samples.png', 'table.csv', 'table.md'}
    return [{k: v for k, v in r.items() if k != 'seconds_per_step'} for r in rows]

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return finished(tmp_path_factory.mktemp('experiment')/'whole')

def test_killed_and_started_again(tmp_path, whole):
    assert [r['row'] for r in whole] == ['no attention', 'SAGAN feat8, feat16, feat32', 'SAGAN feat64', 'Residual feat8, feat16, feat32', 'Residual feat64']
    assert all(float(r['fid']) > 0 and r['samples'] == '100' and 'small CNN' in r['evaluator'] and 'twins' in r['reference'] for r in whole)
    p = start(tmp_path/'cut')
    for _ in range(3000):                                                     # until the second network has been measured once
        if (tmp_path/'cut/table1-feat8/seed0/state.pt').exists(): break
        time.sleep(.1)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (tmp_path/'cut/table.md').exists() and (tmp_path/'cut/table1-none/seed0/records.json').exists()
    assert finished(tmp_path/'cut') == whole

def test_two_at_once_give_the_table_of_one_by_one_and_stop_together(tmp_path, whole):
    p = start(tmp_path/'jobs', '--jobs', '2', '--steps', '100000', '--every', '50000')
    for _ in range(1200):
        if (tmp_path/'jobs/table1-none/seed0').exists(): break
        time.sleep(.1)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 1 and 'interrupted' in err and 'Traceback' not in err, err
    assert finished(tmp_path/'two', '--jobs', '2') == whole

def test_a_killed_worker_ends_the_command_with_a_message(tmp_path):
    p = start(tmp_path/'jobs', '--jobs', '2', '--steps', '100000', '--every', '50000')
    for _ in range(1200):
        if (tmp_path/'jobs/table1-none/seed0').exists(): break
        time.sleep(.1)
    for child in subprocess.run(['pgrep', '-f', '-P', str(p.pid), 'spawn_main'], capture_output=True, text=True).stdout.split(): os.kill(int(child), signal.SIGKILL)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 1 and 'was killed' in err and 'Traceback' not in err, err
