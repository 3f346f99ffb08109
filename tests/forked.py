"The commands as processes of their own, forks of one that imports everything once"
import os
os.environ['OMP_NUM_THREADS'] = '1'
from multiprocessing import get_context
import pytest

PROCESSES = get_context('forkserver')
PROCESSES.set_forkserver_preload(['sagan.cli'])
STARTED = []

@pytest.fixture(autouse=True)
def leave_nothing_running():
    yield
    for p in STARTED:
        p.kill()
        p.join()

def _call(output, name, args, options):
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    import sagan.cli
    getattr(sagan.cli, name)(*args, **options)

def forked(output, name, *args, **options):
    "A command's function as a process that has been started, and whose output goes to a file, `p.output`"
    p = PROCESSES.Process(target=_call, args=(output, name, args, options))
    p.output = output
    STARTED.append(p)
    p.start()
    return p
