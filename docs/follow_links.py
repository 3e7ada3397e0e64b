"""`make links`: whether the pages' links to other sites lead anywhere. It wants the web; no part of `make test`.

python docs/follow_links.py [--list]
"""

import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[[^\]]*\](?:\(|: )(https://[^)\s]+)")
GONE = (404, 410)
LIMIT_S = 20.0
AT_ONCE = 8


def outside_links():
    """Every link to another site, with the first page that has it."""
    found = {}
    for page in (ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for link in LINK.findall(page.read_text("utf-8")):
            found.setdefault(link, page.relative_to(ROOT))
    return found


def answer(link):
    """The status that a site answers with, or why it gave none."""
    request = urllib.request.Request(link, headers={"User-Agent": "uniapl-links"})  # noqa: S310 (https alone)
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:  # noqa: S310
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return str(getattr(error, "reason", error))


def main(arguments):
    """Exit status: 0, each one leads somewhere; 1, some are gone; 2, none is known to be, but some gave no answer."""
    links = outside_links()
    if "--list" in arguments:
        print("\n".join(f"{page}: {link}" for link, page in links.items()))
        return 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = dict(zip(links, pool.map(answer, links), strict=True))
    gone = [link for link, said in answers.items() if said in GONE]
    silent = [link for link, said in answers.items() if said not in GONE and said not in range(200, 400)]
    for link in gone + silent:
        print(f"{links[link]}: {link}: {answers[link]}")
    print(f"{len(links)} links: {len(links) - len(gone) - len(silent)} lead somewhere, {len(gone)} are gone, "
          f"{len(silent)} gave no answer")  # fmt: skip
    return 1 if gone else 2 if silent else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
