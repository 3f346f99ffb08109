"""Forward and backward pass of upsampling + 3x3 convolution and of 3x3 convolution + pooling on the CPU:
the plain form against the 4x4 form.

    python benchmarks/networks.py"""
import statistics, time, torch, torch.nn as nn
from sagan import kernels

# Images in a batch, channels, size of the small map
SHAPES = [(16, 32, 8), (16, 64, 16), (64, 256, 4), (64, 256, 8), (64, 256, 16),
          (8, 1024, 4), (8, 512, 8), (8, 256, 16), (8, 128, 32), (8, 64, 64)]
COLUMNS = ['dtype', 'batch', 'channels', 'small map', 'positions', 'chosen',
           'upsampling: plain, ms', '4x4, ms', 'ratio', 'pooling: plain, ms', '4x4, ms', 'ratio']


def seconds(f, x, repeats=5):
    "Median seconds of a forward and backward pass, after two to warm up"
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        y = f(x)
        y.backward(y.detach())
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def features(B, C, size, dtype):
    x = torch.randn(B, C, size, size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def row(dtype, B, C, S):
    "The cells of one row of the table"
    torch.manual_seed(0)
    conv = nn.Conv2d(C, C, 3, padding=1).to(memory_format=torch.channels_last, dtype=dtype)
    small, big = features(B, C, S, dtype), features(B, C, 2*S, dtype)
    rule, t = kernels.is_4x4_faster, {}
    chosen = '4x4' if rule(small, dtype) else 'plain'
    for form in ('plain', '4x4'):
        kernels.is_4x4_faster = lambda *_: form == '4x4'
        up = seconds(lambda x: kernels.up_conv(conv, x), small)
        pool = seconds(lambda x: kernels.conv_pool(conv, x), big)
        t[form] = up, pool
    kernels.is_4x4_faster = rule
    cells = [str(dtype).removeprefix('torch.'), B, C, f'{S}x{S}', B*S*S, chosen]
    for plain, fast in zip(t['plain'], t['4x4']):
        cells += [f'{plain*1e3:.1f}', f'{fast*1e3:.1f}', f'{plain/fast:.2f}']
    return cells


def line(cells): return '| ' + ' | '.join(map(str, cells)) + ' |'


if __name__ == '__main__':
    kernels.keep_freed_memory()
    print(f'{torch.get_num_threads()} threads\n')
    print(line(COLUMNS) + '\n' + '|---'*len(COLUMNS) + '|')
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES: print(line(row(dtype, *shape)), flush=True)
