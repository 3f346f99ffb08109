"""What may happen to a training, as processes: kill -9, writes that fail, signals, NaN, two at once;
and that it goes on as if nothing had happened"""
import os, shutil, signal, time
import pytest
from forked import STARTED, forked, leave_nothing_running
from safetensors.torch import load_file
from machines import linux
from sagan.checkpoints import file_step, read_log, states
from sagan.runs import load_run

pytestmark = linux
TINY = dict(preset='tiny', batch=8, z_dim=8, d_attention='none', device='cpu')

def start(tmp, **options):
    "sagan-train as a process of its own, whose output goes to a file"
    options |= {k: str(options[k]) for k in ('out', 'resume') if k in options}
    return forked(tmp/f'output{len(STARTED)}', 'sagan_train', **options)

def ended(p, status=0):
    p.join(300)
    messages = p.output.read_text(encoding='utf-8')
    assert p.exitcode == status and 'Traceback' not in messages, (p.exitcode, messages)
    return messages

def train(tmp, status=0, **options): return ended(start(tmp, **options), status)

def until(p, condition):
    "Wait for something while a process runs"
    for _ in range(30_000):
        if condition(): return
        assert p.is_alive(), p.output.read_text(encoding='utf-8')
        time.sleep(.01)
    raise AssertionError('it did not happen')

def newest(run): return file_step(states(run)[-1]) if states(run) else -1
def differing(a, b):
    a, b = load_file(a/'weights.safetensors'), load_file(b/'weights.safetensors')
    assert a.keys() == b.keys()
    return [k for k in a if not a[k].equal(b[k])]
def timeless(run):
    return [{k: v for k, v in r.items() if k not in ('seconds', 'images_per_s')} for r in read_log(run)]
def stamps(run): return {f: f.stat().st_mtime_ns for f in run.rglob('*') if f.is_file() and f.name != '.lock'}

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run of 40 steps in one go"
    tmp = tmp_path_factory.mktemp('whole')
    train(tmp, out=tmp/'run', steps=40, **TINY)
    return tmp/'run'

def test_twice_n_steps_are_n_a_kill_and_n_more(whole, tmp_path):
    "Bit for bit; the log, too, which has each step once, with seconds that go on; and no file more or less"
    run = tmp_path/'run'
    p = start(tmp_path, out=run, steps=40, **TINY)
    until(p, lambda: newest(run) >= 20)
    p.kill()
    p.join()
    before = read_log(run)
    assert f'from step {newest(run)} to 40 steps' in train(tmp_path, resume=run)
    assert differing(run, whole) == [] and timeless(run) == timeless(whole)
    seconds = [r['seconds'] for r in read_log(run)]
    assert seconds == sorted(seconds) and seconds[:5] == [r['seconds'] for r in before[:5]]
    assert {p.relative_to(run) for p in run.rglob('*')} == {p.relative_to(whole) for p in whole.rglob('*')}

def test_killed_before_the_first_state_and_with_a_damaged_one(whole, tmp_path):
    "`tests/test_kills.py` kills at all other moments"
    run = tmp_path/'run'
    p = start(tmp_path, out=run, steps=40, **TINY)
    until(p, (run/'config.json').exists)
    p.kill()
    p.join()
    shutil.rmtree(run/'states', ignore_errors=True)
    (run/'weights.safetensors').unlink(missing_ok=True)  # had it been quicker
    p = start(tmp_path, resume=run)
    until(p, lambda: newest(run) >= 8)
    p.kill()
    p.join()
    assert 'starting at step 0' in p.output.read_text(encoding='utf-8')
    file = states(run)[-1]
    file.write_bytes(file.read_bytes()[:10_000])
    assert f'{file} is not a complete training state' in train(tmp_path, resume=run)
    assert differing(run, whole) == [] and timeless(run) == timeless(whole) and not list(run.rglob('.*.new'))

