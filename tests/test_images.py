"What the page of picture files does not show: every kind of picture by its pixels, folders as they are"
import io, os, socket, struct, sys, warnings
from pathlib import Path

import numpy as np, pytest, torch
from PIL import ExifTags, Image, ImageOps
from machines import link, posix
from sagan.data import folder, from_dataset, ImageFiles, to_bytes
from sagan.widget import own_images
from sagan.images import decode_images, fit_image, list_images, read_image, to_rgb
from sagan.names import encodable

GRAYS = np.arange(256).reshape(16, 16)  # (height, width)
TURN = ExifTags.Base.Orientation


def tiff(a, bits, photometric=1, kind=1, order='<'):
    "A TIFF of one strip, written by hand: values (height, width) of so many bits, unsigned (1) or float (3)"
    h, w = a.shape
    if bits == 12:
        pairs = a.reshape(-1, 2).astype(int)
        data = b''.join(bytes([p >> 4, (p & 15) << 4 | q >> 8, q & 255]) for p, q in pairs)
    else: data = a.astype(f'{order}{"f" if kind == 3 else "u"}{bits//8}').tobytes()
    tags = {256: w, 257: h, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: h, 279: len(data),
            339: kind}
    head = struct.pack(f'{order}2sHI', b'II' if order == '<' else b'MM', 42, 8 + len(data))
    entries = b''.join(struct.pack(f'{order}HHII', t, 4, 1, v) for t, v in tags.items())
    return head + data + struct.pack(f'{order}H', len(tags)) + entries + bytes(4)


def saved(im, kind, **kwargs):
    "A picture as it comes back from a file of that kind"
    file = io.BytesIO()
    im.save(file, kind, **kwargs)
    return Image.open(io.BytesIO(file.getvalue()))


def gray(a): return Image.fromarray(a.astype(np.uint16))


MANY_BITS = {
    'png': lambda: saved(gray(GRAYS*257), 'PNG'),
    'tiff': lambda: saved(gray(GRAYS*257), 'TIFF'),
    'tiff, compressed': lambda: saved(gray(GRAYS*257), 'TIFF', compression='tiff_lzw'),
    'tiff, big-endian': lambda: Image.open(io.BytesIO(tiff(GRAYS*257, 16, order='>'))),
    'tiff, 0 is white': lambda: Image.open(io.BytesIO(tiff(65535 - GRAYS*257, 16, 0))),
    'tiff, 12 bits': lambda: Image.open(io.BytesIO(tiff(np.rint(GRAYS*4095/255), 12))),
    'pgm': lambda: saved(gray(GRAYS*257), 'PPM'),
    'float tiff': lambda: saved(Image.fromarray((GRAYS/255).astype(np.float32)), 'TIFF'),
    'float tiff, big-endian': lambda: Image.open(io.BytesIO(tiff(GRAYS/255, 32, kind=3, order='>'))),
    'float tiff, 0 is white': lambda: Image.open(io.BytesIO(tiff(1 - GRAYS/255, 32, 0, 3))),
    'in memory': lambda: gray(GRAYS*257),
    'I;16B in memory': lambda: Image.frombytes('I;16B', (16, 16), (GRAYS*257).astype('>u2').tobytes()),
    'I;16L in memory': lambda: Image.frombytes('I;16L', (16, 16), (GRAYS*257).astype('<u2').tobytes()),
    'doubles in memory': lambda: Image.fromarray(GRAYS/255),
    '8 bits': lambda: saved(Image.fromarray(GRAYS.astype(np.uint8)), 'PNG')}


@pytest.mark.parametrize('name', MANY_BITS)
def test_more_than_8_bits(name):
    "Grays look as their 8-bit twin does, whatever the file calls white"
    assert np.array_equal(np.array(to_rgb(MANY_BITS[name]())), np.stack([GRAYS]*3, 2))


def test_a_16_bit_png_of_an_older_pillow():
    "It was opened in the mode of 32-bit integers"
    class Older(Image.Image): format = 'PNG'
    older, im = Older(), Image.fromarray((GRAYS*257).astype(np.int32))
    older.im, older._mode, older._size = im.im, 'I', im.size
    assert np.array_equal(np.array(to_rgb(older)), np.stack([GRAYS]*3, 2))


@pytest.mark.parametrize('a, message', [
    (GRAYS.astype(np.int32), 'do not define a value for white; save the image with 8 or 16 bits'),
    ((GRAYS*257).astype(np.int32), 'signed or 32-bit integers do not define'),
    (GRAYS.astype(np.int16), 'signed or 32-bit integers do not define'),
    (GRAYS.astype(np.float32), r'values from 0 to 255 do not define a value for white; .* in \[0, 1\]'),
    (GRAYS/255 - .5, 'values from -0.5 to 0.5 do not define'),
    (np.full((8, 8), np.nan), 'values from nan to nan'),
    (np.full((8, 8), np.inf), 'values from inf to inf')])
