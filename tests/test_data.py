"What the data page does not show: folders with mistakes, files that cannot be read, settings that cannot be"
import threading, tracemalloc, warnings

import numpy as np, pytest, torch
from PIL import Image
from sagan.data import (
    digits, folder, from_dataset, image_dls, ImageFiles, Images, load_images, MemoryLoader, to_unit, twins)
from sagan.images import decode_images, list_images, read_image
from sagan.storage import MappedImages


def paint(path, color, size=(50, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, color).save(path)


@pytest.fixture
def photos(tmp_path):
    "A folder of two classes, of nine images"
    root = tmp_path/'photos'
    for i in range(4):
        paint(root/'sky'/f'{i}.jpg', (120, 180, 250 - i))
        paint(root/'grass'/f'{i}.png', (40 + i, 160, 60), (30, 90))
    Image.new('L', (64, 64), 128).save(root/'sky'/'gray.png')
    return root


@pytest.fixture
def in_file(photos, tmp_path):
    "The same images from a mapped file"
    images = folder(photos, 32)
    (tmp_path/'bytes').write_bytes(images.x.numpy().tobytes())
    return Images(MappedImages(tmp_path/'bytes', 32), images.y, images.classes, images.name)


@pytest.mark.parametrize('gap', [5, 26, -2, 4., True])
def test_impossible_gaps_of_twins(gap):
    with pytest.raises(ValueError, match='even number from 0 to 24'): twins(2, gap=gap)


@pytest.mark.parametrize('size', [48, 128])
def test_impossible_sizes_of_twins(size):
    with pytest.raises(ValueError, match='must be 32 or 64 pixels'): twins(2, size)


def test_a_size_that_the_networks_do_not_have(photos):
    with pytest.raises(ValueError, match='must be 32, 64, 128 or 256'): folder(photos, 48)
    with pytest.raises(ValueError, match='must be 32, 64, 128 or 256'): ImageFiles(photos, 48)
    with pytest.raises(ValueError, match='must be 32, 64, 128 or 256'): digits(48)


def test_no_folder(photos):
    with pytest.raises(FileNotFoundError, match='there is no folder'): folder(photos/'nowhere')
    with pytest.raises(FileNotFoundError, match='there is no folder'): load_images('digit', 32)


def test_a_class_without_images(photos):
    (photos/'empty').mkdir()
    with pytest.raises(ValueError, match='class without images in .*: empty; add images'): folder(photos, 32)
    with pytest.raises(ValueError, match='holds no images; they must end in .jpg'): folder(photos/'empty', 32)


def test_one_level_too_many(photos):
    with pytest.raises(ValueError, match='did you mean .*photos'): folder(photos.parent, 32)


def test_images_beside_subfolders(photos):
    paint(photos/'stray.png', 'red')
    with pytest.raises(ValueError, match='both images and subfolders'): folder(photos, 32)


def test_hidden_folders_are_no_classes(photos):
    (photos/'.thumbnails').mkdir()
    with pytest.warns(UserWarning, match='1 hidden'): assert list_images(photos)[2] == ['grass', 'sky']


def test_files_that_cannot_be_read(photos):
    "All are named; with `skip_bad` they are left out, and named in a warning"
    whole = folder(photos, 32)
    (photos/'sky'/'half.jpg').write_bytes((photos/'sky'/'0.jpg').read_bytes()[:200])
    (photos/'sky'/'nothing.png').touch()
    with pytest.raises(ValueError) as e: folder(photos, 32)
    assert str(e.value).startswith(f'2 of 11 files in {photos} cannot be read: sky/half.jpg (')
    assert 'sky/nothing.png (zero bytes). Repair or remove them' in str(e.value)
    with pytest.warns(UserWarning, match='half.jpg'): images = folder(photos, 32, skip_bad=True)
    assert len(images) == 9 and torch.equal(images.x, whole.x) and torch.equal(images.y, whole.y)


def test_no_file_can_be_read(tmp_path):
    "A set of no images, or a class of none, is no set"
    for i in range(12): (tmp_path/f'{i:02}.png').touch()
    with pytest.raises(ValueError, match=r'12 of 12 files .*09.png \(zero bytes\); \.\.\.'):
        folder(tmp_path, 32, skip_bad=True)


def test_a_class_of_which_no_file_can_be_read(photos):
    for file in (photos/'grass').iterdir(): file.write_bytes(b'')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match='class without readable images in .*: grass'):
            folder(photos, 32, skip_bad=True)


