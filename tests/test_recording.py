"Stops, damage, numbers that are not finite and a full disk while a run is written into its folder"
import errno, json, re, shutil
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from machines import link
from safetensors.torch import load_file
from fastai.callback.core import Callback
from sagan.checkpoints import (
    create_run, file_step, load_state, read_config, read_log, save_weights, state_file, states, weights_step)
from sagan.config import presets
from sagan.data import digits, image_dls
from sagan.diagnostics import BOUNDS, rate_travel
from sagan.recording import (
    _stop_requested, describe_data, fit_run, resume, ROLLBACKS, RunWriter, TrainingProgress, truncate_run)
from sagan.runs import load_run, resume_run, train_run
from sagan.training import sagan_learner

CFG = presets['small'].change(g_width=2, d_width=4, z_dim=8)


class At(Callback):
    "Does something after a given step: once, or each time that the step is reached"
    order = RunWriter.order - 1
    def __init__(self, step, f, once=True): self.at, self.f, self.once = step, f, once
    def after_batch(self):
        if self.sagan_trainer.step != self.at or self.f is None: return
        f = self.f
        if self.once: self.f = None
        f(self)


def learner(steps, images=None):
    torch.manual_seed(0)
    return sagan_learner(image_dls(digits() if images is None else images, 16, steps=steps), CFG)


def run(folder, steps, *cbs):
    "A learner whose writer records every second step and saves every second, and its callbacks"
    learn = learner(steps)
    learn.add_cbs([*cbs, RunWriter(create_run(folder, learn.model.cfg, learn.dls.vocab), 2, 2)])
    return learn


def fit(learn, **kw):
    with learn.no_bar(), learn.no_logging(): fit_run(learn, **kw)
    return learn


def spoil(cb): cb.model.D.blocks[1].conv1.bias.data[0] = torch.nan


def test_a_signal_while_the_processes_ask_each_other_is_not_lost(monkeypatch):
    writer = SimpleNamespace(stop=False)
    def late(t):
        writer.stop = 'SIGINT'
        return t
    assert _stop_requested(writer) is False
    with monkeypatch.context() as m:
        m.setattr('sagan.recording.all_reduce', late)
        assert _stop_requested(writer) is False and writer.stop == 'SIGINT'
    assert _stop_requested(writer) is True and writer.stop == 'SIGINT'


def test_an_exception_leaves_the_last_checkpoint(tmp_path):
    "And a log whose end is spoiled is read up to there"
    def pull_cable(cb): raise RuntimeError('cable pulled')
    with pytest.raises(RuntimeError, match='cable pulled'): fit(run(tmp_path/'run', 10, At(3, pull_cable)))
    assert load_run(tmp_path/'run').step == 2
    with open(tmp_path/'run/log.jsonl', 'a', encoding='utf-8') as f: f.write('\0\0\0\n{"step": 4, "d_l')
    with pytest.warns(UserWarning, match='line 2 is damaged'): records = load_run(tmp_path/'run').records
    assert [r['step'] for r in records] == [2]
    with pytest.raises(FileNotFoundError, match='was not measured'): load_run(tmp_path/'run', best=True)


def test_what_cannot_go_on_is_refused_before_anything_is_removed(tmp_path):
    "Other data, or no whole state"
    folder = fit(run(tmp_path/'run', 4)).run_writer.folder
    files = {f.relative_to(folder) for f in folder.rglob('*')}
    with pytest.raises(ValueError, match='different data: images 1797 there, 1000 here'):
        resume(folder, learner(8, digits()[:1000]))
    changed = digits()
    changed.x[0] = 255 - changed.x[0]
    with pytest.raises(ValueError, match='different data: digest'): resume(folder, learner(8, changed))
    assert describe_data(digits()[:49])['images'] == 49
    for f in states(folder): f.write_bytes(b'')
    messages = []
    with pytest.raises(ValueError, match='none of the 2 training states'):
        resume(folder, learner(8), messages.append)
    assert len(messages) == 2 and all('using the one before it' in m for m in messages)
    assert {f.relative_to(folder) for f in folder.rglob('*')} == files


def test_a_truncated_run_has_no_later_records(tmp_path):
    folder = fit(run(tmp_path/'run', 6)).run_writer.folder
    truncate_run(folder, 4)
    assert [r['step'] for r in read_log(folder)] == [2, 4]
    assert (folder/'log.jsonl').read_text(encoding='utf-8').count('\n') == 2
    assert {file_step(f) for f in folder.rglob('step-*')} == {0, 2, 4}


