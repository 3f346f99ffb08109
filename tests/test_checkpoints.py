"What is refused when files of a run folder are read: weights, states, config.json and log.jsonl"
import json, math, os, pickle

import pytest, torch
from safetensors.torch import save_file
from machines import posix
from sagan.checkpoints import (
    check_scores, create_run, DamagedState, load_best, load_newest, load_state, load_weights, read_config,
    read_log, read_state, save_state, save_weights, state_file, states, weights_step, write_config)
from sagan.config import presets
from sagan.data import digits, image_dls
from sagan.training import SAGAN, sagan_learner

CFG = presets['small'].change(g_width=2, d_width=4, z_dim=8)


@pytest.fixture(scope='module')
def tensors():
    "Tensors of a small model"
    torch.manual_seed(0)
    return {k: v.contiguous() for k, v in SAGAN(CFG).state_dict().items()}


def refused(file, tensors, message, device='cpu', **header):
    "Write tensors with a header, and expect a `ValueError` when they are loaded"
    save_file(tensors, file, dict(step='1', config=json.dumps(vars(CFG))) | header)
    with pytest.raises(ValueError) as e: load_weights(file, device=device)
    assert message in str(e.value)


def test_weights_that_are_not_there_or_not_whole(tmp_path):
    save_weights(tmp_path/'w', SAGAN(CFG), 12)
    with pytest.raises(FileNotFoundError, match='no weights at'): load_weights(tmp_path/'nothing')
    (tmp_path/'empty').touch()
    with pytest.raises(ValueError, match='not a complete safetensors file'): load_weights(tmp_path/'empty')
    (tmp_path/'half').write_bytes((tmp_path/'w').read_bytes()[:5000])
    with pytest.raises(ValueError, match='truncated'): load_weights(tmp_path/'half')
    # safetensors by itself would let nobody else read it
    assert (tmp_path/'w').stat().st_mode == (tmp_path/'half').stat().st_mode


def test_weights_of_others(tmp_path, tensors):
    save_file({'a': torch.zeros(1)}, tmp_path/'foreign')
    with pytest.raises(ValueError, match='not written by this package'): load_weights(tmp_path/'foreign')
    for header in (dict(step='x'), dict(config='{'), dict(config='[1]'), dict(config='{"foo": 1}')):
        refused(tmp_path/'bad', tensors, 'bad: its header is damaged', **header)
    refused(tmp_path/'bad', tensors, "the device 'foo' is not available", device='foo')


def test_the_first_tensor_that_does_not_fit_is_named(tmp_path, tensors):
    "In the order of the model, whatever else is wrong"
    file, first = tmp_path/'bad', next(iter(tensors))
    refused(file, dict(b=tensors[first], a=tensors[first].clone()), f'lacks the tensor {first}')
    refused(file, {k: v for k, v in tensors.items() if k != 'G.conv.bias'}, 'lacks the tensor G.conv.bias')
    refused(file, tensors | dict(b=torch.ones(1), a=torch.ones(1)), 'does not have: a')
    refused(file, tensors | {'G.conv.bias': torch.ones(4)}, 'has shape (4,), the configuration asks for (3,)')
    half = {k: v.half() for k, v in tensors.items()}
    refused(file, half, f'{first} holds torch.float16, expected torch.float32')
    refused(file, tensors | {'G.conv.bias': torch.ones(3, dtype=torch.bool)}, 'G.conv.bias holds torch.bool')
    bias = torch.tensor([0., torch.nan, 0.])
    refused(file, tensors | {'G.conv.bias': bias}, 'G.conv.bias holds numbers that are not finite')


def learner(**changes):
    images = digits()[:48]
    return sagan_learner(image_dls(images, 16, steps=1), 'tiny', **dict(steps=1, z_dim=8) | changes)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "The state of a learner after a step, as a file, and the learner"
    file, learn = tmp_path_factory.mktemp('saved')/'state.pt', learner()
    with pytest.raises(ValueError, match='fit first'): save_state(file, learn, [])
    assert not file.exists()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    save_state(file, learn, [])
    return file, learn


@posix
def test_states_that_are_not_whole(saved, tmp_path):
    file, learn = saved
    whole, bias = file.read_bytes(), learn.model.ema.conv.bias.numpy().tobytes()
    for content in (whole[:2000], b'', whole.replace(bias, bytes(len(bias)))):
        (tmp_path/'bad.pt').write_bytes(content)
        with pytest.raises(DamagedState, match='not a complete training state') as e:
            read_state(tmp_path/'bad.pt')
    again = pickle.loads(pickle.dumps(e.value))  # as a process of an experiment sends it
    assert str(again) == str(e.value) and again.path == tmp_path/'bad.pt' and again.reason in str(again)
    with pytest.raises(FileNotFoundError): read_state(tmp_path/'nothing.pt')
    os.mkfifo(tmp_path/'pipe.pt')
    with pytest.raises(DamagedState, match='it is not a file'): read_state(tmp_path/'pipe.pt')


