"""Sharing: in a fresh process without a network, with the hub's own library and a small server, what is
refused, and more generators in ONNX"""
import json, os, re, shutil, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import onnx, onnxruntime, pytest, torch, torch.nn as nn
from huggingface_hub import hub_mixin
from huggingface_hub.errors import RepositoryNotFoundError
from machines import link, posix
from sagan.attention import attention_maps
from sagan.cli import sagan_attend, sagan_explore, sagan_sample
from sagan.config import presets
from sagan.networks import Generator
from sagan.runs import load_run, shipped
from sagan.sharing import export_onnx, fold_spectral_norm, nearest_preset, PretrainedSAGAN
from sagan.training import SAGAN


def test_a_fresh_process_without_a_network_and_without_onnx():
    code = f'''if True:
        import socket, sys
        def no(*args, **kw): raise AssertionError('no network here')
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = no
        for name in ('onnx', 'onnxscript', 'onnxruntime', 'huggingface_hub'): sys.modules[name] = None
        import sagan.checkpoints
        try: import sagan.sharing
        except ImportError as e: print(e)
        del sys.modules['huggingface_hub']
        from sagan.sharing import PretrainedSAGAN
        model = PretrainedSAGAN.from_pretrained({str(shipped('twins'))!r})
        print(model.step, *model.classes)'''
    result = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    error, model = result.stdout.splitlines()
    assert 'huggingface_hub' in error and '[hub]' in error
    assert model.split() == ['7200', *PretrainedSAGAN.from_pretrained(shipped('twins')).classes]


def test_the_commands_work_on_a_shared_folder(tmp_path, capsys):
    shared, page = tmp_path/'shared', tmp_path/'page.html'
    PretrainedSAGAN.from_pretrained(shipped('twins')).save_pretrained(shared)
    sagan_sample(str(shared), n=1)
    sagan_attend(str(shared), n=1)
    sagan_explore(str(shared), out=str(page))
    assert {'samples-seed0-n1.png', 'attention-seed0-n1.png'} <= {f.name for f in shared.iterdir()}
    assert page.stat().st_size > 10_000


NEEDLESS = 'README.md', 'pytorch_model.bin', 'samples.png', 'evaluation-notes.json'
SCORES = dict(fid=1.5, step=1800, samples=20, evaluator='a judge', reference='all of it')

@pytest.fixture
def hub(tmp_path):
    """Address of a server that answers like the hub for one repository, and the files that it was asked for

    The repository holds more than a model needs."""
    folder, asked, commit = tmp_path/'repository', [], '0'*39 + '1'
    shutil.copytree(shipped('digits'), folder)
    for name in NEEDLESS: (folder/name).write_text('not for us', encoding='utf-8')
    for name in ('eval.json', 'eval-n20.json'): (folder/name).write_text(json.dumps(SCORES), encoding='utf-8')
    class Handler(BaseHTTPRequestHandler):
        def answer(self, body=b'', status=200, **headers):
            self.send_response(status)
            for k, v in {'content-length': str(len(body)), **headers}.items():
                self.send_header(k.replace('_', '-'), v)
            self.end_headers()
            if self.command == 'GET': self.wfile.write(body)
        def do_GET(self):
            path, files = self.path.partition('?')[0], list(folder.iterdir())
            def answer_json(content):
                self.answer(json.dumps(content).encode(), content_type='application/json')
            if path in ('/api/models/user/digits/revision/main', '/api/models/user/digits/revision/v1'):
                siblings = [dict(rfilename=f.name) for f in files]
                return answer_json(dict(id='user/digits', sha=commit, siblings=siblings))
            if path == f'/api/models/user/digits/tree/{commit}':               # what newer versions ask for
                entries = [dict(type='file', path=f.name, size=f.stat().st_size, oid='0'*40) for f in files]
                return answer_json(entries)
            name = path.removeprefix(f'/user/digits/resolve/{commit}/')
            if name == path or not (folder/name).is_file():
                return self.answer(status=404, x_error_code='RepoNotFound')
            asked.append(name)
            self.answer((folder/name).read_bytes(), etag=f'"{name}"', x_repo_commit=commit)
        do_HEAD = do_GET
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield dict(endpoint=f'http://127.0.0.1:{server.server_port}', cache_dir=tmp_path/'cache'), asked
    server.shutdown()
    server.server_close()


