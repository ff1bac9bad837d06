"""Rankings as one page that needs nothing else."""

from rapidin_vdb.page.render import render_page

__all__ = ["render_page"]
