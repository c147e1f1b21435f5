"""The HTTP front of an agent: the same routes for every agent, derived from its declaration.

`create_app` makes one agent's application, `serve` runs the fronts of several in one process. A
front accepts work while the broker is away, because it writes rows and knows no Celery.
"""

from sutazai.api.app import create_app
from sutazai.api.server import serve
from sutazai.api.waiting import Waiting

__all__ = ["Waiting", "create_app", "serve"]
