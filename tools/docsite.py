"""Finish the docs after Quarto has built them:

    nbdev-docs && python tools/docsite.py

Each page gets a link that opens its notebook in Colab, and a link that downloads it; the home page gets the
explorer. Language models get every page as Markdown, NAME.html.md, and the list of these in llms.txt."""
import html, json, re, shutil
from pathlib import Path
from urllib.parse import urldefrag

import yaml
from nbdev.config import get_config, nbpath2html
from readme import nb2md, outside_code

root = Path(__file__).resolve().parent.parent
FRAME = ('<iframe title="Attention explorer" src="images/explorer.html" loading="lazy" '
         'style="width:100%;height:860px"></iframe>')


def sections():
    "Names of the notebooks in each section of the sidebar"
    site = yaml.safe_load((root/'nbs/_quarto.yml').read_text(encoding='utf-8'))['website']
    entries = site['sidebar']['contents']
    return {e.get('section') or e['text']: e.get('contents') or [e['href']] for e in entries}


def pages():
    "Names of all notebooks, in the order of the sidebar"
    return [name for names in sections().values() for name in names]


def html_name(name):
    "The page of a notebook: of 'library/21_data.ipynb', 'library/data.html'"
    return nbpath2html(name).as_posix()


def notebook_links(name):
    "HTML of the links below a page's title"
    cfg = get_config(root)
    colab = f'https://colab.research.google.com/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/nbs/{name}'
    return (f'<p class="notebook-links"><a href="{colab}">Open in Colab</a> · '
            f'<a href="{Path(name).name}" download>Download the notebook</a></p>')


def without_repetition(figure):
    "A figure's HTML without a caption that only repeats the picture's alternative text"
    caption = re.search(r'<figcaption.*?>(.*?)</figcaption>', figure, re.S)
    words = re.search(r'<img[^>]* alt="([^"]*)"', figure)
    def plain(text): return ' '.join(html.unescape(re.sub('<.*?>', '', text)).split())
    if not caption or words and plain(words[1]) != plain(caption[1]): return figure
    figure = figure.replace(caption[0], '')
    return figure if words else figure.replace('<img', f'<img alt="{html.escape(plain(caption[1]))}"')


def finish_page(text, name):
    """A page of the site with links to its notebook below the title

    A class that nbdev found in the notebook itself loses the `__main__.` before its name, and a picture loses
    a caption that repeats its words. Raises ValueError for a page without a title."""
    title = re.search(r'<header id="title-block-header".*?</header>', text, re.S)
    if title is None: raise ValueError(f"the page of {name} has no title to put the links below")
    text = text[:title.end()] + notebook_links(name) + text[title.end():]
    text = re.sub(r'(?<![\w.])__main__\.(?=[A-Z])', '', text)
    return re.sub('<figure.*?</figure>', lambda m: without_repetition(m[0]), text, flags=re.S)


def with_explorer(text):
    "The home page with the explorer at the end of its introduction"
    title = text.index('id="title-block-header"')
    heading = re.compile(r'<section\b|<h2\b').search(text, title).start()
    return text[:heading] + FRAME + text[heading:]


def title_of(nb):
    "Title and description of a notebook that nbdev has prepared"
    front = yaml.safe_load(''.join(nb['cells'][0]['source']).strip().strip('-'))
    return front['title'], front['description']


def markdown(nb, images):
    "A page for language models: links lead to other pages' Markdown; no frames, and no bytes of pictures"
    doc_url = get_config(root).doc_url
    def link(m):
        path, place = urldefrag(m[2])
        ours = path.startswith(doc_url) or not re.match('[a-z]+:', path)
        if ours and path.endswith('.ipynb'): path = html_name(path)
        if ours and path.endswith('.html') and 'images/' not in path: path += '.md'
        return m[1] + path + (f'#{place}' if place else '')
    title, description = title_of(nb)
    text = re.sub('<iframe.*?</iframe>|<!--.*?-->|(?<=src=")data:[^"]*', '', nb2md(nb, images), flags=re.S)
    text = outside_code(lambda part: re.sub(r'(\]\(|href=")([^)"\s]+)', link, part), text)
    return f'# {title}\n\n> {description}\n\n{text}'


def llms_txt(titles):
    "The list of all pages for language models, in the form of llmstxt.org; `titles` by name of the notebook"
    cfg = get_config(root)
    lines = [f'# {cfg.title}', '', f'> {cfg.description}']
    for section, names in sections().items():
        lines += ['', f'## {section}', '']
        for name in names:
            title, description = titles[name]
            lines.append(f'- [{title}]({cfg.doc_url}{html_name(name)}.md): {description}')
    return '\n'.join(lines) + '\n'


def add_markdown(site, prepared):
    "Write the pages for language models, and their list, into the folder `site`"
    titles = {}
    for name in pages():
        nb, page = json.loads((prepared/name).read_text(encoding='utf-8')), site/html_name(name)
        titles[name] = title_of(nb)
        text = markdown(nb, page.with_name(f'{page.stem}_files'))
        page.with_suffix('.html.md').write_text(text, encoding='utf-8')
    (site/'llms.txt').write_text(llms_txt(titles), encoding='utf-8')


def finish_site(site, prepared):
    "Add the missing parts to the site that Quarto built in the folder `site` from the pages in `prepared`"
    for name in pages():
        page = site/html_name(name)
        text = finish_page(page.read_text(encoding='utf-8'), name)
        if name == 'index.ipynb': text = with_explorer(text)
        page.write_text(text, encoding='utf-8')
        shutil.copy(root/'nbs'/name, page.parent)
    add_markdown(site, prepared)


if __name__ == '__main__': finish_site(get_config(root).doc_path, root/'_proc')
