"Check the links of a built site without network: `python tools/docs_links.py _site`."

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "The ids of a page, what it links to, and what a browser loads with it"

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = {"", "top"}, [], []
        # colours of code, most of what there is to parse
        self.feed(re.sub(r"</?span(?: class=\"[^\"]*\")?>", "", path.read_text(encoding="utf-8")))

    def handle_starttag(self, tag, attrs):
        attrs = {k: v or "" for k, v in attrs}
        self.ids |= {attrs[k] for k in ("id", "name") if k in attrs}
        if "href" in attrs:
            (self.loaded if tag == "link" and attrs.get("rel") not in ("canonical", "author")
             else self.links).append(attrs["href"])
        self.loaded += [attrs[k] for k in ("src", "poster", "data") if k in attrs and tag != "a"]
        self.loaded += [s.split()[0] for s in attrs.get("srcset", "").split(",") if s.strip()]
        if "action" in attrs:
            self.links.append(attrs["action"])


def broken_links(
    site,  # folder of a built site
):         # sentences, one for each problem: page, link, what is wrong
    """Every link resolves to a file of the site and an id in it; nothing is loaded from elsewhere; external
    addresses are well formed"""
    site = Path(site).resolve()
    pages = {p: Page(p) for p in sorted(site.rglob("*.html")) if "_static" not in p.parts}
    problems = [] if pages else [f"{site}: no pages"]
    for path, page in pages.items():
        for link in {*page.links, *page.loaded}:
            if (wrong := what_is_wrong(link, path, pages, site, link in page.loaded)):
                problems.append(f"{path.relative_to(site).as_posix()}: {link}: {wrong}")
    for path in sorted(site.rglob("*.css")):
        for address in re.findall(r"(?:url\(|@import\s)\s*[\"']?((?:https?:)?//[^\"')]+)",
                                  path.read_text(encoding="utf-8")):
            problems.append(f"{path.relative_to(site).as_posix()}: {address}: is loaded from the network")
    return sorted(problems)


def what_is_wrong(link, path, pages, site, loaded):
    "Nothing, or why a link of the page at `path` leads nowhere"
    parts = urlsplit(link)
    if parts.scheme == "data" or link.startswith("mailto:") and "@" in link:
        return None
    if parts.scheme or parts.netloc:
        if loaded:
            return "is loaded from the network"
        good = (parts.scheme in ("http", "https") and re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc)
                and not re.search(r"\s", link))
        return None if good else "is no address"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return "there is no such file"
    if not target.is_relative_to(site):
        return "is outside the site"
    if target in pages and unquote(parts.fragment) not in pages[target].ids:
        return "there is no such place on the page"
    return None


if __name__ == "__main__":
    found = broken_links(sys.argv[1])
    print("\n".join(found))
    sys.exit(f"{len(found)} broken links" if found else 0)
