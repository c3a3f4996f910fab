"""``run`` and ``refused`` of dynmoe-convert."""

from command_line import fixtures

from runners import convert

run, refused = fixtures("dynmoe-convert", convert.main)
