"""What four ideas could save in the convolutions and spectral norms of the paper's networks, on one thread.

Every shape of a forward pass of G (8 images) and D (16) at 128 px is measured alone and counted as often as
it occurs, so a line is the time of that part in one pass of both networks. Convolutions that are merged with
a change of size are not among them.

    python benchmarks/candidates.py"""
import torch, torch.nn as nn, torch.nn.functional as F
from collections import Counter
from sagan.config import presets
from sagan.kernels import fused_quotient, keep_freed_memory
from sagan.training import SAGAN
from winograd import milliseconds

def find_shapes():
    "Shapes of convolutions (input, weight) and of all weights with a spectral norm, with their counts"
    cfg = presets['paper'].change(dtype='float32')
    with torch.device('meta'): model = SAGAN(cfg)
    convolutions, weights = Counter(), Counter()
    def note(conv, args, out): convolutions[tuple(args[0].shape), tuple(conv.weight.shape)] += 1
    for net in (model.G, model.D):
        for m in net.modules():
            if isinstance(m, nn.Conv2d): m.register_forward_hook(note)
            if hasattr(m, 'parametrizations'): weights[tuple(m.weight.shape)] += 1
    with torch.device('meta'):
        model.G(torch.randn(8, cfg.z_dim), torch.zeros(8, dtype=torch.int64))
        model.D(torch.randn(16, 3, cfg.size, cfg.size), torch.zeros(16, dtype=torch.int64))
    return convolutions, weights

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

def compare_casts(W, dtype):
    "W/sigma in `dtype`, and W in `dtype` alone, which is left when the output is divided instead"
    u, v = torch.randn(W.shape[0]), torch.randn(W.flatten(1).shape[1])
    with torch.no_grad():
        return (milliseconds(lambda: fused_quotient(W, u, v, dtype)),
                milliseconds(lambda: W.to(dtype, copy=True)))

def compare_batches(shape, n):
    "One power iteration of each of n equal weights, and of all at once"
    W, u = torch.randn(n, shape[0], shape[1:].numel()), torch.randn(n, shape[0], 1)
    def single():
        for A, b in zip(W, u): A @ (A.T @ b)
    return milliseconds(single), milliseconds(lambda: W @ (W.mT @ u))

if __name__ == '__main__':
    torch.set_num_threads(1)
    keep_freed_memory()
    convolutions, weights = find_shapes()
    print('| dtype | idea | now, ms | then, ms |\n|---|---|---|---|')
    for dtype in (torch.float32, torch.bfloat16):
        sums = {name: torch.zeros(2) for name in ('blocked weights', '1x1 as products', 'divide outputs')}
        for (size, shape), n in convolutions.items():
            x, w = [torch.randn(s).to(dtype=dtype, memory_format=torch.channels_last) for s in (size, shape)]
            sums['blocked weights'] += n*torch.tensor(compare_layouts(x, w))
            y = F.conv2d(x, w, padding=shape[-1]//2)
            sums['divide outputs'][1] += n*milliseconds(lambda: y.div_(1.01))
            if shape[-1] == 1: sums['1x1 as products'] += n*torch.tensor(compare_products(x, w))
        for shape, n in weights.items():
            sums['divide outputs'] += n*torch.tensor(compare_casts(torch.randn(shape), dtype))
        for name, (now, then) in sums.items():
            print(f'| {str(dtype)[6:]} | {name} | {now:.0f} | {then:.0f} |')
    batches = [compare_batches(torch.Size(shape), n) for shape, n in weights.items() if n > 1]
    now, then = map(sum, zip(*batches))
    print(f'| float32 | batched power iteration, {len(batches)} shapes | {now:.0f} | {then:.0f} |')
