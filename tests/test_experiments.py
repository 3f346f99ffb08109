"Rows, tables and figures of experiments, and the numbers that the pages say about the stored ones"
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import pytest
from sagan.config import Config, presets, systems
from sagan.experiments import experiments, load_experiment, Row, Variant, variants
from sagan.outcomes import curves_figure, format_score, strips_figure, table, table_markdown
from sagan.storage import read_json

stored = Path(__file__).resolve().parent.parent/'nbs'/'experiments'
small = presets['small']


@pytest.fixture(scope='module')
def done():
    "The three experiments of the paper that are stored beside the pages"
    names = 'table1-twins', 'figure3-digits', 'table2-digits'
    return {name: load_experiment(stored/name) for name in names}


def last(results, key):
    return {variant.name: [s[-1][key] for s in seeds] for variant, seeds in results}


# Rows and variants

def test_every_system_is_in_some_experiment():
    rows = [r for rows in experiments.values() for r in rows]
    assert all(isinstance(r, Row) and r.system in presets for r in rows)
    assert {r.system for r in rows} == systems(presets['paper']).keys()


def test_rows_that_are_one_network_at_32_pixels():
    assert [len(variants(e, small)) for e in experiments] == [5, 3, 4, 5, 3]
    variant = variants('table1', small)[-1]
    assert isinstance(variant, Variant) and variant.rows == (experiments['table1'][-1],)
    assert variant.cfg.form == 'residual'


@pytest.mark.parametrize('experiment, changes, message', [
    ('figure3', dict(g_sn=False), 'set g_sn, so the base'),
    ('table1', dict(form='residual'), "some rows of table 1 set form to 'residual'"),
    ('table3', {}, 'the experiments are table1, table2, figure3, claim, local')])
def test_unknown_experiments_and_bases_that_set_what_rows_differ_in(experiment, changes, message):
    with pytest.raises(ValueError, match=message): variants(experiment, small.change(**changes))


@pytest.mark.parametrize('message, f', [
    ('there is no experiment', lambda: variants(['table1'], small)),
    ("base must be a Config, such as preset", lambda: variants('table1', 'small')),
    ('results must be what load_experiment returns', lambda: table([])),
    ('results must be what load_experiment returns', lambda: curves_figure('results')),
    ('results must be what load_experiment returns', lambda: strips_figure(stored, None, 0)),
    ("there is no column 'fids'; the columns are row", lambda: table_markdown([], ['fids']))])
def test_arguments_of_the_wrong_kind(message, f):
    with pytest.raises(ValueError, match=message): f()


# Tables and figures

@pytest.fixture
def broken(done):
    "A variant of three seeds, of which the last diverged at its first measurement"
    variant, seeds = done['figure3-digits'][0]
    return variant, [*seeds[:2], [dict(seeds[2][0], diverged=True, fid=None)]]


def test_a_row_of_the_table(done, broken):
    variant, seeds = done['figure3-digits'][0]
    row = table(done['figure3-digits'])[0]
    assert row['fid'] == pytest.approx(mean(s[-1]['fid'] for s in seeds))
    assert row['best fid'] < row['fid']
    row, = table([broken])
    assert (row['diverged'], row['seeds']) == (1, 3)
    assert row['fid'] == pytest.approx(mean(s[-1]['fid'] for s in seeds[:2]))


def test_the_table_in_markdown(done, broken):
    row = table(done['figure3-digits'])[0]
    text = table_markdown([row, *table([broken])])
    for part in ('5.28 ± 0.38', 'SN on D (**1 of 3 diverged**)', '181.84 (10k)'): assert part in text
    assert 'agreement' not in text
    narrow = '| row | FID |\n| --- | --- |\n| SN on D | 5.28 ± 0.38 |'
    assert table_markdown([row], ['row', 'FID']) == narrow
    assert format_score(row, 'fid') == '5.28 ± 0.38'
    assert format_score(dict(fid=5.3, **{'fid sd': None}), 'fid', '.1f') == '5.3'
    assert format_score(row, 'kappa') == ''


def test_curves_leave_out_a_seed_that_diverged(broken):
    variant, seeds = broken
    fig = curves_figure([broken])
    plt.close(fig)
    assert [ax.get_title('left') for ax in fig.axes] == ['FID (lower is better)', 'Inception score']
    *thin, thick = fig.axes[0].get_lines()
    assert len(thin) == 2  # the third seed has no FID at all
    means = [mean(r['fid'] for r in records) for records in zip(*seeds[:2])]
    assert thick.get_ydata().tolist() == pytest.approx(means)
    assert thick.get_label() == 'SN on D (2 of 3 seeds)'


# The stored experiments, and what page 10 says about them

@pytest.mark.parametrize('name, steps, every, minutes', [
    ('table1-twins', 2400, 800, 85), ('figure3-digits', 600, 100, 16), ('table2-digits', 600, 300, 9)])
