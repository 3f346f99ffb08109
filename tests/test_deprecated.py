"Names of earlier versions: each gives what it means now, with a warning that says where that is"
import importlib, json, subprocess, sys, warnings
from pathlib import Path

import pytest, torch
import sagan
from sagan.deprecated import MOVED

# {module: what its `__all__` was}
former = json.loads((Path(__file__).parent/'old/public_names.json').read_text(encoding='utf-8'))
moved = [(module, old, new) for module, names in MOVED.items() for old, new in names.items()]


@pytest.mark.parametrize('module, old, new', moved, ids=[f'{m}.{old}' for m, old, _ in moved])
def test_moved(module, old, new):
    "The same object under both names, one warning that names the new one, and it is no older name itself"
    home, _, name = new.rpartition('.')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        there = getattr(importlib.import_module(f'sagan.{module}'), old)
    messages = [str(w.message) for w in caught if w.category is DeprecationWarning]
    message, = [m for m in messages if f'sagan.{module}.{old}' in m]
    assert f'sagan.{new}' in message
    assert there is vars(importlib.import_module(f'sagan.{home}'))[name]


@pytest.mark.parametrize('module', former)
def test_every_former_name(module):
    "Whatever could be imported from a module before can be imported from it now"
    m = importlib.import_module(f'sagan.{module}')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        assert not [name for name in former[module] if not hasattr(m, name)]


def test_keywords_and_attributes():
    "AC-GAN's losses take older keywords; batch norm and the writer of a run have their older attributes"
    from sagan.conditioning import BatchNorm2d
    from sagan.losses import d_acgan_loss
    from sagan.recording import RunWriter
    a, b, c, d = torch.arange(8.).view(4, 2).unbind()
    with pytest.warns(DeprecationWarning, match='class_loss_fake'):
        loss = d_acgan_loss(a, b, c, surprise_fake=d)
    assert loss == d_acgan_loss(a, b, c, d)
    bn = BatchNorm2d(4)
    with pytest.warns(DeprecationWarning, match='use sync'): bn.together = False
    assert bn.sync is False and 'together' not in bn.state_dict()
    with pytest.warns(DeprecationWarning, match='use save_samples'):
        assert RunWriter('run').sample.__func__ is RunWriter.save_samples


def test_unknown_name():
    "A name that never was is an error as in any module"
    with pytest.raises(AttributeError, match="'sagan.data' has no attribute 'nothing'"): sagan.data.nothing
    with pytest.raises(ImportError): exec('from sagan.attention import nothing')


def test_own_code_uses_new_names():
    "Importing the whole package uses no older name"
    code = ("import warnings\n"
            "warnings.filterwarnings('error', '.*is an older name', DeprecationWarning)\n"
            "import sagan.all, sagan.cli")
    subprocess.run([sys.executable, '-c', code], check=True)