def test_a_gradient_that_is_not_finite_in_the_step_of_g(tmp_path):
    def steep(cb):
        # only G's step goes back through G
        cb.model.G.conv.register_full_backward_hook(lambda m, given, out: tuple(g*torch.inf for g in given))
    with pytest.raises(FloatingPointError, match="step 6: a number in G's step is not finite"):
        fit(run(tmp_path/'run', 10, At(5, steep)))


def test_rollbacks_have_an_end(tmp_path):
    with pytest.raises(FloatingPointError, match=f'after {ROLLBACKS} rollbacks to step 4'):
        fit(run(tmp_path/'run', 10, At(5, spoil, once=False)), on_nan='rollback')
    assert load_run(tmp_path/'run').step == 4


def test_a_good_checkpoint_is_not_replaced_when_only_moments_are_spoiled(tmp_path):
    def spoil_moment(cb): next(iter(cb.opt.opt.opt_g.state.values()))['exp_avg_sq'].fill_(torch.inf)
    with pytest.raises(FloatingPointError, match='exp_avg_sq'):
        fit(run(tmp_path/'run', 10, At(6, spoil_moment)))
    assert load_run(tmp_path/'run').step == 4


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    "The system's answer is imitated here; `test_survival.py` fills a small file system"
    def full(*args, **kw): raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(OSError, match='MB in'):
        fit(run(tmp_path/'run', 10, At(5, lambda cb: monkeypatch.setattr('torch.save', full))))
    assert load_run(tmp_path/'run').step == 4
    assert [file_step(f) for f in states(tmp_path/'run')] == [2, 4]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A run of four steps with a checkpoint after each, and its report"
    folder = tmp_path_factory.mktemp('finished')/'run'
    train_run(out=folder, preset='tiny', steps=4, batch=8, z_dim=8, d_attention=(), device='cpu', tell=silent)
    return folder


@pytest.fixture
def copied(finished, tmp_path): return Path(shutil.copytree(finished, tmp_path/'run'))


@pytest.fixture
def quick_report(monkeypatch):
    "An empty report, where a test is not about it"
    def write(run, images, best): (run.folder/'report.html').touch()
    monkeypatch.setattr('sagan.runs.write_report', write)


def silent(text): pass


def learner_of(folder, steps=4):
    return sagan_learner(image_dls(digits(), 8, steps=steps), read_config(folder)[0].change(steps=steps))


def same_weights(a, b):
    a, b = (load_file(f/'weights.safetensors') for f in (a, b))
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize('report', [False, True])
def test_a_run_that_ended_before_its_last_weights(finished, copied, quick_report, report):
    "Readers take the state that is newer; the same command finishes it, also after an old version's report"
    learn = learner_of(copied)
    load_state(state_file(copied, 3), learn)
    save_weights(copied/'weights.safetensors', learn.model, 3)
    if not report: (copied/'report.html').unlink()
    shutil.copy(finished/'states/step-0000003.pt', copied/'states/step-0000002.pt')  # was to be removed next
    assert not same_weights(finished, copied)
    read = load_run(copied)
    assert (read.step, weights_step(copied)) == (4, 3)  # reading writes nothing
    for k, v in load_file(finished/'weights.safetensors').items():
        assert torch.equal(v, read.model.state_dict()[k])
    assert resume_run(copied, tell=silent).step == 4
    assert same_weights(finished, copied) and (copied/'report.html').exists()
    assert [file_step(f) for f in states(copied)] == [3, 4]
    with pytest.raises(ValueError, match='is finished'): resume_run(copied, tell=silent)


@pytest.mark.parametrize('lost', ['report.html', 'weights.safetensors'])
def test_a_finished_run_that_lost_a_file(finished, copied, quick_report, lost):
    (copied/lost).unlink()
    assert resume_run(copied, tell=silent).step == 4
    assert same_weights(finished, copied) and (copied/'report.html').exists()


def test_a_finished_run_that_lost_its_log(copied):
    "It cannot be created again; the report says so"
    (copied/'log.jsonl').unlink()
    (copied/'report.html').unlink()
    resume_run(copied, tell=silent)
    assert 'figures of its last step are not in its log' in (copied/'report.html').read_text(encoding='utf-8')


@pytest.mark.parametrize('change', [
    dict(notes=[]), dict(notes=dict(data=5)), dict(step=3), dict(draws=torch.zeros(3, dtype=torch.uint8)),
    dict(model={})], ids=str)