def test_download_by_the_hubs_own_library(hub):
    at, asked = hub
    here = PretrainedSAGAN.from_pretrained(shipped('digits'))
    # the last without the server
    for kw in (at, dict(at, revision='v1'), dict(cache_dir=at['cache_dir'], local_files_only=True)):
        model = PretrainedSAGAN.from_pretrained('user/digits', **kw)
        for k in ('classes', 'step', 'records', 'cfg'): assert getattr(model, k) == getattr(here, k)
        assert model.evals == {'eval': SCORES, 'eval-n20': SCORES}
        for k, v in here.state_dict().items(): assert torch.equal(v, model.state_dict()[k]), k
    # and none of the needless ones
    assert set(asked) == {'config.json', 'weights.safetensors', 'log.jsonl', 'eval.json', 'eval-n20.json'}
    message = 'there is no folder user/other, and the hub returned no model'
    with pytest.raises(FileNotFoundError, match=message) as e:
        PretrainedSAGAN.from_pretrained('user/other', **at)
    assert isinstance(e.value.__cause__, RepositoryNotFoundError)


@pytest.fixture
def model():
    "The run of digits that comes with the package, with scores"
    run = load_run(shipped('digits'))
    return PretrainedSAGAN(run.model, run.classes, run.step, run.records, dict(eval=SCORES))


@pytest.fixture
def free():
    "A model without classes that has not been trained"
    return SAGAN(presets['tiny'].change(n_classes=0, z_dim=7, form='preprint', g_attention=(8, 16)))


def check_same(a, b):
    for k in ('classes', 'step', 'records', 'evals', 'cfg', 'options'): assert getattr(a, k) == getattr(b, k)
    for k, v in a.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k


def remove(name): return lambda folder: (folder/name).unlink()
def edit(name, f): return lambda folder: (folder/name).write_bytes(f((folder/name).read_bytes()))

@pytest.mark.parametrize('change, error, message', [
    (remove('config.json'), FileNotFoundError, 'it has no config.json'),
    (remove('weights.safetensors'), FileNotFoundError, 'has no weights'),
    (edit('weights.safetensors', lambda b: b[:9000]), ValueError, 'not a complete safetensors file'),
    (edit('config.json', lambda b: b[:50]), ValueError, 'config.json is damaged'),
    (edit('config.json', lambda b: b.replace(b'"z_dim": 128', b'"z_dim": 64')), ValueError,
     'z_dim is 128 there and 64 here'),
    (edit('config.json', lambda b: b.replace(b'"classes": [\n  "0",', b'"classes": [')), ValueError,
     'the model has 10 classes, but there are 9 class names'),
    (edit('eval.json', lambda b: b[:20]), ValueError, 'eval.json is damaged'),
    (edit('eval.json', lambda b: b.replace(b'"fid"', b'"no"')), ValueError,
     'eval.json is damaged: the scores have no fid'),
    (edit('eval.json', lambda b: re.sub(b'"fid": [0-9.]+', b'"fid": null', b)), ValueError,
     'eval.json is damaged: the scores have a bad fid, None'),
    (edit('eval.json', lambda b: b'\xff' + b), ValueError, 'eval.json is damaged')])
def test_a_damaged_folder(tmp_path, model, change, error, message):
    model.save_pretrained(tmp_path/'shared')
    change(tmp_path/'shared')
    with pytest.raises(error, match=message): PretrainedSAGAN.from_pretrained(tmp_path/'shared')