def test_reasons(photos):
    "An unreadable image is an error with a short reason, and does not stop the others"
    (photos/'sky'/'text.png').write_text('no image', encoding='utf-8')
    (photos/'sky'/'nothing.png').touch()
    with pytest.raises(ValueError, match='^zero bytes$'): read_image(photos/'sky'/'nothing.png', 32)
    names, images = ['sky/0.jpg', 'sky/text.png', 'sky/nothing.png', 'grass/1.png'], []
    bad = decode_images(photos, names, 32, images.append)
    assert list(bad) == names[1:3] and bad['sky/nothing.png'] == 'zero bytes'
    assert bad['sky/text.png'] == "UnidentifiedImageError: cannot identify image file 'text.png'"
    assert torch.equal(torch.stack(images), torch.stack([read_image(photos/names[i], 32) for i in (0, 3)]))


def test_one_pass_names_files_that_cannot_be_read(photos):
    (photos/'sky'/'nothing.png').touch()
    with pytest.raises(ValueError, match='nothing.png .zero bytes.. Repair or remove them'):
        list(ImageFiles(photos, 32).batches())


def test_listing_a_folder_keeps_one_string_per_file(tmp_path):
    for c in range(10):
        (tmp_path/f'class{c}').mkdir()
        for i in range(1000): (tmp_path/f'class{c}'/f'n0144{c:04}_{i:05}.JPEG').touch()
    tracemalloc.start()
    try:
        names, y, _ = list_images(tmp_path)
        _, most = tracemalloc.get_traced_memory()
    finally: tracemalloc.stop()
    assert (len(names), y.bincount().tolist()) == (10_000, [1000]*10)
    assert most/len(names) < 300  # bytes


@pytest.mark.parametrize('bs, kwargs, message', [
    (0, {}, 'from 1 to 1797 .the number of images in digits., got 0'),
    (4096, {}, 'from 1 to 1797 .the number of images in digits., got 4096'),
    (899, dict(rank=0, world=2),
     'from 1 to 898 .the number of images in digits, shared by 2 processes., got 899'),
    (8, dict(rank=2, world=2), 'rank must be from 0 to 1 for world=2, got 2'),
    (8, dict(rank=-1, world=2), 'rank must be from 0 to 1 for world=2, got -1')])
def test_impossible_settings_of_the_loader(bs, kwargs, message):
    with pytest.raises(ValueError, match=message): MemoryLoader(digits(), bs, **kwargs)
    with pytest.raises(ValueError, match=message): image_dls(digits(), bs, **kwargs)


def test_the_loader_reads_ahead(photos, in_file):
    "Images in a file give the same batches, and all but the first of each pass are read by a second thread"
    by, own = [], threading.get_ident()
    class Watched(MappedImages):
        def __getitem__(self, i):
            by.append(threading.get_ident() == own)
            return super().__getitem__(i)
    in_memory = folder(photos, 32)
    watched = Images(Watched(photos.parent/'bytes', 32), in_file.y, in_file.classes, in_file.name)
    ours, theirs = [list(MemoryLoader(images, 3, 6, flip=True)) for images in (watched, in_memory)]
    assert len(ours) == len(theirs) == 6
    for (x, y), (x2, y2) in zip(ours, theirs): assert torch.equal(x, x2) and torch.equal(y, y2)
    assert by == [True, False, False]*2  # nine images: two passes of three batches


def test_a_state_put_back_in_the_middle_of_a_pass(in_file):
    "It counts from the next batch on, whatever has been read ahead"
    loader = MemoryLoader(in_file, 2, 8, flip=True)
    batches = iter(loader)
    next(batches)
    state, order = loader.rng.get_state(), loader.order
    expected = [next(batches)[0] for _ in range(3)]
    loader.rng.set_state(state)
    loader.order = order
    for x in expected: assert torch.equal(next(batches)[0], x)
    assert torch.equal(loader.one_batch()[0], next(batches)[0])