def test_the_stored_experiments_are_of_the_small_preset(done, name, steps, every, minutes):
    settings = read_json(stored/name/'experiment.json')
    base = Config().change(**settings['base'])  # also from an older version's names
    for k in ('g_width', 'd_width', 'lr_g', 'lr_d', 'batch', 'form'):
        assert getattr(base, k) == getattr(small, k)
    assert settings['base']['dtype'] == 'float32'
    assert (settings['base']['steps'], settings['every'], settings['seeds']) == (steps, every, 3)
    records = [r for _, seeds in done[name] for s in seeds for r in s]
    assert round(sum(r['seconds'] for r in records)/60) == minutes
    assert {r['samples'] for r in records} == {1000}


def test_first_and_last_fid_of_figure_3(done):
    _, seeds = done['figure3-digits'][0]
    assert len(seeds) == 3 and seeds[0][0]['fid'] > seeds[0][-1]['fid']


def test_table_1_on_twins(done):
    results = done['table1-twins']
    keys = 'agreement', 'fid', 'colour_pairs', 'accuracy'
    agreement, fid, pairs, right = [last(results, k) for k in keys]
    others = [a for name, a in agreement.items() if name != 'table1-feat64']
    assert min(agreement['table1-feat64']) > max(map(max, others))
    assert max(pairs, key=lambda name: mean(pairs[name])) == 'table1-feat64'
    assert mean(pairs['table1-feat64']) == pytest.approx(17, abs=.5)
    ours = fid['table1-feat64']
    assert all(min(ours) < max(f) and max(ours) > min(f) for f in fid.values())  # overlapping ranges
    assert max(mean(fid['table1-residual8']), mean(fid['table1-residual64'])) < mean(fid['table1-none'])
    assert all(.45 < mean(a) < .55 for a in right.values())
    assert max(agreement['table1-feat64']) < .27
    assert mean(agreement['table1-feat8']) < max(agreement['table1-none'])


def rises(seed):
    "The sum of all rises of FID from one measurement to the next"
    fids = [r['fid'] for r in seed]
    return sum(max(0, b - a) for a, b in zip(fids, fids[1:]))


def test_what_stabilizes_training(done):
    results = done['figure3-digits']
    rows = {v.name: row for (v, _), row in zip(results, table(results))}
    unsteady = {v.name: mean(rises(s) for s in seeds) for v, seeds in results}
    assert unsteady['figure3-sn-d'] > 2*unsteady['figure3-sn-gd']
    assert unsteady['figure3-sn-d'] > 2*unsteady['figure3-sn-gd-ttur']
    fid = last(results, 'fid')
    assert mean(fid['figure3-sn-gd']) < mean(fid['figure3-sn-d'])
    assert max(fid['figure3-sn-gd']) > min(fid['figure3-sn-d'])
    assert all(r['diversity'] > 1 for _, seeds in results for s in seeds for r in s)  # nothing collapses
    # TTUR adds nothing that could be seen
    ttur, without, baseline = [rows[f'figure3-{n}'] for n in ('sn-gd-ttur', 'sn-gd', 'sn-d')]
    assert abs(ttur['fid'] - without['fid']) < without['fid sd']
    assert min(fid['figure3-sn-d-5to1']) > max(fid['figure3-sn-d'])
    assert rows['figure3-sn-d-5to1']['seconds_per_step'] < .6*baseline['seconds_per_step']


def test_the_three_systems_of_table_2(done):
    rows = {row['row']: row for row in table(done['table2-digits'])}
    ours = rows['SAGAN']
    for name in ('AC-GAN', 'SNGAN-projection'):
        assert rows[name]['fid'] - rows[name]['fid sd'] > 2*ours['fid']
        assert rows[name]['seconds_per_step'] < .6*ours['seconds_per_step']
        assert (rows[name]['g_steps'], ours['g_steps']) == (120, 600)
    ttur = next(row for row in table(done['figure3-digits']) if row['row'] == 'SN on G/D + TTUR')
    assert abs(ttur['fid'] - ours['fid']) < ttur['fid sd']  # attention or not: within a spread


# What page 10 says about the test of the claim; the page of the claim has the rest

def test_does_attention_help():
    rows = {row['row']: row for row in table(load_experiment(stored/'claim'))}
    auc = [rows[name]['d_auc'] for name in ('attention in D', 'attention in both')]
    assert [f'{a:.1%}' for a in auc] == ['66.6%', '63.8%']
    for name in ('no attention', 'attention in G', 'residual block in both'):
        assert f'{rows[name]["d_auc"]:.1%}' == '50.0%'
    assert f"{rows['attention in both']['kappa']:.2f}" == '0.11'
    assert all(row['kappa'] < .02 for name, row in rows.items() if name != 'attention in both')
    assert all(abs(rows[f'attention in {where}']['d_auc_gamma0'] - .5) < .001 for where in ('D', 'both'))


@pytest.mark.parametrize('gap', [18, 24])
def test_only_attention_sees_both_twins(gap):
    auc = last(load_experiment(stored/f'local-gap{gap}'), 'd_auc')
    for name in ('local-conv', 'local-residual'): assert auc[name] == pytest.approx([.5]*3, abs=1e-6)
    assert min(auc['local-attention']) > .53
