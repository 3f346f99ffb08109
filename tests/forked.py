"The commands as processes of their own, forks of one that imports everything once, and how they are killed"
import os
os.environ['OMP_NUM_THREADS'] = '1'
import signal, sys, time
from importlib import import_module
from itertools import count
from multiprocessing import get_context
from pathlib import Path
import pytest

PROCESSES = get_context('forkserver' if os.name == 'posix' else 'spawn')
PROCESSES.set_forkserver_preload(['sagan.cli', 'sagan.runner', 'sagan.sharing', 'forked'])
STARTED = []
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

def _call(output, module, name, args, options, kill_at, folder):
    os.setsid()
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    f = getattr(import_module(module), name)
    calls = folder and die_at(kill_at, folder)
    f(*args, **options)
    if calls: Path(f'{output}.calls').write_text(str(next(calls) - 1))

def forked(output, name, *args, module='sagan.cli', kill_at=0, folder=None, **options):
    """A command's function as a process that has been started, and whose output goes to a file, `p.output`

    It is killed before the call number `kill_at` that changes something in `folder`; without a number the
    calls are counted into a file beside the output."""
    p = PROCESSES.Process(target=_call, args=(output, module, name, args, options, kill_at, folder))
    p.output = output
    STARTED.append(p)
    p.start()
    return p

def running(p, seconds=10):
    "Processes that a process has started, or they, and that are still there after some seconds"
    for _ in range(int(seconds/.05)):
        found = [f.parent.name for f in Path('/proc').glob('[0-9]*/stat') if _session(f) == p.pid]
        if not found: break
        time.sleep(.05)
    return found

def _session(stat):
    "The session of a process"
    try: fields = stat.read_text().rpartition(')')[2].split()
    except OSError: return None
    return None if fields[0] == 'Z' else int(fields[3])