def test_images_in_a_file_stay_there(photos, in_file):
    assert in_file.to('meta').x is in_file.x
    assert in_file.to('meta').y.is_meta
    x, y = next(iter(MemoryLoader(in_file, 9)))
    colors, expected = [images.mean((2, 3)).unique(dim=0) for images in (x, to_unit(folder(photos, 32).x))]
    assert torch.equal(colors, expected)


class Named(list):
    "A data set that knows the names of its classes"
    classes = ['cat', 'dog']


PICTURE = Image.new('RGB', (40, 40), (10, 20, 30))


@pytest.mark.parametrize('image', [
    np.full((40, 40, 3), (10, 20, 30), np.uint8),
    torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 40, 40),
    PICTURE, PICTURE.convert('RGBA')], ids=['array', 'tensor', 'picture', 'with alpha'])
@pytest.mark.parametrize('item', [
    lambda im: (im, 0), lambda im: [im, np.int64(0)], lambda im: (im, torch.tensor(0), 'more', None),
    lambda im: dict(label=0, image=im, more=1)], ids=['tuple', 'list', 'longer', 'dictionary'])
def test_items_of_data_sets(image, item):
    images = from_dataset([item(image)]*2, 32)
    assert (images.y.tolist(), images.classes) == ([0, 0], ['0'])
    assert (images.x == torch.tensor([10, 20, 30])[:, None, None]).all()


@pytest.mark.parametrize('image', [
    np.full((40, 40), 7, np.uint8), np.full((40, 40, 1), 7, np.uint8), np.full((40, 40), 7*257, np.uint16),
    torch.full((1, 40, 40), 7, dtype=torch.uint8), torch.full((40, 40), 7, dtype=torch.uint8)])
def test_gray_items(image):
    assert (from_dataset([(image, 0)], 32).x == 7).all()


@pytest.mark.parametrize('labels, y, classes', [
    ([0, 2, 1], [0, 2, 1], ['0', '1', '2']),
    ([20, 10, 20], [1, 0, 1], ['10', '20']),  # numbers that are skipped are no classes
    ([10**9, 5], [1, 0], ['5', '1000000000']),
    ([torch.tensor(1), np.uint8(0)], [1, 0], ['0', '1'])])
def test_labels_without_names(labels, y, classes):
    images = from_dataset([(PICTURE, c) for c in labels], 32)
    assert (images.y.tolist(), images.classes) == (y, classes)


def test_labels_with_names():
    images = from_dataset(Named([(PICTURE, 1), (PICTURE, 'cat'), (PICTURE, 'dog')]), 32)
    assert (images.y.tolist(), images.classes) == ([1, 0, 1], ['cat', 'dog'])


@pytest.mark.parametrize('items', [[PICTURE]*2, [(PICTURE, 5)]*2, [(PICTURE,)]*2, [(PICTURE, None)]*2,
                                   [dict(image=PICTURE)]*2])
def test_items_without_labels(items):
    "They have to be asked for, and ignore the labels that are there"
    images = from_dataset(items, 32, columns=('image', None))
    assert (images.y.tolist(), images.classes) == ([0, 0], [])


@pytest.mark.parametrize('label, message', [
    (None, "it has no label; read images without labels with columns=..image., None"),
    (-1, 'its label is -1; labels must be whole numbers from 0 on'), (1.7, 'its label is 1.7'),
    (1., 'its label is 1.0'), (True, 'its label is True'), (np.bool_(True), 'its label is .*True'),
    (torch.tensor(True), r'its label is tensor.True'), (torch.tensor(1.), 'its label is tensor'),
    ([0, 1], r'its label is \[0, 1\]'), ('bird', "its label is 'bird'"),
    (torch.zeros(40), 'its label is tensor'), (PICTURE, 'its label is <PIL'),
    (2, 'its label is 2, but the data set has 2 classes, from 0 on')])