def test_numbers_without_a_white(a, message, tmp_path):
    "They are refused with a sentence, from a file as from memory"
    im = Image.fromarray(a)
    with pytest.raises(ValueError, match=message): to_rgb(im)
    im.save(tmp_path/'a.tif')
    with pytest.raises(ValueError, match=message): read_image(tmp_path/'a.tif', 32)
    with pytest.raises(ValueError, match=f'1 of 1 files .*a.tif .*{message}'): folder(tmp_path, 32)


def half(mode, color, hidden):
    "A picture whose left half is of one color, the right half transparent with another one beneath"
    im = Image.new(mode, (16, 16), hidden)
    im.paste(color, (0, 0, 8, 16))
    return im


def palette(hidden, kind):
    im = half('P', 1, 0)
    im.putpalette([*hidden, 200, 60, 30])
    return saved(im, kind, transparency=0)


def rgba_palette(hidden):
    im = half('P', 1, 0)
    im.putpalette([*hidden, 0, 200, 60, 30, 255], 'RGBA')
    return im


def tagged(mode, color, hidden): return saved(half(mode, color, hidden), 'PNG', transparency=hidden)


RED, GREEN, BLACK = (200, 60, 30), (0, 255, 0), (0, 0, 0)
TRANSPARENT = {
    'RGBA': (RED, lambda hidden: saved(half('RGBA', (*RED, 255), (*hidden, 0)), 'PNG')),
    'RGBA webp': (RED, lambda hidden: saved(half('RGBA', (*RED, 255), (*hidden, 0)), 'WEBP', lossless=True)),
    'RGBA tiff': (RED, lambda hidden: saved(half('RGBA', (*RED, 255), (*hidden, 0)), 'TIFF')),
    'RGBa': (RED, lambda hidden: half('RGBA', (*RED, 255), (*hidden, 0)).convert('RGBa')),
    'LA': ((90,)*3, lambda hidden: saved(half('LA', (90, 255), (hidden[1], 0)), 'PNG')),
    'PA': (RED, lambda hidden: palette(hidden, 'PNG').convert('PA')),
    'palette png': (RED, lambda hidden: palette(hidden, 'PNG')),
    'palette gif': (RED, lambda hidden: palette(hidden, 'GIF')),
    'RGBA palette': (RED, rgba_palette),
    'RGB key': (RED, lambda hidden: tagged('RGB', RED, hidden)),
    'L key': ((90,)*3, lambda hidden: tagged('L', 90, hidden[1])),
    '16-bit key': ((90,)*3, lambda hidden: tagged('I;16', 90*257, hidden[1]*257))}


@pytest.mark.parametrize('name', TRANSPARENT)
@pytest.mark.parametrize('hidden', [GREEN, BLACK], ids=['green', 'black'])
def test_transparent_parts_are_white(name, hidden):
    "Whatever color is stored beneath them; opaque parts keep theirs"
    color, make = TRANSPARENT[name]
    im = np.array(to_rgb(make(hidden)))
    assert np.array_equal(im[0, [0, 15]], [color, [255]*3])


def test_half_transparent_parts_are_mixed_with_white():
    im = Image.new('RGBA', (8, 8), (0, 100, 200, 51))  # a fifth of the color
    assert to_rgb(im).getpixel((0, 0)) == (204, 224, 244)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBX', 'CMYK', 'YCbCr', 'HSV', 'RGBA', 'LA', 'PA'])
def test_8_bit_pictures_keep_their_bits(mode):
    "Without transparency, pixels are what Pillow's `convert` makes of them, as in earlier versions"
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    im = Image.fromarray(noise)
    im = im.convert({'LA': 'L', 'PA': 'P'}.get(mode, mode)).convert(mode)
    earlier = ImageOps.fit(im.convert('RGB'), (32, 32), Image.Resampling.BICUBIC)
    assert torch.equal(fit_image(im, 32), torch.from_numpy(np.array(earlier)).permute(2, 0, 1))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'PNG of 16 bits', 'TIFF of 16 bits'])