@pytest.mark.parametrize('function', ['_fsync', 'os.replace', '_move_files'])
@posix
def test_a_save_that_is_killed_can_be_repeated(tmp_path, free, function):
    "There is no folder or a whole one, and nothing is left beside it"
    model, out = PretrainedSAGAN(free, step=5), tmp_path/'shared'
    if not (pid := os.fork()):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(f'sagan.storage.{function}', lambda *_: os._exit(9))
            model.save_pretrained(out)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 9 << 8 and not out.exists()
    model.save_pretrained(out)
    check_same(model, PretrainedSAGAN.from_pretrained(out))
    assert [f.name for f in tmp_path.iterdir()] == ['shared']


@pytest.mark.parametrize('error, message, described', [
    (ValueError, 'class names must be a list of strings, got .0, 1.', dict(classes=[0, 1])),
    (ValueError, "class names must be a list of strings, got 'ab'", dict(classes='ab')),
    (ValueError, 'step must be a whole number', dict(step=-1)),
    (ValueError, 'records must be a list of dictionaries', dict(records=['step 1'])),
    (ValueError, 'nested too deeply', dict(options=dict(a=reduce(lambda v, _: [v], range(3000), 0))))])
def test_descriptions_of_the_wrong_kind(free, error, message, described):
    with pytest.raises(error, match=message): PretrainedSAGAN(free, **described)


@posix
def test_a_pipe_among_the_scores_and_a_name_that_ends_a_block_of_code(tmp_path, free):
    model = PretrainedSAGAN(free)
    model.save_pretrained(tmp_path/'shared')
    os.mkfifo(tmp_path/'shared/eval-n20.json')
    with pytest.raises(ValueError, match='eval-n20.json is damaged|eval-n20.json is not a file'):
        PretrainedSAGAN.from_pretrained(tmp_path/'shared')
    card = str(model.generate_model_card(repo_id='```\n<b>'))
    assert card.count('```') == 2
    for function, given in ((nearest_preset, 'small'), (fold_spectral_norm, None), (PretrainedSAGAN, 'my')):
        with pytest.raises(TypeError, match=f'must be a .*, got {type(given).__name__}'): function(given)


def test_scores_that_would_not_be_read_again_and_unknown_arguments(tmp_path, model, free):
    "A file that only looks like scores is left alone"
    model.save_pretrained(tmp_path/'shared')
    (tmp_path/'shared/evaluation-notes.json').write_text('my own', encoding='utf-8')
    check_same(model, PretrainedSAGAN.from_pretrained(tmp_path/'shared'))
    for name in ('mine', 'config', 'evaluation', '../eval', 'eval-a/b'):
        with pytest.raises(ValueError) as e: PretrainedSAGAN(free, evals={name: SCORES})
        assert f'scores must be named eval or eval-..., got {name!r}' in str(e.value)
    with pytest.raises(ValueError, match='the scores have no fid'):
        PretrainedSAGAN(free, evals=dict(eval=dict(step=1)))
    for wrong in (dict(devcie='cuda'), dict(strict=True), dict(best=True)):
        with pytest.raises(TypeError, match=f'unexpected keyword argument {list(wrong)[0]!r}'):
            PretrainedSAGAN.from_pretrained(tmp_path/'shared', **wrong)
    with pytest.raises(TypeError, match='private can be given only with push_to_hub=True'):
        model.save_pretrained(tmp_path/'none', private=True)


def test_scores_on_the_card(free):
    "The hub gets only those of the weights that are there"
    log = [dict(SCORES, step=step, fid=fid) for step, fid in ((2, 9.), (4, 3.), (6, 5.))]
    def card(step, records): return PretrainedSAGAN(free, step=step, records=records).generate_model_card()
    both, once = card(6, [dict(step=1), *log]), card(4, log[:2])
    assert '| best | 4 | 3 |' in both.text and '| last | 6 | 5 |' in both.text
    assert [r.metric_value for r in both.data.eval_results] == [5.]
    assert '| best and last | 4 | 3 |' in once.text and once.text.count('| 4 | 3 |') == 1
    assert [r.metric_value for r in once.data.eval_results] == [3.]
    assert card(9, log).data.eval_results is None


