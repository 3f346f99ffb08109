"""Forward and backward of upsampling + 3x3 convolution and of 3x3 convolution + pooling: plain against the 4x4 form, on the CPU.

    python benchmarks/networks.py"""
import statistics, time, torch, torch.nn as nn
from sagan import networks, training

def seconds(f, x, repeats=5):
    "Median seconds of a forward and backward pass, after two to warm up"
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        y = f(x)
        y.backward(y.detach())
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])

if __name__ == '__main__':
    rule = networks._pays
    training.keep_freed_memory()
    print(f'{torch.get_num_threads()} threads\n| dtype | batch | channels | small map | positions | chosen | '
          f'upsampling: plain, ms | 4x4, ms | ratio | pooling: plain, ms | 4x4, ms | ratio |\n' + '|---'*12 + '|')
    for dtype in (torch.float32, torch.bfloat16):
        for B, C, S in [(16, 32, 8), (16, 64, 16), (64, 256, 4), (64, 256, 8), (64, 256, 16), (8, 1024, 4), (8, 512, 8), (8, 256, 16), (8, 128, 32), (8, 64, 64)]:
            torch.manual_seed(0)
            conv = nn.Conv2d(C, C, 3, padding=1).to(memory_format=torch.channels_last, dtype=dtype)
            small, big = [torch.randn(B, C, s, s, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for s in (S, 2*S)]
            chosen, t = rule(small, dtype), {}
            for form in (False, True):
                networks._pays = lambda *_: form
                t[form] = seconds(lambda x: networks.up_conv(conv, x), small), seconds(lambda x: networks.conv_pool(conv, x), big)
            (a, b), (c, d) = t[False], t[True]
            print(f'| {str(dtype)[6:]} | {B} | {C} | {S}x{S} | {B*S*S} | {"4x4" if chosen else "plain"} | '
                  f'{a*1e3:.1f} | {c*1e3:.1f} | {a/c:.2f} | {b*1e3:.1f} | {d*1e3:.1f} | {b/d:.2f} |', flush=True)