def test_a_run_goes_on_as_it_began_and_nothing_is_touched_otherwise(whole, tmp_path):
    run = tmp_path/'run'
    train(tmp_path, out=run, steps=20, keep=1, **TINY)
    before = stamps(run)
    assert 'were requested; to continue, request more with --steps' in train(tmp_path, 1, resume=run)
    messages = train(tmp_path, 1, resume=run, steps=40, batch=16)
    assert f'batch is 8 in {run}, but 16 was requested' in messages
    messages = train(tmp_path, 1, resume=run, steps=40, data='twins')
    assert 'twins has square, disc, diamond, plus' in messages
    assert 'already holds a run' in train(tmp_path, 1, out=run, steps=20, **TINY)
    assert stamps(run) == before
    # to repeat what it is does no harm
    train(tmp_path, resume=run, steps=40, **{k: v for k, v in TINY.items() if k != 'device'})
    assert differing(run, whole) == [] and len(states(run)) == 1
    shutil.rmtree(run/'states')  # like a folder of an earlier version
    assert 'but no training states' in train(tmp_path, 1, resume=run, steps=60) and load_run(run).step == 40

@pytest.mark.parametrize('sig, status, word', [
    (signal.SIGTERM, 0, 'stopped by SIGTERM'), (signal.SIGINT, 1, 'interrupted')])
def test_signals_leave_a_state_of_this_very_step(tmp_path, sig, status, word):
    run = tmp_path/'run'
    p = start(tmp_path, out=run, steps=100_000, **TINY)
    until(p, lambda: len(read_log(run)) > 0)
    assert 'in use by another process' in train(tmp_path, 1, resume=run)  # a folder belongs to one process
    asked = time.time()
    os.kill(p.pid, sig)
    messages = ended(p, status)
    assert time.time() - asked < 10
    step = load_run(run).step
    assert f'{word} at step {step:,} of 100,000' in messages and f'--resume {run}' in messages
    assert newest(run) == read_log(run)[-1]['step'] == step > 0

def test_sigterm_does_not_wait_for_a_measurement(tmp_path):
    run = tmp_path/'run'
    p = start(tmp_path, out=run, steps=1000, measure_every=2, samples=1_000_000, n_classes=0, **TINY)
    until(p, (run/'samples'/'step-0000002.png').exists)
    time.sleep(.5)
    asked = time.time()
    os.kill(p.pid, signal.SIGTERM)
    messages = ended(p)
    assert time.time() - asked < 10 and 'stopped by SIGTERM at step 2 of 1,000' in messages
    assert newest(run) == load_run(run).step == 2

def test_writes_that_fail(whole, tmp_path):
    """The process may write no more than 1,000 bytes into a file: what it had is whole, and it goes on later

    `tests/test_kills.py` does the same with disks that are full."""
    import resource
    run = tmp_path/'run'
    p = start(tmp_path, out=run, steps=40, **TINY)
    until(p, lambda: newest(run) >= 8)
    resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    messages = ended(p, 1)
    kept = newest(run)
    for words in ('cannot be written', f'MB in {run}', 'MB are free', '--resume'):
        assert words in messages, messages
    assert kept >= 8 and not list(run.rglob('.*.new'))
    # three if the weights did not fit, which come after the state
    assert 2 <= len(states(run)) <= 3 and load_run(run).step in map(file_step, states(run))
    assert f'from step {kept} to' in train(tmp_path, resume=run)
    assert differing(run, whole) == [] and timeless(run) == timeless(whole)

def test_nan_stops_with_a_report_and_rollbacks_have_an_end(tmp_path):
    run = tmp_path/'run'
    messages = train(tmp_path, 1, out=run, steps=40, lr_g=1e30, on_nan='rollback', **TINY)
    for words in ('after 3 rollbacks to step', 'smaller learning rates', 'step is not finite'):
        assert words in messages, messages
    assert (run/'nan-report.json').exists() and load_run(run).step == newest(run) < 40
    assert all(v.isfinite().all() for v in load_file(run/'weights.safetensors').values())
