"""The pages of the site: their links lead somewhere, they load nothing, and are rendered whole."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

pytestmark = pytest.mark.xdist_group("site")
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
LEFT_OVER = {
    "a directive or a role of reStructuredText": r"\.\. math::|:(?:math|class|func|meth):`",
    "a formula": r"\\\(|\\\[|arithmatex",
    "code in two backticks": r"``",
    "a doctest as text": r"(?m)^&gt;&gt;&gt; ",
    "a list in a paragraph": r"<p>[^<]*\n- ",
}


class Page(HTMLParser):
    """The ids and links of a page, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        is_loaded = tag != "link" or found.get("rel") in ("stylesheet", "icon", "preconnect")
        if tag in LOADED and is_loaded and found.get(LOADED[tag]):
            self.loads.append(found[LOADED[tag]])


@pytest.fixture(scope="module")
def pages(site):
    return {
        path: Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
        if path.name != "404.html"
    }


def test_every_link_leads_to_a_page_and_a_place_on_it(pages):
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if urlsplit(target).scheme:
                continue
            found = (path.parent / unquote(target)).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            places = pages[found].ids if found in pages else set()
            if not found.exists() or (anchor and unquote(anchor) not in places):
                wrong.append((path.name, link))
    assert not wrong


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert all(page.loads for page in pages.values())
    assert not [url for page in pages.values() for url in page.loads if urlsplit(url).netloc]
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", path.read_text(encoding="utf-8")), path


def test_every_picture_is_there(pages):
    for path, page in pages.items():
        for url in page.loads:
            assert (path.parent / unquote(urlsplit(url).path)).exists(), (path.name, url)


@pytest.mark.parametrize("what", LEFT_OVER)
def test_nothing_is_left_of_the_source(pages, what):
    wrong = []
    for path in pages:
        article = (
            path.read_text(encoding="utf-8").partition("<article")[2].partition("</article")[0]
        )
        text = re.sub(r"<(code|pre|math)\b.*?</\1>", "", article, flags=re.DOTALL)
        wrong += [
            (path.name, text[m.start() - 40 : m.end() + 40])
            for m in re.finditer(LEFT_OVER[what], text)
        ]
    assert not wrong


def test_formulas_are_mathml(site):
    text = (site / "api" / "layers.html").read_text(encoding="utf-8")
    assert text.count("<math") >= text.count('class="formula"') > 10


def test_every_card_of_a_layer_has_its_picture(site):
    for path in sorted((site / "methods").glob("*.html")):
        has_picture = f"images/methods/{path.stem}.svg" in path.read_text(encoding="utf-8")
        assert has_picture == (path.stem not in ("index", "ws", "iew")), path.name