def test_labels_that_are_no_classes(label, message):
    with pytest.raises(ValueError, match=f'^item 1 of the data set cannot be used: {message}'):
        from_dataset(Named([(PICTURE, 0), (PICTURE, label)]), 32)


@pytest.mark.parametrize('image, message', [
    (torch.rand(3, 40, 40), r'a tensor of shape .3, 40, 40., float32; give PIL images.* without ToTensor'),
    (torch.rand(3, 40, 40)*2 - 1, 'float32'), (torch.rand(1, 28, 28), 'float32'),
    (torch.zeros(40, 40, 3, dtype=torch.uint8), 'a tensor of shape .40, 40, 3., uint8'),
    (np.zeros((40, 40, 3)), 'an array of shape .40, 40, 3., float64'),
    (np.zeros(40, np.uint8), 'shape .40,., uint8'), (np.zeros((40, 40), np.int64), 'int64'),
    (np.zeros((2, 40, 40, 3), np.uint8), 'shape .2, 40, 40, 3.'),
    (dict(bytes=b'', path=None), 'of type dict; give PIL images .Hugging Face: ds.cast_column'),
    (None, 'of type NoneType'), (b'bytes', 'of type bytes'),
    ('nowhere.png', 'nowhere.png cannot be read .No such')])
def test_items_that_are_no_images(image, message):
    with pytest.raises(ValueError, match=f'^item 1 of the data set cannot be used: its image .*{message}'):
        from_dataset([(PICTURE, 0), (image, 0)], 32)


def test_items_that_fail():
    "The number of the item is named, with the reason"
    class Damaged(list):
        def __getitem__(self, i): return [(PICTURE, 0), ()][i] if i < 2 else 1/0
    with pytest.raises(ValueError, match='item 1 of the data set cannot be used: IndexError'):
        from_dataset(Damaged([0]*2), 32)
    with pytest.raises(ValueError, match="item 0 .*it has picture, label; choose columns="):
        from_dataset([dict(picture=PICTURE, label=0)], 32)


@pytest.mark.parametrize('ds, message', [
    ([], 'the data set has no images'), (dict(train=[], test=[]), 'the splits train, test; give one of them'),
    (iter([(PICTURE, 0)]), 'is streamed'), (torch.utils.data.DataLoader([1]), 'is streamed'),
    (5, 'is streamed')])
def test_what_is_no_data_set(ds, message):
    with pytest.raises(ValueError, match=message): from_dataset(ds, 32)


ONES = torch.ones(4, 3, 32, 32, dtype=torch.uint8)
Y = torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize('x, y, message', [
    (ONES.float(), Y, r'of these must be uint8 of shape \(n, 3, S, S\), got torch.float32 of shape \(4, 3,'),
    (ONES[:, :1], Y, r'got torch.uint8 of shape \(4, 1, 32, 32\)'), (ONES[0], Y, r'shape \(3, 32, 32\)'),
    (ONES[..., :16], Y, r'shape \(4, 3, 32, 16\)'), (ONES.permute(0, 2, 3, 1), Y, r'shape \(4, 32, 32, 3\)'),
    (ONES.numpy(), Y, 'got uint8'), ([1, 2], Y, 'got list'), (ONES[..., :20, :20], Y, 'size must be 32, 64'),
    (ONES, Y[:3], r'labels of these must be int64 of shape \(4,\), got torch.int64 of shape \(3,\)'),
    (ONES, Y.float(), 'got torch.float32'), (ONES, Y[:, None], r'shape \(4, 1\)'), (ONES, [0]*4, 'got list'),
    (ONES, Y - 1, 'labels of these must be from 0 to 1 for its 2 classes, got -1 to 0'),
    (ONES, Y*5, 'got 0 to 5')])
def test_images_that_cannot_be_trained_on(x, y, message):
    "They are refused where a loader is made, not in the middle of the training"
    with pytest.raises(ValueError, match=message): image_dls(Images(x, y, ['a', 'b'], 'these'), 2)
    image_dls(Images(ONES, Y, ['a', 'b'], 'these'), 2)
