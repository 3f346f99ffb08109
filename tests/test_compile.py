"`compile=True` as a training: the same numbers, and nothing compiled again once the shapes are known"
from copy import deepcopy
from shutil import which

import pytest, torch
from torch._dynamo import config
from torch._dynamo.utils import counters
from torch._inductor.config import cpp
from torch.utils.cpp_extension import get_cxx_compiler
from sagan.config import preset
from sagan.data import digits, image_dls
from sagan.kernels import compile_networks
from sagan.training import SAGAN, sagan_learner


def test_compiled_networks_keep_their_names_and_their_output():
    a = SAGAN(preset('tiny'))
    b = deepcopy(a)
    compile_networks(b)
    assert list(b.state_dict()) == list(a.state_dict())
    z, y = torch.randn(4, a.cfg.z_dim), torch.arange(4)
    for model in (a, b): model.eval()
    # without compiling
    with torch.compiler.set_stance('force_eager'): assert torch.allclose(b.G(z, y), a.G(z, y))
    assert b.G._compiled_call_impl and b.D._compiled_call_impl and b.ema._compiled_call_impl is None


@pytest.mark.skipif(which(get_cxx_compiler()) is None, reason='torch.compile on a CPU needs a C++ compiler')
def test_compiled_training_compiles_once_and_gives_the_same_numbers(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(cpp, 'simdlen', 1)  # no vectors, which take the compiler a quarter longer
    def train(compile, steps):
        dls = image_dls(digits(), 8, steps)
        learn = sagan_learner(dls, 'tiny', dtype='float32', compile=compile, lr_g=1e-4, lr_d=1e-4)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return learn
    eager, compiled = train(False, 2), train(True, 2)
    graphs = counters['stats']['unique_graphs']
    assert graphs >= 4  # G and D with and without gradients
    a, b = eager.model.state_dict(), compiled.model.state_dict()
    assert a.keys() == b.keys()  # checkpoints are the same
    for k in a: assert torch.allclose(a[k], b[k], atol=1e-3, rtol=1e-3), k
    monkeypatch.setattr(config, 'error_on_recompile', True)
    with compiled.no_bar(), compiled.no_logging(): compiled.fit(3)
    assert counters['stats']['unique_graphs'] == graphs and compiled.sagan_trainer.step == 8
