"The commands as processes of their own, forks of one that imports everything once, and how they are killed"
import os
os.environ['OMP_NUM_THREADS'] = '1'
import signal, subprocess, sys, time
from importlib import import_module
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from runpy import run_path
from socket import socket
from tempfile import TemporaryDirectory
import pytest
from matplotlib.figure import Figure
from PIL import Image

PROCESSES = get_context('forkserver' if os.name == 'posix' else 'spawn')
PROCESSES.set_forkserver_preload(['sagan.cli', 'sagan.runner', 'sagan.sharing', 'forked'])
STARTED = []
BIN = Path(sys.executable).parent
CHANGES = 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'os.chmod', 'os.link', 'os.symlink'

@pytest.fixture(autouse=True)
def leave_nothing_running():
    yield
    for p in STARTED:
        p.kill()
        p.join()

def _place(args):
    "The path that an audited call is about"
    if not isinstance(args[0], (str, bytes, os.PathLike)): return ''
    path, fd = os.fsdecode(args[0]), args[-1]
    opened = len(args) == 3 and not isinstance(args[1], int)  # path, mode, flags
    if opened or os.path.isabs(path): return os.path.abspath(path)
    return os.path.join(os.readlink(f'/proc/self/fd/{fd}') if fd >= 0 else os.getcwd(), path)

def die_at(n, folder):
    """From here on count the calls that change something in a folder, and be killed right before number n

    Before a temporary file is forced to the disk, half of it is cut off, as if it had been killed while it
    wrote. Returns what counts: the next number is one more than the calls so far."""
    calls, folder, fsync = count(1), str(folder), os.fsync
    def change(name, args):
        writes = name == 'open' and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or name in CHANGES) and _place(args).startswith(folder) and next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
    def cut(fd):
        file = os.readlink(f'/proc/self/fd/{fd}')
        if file.startswith(folder) and next(calls) == n:
            if os.path.isfile(file) and '.new/' in file: os.truncate(file, os.path.getsize(file)//2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)
    sys.addaudithook(change)
    os.fsync = cut
    return calls

def _redirect(output, *fds):
    "Everything that this process writes there goes to a file"
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in fds: os.dup2(file, fd)

def _script(path, args, cwd, output):
    for fd in (1, 2): _redirect(f'{output}/{fd}', fd)
    os.chdir(cwd)
    sys.argv = [path, *args]
    run_path(path, run_name='__main__')

def new_process(*argv, cwd):
    "A program in a folder, once it has ended"
    return subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)

def command(name, *args, cwd):
    """An installed command in a folder, once it has ended: `returncode`, `stdout` and `stderr`

    It runs the script that `pip` wrote in a fork, which has imported PyTorch and fastai: 5 s less each."""
    path, args = str(BIN/name), [str(a) for a in args]
    if os.name != 'posix': return new_process(path, *args, cwd=cwd)
    with TemporaryDirectory() as output:
        p = PROCESSES.Process(target=_script, args=(path, args, cwd, output))
        p.start()
        p.join(500)
        p.kill()
        out, err = [Path(output, fd).read_text(encoding='utf-8') for fd in '12']
    return subprocess.CompletedProcess([path, *args], p.exitcode, out, err)

def save_nothing(fig, file, format='png', **options):
    "Instead of `Figure.savefig`, which takes most of the time of a small training: a picture of nothing"
    if format == 'svg': file.write('<svg viewBox="0 0 8 8"></svg>')
    else: Image.new('RGB', (8, 8)).save(file, format='png')

def _call(output, module, name, args, options, kill_at, folder):
    if hasattr(os, 'setsid'): os.setsid()
    _redirect(output, 1, 2)
    f = getattr(import_module(module), name)
    if not os.environ.get('SAGAN_KILLS'): Figure.savefig = save_nothing
    calls = folder and die_at(kill_at, folder)
    f(*args, **options)
    if calls: Path(f'{output}.calls').write_text(str(next(calls) - 1), encoding='utf-8')

def forked(output, name, *args, module='sagan.cli', kill_at=0, folder=None, **options):
    """A command's function as a process that has been started, and whose output goes to a file, `p.output`

    Its figures stay empty. It is killed before the call number `kill_at` that changes something in `folder`;
    without a number the calls are counted into a file beside the output."""
    p = PROCESSES.Process(target=_call, args=(output, module, name, args, options, kill_at, folder))
    p.output = output
    STARTED.append(p)
    p.start()
    return p

def free_port():
    "A port of this machine at which nobody listens"
    with socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def running(p, seconds=10):
    "Processes that a process has started, or they, and that are still there after some seconds"
    for _ in range(int(seconds/.05)):
        found = [f.parent.name for f in Path('/proc').glob('[0-9]*/stat') if _session(f) == p.pid]
        if not found: break
        time.sleep(.05)
    return found

def _session(stat):
    "The session of a process"
    try: fields = stat.read_text(encoding='utf-8').rpartition(')')[2].split()
    except OSError: return None
    return None if fields[0] == 'Z' else int(fields[3])
