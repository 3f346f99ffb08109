"What opens the explorer ends with it: the server, the notebook, and the server's own temporary files"
import os, signal, socket, time
from multiprocessing import get_context
from pathlib import Path

import pytest
from sagan.reports import open_notebook
from sagan.storage import read_json

SERVER = """import os, pathlib, sys, tempfile, time
tempfile.mkdtemp()
pathlib.Path('new').write_text(f'{os.getpid()} {sys.argv[1]}')
pathlib.Path('new').rename('server')
time.sleep(300)
"""


def until(condition):
    "Wait for something"
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(.02)


@pytest.fixture
def command(tmp_path, monkeypatch):
    "`open_notebook` in a process of its own, with a program that only waits in place of the server"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    for module in ('voila', 'jupyterlab'): (tmp_path/f'{module}.py').write_text(SERVER)
    (tmp_path/'temporary').mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path/'temporary'))
    given = 'run', 'cpu', None, lambda text: None
    process = get_context('fork').Process(target=open_notebook, args=given)
    process.start()
    yield process
    process.kill()


@pytest.mark.parametrize('sig, status', [
    (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 0), (signal.SIGKILL, -9)])
def test_nothing_outlives_the_command_however_it_ends(command, tmp_path, sig, status):
    until((tmp_path/'server').exists)
    pid, notebook = (tmp_path/'server').read_text().split()
    assert 'load_run' in read_json(notebook)['cells'][1]['source']
    os.kill(command.pid, sig)
    command.join(30)
    assert command.exitcode == status
    until(lambda: not Path(f'/proc/{pid}').exists())
    until(lambda: not os.listdir(tmp_path/'temporary'))


def test_port_and_browser(tmp_path, monkeypatch):
    "Are handed to the server, and the address is told; a port that cannot be used is said at once"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    listed = "import pathlib, sys\npathlib.Path('arguments').write_text(' '.join(sys.argv[2:]))\n"
    for module in ('voila', 'jupyterlab'): (tmp_path/f'{module}.py').write_text(listed)
    told = []
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
        with pytest.raises(ValueError, match=f'port {port} cannot be used here; name another one'):
            open_notebook('run', tell=told.append, port=port)
    for wrong in (0, 70000, '80'):
        with pytest.raises(ValueError, match='port'): open_notebook('run', tell=told.append, port=wrong)
    assert not told
    open_notebook('run', tell=told.append, port=port, browser=False)
    arguments = (tmp_path/'arguments').read_text().split()
    assert f'--port={port}' in arguments and '--no-browser' in arguments
    assert told == [f'the explorer opens at http://localhost:{port}; Ctrl-C ends it']
    open_notebook('run', tell=told.append)
    assert '--no-browser' not in (tmp_path/'arguments').read_text()