def test_a_state_of_something_else_is_left_for_the_one_before_it(finished, copied, change):
    "Also when that is noticed late"
    file, told, learn = state_file(copied, 4), [], learner_of(copied)
    torch.save(torch.load(file, weights_only=True) | change, file)
    resume(copied, learn, told.append)
    text, = told
    assert 'step-0000004.pt is not a complete training state' in text and 'using the one before it' in text
    assert (learn.sagan_trainer.step, weights_step(copied), [*map(file_step, states(copied))]) == (3, 3, [3])
    learn.add_cb(RunWriter(copied))
    fit(learn)
    assert same_weights(finished, copied)


def test_a_run_goes_on_without_its_best_state(copied, quick_report):
    "Nor does it die for it in the end"
    scores = dict(fid=1., samples=10, evaluator='an evaluator', reference='digits')
    with open(copied/'log.jsonl', 'a', encoding='utf-8') as f:
        for step in (1, 2): f.write(json.dumps(dict(step=step) | scores) + '\n')
    (copied/'report.html').unlink()
    with pytest.warns(UserWarning, match='leaves out the best weights'): resume_run(copied, tell=silent)
    assert (copied/'report.html').exists()


def test_a_spoiled_line_of_the_log_loses_no_other_when_a_run_goes_on(copied):
    log, told = copied/'log.jsonl', []
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b''.join([lines[0], b'\0' + lines[1][1:], *lines[2:], b'{"st']))
    learn = learner_of(copied, 5)
    resume(copied, learn, told.append)
    assert len(told) == 1 and 'log.jsonl: line 2 is damaged and was left out' in told[0]
    learn.add_cb(RunWriter(copied))
    fit(learn)
    assert log.read_bytes().startswith(lines[0] + lines[2] + lines[3])
    assert [r['step'] for r in read_log(copied)] == [1, 3, 4, 5]


def test_a_log_that_is_a_folder_is_rejected_before_anything_is_written(copied):
    (copied/'log.jsonl').unlink()
    (copied/'log.jsonl').mkdir()
    before = (copied/'weights.safetensors').stat().st_mtime_ns
    with pytest.raises(ValueError, match='log.jsonl is not a file'): resume_run(copied, steps=5, tell=silent)
    assert (copied/'weights.safetensors').stat().st_mtime_ns == before


def test_nothing_is_written_through_a_log_that_is_a_link(copied, tmp_path):
    other = tmp_path/'other'
    (copied/'log.jsonl').rename(other)
    link(copied/'log.jsonl', other)
    before, learn = other.read_bytes(), learner_of(copied, 5)
    resume(copied, learn, silent)
    learn.add_cb(RunWriter(copied))
    with pytest.raises(OSError, match='log.jsonl cannot be written: it is a link'): fit(learn)
    assert other.read_bytes() == before and learn.sagan_trainer.step == 4  # before any step


def test_other_threads_are_told(copied, monkeypatch):
    told, threads = [], torch.get_num_threads()
    monkeypatch.setattr('torch.get_num_threads', lambda: threads + 1)
    resume(copied, learner_of(copied), told.append)
    assert len(told) == 1 and f'threads {threads} there, {threads + 1} here' in told[0]


RATES = dict(lr_g=1e-4, bias_lr=.5)


def test_other_rates_at_resume(finished, copied, tmp_path, quick_report):
    "They hold from there on, also after another stop, and are in the log and in config.json"
    stopped = shutil.copytree(copied, tmp_path/'stopped')
    told:list = []
    resume_run(copied, steps=7, tell=told.append, **RATES)
    rates = 'lr_g is 0.0001, not 0.001', 'bias_lr is 0.5, not 0.1'
    assert told[:2] == [f'from step 4 on, {rate}' for rate in rates]
    resume_run(stopped, steps=5, tell=silent, **RATES)
    resume_run(stopped, steps=7, tell=silent)
    assert same_weights(copied, stopped)
    change = dict(step=4, lr_g=[1e-3, 1e-4], bias_lr=[.1, .5])
    for folder in (copied, stopped):
        cfg, _, options = read_config(folder)
        assert (cfg.lr_g, cfg.lr_d, cfg.bias_lr, options['changes']) == (1e-4, 2e-3, .5, [change])
        records = read_log(folder)
        assert [r.get('changes') for r in records] == [None]*4 + [[change], None, None]
        assert [r['lr_g'] for r in records] == [1e-3]*4 + [1e-4]*3
        # what was said at the beginning is not said again
        assert records[0]['warnings'][0].startswith('the run sees 32 images, 0.02 of one')
        assert not any('passes' in r.get('signs', []) for r in records[1:])
    groups = torch.load(state_file(copied, 7), weights_only=True)['optimisers']['g']['param_groups']
    assert [g['lr'] for g in groups] == [1e-4, 5e-5]


