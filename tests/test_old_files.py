"""Folders that a former version wrote (`tests/old/make.py`): they load, and go on to the same bits as that
version came to; so do those with the first names of the forms of attention"""
import hashlib, json, tarfile
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file
from sagan.checkpoints import load_state, read_config, read_log, states
from sagan.cli import sagan_train
from sagan.config import Config, presets
from sagan.data import digits, image_dls
from sagan.references import Evaluator
from sagan.runner import run_experiment
from sagan.recording import fit_run, resume, RunWriter
from sagan.measuring import load_or_train_evaluator
from sagan.runs import load_run
from sagan.sharing import PretrainedSAGAN
from sagan.training import sagan_learner
from old.pixels import NAME, Quarters

old = Path(__file__).parent/'old'
expected = json.loads((old/'expected.json').read_text(encoding='utf-8'))
# Sums in another order give other last digits: what that version came to, on two processors
outcomes = [expected, *expected['elsewhere']]
same_arithmetic = expected['made with'] == [str(torch.__version__), torch.backends.cpu.get_cpu_capability()]


@pytest.fixture
def folders(tmp_path):
    "The folders, unpacked; with one thread, as they were written"
    with tarfile.open(old/'folders.tar.xz') as tar: tar.extractall(tmp_path, filter='data')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def check_weights(folder, name, exact=True):
    "Compare `weights.safetensors` with that of the former version, bit for bit if `exact`"
    tensors = load_file(folder/'weights.safetensors')
    for net, norm in expected[name]['norms'].items():
        found = torch.cat([t.flatten() for k, t in tensors.items() if k.startswith(net)]).norm().item()
        assert found == pytest.approx(norm, rel=1e-2), net
    if not exact: return
    h = hashlib.sha256()
    for k, t in sorted(tensors.items()): h.update(k.encode() + t.contiguous().numpy().tobytes())
    known = [o[name]['sha256'] for o in outcomes if name in o]
    assert h.hexdigest() in known, 'on another processor, tests/old/make.py --add says what is right'


def learner(folder, steps):
    "A learner for a folder's configuration, with more steps"
    cfg = read_config(folder)[0].change(steps=steps)
    return sagan_learner(image_dls(digits(), cfg.batch, cfg.steps, cfg.flip, cfg.seed), cfg)


def test_a_run_loads(folders):
    check_weights(folders/'run', 'step 12')
    run = load_run(folders/'run')
    cfg = presets['tiny'].change(batch=8, z_dim=8, dtype='float32', steps=12)
    assert (run.step, run.cfg, run.classes) == (12, cfg, [str(i) for i in range(10)])
    assert [[r['step'], r['d_loss']] for r in run.records] == [r for r in expected['log'] if r[0] <= 12]
    options = read_config(folders/'run')[2]
    assert (options['keep'], options['on_nan'], options['evaluator']) == (1, 'rollback', 'small')
    for k, t in load_file(folders/'run/weights.safetensors').items():
        assert torch.equal(t, run.model.state_dict()[k]), k


def test_a_run_goes_on_to_the_same_bits(folders):
    folder = folders/'run'
    learn = learner(folder, 24)
    resume(folder, learn)
    assert learn.sagan_trainer.step == 12
    learn.add_cb(RunWriter(folder, save_every=2))
    with learn.no_bar(), learn.no_logging(): fit_run(learn)
    check_weights(folder, 'step 24', same_arithmetic)
    assert [int(f.stem[5:]) for f in states(folder)] == [22, 24]
    found, wanted = read_log(folder), expected['log']
    assert [r['step'] for r in found] == [step for step, _ in wanted]
    losses = [[r['step'], r['d_loss']] for r in found]
    if same_arithmetic: assert losses in [o['log'] for o in outcomes]


def test_a_run_goes_on_by_the_command(folders):
    "With the form's first name, 'official', in its configuration, weights and state"
    folder = folders/'official'
    assert '"form": "official"' in (folder/'config.json').read_text(encoding='utf-8')
    assert load_run(folder).cfg.form == 'released'
    sagan_train(resume=str(folder), steps=24, device='cpu')
    check_weights(folder, 'step 24', same_arithmetic)
    assert [int(f.stem[5:]) for f in states(folder)] == [24] and (folder/'report.html').exists()
    assert '"form": "released"' in (folder/'config.json').read_text(encoding='utf-8')


def test_first_names_of_forms(folders):
    assert read_config(folders/'paper')[0].form == 'preprint'
    assert Config(form='paper') == Config(form='preprint')


def test_a_state_with_a_scale_of_the_loss(folders):
    "As a training in float16 keeps it"
    file = states(folders/'run')[0]
    state = torch.load(file, weights_only=True)
    torch.save(state | dict(loss_scale=dict(scale=1024., growth_interval=2000, good=7)), file)
    learn = learner(folders/'run', 24)
    load_state(file, learn)
    assert learn.sagan_trainer.loss_scale.scale == 1024.


def test_the_classifier_that_measured_a_run_loads(folders):
    "Its weights are zeros here, which take no room"
    e = load_or_train_evaluator(folders/'evaluator/evaluator.pt', digits())
    assert 'digits' in e.name and 0 <= e.held_out <= 1
    assert not any(p.any() for p in e.net.parameters())


def test_an_experiment_goes_on(folders):
    "In the middle of its second network of three; the first is only read"
    base = presets['tiny'].change(batch=8, z_dim=4, steps=6, dtype='float32')
    messages = []
    evaluator = Evaluator(Quarters(), NAME)
    results = run_experiment('local', digits()[:40], base, folders/'experiment', 1, 2, 20, evaluator,
                             tell=messages.append)
    assert not (folders/'experiment/local-conv/seed0/weights.safetensors').exists()
    for variant, (records,) in results:
        log = [[r['step'], r['fid']] for r in records]
        assert [step for step, _ in log] == [2, 4, 6]
        if same_arithmetic: assert log in [o[variant.name]['log'] for o in outcomes]
        if variant.name != 'local-conv':
            check_weights(folders/'experiment'/variant.name/'seed0', variant.name, same_arithmetic)
    assert len(list((folders/'experiment').glob('*/seed0/state.pt'))) == 0


def test_a_shared_folder_loads(folders):
    model, run = PretrainedSAGAN.from_pretrained(folders/'shared'), load_run(folders/'run')
    assert (model.step, model.cfg, model.classes, model.records) == (12, run.cfg, run.classes, run.records)
    for k, t in run.model.state_dict().items(): assert torch.equal(t, model.state_dict()[k]), k
