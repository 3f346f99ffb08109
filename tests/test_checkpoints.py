"What is refused when files of a run folder are read: weights, states, config.json and log.jsonl"
import json, math

import pytest, torch
from safetensors.torch import save_file
from sagan.checkpoints import (
    check_scores, create_run, DamagedState, load_state, load_weights, read_config, read_log, save_state,
    save_weights, write_config)
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
    with pytest.raises(ValueError, match='not a whole safetensors file'): load_weights(tmp_path/'empty')
    (tmp_path/'half').write_bytes((tmp_path/'w').read_bytes()[:5000])
    with pytest.raises(ValueError, match='truncated'): load_weights(tmp_path/'half')
    # safetensors by itself would let nobody else read it
    assert (tmp_path/'w').stat().st_mode == (tmp_path/'half').stat().st_mode


def test_weights_of_others(tmp_path, tensors):
    save_file({'a': torch.zeros(1)}, tmp_path/'foreign')
    with pytest.raises(ValueError, match='not written by this package'): load_weights(tmp_path/'foreign')
    for header in (dict(step='x'), dict(config='{'), dict(config='[1]'), dict(config='{"foo": 1}')):
        refused(tmp_path/'bad', tensors, 'bad: its header is damaged', **header)
    refused(tmp_path/'bad', tensors, "there is no device 'foo' here", device='foo')


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


def test_states(tmp_path):
    def learner(): return sagan_learner(image_dls(digits()[:48], 16, steps=1), 'tiny', steps=1, z_dim=8)
    learn = learner()
    with pytest.raises(ValueError, match='fit first'): save_state(tmp_path/'none.pt', learn, [])
    assert list(tmp_path.iterdir()) == []
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    save_state(tmp_path/'state.pt', learn, [])
    whole, bias = (tmp_path/'state.pt').read_bytes(), learn.model.ema.conv.bias.numpy().tobytes()
    for content in (whole[:2000], b'', whole.replace(bias, bytes(len(bias)))):
        (tmp_path/'bad.pt').write_bytes(content)
        with pytest.raises(DamagedState, match='not a whole training state'):
            load_state(tmp_path/'bad.pt', learner())


def test_config(tmp_path):
    "Damaged or with other class names; written again it has the same bytes"
    classes = digits().classes
    folder = create_run(tmp_path/'run', CFG, classes, dict(keep=2))
    file, names = folder/'config.json', 'ValueError the class names must be a list of strings'
    whole = file.read_bytes()
    def refused(content, message):
        file.write_bytes(content)
        with pytest.raises(ValueError) as e: read_config(folder)
        assert f'config.json is damaged: {message}' in str(e.value)
    refused(b'{"config": ', 'JSONDecodeError')
    refused(b'\xff' + whole, 'UnicodeDecodeError')
    for change, message in [
            (dict(classes=None), names), (dict(classes=4), names), (dict(classes='0123456789'), names),
            (dict(classes=list(range(10))), names),
            (dict(config=dict(foo=1)), "ValueError Config has no 'foo'"),
            (dict(classes=['0']), 'ValueError the model has 10 classes, but there are 1 class names')]:
        refused(json.dumps(json.loads(whole) | change).encode(), message)
    with pytest.raises(FileNotFoundError, match='is not a run folder'): read_config(tmp_path/'nowhere')
    write_config(folder, CFG, classes, dict(keep=2))
    assert file.read_bytes() == whole


def test_scores():
    scores = dict(fid=5., step=4, samples=100, evaluator='an evaluator', reference='digits')
    check_scores(scores)
    for s, message in [
            ([], 'a dictionary'), (scores | dict(fid=math.nan), 'fid of scores is nan'),
            (scores | dict(evaluator=3), 'evaluator of scores is 3'),
            ({k: scores[k] for k in ('fid', 'step')}, 'have no samples')]:
        with pytest.raises(ValueError, match=message): check_scores(s)


def test_log(tmp_path):
    "A last line that is cut off or spoiled ends it; one that is no record is refused"
    log = tmp_path/'log.jsonl'
    assert read_log(tmp_path) == []
    for spoiled in (b'', b'{"step": 4, "d_l', b'\0\0\0\n{"step": 4}\n', b'\xff\n{"step": 4}\n'):
        log.write_bytes(b'{"step": 2}\n' + spoiled)
        assert read_log(tmp_path) == [dict(step=2)]
    for line, message in [
            ('[1]', 'it is no record of a step'), ('{"fid": 1}', 'it is no record of a step'),
            ('{"step": 1, "fid": 1}', 'the scores have no samples'),
            ('{"step": 1, "fid": "x"}', "fid of scores is 'x'")]:
        log.write_text(f'{{"step": 0}}\n{line}\n')
        with pytest.raises(ValueError, match=f'log.jsonl is damaged at line 2: {message}'): read_log(tmp_path)
