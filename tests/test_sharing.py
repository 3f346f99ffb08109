"Sharing: in a fresh process without a network, with the hub's own library and a small server, and more generators in ONNX"
import json, shutil, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import onnx, onnxruntime, pytest, torch
from huggingface_hub.errors import RepositoryNotFoundError
from sagan.attention import attention_maps
from sagan.runs import shipped
from sagan.cli import sagan_attend, sagan_explore, sagan_sample
from sagan.networks import Generator
from sagan.sharing import export_onnx, PretrainedSAGAN


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
    out = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert 'huggingface_hub' in out[0] and '[hub]' in out[0]
    assert out[1].split() == ['7200', *PretrainedSAGAN.from_pretrained(shipped('twins')).classes]


def test_the_commands_work_on_a_shared_folder(tmp_path, capsys):
    PretrainedSAGAN.from_pretrained(shipped('twins')).save_pretrained(tmp_path/'shared')
    for command, kw in ((sagan_sample, dict(n=1)), (sagan_attend, dict(n=1)), (sagan_explore, dict(out=str(tmp_path/'page.html')))):
        command(str(tmp_path/'shared'), **kw)
    assert {'samples-seed0-n1.png', 'attention-seed0-n1.png'} <= {f.name for f in (tmp_path/'shared').iterdir()} and (tmp_path/'page.html').stat().st_size > 10_000


NEEDLESS = 'README.md', 'pytorch_model.bin', 'samples.png', 'evaluation-notes.json'
SCORES = dict(fid=1.5, step=1800, samples=20, evaluator='a judge', reference='all of it')

@pytest.fixture
def hub(tmp_path):
    "Address of a server that answers like the hub for one repository, which holds more than a model needs, and the files that it was asked for"
    folder, asked, commit = tmp_path/'repository', [], '0'*39 + '1'
    shutil.copytree(shipped('digits'), folder)
    for name in NEEDLESS: (folder/name).write_text('not for us')
    for name in ('eval.json', 'eval-n20.json'): (folder/name).write_text(json.dumps(SCORES))
    class Handler(BaseHTTPRequestHandler):
        def answer(self, body=b'', status=200, **headers):
            self.send_response(status)
            for k, v in {'content-length': str(len(body)), **headers}.items():
                self.send_header(k.replace('_', '-'), v)
            self.end_headers()
            if self.command == 'GET': self.wfile.write(body)
        def do_GET(self):
            path = self.path.partition('?')[0]
            if path in ('/api/models/user/digits/revision/main', '/api/models/user/digits/revision/v1'):
                return self.answer(json.dumps(dict(id='user/digits', sha=commit, siblings=[dict(rfilename=f.name) for f in folder.iterdir()])).encode(), content_type='application/json')
            if path == f'/api/models/user/digits/tree/{commit}':               # what newer versions ask for
                return self.answer(json.dumps([dict(type='file', path=f.name, size=f.stat().st_size, oid='0'*40) for f in folder.iterdir()]).encode(), content_type='application/json')
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
        assert (model.classes, model.step, model.records, model.cfg) == (here.classes, here.step, here.records, here.cfg)
        assert model.evals == {'eval': SCORES, 'eval-n20': SCORES}
        for k, v in here.state_dict().items(): assert torch.equal(v, model.state_dict()[k]), k
    # and none of the needless ones
    assert set(asked) == {'config.json', 'weights.safetensors', 'log.jsonl', 'eval.json', 'eval-n20.json'}
    with pytest.raises(FileNotFoundError, match='there is no folder user/other, and the hub gave no model') as e:
        PretrainedSAGAN.from_pretrained('user/other', **at)
    assert isinstance(e.value.__cause__, RepositoryNotFoundError)


@pytest.mark.parametrize('size, n_classes, width, at, form, z_dim, sn', [(64, 3, 8, (32,), 'released', 5, True), (64, 0, 2, (8, 16), 'preprint', 17, False),
                                                                          (32, 10, 4, (8, 32), 'published', 9, True), (32, 0, 2, (16,), 'released', 1, True), (32, 4, 2, (16,), 'residual', 3, True)])
def test_onnx_draws_and_attends_like_pytorch(tmp_path, size, n_classes, width, at, form, z_dim, sn):
    torch.manual_seed(0)
    G = Generator(size, n_classes, width, at, form, z_dim, sn)
    for a in G.attention.values(): torch.nn.init.constant_(a.gamma, 1.)
    def ask(n): return [torch.randn(n, z_dim)] + ([torch.randint(n_classes, (n,))] if n_classes else [])
    for _ in range(20): G(*ask(8))                                             # batch norm's averages
    for p in (p for n, p in G.named_parameters() if n.endswith(('query.parametrizations.weight.original', 'query.weight'))):
        p.data *= 1 if sn else 5  # maps far from uniform
    G.eval()
    maps = form != 'residual'
    found = export_onnx(G, tmp_path/'g.onnx', attention=maps)
    assert list(found) == ['image', *[f'attention_{s}' for s in at]*maps] and max(found.values()) < 1e-5
    onnx.checker.check_model(str(tmp_path/'g.onnx'), full_check=True)
    # no place of this machine
    assert [f.name for f in tmp_path.iterdir()] == ['g.onnx'] and b'.py' not in (tmp_path/'g.onnx').read_bytes()
    session = onnxruntime.InferenceSession(tmp_path/'g.onnx')
    assert [i.name for i in session.get_inputs()] == ['z', 'y'][:1 + (n_classes > 0)] and session.get_outputs()[0].shape[0] == 'batch'
    for n in (1, 3):
        given = ask(n)
        x, ours = attention_maps(G, *given) if maps else (G(*given).detach(), [])
        image, *theirs = map(torch.tensor, session.run(None, {k: v.numpy() for k, v in zip('zy', given)}))
        assert image.shape == (n, 3, size, size) and (image - x).abs().max() < 1e-5
        for m, beta in zip(ours, theirs):
            assert beta.shape == m.beta.shape and (beta - m.beta).abs().max() < 1e-5
