"What a GPU would be given, without one; and the script for a GPU at a tiny size on the CPU"
import json, re, runpy, sys
from pathlib import Path

import pytest, torch, torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from sagan.attention import attention_maps
from sagan.config import presets
from sagan.data import Images, MemoryLoader
from sagan.kernels import blockwise_attention
from sagan.training import SAGAN, ema_update

root = Path(__file__).resolve().parent.parent
cfg = presets['tiny']


@pytest.fixture(scope='module')
def gpu():
    "The script, as a module"
    sys.path.insert(0, str(root/'benchmarks'))
    import gpu
    yield gpu
    sys.path.remove(str(root/'benchmarks'))


class Call(nn.Module):
    "A model whose weights `functional_call` replaces while `f` looks at it"
    def __init__(self, model, f):
        super().__init__()
        self.model, self.f = model, f

    def forward(self, *args): return self.f(self.model, *args)


def on_gpu(model, f, *args):
    "What f(model, *args) gives when the weights of the model are on a GPU"
    call = Call(model, f)
    weights = {k: torch.empty(v.shape, dtype=v.dtype, device='cuda') for k, v in call.state_dict().items()}
    return functional_call(call, weights, args)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('form', ['preprint', 'published', 'released'])
def test_networks_and_maps_stay_on_the_gpu(form, training):
    "No constant of ours, and no buffer, is left on the CPU"
    model = SAGAN(cfg.change(form=form)).requires_grad_(False).train(training)
    with FakeTensorMode(allow_non_fake_inputs=True):
        z, y = torch.randn(4, cfg.z_dim, device='cuda'), torch.zeros(4, dtype=torch.int64, device='cuda')
        x, g_maps = on_gpu(model, lambda m: attention_maps(m.G, z, y))
        scores, d_maps = on_gpu(model, lambda m: attention_maps(m.D, x, y))
        assert x.shape == (4, 3, 32, 32) and scores.shape == (4,)
        for t in (x, scores, *(m.beta for m in g_maps + d_maps)): assert t.device.type == 'cuda'


def test_the_average_follows_on_the_gpu():
    model = SAGAN(cfg).requires_grad_(False)
    def follow(m):
        ema_update(m.ema, m.G, .9)
        return m.ema.state_dict().values()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert {t.device.type for t in on_gpu(model, follow)} == {'cuda'}


@pytest.mark.parametrize('held', ['cpu', 'cuda'])
def test_batches_reach_the_gpu(held):
    "From images in the memory of either; mirrored ones, and the batch that is only looked at, too"
    x, y = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loader = MemoryLoader(Images(x, y, [], 'x').to(held), 8, flip=True, device='cuda')
        for x, y in (next(iter(loader)), loader.one_batch()):
            assert (x.device.type, y.device.type, x.dtype, x.shape) == (
                'cuda', 'cuda', torch.float32, (8, 3, 32, 32))


def in_this_process(command, capsys):
    "The output of a process that the script starts, without starting it"
    program, *args = map(str, command[1:] if command[0] == sys.executable else command)
    if program == 'git': return 'abc1234\n'
    if program == '-m': return f'{args[-1]}: 1 skipped, 40 deselected in 1.0s'
    assert Path(program).is_file()
    if Path(program).name == 'nbdev-test': return f'{args[0]} passed'
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as done:
        patch.setattr(sys, 'argv', [program, *args])
        runpy.run_path(program, run_name='__main__')
    assert not done.value.code
    return capsys.readouterr().out


