"What a configuration rejects, how it reads older files, and that the presets are those of their sources"
import pytest
from sagan.config import Config, for_size, preset, presets, systems

cfg = Config(batch=16)


@pytest.mark.parametrize('changes, message', [
    (dict(lr=1e-3), 'did you mean lr_g or lr_d'),
    (dict(lr_g=0.), 'lr_g must be positive'),
    (dict(size=48), 'size must be 32, 64, 128 or 256'),
    (dict(g_attention=16), 'must be a tuple of feature map sizes'),
    (dict(g_width=0), 'g_width must be a whole number, at least 1, or a tuple of such, got 0'),
    (dict(batch=1), 'batch must be a whole number, at least 2'),
    (dict(accumulate=3), 'accumulate must divide the batch of 16 images, got 3'),
    (dict(accumulate=2, bn_group=16), 'bn_group must divide the 8 images that go through G at once'),
    (dict(class_tables='ones'), "class_tables is 'zeros' or 'xavier', got 'ones'"),
    (dict(form='pooled'), "form is 'preprint' or 'published' or 'released' or 'residual'"),
    (dict(ema=1.), r'ema must be in \[0, 1\)'),
])
def test_impossible_values_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message): cfg.change(**changes)


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
