"The three forms of the attention layer: equations, parameters, maps; files and code with the older names"
import json, pickle, shutil, warnings
from dataclasses import asdict
from pathlib import Path

import pytest, torch, torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sagan.attention import attention_maps, FORMS, intervene, resolve_form, SelfAttention
from sagan.checkpoints import load_weights, states
from sagan.runs import load_run, shipped
from sagan.cli import sagan_train
from sagan.experiments import load_experiment
from sagan.explorer import explore
from sagan.measuring import read_settings
from sagan.networks import Discriminator, Generator, ResidualBlock
from sagan.references import Classifier, Evaluator
from sagan.runner import _check_folder, _make_plan
from sagan.sharing import PretrainedSAGAN
from sagan.storage import read_json, write_json
from sagan.config import Config, presets
from sagan.data import twins
from sagan.training import SAGAN
from sagan.statistics import map_statistics

OLD = dict(paper='preprint', official='released')
root = Path(__file__).resolve().parent.parent


def by_hand(layer, form, x):
    "Equations 1 to 3 in the words of each source, location by location, in float64"
    W = {n: m.weight.detach().double()[:, :, 0, 0] for n, m in layer.named_children()
         if n != 'out' or form != 'preprint'}
    def project(name): return torch.einsum('oc,bchw->bohw', W[name], x)
    f, g, h = project('key'), project('query'), project('value')
    if form == 'released': f, h = F.max_pool2d(f, 2), F.max_pool2d(h, 2)
    f, g, h = f.flatten(2), g.flatten(2), h.flatten(2)                         # (B, channels, locations)
    o = torch.empty(len(x), h.shape[1], g.shape[2], dtype=x.dtype)
    for j in range(g.shape[2]):
        s = (f*g[:, :, j:j+1]).sum(1)                                          # (B, Nk), s_ij for all i
        beta = s.exp()/s.exp().sum(1, keepdim=True)
        o[:, :, j] = (h*beta[:, None]).sum(2)
    if form != 'preprint': o = W['out'] @ o                                    # v
    return layer.gamma.item()*o.unflatten(2, x.shape[2:]) + x


@pytest.mark.parametrize('sn', [True, False])
@pytest.mark.parametrize('form', FORMS)
def test_equations(form, sn):
    torch.manual_seed(0)
    layer, x = SelfAttention(24, form, sn).double().eval(), torch.randn(2, 24, 6, 8, dtype=torch.float64)
    assert torch.equal(layer(x), x)                                            # gamma is 0
    torch.nn.init.constant_(layer.gamma, .7)
    y = layer(x)
    assert (y - x).abs().max() > .01
    torch.testing.assert_close(y, by_hand(layer, form, x))


PARTS = dict(preprint=(8, 8, 1, 0), published=(8, 8, 8, 8), released=(8, 8, 2, 2))