def changed(state, path, *value):
    "A copy of nested dictionaries with another value at a path of keys, or without it"
    first, *rest = path.split('/')
    key = int(first) if first.isdigit() else first
    if not rest and not value: return {k: v for k, v in state.items() if k != key}
    return state | {key: changed(state[key], '/'.join(rest), *value) if rest else value[0]}


NAN = torch.tensor(math.nan)
CONTENTS = {
    **{f'no {k}': lambda s, k=k: changed(s, k) for k in (
        'versions', 'config', 'model', 'optimisers', 'step', 'device', 'draws', 'losses', 'data', 'notes',
        'data/order', 'data/draws', 'optimisers/g', 'optimisers/d/state', 'optimisers/g/param_groups',
        'optimisers/g/state/0/exp_avg', 'model/G.conv.bias')},
    **{f'{k} is {v!r}': lambda s, k=k, v=v: changed(s, k, v) for k, v in (
        ('step', -1), ('step', 1.), ('step', True), ('step', '1'), ('step', 2**70), ('losses', ()),
        ('losses', ('x', 1.)), ('scores', dict(d_real='x')), ('scores', None), ('model', {}),
        ('config', {1: 2}), ('config', dict(steps='x')), ('loss_scale', 5),
        ('loss_scale', dict(scale=0., good=0, growth_interval=1)),
        ('draws', torch.zeros(3, dtype=torch.uint8)), ('draws', torch.zeros(5056)), ('data/draws', NAN),
        ('data/order', torch.tensor([10**9])), ('data/order', torch.tensor([-1])),
        ('data/order', torch.ones(2)), ('model/G.conv.bias', torch.zeros(7)),
        ('model/G.conv.bias', NAN.expand(3)), ('model/G.conv.bias', 'x'),
        ('model/G.conv.bias', torch.zeros(()).expand(10**6, 10**6)), ('optimisers/g/state', {10**6: {}}),
        ('optimisers/g/state/0/exp_avg', torch.zeros(7)), ('optimisers/g/state/0/step', NAN),
        ('optimisers/d/param_groups', []), ('optimisers/d/param_groups', [{}, {}]))},
    'a list': lambda s: [s], 'a tensor': lambda s: torch.zeros(3), 'nothing': lambda s: {},
    'another lr': lambda s: changed(s, 'optimisers/g/param_groups', [
        g | dict(lr='x') for g in s['optimisers']['g']['param_groups']]),
}


@pytest.mark.parametrize('kind', CONTENTS)
def test_states_that_hold_something_else(saved, tmp_path, kind):
    "A whole file, as another program may write it: one sentence that names it"
    torch.save(CONTENTS[kind](torch.load(saved[0], weights_only=True)), tmp_path/'state.pt')
    with pytest.raises(DamagedState, match='state.pt is not a complete training state') as e:
        load_state(tmp_path/'state.pt', saved[1])
    assert '\n' not in str(e.value) and len(str(e.value)) < 600


def test_states_without_newer_parts_load(saved, tmp_path):
    "Scores, the scale of the loss, threads and kernels came later"
    state = torch.load(saved[0], weights_only=True)
    old = changed(changed(state, 'scores'), 'loss_scale') | dict(versions=dict(sagan='0.0.1'))
    torch.save(old, tmp_path/'old.pt')
    told = []
    load_state(tmp_path/'old.pt', learner(), tell=told.append)
    assert len(told) == 1 and 'sagan 0.0.1 there' in told[0]


def test_other_threads_are_told_in_one_line(saved, monkeypatch):
    told, threads = [], torch.get_num_threads()
    load_state(saved[0], learner(), tell=told.append)
    assert told == []
    monkeypatch.setattr('torch.get_num_threads', lambda: threads + 1)
    load_state(saved[0], learner(), tell=told.append)
    line, = told
    assert f'threads {threads} there, {threads + 1} here' in line and '\n' not in line


