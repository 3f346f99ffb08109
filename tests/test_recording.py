"Stops, damage, numbers that are not finite and a full disk while a run is written into its folder"
import errno
from types import SimpleNamespace

import pytest, torch
from fastai.callback.core import Callback
from sagan.checkpoints import create_run, file_step, read_log, states
from sagan.config import presets
from sagan.data import digits, image_dls
from sagan.recording import (
    _stop_requested, describe_data, fit_run, resume, ROLLBACKS, RunWriter, truncate_run)
from sagan.runs import load_run
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
    with open(tmp_path/'run/log.jsonl', 'a') as f: f.write('\0\0\0\n{"step": 4, "d_l')
    assert [r['step'] for r in load_run(tmp_path/'run').records] == [2]
    with pytest.raises(FileNotFoundError, match='was not measured'): load_run(tmp_path/'run', best=True)


def test_what_cannot_go_on_is_refused_before_anything_is_removed(tmp_path):
    "Other data, or no whole state"
    folder = fit(run(tmp_path/'run', 4)).run_writer.folder
    files = {f.relative_to(folder) for f in folder.rglob('*')}
    with pytest.raises(ValueError, match='other data: images 1797 there, 1000 here'):
        resume(folder, learner(8, digits()[:1000]))
    changed = digits()
    changed.x[0] = 255 - changed.x[0]
    with pytest.raises(ValueError, match='other data: digest'): resume(folder, learner(8, changed))
    assert describe_data(digits()[:49])['images'] == 49
    for f in states(folder): f.write_bytes(b'')
    messages = []
    with pytest.raises(ValueError, match='none of the 2 training states'):
        resume(folder, learner(8), messages.append)
    assert len(messages) == 2 and all('the one before it is taken' in m for m in messages)
    assert {f.relative_to(folder) for f in folder.rglob('*')} == files


def test_a_truncated_run_has_no_later_records(tmp_path):
    folder = fit(run(tmp_path/'run', 6)).run_writer.folder
    truncate_run(folder, 4)
    assert [r['step'] for r in read_log(folder)] == [2, 4]
    assert (folder/'log.jsonl').read_text().count('\n') == 2
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