def test_push(tmp_path, model, monkeypatch):
    "Arguments as other models of the hub's library take them, and wrong ones before a repository is made"
    class Hub:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **kw): return SimpleNamespace(repo_id=repo_id)
        def upload_folder(self, repo_id, folder_path, **kw):
            seen.update(repo_id=repo_id, readme=(Path(folder_path)/'README.md').read_text(encoding='utf-8'))
            return 'https://hub/commit'
    seen = {}
    monkeypatch.setattr(hub_mixin, 'HfApi', Hub)
    for kw in (dict(model_card_kwargs=dict(license='mit')), dict(license='mit')):
        seen.clear()
        assert model.push_to_hub('user/sagan-digits', token='secret', **kw) == 'https://hub/commit'
        assert 'license: mit' in seen['readme'] and 'from_pretrained("user/sagan-digits")' in seen['readme']
    address = model.save_pretrained(tmp_path/'both', push_to_hub=True, repo_id='me/tw', token='secret')
    assert address == 'https://hub/commit' and seen['repo_id'] == 'me/tw'
    for text in (seen['readme'], (tmp_path/'both/README.md').read_text(encoding='utf-8')):
        assert 'from_pretrained("me/tw")' in text
    model.save_pretrained(tmp_path/'shared')
    # without a name on the hub
    assert 'from_pretrained("shared")' in (tmp_path/'shared/README.md').read_text(encoding='utf-8')
    def never(*args, **kw): raise AssertionError('no repository is made')
    monkeypatch.setattr(hub_mixin, 'HfApi', never)
    for wrong in (dict(licence='mit'), dict(model_card_kwargs=dict(licence='mit'))):
        with pytest.raises(TypeError, match='licence'): model.push_to_hub('user/sagan-digits', **wrong)


def test_offline(tmp_path, monkeypatch):
    def offline(*args, **kw): raise ConnectionError('no way out')
    with pytest.raises(FileNotFoundError, match='Repo id must'):
        PretrainedSAGAN.from_pretrained(tmp_path/'no'/'where')
    monkeypatch.setattr('sagan.sharing.snapshot_download', offline)
    message = 'there is no folder runs/digits, and the hub returned no model of that name'
    with pytest.raises(FileNotFoundError, match=message): PretrainedSAGAN.from_pretrained('runs/digits')


@pytest.mark.parametrize('to', ['deep/full', 'mine', 'link'])
def test_a_failed_save_leaves_what_was_there(tmp_path, model, monkeypatch, to):
    def full(*args, **kw): raise OSError('No space left on device')
    (tmp_path/'mine').mkdir()
    if to == 'link': link(tmp_path/'link', tmp_path/'mine')
    for target in ('sagan.sharing.save_weights', 'huggingface_hub.ModelCard.save'):
        with monkeypatch.context() as m, pytest.raises(OSError, match='No space'):
            m.setattr(target, full)
            model.save_pretrained(tmp_path/to)
    with pytest.raises(TypeError, match='licence'):
        model.save_pretrained(tmp_path/to, model_card_kwargs=dict(licence='mit'))
    assert not (tmp_path/'deep').exists()
    assert list((tmp_path/'mine').iterdir()) == [] and (tmp_path/'link').is_symlink() == (to == 'link')


