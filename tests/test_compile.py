"`compile=True` as a training: the same numbers, and nothing compiled again once the shapes are known"
import pytest, torch
from torch._dynamo import config
from torch._dynamo.utils import counters
from torch.utils.cpp_extension import get_cxx_compiler
from shutil import which
from sagan.data import digits, image_dls
from sagan.training import sagan_learner

@pytest.mark.skipif(which(get_cxx_compiler()) is None, reason='torch.compile on a CPU needs a C++ compiler')
def test_compiled_training_compiles_once_and_gives_the_same_numbers(monkeypatch):
    torch.set_num_threads(1)
    def train(compile, steps):
        learn = sagan_learner(image_dls(digits(), 8, steps), 'tiny', dtype='float32', compile=compile, lr_g=1e-4, lr_d=1e-4)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return learn
    eager, compiled = train(False, 2), train(True, 2)
    graphs = counters['stats']['unique_graphs']
    assert graphs >= 4  # G and D with and without gradients
    a, b = eager.model.state_dict(), compiled.model.state_dict()
    assert a.keys() == b.keys()                                               # checkpoints are the same
    for k in a: assert torch.allclose(a[k], b[k], atol=1e-3, rtol=1e-3), k
    monkeypatch.setattr(config, 'error_on_recompile', True)
    with compiled.no_bar(), compiled.no_logging(): compiled.fit(3)
    assert counters['stats']['unique_graphs'] == graphs and compiled.sagan_trainer.step == 8
