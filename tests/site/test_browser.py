"""The site in a browser: search, colours, narrow windows, and nothing asked of other hosts."""

import time

import pytest

from lab.browser import requests_of, run

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("site")]
WIDTHS = (400, 1280)


@pytest.fixture
def page(chromium, address):
    """The first page, in a window of 1280 pixels."""
    resize(chromium, 1280)
    for log in ("performance", "browser"):
        chromium.get_log(log)  # what earlier pages left there
    chromium.get(f"{address}/index.html")
    chromium.execute_script("localStorage.clear()")
    return chromium


def resize(browser, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def comes_true(browser, script, seconds):
    """Ask until the answer is true, and return it; or the last answer, when time is up."""
    end = time.monotonic() + seconds
    while not (found := run(browser, script)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def wait_for(browser, script):
    """Ask until the answer is true."""
    found = comes_true(browser, script, 20)
    assert found, script
    return found


def test_search_finds_pages_and_names(page, address):
    for words, expected in (
        ("ghost batch normalization", "methods/ghost"),
        ("tune_example_weight", "api/"),
    ):
        page.get(f"{address}/index.html")
        page.find_element("css selector", "[data-md-component=search-query]").send_keys(words)
        links = wait_for(
            page,
            "(links => links.length && links)"
            "([...document.querySelectorAll('.md-search-result__link')].map(a => a.href))",
        )
        assert any(expected in link for link in links[:5]), (words, links)
    page.get(links[0])
    assert run(page, "document.querySelector('article h1').textContent")


def scheme(browser):
    return run(browser, "document.body.getAttribute('data-md-color-scheme')")


def test_colours_follow_the_system_until_somebody_chooses(page, address):
    try:
        for media, expected in (("dark", "slate"), ("light", "default")):
            features = [{"name": "prefers-color-scheme", "value": media}]
            page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            page.get(f"{address}/index.html")
            assert wait_for(
                page, f"document.body.getAttribute('data-md-color-scheme') == '{expected}'"
            )
        seen = []
        for _ in range(3):
            run(
                page,
                "[...document.querySelectorAll('[data-md-component=palette] label')]"
                ".find(label => !label.hidden).click()",
            )
            seen.append(scheme(page))
            page.refresh()
            wait_for(page, f"document.body.getAttribute('data-md-color-scheme') == '{seen[-1]}'")
        assert set(seen) == {"default", "slate"}
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        page.execute_script("localStorage.clear()")


def test_dark_text_is_light_on_dark(page, address):
    def luminance(property_, selector):
        colour = run(page, f"getComputedStyle(document.querySelector('{selector}')).{property_}")
        return sum(float(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3]) / 765

    run(page, "document.body.setAttribute('data-md-color-scheme', 'slate')")
    assert luminance("backgroundColor", "body") < 0.25
    assert luminance("color", "article p") > 0.6


def test_no_page_is_wider_than_the_window(page, site, address):
    wide = {}
    for path in sorted(site.rglob("*.html")):
        page.get(f"{address}/{path.relative_to(site).as_posix()}")
        for width in WIDTHS:
            resize(page, width)
            wait_for(page, f"innerWidth == {width}")
            # Sidebars slide to their places after a change of width.
            if not comes_true(page, f"document.documentElement.scrollWidth <= {width}", 3):
                wide[path.name] = run(page, "document.documentElement.scrollWidth")
    assert not wide


def test_no_other_host_is_asked_and_no_script_fails(page, address):
    for name in ("index", "methods/bgn", "api/layers", "gallery", "tutorials/own-norm"):
        page.get(f"{address}/{name}.html")
        wait_for(page, "document.readyState == 'complete'")
    assert not [url for url in requests_of(page) if not url.startswith((address, "data:", "blob:"))]
    assert page.get_log("browser") == []


def test_formulas_are_drawn_with_the_font_of_the_site(page, address):
    page.get(f"{address}/api/layers.html")
    assert wait_for(page, "document.fonts.check('16px \"Site Math\"') && document.fonts.size > 0")
    sizes = run(
        page, "[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().width)"
    )
    assert sizes
    assert min(sizes) > 0


def test_every_picture_of_the_gallery_is_shown(page, address):
    page.get(f"{address}/gallery.html")
    wait_for(page, "[...document.images].every(image => image.complete)")
    assert (
        run(page, "[...document.images].map(image => image.naturalWidth > 100)").count(False) == 0
    )
    assert run(page, "document.images.length") >= 7
