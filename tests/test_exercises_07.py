"The exercises of page 07: each check accepts the page's solution and refuses wrong answers"
import json
from pathlib import Path

import pytest
from readme import directives

page = Path(__file__).resolve().parent.parent/'nbs/07_evaluation.ipynb'
cells = [directives(''.join(c['source'])) for c in json.loads(page.read_text(encoding='utf-8'))['cells']
         if c['cell_type'] == 'code']
at = [i for i, (names, _) in enumerate(cells) if names.get('code-summary') == '"Solution"']
solutions, checks = [[cells[i + n][1] for i in at] for n in (0, 1)]
IMPORTS = '''
import math, torch
from fastcore.test import *
from sagan.evaluation import frechet_distance, inception_score
from sagan.references import feature_statistics
'''


def check(number, answer):
    found = {}
    for source in (IMPORTS, answer, checks[number - 1]): exec(source, found)


@pytest.mark.parametrize('number', [1, 2, 3])
def test_solutions(number): check(number, solutions[number - 1])


ENTROPY = '    def entropy(p): return -torch.xlogy(p, p).sum(-1)\n'


@pytest.mark.parametrize('answer', [
    'entropy(p.mean(0)).exp().item()', '(entropy(p.mean(0)) - entropy(p).mean()).item()',
    '(entropy(p).mean() - entropy(p.mean(0))).exp().item()', '(-entropy(p).mean()).exp().item()'])
def test_wrong_scores(answer):
    with pytest.raises(AssertionError): check(1, f'def score_by_entropies(p):\n{ENTROPY}    return {answer}')


@pytest.mark.parametrize('answer', [
    '(a - b).square().mean().item()', '(a.sort().values - b.sort().values).abs().mean().item()',
    '(a.sort().values - b.sort().values).square().mean().sqrt().item()',
    '((a.mean() - b.mean())**2 + (a.std() - b.std())**2).item()'])
def test_wrong_distances(answer):
    with pytest.raises(AssertionError): check(2, f'def w2_squared(a, b): return {answer}')


@pytest.mark.parametrize('answer', [
    '(distance < yardstick.min())', '(distance < yardstick.median())', '(distance < yardstick.quantile(.99))',
    '(yardstick < distance.quantile(.01))', '(distance > yardstick.quantile(.01))'])
def test_wrong_shares(answer):
    answer = f'def share_of_copies(distance, yardstick): return {answer}.double().mean().item()'
    with pytest.raises(AssertionError): check(3, answer)