def test_onnx_that_is_refused_leaves_no_file(tmp_path, model, monkeypatch):
    "To be quick, this takes the graph of another generator"
    file, G = tmp_path/'none.onnx', Generator(32, 0, 2, (8, 16), 'preprint', 13)
    export_onnx(Generator(32, 0, 2, (8, 16), 'preprint', 13), tmp_path/'other.onnx', attention=True)
    with monkeypatch.context() as m:
        m.setattr('sagan.sharing._export_graph', lambda *args: onnx.load(tmp_path/'other.onnx'))
        for bias in (0., torch.nan):
            nn.init.constant_(G.conv.bias, bias)
            with pytest.raises(RuntimeError, match='image differs from PyTorch'):
                export_onnx(G, file, attention=True)
        with pytest.raises(ValueError, match='no SelfAttention layer'):
            export_onnx(Generator(32, 0, 2, (), z_dim=13), file, attention=True)
        for wrong in (model, model.D, None):
            with pytest.raises(TypeError, match=f'such as model.ema, got {type(wrong).__name__}'):
                export_onnx(wrong, file)
        for missing in ('onnx', 'onnxscript'):
            with monkeypatch.context() as n, pytest.raises(ImportError, match=f'needs the package {missing}'):
                n.setitem(sys.modules, missing, None)
                export_onnx(G, file)
        assert [f.name for f in tmp_path.iterdir()] == ['other.onnx']
        m.setitem(sys.modules, 'onnxruntime', None)
        assert export_onnx(G, file) == dict(image=None)
    def never(*args): raise AssertionError('this comes before the work')
    monkeypatch.setattr('sagan.sharing._export_graph', never)
    with pytest.raises(OSError, match='there is no folder'): export_onnx(model.ema, tmp_path/'no/digits.onnx')


def test_onnx_of_a_bfloat16_generator_computes_in_float32(tmp_path):
    G = Generator(32, 3, 2, (16,), 'released', 5).bfloat16()
    assert export_onnx(G, tmp_path/'g.onnx')['image'] < 1e-4 and next(G.parameters()).dtype == torch.bfloat16
    session = onnxruntime.InferenceSession(tmp_path/'g.onnx')
    types = [i.type for i in session.get_inputs() + session.get_outputs()]
    assert types == ['tensor(float)', 'tensor(int64)', 'tensor(float)']


@pytest.mark.parametrize('size, n_classes, width, at, form, z_dim, sn', [
    (64, 3, 8, (32,), 'released', 5, True), (64, 0, 2, (8, 16), 'preprint', 17, False),
    (32, 10, 4, (8, 32), 'published', 9, True), (32, 0, 2, (16,), 'released', 1, True),
    (32, 4, 2, (16,), 'residual', 3, True)])
def test_onnx_draws_and_attends_like_pytorch(tmp_path, size, n_classes, width, at, form, z_dim, sn):
    torch.manual_seed(0)
    G = Generator(size, n_classes, width, at, form, z_dim, sn)
    for a in G.attention.values(): torch.nn.init.constant_(a.gamma, 1.)
    def ask(n): return [torch.randn(n, z_dim)] + ([torch.randint(n_classes, (n,))] if n_classes else [])
    for _ in range(20): G(*ask(8))                                             # batch norm's averages
    if not sn:  # maps far from uniform
        for a in G.attention.values(): a.query.weight.data *= 5
    G.eval()
    maps = form != 'residual'
    found = export_onnx(G, tmp_path/'g.onnx', attention=maps)
    assert list(found) == ['image', *[f'attention_{s}' for s in at]*maps] and max(found.values()) < 1e-5
    onnx.checker.check_model(str(tmp_path/'g.onnx'), full_check=True)
    # no place of this machine
    assert b'.py' not in (tmp_path/'g.onnx').read_bytes()
    assert [f.name for f in tmp_path.iterdir()] == ['g.onnx']
    session = onnxruntime.InferenceSession(tmp_path/'g.onnx')
    assert [i.name for i in session.get_inputs()] == ['z', 'y'][:1 + (n_classes > 0)]
    assert session.get_outputs()[0].shape[0] == 'batch'
    for n in (1, 3):
        given = ask(n)
        x, ours = attention_maps(G, *given) if maps else (G(*given).detach(), [])
        image, *theirs = map(torch.tensor, session.run(None, {k: v.numpy() for k, v in zip('zy', given)}))
        assert image.shape == (n, 3, size, size) and (image - x).abs().max() < 1e-5
        for m, beta in zip(ours, theirs):
            assert beta.shape == m.beta.shape and (beta - m.beta).abs().max() < 1e-5