def test_a_change_is_not_lost_with_a_process_that_is_killed(copied, quick_report):
    "It is in config.json before the first step, and the next process records it"
    def cut_off(text):
        if 'run folder' in text: raise RuntimeError('killed')
    with pytest.raises(RuntimeError, match='killed'): resume_run(copied, steps=5, tell=cut_off, **RATES)
    assert read_config(copied)[0].lr_g == 1e-4 and read_log(copied)[-1]['step'] == 4
    assert resume_run(copied, steps=5, tell=silent).records[-1]['changes'][0]['lr_g'] == [1e-3, 1e-4]


@pytest.mark.parametrize('asked, message', [
    (dict(beta2=.9), 'beta2 is 0.99 in'), (dict(lr_g=-1.), 'lr_g must be positive'),
    (dict(preset='paper'), 'size is 32 in')], ids=str)
def test_only_rates_and_steps_may_change(copied, asked, message):
    before = (copied/'config.json').read_bytes()
    with pytest.raises(ValueError, match=message): resume_run(copied, steps=5, tell=silent, **asked)
    assert (copied/'config.json').read_bytes() == before


def test_what_a_writer_takes_up_from_a_log():
    "The records that signs look at, and what the next record has to say"
    writer = RunWriter(Path('run'), init_from=dict(run='digits'), changes=[dict(step=10), dict(step=400)])
    figures = dict(d_loss=2., d_real=0., d_fake=0., lr_g=1e-3, lr_d=2e-3)
    records = [dict(step=step) | figures for step in range(10, 410, 10)]
    writer.take_up([*records, dict(step=405) | figures])
    assert writer.travel['lr_d'] == pytest.approx(405*2e-3)
    assert [r['step'] for r in writer.window] == list(range(110, 410, 10)) and writer.notes == {}
    writer.take_up([*records[:-1], records[-1] | dict(d_real=None)])
    assert writer.window[-1]['step'] == 390 and writer.notes == dict(changes=[dict(step=400)])
    writer.take_up([])
    assert not writer.window
    assert writer.notes == dict(init_from=dict(run='digits'), changes=writer.changes)


def test_a_sign_that_has_cleared_is_reported_again():
    "Not while it lasts; and a writer that takes up the log knows at each step which signs last"
    writer, said, log = RunWriter(Path('run')), [], []
    writer.warn = said.append
    writer.take_up([])
    for step, signs in enumerate([{}, dict(lead='a'), dict(lead='b'), {}, dict(lead='c', d_loss='d'), {}]):
        writer.report_signs(signs)
        log.append(dict(step=step, signs=writer.signs, cleared=writer.cleared))
        writer.signs = []
        other = RunWriter(Path('run'))
        other.take_up(log)
        assert other.reported_signs == writer.reported_signs == set(signs)
    assert said == ['a', 'c', 'd'] and log[-1]['cleared'] == ['d_loss', 'lead']


def test_diversity_counts_after_some_steps_of_g(tmp_path, monkeypatch):
    "All grids are alike here; the log notes when the sign has cleared, and when it is back"
    monkeypatch.setitem(BOUNDS, 'g_steps', 4)
    found = iter([.05, .05, .05, .05, .9, .05])  # at steps 0, 2, ...
    monkeypatch.setattr(RunWriter, 'save_samples', lambda writer: next(found))
    writer = fit(run(tmp_path/'run', 10)).run_writer
    records = read_log(writer.folder)
    assert [r.get('signs') for r in records] == [None, ['diversity'], None, None, ['diversity']]
    assert [r.get('cleared') for r in records] == [None, None, None, ['diversity'], None]
    assert writer.travel == pytest.approx(rate_travel(records))


def test_a_loss_that_is_not_known_yet_is_not_shown_as_nan():
    "D takes five steps before G takes one"
    shown = []
    def update(step, fields): shown.append(fields)
    line = SimpleNamespace(begin=silent, due=lambda: True, update=update)
    learn = sagan_learner(image_dls(digits(), 16, steps=5), CFG, n_d=5, cbs=TrainingProgress(line))
    lines = []
    learn.add_cb(At(4, lambda cb: lines.append(cb.sagan_trainer.line())))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    lines.append(learn.sagan_trainer.line())
    losses = [fields[1] for fields in shown]
    assert losses[:4] == ['G     -']*4 and re.fullmatch(r'G +-?\d+\.\d+', losses[4])
    assert 'G' in lines[1].split() and 'G' not in lines[0].split() and 'nan' not in str(shown + lines)
