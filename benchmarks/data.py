"Images per second: batches by indexing one byte tensor (`MemoryLoader`) against item-by-item loading, in one run"
import time
from torch.utils.data import DataLoader, Dataset
from sagan.data import MemoryLoader, digits, to_unit

images = digits()

class Items(Dataset):
    "The same images, converted one by one"
    def __len__(self): return len(images)
    def __getitem__(self, i): return to_unit(images.x[i]), images.y[i]

def per_second(loader, passes):
    "Images per second over some passes, after one to warm up"
    for _ in loader: pass
    start, n = time.perf_counter(), 0
    for _ in range(passes):
        for x, _ in loader: n += len(x)
    return n/(time.perf_counter() - start)

if __name__ == '__main__':
    print('| batch | indexing, images/s | item by item, images/s | ratio |\n|---|---|---|---|')
    for bs in (32, 64, 256):
        fast = per_second(MemoryLoader(images, bs), 50)
        slow = per_second(DataLoader(Items(), bs, shuffle=True, drop_last=True), 2)
        print(f'| {bs} | {fast:,.0f} | {slow:,.0f} | {fast/slow:.1f} |')
