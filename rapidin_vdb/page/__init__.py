"""Rankings as one page that needs nothing else, and what other pages share with it."""

from rapidin_vdb.page.render import heat_script, page_style, render_page, sample_pieces, with_pieces

__all__ = ["heat_script", "page_style", "render_page", "sample_pieces", "with_pieces"]
