"Everything that trains, draws and measures, on a GPU that `pretended` stands in for"
import os
from contextlib import nullcontext
from unittest.mock import patch

import pytest, torch
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only
import sagan.measuring
from pretended import NAME, Pretended, set_up, There
from sagan import devices
from sagan.data import digits, image_dls
from sagan.networks import generate
from sagan.attention import attention_maps
from sagan.references import Classifier, Evaluator
from sagan.runs import *
from sagan.sampling import nearest_run, sample_run
from sagan.walks import walk_run
from sagan.training import sagan_learner
from sagan.visualization import attention_figure

_Generator, _tensor, _save, _load = torch.Generator, torch.tensor, torch.save, torch.load


class Chance(_Generator):
    "A generator of the CPU that says it is elsewhere"
    def __new__(cls, device): return super().__new__(cls)
    def __init__(self, device): self.where = device
    device = property(lambda self: self.where)


def save(value, file): _save(tree_map_only(There, lambda t: t.here, value), file)


def load(file, map_location='cpu', **options):
    return tree_map_only(torch.Tensor, lambda t: t.to(map_location), _load(file, **options))


@pytest.fixture
def gpu(monkeypatch):
    "The pretended GPU, which the library takes for a Mac's"
    try: set_up()
    except ImportError: pytest.skip('PyTorch before 2.9 has no devices in Python')
    kind = devices._kind
    monkeypatch.setattr(devices, '_kind', lambda device: 'mps' if kind(device) == NAME else kind(device))
    monkeypatch.setattr(devices, 'check_device', str)
    monkeypatch.setattr(devices, 'synchronize', lambda device: None)
    monkeypatch.setattr(devices, 'free_device_memory', lambda device: 1e12)
    monkeypatch.setattr(torch, 'Generator', lambda device='cpu': Chance(torch.device(device)))
    for f in (save, load): monkeypatch.setattr(torch, f.__name__, f)
    monkeypatch.setattr(torch, 'tensor', lambda data, device=None, **kw: _tensor(data, **kw).to(device or 'cpu'))
    monkeypatch.setenv('SAGAN_DEVICE', NAME)
    # as on a GPU, a parameter stays the same object when it moves
    monkeypatch.setattr(torch.__future__, '_swap_module_params_on_conversion', True)
    with Pretended(), torch.autograd.set_multithreading_enabled(False): yield NAME



def test_quick_start(gpu, capsys):
    "Learner and loaders choose the GPU, and say so; the numbers are those of the CPU"
    def trained(device=None):
        torch.manual_seed(0)
        learn = sagan_learner(image_dls(digits(), 16, 3, device=device), 'tiny', z_dim=8, dtype='float32')
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return learn
    learn, other = trained(), trained('cpu')
    assert capsys.readouterr().out.count(f'training on {gpu}') == 1
    assert learn.sagan_trainer.dtype == 'float32'
    for net, device in ((learn.model, gpu), (other.model, 'cpu')):
        assert {t.device.type for t in net.state_dict().values()} == {device}
    for k in ('d_loss', 'g_loss'): assert_close(*[l.sagan_trainer.figures()[k] for l in (learn, other)], rtol=1e-4, atol=0)
    G = learn.model.ema
    x = generate(G, y=torch.arange(10))
    z, y = torch.randn(2, G.z_dim), torch.tensor([3, 8])
    x, maps = attention_maps(G, z, y)
    attention_figure(x, maps[-1])
    learn.show_results(2)


def test_a_run(gpu, tmp_path, monkeypatch, capsys):
    "All that commands do with a run"
    monkeypatch.chdir(tmp_path)
    import time; t=time.time()
    def lap(w):
        nonlocal t; 
        with capsys.disabled(): print(w, round(time.time()-t,2))
        t=time.time()
    def untrained(images, *args): return Evaluator(Classifier(10), 'untrained', .9)
    monkeypatch.setattr(sagan.measuring, 'train_evaluator', untrained)
    run = train_run('digits', preset='tiny', steps=2, z_dim=8, measure_every=2, samples=20, batch=8,
                    diffaug='color,translation,cutout')
    lap('train')
    assert f'on {gpu} in float32' in capsys.readouterr().out
    run = resume_run(run, steps=4)
    lap('resume')
    sample_run(run, 2, truncation=1.)
    lap('sample')
    attend_run(run, n=2)
    lap('attend')
    walk_run(run, frames=2)
    lap('walk')
    evaluate_run(run, 20, standing=8)
    lap('eval')
    explore_run(run, out='page.html')
    lap('explore')
    report_run(run)
    lap('report')
    nearest_run(run)
    lap('nearest')