def test_the_newest_whole_checkpoint(saved, tmp_path):
    "The state that is newer than the weights, unless it is damaged or of another step than its name says"
    learn, folder = learner(data='digits'), create_run(tmp_path/'run', CFG, digits().classes)
    cfg = learn.model.cfg
    def model_of(step): return {k: v + step for k, v in learn.model.state_dict().items()}
    def save(step, file):
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        learn.model.ema.conv.bias.fill_(step)
        file(step)
    (folder/'states').mkdir()
    def state(step): save_state(state_file(folder, step), learn, [])
    def weights(step): save_weights(folder/'weights.safetensors', learn.model, step)
    with pytest.raises(FileNotFoundError, match='has no weights yet'): load_newest(folder, cfg)
    save(1, state)
    assert load_newest(folder, cfg)[1] == 1  # a state before the first weights
    weights(1)
    save(2, state)
    model, step = load_newest(folder, cfg)
    assert step == 2 and (model.ema.conv.bias == 2).all() and not model.training
    (folder/'states/step-0000009.pt').write_bytes(state_file(folder, 2).read_bytes())
    with pytest.warns(UserWarning, match='its step is 2.*using an older checkpoint'):
        assert load_newest(folder, cfg)[1] == 2
    (folder/'states/step-0000009.pt').unlink()
    state_file(folder, 2).write_bytes(state_file(folder, 2).read_bytes()[:9000])
    with pytest.warns(UserWarning, match='step-0000002.pt is not a complete'):
        model, step = load_newest(folder, cfg)
    assert step == 1 and (model.ema.conv.bias == 1).all()
    # weights that are damaged, too
    (folder/'weights.safetensors').write_bytes(b'x')
    assert weights_step(folder) == -1
    with pytest.warns(UserWarning, match='step-0000002.pt is not a complete'):
        assert load_newest(folder, cfg)[1] == 1
    for f in states(folder): f.unlink()
    with pytest.raises(ValueError, match='not a complete safetensors file'): load_newest(folder, cfg)


@posix
def test_names_of_states(tmp_path):
    "Other files, folders and pipes are none"
    (tmp_path/'states').mkdir()
    for name in ('step-best.pt', 'step-1.pt', 'step-0000003 (copy).pt', 'step--000005.pt',
                 'step-0000004.pt.bak'):
        (tmp_path/'states'/name).touch()
    (tmp_path/'states/step-0000008.pt').mkdir()
    os.mkfifo(tmp_path/'states/step-0000009.pt')
    for step in (12_345_678, 7): state_file(tmp_path, step).touch()
    assert [f.name for f in states(tmp_path)] == ['step-0000007.pt', 'step-12345678.pt']


def test_the_best_of_a_run_that_was_killed(saved, tmp_path):
    "A record that was measured, but whose state was not written, is not the best"
    learn, folder = saved[1], create_run(tmp_path/'run', CFG, digits().classes)
    def measured(step, fid):
        return dict(step=step, fid=fid, samples=10, evaluator='an evaluator', reference='digits')
    (folder/'states').mkdir()
    save_state(state_file(folder, 1), learn, [])
    assert load_best(folder, learn.model.cfg, [measured(1, 5.), measured(2, 1.)])[1] == 1
    with pytest.raises(FileNotFoundError): load_best(folder, learn.model.cfg, [measured(0, 1.)])


def test_config(tmp_path):
    "Damaged or with other class names; written again it has the same bytes"
    classes = digits().classes
    folder = create_run(tmp_path/'run', CFG, classes, dict(keep=2))
    file, names = folder/'config.json', 'the class names must be a list of strings'
    whole = file.read_bytes()
    def refused(content, message):
        file.write_bytes(content)
        with pytest.raises(ValueError) as e: read_config(folder)
        assert f'config.json is damaged: {message}' in str(e.value)
    refused(b'{"config": ', 'Expecting value')
    refused(b'\xff' + whole, "'utf-8' codec can't decode")
    refused(b'['*100_000, 'it is nested too deeply')
    refused(b'[]', 'it does not hold a dictionary')
    refused(whole.replace(b'"seed": 0', b'"seed": NaN'), '')
    for change, message in [
            (dict(classes=None), names), (dict(classes=4), names), (dict(classes='0123456789'), names),
            (dict(classes=list(range(10))), names),
            (dict(config=dict(foo=1)), "Config has no field 'foo'"),
            (dict(config=[]), 'the configuration is not a dictionary'),
            (dict(config=None), 'the configuration is not a dictionary'),
            (dict(config=dict(seed='x')), "seed must be a whole number"),
            (dict(config=dict(g_width=10**30)), 'g_width must be at most 65,536'),
            (dict(options=[]), 'the options must be a dictionary'),
            (dict(options=dict(keep='x')), "the option keep must be of type int, got 'x'"),
            (dict(options=dict(measure_every=True)), 'the option measure_every must be of type int'),
            (dict(options=dict(weights=5)), 'the option weights must be of type str'),
            (dict(options=dict(imported_from='x')), 'the option imported_from must be of type list'),
            (dict(classes=['0']), 'the model has 10 classes, but there are 1 class names')]:
        refused(json.dumps(json.loads(whole) | change).encode(), message)
    with pytest.raises(FileNotFoundError, match='is not a run folder'): read_config(tmp_path/'nowhere')
    write_config(folder, CFG, classes, dict(keep=2))
    assert file.read_bytes() == whole