def test_the_script_for_a_gpu(gpu, tmp_path, monkeypatch, capsys):
    "To its end at a tiny size; and the page on speed shows what it leaves"
    monkeypatch.setattr(gpu, 'call', lambda command, left: ('', in_this_process(command, capsys)))
    blocks = []
    def blockwise(q, k, v):
        if q.shape[1] not in blocks: blocks.append(q.shape[1])
        return blockwise_attention(q, k, v)
    monkeypatch.setattr('sagan.kernels.blockwise_attention', blockwise)
    gpu.main(['--tiny', '--device', 'cpu', '--out', str(tmp_path)])
    results = json.loads((tmp_path/'gpu.json').read_text(encoding='utf-8'))
    assert results['commit'] == 'abc1234' and re.fullmatch(r'\d{4}-\d\d-\d\d', results['date'])
    rows = {name: part['rows'] for name, part in results['parts'].items()}
    assert [r['dtype'] for r in rows['step']] == ['plain', 'float32']
    assert all(r['seconds'] > 0 and r['batch'] == 4 for r in rows['step'])
    assert [r['call'] for r in rows['attention']] == ['ours', 'direct', 'ours on a GPU']*2
    assert blocks == [1472]
    assert [r['images_in'] for r in rows['loading']] == ['host', 'device']
    assert [r['largest_difference'] for r in rows['resumed']] == [0]
    assert rows['pages'] == [{'file': '56_pace.ipynb', 'cells for a GPU': 0, 'result': 'passed'},
                             {'file': 'test_attention.py', 'result': '1 skipped'}]
    assert [(r['step'], r['images']) for r in rows['photographs']] == [(1, 4)]
    assert (tmp_path/'photographs'/'attention-seed0.png').exists()
    text = (tmp_path/'gpu.md').read_text(encoding='utf-8')
    assert text.count('### ') == 6 and 'times plain' in text and 'Not measured' not in text
    assert page_shows(tmp_path) == text


def page_shows(folder):
    "What the page on speed and scale shows of a GPU with results in a folder"
    cells = json.loads((root/'nbs'/'library'/'31_scale.ipynb').read_text(encoding='utf-8'))['cells']
    source, = [s for s in map(''.join, (c['source'] for c in cells)) if "'gpu.md'" in s]
    names = {}
    exec('from pathlib import Path\nfrom IPython.display import Markdown\n' + source, names)
    return names['show_gpu'](folder).data


def test_a_gpu_that_fails_or_is_taken_away(gpu, tmp_path):
    "What failed is listed below what was measured; without results the page says that there are none"
    assert 'ZeroDivisionError' in gpu.call([sys.executable, '-c', '1/0'], lambda: 60)[0]
    assert gpu.call([sys.executable, '-c', 'while True: pass'], lambda: .2)[0] == 'stopped after 0.2 s'
    assert [r['failed'] for r in gpu.time_steps('cpu', True, lambda: 0)] == ['no time was left']*2
    jobs = gpu.plan_steps('cuda', False)
    assert {j[:2] for j in jobs} == {(32, 64), (128, 256)} and len(jobs) == 14
    assert [j[3] for j in jobs] == [False]*10 + [True]*4
    step = dict(px=32, batch=64, without=None, compiled=False, memory_gb=1.)
    rows = [step | dict(dtype='plain', seconds=2.), step | dict(dtype='tf32', seconds=.5),
            step | dict(dtype='float16', failed='out of memory'),
            step | dict(px=128, dtype='tf32', seconds=1.)]
    parts = dict(step=dict(rows=rows, seconds=9.), pages=dict(rows=[], seconds=0., error='OSError: no pages'))
    gpu.write(tmp_path, dict(machine='a GPU', torch='2', date='today', commit=None, parts=parts))
    text = (tmp_path/'gpu.md').read_text(encoding='utf-8')
    assert all(s in text for s in ('4.00', 'out of memory', 'OSError: no pages', 'a GPU'))
    assert 'has not been measured' in page_shows(tmp_path/'none')
    assert {p.name: n for p, n in gpu.find_cuda_pages().items()} == {'21_data.ipynb': 1}

def test_pytorch_is_called_directly_with_one_head(gpu, monkeypatch):
    "Its fused kernels for a GPU take four dimensions; the result is the explicit form's"
    q, k, v = [torch.randn(2, 12, d) for d in (4, 4, 8)]
    attention, shapes = gpu.F.scaled_dot_product_attention, []
    def noted(*qkv, **kw):
        shapes.extend(t.shape for t in qkv)
        return attention(*qkv, **kw)
    monkeypatch.setattr(gpu.F, 'scaled_dot_product_attention', noted)
    assert torch.allclose(gpu.direct(q, k, v), (q @ k.mT).softmax(-1) @ v, atol=1e-5)
    assert shapes == [(2, 1, 12, 4), (2, 1, 12, 4), (2, 1, 12, 8)]


def test_the_title_tells_what_differs_from_the_preset(gpu):
    assert presets['cifar'].n_d == 5 and presets['cifar'].form == 'released'
    assert '`n_d=1` in place of its 5' in gpu.TITLES['photographs']
