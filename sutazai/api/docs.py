"""`/docs`: Swagger UI, which works without a network, and `/openapi.json`."""

from __future__ import annotations

import importlib.util
import mimetypes
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

from sutazai.api.answer import json_answer
from sutazai.errors import NotFound

FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" type="image/png" href="docs/favicon.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

_START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
"""

_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'"
)
"""The browser itself is told to fetch nothing from elsewhere."""


async def show_page(request: Request) -> Response:
    """Show Swagger UI."""
    page = _PAGE.format(title=request.app.title)
    return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})


async def show_file(request: Request) -> Response:
    """Serve Swagger UI's own files from the package that brings them."""
    name = request.path_params["name"]
    if name == "start.js":
        return Response(_START, media_type="text/javascript")
    if name not in FILES:
        raise NotFound
    media_type = mimetypes.guess_type(name)[0]
    headers = {"Cache-Control": "max-age=86400"}
    return FileResponse(_folder() / name, media_type=media_type, headers=headers)


async def show_openapi(request: Request) -> Response:
    """Return the OpenAPI document."""
    return json_answer(request.app.openapi())


@cache
def _folder() -> Path:
    """Find the files of Swagger UI 5 (4 cannot show OpenAPI 3.1); nothing is imported."""
    found = importlib.util.find_spec("fastapi_offline")
    if found is None or found.origin is None:
        raise NotFound("fastapi-offline, which brings Swagger UI, is not installed.")
    return Path(found.origin).parent / "static"