def test_scores():
    scores = dict(fid=5., step=4, samples=100, evaluator='an evaluator', reference='digits')
    check_scores(scores)
    for s, message in [
            ([], 'a dictionary'), (scores | dict(fid=math.nan), 'the scores have a bad fid, nan'),
            (scores | dict(evaluator=3), 'the scores have a bad evaluator, 3'),
            (scores | dict(fid=True), 'the scores have a bad fid, True'),
            (scores | dict(samples=-1), 'the scores have a bad samples, -1'),
            (scores | dict(kid='x'), "the scores have a bad kid, 'x'"),
            (scores | dict(step=2.), 'the scores have a bad step, 2.0'),
            ({k: scores[k] for k in ('fid', 'step')}, 'have no samples')]:
        with pytest.raises(ValueError, match=message): check_scores(s)


SPOILED = [
    b'\0\0\0', b'{"step": 4, "d_l', b'\xff', b'{"step": 4}{"step": 5}', b'['*100_000, b'[1]', b'4',
    b'{"fid": 1}', b'{"step": "4"}', b'{"step": -4}', b'{"step": 4.0}', b'{"step": true}',
    b'{"step": 1e9999}', b'{"step": 4, "d_loss": NaN}',
    b'{"step": 4, "seconds": "x"}', b'{"step": 4, "gamma G16": [1]}', b'{"step": 4, "sigma G.conv": true}',
    b'{"step": 4, "g_loss": 1' + b'0'*400 + b'}', b'{"step": 4, "signs": 5}', b'{"step": 4, "warnings": "x"}',
    b'{"step": 4, "warnings": [5]}', b'{"step": 4, "fid": 1}', b'{"step": 4, "fid": "x"}']


@pytest.mark.parametrize('line', SPOILED)
def test_a_spoiled_line_of_the_log(tmp_path, line):
    "It loses no other, before or after it, and a sentence names it"
    told = []
    (tmp_path/'log.jsonl').write_bytes(b'{"step": 2}\n' + line + b'\n{"step": 6}\n{"step": 8}\n')
    assert [r['step'] for r in read_log(tmp_path, told.append)] == [2, 6, 8]
    assert len(told) == 1 and 'log.jsonl: line 2 is damaged and was' in told[0] and '\n' not in told[0]


@posix
def test_a_log(tmp_path):
    "Cut off at its end, with steps twice or out of order, with null for numbers, or no file"
    log, told = tmp_path/'log.jsonl', []
    def steps(text):
        log.write_bytes(text)
        return [r['step'] for r in read_log(tmp_path, told.append)]
    assert read_log(tmp_path) == []
    for end in (b'', b'{"step": 4, "d_l', b'\0\0\0', b'\n\n', b'[1]'):
        assert steps(b'{"step": 2}\n' + end) == [2]
    assert steps(b'{"step": 2}\r\n{"step": 4}') == [2, 4]
    assert steps(b'{"step": 2, "g_loss": null, "note": "any"}\n') == [2]
    assert told == []
    assert steps(b'{"step": 2}\n{"step": 6}\n{"step": 4}\n{"step": 2, "d_loss": 1.5}\n') == [2, 4, 6]
    assert told == [] and read_log(tmp_path)[0] == dict(step=2, d_loss=1.5)
    assert steps(b'{"step": 2}\n\0\n{}\n{"step": 4}\n') == [2, 4]
    assert 'line 2 is damaged' in told[0] and told[0].endswith('; and 1 more')
    with pytest.warns(UserWarning, match='line 2 is damaged'): read_log(tmp_path)
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(ValueError, match='log.jsonl is not a file'): read_log(tmp_path)


def test_weights_for_a_folder_that_is_gone(tmp_path):
    "Not 'make room', and nothing about the size of a disk"
    with pytest.raises(OSError, match='there is no folder .*gone$'):
        save_weights(tmp_path/'gone'/'weights.safetensors', SAGAN(presets['tiny']), 1)
