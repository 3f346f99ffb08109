"Agreement beyond luck where users meet it: logs, sagan-eval, the model card, and tools/claim.py"
import json
import subprocess
import sys
from pathlib import Path

import claim
import ship
import pytest
import torch
from sagan.checkpoints import read_log
from sagan.runs import load_run, shipped, SHIPPED
from sagan.cli import sagan_eval, sagan_train
from sagan.data import named_twins, to_unit, twin_colours, twins
from sagan.agreement import agreement, agreement_auc
from sagan.experiments import load_experiment
from sagan.networks import Discriminator
from sagan.outcomes import table, table_markdown

FIELDS = {'two_twins', 'observed', 'luck', 'kappa', 'kappa_error', 'kappa_classes', 'colour_pairs', 'd_auc',
          'd_auc_error', 'd_auc_gamma0'}
# The first ten images of version 0.1.0: colors of the left twin, classes, and the mean of 50 images
PAIRS = [23, 9, 26, 28, 32, 14, 1, 21, 35, 27]
CLASSES = [1, 0, 1, 0, 2, 3, 3, 0, 2, 1]
MEAN = 115.459
TINY = dict(preset='tiny', steps=6, batch=8, z_dim=8, measure_every=3, samples=40)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A tiny measured run on twins"
    out = tmp_path_factory.mktemp('claim')/'run'
    sagan_train(data='twins', out=str(out), device='cpu', **TINY)
    return out


def test_a_measured_run_logs_both_measures(run):
    measured = [r for r in read_log(run) if 'fid' in r]
    assert [r['step'] for r in measured] == [3, 6]
    for r in measured:
        assert FIELDS <= r.keys()
        assert r['kappa'] <= 1 and 0 <= r['luck'] <= 1 and 0 <= r['d_auc'] <= 1


def test_sagan_eval_prints_and_stores_them(run, capsys):
    sagan_eval(str(run), n=40)
    output = capsys.readouterr().out
    stored = json.loads((run/'eval-n40.json').read_text(encoding='utf-8'))
    assert FIELDS <= stored.keys()
    D = load_run(run).model.D
    assert (stored['d_auc'], stored['d_auc_error']) == agreement_auc(D)
    for layer in D.attention.values(): torch.nn.init.zeros_(layer.gamma)
    assert stored['d_auc_gamma0'] == agreement_auc(D)[0]
    words = {line[:18].strip() for line in output.splitlines()}
    assert words >= {'two twins', 'twins that agree', 'by luck', 'kappa', "D's AUC", 'with gamma 0'}


def test_the_card_says_them(run):
    from sagan.sharing import PretrainedSAGAN
    card = str(PretrainedSAGAN.from_pretrained(run).generate_model_card())
    assert '| kappa | D' in card


def test_measuring_leaves_gamma_as_it_was(run):
    before = {k: v.clone() for k, v in load_run(run).model.D.state_dict().items()}
    from sagan.agreement import gammas_at_zero
    D = load_run(run).model.D
    with pytest.raises(KeyError), gammas_at_zero(D) as layers:
        assert layers == 1 and not any(a.gamma for a in D.attention.values())
        raise KeyError
    assert all(torch.equal(v, before[k]) for k, v in D.state_dict().items())


@pytest.mark.parametrize('classes, width, attention', [(4, 4, (16,)), (0, 4, ()), (4, (8, 8), (16,))])
def test_an_untrained_discriminator_is_at_chance(classes, width, attention):
    torch.manual_seed(1)
    down = 2 if isinstance(width, tuple) else 0
    auc, error = agreement_auc(Discriminator(32, classes, width, attention, down=down))
    assert error < .02 and abs(auc - .5) <= 3*error + 1e-6


@pytest.mark.parametrize('size, gap', [(32, None), (64, None), (32, 0), (32, 24), (64, 48)])
def test_twins_agree_as_asked(size, gap):
    name = 'twins' if gap is None else f'twins-gap{gap}'
    real, changed = [named_twins(name, n=500, size=size, agree=agree) for agree in (True, False)]
    colors = [twin_colours(to_unit(images.x)) for images in (real, changed)]
    assert all((c >= 0).all() for c in colors)
    assert agreement(colors[0], real.y).kappa == 1
    a = agreement(colors[1], changed.y)
    assert abs(a.kappa) < 3*a.kappa_error
    assert torch.equal(real.x[..., :size//2], changed.x[..., :size//2])
    if gap is not None:
        filled = (real.x.amax(1).int() - real.x.amin(1).int() > 60).any(1)    # (n, S), columns with a twin
        columns = filled[0].nonzero().flatten()
        assert columns.diff().max() - 1 == gap


def test_the_first_images_are_those_of_older_versions():
    "Runs, references and evaluators of older versions were made with these images"
    data = twins(50)
    pairs = twin_colours(to_unit(data.x))[:10, 0]
    assert (6*pairs[:, 0] + pairs[:, 1]).tolist() == PAIRS
    assert data.y[:10].tolist() == CLASSES and data.name == 'twins'
    assert abs(data.x.float().mean().item() - MEAN) < .01


def test_show_prints_the_tables_of_the_page(capsys):
    claim.show()
    output = capsys.readouterr().out
    assert '\nclaim\n' in output and '\nclaim-long, seed1\n' in output
    for name in [n for n in claim.PARTS if (claim.stored/n).exists()]:
        assert table_markdown(table(load_experiment(claim.stored/name)), claim.COLUMNS) in output


def test_a_row_is_trained_again(tmp_path, capsys, monkeypatch):
    "The command of the page, at a tiny size"
    tiny = claim.small.change(g_width=2, d_width=4, z_dim=8, steps=2, batch=8)
    monkeypatch.setitem(claim.PARTS, 'claim', ('claim', 'twins', tiny, 5, 1))
    claim.run_row('claim', 'claim-both', 1, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(':')[0] for line in lines] == ['step 1', 'step 2', 'stored, step 2400']


def test_the_tool_explains_itself():
    tool = Path(claim.__file__)
    done = subprocess.run([sys.executable, tool, '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and '--row' in done.stdout


def logged(folder, *kappas):
    "A run folder with a log of measurements"
    folder.mkdir(parents=True)
    measured = dict(fid=1., samples=1000, evaluator='E', reference='R')
    records = [dict(step=i, kappa=k) | measured for i, k in enumerate(kappas)]
    (folder/'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records), encoding='utf-8')


def test_the_shipped_run_is_chosen_by_its_last_kappa(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no runs'): ship.choose_run(tmp_path)
    logged(tmp_path/'seed0', .4, .2)
    logged(tmp_path/'seed1', .1, .3)
    assert ship.choose_run(tmp_path).name == 'seed1'


@pytest.mark.parametrize('scores', [
    dict(kappa=.05, d_auc=.7), dict(kappa=.2, d_auc=.5), dict(kappa=float('nan'), d_auc=.7)])
def test_a_run_that_did_not_learn_is_not_shipped(scores):
    with pytest.raises(ValueError, match='did not learn'): ship.check_learned(scores)


def test_the_shipped_twins_have_learned_agreement():
    scores = ship.measure_twins(shipped('twins'))
    ship.check_learned(scores)
    assert scores['d_auc_gamma0'] == pytest.approx(.5, abs=.005)


def test_the_package_data_are_small():
    assert sum(f.stat().st_size for f in SHIPPED.rglob('*')) < 8_000_000
