"The choice of a device; and all that trains, draws and measures, on a GPU that `pretended` stands in for"
import os

import pytest, torch
from pretended import NAME, Pretended, set_up, There
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only
from sagan import devices, measuring, options, runs
from sagan.attention import attention_maps
from sagan.checks import free_memory
from sagan.data import digits, image_dls
from sagan.networks import generate
from sagan.references import Classifier, Evaluator
from sagan.runs import attend_run, evaluate_run, explore_run, report_run, resume_run, train_run
from sagan.sampling import sample_run
from sagan.training import sagan_learner
from sagan.visualization import attention_figure
from sagan.walks import walk_run

_Generator, _tensor, _save, _load = torch.Generator, torch.tensor, torch.save, torch.load


class Chance(_Generator):
    "A generator of the CPU that says it is elsewhere"
    def __new__(cls, device): return super().__new__(cls)
    def __init__(self, device): self.where = device
    device = property(lambda self: self.where)


def tensor(data, device='cpu', **options): return _tensor(data, **options).to(device)


def untrained(images, **_): return Evaluator(Classifier(10), 'untrained', .9)


def save(value, file): _save(tree_map_only(There, lambda t: t.here, value), file)


def load(file, map_location='cpu', **options):
    return tree_map_only(torch.Tensor, lambda t: t.to(map_location), _load(file, **options))


@pytest.fixture
def gpu(monkeypatch):
    "The pretended GPU, which the library takes for a Mac's"
    try: set_up()
    except ImportError: pytest.skip('PyTorch before 2.9 has no devices in Python')
    monkeypatch.setattr(torch.pretended, 'available', True)
    kind = devices._kind
    monkeypatch.setattr(devices, '_kind', lambda device: 'mps' if kind(device) == NAME else kind(device))
    monkeypatch.setattr(devices, 'check_device', str)
    monkeypatch.setattr(devices, 'synchronize', lambda device: None)
    monkeypatch.setattr(devices, 'free_device_memory', lambda device: 1e12)
    monkeypatch.setattr(torch, 'Generator', lambda device='cpu': Chance(torch.device(device)))
    for f in (save, load): monkeypatch.setattr(torch, f.__name__, f)
    monkeypatch.setattr(torch, 'tensor', tensor)
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
    figures = [trained.sagan_trainer.figures() for trained in (learn, other)]
    for k in ('d_loss', 'g_loss'): assert_close(*[f[k] for f in figures], rtol=1e-4, atol=0)
    G = learn.model.ema
    x = generate(G, y=torch.arange(10))
    z, y = torch.randn(2, G.z_dim), torch.tensor([3, 8])
    x, maps = attention_maps(G, z, y)
    attention_figure(x, maps[-1])
    learn.show_results(2)


def test_a_run(gpu, tmp_path, monkeypatch, capsys):
    "All that commands do with a run"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, 'train_evaluator', untrained)
    with monkeypatch.context() as m:
        m.setattr(runs, '_write_report', lambda *_: None)  # comes last
        run = train_run('digits', preset='tiny', steps=1, z_dim=16, batch=4,
                        diffaug='color,translation,cutout')
        assert f'on {gpu} in float32' in capsys.readouterr().out
        run = resume_run(run, steps=2)
        begun = train_run(init_from=run.folder, out='begun', steps=1)  # a folder is loaded on the CPU
    sample_run(run, 1, classes=[3], truncation=1.)
    attend_run(run, n=1)
    walk_run(run, [0, 1], frames=1)
    evaluate_run(run, 10, standing=8)
    explore_run(run, out='page.html')
    report_run(run)
    for r in (run, begun): assert {t.device.type for t in r.model.state_dict().values()} == {gpu}
    made = {'samples-seed0-truncation1.0-n1-classes3.png', 'attention-seed0-n1.png', 'report.html',
            'walk-seeds0,1-frames1.gif', 'eval-n10-standing8.json'}
    assert made <= set(os.listdir(run.folder)) and os.path.exists('page.html')


@pytest.mark.parametrize('there, several, chosen', [
    ('cuda mps cpu', 1, 'cuda'), ('mps cpu', 1, 'mps'), ('cpu', 1, 'cpu'),
    ('cuda mps cpu', 2, 'cuda'), ('mps cpu', 2, 'cpu')])
def test_the_default(monkeypatch, there, several, chosen):
    "A GPU if there is one; several processes cannot use a Mac's"
    monkeypatch.setattr(devices, '_is_there', lambda kind: kind in there.split())
    monkeypatch.delenv('SAGAN_DEVICE')
    monkeypatch.setenv('WORLD_SIZE', str(several))
    assert devices.find_device() == chosen


@pytest.mark.parametrize('name', ['mps', 'mps:0'])
def test_several_processes_cannot_use_mps(monkeypatch, name):
    monkeypatch.setattr(devices, '_is_there', lambda kind: True)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='not on mps; choose another device'): devices.find_device(name)
    monkeypatch.setenv('SAGAN_DEVICE', name)
    with pytest.raises(ValueError, match='not on mps; choose another device'): devices.find_device()


def test_the_memory_of_mps(monkeypatch):
    "What PyTorch recommends without what it has taken; where there is no such GPU, nothing is known"
    monkeypatch.setattr(torch.mps, 'recommended_max_memory', lambda: 12*10**9)
    monkeypatch.setattr(torch.mps, 'driver_allocated_memory', lambda: 2*10**9)
    for there, free in ((True, 10*10**9), (False, float('inf'))):
        monkeypatch.setattr(devices, '_is_there', lambda kind: there)
        assert free_memory('mps') == free


def test_the_memory_of_cuda(monkeypatch):
    "What is free, and what PyTorch has freed but kept"
    monkeypatch.setattr(devices, '_is_there', lambda kind: True)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (3*10**9, 8*10**9))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 4*10**9)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 10**9)
    assert free_memory('cuda:1') == 6*10**9


@pytest.mark.parametrize('name', ['mps', 'mps:0', 'cuda', 'cuda:7'])
def test_a_device_that_is_missing(monkeypatch, name):
    monkeypatch.setattr(devices, '_is_there', lambda kind: kind == 'cpu')
    with pytest.raises(ValueError) as e: devices.check_device(name)
    assert str(e.value) == f"the device '{name}' is not available (PyTorch finds none); cpu always works"


@pytest.mark.parametrize('name', ['xla', 'warp', 'x'*5000])
def test_other_devices_are_refused_in_a_sentence(name):
    with pytest.raises(ValueError, match='is not available .*; cpu always works') as e:
        devices.check_device(name)
    assert len(str(e.value)) < 250


def test_help_names_all_kinds():
    "The command line lists them without loading PyTorch"
    assert options._WORDS['device'] == devices.KINDS