@pytest.mark.parametrize('form, parts', PARTS.items())
def test_parameters(form, parts):
    for C in (8, 64, 256):
        layer = SelfAttention(C, form)
        count = sum(p.numel() for p in layer.parameters())
        assert count == sum(C*C//k for k in parts if k) + 1
        control = sum(p.numel() for p in ResidualBlock(C).parameters())
        assert (control == count) == (form != 'published') and control == 1.25*C*C + 1
    assert count == dict(preprint=81_921, published=32_769, released=81_921)[form]


@pytest.mark.parametrize('form', FORMS)
def test_maps_and_what_attention_causes(form):
    torch.manual_seed(0)
    z, y, image = torch.randn(2, 8), torch.tensor([0, 2]), torch.randn(2, 3, 32, 32)
    G, D = Generator(32, 3, 4, (16,), form, z_dim=8), Discriminator(32, 3, 8, (8,), form)
    for net, given, size in ((G, z, 16), (D, image, 8)):
        net.eval()
        for a in net.attention.values(): torch.nn.init.constant_(a.gamma, 1.)
        out, (m,) = attention_maps(net, given, y)
        assert m.queries == (size, size) and m.keys == ((size//2,)*2 if form == 'released' else (size, size))
        assert m.beta.shape == (2, size**2, m.keys[0]*m.keys[1])
        torch.testing.assert_close(m.beta.sum(-1), torch.ones(2, size**2))
        with torch.no_grad():
            with intervene(net, m): assert torch.equal(net(given, y), out)     # nothing is altered
            for change in (dict(gamma=0.), dict(uniform=True), dict(hide=(0, 0, 32, 16)), dict(cut=(3, 3))):
                with intervene(net, m, **change): assert not torch.equal(net(given, y), out), change
        if size == 16: assert map_statistics(out, m)['attention']


@pytest.mark.parametrize('form', FORMS)
def test_explorer(form):
    cfg = Config(size=32, n_classes=3, g_width=4, d_width=8, form=form, z_dim=16,
                 g_attention=(16,), d_attention=(16,))
    shown = explore(SAGAN(cfg).eval(), ['cat', 'dog', 'owl']).view
    keys = [8, 8] if form == 'released' else [16, 16]
    assert [(l['queries'], l['keys']) for l in shown.header['layers']] == [([16, 16], keys)]*2
    assert '<script' in shown.static()


MAKERS = dict(layer=lambda f: SelfAttention(16, f), network=lambda f: Generator(32, 0, 4, (8,), f),
              config=lambda f: Config(form=f))

@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize('form', ['pooled', 'Paper', '', None, ['paper'], 1])
def test_an_unknown_form_is_refused_with_the_names_of_the_three(make, form):
    names = "form must be 'preprint'(,| or) 'published'(,| or) 'released'.*got"
    with pytest.raises(ValueError, match=names): make(form)


@pytest.mark.parametrize('old, new', OLD.items())
def test_older_names_in_code(old, new):
    assert resolve_form(old) == resolve_form(new) == new
    with pytest.warns(DeprecationWarning, match=f"form='{old}' is an old name; use form='{new}'"):
        layer = SelfAttention(16, old)
    assert layer.form == new
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert Config(form=old) == Config(form=new) == Config().change(form=old)
        assert Config(form=old).form == new
        SAGAN(presets['tiny'].change(form=old))  # no warning: the configuration has today's name
    layer = SelfAttention(16, new, sn=False)
    pooled, layer.form = layer.pooled, old  # as an earlier version has pickled it
    again = pickle.loads(pickle.dumps(layer))
    assert again.form == old and again.pooled == pooled


def renamed(d): return d | dict(form={new: old for old, new in OLD.items()}[d['form']])

def with_older_names(run):
    "Write the older names into every file of a run folder"
    file = run/'config.json'
    saved = json.loads(file.read_text(encoding='utf-8'))
    saved['config'] = renamed(Config(**saved['config']).__dict__)
    file.write_text(json.dumps(saved, indent=1), encoding='utf-8')
    for f in run.glob('*.safetensors'):
        with safe_open(f, 'pt') as whole: header = whole.metadata()
        cfg = Config(**json.loads(header['config']))
        save_file(load_file(f), f, header | dict(config=json.dumps(renamed(asdict(cfg)))))
    for f in states(run):
        state = torch.load(f, weights_only=True)
        state['config'] = renamed(state['config'])
        torch.save(state, f)
    return run


@pytest.mark.parametrize('name', ['digits', 'twins'])
def test_shipped_runs_under_the_older_name(name, tmp_path):
    run = with_older_names(shutil.copytree(shipped(name), tmp_path/name))
    assert json.loads((run/'config.json').read_text(encoding='utf-8'))['config']['form'] == 'official'
    ours, theirs = load_run(shipped(name)).model, load_run(run).model
    assert ours.cfg == theirs.cfg and theirs.cfg.form == 'released'
    for k, t in ours.state_dict().items(): assert torch.equal(t, theirs.state_dict()[k]), k
    assert load_weights(run/'weights.safetensors', ours.cfg)[0].cfg == ours.cfg
    shared = PretrainedSAGAN.from_pretrained(run)  # a folder of the hub is such a folder
    shared.save_pretrained(tmp_path/'shared')
    assert 'released form' in (tmp_path/'shared/README.md').read_text(encoding='utf-8')
    shared = json.loads((tmp_path/'shared/config.json').read_text(encoding='utf-8'))
    assert shared['config']['form'] == 'released'


@pytest.mark.parametrize('old, new', OLD.items())
def test_a_run_under_the_older_name_goes_on(old, new, tmp_path, capsys):
    tiny = dict(device='cpu', g_width=2, d_width=4, batch=8, dtype='float32')
    sagan_train(data='digits', preset='tiny', out=str(tmp_path/'new'), steps=4, form=old, **tiny)
    assert json.loads((tmp_path/'new/config.json').read_text(encoding='utf-8'))['config']['form'] == new
    run = with_older_names(shutil.copytree(tmp_path/'new', tmp_path/'old'))
    assert torch.load(states(run)[-1], weights_only=True)['config']['form'] == old
    sagan_train(resume=str(tmp_path/'new'), steps=8, device='cpu', form=new)
    sagan_train(resume=str(run), steps=8, device='cpu', form=old)
    ours, theirs = [load_file(tmp_path/f/'weights.safetensors') for f in ('new', 'old')]
    for k, t in ours.items(): assert torch.equal(t, theirs[k]), k
    other = next(n for n in FORMS if n != new)
    with pytest.raises(SystemExit): sagan_train(resume=str(run), steps=12, device='cpu', form=other)
    assert f"form is '{new}'" in capsys.readouterr().err


def test_an_experiment_under_the_older_name_goes_on(tmp_path):
    images, evaluator = twins(16), Evaluator(Classifier(0), 'untrained')
    stored = read_settings(root/'nbs/experiments/table1-twins')
    stored |= dict(evaluator=evaluator.name, digest=images.digest)
    base = stored['base']
    for old, new in OLD.items():
        folder = tmp_path/old
        folder.mkdir()
        write_json(folder/'experiment.json', stored | dict(base=base | dict(form=old)))
        def asked(form): return stored | dict(base=asdict(Config(**base | dict(form=form))))
        there = _check_folder(folder, asked(new))  # the same experiment
        _make_plan(folder, there, asked(new), images, evaluator, 'cpu')
        assert read_json(folder/'experiment.json')['base']['form'] == new
        with pytest.raises(ValueError, match=f"form is '{new}' there, 'published' here"):
            _check_folder(folder, asked('published'))
    results = load_experiment(root/'nbs/experiments/table1-twins')
    assert {variant.cfg.form for variant, _ in results} == {'released', 'residual'}
