"Two processes that train and measure together, on the CPU: the same as one; stopped, and killed"
import os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from forked import BIN, command, forked, free_port
from machines import linux
from sagan.checkpoints import read_log, states
from sagan.runs import load_run

pytestmark = linux
TORCHRUN = sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2'
STARTED = []

@pytest.fixture(scope='module', autouse=True)
def leave_nothing_running():
    yield
    for p in STARTED:
        p.terminate()
        p.wait()  # the launcher ends its processes first

def trained(double, **changes):
    "A tiny model after 20 steps with batches of 16 images of all processes, its first weights, and the loss"
    from sagan.distributed import rank, world_size
    from sagan.data import digits, image_dls
    from sagan.training import sagan_learner
    me, world = rank(), world_size()
    dls = image_dls(digits(), 16//world, 20, flip=True, rank=me, world=world)
    learn = sagan_learner(dls, 'tiny', ema_start=5, dtype='float32', **changes)
    if double: learn.model.double()
    began = {k: v.clone() for k, v in learn.model.state_dict().items()}
    if me: learn.model.G.linear.bias.data.add_(1.)  # all are to begin with the weights of the first
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return dict(began=began, ended=learn.model.state_dict(), loss=learn.sagan_trainer.d_loss)

def measured():
    "Scores of an untrained generator and of drawn twins, odd numbers of images"
    from dataclasses import asdict
    from sagan.distributed import shard
    from sagan.data import digits, to_unit, twins
    from sagan.evaluation import score
    from sagan.references import train_evaluator
    from sagan.networks import generate_batches, standing_statistics
    from sagan.config import preset
    from sagan.training import SAGAN
    y, real, drawn = torch.arange(203) % 10, digits(), twins(151)
    G = standing_statistics(SAGAN(preset('tiny')).ema, y, seed=1, batch=50)
    of_g = score(generate_batches(G, y, part=shard(203)), y, train_evaluator(real, steps=30), real)
    of_drawn = score(to_unit(drawn.x)[shard(151)], drawn.y, train_evaluator(drawn, steps=30), drawn)
    return [asdict(of_g), asdict(of_drawn)]

def grouped(group):
    "Batch norm of this process's share of 8 images over groups, all gradients, and its averages"
    from sagan.conditioning import BatchNorm2d
    from sagan.distributed import all_gather, all_reduce, shard
    torch.manual_seed(0)
    x, w = torch.randn(8, 4, 5, 5) + torch.arange(8.)[:, None, None, None], torch.randn(8, 4, 5, 5)
    bn, mine = BatchNorm2d(4, group), x[shard(8)].clone().requires_grad_()
    out = bn(mine)
    (out**2*w[shard(8)]).sum().backward()
    rows = dict(out=all_gather(out.detach(), 8), grad=all_gather(mine.grad, 8))
    return rows | dict(weight=all_reduce(bn.weight.grad), **bn.state_dict(prefix='bn.'))

def blamed():
    "The message of a step in which only the last process has an image that is not finite"
    from sagan.distributed import rank, world_size
    from sagan.losses import ttur
    from sagan.config import preset
    from sagan.diagnostics import NonFinite
    from sagan.training import d_step, SAGAN
    m = SAGAN(preset('tiny')).train()
    x, y, z = torch.zeros(4, 3, 32, 32), torch.arange(4), torch.zeros(4, 128)
    if rank() == world_size() - 1: x = x*torch.nan
    try: d_step(m.G, m.D, ttur(m.G, m.D)[1], x, y, z, y)
    except NonFinite as e: return str(e), e.report['where']

def begun():
    "A layer with this process's weights, after it was given those of the first"
    from sagan.distributed import all_gather_object, all_reduce_mean, barrier, broadcast_parameters, rank
    layer = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(layer.weight, rank() + 1.)
    broadcast_parameters(layer)
    barrier()
    means = [torch.tensor([1., 2.])*(rank() + 1), torch.tensor(float(rank()))]
    all_reduce_mean(means)
    return dict(weight=layer.weight.detach(), means=means, ranks=all_gather_object(rank()))

def work(folder, **variables):
    "What the tests of equality compare, one file for each process, which gets what a launcher would tell it"
    os.environ.update(variables)
    from sagan.distributed import process_group, rank, world_size
    with process_group():
        results = dict(scores=measured(), single=trained(False), blamed=blamed(), begun=begun())
        results |= dict(grouped={g: grouped(g) for g in (2, 4)})
        torch.Tensor.float = torch.Tensor.double
        torch.set_default_dtype(torch.float64)  # whatever the package computes in float32
        results |= dict(double=trained(True), groups=trained(True, bn_group=8))
        torch.save(results, f'{folder}/{rank()}of{world_size()}')

@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    "The files of one process alone, and of the first and the second of two"
    tmp = tmp_path_factory.mktemp('work')
    meeting = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), WORLD_SIZE='2')
    alone = [forked(tmp/'output', 'work', tmp, module='test_distributed')]
    both = [forked(tmp/f'output{r}', 'work', tmp, module='test_distributed', **meeting, RANK=r, LOCAL_RANK=r)
            for r in '01']
    for p in alone + both:
        p.join(600)
        assert p.exitcode == 0, p.output.read_text(encoding='utf-8')
    return [torch.load(tmp/name) for name in ('0of1', '0of2', '1of2')]

