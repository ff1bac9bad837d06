"""One database on HTTP: a JSON API, and a page over it; needs the extra `[web]`."""

from rapidin_vdb.web.app import make_app
from rapidin_vdb.web.server import serve

__all__ = ["make_app", "serve"]
