"""The crawler fetches web pages and gives back their text."""

from __future__ import annotations

from html.parser import HTMLParser

import httpx
from pydantic import BaseModel, Field, HttpUrl

from sutazai.agent import Agent, Context
from sutazai.errors import InvalidInput, Unavailable

agent = Agent("crawler", port=8101, doc=__doc__, slots=(1, 2, 8))

MAX_PAGE_BYTES = 2_000_000


class FetchParams(BaseModel):
    """Which page to fetch."""

    url: HttpUrl = Field(description="The page to read.")
    max_characters: int = Field(default=20_000, ge=1, le=200_000, description="Cut the text here.")


class Page(BaseModel):
    """A page as a person reads it."""

    title: str
    text: str
    truncated: bool = Field(description="Whether the text was cut.")


@agent.action(time_limit_s=30, max_attempts=3, retry_on=(Unavailable,))
def fetch(params: FetchParams, context: Context) -> Page:
    """Fetch one page and return its readable text."""
    html = _download(str(params.url))
    context.progress(0.5, f"{len(html)} characters")
    reader = _Reader()
    reader.feed(html)
    text = " ".join(" ".join(reader.words).split())
    context.log.info("page read", url=str(params.url), characters=len(text))
    return Page(
        title=" ".join("".join(reader.title).split()),
        text=text[: params.max_characters],
        truncated=len(text) > params.max_characters,
    )


def _download(url: str) -> str:
    """Return a page's source; what may pass by itself is `Unavailable` and is tried again."""
    try:
        with httpx.stream("GET", url, timeout=10, follow_redirects=True) as answer:
            if answer.status_code >= 500:
                raise Unavailable(f"{url} answered {answer.status_code}.")
            if answer.status_code >= 400:
                raise InvalidInput(f"{url} answered {answer.status_code}.")
            raw = b""
            for chunk in answer.iter_bytes():
                raw += chunk
                if len(raw) > MAX_PAGE_BYTES:
                    raise InvalidInput(f"{url} is larger than {MAX_PAGE_BYTES} bytes.")
            return raw.decode(answer.encoding or "utf-8", errors="replace")
    except httpx.TransportError as error:
        raise Unavailable(f"{url} cannot be reached: {error}") from error


class _Reader(HTMLParser):
    """Collects the title and the visible text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title: list[str] = []
        self.words: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element whose text is not to be read, or the title."""
        del attrs
        if tag in ("script", "style", "title"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Leave it."""
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        """Keep text."""
        if not self._inside:
            self.words.append(data)
        elif self._inside[-1] == "title":
            self.title.append(data)
