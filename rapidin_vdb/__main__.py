"""`python -m rapidin_vdb` is `rapidin-vdb`."""

from rapidin_vdb.cli import main

main()