@pytest.mark.parametrize('turn', range(1, 9))
def test_pictures_are_turned_upright(kind, turn):
    "By EXIF, in files as in data sets; a picture that is given keeps its own pixels"
    upright = Image.fromarray(np.kron([[0, 80], [160, 240]], np.ones((16, 16))).astype(np.uint8))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a camera that is held so sees it
    im = upright.transpose(Image.Transpose(back[turn])) if turn > 1 else upright
    if 'bits' in kind: im = gray(np.array(im).astype(int)*257)
    exif = Image.Exif()
    exif[TURN] = turn
    kind, *_ = kind.split()
    im = saved(im, kind, exif=exif, **dict(quality=100) if kind == 'JPEG' else {})
    before = np.array(im)
    for _ in range(2):
        shown = np.array(to_rgb(im))[[4, 4, 28, 28], [4, 28, 4, 28], 0].astype(int)
        assert abs(shown - [0, 80, 160, 240]).max() <= 2
    assert kind == 'TIFF' or np.array_equal(np.array(im), before)


def test_the_same_from_every_entrance(tmp_path):
    "Folder, single pass, cache, data set of pictures or of paths, explorer"
    root = tmp_path/'pictures'
    root.mkdir()
    gray(GRAYS*257).save(root/'a.png')
    palette(GREEN, 'PNG').save(root/'b.gif')
    exif = Image.Exif()
    exif[TURN] = 6
    Image.fromarray(GRAYS.astype(np.uint8)).save(root/'c.jpg', exif=exif)
    files = [root/'a.png', root/'b.gif', root/'c.jpg']
    x = folder(root, 32).x
    assert x[0, 0].min() < 5 and x[0, 0].max() > 250 and x[1, :, 0, -1].tolist() == [255]*3
    assert torch.equal(x, torch.cat(list(ImageFiles(root, 32).batches())))
    assert torch.equal(x, folder(root, 32, max_gb=0, cache=tmp_path/'cache').x[:])
    assert torch.equal(x, from_dataset([Image.open(f) for f in files], 32, columns=('image', None)).x)
    assert torch.equal(x, from_dataset([(str(f), 0) for f in files], 32).x)
    assert torch.equal(x[:1], from_dataset([((GRAYS*257).astype(np.uint16), 0)], 32).x)
    assert torch.equal(x, to_bytes(own_images(root, 32)[0]))


def test_very_large_pictures(tmp_path, monkeypatch):
    "A limit protects against files made to fill the memory; the message says how to raise it"
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    Image.new('1', (64, 64), 1).save(tmp_path/'scan.png')
    with pytest.raises(ValueError, match='4096 pixels.*PIL.Image.MAX_IMAGE_PIXELS.*SAGAN_MAX_IMAGE_PIXELS'):
        read_image(tmp_path/'scan.png', 32)
    monkeypatch.setenv('SAGAN_MAX_IMAGE_PIXELS', 'many')
    with pytest.raises(ValueError, match="must be a number of pixels, got 'many'"):
        read_image(tmp_path/'scan.png', 32)
    monkeypatch.setenv('SAGAN_MAX_IMAGE_PIXELS', '5000')
    assert read_image(tmp_path/'scan.png', 32).unique().tolist() == [255]


@pytest.fixture
def photos(tmp_path):
    "A folder of two classes, of two images each"
    root = tmp_path/'photos'
    for c in ('cat', 'dog'):
        (root/c).mkdir(parents=True)
        for i in range(2): Image.new('RGB', (40, 40), (i, 2, 3)).save(root/c/f'{i}.png')
    return root


def told(path):
    "The names and the classes of a folder, and what was told of it"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        names, _, classes = list_images(path)
    return names, classes, [str(w.message) for w in caught]


IMAGES = ['cat/0.png', 'cat/1.png', 'dog/0.png', 'dog/1.png']


@pytest.mark.parametrize('files, message', [
    (['cat/._0.png', '.DS_Store', 'dog/.hidden.png', '__MACOSX/cat/._0.png', '.cache/a/b.png'],
     '5 hidden .such as .DS_Store'),
    (['cat/a.jfif', 'cat/b.ppm', 'notes.txt', 'dog/Thumbs.db'], '4 with other extensions .such as cat/a'),
    (['cat/more/a.png', 'cat/more/b.heic', 'cat/more/.x', 'dog/still/more/c.png'],
     '3 in subfolders of a class .such as cat/more/a.png'),
    (['cat/._0.png', 'a.avif', 'cat/b/c.png'],
     '1 hidden .* 1 in subfolders of a class .* 1 with other extensions')])
def test_what_is_not_read_is_told_once(photos, files, message):
    for f in files:
        (photos/f).parent.mkdir(parents=True, exist_ok=True)
        (photos/f).touch()
    names, classes, (only,) = told(photos)
    assert (names, classes) == (IMAGES, ['cat', 'dog'])
    with pytest.warns(UserWarning, match=message): folder(photos, 32)
    with pytest.warns(UserWarning, match=message): ImageFiles(photos, 32)
    assert only.startswith(f'ignored files in {photos}: ') and 'Image files end in .jpg' in only


