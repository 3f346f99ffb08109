"""What some ideas could save in the convolutions and spectral norms of the paper's networks, on one thread.

Every shape of a forward pass of G (8 images) and D (16) at 128 px is measured alone and counted as often as
it occurs, so a line is the time of that part in one pass of both networks.

    python benchmarks/candidates.py --out FILE.json

Dividing outputs by sigma writes no quotient, but the gradient of sigma takes an inner product with every
output, and the gradient of the weight still gets its rank-one part. All that it can save is a part of the
quotient, which is itself a few percent of a step.

Nothing of D's first convolutions can be shared within a step: the batch is real once, in D's step, and G has
changed, with new latents, before its own step. D's step already puts both halves through D in one pass.

The last table lists the algorithms that oneDNN takes in one step at 32 px with 8 images."""
import argparse, json, subprocess, sys, time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch
import torch, torch.nn as nn, torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from sagan import kernels
from sagan.config import presets
from sagan.kernels import fused_quotient, keep_freed_memory
from sagan.training import SAGAN
from step import config, draw_batch, HALF, machine, our_step

def milliseconds(f, repeats=4):
    "Least CPU time, after one call to warm up"
    times = []
    for _ in range(repeats):
        start = time.process_time()
        f()
        times.append(1e3*(time.process_time() - start))
    return min(times[1:])

class Outputs(TorchDispatchMode):
    "Counts the shapes that convolutions give, also of those that are merged with a change of size"
    def __init__(self):
        super().__init__()
        self.shapes = Counter()
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.convolution.default: self.shapes[tuple(out.shape)] += 1
        return out

def find_shapes():
    """Shapes of convolutions (input, weight) without a change of size, of all weights with a spectral norm,
    and of the outputs of all convolutions, with their counts"""
    cfg = presets['paper'].change(dtype='float32')
    with torch.device('meta'): model = SAGAN(cfg)
    convolutions, weights = Counter(), Counter()
    def note(conv, args, out): convolutions[tuple(args[0].shape), tuple(conv.weight.shape)] += 1
    for net in (model.G, model.D):
        for m in net.modules():
            if isinstance(m, nn.Conv2d): m.register_forward_hook(note)
            if hasattr(m, 'parametrizations'): weights[tuple(m.weight.shape)] += 1
    # as on a CPU, whose 4x4 form merges convolutions with a change of size
    merged = patch.object(kernels, 'is_4x4_faster', lambda x, dtype: x[:, 0].numel() >= 1024)
    with torch.device('meta'), merged, Outputs() as outputs:
        model.G(torch.randn(8, cfg.z_dim), torch.zeros(8, dtype=torch.int64))
        model.D(torch.randn(16, 3, cfg.size, cfg.size), torch.zeros(16, dtype=torch.int64))
    return convolutions, weights, outputs.shapes

def with_gradient(f, x, w):
    "Forward and backward, to both"
    y = f(x, w)
    torch.autograd.grad(y, (x, w), torch.ones_like(y))

def multiply(x, w):
    "A 1x1 convolution as a matrix product over channels"
    return F.linear(x.permute(0, 2, 3, 1), w[:, :, 0, 0]).permute(0, 3, 1, 2)

