"What a configuration rejects, how it reads older files, and that the presets are those of their sources"
import math
from dataclasses import fields
from fractions import Fraction

import numpy as np, pytest, torch
from sagan.config import Config, for_size, preset, presets, systems

cfg = Config(batch=16)


@pytest.mark.parametrize('changes, message', [
    (dict(lr=1e-3), 'did you mean lr_g or lr_d'),
    (dict(lr_g=0.), 'lr_g must be positive'),
    (dict(size=48), 'size must be 32, 64, 128 or 256'),
    (dict(g_attention=16), 'must be a tuple of feature map sizes'),
    (dict(g_width=0), 'g_width must be a whole number, at least 1, or a tuple of such numbers, got 0'),
    (dict(batch=1), 'batch must be a whole number, at least 2'),
    (dict(accumulate=3), 'accumulate must divide the batch of 16 images, got 3'),
    (dict(accumulate=2, bn_group=16), 'bn_group must divide the 8 images that go through G at once'),
    (dict(class_tables='ones'), "class_tables must be 'zeros' or 'xavier', got 'ones'"),
    (dict(form='pooled'), "form must be 'preprint' or 'published' or 'released' or 'residual'"),
    (dict(ema=1.), r'ema must be in \[0, 1\)'),
    (dict(g_sn=1), 'g_sn must be True or False, got 1'),
    (dict(data=5), 'data must be the name of a data set or a folder, got 5'),
    (dict(data=''), 'data must be'),
    (dict(seed=2**63), 'seed must be at most'),
    (dict(seed=-2**63 - 1), 'seed must be a whole number, at least -'),
    (dict(g_width=2**16 + 1), 'g_width must be at most 65,536'),
    (dict(d_width=(8, 10**30)), 'd_width must be at most 65,536'),
    (dict(g_attention=(16, True)), 'g_attention must be a whole number'),
    (dict(lr_d=10**400), 'lr_d must be positive and finite'),
])
def test_impossible_values_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message): cfg.change(**changes)


@pytest.mark.parametrize('name', [f.name for f in fields(Config)])
def test_values_of_another_type_are_rejected(name):
    "In one sentence that names the field: bools are no numbers, text is none, 1.0 is no whole number"
    is_flag, is_text, is_number = (isinstance(getattr(cfg, name), t) for t in (bool, str, float))
    wrong = [None, 'x', [None], {}, b'1', math.nan, math.inf, -math.inf, 10**400, 1j, torch.tensor(1),
             np.float32('nan'), np.array([1, 2])]
    if not is_flag: wrong += [True, np.True_]
    if not is_number: wrong += [1., Fraction(32, 1), np.float64(32)]
    for value in wrong:
        if is_text and name == 'data' and isinstance(value, str): continue
        with pytest.raises(ValueError, match=rf'^{name} (must|is) .*got ') as e: cfg.change(**{name: value})
        assert '\n' not in str(e.value)


def test_numbers_of_numpy_become_those_of_python():
    whole = cfg.change(steps=np.int64(7), seed=np.uint8(3), size=np.int32(64), g_width=np.int64(8),
                       d_width=[np.int64(8)]*4, g_attention=[np.int64(16)])
    assert whole == cfg.change(steps=7, seed=3, size=64, g_width=8, d_width=(8,)*4, g_attention=(16,))
    assert {type(getattr(whole, n)) for n in ('steps', 'seed', 'size', 'g_width')} == {int}
    assert type(whole.g_attention[0]) is type(whole.d_width[3]) is int
    assert type(cfg.change(lr_g=np.float32(.5)).lr_g) is float and cfg.change(seed=-1).seed == -1


def test_older_names_of_forms_are_read():
    assert [cfg.change(form=old).form for old in ('paper', 'official')] == ['preprint', 'released']


def test_lists_from_json_become_tuples():
    lists = cfg.change(d_width=[8, 8, 8, 16], d_attention=[16, '8-2'])
    assert lists == cfg.change(d_width=(8, 8, 8, 16), d_attention=(16, '8-2'))


def test_batch_norm_groups_and_class_tables_of_the_large_presets():
    large = {k: (p.bn_group, p.class_tables) for k, p in presets.items() if p.size == 128 and '-' not in k}
    assert large == dict(paper=(0, 'zeros'), official=(64, 'zeros'), biggan=(32, 'xavier'))


def test_an_unknown_preset_suggests_others():
    with pytest.raises(ValueError, match="no preset 'table1-feat23'; did you mean table1-feat32"):
        preset('table1-feat23')
    with pytest.raises(ValueError, match="there is no preset 'huge'; did you mean one of paper, official"):
        preset('huge')


def test_the_systems_of_the_paper():
    assert presets['table1-feat32'] == presets['paper']
    assert presets['table2-sagan'] == presets['table1-feat64']
    b = presets['figure3-sn-d-5to1']
    assert (b.g_sn, b.lr_g, b.lr_d, b.n_d, b.g_attention) == (False, 2e-4, 2e-4, 5, ())
    small = systems(presets['small'])
    found = [small[f'table1-{k}'].g_attention for k in ('none', 'feat8', 'feat32', 'feat64', 'residual64')]
    assert found == [(), (8,), (8,), (16,), (16,)]
    assert small['figure3-sn-gd'].lr_g == small['figure3-sn-gd'].lr_d


def test_attention_moves_with_the_size():
    assert for_size(presets['paper'].change(d_attention=(8, 32, 64)), 32).d_attention == (8, 16)
    assert for_size(presets['small'], 64) == presets['small'].change(size=64)
