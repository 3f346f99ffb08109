"The cost of data, in one run: batches from memory and from a file on the disk, decoding and listing a folder"
import os, tempfile, time
from pathlib import Path
import numpy as np, torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from sagan.data import decode_images, digits, Images, list_images, MemoryLoader, to_unit
from sagan.storage import digest_files, MappedImages

images = digits()


class Items(Dataset):
    "The same images, converted one by one"
    def __len__(self): return len(images)
    def __getitem__(self, i): return to_unit(images.x[i]), images.y[i]


class ReadOnTouch(MappedImages):
    "A mapped file whose pages are read one after the other, when they are first touched"
    def __getitem__(self, i): return torch.from_numpy(np.take(self.bytes, i.numpy(), 0))


def images_per_second(loader, passes):
    "Images per second over some passes, after one pass to warm up"
    for _ in loader: pass
    start, n = time.perf_counter(), 0
    for _ in range(passes):
        for x, _ in loader: n += len(x)
    return n/(time.perf_counter() - start)


def measure_from_memory():
    print('| batch | indexing, images/s | item by item, images/s | ratio |\n|---|---|---|---|')
    for bs in (32, 64, 256):
        fast = images_per_second(MemoryLoader(images, bs), 50)
        slow = images_per_second(DataLoader(Items(), bs, shuffle=True, drop_last=True), 2)
        print(f'| {bs} | {fast:,.0f} | {slow:,.0f} | {fast/slow:.1f} |')


def measure_waiting(batches, file, cold, step):
    "Milliseconds of waiting for a batch, with `step` seconds of training (here: matrix products) in between"
    with open(file, 'rb') as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED if cold else os.POSIX_FADV_NORMAL)
    waited, a = [], torch.rand(512, 512)
    while True:
        start = time.perf_counter()
        if next(batches, None) is None: return 1e3*sum(waited[1:])/len(waited[1:])
        now = time.perf_counter()
        waited.append(now - start)
        while time.perf_counter() - now < step: a @ a


def measure_from_file(folder, n=20_000, bs=64, step=.1):
    file = folder/'images'
    x = torch.randint(0, 256, (n, 3, 128, 128), dtype=torch.uint8)
    with open(file, 'wb') as f:
        f.write(x.numpy())
        f.flush()
        os.fsync(f.fileno())
    y = torch.zeros(n, dtype=torch.int64)
    def load(x, seed):
        # to `meta`: without conversion, which the device does
        return iter(MemoryLoader(Images(x, y, [], 'random'), bs, 40, seed=seed, device='meta'))
    def index(x, seed):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        return (x[i] for i in order.split(bs)[:40])
    print(f'\n| {n:,} images of 128 px, batches of {bs}, a step of {step*1e3:.0f} ms | waiting for the '
          'bytes, ms per batch | share of the time |\n|---|---|---|')
    ways = (('in memory', load, lambda: x, False),
            ('file, in the page cache', load, lambda: MappedImages(file, 128), False),
            ('file, on disk (`MemoryLoader`)', load, lambda: MappedImages(file, 128), True),
            ('file, on disk, not read ahead', index, lambda: MappedImages(file, 128), True),
            ('file, on disk, pages read when touched', index, lambda: ReadOnTouch(file, 128), True))
    for seed, (name, batches, open_images, cold) in enumerate(ways):
        # opened for each: the system forgets no page that is mapped
        ms = measure_waiting(batches(open_images(), seed), file, cold, step)
        print(f'| {name} | {ms:.1f} | {ms/(ms + 1e3*step):.1%} |')


def measure_decoding(folder, n=1000):
    g = torch.Generator().manual_seed(0)
    folder.mkdir()
    for i in range(n):
        x = torch.randint(0, 256, (24, 32, 3), dtype=torch.uint8, generator=g)
        im = Image.fromarray(x.numpy()).resize((500, 375), Image.Resampling.BICUBIC)
        im.save(folder/f'{i:04}.jpg', quality=90)
    start = time.perf_counter()
    decode_images(folder, list_images(folder)[0], 128, lambda image: None)
    rate = n/(time.perf_counter() - start)
    print(f"\nDecoding 500x375 JPEG to 128 px on {os.cpu_count()} cores: {rate:,.0f} images/s, ImageNet's "
          f"1,281,167 in {1281167/rate/3600:.1f} hours.")


def measure_listing(folder):
    print('\n| files in 10 subfolders | listing, s | microseconds per file | digest, s | microseconds per '
          'file |\n|---|---|---|---|---|')
    for n in (25_000, 50_000, 100_000):
        path = folder/f'{n}'
        for i in range(n):
            if i < 10: (path/f'{i}').mkdir(parents=True)
            (path/f'{i%10}'/f'n01440764_{i:06}.JPEG').touch()
        start = time.perf_counter()
        names = list_images(path)[0]
        listed = time.perf_counter() - start
        start = time.perf_counter()
        digest_files(path, names)
        digest = time.perf_counter() - start
        print(f'| {n:,} | {listed:.2f} | {listed/n*1e6:.1f} | {digest:.2f} | {digest/n*1e6:.1f} |')


if __name__ == '__main__':
    measure_from_memory()
    with tempfile.TemporaryDirectory() as tmp:
        measure_from_file(Path(tmp))
        measure_decoding(Path(tmp)/'jpeg')
        measure_listing(Path(tmp))