def compare_layouts(x, w):
    "Forward with the weight as it is, and with one that already has oneDNN's blocked layout"
    pad, one = [w.shape[-1]//2]*2, [1, 1]
    blocked = torch.ops.mkldnn._reorder_convolution_weight(w, pad, one, one, 1, x.shape)
    def run(): torch.ops.mkldnn._convolution_pointwise(x, blocked, None, pad, one, one, 1, 'none', [], '')
    with torch.no_grad(): return milliseconds(lambda: F.conv2d(x, w, padding=pad)), milliseconds(run)

def compare_products(x, w):
    "Forward and backward of a 1x1 convolution, and of a matrix product"
    x, w = x.requires_grad_(), w.requires_grad_()
    return (milliseconds(lambda: with_gradient(F.conv2d, x, w)),
            milliseconds(lambda: with_gradient(multiply, x, w)))

def compare_quotients(W, dtype):
    "Forward and backward of W/sigma, and of what is left for a weight when its output is divided instead"
    u, v, G = torch.randn(W.shape[0]), torch.randn(W[0].numel()), torch.randn_like(W).to(dtype)
    def now(): torch.autograd.grad(fused_quotient(W, u, v, dtype), W, G)
    def then():
        sigma = torch.dot(u, torch.mv(W.flatten(1), v))
        w = W.to(dtype)  # W itself in float32
        torch.autograd.grad((w, sigma), W, (G, torch.ones(())))
    return milliseconds(now), milliseconds(then)

def divide_outputs(size, dtype):
    "Forward and backward of dividing an output by sigma"
    y = torch.randn(size).to(dtype=dtype)
    if len(size) == 4: y = y.contiguous(memory_format=torch.channels_last)
    G, y, sigma = torch.randn_like(y), y.requires_grad_(), torch.ones((), requires_grad=True)
    return milliseconds(lambda: torch.autograd.grad(y/sigma.to(dtype), (y, sigma), G))

def compare_batches(shape, n):
    "One power iteration of each of n equal weights, and of all at once"
    W, u = torch.randn(n, shape[0], shape[1:].numel()), torch.randn(n, shape[0], 1)
    def single():
        for A, b in zip(W, u): A @ (A.T @ b)
    return milliseconds(single), milliseconds(lambda: W @ (W.mT @ u))

def run_step(dtype, batch=8):
    "One step at the real widths for 32 px, after one to warm up; oneDNN prints what the second one calls"
    cfg = config(32).change(batch=batch)
    model, half = SAGAN(cfg).train(), HALF.get(dtype)
    x, (_, y), fake, again = draw_batch(cfg, 'cpu')
    def autocast(): return torch.autocast('cpu', half) if half else nullcontext()
    step, *_ = our_step(cfg, model, autocast, x, y, fake, again, None, None)
    step()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON): step()

def count_primitives(text):
    "How often each (primitive, algorithm, direction) occurs in what oneDNN printed"
    lines = [line.split(',') for line in text.splitlines() if line.startswith('onednn_verbose')]
    calls = [line[line.index('exec') + 2:][:3] for line in lines if 'exec' in line]
    return [dict(primitive=p, algorithm=a, direction=d, calls=n)
            for (p, a, d), n in sorted(Counter(map(tuple, calls)).items())]

def find_algorithms(dtype):
    "The primitives of oneDNN in one step, from a separate process"
    command = [sys.executable, __file__, '--step', dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [dict(dtype=dtype) | row for row in count_primitives(done.stdout)]

def measure(dtype, convolutions, weights, outputs):
    "A row for each idea: milliseconds now, and then"
    names = 'blocked weights', '1x1 as products', 'divide outputs'
    sums = {name: torch.zeros(2) for name in names}
    for (size, shape), n in convolutions.items():
        x, w = [torch.randn(s).to(dtype=dtype, memory_format=torch.channels_last) for s in (size, shape)]
        sums['blocked weights'] += n*torch.tensor(compare_layouts(x, w))
        if shape[-1] == 1: sums['1x1 as products'] += n*torch.tensor(compare_products(x, w))
    for shape, n in weights.items():
        W = torch.randn(shape, requires_grad=True)
        sums['divide outputs'] += n*torch.tensor(compare_quotients(W, dtype))
    for size, n in outputs.items(): sums['divide outputs'][1] += n*divide_outputs(size, dtype)
    return [dict(dtype=str(dtype)[6:], idea=name, now=now, then=then)
            for name, (now, then) in ((k, v.tolist()) for k, v in sums.items())]

def measure_batches(weights):
    "A row for power iterations of equal shapes as one batch"
    batches = [compare_batches(torch.Size(shape), n) for shape, n in weights.items() if n > 1]
    now, then = map(sum, zip(*batches))
    return dict(dtype='float32', idea=f'batched power iteration, {len(batches)} shapes', now=now, then=then)

def main():
    "Measure and print, or run the step that is looked at"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, help='JSON file for the results')
    p.add_argument('--step', choices=['float32', 'bfloat16'], help='only run a step that oneDNN tells of')
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.step: return run_step(a.step)
    keep_freed_memory()
    shapes = find_shapes()
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measure(dtype, *shapes)]
    rows.append(measure_batches(shapes[1]))
    algorithms = [row for dtype in ('float32', 'bfloat16') for row in find_algorithms(dtype)]
    about = dict(machine=machine('cpu'), torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    results = about | dict(rows=rows, algorithms=algorithms)
    if a.out: a.out.write_text(json.dumps(results, indent=1), encoding='utf-8')
    print('| dtype | idea | now, ms | then, ms |\n|---|---|---|---|')
    for r in rows: print(f"| {r['dtype']} | {r['idea']} | {r['now']:.0f} | {r['then']:.0f} |")
    print('\n| dtype | primitive | algorithm | direction | calls |\n|---|---|---|---|---|')
    for r in algorithms: print(f"| {' | '.join(map(str, r.values()))} |")

if __name__ == '__main__': main()