def test_weights_means_and_objects_of_both(kept):
    alone, *both = [k['begun'] for k in kept]
    assert torch.equal(alone['means'][0], torch.tensor([1., 2.])) and alone['ranks'] == [0]
    for one in both:
        assert torch.equal(one['weight'], torch.ones(1, 2))                    # those of the first
        assert torch.equal(one['means'][0], torch.tensor([1.5, 3.])) and one['means'][1] == .5
        assert one['ranks'] == [0, 1]

def test_two_processes_train_as_one(kept):
    "In float64; in float32 the rounding of one step is enough for 20 steps of a GAN to end elsewhere"
    alone, first = [k['double'] for k in kept[:2]]
    for k, v in alone['ended'].items():
        assert torch.allclose(first['ended'][k].double(), v.double(), rtol=0, atol=1e-7), k
    assert abs(alone['loss'] - first['loss']) < 1e-7                           # that of the whole batch
    for k in ('G.linear.bias', 'D.head.linear.bias', 'ema.conv.bias', 'G.bn.running_var'):
        assert (alone['ended'][k] - alone['began'][k]).abs().max() > 1e-4, k

def test_groups_of_batch_norm_are_the_same_on_one_process_and_on_two(kept):
    "A group of all images of a process is batch norm without synchronization; averages are of all groups"
    alone, first, second = [k['grouped'] for k in kept]
    for group in (2, 4):
        assert alone[group].keys() == first[group].keys()
        for k, v in alone[group].items():
            atol = 1e-4 if k == 'weight' else 1e-5
            assert torch.allclose(first[group][k], v, rtol=1e-5, atol=atol), (group, k)
            assert torch.equal(first[group][k], second[group][k]), (group, k)
    x = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    x = x + torch.arange(8.)[:, None, None, None]
    # PyTorch's own in each process, which knows of no other
    layers = [torch.nn.BatchNorm2d(4) for _ in range(2)]
    out = torch.cat([bn(part) for bn, part in zip(layers, x.chunk(2))])
    assert torch.allclose(first[4]['out'], out, atol=1e-6)
    for k in ('running_mean', 'running_var'):
        assert torch.allclose(first[4][f'bn.{k}'], sum(getattr(bn, k) for bn in layers)/2, rtol=1e-6), k

def test_two_processes_train_as_one_with_groups(kept):
    alone, first, second = [k['groups'] for k in kept]
    for k, v in alone['ended'].items():
        assert torch.allclose(first['ended'][k].double(), v.double(), rtol=0, atol=1e-7), k
    for k, v in first['ended'].items(): assert torch.equal(v, second['ended'][k]), k
    whole = kept[0]['double']['ended']
    # another training than that without groups
    assert (alone['ended']['G.linear.bias'] - whole['G.linear.bias']).abs().max() > 1e-4

