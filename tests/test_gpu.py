"What a GPU would be given, without one; and the script for a GPU at a tiny size on the CPU"
import json, sys
from pathlib import Path

import pytest, torch, torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from sagan.attention import attention_maps
from sagan.config import presets
from sagan.data import Images, MemoryLoader
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


def test_batches_reach_the_gpu():
    x, y = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64)
    images = Images(x, y, [], 'x')
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, y = next(iter(MemoryLoader(images, 8, device='cuda')))
        assert (x.device.type, y.device.type, x.dtype, x.shape) == (
            'cuda', 'cuda', torch.float32, (8, 3, 32, 32))


def test_the_script_for_a_gpu(gpu, tmp_path):
    "Its parts at a tiny size, and what it leaves; a part that failed is noted"
    steps = gpu.time_steps('cpu', True, lambda: 600)
    assert [r['dtype'] for r in steps] == ['plain', 'float32'] and all(r['seconds'] > 0 for r in steps)
    parts = dict(step=steps, attention=gpu.measure_attention('cpu', True),
                 loading=gpu.measure_loading('cpu', True), resumed=gpu.compare_resumed(tmp_path, 'cpu', True))
    assert [r['call'] for r in parts['attention']] == ['ours', 'direct']*2
    assert [r['images_in'] for r in parts['loading']] == ['host', 'device']
    assert all(r['largest_difference'] == 0 for r in parts['resumed'])
    results = dict(machine='a machine', torch='2', tiny=True,
                   parts={name: dict(rows=rows, seconds=1.) for name, rows in parts.items()})
    results['parts']['pages'] = dict(rows=[], seconds=0., error='OSError: no pages\n\n')
    gpu.write(tmp_path, results)
    assert json.loads((tmp_path/'gpu.json').read_text()) == results
    text = (tmp_path/'gpu.md').read_text()
    assert 'times plain' in text and 'OSError: no pages\n\nnot measured' in text
    assert [p.name for p in gpu.find_cuda_pages()] == ['21_data.ipynb']