def test_nothing_is_told_without_need(photos):
    (photos/'cat'/'0.png').rename(photos/'cat'/'0.PNG')
    (photos/'cat'/'nothing in it').mkdir()
    assert told(photos) == (['cat/0.PNG', *IMAGES[1:]], ['cat', 'dog'], [])


def test_no_image_of_an_ending_that_is_read(tmp_path):
    "The error says what is there"
    (tmp_path/'photo.heic').touch()
    with pytest.raises(ValueError, match='must end in .jpg.*1 with other extensions .such as photo.heic'):
        list_images(tmp_path)


def test_links(photos, tmp_path):
    "Those to images and to classes are followed, also in a circle; one that leads nowhere is named"
    (photos/'cat'/'0.png').rename(tmp_path/'elsewhere.png')
    link(photos/'cat'/'0.png', tmp_path/'elsewhere.png')
    (photos/'dog').rename(tmp_path/'dog')
    link(photos/'dog', tmp_path/'dog')
    assert told(photos) == (IMAGES, ['cat', 'dog'], [])
    link(photos/'cat'/'circle', photos)
    names, _, (message,) = told(photos)
    assert names == IMAGES and '1 in subfolders of a class (such as cat/circle)' in message
    link(photos/'cat'/'lost.png', 'nowhere.png')
    link(photos/'cat'/'self.png', 'self.png')
    with pytest.warns(UserWarning), pytest.raises(ValueError) as e: folder(photos, 32)
    assert '2 of 6 ' in str(e.value)
    assert 'lost.png (a link to nowhere.png, which does not exist)' in str(e.value)
    assert 'self.png (' in str(e.value)  # each system says it in its own words
    for gb in (8, 0):
        with pytest.warns(UserWarning, match='lost.png.*left out'):
            assert len(folder(photos, 32, skip_bad=True, max_gb=gb, cache=tmp_path/'cache')) == 4


@posix
def test_only_regular_files_are_opened(photos):
    "A pipe, a socket, a terminal or a folder that is named like an image keeps nobody waiting"
    os.mkfifo(photos/'cat'/'pipe.png')
    os.symlink('/dev/tty', photos/'cat'/'terminal.png')
    (photos/'cat'/'folder.png').mkdir()
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd()
        os.chdir(photos/'cat')  # a socket's path may not be long
        try: s.bind('socket.png')
        finally: os.chdir(here)
        names = ['cat/pipe.png', 'cat/terminal.png', 'cat/folder.png', 'cat/socket.png']
        bad = decode_images(photos, [*names, 'cat/0.png'], 32, lambda image: None)
        assert bad == dict.fromkeys(names, 'not a regular file')
        with pytest.raises(ValueError, match='3 of 7 files'): folder(photos, 32)


def test_what_may_not_be_read(photos, monkeypatch):
    "A folder that cannot be listed is named, and so is a file that cannot be opened"
    opened, listed = Image.open, os.scandir
    def refuse(call, name):
        def f(path):
            if Path(path).name == name: raise PermissionError(13, 'Permission denied', str(path))
            return call(path)
        return f
    monkeypatch.setattr(Image, 'open', refuse(opened, '0.png'))
    with pytest.raises(ValueError, match='cat/0.png .Permission denied.; dog/0.png .Permission denied'):
        folder(photos, 32)
    monkeypatch.setattr(os, 'scandir', refuse(listed, 'dog'))
    with pytest.raises(PermissionError, match=r'photos\Wdog cannot be listed: Permission denied$'):
        list_images(photos)


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere the names of files are Unicode')
def test_names_that_are_not_utf8(photos, tmp_path):
    "They are read as any other, and messages about them can be printed anywhere"
    odd = os.fsdecode(b'caf\xe9.png')
    (photos/'cat'/odd).write_bytes((photos/'cat'/'0.png').read_bytes())
    (photos/'dog'/os.fsdecode(b'\xff.txt')).touch()
    with pytest.warns(UserWarning, match=r'such as dog/\\xff.txt'): images = folder(photos, 32)
    with pytest.warns(UserWarning): cached = folder(photos, 32, max_gb=0, cache=tmp_path/'cache')
    assert len(images) == 5 and torch.equal(images.x, cached.x[:])
    (photos/'cat'/odd).write_bytes(b'')
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r'cat/caf\\xe9.png .zero bytes') as e:
        folder(photos, 32)
    assert str(e.value).encode()
    assert encodable('größe.png') == 'größe.png'