def test_both_processes_hold_the_same_bits(kept):
    for kind in ('single', 'double'):
        for k, v in kept[1][kind]['ended'].items():
            assert torch.equal(v, kept[2][kind]['ended'][k]), (kind, k)  # u, v and running statistics, too
    assert kept[1]['single']['ended']['G.bn.running_var'].dtype == torch.float32
    assert kept[1]['single']['ended']['G.bn.num_batches_tracked'] == 20

def test_two_processes_measure_as_one(kept):
    for alone, first, second in zip(*[k['scores'] for k in kept]):
        assert first == second and alone.keys() == first.keys()
        for k, v in alone.items():
            assert first[k] == (pytest.approx(v, rel=1e-4, abs=1e-5) if isinstance(v, float) else v), k
    assert kept[0]['scores'][1]['observed'] == 1.

def test_a_number_that_is_not_finite_is_found_by_all(kept):
    for k in kept: assert k['blamed'] == ("a number in D's step is not finite: in the real images", 'data')

def processes_of(launcher):
    "The process ids of the workers, by rank"
    children = ['ps', '-o', 'pid=', '--ppid', str(launcher.pid)]
    pids = subprocess.run(children, capture_output=True, text=True).stdout.split()
    def rank(pid):
        variables = Path(f'/proc/{pid}/environ').read_text(encoding='utf-8').split('\0')
        return int(dict(v.split('=', 1) for v in variables if '=' in v)['RANK'])
    return [int(pid) for pid in sorted(pids, key=rank)]

def train_until(tmp, step, *options):
    "sagan-train in two processes; the launcher, once the run has a state of that step or a later one"
    launched = [*TORCHRUN, '--no-python', BIN/'sagan-train', '--steps', '1000', *options]
    p = subprocess.Popen(launched, cwd=tmp, stdout=open(tmp/'output', 'wb'), stderr=subprocess.STDOUT)
    STARTED.append(p)
    for _ in range(6000):
        if any(int(f.stem[5:]) >= step for f in states(tmp/'run')): return p
        assert p.poll() is None, (tmp/'output').read_text(encoding='utf-8')
        time.sleep(.05)
    raise AssertionError((tmp/'output').read_text(encoding='utf-8'))

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run whose second process got SIGTERM; beside it what the command printed"
    tmp = tmp_path_factory.mktemp('run')
    p = train_until(tmp, 20, '--out', 'run', '--preset', 'tiny', '--device', 'cpu')
    os.kill(processes_of(p)[1], signal.SIGTERM)
    assert p.wait(300) == 0, (tmp/'output').read_text(encoding='utf-8')
    return tmp/'run'

def test_sigterm_to_one_process_stops_both_after_the_same_step(run):
    output, step = (run.parent/'output').read_text(encoding='utf-8'), load_run(run).step
    assert 20 <= step < 1000 and f'stopped by SIGTERM at step {step} of 1,000' in output
    assert 'Traceback' not in output
    assert output.count(', on 2 processes') == 1                    # only the first one speaks
    assert [r['step'] for r in read_log(run)] == sorted({*range(10, step + 1, 10), step})

def test_a_killed_process_ends_the_job_with_a_message_and_a_usable_checkpoint(run):
    step = load_run(run).step
    p = train_until(run.parent, step + 20, '--resume', 'run', '--device', 'cpu')
    os.kill(processes_of(p)[1], signal.SIGKILL)
    assert p.wait(300) != 0
    output = (run.parent/'output').read_text(encoding='utf-8')
    assert f'from step {step} to 1,000 steps' in output
    assert 'sagan-train: one of the 2 processes is gone' in output
    assert 'resume with sagan-train --resume run' in output
    assert load_run(run).step >= step + 20
    with open(run/'config.json', encoding='utf-8') as f: assert '"batch": 16' in f.read()
    steps = str(load_run(run).step + 10)
    done = command('sagan-train', '--resume', 'run', '--steps', steps, '--device', 'cpu', cwd=run.parent)
    # one process goes on where two were
    assert done.returncode == 0 and (run/'report.html').exists(), done.stderr
