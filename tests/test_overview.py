"What the pages say in words agrees with what was measured"
import json, re

from readme import root
from sagan.experiments import load_experiment
from sagan.outcomes import table

nbs = root/'nbs'


def cells(page): return json.loads((nbs/page).read_text(encoding='utf-8'))['cells']
def rows(page, start):
    lines = [l for c in cells(page) for l in ''.join(c['source']).splitlines()]
    return [l for l in lines if l.startswith(start)]


def test_digits():
    "The default run: the overview has the scores that its page has printed, and the page its numbers"
    row, = rows('index.ipynb', '| Digits')
    page = cells('library/30_cli.ipynb')
    evaluated, = [c for c in page if 'sagan_eval, str(default)' in ''.join(c['source'])]
    printed = ''.join(evaluated['outputs'][0]['text'])
    words = 'fid|FID|recall|accuracy|class recognized|diversity'
    numbers = re.findall(rf'^({words}) +([\d.]+)(%?)$', printed, re.M)
    # in the order in which they are printed
    fid, recall, accuracy, diversity = [float(n)/(100 if percent else 1) for _, n, percent in numbers]
    scores = f'FID {fid:.2f}', f'{accuracy:.1%} of', f'recall {recall:.2f}', f'diversity {diversity:.2f}'
    assert not [said for said in scores if said not in row]
    outputs = json.dumps([c.get('outputs') for c in page])
    numbers = '1800 steps in 90 s', 'trained on 1438 images of digits', '98.9% right'
    assert not [number for number in numbers if number not in outputs]


def test_speed():
    stored = json.loads((nbs/'benchmarks/step-amx.json').read_text(encoding='utf-8'))['rows']
    times = {(r['px'], r['dtype']): r['seconds'] for r in stored if not r['compiled'] and not r['without']}
    ratios = [f"{times[128, 'plain']/times[128, d]:.1f}" for d in ('float32', 'bfloat16')]
    assert ratios == ['2.3', '6.7']


def test_claim():
    "Twins: D's AUC and agreement beyond luck, for each placement of attention"
    in_d, both, without = rows('index.ipynb', '| Twins')
    claim = {r['row']: r for r in table(load_experiment(nbs/'experiments/claim'))}
    for name, row in {'attention in D': in_d, 'attention in both': both}.items():
        assert name in row and f"{claim[name]['d_auc']:.1%} ± {claim[name]['d_auc sd']:.1%}" in row, name
    best, *others = [claim[name] for name in ('attention in both', *claim.keys() - {'attention in both'})]
    assert f"{best['kappa']:.2f} ± {best['kappa sd']:.2f}" in both
    assert all(r['kappa'] < .02 for r in others)
    assert '0.02 or less' in in_d and '50.0% | 0.02 or less' in without
    for name in ('no attention', 'attention in G', 'residual block in both'):
        assert f"{claim[name]['d_auc']:.1%}" == '50.0%'
        assert claim[name]['d_auc sd'] < .001
